"""Which annotations of a data set are removed when only a part of them is to be learnt from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan.draws import permutation
from pipeline.errors import RecipeError
from pipeline.evaluation.entries import integer_lists, integers, numbers, positions, unique_ids
from pipeline.evaluation.ground_truth import Annotations, sorted_categories

LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
"""What an image of LVIS says of categories that are not, or not wholly, annotated on it."""
_FLAGS = ("iscrowd", "ignore")
_COUNTS = ("image_count", "instance_count")


@dataclass(frozen=True)
class Annotated:
    """An annotation file in columns: `image` and `column` (N,) are positions among the ids of its
    images and, ascending, of its categories; `instance` (N,) bool says which annotations are
    ordinary boxes, neither flagged nor empty."""

    tree: Annotations
    categories: Sequence[Mapping[str, Any]]
    image: NDArray[np.int64]
    column: NDArray[np.int64]
    instance: NDArray[np.bool_]
    annotation_id: NDArray[np.int64]

    def counts(self, kept: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Instances of each category, (C,), of all annotations or of those `kept`."""
        rows = self.instance if kept is None else self.instance & kept
        return np.bincount(self.column[rows], minlength=len(self.categories))


def annotated(tree: Annotations, origin: str, *, federated: bool) -> Annotated:
    """Check a tree in the form of LVIS or COCO; every violated rule is a `DataError`.

    A `federated` one has the lists of LVIS in each image.
    """
    images, rows = tree["images"], tree["annotations"]
    image_ids = unique_ids(images, f"{origin}: images")
    category_ids, categories = sorted_categories(tree, origin)
    where = f"{origin}: annotations"
    unique_ids(rows, where)
    bbox = numbers(rows, "bbox", where, width=4)
    for key in LISTS if federated else ():
        members, _ = integer_lists(images, key, f"{origin}: images")
        positions(category_ids, members, f"category in {key}", origin)
    flagged = np.array([any(row.get(flag) for flag in _FLAGS) for row in rows], bool)
    return Annotated(
        tree=tree,
        categories=categories,
        # In the order of the file: positions by ascending id would not name rows of `images`.
        image=np.argsort(integers(images, "id", origin))[
            positions(image_ids, integers(rows, "image_id", where), "image", where)
        ],
        column=positions(category_ids, integers(rows, "category_id", where), "category", where),
        instance=~flagged & (bbox[:, 2:] > 0).all(axis=1),
        annotation_id=integers(rows, "id", where),
    )


def choose_kept(found: Annotated, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which annotations stay, (N,): all but a `fraction` of the instances.

    The seed and the ids put all instances in one order, of which the last of each category is set
    aside; the first of the others are removed. So each category keeps an instance, what is removed
    at a fraction is removed at every larger one, and the order of the file does not matter. What is
    no instance stays. Raises `RecipeError` for a fraction that is not between 0 and 1.
    """
    check_fraction(fraction)
    rows = np.flatnonzero(found.instance)
    rows = rows[np.argsort(found.annotation_id[rows])]
    order = rows[permutation(len(rows), seed, "drop annotations")]
    # np.unique gives the first place of each category: in the reverse order, its last instance.
    _, last = np.unique(found.column[order][::-1], return_index=True)
    aside = np.zeros(len(order), bool)
    aside[len(order) - 1 - last] = True
    removable = order[~aside]
    kept = np.ones(len(found.image), bool)
    kept[removable[: round(fraction * len(order))]] = False
    return kept


def check_fraction(fraction: float) -> None:
    """Raises `RecipeError` for a fraction that is not between 0 and 1."""
    if not 0 < fraction < 1:
        raise RecipeError(
            f"--fraction is {fraction:g}; give the share of annotations to remove, above 0 and "
            "below 1, such as 0.5"
        )


def without(
    found: Annotated, kept: NDArray[np.bool_], note: Mapping[str, Any], *, federated: bool
) -> dict[str, Any]:
    """A new tree with the annotations that are `kept`, and `note` in its `info`.

    With lists as LVIS has them, a category that lost an annotation on an image becomes not
    exhaustive there, and no negative of it. Images all stay. Counts that categories state are those
    of what is left; `frequency` stays as published, for groups are not to change with the part.
    """
    images = list(found.tree["images"])
    lost: dict[int, set[int]] = {}
    ids = [category["id"] for category in found.categories]
    for row in np.flatnonzero(~kept).tolist():
        lost.setdefault(int(found.image[row]), set()).add(ids[found.column[row]])
    if federated:
        for place, some in lost.items():
            image = dict(images[place])
            negative, partial = (image[key] for key in LISTS)
            image[LISTS[0]] = [one for one in negative if one not in some]
            image[LISTS[1]] = sorted({*partial, *some})
            images[place] = image
    annotations = found.tree["annotations"]
    return {
        **found.tree,
        "info": {**(found.tree.get("info") or {}), "longtail_drop_annotations": dict(note)},
        "images": images,
        "annotations": [annotations[row] for row in np.flatnonzero(kept).tolist()],
        "categories": _recounted(found, kept),
    }


def _recounted(found: Annotated, kept: NDArray[np.bool_]) -> list[dict[str, Any]]:
    left = found.counts(kept)
    rows = found.instance & kept
    pairs = np.unique(np.stack([found.column[rows], found.image[rows]]), axis=1)
    images = np.bincount(pairs[0], minlength=len(left))
    place = {category["id"]: k for k, category in enumerate(found.categories)}
    recounted = []
    for category in found.tree["categories"]:
        k = place[category["id"]]
        fresh = dict(zip(_COUNTS, (int(images[k]), int(left[k])), strict=True))
        recounted.append(
            {**category, **{key: fresh[key] for key in _COUNTS if category.get(key) is not None}}
        )
    return recounted
