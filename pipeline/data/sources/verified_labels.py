"""What OpenImages says of the categories of an image beside its boxes: verified present or absent.

Its protocol is LVIS's, federated: a category is judged only where it was verified. So an image
knows categories that are absent, categories of which not every instance is boxed, and those with
all instances boxed. Of all others nothing is known, and they are in no list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

Pairs = NDArray[np.int64]
"""Sorted `image * num_categories + column`, each once."""


@dataclass(frozen=True)
class Hierarchy:
    """Strict ancestors and strict descendants of each column."""

    ancestors: tuple[tuple[int, ...], ...]
    descendants: tuple[tuple[int, ...], ...]

    @classmethod
    def flat(cls, num_categories: int) -> "Hierarchy":
        """No category is a kind of another."""
        return cls(((),) * num_categories, ((),) * num_categories)


def read_hierarchy(url: str, tree: object, columns: dict[str, int]) -> Hierarchy:
    """The parsed bbox_labels_600_hierarchy.json: `Subcategory` counts, `Part` does not.

    A category may be below several others. Names without a column (the root, Entity) only connect.
    Raises `DataError` for another form.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("Subcategory"), list):
        raise DataError(
            f"{url}: no list `Subcategory` at its root; `files.hierarchy` is "
            "bbox_labels_600_hierarchy.json"
        )
    children: dict[str, set[str]] = {}
    waiting: list[object] = [tree]
    while waiting:
        node = waiting.pop()
        name = node.get("LabelName") if isinstance(node, dict) else None
        below = node.get("Subcategory", []) if isinstance(node, dict) else None
        if not isinstance(name, str) or not isinstance(below, list):
            raise DataError(f"{url}: an entry has no LabelName, or no list as Subcategory")
        waiting += below
        for child in below:
            if isinstance(child, dict):
                children.setdefault(name, set()).add(str(child.get("LabelName")))
    descendants = [_below(name, children, columns) for name in columns]
    ancestors: list[list[int]] = [[] for _ in columns]
    for column, below_it in enumerate(descendants):
        for other in below_it:
            ancestors[other].append(column)
    return Hierarchy(tuple(map(tuple, ancestors)), tuple(map(tuple, descendants)))


def _below(name: str, children: dict[str, set[str]], columns: dict[str, int]) -> list[int]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        new = children.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return sorted(columns[other] for other in found - {name} if other in columns)


@dataclass(frozen=True)
class VerifiedLists:
    """`negative` and `not_exhaustive` categories of images; `contradicted` are in neither."""

    negative: Pairs
    not_exhaustive: Pairs
    contradicted: Pairs


def verified_lists(
    hierarchy: Hierarchy, boxed: Pairs, left_out: Pairs, positive: Pairs, negative: Pairs
) -> VerifiedLists:
    """The lists of a federated data set, from boxes and human-verified labels.

    `boxed` have boxes, `left_out` had some that are not used (groups), `positive` and `negative`
    were verified on the image. With the hierarchy, as in the OpenImages challenge:

    - what is absent is absent with all its kinds: negatives go down;
    - a thing of a kind is a thing of every kind above it: presence goes up. It is boxed under one
      name only, so that the kinds above are present and not exhaustively boxed;
    - a category that is verified present without a box of its own, or with a group left out, is
      not exhaustively boxed;
    - a negative that boxes or positives contradict is not used.
    """
    size = len(hierarchy.ancestors)
    present = union(boxed, left_out, positive)
    above = _expand(present, hierarchy.ancestors, size)
    known = union(present, above)
    contradicted = np.intersect1d(negative, known, assume_unique=True)
    absent = np.setdiff1d(negative, known, assume_unique=True)
    return VerifiedLists(
        negative=union(absent, _expand(absent, hierarchy.descendants, size)),
        not_exhaustive=union(np.setdiff1d(positive, boxed, assume_unique=True), left_out, above),
        contradicted=contradicted,
    )


def union(*parts: Pairs) -> Pairs:
    """All pairs, sorted, each once."""
    return sorted_unique(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))


def sorted_unique(values: NDArray[Any]) -> NDArray[Any]:
    """np.unique by sorting; its hash table of numpy 2.3 takes ten times as long on millions."""
    values = np.sort(values)
    first = np.ones(len(values), dtype=bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]


def _expand(pairs: Pairs, related: Iterable[tuple[int, ...]], size: int) -> Pairs:
    """For each (image, column) the pairs (image, other) of its related columns."""
    flat = [np.array(others, dtype=np.int64) for others in related]
    counts = np.array([len(others) for others in flat], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    values = np.concatenate([np.zeros(0, dtype=np.int64), *flat])
    images, columns = np.divmod(pairs, size)
    lengths = counts[columns]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    inside = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    others = values[np.repeat(offsets[columns], lengths) + inside]
    return sorted_unique(np.repeat(images, lengths) * size + others)
