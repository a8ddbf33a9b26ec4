"""Finding the files that a source names: its annotations and its images."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TypeVar

from pipeline.data.sources.archives import COMPRESSED, compressed_message
from pipeline.data.storage.files import exists, list_directory, read_bytes, resolve
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 8
"""Archives and folders that are listed at a time; more would not help one interpreter."""


def read_annotations(source: Source, root: str) -> tuple[str, bytes]:
    """Where the annotation file is, and its bytes; `RecipeError` when it is not there."""
    return read_file(source, root, "annotations", source.annotations)


def read_file(source: Source, root: str, key: str, path: str | None) -> tuple[str, bytes]:
    """Where the file of a `key` of the source is, and its bytes; `RecipeError` without it."""
    assert path is not None, f"the recipe sees to {key}"
    url = resolve(root, path)
    try:
        return url, read_bytes(url)
    except FileNotFoundError:
        raise RecipeError(
            f"source {source.name}: `{key}` {path!r} is no file at {url}; correct it, or data.root"
        ) from None


def read_text(source: Source, root: str, key: str, path: str | None) -> tuple[str, str]:
    """The same as text, see `decode_text`."""
    url, data = read_file(source, root, key, path)
    return url, decode_text(url, data)


def decode_text(url: str, data: bytes) -> str:
    """UTF-8 text of an annotation file, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8 text (byte {error.start}); convert the file") from None


class ImageFolder:
    """The `images` directory of a source; each directory below it is listed once, when asked for.

    Raises `RecipeError` when the directory is absent or empty.
    """

    def __init__(self, source: Source, root: str) -> None:
        self.url = resolve(root, source.images)
        self._listings: dict[str, dict[str, int]] = {}
        self.files, self.directories = list_directory(self.url)
        self._listings[""] = self.files
        if not self.files and not self.directories:
            raise RecipeError(
                f"source {source.name}: `images` {source.images!r} is no directory with images at "
                f"{self.url}; correct it, or data.root"
            )

    def files_in(self, directory: str) -> dict[str, int]:
        """Size in bytes of each file in a directory below, by name; empty where there is none."""
        if directory not in self._listings:
            top = directory.split("/", 1)[0]
            known = top in self.directories
            self._listings[directory] = (
                list_directory(f"{self.url}/{directory}")[0] if known else {}
            )
        return self._listings[directory]

    def find(self, name: str) -> tuple[str, int] | None:
        """Path below `images` and size of the file that ends as `name` does.

        Published names hold more leading folders than most copies on disk do, so `a/b/c.jpg` is
        looked for as `a/b/c.jpg`, then `b/c.jpg`, then `c.jpg`. Raises `DataError` for a name that
        leads out of the directory.
        """
        parts = PurePosixPath(name).parts
        if ".." in parts:
            raise DataError(f"image name {name!r} leads out of its directory; remove the `..`")
        parts = tuple(part for part in parts if part != "/")
        for start in range(len(parts)):
            directory, file = "/".join(parts[start:-1]), parts[-1]
            size = self.files_in(directory).get(file)
            if size is not None:
                return "/".join(parts[start:]), size
        return None

    def path_of(self, name: str) -> str:
        """Full path or URL of a name below the directory."""
        return f"{self.url}/{name}"


def find_archive(source: Source, root: str) -> str | None:
    """Where the tar that `images` names is; None where it names a folder.

    Raises `RecipeError` for a compressed archive and for a tar that is not there.
    """
    url = resolve(root, source.images)
    if url.lower().endswith(COMPRESSED):
        raise RecipeError(f"source {source.name}: {compressed_message(url)}")
    if not url.endswith(".tar"):
        return None
    if not exists(url):
        raise RecipeError(
            f"source {source.name}: `images` {source.images!r} is no archive at {url}; correct "
            "it, or data.root"
        )
    return url


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in their order; a few are ahead, to wait for storage together."""
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * _THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
