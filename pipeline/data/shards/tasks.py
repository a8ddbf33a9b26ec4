"""Which records go into which shard, without holding the tasks of millions of samples."""

import hashlib
import json
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards.index import FORMAT_VERSION
from pipeline.data.shards.smaller import encoder_name
from pipeline.data.shards.writing import ShardTask
from pipeline.data.sources import Record
from pipeline.data.sources.columns import RecordColumns, record_keys, take_records
from pipeline.errors import DataError


class ShardPlan(Sequence[ShardTask]):
    """The tasks of all shards of a source, each made when it is asked for.

    Sources list by id or by class; in the order of a hash, any run of shards is a fair draw.
    """

    def __init__(
        self,
        url: str,
        records: Sequence[Record],
        samples_per_shard: int,
        short_side: int | None = None,
    ) -> None:
        self._url = url
        self._records = records
        self._size = samples_per_shard
        self._short_side = short_side
        self._order = hash_order(records)
        self.digests = [self._digest(self._chunk(k)) for k in range(len(self))]
        """Of all that each shard depends on."""

    def __len__(self) -> int:
        return -(-len(self._records) // self._size)

    @overload
    def __getitem__(self, k: int) -> ShardTask: ...
    @overload
    def __getitem__(self, k: slice) -> "list[ShardTask]": ...
    def __getitem__(self, k: int | slice) -> "ShardTask | list[ShardTask]":
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        if not 0 <= k < len(self):
            raise IndexError(f"shard {k} of {len(self)}")
        return ShardTask(self.url_of(k), self._chunk(k), self.digests[k], self._short_side)

    def url_of(self, k: int) -> str:
        """Where shard `k` goes."""
        return f"{self._url}/{k:06d}.tar"

    def count_of(self, k: int) -> int:
        """How many records shard `k` has."""
        return min(self._size, len(self._records) - k * self._size)

    def _chunk(self, k: int) -> Sequence[Record]:
        return take_records(self._records, self._order[k * self._size : (k + 1) * self._size])

    def _digest(self, records: Sequence[Record]) -> str:
        settings: list[object] = [FORMAT_VERSION]
        if self._short_side is not None:
            settings += [self._short_side, encoder_name()]
        text = json.dumps([*settings, _records_digest(records)])
        return hashlib.sha256(text.encode()).hexdigest()


class MissingShards(Sequence[ShardTask]):
    """Those tasks of a plan that are to be done."""

    def __init__(self, plan: ShardPlan, positions: Sequence[int]) -> None:
        self._plan, self._positions = plan, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, k: int) -> ShardTask: ...
    @overload
    def __getitem__(self, k: slice) -> "MissingShards": ...
    def __getitem__(self, k: int | slice) -> "ShardTask | MissingShards":
        if isinstance(k, slice):
            return MissingShards(self._plan, self._positions[k])
        return self._plan[self._positions[k]]


def hash_order(records: Sequence[Record]) -> NDArray[np.int64]:
    """The positions of the records in the order of their keys' hashes; equal ones as listed.

    Raises `DataError` for a key that two records have.
    """
    digests = (
        int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        for key in record_keys(records)
    )
    values = np.fromiter(digests, dtype=np.uint64, count=len(records))
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    for k in np.flatnonzero(ordered[1:] == ordered[:-1]).tolist():
        first, second = (records[int(i)] for i in order[k : k + 2])
        if first.key == second.key:
            raise DataError(
                f"{first.path} and {second.path} have one key, {first.key!r}; a shard cannot hold "
                "two samples of one name: give each image its own"
            )
    return order


def _records_digest(records: Sequence[Record]) -> str:
    """Of all that a shard depends on; file sizes stand for the images, folders do not count."""
    if isinstance(records, RecordColumns):
        return records.digest()
    digest = hashlib.sha256()
    for record in records:
        plain = [
            record.key,
            record.path.rsplit("/", 1)[-1],
            record.num_bytes,
            record.offset,
            record.image_id,
            record.declared_size,
            record.negative_category_ids,
            record.not_exhaustive_category_ids,
            record.coarse,
            record.caption,
            None if record.boxes is None else [len(record.boxes), record.relative_boxes],
        ]
        digest.update(json.dumps(plain).encode())
        digest.update(record.category_ids.tobytes())
        if record.boxes is not None:
            digest.update(record.boxes.tobytes())
    return digest.hexdigest()
