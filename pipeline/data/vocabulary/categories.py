"""Categories of a data set, and the one object that decides the columns of every class score."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

Frequency = Literal["r", "c", "f"]
"""LVIS: rare (1 to 10 training images), common (11 to 100), frequent (more)."""


@dataclass(frozen=True, slots=True)
class Category:
    """One category as its data set states it; the two counts are of that set's training part."""

    id: int
    name: str
    synset: str | None = None
    frequency: Frequency | None = None
    image_count: int | None = None
    instance_count: int | None = None
    aliases: tuple[str, ...] = ()


class Vocabulary:
    """An ordered set of categories: column k of every class score is the k-th lowest category id.

    There is no background or "none" column. Two vocabularies are equal when ids, names and synsets
    are. Raises `DataError` for an id given twice, a negative id, or an empty name.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(sorted(categories, key=lambda category: category.id))
        self._columns = {category.id: k for k, category in enumerate(self.categories)}
        for k, category in enumerate(self.categories):
            if self._columns[category.id] != k:
                names = [other.name for other in self.categories if other.id == category.id]
                raise DataError(
                    f"category id {category.id} is given more than once ({', '.join(names)}); "
                    "ids must differ"
                )
            if category.id < 0:
                raise DataError(f"category id {category.id} ({category.name}) is negative")
            if not clean_name(category.name):
                raise DataError(f"category {category.id} has no name; give it one")
            if category.frequency not in (None, *get_args(Frequency)):
                raise DataError(
                    f"category {category.id} ({category.name}): frequency {category.frequency!r} "
                    "must be r, c or f"
                )

    @property
    def num_categories(self) -> int:
        """How many columns there are."""
        return len(self.categories)

    @property
    def ids(self) -> list[int]:
        """Category id of each column."""
        return [category.id for category in self.categories]

    @property
    def names(self) -> list[str]:
        """Name of each column, as the data set writes it."""
        return [category.name for category in self.categories]

    @property
    def frequencies(self) -> list[Frequency | None]:
        """Frequency group of each column."""
        return [category.frequency for category in self.categories]

    @property
    def digest(self) -> str:
        """Sixteen hex digits over ids, names and synsets, in column order."""
        text = json.dumps([[c.id, c.name, c.synset] for c in self.categories])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def column_of(self, category_id: int) -> int:
        """Column of a category id; raises `DataError` naming the nearest known category."""
        column = self._columns.get(category_id)
        if column is None:
            if not self.categories:
                raise DataError(f"category id {category_id} is unknown: there are no categories")
            near = min(self.categories, key=lambda category: abs(category.id - category_id))
            raise DataError(
                f"category id {category_id} is none of the {self.num_categories} categories; "
                f"the nearest known id is {near.id} ({near.name})"
            )
        return column

    def columns_from(self, other: "Vocabulary") -> NDArray[np.int64]:
        """Our column for each column of `other`, or -1 where we have no such category.

        Synsets decide where both sides have one (equal names of different synsets are different
        things: crane the bird, crane the machine); else cleaned names do. A synset or a name that
        several of ours have decides nothing, but a synset and a name together may. An equal
        vocabulary has equal columns. Shape (other.num_categories,).
        """
        if self == other:
            return np.arange(self.num_categories, dtype=np.int64)
        by_synset: dict[str, list[int]] = {}
        by_name: dict[str, list[int]] = {}
        for k, category in enumerate(self.categories):
            if category.synset is not None:
                by_synset.setdefault(category.synset, []).append(k)
            by_name.setdefault(clean_name(category.name).casefold(), []).append(k)
        columns = np.full(other.num_categories, -1, dtype=np.int64)
        for k, category in enumerate(other.categories):
            named = by_name.get(clean_name(category.name).casefold(), [])
            candidates = by_synset.get(category.synset or "", [])
            if len(candidates) > 1:
                candidates = [c for c in candidates if c in named]
            elif not candidates:
                both = category.synset is not None
                candidates = [c for c in named if not both or self.categories[c].synset is None]
            if len(candidates) == 1:
                columns[k] = candidates[0]
        return columns

    def difference(self, other: "Vocabulary") -> str:
        """What `self` and `other` do not share, by id, name and synset, for an error message."""
        ours = {(c.id, c.name, c.synset) for c in self.categories}
        theirs = {(c.id, c.name, c.synset) for c in other.categories}
        return (
            f"{self.num_categories} against {other.num_categories} categories; "
            f"only in the first: {_listed(ours - theirs)}; "
            f"only in the second: {_listed(theirs - ours)}"
        )

    def to_json(self) -> list[dict[str, object]]:
        """Plain lists and dicts, for a manifest."""
        return [{**asdict(c), "aliases": list(c.aliases)} for c in self.categories]

    @classmethod
    def from_json(cls, tree: object) -> "Vocabulary":
        """Inverse of `to_json`; raises `DataError` when `tree` is not such a list."""
        if not isinstance(tree, list):
            raise DataError(f"a vocabulary is a list of categories, not {type(tree).__name__}")
        categories = []
        for entry in tree:
            try:
                category = Category(**{**entry, "aliases": tuple(entry.get("aliases", ()))})
            except (TypeError, AttributeError) as error:
                raise DataError(f"{entry!r} is not a category: {error}") from None
            if type(category.id) is not int or not isinstance(category.name, str):
                raise DataError(f"{entry!r} is not a category: it needs an int id and a str name")
            categories.append(category)
        return cls(categories)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Vocabulary({self.num_categories} categories, digest {self.digest})"


def clean_name(name: str) -> str:
    """A category name as a person would write it, for prompts and for matching names.

    Underscores are spaces, and a qualifier in parentheses stays, since it is all that tells
    `bow_(weapon)` ("bow (weapon)") from `bow_(decorative_ribbons)`. LVIS has 108 such names.
    """
    return " ".join(name.replace("_", " ").split())


def _listed(entries: set[tuple[int, str, str | None]], limit: int = 10) -> str:
    if not entries:
        return "nothing"
    shown = [
        f"{number} {name}" + (f" ({synset})" if synset else "")
        for number, name, synset in sorted(entries, key=lambda entry: entry[:2])[:limit]
    ]
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return ", ".join(shown) + more
