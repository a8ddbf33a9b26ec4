"""LVIS annotations as arrays, checked once, so that no evaluator misreads them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.evaluation.entries import (
    Rows,
    flags,
    integer_lists,
    integers,
    numbers,
    positions,
    read_json,
    refuse,
    unique_ids,
)

Annotations = Mapping[str, Any]
"""The tree of an LVIS json: `images`, `annotations`, `categories`."""


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Boxes of a federated data set.

    `image_ids` (I,) and `category_ids` (C,) ascend; a category's position is its column. One row
    an annotation, in the file's order: `image` and `column` (N,) int64 positions, `bbox` (N, 4)
    float64 xywh in pixels, `area` (N,) float64 in square pixels, `ignored` (N,) bool. `negative`
    and `not_exhaustive` hold pairs as sorted int64 keys, image position * C + column.
    `frequencies` has "r", "c", "f" or None a category; `image_counts` its training images, -1
    where not given.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    names: tuple[str, ...]
    frequencies: tuple[str | None, ...]
    image_counts: NDArray[np.int64]
    image: NDArray[np.int64]
    column: NDArray[np.int64]
    bbox: NDArray[np.float64]
    area: NDArray[np.float64]
    ignored: NDArray[np.bool_]
    negative: NDArray[np.int64]
    not_exhaustive: NDArray[np.int64]

    @property
    def num_categories(self) -> int:
        """Number of columns."""
        return len(self.category_ids)

    def digest(self) -> str:
        """Sixteen hex digits that are equal where the images, boxes and federation are."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        arrays = (
            self.image_ids, self.category_ids, self.image, self.column, self.bbox, self.area,
            self.ignored, self.negative, self.not_exhaustive,
        )  # fmt: skip
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def pair(self, image: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
        """The key of each (image, category) pair."""
        return image * self.num_categories + column

    def subset(self, image_ids: NDArray[np.int64]) -> "GroundTruth":
        """The same categories on some of the images; an unknown image is a `DataError`."""
        kept = np.unique(image_ids)
        refuse(~np.isin(kept, self.image_ids), kept, "is not an image of the annotations", "subset")
        position = np.full(len(self.image_ids), -1, np.int64)
        position[np.searchsorted(self.image_ids, kept)] = np.arange(len(kept))
        rows = position[self.image] >= 0

        def move(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
            image, column = np.divmod(pairs, self.num_categories)
            inside = position[image] >= 0
            return self.pair(position[image[inside]], column[inside])

        return replace(
            self,
            image_ids=kept,
            image=position[self.image[rows]],
            column=self.column[rows],
            bbox=self.bbox[rows],
            area=self.area[rows],
            ignored=self.ignored[rows],
            negative=move(self.negative),
            not_exhaustive=move(self.not_exhaustive),
        )


def load_annotations(path: str | Path) -> Annotations:
    """Read an LVIS json; a missing, truncated or other file is a `DataError` that says which."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise DataError(
            f"{path}: ground truth is a json object with images, annotations and categories, this "
            f"is a {type(tree).__name__}; were annotations and detections swapped?"
        )
    return tree


def parse_ground_truth(tree: Annotations, origin: str = "annotations") -> GroundTruth:
    """Check an LVIS tree and turn it into arrays; every violated rule is a `DataError`.

    LVIS has no crowds, and its package takes one for an object like any other: `iscrowd` is the
    sign of a COCO file and refused. `ignore` (0 or 1) is LVIS's own.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree.get(key), list):
            raise DataError(f"{origin}: key {key!r} is missing or no list; is this an LVIS json?")
    images, annotations = tree["images"], tree["annotations"]
    image_ids = unique_ids(images, f"{origin}: images")
    category_ids, categories = sorted_categories(tree, origin)
    where = f"{origin}: annotations"
    ids, bbox, area = boxes(annotations, where)
    crowd = flags(annotations, "iscrowd", where)
    refuse(crowd, ids, "is a crowd: LVIS has none, so this is a COCO file", where)
    return GroundTruth(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(str(row.get("name", row["id"])) for row in categories),
        frequencies=tuple(_frequency(row, origin) for row in categories),
        image_counts=image_counts(categories, origin),
        image=positions(image_ids, integers(annotations, "image_id", where), "image", where),
        column=positions(
            category_ids, integers(annotations, "category_id", where), "category", where
        ),
        bbox=bbox,
        area=area,
        ignored=flags(annotations, "ignore", where),
        negative=_pairs(images, "neg_category_ids", image_ids, category_ids, origin),
        not_exhaustive=_pairs(
            images, "not_exhaustive_category_ids", image_ids, category_ids, origin
        ),
    )


def sorted_categories(tree: Annotations, origin: str) -> tuple[NDArray[np.int64], Rows]:
    """Ascending ids of the categories, and the categories in that order."""
    origin = f"{origin}: categories"
    order = np.argsort(integers(tree["categories"], "id", origin)).tolist()
    return unique_ids(tree["categories"], origin), [tree["categories"][i] for i in order]


def image_counts(categories: Rows, origin: str) -> NDArray[np.int64]:
    """Training images of each category as its file states them, -1 where it does not."""
    return integers(categories, "image_count", f"{origin}: categories", default=-1)


def boxes(
    annotations: Rows, origin: str, missing_area: float | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Ids (N,), each given once, boxes (N, 4) xywh and areas (N,), none of negative size.

    Without a `missing_area` every annotation must have its own.
    """
    unique_ids(annotations, origin)
    ids = integers(annotations, "id", origin)
    bbox = numbers(annotations, "bbox", origin, width=4)
    refuse((bbox[:, 2:] < 0).any(1), ids, "has a box of negative size (bbox is x, y, w, h)", origin)
    area = numbers(annotations, "area", origin, default=missing_area)
    refuse(area < 0, ids, "has a negative area; areas are square pixels", origin)
    return ids, bbox, area


def without_federation(tree: Annotations) -> Annotations:
    """A COCO tree in LVIS form: nothing is verified absent, nothing is known to be incomplete, and
    crowds are left out. For choosing and drawing images, not for AP."""
    unknown: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return {
        "images": [{**image, **unknown} for image in tree["images"]],
        "annotations": [
            row if row.get("area") is not None else {**row, "area": row["bbox"][2] * row["bbox"][3]}
            for row in tree["annotations"]
            if not row.get("iscrowd", 0)
        ],
        "categories": tree["categories"],
    }


def _frequency(category: Mapping[str, Any], origin: str) -> str | None:
    frequency = category.get("frequency")
    if frequency not in ("r", "c", "f", None):
        raise DataError(
            f"{origin}: category {category['id']} has frequency {frequency!r}; it must be r, c or f"
        )
    return None if frequency is None else str(frequency)


def _pairs(
    images: Rows,
    key: str,
    image_ids: NDArray[np.int64],
    category_ids: NDArray[np.int64],
    origin: str,
) -> NDArray[np.int64]:
    missing = [image["id"] for image in images if not isinstance(image.get(key), list)]
    if missing:
        raise DataError(
            f"{origin}: {len(missing)} images have no list {key} (first: {missing[:3]}); federated "
            "AP needs it. Is this a COCO file? Add the lists (empty if nothing is known)."
        )
    members, sizes = integer_lists(images, key, f"{origin}: images")
    owner = np.repeat(integers(images, "id", origin), sizes)
    columns = positions(category_ids, members, f"category in {key}", origin)
    return np.unique(np.searchsorted(image_ids, owner) * len(category_ids) + columns)
