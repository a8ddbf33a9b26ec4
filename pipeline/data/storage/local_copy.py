"""A file of storage as a file of this machine, checked once and then trusted.

    ~/.cache/longtail/indexes/<sha256>           the copy of a remote file
    ~/.cache/longtail/indexes/<sha256>.lock      held (flock) by the one process that fetches it
    ~/.cache/longtail/indexes/checked/<digest>   says that a file was found good as it stands

What a process maps into memory is there once for all processes of a machine. Hashing the 0.7 GB of
a large index takes about a second, so it is done once for a file of one name, place, size and time
of change; small files are hashed each time that they are opened. `XDG_CACHE_HOME` moves the folder.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.data.storage.files import is_local_path, local_path, read_range
from pipeline.errors import StorageError

BLOCK = 16 << 20
"""Bytes that are fetched or hashed at a time."""
ALWAYS_HASHED = 64 << 20
"""Files up to this size are hashed whenever they are opened, which takes under 0.1 s."""


def cache_folder() -> Path:
    """Where copies are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "longtail" / "indexes"


def local_copy(url: str, num_bytes: int, sha256: str) -> Path:
    """A file of this machine with the content of `url`: itself, or a copy, fetched if it must be.

    Raises FileNotFoundError, or `StorageError` for content of another size or sha256.
    """
    if is_local_path(url):
        path = Path(local_path(url))
        if not _is_good(path, num_bytes, sha256):
            raise StorageError(f"{url} is not what its index says; run `longtail prepare` again")
        return path
    path = cache_folder() / sha256
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists() or not _is_good(path, num_bytes, sha256):
                _fetch(url, num_bytes, sha256, path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise StorageError(
            f"no copy of {url} can be kept in {path.parent} ({error}); set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from error
    return path


def is_remembered(path: Path) -> bool:
    """Whether this very file was found good before, by hash and by whoever uses it."""
    status = path.stat()
    return status.st_size > ALWAYS_HASHED and _mark(path, status).exists()


def remember(path: Path) -> None:
    """Note that a file is good as it stands; where nothing can be noted it is checked again."""
    status = path.stat()
    if status.st_size > ALWAYS_HASHED:
        with suppress(OSError):
            mark = _mark(path, status)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _is_good(path: Path, num_bytes: int, sha256: str) -> bool:
    if path.stat().st_size != num_bytes:
        return False
    if is_remembered(path):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _mark(path: Path, status: os.stat_result) -> Path:
    identity = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return cache_folder() / "checked" / name


def _fetch(url: str, num_bytes: int, sha256: str, path: Path) -> None:
    partial = path.with_suffix(".part")
    try:
        with partial.open("wb") as file:
            if download(url, num_bytes, file) != sha256:
                raise StorageError(
                    f"{url} is not what its index says; run `longtail prepare` again"
                )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def download(url: str, num_bytes: int, file: BinaryIO) -> str:
    """Write the `num_bytes` of `url` to an open file and flush them to its disk; their sha256."""
    digest = hashlib.sha256()
    for start in range(0, num_bytes, BLOCK):
        block = read_range(url, start, min(start + BLOCK, num_bytes))
        digest.update(block)
        file.write(block)
    file.flush()
    # Checked bytes that are still in memory only would be trusted after a power cut.
    os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel lets go of the lock when its holder is killed.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
