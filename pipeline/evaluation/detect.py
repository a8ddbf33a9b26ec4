"""From a detector and batches to detections in pixels of the photographs."""

from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, normalise
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.detectors.interface import Detector, Predictions
from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections


def detect(
    detector: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str,
    max_detections: int,
    vocabulary: Vocabulary,
    *,
    progress: Callable[[int], None] | None = None,
) -> Detections:
    """The best `max_detections` (query, category) pairs of every image, best first.

    `detector` follows `interface.Detector`; it is put into eval mode and left in the mode that it
    was in. `progress` is called with the number of images of each finished batch. An image that
    comes twice is a `DataError`.
    """
    preprocessing = cast(Detector, detector)
    category_ids = torch.tensor(list(vocabulary.ids), dtype=torch.int64)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    images: list[int] = []
    was_training = detector.training
    detector.eval()
    try:
        for batch in batches:
            moved = batch.to(device)
            pixels = normalise(
                moved.images, moved.mask, preprocessing.pixel_mean, preprocessing.pixel_std
            )
            with torch.inference_mode():
                predictions: Predictions = detector(pixels, moved.mask)
                sizes = [target.original_size for target in batch.targets]
                found.extend(select_top(predictions, sizes, max_detections))
            images.extend(target.image_id for target in batch.targets)
            if progress is not None:
                progress(len(batch.targets))
    finally:
        detector.train(was_training)
    if len(set(images)) != len(images):
        twice = sorted({image for image in images if images.count(image) > 1})
        raise DataError(f"images {twice[:3]} came twice; each must be detected on once")
    return _collect(found, images, category_ids)


def select_top(
    predictions: Predictions, original_sizes: list[tuple[int, int]], max_detections: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Columns (K,), scores (K,) and xywh boxes (K, 4) in pixels for each image, on the CPU.

    Logits (B, Q, C) compete over queries and categories together; boxes are cut at the borders of
    the photograph, whose (height, width) is `original_sizes`.
    """
    logits, boxes = predictions.logits.float(), predictions.boxes.float()
    num_queries, num_categories = logits.shape[1:]
    count = min(max_detections, num_queries * num_categories)
    scores, flat = logits.flatten(1).sigmoid().topk(count, dim=1)
    query = flat // num_categories
    chosen = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    scale = torch.tensor([(width, height) for height, width in original_sizes], device=boxes.device)
    size = scale[:, None].float()
    low = ((chosen[..., :2] - chosen[..., 2:] / 2).clamp(min=0) * size).minimum(size)
    high = ((chosen[..., :2] + chosen[..., 2:] / 2).clamp(min=0) * size).minimum(size)
    bbox = torch.cat([low, (high - low).clamp(min=0)], dim=-1)
    columns = flat % num_categories
    return list(zip(columns.cpu(), scores.cpu(), bbox.cpu(), strict=True))


def _collect(
    found: list[tuple[Tensor, Tensor, Tensor]], images: list[int], category_ids: Tensor
) -> Detections:
    counts = [len(columns) for columns, _, _ in found]
    columns, scores, bbox = (
        (torch.cat(parts) for parts in zip(*found, strict=True))
        if found
        else (torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 4))
    )
    image_ids = np.array(images, np.int64)
    return Detections(
        image_id=np.repeat(image_ids, counts),
        category_id=category_ids[columns].numpy(),
        bbox=bbox.double().numpy(),
        score=scores.double().numpy(),
        images=image_ids,
    )
