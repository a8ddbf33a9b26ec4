"""The columns of an index as one file that is mapped into memory.

The file is the plain little-endian columns, one after the other, each from a multiple of
`ALIGNMENT` bytes on; where each lies stands in index.json. At one box an image they take about 50
bytes a sample, in the page cache, which all processes of a machine share.
"""

import hashlib
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import UNLABELLED
from pipeline.errors import StorageError

ALIGNMENT = 64
MAX_SAMPLE_BYTES = 1 << 30
"""Of an image with its json: more is no sample but a forged index, and is not read."""

FIXED = {
    "shard": "<i4",
    "width": "<i4",
    "height": "<i4",
    "image_id": "<i8",
    "category_offsets": "<i8",
    "category_ids": "<i4",
}
"""Columns with a type of their own; what they hold is said in `Index`."""
PLACES = ("image_offset", "image_size", "json_offset", "json_size", "crc32")
"""Columns in the smallest of `_TYPES` that holds them; `crc32` runs over image and then json."""
_TYPES = ("|u1", "<u2", "<u4", "<i8")
_CHUNK = 1 << 20
"""Samples that are checked at a time, so that checking takes little memory."""


@dataclass(frozen=True, slots=True)
class ColumnPlace:
    """Where a column lies in the file: `length` values of `dtype` from byte `start` on."""

    dtype: str
    start: int
    length: int


def write_columns(
    file: BinaryIO, columns: Iterable[tuple[str, NDArray[np.integer]]]
) -> tuple[dict[str, ColumnPlace], int, str]:
    """Write columns one by one; where they lie, the size of the file and its sha256."""
    digest, position = hashlib.sha256(), 0
    places: dict[str, ColumnPlace] = {}
    for name, values in columns:
        dtype = FIXED.get(name) or smallest(values).dtype.str
        padding = bytes(-position % ALIGNMENT)
        data = np.ascontiguousarray(values, dtype=dtype)
        for part in (padding, data.data.cast("B") if len(data) else b""):
            digest.update(part)
            file.write(part)
        position += len(padding)
        places[name] = ColumnPlace(dtype, position, len(data))
        position += data.nbytes
    return places, position, digest.hexdigest()


def map_columns(path: Path, places: Mapping[str, ColumnPlace]) -> dict[str, NDArray[np.integer]]:
    """The columns of a file, read-only, without reading it."""
    with path.open("rb") as file:
        return view_columns(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), places)


def view_columns(
    data: bytes | mmap.mmap, places: Mapping[str, ColumnPlace]
) -> dict[str, NDArray[np.integer]]:
    """The columns in the bytes of a file; raises ValueError when one lies outside."""
    columns: dict[str, NDArray[np.integer]] = {}
    for name in (*FIXED, *PLACES):
        place = places[name]
        dtype = np.dtype(place.dtype)
        end = place.start + place.length * dtype.itemsize
        wanted = (FIXED[name],) if name in FIXED else _TYPES
        if place.dtype not in wanted or not 0 <= place.start <= end <= len(data):
            raise ValueError(f"column {name} is {place}, in {len(data)} bytes")
        if place.length == 0:
            columns[name] = np.zeros(0, dtype)
        else:
            columns[name] = np.frombuffer(data, dtype, count=place.length, offset=place.start)
    return columns


def check_columns(
    columns: Mapping[str, NDArray[np.integer]],
    shards: Sequence[tuple[int, int]],
    category_ids: Sequence[int],
) -> None:
    """Raises ValueError naming the first column with a value that cannot be.

    `shards` are (samples, bytes) of each, `category_ids` those of the vocabulary.
    """
    num_samples, num_boxes = sum(count for count, _ in shards), len(columns["category_ids"])
    for name, values in columns.items():
        extra = {"category_offsets": 1, "category_ids": num_boxes - num_samples}.get(name, 0)
        _demand(len(values) == num_samples + extra, name)
    offsets = columns["category_offsets"]
    _demand(offsets[0] == 0 and offsets[-1] == num_boxes, "category_offsets")
    counts = np.array([count for count, _ in shards], dtype=np.int64)
    sizes = np.array([num_bytes for _, num_bytes in shards], dtype=np.int64)
    ends = np.cumsum(counts)
    known = np.array([UNLABELLED, *category_ids], dtype=np.int64)
    for low in range(0, num_samples, _CHUNK):
        high = min(low + _CHUNK, num_samples)
        part = {name: columns[name][low:high] for name in columns if name != "category_ids"}
        shard = np.searchsorted(ends, np.arange(low, high), side="right")
        _demand(bool(np.array_equal(part["shard"], shard)), "shard")
        _demand(bool((np.diff(offsets[low : high + 1]) >= 0).all()), "category_offsets")
        for side in ("width", "height"):
            _demand(bool((part[side] >= 1).all()), side)
        for kind in ("image", "json"):
            start = part[f"{kind}_offset"].astype(np.int64)
            size = part[f"{kind}_size"].astype(np.int64)
            _demand(bool(((size >= 0) & (size <= sizes[shard])).all()), f"{kind}_size")
            inside = (start >= 0) & (start <= sizes[shard] - size)
            _demand(bool(inside.all()), f"{kind}_offset")
    for low in range(0, num_boxes, _CHUNK):
        ids = columns["category_ids"][low : low + _CHUNK]
        _demand(bool(np.isin(ids, known).all()), "category_ids")


def category_counts(
    category_ids: NDArray[np.integer], offsets: NDArray[np.integer], ids: Sequence[int]
) -> dict[int, int]:
    """In how many images each of the categories `ids` has a box."""
    known = np.array(sorted(ids), dtype=np.int64)
    totals = np.zeros(len(known), dtype=np.int64)
    for low in range(0, len(offsets) - 1, _CHUNK):
        edges = offsets[low : low + _CHUNK + 1]
        values = category_ids[edges[0] : edges[-1]]
        image = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        image, values = image[values >= 0], values[values >= 0]
        pairs = np.unique(image * max(len(known), 1) + np.searchsorted(known, values))
        totals += np.bincount(pairs % max(len(known), 1), minlength=len(known))[: len(known)]
    return dict(zip(known.tolist(), totals.tolist(), strict=True))


def _demand(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"column {name} has values that cannot be")


def smallest(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """The same integers in the smallest type that holds them."""
    if values.min(initial=0) < 0:
        kinds: tuple[str, ...] = ("|i1", "<i2", "<i4", "<i8")
    else:
        kinds = _TYPES
    high, low = int(values.max(initial=0)), int(values.min(initial=0))
    fitting = (kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return values.astype(next(fitting))


def damaged(url: str, reason: object) -> StorageError:
    """The error for an index that is not as it was written."""
    return StorageError(f"{url} is damaged ({reason}); run `longtail prepare` again")
