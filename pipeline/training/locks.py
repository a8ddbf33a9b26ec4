"""Locks on files of a run directory: the kernel lets go of them when their holder ends."""

import fcntl
from pathlib import Path
from typing import IO, Any

from pipeline.errors import StorageError
from pipeline.training.space import with_room


def open_lock(path: Path) -> IO[Any]:
    """The file to lock, with its folder; raises `StorageError` where they cannot be written."""

    def open_file() -> IO[Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")

    return with_room(path, 0, open_file)


def try_lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file; False where another holds it, unless `wait`.

    Raises `StorageError` where the file system has no locks: without them two processes could
    train in one directory.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"{file.name} could not be locked: {error}. A run directory takes a file system with "
            "locks: mount it with them (Lustre: the option flock), or set the recipe's output to "
            "one that has them, and run the same command again"
        ) from error
    return True
