"""LVIS annotations as arrays, checked once, so that no evaluator misreads them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

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


def read_json(path: str | Path) -> object:
    """Parse a local json file, or raise a `DataError` that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the path of a json file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not complete json ({error}); write it again") from None


def parse_ground_truth(tree: Annotations, origin: str = "annotations") -> GroundTruth:
    """Check an LVIS tree and turn it into arrays; every violated rule is a `DataError`."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree.get(key), list):
            raise DataError(f"{origin}: key {key!r} is missing or no list; is this an LVIS json?")
    images, annotations, categories = tree["images"], tree["annotations"], tree["categories"]
    categories = sorted(categories, key=lambda category: int(category["id"]))
    image_ids = unique_ids(images, f"{origin}: images")
    category_ids = unique_ids(categories, f"{origin}: categories")
    unique_ids(annotations, f"{origin}: annotations")
    bbox = numbers(annotations, "bbox", origin, width=4)
    area = numbers(annotations, "area", origin)
    ids = integers(annotations, "id", origin)
    refuse((bbox[:, 2:] < 0).any(1), ids, "has a box of negative size (bbox is x, y, w, h)", origin)
    crowd = np.array([bool(row.get("iscrowd", 0)) for row in annotations], bool)
    refuse(crowd, ids, "is a crowd: LVIS has none, so this is a COCO file", origin)
    return GroundTruth(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(str(row.get("name", row["id"])) for row in categories),
        frequencies=tuple(_frequency(row, origin) for row in categories),
        image_counts=np.array([_image_count(row) for row in categories], np.int64),
        image=positions(image_ids, integers(annotations, "image_id", origin), "image", origin),
        column=positions(
            category_ids, integers(annotations, "category_id", origin), "category", origin
        ),
        bbox=bbox,
        area=area,
        ignored=np.array([bool(row.get("ignore", 0)) for row in annotations], bool),
        negative=_pairs(images, "neg_category_ids", image_ids, category_ids, origin),
        not_exhaustive=_pairs(
            images, "not_exhaustive_category_ids", image_ids, category_ids, origin
        ),
    )


def without_federation(tree: Annotations) -> Annotations:
    """A COCO tree in LVIS form: nothing is verified absent, nothing is known to be incomplete, and
    crowds are left out. For choosing and drawing images, not for AP."""
    unknown: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return {
        "images": [{**image, **unknown} for image in tree["images"]],
        "annotations": [
            {**row, "area": row.get("area", row["bbox"][2] * row["bbox"][3])}
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


def _image_count(category: Mapping[str, Any]) -> int:
    count = category.get("image_count")
    return -1 if count is None else int(count)


def _pairs(
    images: Sequence[Mapping[str, Any]],
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
    owner = np.repeat(
        np.array([image["id"] for image in images], np.int64), [len(image[key]) for image in images]
    )
    members = np.array([value for image in images for value in image[key]], np.int64)
    columns = positions(category_ids, members, f"category in {key}", origin)
    return np.unique(np.searchsorted(image_ids, owner) * len(category_ids) + columns)


def refuse(bad: NDArray[np.bool_] | np.bool_, values: NDArray[Any], rule: str, origin: str) -> None:
    """Raise a `DataError` with the number of bad rows and the first three different values."""
    if bad.any():
        different = dict.fromkeys(values[bad][:1000].tolist())
        first = ", ".join(str(value) for value in list(different)[:3])
        raise DataError(f"{origin}: {first} {rule} ({int(bad.sum())} of {len(values)})")


def unique_ids(rows: Sequence[Mapping[str, Any]], origin: str) -> NDArray[np.int64]:
    """The rows' ids in ascending order; an id given twice is a `DataError`."""
    ids, count = np.unique(integers(rows, "id", origin), return_counts=True)
    refuse(count > 1, ids, "is an id given more than once; ids must differ", origin)
    return ids


def integers(rows: Sequence[Mapping[str, Any]], key: str, origin: str) -> NDArray[np.int64]:
    """(N,) int64 of one key; text, fractions and missing values are a `DataError`."""
    values = _column(rows, key, origin)
    array = np.array(values) if values else np.zeros(0, np.int64)
    if array.dtype.kind != "i" or array.ndim != 1:
        wrong = [value for value in values if type(value) is not int]
        raise DataError(f"{origin}: {key} must be whole numbers, not {wrong[:3]}")
    return array.astype(np.int64)


def numbers(
    rows: Sequence[Mapping[str, Any]], key: str, origin: str, width: int = 0
) -> NDArray[np.float64]:
    """(N,) or (N, width) finite float64 of one key, or a `DataError`."""
    values = _column(rows, key, origin)
    shape = (len(values), width) if width else (len(values),)
    try:
        array = np.array(values, np.float64).reshape(shape) if values else np.zeros(shape)
    except (TypeError, ValueError):
        kind = f"lists of {width} numbers" if width else "numbers"
        wrong = [value for value in values if not _is_number(value, width)]
        raise DataError(f"{origin}: {key} must be {kind}, not {wrong[:1]}") from None
    bad = ~np.isfinite(array).reshape(len(values), width or 1).all(axis=1)
    refuse(bad, np.arange(len(values)), f"is an entry whose {key} is not finite", origin)
    return array


def _is_number(value: object, width: int) -> bool:
    if width:
        return (
            isinstance(value, list)
            and len(value) == width
            and all(_is_number(part, 0) for part in value)
        )
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _column(rows: Sequence[Mapping[str, Any]], key: str, origin: str) -> list[Any]:
    try:
        return [row[key] for row in rows]
    except KeyError:
        count = sum(key not in row for row in rows)
        raise DataError(f"{origin}: {count} of {len(rows)} entries have no {key!r}") from None
    except TypeError:
        raise DataError(f"{origin}: entries must be json objects with {key!r}") from None


def positions(
    known: NDArray[np.int64], ids: NDArray[np.int64], what: str, origin: str
) -> NDArray[np.int64]:
    """Where each id stands in the ascending `known` ids; an unknown one is a `DataError`."""
    place = np.searchsorted(known, ids)
    found = place < len(known)
    found[found] = known[place[found]] == ids[found]
    refuse(~found, ids, f"is an unknown {what} id", origin)
    return place.astype(np.int64)
