"""Tar files read in place: where each member lies, by a strict reading of the headers.

Images are later read as ranges of the archive, so nothing is unpacked. What a lenient reader passes
over in silence (an end that is missing, a header that is damaged) is refused here, since it would
cost samples that nobody misses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.data.storage.files import (
    file_size,
    is_local_path,
    local_path,
    read_range,
    storage_errors,
)
from pipeline.errors import DataError, StorageError

_BLOCK = 512
_LOCAL_WINDOW = 8 << 10
_REMOTE_WINDOW = 4 << 20
"""Bytes of one read. A request to an object store costs as much time as megabytes do, so small
members are read through there; in a local file only what is near a header is read."""
_MAX_TAIL = 1 << 20
"""Zeros after the end mark; tar fills up to its record, 10 KB by default. More is a hole."""
_MAX_EXTENSION = 1 << 20
"""Bytes of a long name or of a pax header."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")

_REGULAR = b"0\x007"
_DIRECTORY = b"5"
_NO_FILE = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "pipe"}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive: `num_bytes` bytes of the archive's own file, from `offset`."""

    name: str
    offset: int
    num_bytes: int


class Archive:
    """The regular files of a tar, or of a tar inside another: bytes `start` to `stop` of `url`.

    Iterating reads the headers once, in order. Links, devices and members whose path leads out are
    passed over and listed in `left_out`, as (reason, example). Raises `DataError` for an archive
    that is compressed, damaged, cut short, without its end mark or with sparse members;
    FileNotFoundError for none at all, `StorageError` when storage fails.
    """

    def __init__(self, url: str, start: int = 0, stop: int | None = None) -> None:
        self.url = url
        self.left_out: list[tuple[str, str]] = []
        self._file: BinaryIO | None = None
        self._window_size = _REMOTE_WINDOW
        if is_local_path(url):
            self._window_size = _LOCAL_WINDOW
            with storage_errors("read", url):
                self._file = open(local_path(url), "rb")
                num_bytes = self._file.seek(0, 2)
        else:
            num_bytes = _remote_size(url)
        self._start = start
        self._stop: int = num_bytes if stop is None else stop
        self._window = b""
        self._window_start = 0
        self._cursor = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[Member]:
        if self._start == self._stop:
            raise DataError(f"{self._where(self._start)}: the archive is empty; download it again")
        self._cursor = self._start
        long_name: str | None = None
        pax: dict[str, str] = {}
        while True:
            position = self._cursor
            header = self._header(position)
            if header is None:
                if long_name is not None or pax:
                    raise self._damaged(position, "a long name or pax header has no member")
                self._check_tail(position)
                return
            kind, size = header[156:157], self._size(header, position)
            if kind in (b"L", b"K", b"x", b"g"):
                data = self._extension(position, size)
                if kind == b"L":
                    long_name = _text(data.rstrip(b"\0"))
                elif kind == b"x":
                    pax = self._pax(data, position)
                elif kind == b"g" and {"path", "size"} & self._pax(data, position).keys():
                    raise self._damaged(position, "a global pax header sets a path or a size")
                continue
            name = pax.get("path") or long_name or _header_name(header)
            if "size" in pax:
                size = self._decimal(pax["size"], position)
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
                raise DataError(
                    f"{self._where(position)}: member {name!r} is sparse, and its bytes are not "
                    "those of the file; make the archive again without `--sparse`"
                )
            long_name, pax = None, {}
            member = self._member(name, kind, size, position)
            if member is not None:
                yield member

    def read(self, member: Member) -> bytes:
        """The bytes of a member; from memory when they were read along with its header."""
        return self._bytes(member.offset, member.offset + member.num_bytes)

    def _member(self, name: str, kind: bytes, size: int, position: int) -> Member | None:
        """Checks a member and moves the cursor behind it; None for what is no usable file."""
        example = f"{name} in {self.url}"
        data = position + _BLOCK
        self._cursor = data
        if kind in _NO_FILE:
            self.left_out.append((f"{_NO_FILE[kind]} in an archive, left out", example))
            return None
        if kind == _DIRECTORY:
            return None
        if kind not in _REGULAR:
            raise self._damaged(position, f"member {name!r} is of the unknown type {kind!r}")
        if data + size > self._stop:
            raise DataError(
                f"{self._where(position)}: member {name!r} has {size} bytes by its header, and "
                f"{max(self._stop - data, 0)} follow; the archive is cut short or damaged: "
                "download it again"
            )
        self._cursor = data + -(-size // _BLOCK) * _BLOCK
        if kind == b"\0" and name.endswith("/"):
            return None
        if name.startswith("/") or ".." in name.split("/"):
            self.left_out.append(("path that leads out of its archive, left out", example))
            return None
        return Member(name, data, size)

    def _header(self, position: int) -> bytes | None:
        """The checked header at `position`; None for the block of zeros at the end."""
        if position + _BLOCK > self._stop:
            cut = "its end mark is missing" if position == self._stop else "it ends in a header"
            raise DataError(
                f"{self._where(position)}: {cut}, so the archive was cut short; download it again "
                "(or, when you know that it is whole, append 1024 zero bytes)"
            )
        header = self._bytes(position, position + _BLOCK)
        if not any(header):
            return None
        try:
            expected = _octal(header[148:156])
        except ValueError:
            expected = -1
        total = sum(header) - sum(header[148:156]) + 8 * 32
        if total != expected:
            # Old archives summed the bytes as signed numbers.
            outside = header[:148] + header[156:]
            if total - 256 * sum(byte > 127 for byte in outside) != expected:
                if position == self._start and header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"PK"):
                    raise DataError(compressed_message(self.url))
                raise self._damaged(position, "this is no tar header")
        return header

    def _size(self, header: bytes, position: int) -> int:
        try:
            return _octal(header[124:136])
        except ValueError:
            raise self._damaged(position, "the size of a member is no number") from None

    def _extension(self, position: int, size: int) -> bytes:
        stop = position + _BLOCK + size
        if size > _MAX_EXTENSION or stop > self._stop:
            raise self._damaged(position, f"a name or pax header of {size} bytes")
        self._cursor = position + _BLOCK + -(-size // _BLOCK) * _BLOCK
        return self._bytes(position + _BLOCK, stop)

    def _pax(self, data: bytes, position: int) -> dict[str, str]:
        """`length key=value\\n` records, where the length counts itself."""
        entries: dict[str, str] = {}
        while data:
            length, space, _ = data.partition(b" ")
            if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
                raise self._damaged(position, "a pax header is damaged")
            key, equals, value = data[len(length) + 1 : int(length)].partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise self._damaged(position, "a pax header is damaged")
            entries[_text(key)] = _text(value[:-1])
            data = data[int(length) :]
        return entries

    def _decimal(self, text: str, position: int) -> int:
        if not (text.isascii() and text.isdigit()):
            raise self._damaged(position, f"a pax header gives the size {text!r}")
        return int(text)

    def _check_tail(self, position: int) -> None:
        """Only zeros may follow the end, and no more than tar fills up with."""
        if self._stop - position > _MAX_TAIL:
            raise self._damaged(
                position,
                f"{self._stop - position} bytes follow the end mark (a hole of an unfinished "
                "download, or several archives in one)",
            )
        if any(self._bytes(position, self._stop)):
            raise self._damaged(position, "data follow the end mark")

    def _bytes(self, start: int, stop: int) -> bytes:
        low, high = self._window_start, self._window_start + len(self._window)
        if not low <= start <= stop <= high:
            end = min(max(stop, start + self._window_size), max(self._stop, stop))
            self._window = self._read(start, end)
            self._window_start = low = start
        return self._window[start - low : stop - low]

    def _read(self, start: int, stop: int) -> bytes:
        if self._file is None:
            return read_range(self.url, start, stop)
        with storage_errors("read", self.url):
            self._file.seek(start)
            data = self._file.read(stop - start)
        if len(data) != stop - start:
            raise StorageError(
                f"{self.url}: {len(data)} bytes came instead of {stop - start} (from byte "
                f"{start}); does something else write the archive? Try again when it is done"
            )
        return data

    def _damaged(self, position: int, what: str) -> DataError:
        return DataError(
            f"{self._where(position)}: {what}; the archive is damaged or no tar: download it again"
        )

    def _where(self, position: int) -> str:
        inside = f" (the archive inside it from byte {self._start})" if self._start else ""
        return f"{self.url}, byte {position}{inside}"


def _remote_size(url: str) -> int:
    num_bytes = file_size(url)
    if num_bytes is None:
        raise StorageError(
            f"{url}: its server does not say how large it is, so its end cannot be checked; copy "
            "the archive to a disk or an object store"
        )
    return num_bytes


def compressed_message(url: str) -> str:
    """Why a compressed archive is refused, and what to do."""
    name = url.rsplit("/", 1)[-1]
    return (
        f"{url}: a compressed archive can be read only from its beginning, not image by image; "
        f"unpack it (`mkdir FOLDER && tar xf {name} -C FOLDER`) and name the folder"
    )


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX archives have a prefix; GNU's keep times in its place.
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _octal(field: bytes) -> int:
    """A number of a header: octal digits, or 256 to a digit where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError
    return int(digits, 8)
