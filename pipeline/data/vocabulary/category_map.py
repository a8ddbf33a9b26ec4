"""Which category of one vocabulary is which of another: found by rule, written for review.

A synset decides, then the cleaned name, then an alias, each only where it names one category.
Names that are merely alike are listed as candidates and never applied: a person applies one by
writing its id and name into the csv, and a recipe reads that as `category_map` of a source.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.storage.files import read_bytes, resolve
from pipeline.data.vocabulary.categories import Category, Vocabulary, clean_name
from pipeline.data.vocabulary.similar_names import SimilarNames
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

COLUMNS = (
    "source_id", "source_name", "source_synset",
    "target_id", "target_name", "target_synset",
    "how", "candidates",
)  # fmt: skip
NEEDED = ("source_id", "source_name", "target_id", "target_name")
SAME, SYNSET, NAME, ALIAS, REVIEWED = "same", "synset", "name", "alias", "reviewed"
CANDIDATE, NONE = "candidate", "none"
_WORDS = {
    SAME: "the same",
    SYNSET: "by synset",
    NAME: "by name",
    ALIAS: "by alias",
    REVIEWED: "as reviewed",
    CANDIDATE: "left out with candidates",
    NONE: "left out",
}
RULES = tuple(_WORDS)
"""How a category is mapped; the last two are not mapped."""


@dataclass(frozen=True, eq=False)
class CategoryMap:
    """A column of `target` for each column of `source`, -1 for none, and why.

    `columns` is (source.num_categories,) int64; `how` has one of `RULES` for each, and
    `candidates` the columns of names that are alike. `origin` is the csv that it was read from.
    """

    source: Vocabulary
    target: Vocabulary
    columns: NDArray[np.int64]
    how: tuple[str, ...]
    candidates: tuple[tuple[int, ...], ...]
    origin: str | None = None

    @property
    def is_identity(self) -> bool:
        """Whether both sides are one vocabulary, so that there is nothing to say."""
        return self.source == self.target

    @property
    def counts(self) -> dict[str, int]:
        """How many categories of the source were mapped by which rule, in the order of `RULES`."""
        counts = Counter(self.how)
        return {rule: counts[rule] for rule in RULES if counts[rule]}

    @property
    def unmapped(self) -> list[str]:
        """Names of the source's categories that have no target."""
        return [self.source.names[k] for k in np.flatnonzero(self.columns < 0)]

    @property
    def digest(self) -> str:
        """Sixteen hex digits over the ids of both sides, pair by pair."""
        ids = [*self.target.ids, -1]
        pairs = [[a, ids[k]] for a, k in zip(self.source.ids, self.columns, strict=True)]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line of counts for a log."""
        parts = [f"{number} {_WORDS[rule]}" for rule, number in self.counts.items()]
        where = f" by {self.origin}" if self.origin else ""
        return (
            f"{self.source.num_categories} categories to {self.target.num_categories}{where}: "
            f"{', '.join(parts) or 'none'}"
        )

    def to_csv(self) -> str:
        """The map as a table, one line for each category of the source, in order of id."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(COLUMNS)
        for k, category in enumerate(self.source.categories):
            column = int(self.columns[k])
            found = self.target.categories[column] if column >= 0 else None
            writer.writerow(
                [
                    *_cells(category),
                    *(_cells(found) if found else ("", "", "")),
                    self.how[k],
                    " | ".join(_option(self.target.categories[c]) for c in self.candidates[k]),
                ]
            )
        return buffer.getvalue()


def match_categories(source: Vocabulary, target: Vocabulary) -> CategoryMap:
    """The map that the rules give, with candidates for what they leave out."""
    if source == target:
        size = source.num_categories
        return CategoryMap(source, target, np.arange(size), (SAME,) * size, ((),) * size)
    columns = target.columns_from(source)
    aliases = _by_alias(target)
    similar = SimilarNames(target)
    how, candidates = [], []
    for k, category in enumerate(source.categories):
        options: tuple[int, ...] = ()
        if columns[k] >= 0:
            synset = target.categories[columns[k]].synset
            rule = SYNSET if synset is not None and synset == category.synset else NAME
        elif (column := _one_alias(category, aliases, target)) is not None:
            columns[k], rule = column, ALIAS
        else:
            options = similar.columns(category.name, *category.aliases)
            rule = CANDIDATE if options else NONE
        how.append(rule)
        candidates.append(options)
    return CategoryMap(source, target, columns, tuple(how), tuple(candidates))


def used_map(
    source: Source, theirs: Vocabulary, ours: Vocabulary, root: str = ""
) -> CategoryMap | None:
    """What the labels of a recipe's source become; None where they are not used.

    Raises `RecipeError` where it has categories and none is one of the vocabulary's.
    """
    if not source.has_labels:
        return None
    found = map_of(source, theirs, ours, root)
    if len(found.columns) and not (found.columns >= 0).any():
        raise RecipeError(
            f"source {source.name}: none of its {theirs.num_categories} categories is one of the "
            f"vocabulary's {ours.num_categories}; choose another data.vocabulary, or set "
            "use_labels: false for this source"
        )
    return found


def map_of(source: Source, theirs: Vocabulary, ours: Vocabulary, root: str = "") -> CategoryMap:
    """The map of a recipe's source: its reviewed csv under `root`, or what the rules give."""
    if source.category_map is None:
        return match_categories(theirs, ours)
    url = resolve(root, source.category_map)
    try:
        data = read_bytes(url)
    except FileNotFoundError:
        raise RecipeError(
            f"source {source.name}: `category_map` {source.category_map!r} is no file at {url}; "
            "write it with `longtail vocabulary --map SOURCE TARGET -o FILE`, or leave the key out"
        ) from None
    return read_map(url, data, theirs, ours)


def read_map(url: str, data: bytes, source: Vocabulary, target: Vocabulary) -> CategoryMap:
    """A reviewed csv; `target_id` decides, and may be empty to leave a category out.

    Raises `DataError` naming the line, value, rule and fix for an id or name that a side does not
    have, for a source id given twice, and for a category of the source without a line.
    """
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{url}: not UTF-8 text (byte {error.start}); save the csv as UTF-8"
        ) from None
    lacking = [column for column in NEEDED if column not in (reader.fieldnames or ())]
    if lacking:
        raise DataError(
            f"{url}: the header lacks {', '.join(lacking)}; a category map is a csv with commas "
            f"and the columns {', '.join(COLUMNS)}"
        )
    columns = np.full(source.num_categories, -1, dtype=np.int64)
    lines: dict[int, int] = {}
    for row in reader:
        where = f"{url}, line {reader.line_num}"
        k = _side(row, "source", source, where)
        if k is None:
            raise DataError(f"{where}: source_id is empty; give an id, or delete the line")
        if k in lines:
            raise DataError(
                f"{where}: source_id {source.ids[k]} ({source.names[k]}) is on line {lines[k]} "
                "already; a category has one target: keep one of the lines"
            )
        lines[k] = reader.line_num
        column = _side(row, "target", target, where)
        columns[k] = -1 if column is None else column
    absent = [category for k, category in enumerate(source.categories) if k not in lines]
    if absent:
        raise DataError(
            f"{url}: no line for {len(absent)} of the source's {source.num_categories} categories "
            f"({', '.join(f'{c.id} {c.name}' for c in absent[:5])}); add one for each, with an "
            "empty target_id to leave the category out"
        )
    how = tuple(REVIEWED if column >= 0 else NONE for column in columns)
    return CategoryMap(source, target, columns, how, ((),) * len(how), url)


def _side(row: dict[str, str | None], side: str, vocabulary: Vocabulary, where: str) -> int | None:
    """The column that one side of a line names, None for an empty id."""
    number, name = ((row[f"{side}_{part}"] or "").strip() for part in ("id", "name"))
    if not number:
        if name:
            raise DataError(
                f"{where}: {side}_name is {name!r} but {side}_id is empty; give both, or neither"
            )
        return None
    if not (number.isascii() and number.isdecimal()):
        raise DataError(f"{where}: {side}_id {number!r} must be an integer of at least 0")
    try:
        column = vocabulary.column_of(int(number))
    except DataError as error:
        raise DataError(f"{where}: {side}_id: {error}; correct the line") from None
    known = vocabulary.names[column]
    if clean_name(name).casefold() != clean_name(known).casefold():
        raise DataError(
            f"{where}: {side}_id {number} is {known!r}, and {side}_name says {name!r}; they must "
            f"be one category: correct either"
        )
    return column


def _by_alias(target: Vocabulary) -> dict[str, set[int]]:
    """Columns by each cleaned name and alias."""
    columns: dict[str, set[int]] = {}
    for k, category in enumerate(target.categories):
        for name in (category.name, *category.aliases):
            columns.setdefault(clean_name(name).casefold(), set()).add(k)
    return columns


def _one_alias(category: Category, columns: dict[str, set[int]], target: Vocabulary) -> int | None:
    """The one category that shares a name or alias, and is not of another synset."""
    names: Sequence[str] = (category.name, *category.aliases)
    found = set().union(*(columns.get(clean_name(name).casefold(), set()) for name in names))
    if category.synset is not None:
        found = {k for k in found if target.categories[k].synset is None}
    return found.pop() if len(found) == 1 else None


def _cells(category: Category) -> tuple[str, str, str]:
    return str(category.id), category.name, category.synset or ""


def _option(category: Category) -> str:
    return f"{category.id} {category.name}"
