"""Samples out of shards: local ones in place, remote ones by ranges or as whole cached files.

A reader process has one fetcher for each source. It is told what comes next, so that requests are
on their way while other samples are decoded. Nothing is opened before the first read, and nothing
that is open travels with a pickle.
"""

import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from pipeline.data.sample import Sample
from pipeline.data.shards.index import Index
from pipeline.data.storage.files import is_local_path, local_path, read_range
from pipeline.data.stream.cache import ShardCache
from pipeline.data.stream.web_ranges import WebRanges
from pipeline.errors import StorageError
from pipeline.recipe import ShardReading

OPEN_SHARDS = 64
"""Shards of a source that a process keeps open at least: two of the plan's usual windows, and some.
"""
SHARDS_IN_FLIGHT = 2
"""Whole shards that one process fetches at a time."""
FORGOTTEN_AFTER = 8
"""Range reads beyond this multiple of those in flight that nobody came for are forgotten."""


class Fetcher(Protocol):
    """Gives the samples of one source, by their place in its index."""

    def sample(self, i: int) -> Sample:
        """Sample `i`; raises `StorageError` for a missing, damaged or unreachable shard."""

    def expect(self, samples: Iterable[int]) -> None:
        """Say which samples will soon be asked for, in that order."""

    def expect_shards(self, shards: Iterable[int]) -> None:
        """Say which shards samples will be asked of, in that order."""

    def close(self) -> None:
        """Forget what is expected and close what is open; reading opens it again."""


def open_source(index: Index, reading: ShardReading, window_shards: int = 0) -> Fetcher:
    """The fetcher of a source, by where its shards are and how the recipe reads.

    `window_shards` are shuffled together, so that samples of all of them come by turns.
    """
    open_shards = _open_shards(window_shards)
    if is_local_path(index.url):
        return LocalShards(index, open_shards)
    if reading.how == "ranges":
        return RangeReads(index, reading.in_flight)
    return CachedShards(index, cache_of(reading), open_shards)


def cache_of(reading: ShardReading) -> ShardCache:
    """The cache that a recipe names."""
    folder = reading.cache or Path.home() / ".cache" / "longtail" / "shards"
    return ShardCache(Path(folder), int(reading.cache_gigabytes * 1e9))


def _open_shards(window_shards: int) -> int:
    """Shards to keep open: two windows, as far as the system allows, with other sources beside."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = allowed == resource.RLIM_INFINITY
    wanted = 2 * window_shards if unlimited else min(2 * window_shards, allowed // 4)
    return max(wanted, OPEN_SHARDS)


class OpenShards:
    """File descriptors of the shards that were read last, by position."""

    def __init__(self, open_shard: Callable[[int], int], limit: int) -> None:
        self._open_shard = open_shard
        self._limit = limit
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, position: int, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop` of a shard, fewer where it ends before."""
        descriptor = self._descriptors.get(position)
        if descriptor is None:
            descriptor = self._descriptors[position] = self._open_shard(position)
            while len(self._descriptors) > self._limit:
                _, oldest = self._descriptors.popitem(last=False)
                os.close(oldest)
        self._descriptors.move_to_end(position)
        # One call reads at most 2 GB.
        parts = []
        while start < stop and (part := os.pread(descriptor, stop - start, start)):
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self, position: int | None = None) -> None:
        """Close a shard, or all."""
        for known in list(self._descriptors) if position is None else [position]:
            if (descriptor := self._descriptors.pop(known, None)) is not None:
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class LocalShards:
    """Shards of this machine's file system, read in place."""

    def __init__(self, index: Index, open_shards: int = OPEN_SHARDS) -> None:
        self._index = index
        self._open_shards = open_shards
        self._files: OpenShards | None = None

    def sample(self, i: int) -> Sample:
        """Sample `i`; raises `StorageError` for a missing, cut or damaged shard."""
        if self._files is None:
            self._files = OpenShards(self._open, self._open_shards)
        position, start, stop = self._index.span(i)
        url = self._index.shard_url(position)
        try:
            data = self._files.read(position, start, stop)
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None
        except OSError as error:
            raise StorageError(f"cannot read {url}: {error}") from error
        if len(data) != stop - start:
            raise StorageError(
                f"{url}: {len(data)} bytes came instead of {stop - start} (from byte {start}); the "
                "file is cut short: delete it and run `longtail prepare` again"
            )
        return self._index.parse(i, data)

    def expect(self, samples: Iterable[int]) -> None:
        """Nothing to do: the system reads ahead."""

    def expect_shards(self, shards: Iterable[int]) -> None:
        """Nothing to do: they are here."""

    def close(self) -> None:
        """Close what is open."""
        if self._files is not None:
            self._files.close()

    def _open(self, position: int) -> int:
        return os.open(local_path(self._index.shard_url(position)), os.O_RDONLY)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": None}


class RangeReads:
    """One ranged request for each sample, `in_flight` of them at a time in each process."""

    def __init__(self, index: Index, in_flight: int) -> None:
        self._index = index
        self._in_flight = in_flight
        self._web = WebRanges(in_flight)
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: OrderedDict[int, Future[bytes]] = OrderedDict()

    def sample(self, i: int) -> Sample:
        """Sample `i`; raises `StorageError` when storage does not give its bytes."""
        future = self._waiting.pop(i, None)
        return self._index.parse(i, self._read(i) if future is None else future.result())

    def expect(self, samples: Iterable[int]) -> None:
        """Send the requests for these samples, as far as they are not on their way."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._in_flight, thread_name_prefix="range-read")
        for i in samples:
            if i not in self._waiting:
                self._waiting[i] = self._pool.submit(self._read, i)
        # Nobody comes for what another process was given in the end.
        while len(self._waiting) > FORGOTTEN_AFTER * self._in_flight:
            _, forgotten = self._waiting.popitem(last=False)
            forgotten.cancel()

    def expect_shards(self, shards: Iterable[int]) -> None:
        """Nothing to do: samples are asked for one by one."""

    def close(self) -> None:
        """Take back the requests that are not sent yet."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._waiting = None, OrderedDict()

    def _read(self, i: int) -> bytes:
        position, start, stop = self._index.span(i)
        url = self._index.shard_url(position)
        data = self._web.read(url, start, stop)
        if data is not None:
            return data
        try:
            return read_range(url, start, stop)
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pool": None, "_waiting": OrderedDict()}


class CachedShards:
    """Whole shards in a cache on local disk, which the processes of the machine share."""

    def __init__(self, index: Index, cache: ShardCache, open_shards: int = OPEN_SHARDS) -> None:
        self._index = index
        self._cache = cache
        self._open_shards = open_shards
        self._files: OpenShards | None = None
        self._ahead: _Background | None = None

    def sample(self, i: int) -> Sample:
        """Sample `i`; a copy in the cache that is damaged is fetched again, once.

        Raises `StorageError` when the shard cannot be had, or is not what its index says.
        """
        position, start, stop = self._index.span(i)
        try:
            return self._index.parse(i, self._read(position, start, stop))
        except StorageError:
            self._close(position)
            if not self._cache.drop_if_damaged(self._index.shards[position]):
                raise
        return self._index.parse(i, self._read(position, start, stop))

    def expect(self, samples: Iterable[int]) -> None:
        """Nothing to do: whole shards are fetched."""

    def expect_shards(self, shards: Iterable[int]) -> None:
        """Fetch these shards in the background, in this order, and no others."""
        if self._ahead is None:
            self._ahead = _Background(self._fetch_ahead, SHARDS_IN_FLIGHT)
        self._ahead.want(shards)

    def close(self) -> None:
        """Begin no more shards, and close those that are open."""
        if self._ahead is not None:
            self._ahead.want(())
        self._close()

    def _fetch_ahead(self, position: int) -> None:
        try:
            self._cache.fetch_ahead(self._index, position)
        except StorageError:
            # Whoever needs the shard tries again, and that error is seen.
            return

    def _read(self, position: int, start: int, stop: int) -> bytes:
        if self._files is None:
            self._files = OpenShards(
                lambda position: self._cache.open(self._index, position), self._open_shards
            )
        url = self._index.shard_url(position)
        try:
            return self._files.read(position, start, stop)
        except OSError as error:
            raise StorageError(f"cannot read the cached copy of {url}: {error}") from error

    def _close(self, position: int | None = None) -> None:
        if self._files is not None:
            self._files.close(position)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": None, "_ahead": None}


class _Background:
    """Threads that do `function` of what is wanted, in order, and never hold up the exit."""

    def __init__(self, function: Callable[[int], None], number: int) -> None:
        self._function = function
        self._wanted: deque[int] = deque()
        self._changed = threading.Condition()
        for _ in range(number):
            # A daemon, unlike an executor's: a process that ends does not wait for whole shards.
            threading.Thread(target=self._run, name="shard-fetch", daemon=True).start()

    def want(self, items: Iterable[int]) -> None:
        """Do these next, in place of what was wanted before and is not begun."""
        with self._changed:
            self._wanted = deque(items)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted)
                item = self._wanted.popleft()
            self._function(item)
