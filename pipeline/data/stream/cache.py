"""A bounded local copy of remote shards, shared by all processes of a machine.

    <folder>/<sha256>.tar         a whole shard, checked by size and sha256 before it got this name
    <folder>/<sha256>.tar.part    one on its way, of its full size from the beginning; what a killed
                                  process leaves is removed by the next fetch
    <folder>/<sha256>.tar.lock    held (flock) by the one process that fetches the shard

A shard is named by its content, so two recipes with the same data share it. The kernel lets go of a
lock when its holder is killed, so no lock is ever stale.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.shards.index import Index, ShardFile
from pipeline.data.storage.local_copy import download
from pipeline.errors import StorageError

ATTEMPTS = 2
"""How often a shard is fetched whole whose bytes turn out to be others than its index says."""
WAIT_S = 0.05
"""Between two looks for room, while other fetches have taken it all."""


class ShardCache:
    """Whole shards in `folder`, at most `max_bytes` of them; the least recently opened go first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def open(self, index: Index, position: int) -> int:
        """A file descriptor of a whole shard, fetched where it is not there yet.

        The caller closes it; what is open stays readable when the shard is thrown out. Raises
        `StorageError`, for a missing shard and a full disk too.
        """
        shard = index.shards[position]
        while True:
            descriptor = self._open_whole(shard)
            if descriptor is not None:
                return descriptor
            with self._locked(shard):
                # Another process may have fetched it while this one waited for the lock.
                if not self._is_whole(shard):
                    self._fetch(index, position)

    def fetch_ahead(self, index: Index, position: int) -> None:
        """Fetch a shard that will be needed, unless it is there or another process is fetching it.

        Raises `StorageError`.
        """
        shard = index.shards[position]
        if self._is_whole(shard):
            return
        with self._locked(shard, wait=False) as held:
            if held and not self._is_whole(shard):
                self._fetch(index, position)

    def drop_if_damaged(self, shard: ShardFile) -> bool:
        """Remove a shard whose bytes are no longer those of its sha256; whether it was so."""
        with self._locked(shard):
            path = self._path(shard)
            try:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                        return False
            except FileNotFoundError:
                return True
            path.unlink(missing_ok=True)
            return True

    def _path(self, shard: ShardFile) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _is_whole(self, shard: ShardFile) -> bool:
        try:
            return self._path(shard).stat().st_size == shard.num_bytes
        except FileNotFoundError:
            return False

    def _open_whole(self, shard: ShardFile) -> int | None:
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        if os.fstat(descriptor).st_size != shard.num_bytes:
            # It was whole when it got its name, so something cut it afterwards.
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def _fetch(self, index: Index, position: int) -> None:
        """Fetch under the shard's lock; the file has its name when size and sha256 are right."""
        shard, url = index.shards[position], index.shard_url(position)
        if shard.num_bytes > self.max_bytes:
            raise StorageError(
                f"{url} has {shard.num_bytes / 1e9:.2f} GB, and the cache of shards may hold "
                f"{self.max_bytes / 1e9:.2f} GB; raise data.reading.cache_gigabytes, or read by "
                "data.reading.how: ranges"
            )
        path = self._path(shard)
        partial = path.with_name(path.name + ".part")
        try:
            for _ in range(ATTEMPTS):
                self._reserve(partial, shard.num_bytes)
                if _download(url, shard.num_bytes, partial) == shard.sha256:
                    with self._lock(self.folder / "room.lock"):
                        partial.rename(path)
                    return
        except FileNotFoundError:
            raise StorageError(f"{url} is missing; run `longtail prepare` again") from None
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{url} has another sha256 than its index says, fetched {ATTEMPTS} times; the shard is "
            "damaged or was replaced: delete it and run `longtail prepare` again"
        )

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Make `partial`, of `num_bytes`, as soon as these fit beside what is there.

        What other fetches have reserved stays; they end, and then their shards may be thrown out.
        """
        partial.unlink(missing_ok=True)
        while True:
            with self._lock(self.folder / "room.lock"):
                if self._make_room(num_bytes):
                    with partial.open("wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(WAIT_S)

    def _make_room(self, num_bytes: int) -> bool:
        """Throw out the least recently opened shards until `num_bytes` more fit; whether they do.

        The caller holds the lock of the room.
        """
        self._remove_leftovers()
        found = []
        for path in self.folder.glob("*.tar*"):
            if path.suffix != ".lock":
                # A part goes without the room's lock when its fetch fails.
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held + num_bytes <= self.max_bytes:
                break
            if path.suffix == ".tar":
                path.unlink(missing_ok=True)
                held -= size
        return held + num_bytes <= self.max_bytes

    def _remove_leftovers(self) -> None:
        """Remove what killed processes were fetching: parts whose lock nobody holds."""
        for partial in self.folder.glob("*.part"):
            lock = partial.with_suffix(".lock")
            with self._lock(lock, wait=False) as held:
                if held:
                    partial.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, shard: ShardFile, *, wait: bool = True) -> Iterator[bool]:
        with self._lock(self._path(shard).with_suffix(".tar.lock"), wait=wait) as held:
            yield held

    @contextmanager
    def _lock(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock file; yields whether it is held, which it always is with `wait`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            held = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                held = False
            yield held
        finally:
            os.close(descriptor)

    def _unusable(self, error: OSError) -> StorageError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                f"the cache of shards in {self.folder} cannot grow ({error.strerror}); free some "
                "space, lower data.reading.cache_gigabytes, put data.reading.cache on another "
                "disk, or read by data.reading.how: ranges"
            )
        return StorageError(
            f"the cache of shards in {self.folder} cannot be used ({error}); choose another "
            "folder as data.reading.cache, or read by data.reading.how: ranges"
        )


def _download(url: str, num_bytes: int, path: Path) -> str:
    """Write the `num_bytes` of `url` over a file of that size; their sha256."""
    with path.open("r+b") as file:
        return download(url, num_bytes, file)
