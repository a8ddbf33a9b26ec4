"""Large csv files by columns and in blocks: a file of gigabytes is not in memory as a whole."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sources.files import decode_text
from pipeline.data.storage.files import file_size, read_bytes, read_range
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Source

_BLOCK = 4 << 20
"""Bytes that are parsed at a time; the strings in it take some twenty times as much."""
_MAX_LINE = 1 << 20
"""Bytes; a longer line is no row, and a json may be one line of gigabytes."""


@dataclass(frozen=True)
class Block:
    """Some rows of a csv: the texts of each wanted column, and the line of the first row."""

    url: str
    line: int
    columns: tuple[Sequence[str], ...]

    def numbers(self, k: int, name: str) -> NDArray[np.float64]:
        """Column k as finite floats; raises `DataError` with line and value."""
        try:
            values = np.fromiter(map(float, self.columns[k]), dtype=np.float64)
            if np.isfinite(values).all():
                return values
        except ValueError:
            pass
        for line, text in enumerate(self.columns[k], start=self.line):
            try:
                finite = bool(np.isfinite(float(text)))
            except ValueError:
                finite = False
            if not finite:
                raise DataError(f"{self.url}, line {line}: {name} {text!r} must be a finite number")
        raise AssertionError("one of the numbers is wrong")

    def hexadecimal(self, k: int, name: str) -> NDArray[np.uint64]:
        """Column k of 16 hexadecimal digits each, as integers; raises `DataError` with the line."""
        texts = self.columns[k]
        try:
            if set(map(len, texts)) <= {16}:
                return np.frombuffer(bytes.fromhex("".join(texts)), dtype=">u8").astype(np.uint64)
        except ValueError:
            pass
        digits = set("0123456789abcdefABCDEF")
        for line, text in enumerate(texts, start=self.line):
            if len(text) != 16 or not set(text) <= digits:
                raise DataError(
                    f"{self.url}, line {line}: {name} {text!r} must be 16 hexadecimal digits"
                )
        raise AssertionError("one of the ids is wrong")


def read_blocks(source: Source, root_url: str, key: str, wanted: Sequence[str]) -> Iterator[Block]:
    """The `wanted` columns of the csv at `root_url`, which `key` of the source names.

    The columns are found by the header. Raises `RecipeError` when the file is absent, `DataError`
    for a header without them and for a row of another length.
    """
    num_bytes, read = _open(source, root_url, key)
    rest, header, places, line = b"", [""], [0], 1
    for start in range(0, num_bytes, _BLOCK):
        stop = min(start + _BLOCK, num_bytes)
        data = rest + read(start, stop)
        end = len(data) if stop == num_bytes else data.rfind(b"\n") + 1
        data, rest = data[:end], data[end:]
        if len(rest) > _MAX_LINE:
            raise DataError(
                f"{root_url}: a line of more than {_MAX_LINE} bytes (it begins {rest[:40]!r}); "
                f"`{key}` is a csv with the columns {', '.join(wanted)}"
            )
        rows = parse_rows(root_url, data)
        if line == 1 and rows:
            header = rows.pop(0)
            places = _places(root_url, header, wanted, key)
            line = 2
        while rows and not rows[-1]:
            rows.pop()
        if not rows:
            continue
        for number, row in enumerate(rows, start=line):
            if len(row) != len(header):
                raise DataError(
                    f"{root_url}, line {number}: {len(row)} values, and the header has "
                    f"{len(header)}; is the file cut short?"
                )
        turned = list(zip(*rows, strict=True))
        yield Block(root_url, line, tuple(turned[k] for k in places))
        line += len(rows)


def _open(source: Source, url: str, key: str) -> tuple[int, Callable[[int, int], bytes]]:
    """The size of a file, and what reads a part of it."""
    try:
        num_bytes = file_size(url)
        # Where a web server does not say how large a file is, the whole of it has to fit.
        data = read_bytes(url) if num_bytes is None else b""
    except FileNotFoundError:
        raise RecipeError(
            f"source {source.name}: `{key}` is no file at {url}; correct it, or data.root"
        ) from None
    if num_bytes is not None:
        return num_bytes, partial(read_range, url)
    return len(data), lambda start, stop: data[start:stop]


def parse_rows(url: str, data: bytes) -> list[list[str]]:
    """The rows of a small csv or of a part of one; raises `DataError` where it cannot be split."""
    try:
        return list(csv.reader(io.StringIO(decode_text(url, data))))
    except csv.Error as error:
        raise DataError(f"{url}: not a csv ({error}); is it the right file?") from None


def _places(url: str, header: list[str], wanted: Sequence[str], key: str) -> list[int]:
    missing = [name for name in wanted if name not in header]
    if missing:
        begin = ",".join(header)[:80]
        raise DataError(
            f"{url}: the header lacks {', '.join(missing)} (it begins {begin!r}); `{key}` is a csv "
            f"with the columns {', '.join(wanted)}"
        )
    return [header.index(name) for name in wanted]
