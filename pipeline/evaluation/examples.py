"""Pictures for the report: some evaluated images with their ground truth and best detections."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import decode_image
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.ground_truth import GroundTruth

MAX_SIDE = 640
MIN_DETECTIONS, MAX_DETECTIONS = 3, 20
SAME_OBJECT_IOU = 0.7
"""Of detections that overlap more, whatever their categories, only the best is drawn."""


def save_examples(
    folder: Path,
    truth: GroundTruth,
    detections: Detections,
    read_image: Callable[[int], bytes],
    limit: int,
) -> list[int]:
    """Write `examples.json` and a small JPEG for each of up to `limit` images into `folder`.

    Images with rare categories come first, then with common ones. `read_image` gives the encoded
    photograph of an image id. Boxes in examples.json are xywh in pixels of the JPEG. For each image
    as many detections are kept as it has ground-truth boxes (3 to 20). Returns the image ids.
    """
    if detections.images is not None:
        truth = truth.subset(detections.images)
    chosen = choose_images(truth, limit)
    examples = []
    for image_id in chosen:
        picture = decode_image(read_image(image_id))
        scale = min(1.0, MAX_SIDE / max(picture.size))
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        name = f"example_{image_id:012d}.jpg"
        picture.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(
            folder / name, quality=82, optimize=True
        )
        examples.append(
            {
                "image_id": image_id,
                "file": name,
                "width": size[0],
                "height": size[1],
                **_boxes(truth, detections, image_id, scale),
            }
        )
    partial = folder / "examples.json.partial"
    partial.write_text(json.dumps(examples, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "examples.json")
    return chosen


def choose_images(truth: GroundTruth, limit: int) -> list[int]:
    """Up to `limit` image ids: most rare categories first, then most common, then fewest boxes."""
    size = len(truth.image_ids)
    pairs = np.unique(np.stack([truth.image, truth.column]), axis=1)

    def categories_of(frequency: str) -> NDArray[np.int64]:
        group = np.array([value == frequency for value in truth.frequencies], bool)
        return np.bincount(pairs[0][group[pairs[1]]], minlength=size)

    boxes = np.bincount(truth.image, minlength=size)
    order = np.lexsort(
        (truth.image_ids, boxes, boxes == 0, -categories_of("c"), -categories_of("r"))
    )
    chosen: list[int] = truth.image_ids[order[:limit]].tolist()
    return chosen


def _boxes(
    truth: GroundTruth, detections: Detections, image_id: int, scale: float
) -> dict[str, list[dict[str, Any]]]:
    def describe(column: int, bbox: NDArray[np.float64]) -> dict[str, Any]:
        return {
            "name": truth.names[column],
            "frequency": truth.frequencies[column],
            "bbox": [round(value, 1) for value in (bbox * scale).tolist()],
        }

    rows = np.flatnonzero(truth.image_ids[truth.image] == image_id)
    count = min(max(len(rows), MIN_DETECTIONS), MAX_DETECTIONS)
    found = np.flatnonzero(detections.image_id == image_id)
    found = found[np.argsort(-detections.score[found], kind="stable")]
    best = found[_distinct(detections.bbox[found], count)]
    columns = np.searchsorted(truth.category_ids, detections.category_id[best])
    return {
        "ground_truth": [describe(int(truth.column[row]), truth.bbox[row]) for row in rows],
        "detections": [
            describe(int(column), detections.bbox[row])
            | {"score": round(float(detections.score[row]), 4)}
            for row, column in zip(best, columns, strict=True)
        ],
    }


def _distinct(bbox: NDArray[np.float64], count: int) -> list[int]:
    """Positions of the first `count` boxes that are not nearly one that was taken before."""
    taken: list[int] = []
    for position in range(len(bbox)):
        if len(taken) == count:
            break
        if all(_iou(bbox[position], bbox[other]) <= SAME_OBJECT_IOU for other in taken):
            taken.append(position)
    return taken


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    size = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    if (size <= 0).any():
        return 0.0
    shared = float(size.prod())
    return shared / float(a[2:].prod() + b[2:].prod() - shared)
