"""Millions of records as a few arrays: a `Record` is built when it is asked for."""

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sources.record import Record


@dataclass(frozen=True, eq=False)
class Texts:
    """Many short byte strings, end to end: text i is `data[offsets[i] : offsets[i + 1]]`."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Self:
        """The given strings, in their order."""
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        return cls(np.frombuffer(b"".join(texts), dtype=np.uint8), _offsets(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        # Through Python lists in runs: one numpy scalar a text would cost more than the text.
        for start in range(0, len(self), _RUN):
            edges = self.offsets[start : start + _RUN + 1].tolist()
            data = self.data[edges[0] : edges[-1]].tobytes()
            for low, high in itertools.pairwise(edges):
                yield data[low - edges[0] : high - edges[0]]

    def take(self, order: NDArray[np.int64]) -> Self:
        """The strings at the positions of `order`, and no other bytes."""
        values, offsets = _take_ragged(self.data, self.offsets, order)
        return type(self)(values, offsets)


_RUN = 4096


@dataclass(frozen=True, eq=False)
class RecordColumns(Sequence[Record]):
    """Records of whole images, whose boxes are coarse; about 50 bytes each, captions aside.

    `places` are the archives and folders that images are in; `place` (N,) says which of them. An
    image is `num_bytes` bytes of its archive from `starts` on or, where that is negative, the file
    of that name in `names` below its folder. The category ids of record i are `category_ids
    [category_offsets[i] : category_offsets[i + 1]]`. `names` and `captions` may be None for all.
    """

    places: tuple[str, ...]
    place: NDArray[np.integer]
    keys: Texts
    image_ids: NDArray[np.integer]
    starts: NDArray[np.int64]
    num_bytes: NDArray[np.integer]
    category_ids: NDArray[np.integer]
    category_offsets: NDArray[np.integer]
    names: Texts | None
    captions: Texts | None

    def __len__(self) -> int:
        return len(self.place)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> "RecordColumns": ...
    def __getitem__(self, i: int | slice) -> "Record | RecordColumns":
        if isinstance(i, slice):
            return self.subset(np.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i %= len(self)
        path, start = self.places[self.place[i]], int(self.starts[i])
        if start < 0:
            assert self.names is not None, "a file in a folder has a name"
            path = f"{path}/{self.names[i].decode(errors='surrogateescape')}"
        labels = self.category_ids[self.category_offsets[i] : self.category_offsets[i + 1]]
        return Record(
            key=self.keys[i].decode(),
            path=path,
            image_id=int(self.image_ids[i]),
            boxes=None,
            category_ids=labels.astype(np.int64),
            coarse=True,
            caption=None if self.captions is None else self.captions[i].decode(),
            num_bytes=int(self.num_bytes[i]),
            offset=start if start >= 0 else None,
        )

    def iter_keys(self) -> Iterator[bytes]:
        """The keys in order, without building records."""
        return iter(self.keys)

    def subset(self, order: NDArray[np.integer]) -> "RecordColumns":
        """The records at the positions of `order`, as an object that holds nothing else."""
        rows = np.asarray(order, dtype=np.int64)
        used, place = np.unique(self.place[rows], return_inverse=True)
        values, offsets = _take_ragged(self.category_ids, self.category_offsets, rows)
        return RecordColumns(
            places=tuple(self.places[k] for k in used),
            place=smallest(place),
            keys=self.keys.take(rows),
            image_ids=self.image_ids[rows],
            starts=self.starts[rows],
            num_bytes=self.num_bytes[rows],
            category_ids=values,
            category_offsets=smallest(offsets),
            names=None if self.names is None else self.names.take(rows),
            captions=None if self.captions is None else self.captions.take(rows),
        )

    def digest(self) -> str:
        """Hexadecimal sha256 of the records; sizes stand for the images.

        Where the images lie does not count: folders and the archives made of them give one digest.
        """
        digest = hashlib.sha256()
        integers = (self.image_ids, self.num_bytes, self.category_ids, self.category_offsets)
        for column in integers:
            digest.update(column.astype("<i8").tobytes())
        for texts in (self.keys, self.captions):
            if texts is not None:
                digest.update(texts.offsets.astype("<i8").tobytes())
                digest.update(texts.data.tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays take."""
        arrays = [self.place, self.image_ids, self.starts, self.num_bytes]
        arrays += [self.category_ids, self.category_offsets]
        for texts in (self.keys, self.names, self.captions):
            arrays += [] if texts is None else [texts.data, texts.offsets]
        return sum(array.nbytes for array in arrays)


class _GrowingTexts:
    """Texts while they are collected; growing arrays, since millions of small ones waste memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lengths = array("i")

    def extend(self, texts: Sequence[bytes]) -> None:
        self.data += b"".join(texts)
        self.lengths.extend(map(len, texts))

    def finish(self) -> Texts:
        return Texts(np.frombuffer(self.data, dtype=np.uint8), _offsets(_taken(self.lengths)))


class ColumnsBuilder:
    """Collects records, place after place, and makes columns of them."""

    def __init__(self) -> None:
        self._places: list[str] = []
        self._place_counts: list[int] = []
        self._keys, self._names, self._captions = (_GrowingTexts() for _ in range(3))
        self._image_ids, self._starts, self._num_bytes = (array("q") for _ in range(3))
        self._labels, self._label_counts = (array("i") for _ in range(2))

    def __len__(self) -> int:
        return len(self._starts)

    def add(
        self,
        place: str,
        *,
        keys: Sequence[bytes],
        num_bytes: Sequence[int],
        labels: Sequence[Sequence[int]] | int,
        starts: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        captions: Sequence[bytes] | None = None,
        image_ids: Sequence[int] | None = None,
    ) -> None:
        """Records of one archive (`starts` are given) or folder (`names` are).

        `labels` are the category ids of each record, or one id for all; `image_ids` are the
        positions among all records where they are not given. Either all places have captions or
        none has.
        """
        first, count = len(self), len(keys)
        assert (starts is None) != (names is None), "a record is in an archive or in a folder"
        self._places.append(place)
        self._place_counts.append(count)
        self._keys.extend(keys)
        # A file system's names need not be UTF-8; these are the same bytes again.
        self._names.extend(
            [name.encode(errors="surrogateescape") for name in names or [""] * count]
        )
        self._captions.extend(captions or [])
        self._image_ids.extend(range(first, first + count) if image_ids is None else image_ids)
        self._starts.extend([-1] * count if starts is None else starts)
        self._num_bytes.extend(num_bytes)
        if isinstance(labels, int):
            labels = [[labels]] * count
        self._labels.extend(label for some in labels for label in some)
        self._label_counts.extend(map(len, labels))

    def finish(self) -> RecordColumns:
        """The columns; the builder is of no use afterwards."""
        count = len(self)
        assert len(self._captions.lengths) in (0, count), "captions are of all records or of none"
        named, captioned = bool(self._names.data), bool(self._captions.lengths)
        return RecordColumns(
            places=tuple(self._places),
            place=smallest(np.repeat(np.arange(len(self._places)), self._place_counts)),
            keys=self._keys.finish(),
            image_ids=smallest(_taken(self._image_ids)),
            starts=_taken(self._starts).astype(np.int64),
            num_bytes=smallest(_taken(self._num_bytes)),
            category_ids=smallest(_taken(self._labels)),
            category_offsets=smallest(_offsets(_taken(self._label_counts))),
            names=self._names.finish() if named else None,
            captions=self._captions.finish() if captioned else None,
        )


def record_keys(records: Sequence[Record]) -> Iterator[bytes]:
    """The key of every record, in order."""
    if isinstance(records, RecordColumns):
        return records.iter_keys()
    return (record.key.encode() for record in records)


def take_records(records: Sequence[Record], order: NDArray[np.integer]) -> Sequence[Record]:
    """The records at the positions of `order`, small to pickle."""
    if isinstance(records, RecordColumns):
        return records.subset(order)
    return tuple(records[i] for i in order.tolist())


def smallest(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """The same integers in the smallest type that holds them all."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    kind = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
    return values.astype(kind, copy=False)


def _taken(values: "array[int]") -> NDArray[np.integer]:
    """The integers as a numpy array; the growing one gives its memory back."""
    result = np.array(values)
    del values[:]
    return result


def _offsets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _take_ragged(
    values: NDArray, offsets: NDArray[np.integer], order: NDArray[np.int64]
) -> tuple[NDArray, NDArray[np.int64]]:
    starts = offsets[order].astype(np.int64)
    lengths = offsets[order + 1].astype(np.int64) - starts
    ends = _offsets(lengths)
    positions = np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])
    return values[positions], ends
