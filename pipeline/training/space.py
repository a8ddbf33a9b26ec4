"""A disk that is full: what is written waits for somebody to make room, and is then written again.

Other ranks wait in their next collective meanwhile, which allows for more than `WAITS_S`.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StorageError
from pipeline.training.whereabouts import here

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WAITS_S: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0)
"""Seconds before the second and each further try."""
FULL = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def with_room(path: Path, num_bytes: int, attempt: Callable[[], Result]) -> Result:
    """`attempt()`, which writes about `num_bytes` at `path` and leaves nothing when it fails.

    Tried again after each of `WAITS_S` while the disk, or the user's quota on it, is full; then
    raises `StorageError`, as it does at once where the disk fails in another way.
    """
    for number, wait in enumerate((*WAITS_S, None), start=1):
        here.move()
        try:
            return attempt()
        except (OSError, StorageError) as error:
            if isinstance(error, OSError) and not _is_full(error):
                raise StorageError(
                    f"{path} could not be written: {error}. What was saved before is intact; see "
                    "to that disk and run the same command again"
                ) from error
            if not _is_full(error):
                raise
            state = f"{path} needs {_size(num_bytes)} and its disk has {_free(path)} free"
            if wait is None:
                raise StorageError(
                    f"no space left: {state}, tried {number} times in {sum(WAITS_S):g} s. What was "
                    "saved before is intact; make room, or raise the quota, and run the same "
                    "command again"
                ) from error
            logger.warning("no space left: %s; trying again in %g s", state, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def append_line(path: Path, line: str) -> None:
    """Append a line whole, after one that a kill cut short too; see `with_room`."""
    data = line.encode() + b"\n"

    def write() -> None:
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
            whole = data if not end or file.read(1) == b"\n" else b"\n" + data
            try:
                if file.write(whole) != len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                file.truncate(end)
                raise

    with_room(path, len(data), write)


def read_lines(path: Path, offset: int = 0) -> list[bytes]:
    """Lines from a byte on, with their ends, of which the last may lack it."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().splitlines(keepends=True)
    except OSError as error:
        raise StorageError(
            f"{path} could not be read: {error}. See to that disk and run the same command again"
        ) from error


def error_of_library(error: Exception) -> OSError:
    """What a library says of a failed write, as the OSError that it is about."""
    found = _OS_ERROR.search(str(error))
    return OSError(int(found[1]), str(error)) if found else OSError(str(error))


def _is_full(error: BaseException) -> bool:
    found = error.__cause__ if isinstance(error, StorageError) else error
    return isinstance(found, OSError) and found.errno in FULL


def _free(path: Path) -> str:
    place = path
    while not place.exists():
        place = place.parent
    return _size(shutil.disk_usage(place).free)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes} bytes"
