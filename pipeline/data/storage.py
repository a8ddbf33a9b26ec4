"""Files through fsspec: where a path of the recipe leads, atomic publishing, and plain errors."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import RecipeError, StorageError


def resolve(root: str, *parts: str) -> str:
    """`parts` under `root`; a part that is absolute or a URL starts anew, as with os.path.

    Local paths come back absolute: the reader may be a process with another working directory.
    """
    url = root
    for part in parts:
        starts_anew = "://" in part or part.startswith("/")
        url = part if starts_anew or not url else f"{url.rstrip('/')}/{part}"
    return url if "://" in url or "::" in url else os.path.abspath(url)


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path in it; raises `RecipeError` for an unusable URL."""
    if "::" in url:
        # simplecache:: and its kin keep a file that was cut short and serve it as good next time.
        raise RecipeError(f"{url}: chained fsspec URLs are not supported; give the plain URL")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"{url}: no file system for this URL ({error})") from None
    return filesystem, path


@contextmanager
def storage_errors(action: str, url: str) -> Iterator[None]:
    """Turn an operating-system error into `StorageError`; a missing file stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {action} {url}: {error}") from error


def exists(url: str) -> bool:
    """Whether there is a file or directory at `url`."""
    filesystem, path = open_filesystem(url)
    with storage_errors("look up", url):
        return bool(filesystem.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole file; raises FileNotFoundError, or `StorageError` for any other failure."""
    filesystem, path = open_filesystem(url)
    with storage_errors("read", url):
        return cast(bytes, filesystem.cat_file(path))


def list_directory(url: str) -> tuple[dict[str, int], list[str]]:
    """Files of one directory with their sizes in bytes, and its sorted subdirectories, by name.

    Symbolic links count as what they lead to. Two empties when there is no such directory (an
    object store cannot tell it from an empty one).
    """
    filesystem, path = open_filesystem(url)
    files: dict[str, int] = {}
    directories: list[str] = []
    with storage_errors("list", url):
        try:
            entries = filesystem.ls(path, detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return files, directories
    for entry in entries:
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        linked = bool(entry.get("islink"))
        if entry["type"] == "directory" or (linked and filesystem.isdir(entry["name"])):
            directories.append(name)
        elif not linked or filesystem.isfile(entry["name"]):
            files[name] = int(entry["size"] or 0)
    return files, sorted(directories)


@contextmanager
def publish(url: str) -> Iterator[BinaryIO]:
    """A file to write, which appears at `url` complete or not at all.

    Local files are renamed into place after fsync; object stores take the finished file in one put.
    """
    filesystem, path = open_filesystem(url)
    local = isinstance(filesystem, LocalFileSystem)
    with storage_errors("write", url):
        directory = os.path.dirname(path)
        if local:
            os.makedirs(directory, exist_ok=True)
        else:
            filesystem.makedirs(directory, exist_ok=True)
        prefix = f".{os.path.basename(path)}."
        handle, temporary = tempfile.mkstemp(
            prefix=prefix, suffix=".tmp", dir=directory if local else None
        )
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if local:
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            else:
                filesystem.put_file(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


def publish_bytes(url: str, data: bytes) -> None:
    """Write a small file atomically."""
    with publish(url) as file:
        file.write(data)


def remove(url: str) -> None:
    """Delete a file; nothing happens when it is not there."""
    filesystem, path = open_filesystem(url)
    with storage_errors("remove", url):
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return
