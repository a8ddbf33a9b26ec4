"""One call at a time may write the shards of a directory."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.storage.files import is_local_path, local_path
from pipeline.errors import StorageError

LOCK_FILE = ".prepare.lock"


@contextmanager
def sole_writer(url: str) -> Iterator[None]:
    """Hold the directory `url`; raises `StorageError` when another process prepares it.

    The kernel lets go of the lock when its holder ends, however it ends, so none is left over. An
    object store has no locks, and needs none for whole shards: whoever writes the same records
    writes the same bytes, and each shard appears whole.
    """
    if not is_local_path(url):
        yield
        return
    path = Path(local_path(url), LOCK_FILE)
    descriptor = _acquire(path)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                os.close(descriptor)
                raise StorageError(
                    f"{path.parent} is being prepared by {holder or 'another process'}; wait for "
                    "it, or stop it and run `longtail prepare` again"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                return descriptor  # A file system without locks is as good as an object store.
            # Its last holder may have removed the file between the two calls.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
