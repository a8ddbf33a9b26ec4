"""Boxes of a COCO-form json and the detections on them as arrays, for data sets that are annotated
exhaustively; `ground_truth.py` has the federated ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.detections import Detections
from pipeline.evaluation.entries import integers, positions, refuse, unique_ids
from pipeline.evaluation.ground_truth import Annotations, boxes, image_counts, sorted_categories


@dataclass(frozen=True, slots=True)
class AnnotatedBoxes:
    """Ground truth of the images that are evaluated.

    `image_ids` (I,) and `category_ids` (C,) ascend; a category's position is its column.
    `image_counts` (C,) are the training images that the file states, -1 where it states none. One
    row a box, in the file's order: `image` and `column` (N,) int64 positions, `bbox` (N, 4) float64
    xywh in pixels, `area` (N,) float64 in square pixels and `area_given` (N,) bool, `ignored` (N,)
    bool: to be found or not, without counting either way.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    names: tuple[str, ...]
    image_counts: NDArray[np.int64]
    image: NDArray[np.int64]
    column: NDArray[np.int64]
    bbox: NDArray[np.float64]
    area: NDArray[np.float64]
    area_given: NDArray[np.bool_]
    ignored: NDArray[np.bool_]

    @property
    def num_categories(self) -> int:
        """Number of columns."""
        return len(self.category_ids)


@dataclass(frozen=True, slots=True)
class FoundBoxes:
    """Detections on the images that are evaluated, one row each, in the order of their list.

    `image` and `column` (N,) are positions in the annotations' ids, `bbox` (N, 4) float64 xywh in
    pixels, `score` (N,) float64.
    """

    image: NDArray[np.int64]
    column: NDArray[np.int64]
    bbox: NDArray[np.float64]
    score: NDArray[np.float64]


def parse_boxes(
    tree: Annotations, ignored: NDArray[np.bool_], origin: str = "annotations"
) -> AnnotatedBoxes:
    """Check a COCO-form tree and turn it into arrays; every violated rule is a `DataError`.

    `ignored` (N,) goes with the annotations. An annotation without `area` (or null)
    gets width x height.
    """
    annotations = tree["annotations"]
    image_ids = unique_ids(tree["images"], f"{origin}: images")
    category_ids, categories = sorted_categories(tree, origin)
    where = f"{origin}: annotations"
    _, bbox, area = boxes(annotations, where, missing_area=0.0)
    area_given = np.array([row.get("area") is not None for row in annotations], bool)
    return AnnotatedBoxes(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(str(row.get("name", row["id"])) for row in categories),
        image_counts=image_counts(categories, origin),
        image=positions(image_ids, integers(annotations, "image_id", where), "image", where),
        column=positions(
            category_ids, integers(annotations, "category_id", where), "category", where
        ),
        bbox=bbox,
        area=np.where(area_given, area, bbox[:, 2] * bbox[:, 3]),
        area_given=area_given,
        ignored=ignored,
    )


def select(
    truth: AnnotatedBoxes, detections: Detections, images: Sequence[int] | None = None
) -> tuple[AnnotatedBoxes, FoundBoxes]:
    """The images that the detector saw, or of these only `images`, and what was found there.

    Raises `DataError` for a detection whose image or category is unknown, or whose image the
    detector did not see, and for one of `images` that is not annotated or that it did not see.
    """
    image = positions(truth.image_ids, detections.image_id, "image", detections.origin)
    column = positions(truth.category_ids, detections.category_id, "category", detections.origin)
    kept = np.ones(len(truth.image_ids), bool)
    if detections.images is not None:
        kept = _mask(truth.image_ids, detections.images, "images that were detected on")
        bad = ~kept[image]
        rule = "is an image that has detections and is not among those that were detected on"
        refuse(bad, detections.image_id, rule, detections.origin)
    if images is not None:
        chosen = _mask(truth.image_ids, np.array(images, np.int64), "images to evaluate")
        rule = "is an image to evaluate that was not detected on; its boxes would count as missed"
        refuse(chosen & ~kept, truth.image_ids, rule, "images to evaluate")
        kept = chosen
    position = np.cumsum(kept) - 1
    rows, found = kept[truth.image], kept[image]
    part = replace(
        truth,
        image_ids=truth.image_ids[kept],
        image=position[truth.image[rows]],
        column=truth.column[rows],
        bbox=truth.bbox[rows],
        area=truth.area[rows],
        area_given=truth.area_given[rows],
        ignored=truth.ignored[rows],
    )
    return part, FoundBoxes(
        image=position[image[found]],
        column=column[found],
        bbox=detections.bbox[found],
        score=detections.score[found],
    )


def _mask(image_ids: NDArray[np.int64], some: NDArray[np.int64], origin: str) -> NDArray[np.bool_]:
    mask = np.zeros(len(image_ids), bool)
    mask[positions(image_ids, some, "image", origin)] = True
    return mask


def iou_by_row(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of xywh boxes row by row, (N,)."""
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    intersection = np.maximum(high - low, 0).prod(axis=1)
    union = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - intersection
    # Only two boxes without area have no union; they do not overlap.
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
