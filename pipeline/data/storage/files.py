"""Files through fsspec: where a path of the recipe leads, atomic publishing, and plain errors."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.data.storage.transient import (
    ShortRead,
    describe,
    is_passing,
    is_storage_fault,
    persist,
)
from pipeline.errors import LongtailError, RecipeError, StorageError

CONNECT_S, ANSWER_S = 10.0, 30.0
"""How long a server may take to accept a connection, and between two pieces of an answer."""

_PACKAGES = {
    "s3": "longtail[s3]",
    "s3a": "longtail[s3]",
    "gs": "longtail[gs]",
    "gcs": "longtail[gs]",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""What to install for a scheme; `longtail[s3]` is s3fs, `longtail[gs]` is gcsfs."""
_NO_DIRECTORIES = {"s3", "s3a", "gs", "gcs", "hf", "memory"}
"""Stores of objects by name; asked for a directory, s3fs would make a bucket of a misspelt one."""


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
    """The file system of `url` and the path in it; raises `RecipeError` for an unusable URL.

    Credentials come from where each package looks for them: environment, profile, instance role,
    and fsspec's own configuration files.
    """
    if "::" in url:
        # simplecache:: and its kin keep a file that was cut short and serve it as good next time.
        raise RecipeError(f"{url}: chained fsspec URLs are not supported; give the plain URL")
    scheme = scheme_of(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_patience(scheme))
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(scheme)
        if package is None or isinstance(error, ValueError):
            raise RecipeError(f"{url}: no file system for this URL ({error})") from None
        raise RecipeError(
            f"{url}: {scheme}:// needs a package that is not installed ({error}); run "
            f"`pip install '{package}'`"
        ) from None
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs; `persist` tries again, and two of them would multiply.
    return filesystem, path


def scheme_of(url: str) -> str:
    """What stands before `://`; `file` for a plain path."""
    return url.partition("://")[0] if "://" in url else "file"


def is_remote(url: str) -> bool:
    """Whether a file is on another machine, for all that its URL says."""
    return scheme_of(url) not in ("file", "local", "memory")


def is_local_path(url: str) -> bool:
    """Whether a URL is a path of this machine's file system."""
    return scheme_of(url) in ("file", "local")


def local_path(url: str) -> str:
    """The path that a local URL means."""
    return url.removeprefix("file://").removeprefix("local://")


def _patience(scheme: str) -> dict[str, Any]:
    """Options by which a server that never answers is an error, over the user's own for fsspec."""
    given = fsspec.config.conf.get(scheme, {})
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=ANSWER_S)
        return {"client_kwargs": {"timeout": timeout, **given.get("client_kwargs", {})}}
    if scheme in ("s3", "s3a"):
        config = {
            "connect_timeout": CONNECT_S,
            "read_timeout": ANSWER_S,
            "retries": {"total_max_attempts": 1},
        }
        return {"config_kwargs": {**config, **given.get("config_kwargs", {})}}
    return {}


def exists(url: str) -> bool:
    """Whether there is a file or directory at `url`."""
    filesystem, path = open_filesystem(url)
    # By default fsspec takes any error of an http server for a missing file.
    strict = {"strict": True} if scheme_of(url) in ("http", "https") else {}

    def look() -> bool:
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path, **strict))

    return persist("look up", url, look)


def read_bytes(url: str) -> bytes:
    """The whole file; raises FileNotFoundError, or `StorageError` for any other failure."""
    filesystem, path = open_filesystem(url)
    return cast(bytes, persist("read", url, lambda: filesystem.cat_file(path)))


def read_range(url: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to before `stop`.

    Raises FileNotFoundError, or `StorageError` for a file that ends before and any other failure.
    """
    filesystem, path = open_filesystem(url)

    def read() -> bytes:
        data = cast(bytes, filesystem.cat_file(path, start=start, end=stop))
        if len(data) > stop - start:
            raise StorageError(
                f"{url}: {len(data)} bytes came instead of {stop - start} (from byte {start}); the "
                "server does not serve ranges, or sends something else in the place of the file"
            )
        if len(data) < stop - start:
            # A connection that was cut looks the same as a file that is.
            message = (
                f"{len(data)} bytes came instead of {stop - start} (from byte {start}); the "
                "file is cut short: delete it and run `longtail prepare` again"
            )
            raise ShortRead(message) if is_remote(url) else StorageError(f"{url}: {message}")
        return data

    return persist("read", url, read)


def file_size(url: str) -> int | None:
    """Bytes of a file; None where its server does not say. Raises as `read_bytes` does."""
    filesystem, path = open_filesystem(url)

    def look() -> int | None:
        filesystem.invalidate_cache()
        try:
            found = filesystem.info(path)
        except FileNotFoundError as error:
            # fsspec takes any error of an http server for a missing file.
            if error.__cause__ is not None and is_passing(error.__cause__):
                raise error.__cause__ from None
            raise
        if found["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return cast(int | None, found.get("size"))

    return persist("look up", url, look)


@contextmanager
def storage_errors(action: str, url: str) -> Iterator[None]:
    """Turn a failure of storage into `StorageError`, without trying again; a missing file stays."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, LongtailError) or not is_storage_fault(error):
            raise
        raise StorageError(f"cannot {action} {url}: {describe(error)}") from error


def list_directory(url: str) -> tuple[dict[str, int], list[str]]:
    """Files of one directory with their sizes in bytes, and its sorted subdirectories, by name.

    Symbolic links count as what they lead to. Two empties when there is no such directory (an
    object store cannot tell it from an empty one).
    """
    filesystem, path = open_filesystem(url)
    files: dict[str, int] = {}
    directories: list[str] = []

    def list_entries() -> list[dict[str, Any]]:
        try:
            return cast(list[dict[str, Any]], filesystem.ls(path, detail=True, refresh=True))
        except NotADirectoryError:
            return []

    try:
        entries = persist("list", url, list_entries)
    except FileNotFoundError:
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
    refuse_to_write(url)
    local = isinstance(filesystem, LocalFileSystem)
    with storage_errors("write", url):
        directory = os.path.dirname(path)
        if local:
            os.makedirs(directory, exist_ok=True)
        elif scheme_of(url) not in _NO_DIRECTORIES:
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
                persist("write", url, lambda: filesystem.put_file(temporary, path))
        except FileNotFoundError as error:
            # Of what is written to, so never a missing file: a bucket, or a folder that went away.
            raise StorageError(f"cannot write {url}: {describe(error)}") from error
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


def publish_bytes(url: str, data: bytes) -> None:
    """Write a small file atomically."""
    with publish(url) as file:
        file.write(data)


def refuse_to_write(url: str) -> None:
    """Raises `RecipeError` for a URL that can only be read."""
    if scheme_of(url) in ("http", "https"):
        raise RecipeError(f"{url}: a web server takes no files; give a folder, or s3:// or gs://")


def remove(url: str) -> None:
    """Delete a file; nothing happens when it is not there."""
    filesystem, path = open_filesystem(url)
    try:
        persist("remove", url, lambda: filesystem.rm_file(path))
    except FileNotFoundError:
        return
