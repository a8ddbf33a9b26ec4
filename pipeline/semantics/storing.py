"""Making the stored soft labels of a source: its pictures as they are, at evaluation's size."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch, Targets, collate
from pipeline.data.shards.index import Index
from pipeline.data.storage.files import exists
from pipeline.data.stream.reader import SourceReader
from pipeline.data.transforms import evaluation_transform
from pipeline.errors import DataError
from pipeline.recipe import Transforms
from pipeline.semantics.soft_labels import LabelMaker
from pipeline.semantics.sparse import SparseLabels
from pipeline.semantics.stored import (
    Header,
    file_url,
    read_labels,
    shard_samples,
    write_header,
    write_labels,
)

_BATCH = 8
"""Pictures that the teacher sees at once."""


def missing_shards(index: Index, folder: str) -> list[int]:
    """The shards whose labels are not there yet."""
    shards = np.unique(index.shard).tolist()
    return [shard for shard in shards if not exists(file_url(folder, shard))]


def shard_images(index: Index, shards: list[int]) -> int:
    """How many images some shards have."""
    return sum(len(shard_samples(index, shard)) for shard in shards)


def store_shard(
    reader: SourceReader,
    teacher: LabelMaker,
    transforms: Transforms,
    shard: int,
    folder: str,
    top_k: int | None,
    device: torch.device | str,
    report: Callable[[int], object] = lambda images: None,
) -> None:
    """Write the labels of all boxes of a shard's samples, in the order of sample and box.

    An image that cannot be read has none and is counted. `report` is told of each picture done.
    """
    counts, skipped = [], 0
    waiting: list[tuple[Tensor, Targets]] = []
    # An empty part first, for a shard without boxes.
    parts = [torch.zeros((0, reader.num_categories))]
    for number in shard_samples(reader.index, shard):
        try:
            waiting.append(_example(reader, transforms, number))
            counts.append(len(waiting[-1][1].boxes))
        except DataError:
            skipped += 1
            counts.append(0)
        if len(waiting) == _BATCH:
            parts.extend(_labels(teacher, waiting, transforms, device))
            waiting = []
        report(1)
    if waiting:
        parts.extend(_labels(teacher, waiting, transforms, device))
    labels = SparseLabels.of(torch.cat(parts), top_k)
    write_labels(file_url(folder, shard), counts, labels, skipped)


def finish(index: Index, folder: str, identity: dict[str, Any], temperature: float) -> Header:
    """Write the header of a folder that has all its files, from what they hold."""
    rest_sum, rest_most, boxes, skipped, num_bytes, categories = 0.0, 0.0, 0, 0, 0, 0
    for shard in np.unique(index.shard).tolist():
        labels, without = read_labels(file_url(folder, shard))
        spread = labels.rest()
        rest_sum, boxes = rest_sum + float(spread.sum()), boxes + len(spread)
        rest_most = max(rest_most, float(spread.max(initial=0.0)))
        skipped, num_bytes = skipped + without, num_bytes + labels.num_bytes
        categories = labels.num_categories
    rest = rest_sum / max(boxes, 1), rest_most
    header = Header(
        identity, temperature, categories, boxes, index.num_samples, skipped, rest, num_bytes
    )
    write_header(folder, header)
    return header


def _example(reader: SourceReader, transforms: Transforms, number: int) -> tuple[Tensor, Targets]:
    sample = reader.shards.sample(number)
    picture = evaluation_transform(reader.picture(sample), transforms)
    targets = Targets(
        boxes=picture.normalised_boxes(),
        labels=picture.labels,
        image_id=sample.image_id,
        size=picture.size,
        original_size=(sample.height, sample.width),
    )
    return picture.image, targets


def _labels(
    teacher: LabelMaker,
    examples: list[tuple[Tensor, Targets]],
    transforms: Transforms,
    device: torch.device | str,
) -> list[Tensor]:
    images, targets = zip(*examples, strict=True)
    names = [""] * len(images)
    batch: Batch = collate(images, targets, names, names, transforms.size_divisor)
    return [rows.cpu() for rows in teacher.soft_labels(batch.to(device))]
