"""Boxes of a COCO-form json and the detections on them as arrays, for data sets that are annotated
exhaustively; `ground_truth.py` has the federated ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.detections import Detections
from pipeline.evaluation.ground_truth import (
    Annotations,
    integers,
    numbers,
    positions,
    refuse,
    unique_ids,
)


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

    `ignored` (N,) goes with the annotations. An annotation without `area` gets width x height.
    """
    annotations = tree["annotations"]
    image_ids = unique_ids(tree["images"], f"{origin}: images")
    category_ids = unique_ids(tree["categories"], f"{origin}: categories")
    unique_ids(annotations, f"{origin}: annotations")
    ids = integers(annotations, "id", origin)
    bbox = numbers(annotations, "bbox", origin, width=4)
    refuse((bbox[:, 2:] < 0).any(1), ids, "has a box of negative size (bbox is x, y, w, h)", origin)
    area, area_given = bbox[:, 2] * bbox[:, 3], np.array(["area" in row for row in annotations])
    area_given = area_given.astype(bool)
    area[area_given] = numbers([row for row in annotations if "area" in row], "area", origin)
    refuse(area < 0, ids, "has a negative area; areas are square pixels", origin)
    categories = sorted(tree["categories"], key=lambda category: int(category["id"]))
    return AnnotatedBoxes(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(str(row.get("name", row["id"])) for row in categories),
        image_counts=np.array([_image_count(row) for row in categories], np.int64),
        image=positions(image_ids, integers(annotations, "image_id", origin), "image", origin),
        column=positions(
            category_ids, integers(annotations, "category_id", origin), "category", origin
        ),
        bbox=bbox,
        area=area,
        area_given=area_given,
        ignored=ignored,
    )


def _image_count(category: Mapping[str, Any]) -> int:
    count = category.get("image_count")
    return -1 if count is None else int(count)


def flags(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    origin: str,
    values: tuple[int, ...] = (0, 1),
) -> NDArray[np.bool_]:
    """(N,) bool of one key, False where it is absent; a value other than `values` is a `DataError`.

    Only 1 (or true) sets a flag. Text is refused: "0" would be taken for set.
    """
    given = [row.get(key, 0) for row in rows]
    wrong = [one for one in given if not isinstance(one, bool | int) or one not in values]
    if wrong:
        raise DataError(
            f"{origin}: {len(wrong)} of {len(rows)} annotations have a {key} that is none of "
            f"{', '.join(map(str, values))} (first: {wrong[0]!r}); write it as one of these numbers"
        )
    return np.array([one == 1 for one in given], bool)


def select(
    truth: AnnotatedBoxes, detections: Detections, images: Sequence[int] | None = None
) -> tuple[AnnotatedBoxes, FoundBoxes]:
    """The images that the detector saw, or of these only `images`, and what was found there.

    Raises `DataError` for a detection whose image or category is unknown, or whose image the
    detector did not see, and for one of `images` that is not annotated or that it did not see.
    """
    image = positions(truth.image_ids, detections.image_id, "image", "detections")
    column = positions(truth.category_ids, detections.category_id, "category", "detections")
    kept = np.ones(len(truth.image_ids), bool)
    if detections.images is not None:
        kept = _mask(truth.image_ids, detections.images, "images that were detected on")
        bad = ~kept[image]
        rule = "is an image that has detections and is not among those that were detected on"
        refuse(bad, detections.image_id, rule, "detections")
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
