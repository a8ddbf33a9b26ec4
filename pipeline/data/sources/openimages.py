"""OpenImages V4 to V7 (Kuznetsova et al. 2020): 600 classes, boxes in a csv, verified labels.

The boxes of the training part are 14.6 million rows, so everything here is a column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import UNLABELLED
from pipeline.data.sources.csv_columns import Block, parse_rows, read_blocks
from pipeline.data.sources.files import ImageFolder, read_file
from pipeline.data.sources.instances import read_json
from pipeline.data.sources.record import MAX_EXAMPLES, Groups, Record, RecordSet
from pipeline.data.sources.verified_labels import (
    Hierarchy,
    Pairs,
    VerifiedLists,
    read_hierarchy,
    sorted_unique,
    union,
    verified_lists,
)
from pipeline.data.storage.files import resolve
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
_MAX_CLASSES = 1000
"""601 classes have boxes; the file of all classes, which is easily taken for theirs, has 20,000."""
_CLIP_TOLERANCE = 1e-5
"""As a fraction of a side: a hundredth of a pixel of a photograph with 1024."""


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows of a csv: image id, column of the class, and what else the file says."""

    ids: NDArray[np.uint64]
    columns: NDArray[np.int64]
    values: NDArray


def list_openimages(source: Source, root: str) -> RecordSet:
    """One record for each image of the box csv, in ascending image id; boxes are fractions.

    `files.classes` gives the categories, whose ids count its rows from 1. With `files.image_labels`
    (human-verified) images know categories that are absent, and images without a box are listed
    too, if they are in `images`. With `files.hierarchy` both are extended to kinds, see
    `verified_lists`. Boxes around a group are left out and counted, unless `keep_flagged`, and are
    the set's `groups`; left out are also boxes that are empty or given twice. Images are looked for
    as `<ImageID>.jpg` in `images` and in its folders train, validation and test, or train_0 to
    train_f. `image_id` is the rank, since the published ids do not fit a signed integer; the key is
    the published id.
    """
    vocabulary, columns = read_classes(source, root)
    record_set = RecordSet(vocabulary, [])
    boxes = _read_boxes(source, root, columns)
    labels = _read_labels(source, root, columns, record_set)
    hierarchy = Hierarchy.flat(len(columns))
    if source.files.hierarchy is not None:
        url, tree = read_json(source, root, "files.hierarchy", source.files.hierarchy)
        hierarchy = read_hierarchy(url, tree, columns)
    ids = sorted_unique(np.concatenate([boxes.ids, labels.ids]))
    boxed = np.zeros(len(ids), dtype=bool)
    boxed[np.searchsorted(ids, boxes.ids)] = True
    files = _find_files(source, root, ids, boxed, record_set)
    ids, labels = ids[files.listed], _only(labels, ids[files.listed])
    kept, left_out = _sort_boxes(source, boxes, ids, len(columns), record_set)
    codes = np.searchsorted(ids, labels.ids) * len(columns) + labels.columns
    lists = verified_lists(
        hierarchy,
        boxed=union(kept.codes),
        left_out=left_out,
        positive=union(codes[labels.values == 1]),
        negative=union(codes[labels.values == 0]),
    )
    names = list(columns)
    _drop_many(
        record_set,
        "label verified absent, with a box or label to the contrary, left out",
        lists.contradicted,
        lambda pair: f"image {ids[pair // len(names)]:016x}: {names[pair % len(names)]}",
    )
    record_set.records = _Records(
        files.places,
        files.place[files.listed],
        ids,
        files.num_bytes[files.listed],
        kept.boxes,
        kept.codes,
        np.array(vocabulary.ids, dtype=np.int64),
        lists,
        source.use_labels,
    )
    return record_set


def read_classes(source: Source, root: str) -> tuple[Vocabulary, dict[str, int]]:
    """The categories, and the column of each LabelName."""
    url, data = read_file(source, root, "files.classes", source.files.classes)
    columns: dict[str, int] = {}
    categories = []
    for number, row in enumerate(parse_rows(url, data), start=1):
        if not row or (number == 1 and row[0] == "LabelName"):
            continue
        if len(row) != 2 or not row[0].startswith("/"):
            raise DataError(
                f"{url}, line {number}: {','.join(row)[:80]!r} must be a LabelName (/m/0ch_cf) and "
                "a name; `files.classes` is class-descriptions-boxable.csv"
            )
        if row[0] in columns:
            raise DataError(f"{url}, line {number}: {row[0]} is given twice; keep one line")
        columns[row[0]] = len(columns)
        categories.append(Category(id=len(columns), name=row[1], aliases=(row[0],)))
    if len(columns) > _MAX_CLASSES:
        raise DataError(
            f"{url}: {len(columns)} classes; those with boxes are 601. `files.classes` is "
            "class-descriptions-boxable.csv, not the file of all classes"
        )
    return Vocabulary(categories), columns


def _read_boxes(source: Source, root: str, columns: dict[str, int]) -> _Table:
    """Every row; `values` are XMin, YMin, XMax, YMax and IsGroupOf, (N, 5) float32."""
    assert source.annotations is not None
    url = resolve(root, source.annotations)
    ids, classes, values = [], [], []
    for block in read_blocks(source, url, "annotations", _BOX_COLUMNS):
        ids.append(block.hexadecimal(0, "ImageID"))
        found = np.fromiter((columns.get(name, -1) for name in block.columns[1]), dtype=np.int64)
        rows = np.stack(
            [block.numbers(k, _BOX_COLUMNS[k]) for k in range(2, len(_BOX_COLUMNS))], axis=1
        ).astype(np.float32)
        for wrong, rule in (
            (found < 0, "LabelName is none of `files.classes`"),
            ((rows[:, 2:4] < rows[:, :2]).any(1), "XMin and YMin must not be above XMax and YMax"),
            (~np.isin(rows[:, 4], (-1, 0, 1)), "IsGroupOf must be 1, 0, or -1 for unknown"),
        ):
            if wrong.any():
                k = int(wrong.argmax())
                row = ", ".join(f"{name} {block.columns[i][k]}" for i, name in _NAMED)
                raise DataError(f"{url}, line {block.line + k}: {rule} ({row})")
        classes.append(found)
        values.append(rows)
    return _Table(
        np.concatenate([np.zeros(0, np.uint64), *ids]),
        np.concatenate([np.zeros(0, np.int64), *classes]),
        np.concatenate([np.zeros((0, 5), np.float32), *values]),
    )


_NAMED = tuple(enumerate(_BOX_COLUMNS))


def _read_labels(
    source: Source, root: str, columns: dict[str, int], record_set: RecordSet
) -> _Table:
    """Verified labels of known classes; `values` are 1 for present and 0 for absent."""
    ids, classes, values = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    if source.files.image_labels is not None:
        url = resolve(root, source.files.image_labels)
        for block in read_blocks(source, url, "files.image_labels", _LABEL_COLUMNS):
            found = np.fromiter((columns.get(n, -1) for n in block.columns[1]), dtype=np.int64)
            confidence = block.numbers(2, "Confidence")
            wrong = ~np.isin(confidence, (0, 1))
            if wrong.any():
                k = int(wrong.argmax())
                raise DataError(
                    f"{url}, line {block.line + k}: Confidence {block.columns[2][k]} must be 1 or "
                    "0; labels of a machine are not verified: take the file of human image labels"
                )
            unknown = np.flatnonzero(found < 0)
            show = partial(_show_label, block)
            _drop_many(record_set, "image label of a class without boxes, left out", unknown, show)
            ids.append(block.hexadecimal(0, "ImageID")[found >= 0])
            classes.append(found[found >= 0])
            values.append(confidence[found >= 0])
    return _Table(np.concatenate(ids), np.concatenate(classes), np.concatenate(values))


def _show_label(block: Block, k: int) -> str:
    return f"image {block.columns[0][k]}: {block.columns[1][k]}"


def _only(table: _Table, ids: NDArray[np.uint64]) -> _Table:
    rows = np.isin(table.ids, ids)
    return _Table(table.ids[rows], table.columns[rows], table.values[rows])


@dataclass(frozen=True, eq=False)
class _Files:
    """Where images are; of those that are `listed`, num_bytes is -1 for an absent one."""

    places: tuple[str, ...]
    place: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    listed: NDArray[np.bool_]


def _find_files(
    source: Source,
    root: str,
    ids: NDArray[np.uint64],
    boxed: NDArray[np.bool_],
    record_set: RecordSet,
) -> _Files:
    folder = ImageFolder(source, root)
    splits = [name for name in folder.directories if name in ("train", "validation", "test")]
    places = ["", *splits, *(name for name in folder.directories if name[-2:-1] == "_")]
    by_digit = {
        digit: [k for k, name in enumerate(places) if k <= len(splits) or name[-1] == digit]
        for digit in "0123456789abcdef"
    }
    place = np.zeros(len(ids), dtype=np.int64)
    num_bytes = np.full(len(ids), -1, dtype=np.int64)
    for i, number in enumerate(ids.tolist()):
        name = f"{number:016x}.jpg"
        for k in by_digit[name[0]]:
            size = folder.files_in(places[k]).get(name)
            if size is not None:
                place[i], num_bytes[i] = k, size
                break
    if len(ids) and (num_bytes < 0).all():
        raise RecipeError(
            f"source {source.name}: none of the {len(ids)} images is in `images` "
            f"{source.images!r} at {folder.url}; the first was looked for as {ids[0]:016x}.jpg, "
            "there and in the folders train, validation, test and train_0 to train_f"
        )
    listed = boxed | (num_bytes >= 0)
    _drop_many(
        record_set,
        "image with verified labels, without a box, not in `images`, left out",
        np.flatnonzero(~listed),
        lambda i: f"image {ids[i]:016x}",
    )
    paths = tuple(folder.path_of(name) if name else folder.url for name in places)
    return _Files(paths, place, num_bytes, listed)


@dataclass(frozen=True, eq=False)
class _SortedBoxes:
    """`boxes` (N, 4) xyxy of the pairs `codes` (N,), sorted by pair."""

    boxes: NDArray[np.float32]
    codes: NDArray[np.int64]


def _sort_boxes(
    source: Source,
    table: _Table,
    ids: NDArray[np.uint64],
    size: int,
    record_set: RecordSet,
) -> tuple[_SortedBoxes, Pairs]:
    """Usable boxes by image and class, and the pairs of which a group is left out."""

    def show(i: int) -> str:
        return f"image {table.ids[i]:016x}: {', '.join(f'{v:g}' for v in table.values[i, :4])}"

    codes = np.searchsorted(ids, table.ids) * size + table.columns
    rows = np.arange(len(codes))
    group = np.zeros(len(codes), dtype=bool) if source.keep_flagged else table.values[:, 4] == 1
    _drop_many(record_set, "box around a group, left out", rows[group], show)
    boxes = np.ascontiguousarray(table.values[:, :4])
    clipped = boxes.clip(0, 1)
    category_ids = np.array(record_set.vocabulary.ids, dtype=np.int64)
    record_set.groups = Groups(
        codes[group] // size, category_ids[codes[group] % size], clipped[group]
    )
    empty = ~group & (clipped[:, 2:] <= clipped[:, :2]).any(1)
    _drop_many(record_set, "box empty or wholly outside the image, left out", rows[empty], show)
    outside = ~group & ~empty & (abs(clipped - boxes) > _CLIP_TOLERANCE).any(1)
    _drop_many(record_set, "box partly outside the image, clipped", rows[outside], show)
    rows = rows[~group & ~empty]
    # Two corners are one integer each: equal boxes of a pair come to stand side by side.
    corners = clipped.view(np.uint64)
    rows = rows[np.lexsort((corners[rows, 1], corners[rows, 0], codes[rows]))]
    again = np.zeros(len(rows), dtype=bool)
    again[1:] = (codes[rows[1:]] == codes[rows[:-1]]) & (
        clipped[rows[1:]] == clipped[rows[:-1]]
    ).all(1)
    _drop_many(record_set, "box given twice, left out", rows[again], show)
    rows = rows[~again]
    rows = rows[np.lexsort((rows, codes[rows]))]  # As in the file again, inside each class.
    return _SortedBoxes(clipped[rows], codes[rows]), union(codes[group])


def _drop_many(
    record_set: RecordSet, reason: str, which: NDArray[np.int64], show: Callable[[int], str]
) -> None:
    """Count each of `which` as left out or altered; only examples are written."""
    if len(which):
        for i in which[:MAX_EXAMPLES].tolist():
            record_set.drop(reason, show(i))
        record_set.dropped[reason] += len(which) - min(len(which), MAX_EXAMPLES)


class _Records(Sequence[Record]):
    """Records built when they are asked for, from arrays over images, boxes and verified pairs."""

    def __init__(
        self,
        places: tuple[str, ...],
        place: NDArray[np.int64],
        ids: NDArray[np.uint64],
        num_bytes: NDArray[np.int64],
        boxes: NDArray[np.float32],
        codes: NDArray[np.int64],
        category_ids: NDArray[np.int64],
        lists: VerifiedLists,
        use_labels: bool,
    ) -> None:
        self._places, self._place, self._ids, self._num_bytes = places, place, ids, num_bytes
        self._boxes, self._category_ids, self._use_labels = boxes, category_ids, use_labels
        self._pairs = (codes, lists.negative, lists.not_exhaustive)
        edges = np.arange(len(ids) + 1) * len(category_ids)
        self._edges = tuple(np.searchsorted(pairs, edges) for pairs in self._pairs)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i %= len(self)
        labels, negative, incomplete = (self._of(k, i) for k in range(3))
        if not self._use_labels:
            labels, negative = np.full(len(labels), UNLABELLED), labels[:0]
            incomplete = negative
        key, num_bytes = f"{self._ids[i]:016x}", int(self._num_bytes[i])
        return Record(
            key=key,
            path=f"{self._places[self._place[i]]}/{key}.jpg",
            image_id=i,
            boxes=self._boxes[slice(*self._edges[0][i : i + 2])],
            category_ids=labels,
            negative_category_ids=tuple(negative.tolist()),
            not_exhaustive_category_ids=tuple(incomplete.tolist()),
            num_bytes=num_bytes if num_bytes >= 0 else None,
            relative_boxes=True,
        )

    def _of(self, k: int, i: int) -> NDArray[np.int64]:
        """Category ids of image i in the k-th of the pairs."""
        pairs = self._pairs[k][slice(*self._edges[k][i : i + 2])]
        return self._category_ids[pairs % len(self._category_ids)]
