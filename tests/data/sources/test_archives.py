"""Tars read in place: equal to tarfile on what is whole, and strict on what is not."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from faulty_server import serve

from pipeline.data.sources.archives import Archive, Member
from pipeline.errors import DataError, StorageError

BLOCK = 512
CONTENT = [("a.jpg", b"x" * 700), ("b/c.txt", b""), ("b/d.json", b"{}"), ("e.jpg", b"y" * 512)]


def packed(
    files: list[tuple[str, bytes]] = CONTENT,
    form: int = tarfile.USTAR_FORMAT,
    more: Callable[[tarfile.TarFile], None] | None = None,
) -> bytes:
    """A tar of these files; `more` may add others at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if more is not None:
            more(archive)
    return buffer.getvalue()


def members_of(path: Path | str, start: int = 0, stop: int | None = None) -> list[Member]:
    with Archive(str(path), start, stop) as archive:
        return list(archive)


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path, "r:") as archive:
        return [Member(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(5))
def test_members_are_those_of_tarfile(tmp_path: Path, form: int, seed: int) -> None:
    draw = random.Random(seed)
    files = []
    for i in range(60):
        # Names beyond 100 characters, and beyond 255 where the format has room for them.
        depth = draw.choice([0, 1, 12] if form == tarfile.USTAR_FORMAT else [0, 1, 12, 40])
        folder = "".join(f"folder_{k}_/" for k in range(depth))
        name = f"{folder}{i}_{draw.choice(['plain', 'züge', '写真', 'a.b'])}.jpg"
        files.append((name, draw.randbytes(draw.choice([0, 1, 511, 512, 513, 9000, 20000]))))
    path = tmp_path / "x.tar"
    path.write_bytes(packed(files, form))
    found = members_of(path)
    assert found == by_tarfile(path)
    whole = path.read_bytes()
    assert [whole[m.offset : m.offset + m.num_bytes] for m in found] == [data for _, data in files]


def test_pax_times_global_headers_and_directories_are_read_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a b = c"}
    ) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("folder/a.jpg")
        info.size, info.mtime, info.pax_headers = 3, 1.5, {"size": "3"}
        archive.addfile(info, io.BytesIO(b"abc"))
    path = tmp_path / "x.tar"
    path.write_bytes(buffer.getvalue())
    assert members_of(path) == by_tarfile(path) and len(by_tarfile(path)) == 1


def test_a_tar_in_a_tar_is_read_where_it_lies(tmp_path: Path) -> None:
    inner = packed()
    path = tmp_path / "outer.tar"
    path.write_bytes(packed([("first.txt", b"1" * 1000), ("n01.tar", inner)]))
    _, member = members_of(path)
    found = members_of(path, member.offset, member.offset + member.num_bytes)
    (tmp_path / "inner.tar").write_bytes(inner)
    expected = by_tarfile(tmp_path / "inner.tar")
    assert [(m.name, m.offset - member.offset, m.num_bytes) for m in found] == [
        (m.name, m.offset, m.num_bytes) for m in expected
    ]
    assert path.read_bytes()[found[3].offset :][:512] == b"y" * 512


def test_cut_at_any_block_an_archive_is_refused_or_whole(tmp_path: Path) -> None:
    long = ("long/" * 60 + "name.jpg", b"z" * 1300)
    whole = packed([*CONTENT, long], tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    expected = members_of(path)
    end = expected[-1].offset + 3 * BLOCK  # The first block of zeros.
    outcomes = []
    for cut in range(0, len(whole), BLOCK):
        path.write_bytes(whole[:cut])
        if cut <= end:
            with pytest.raises(DataError, match=r"cut short|is empty|pax header of") as e:
                members_of(path)
            assert "x.tar" in str(e.value)
            outcomes.append("refused")
        else:
            assert members_of(path) == expected
            outcomes.append("whole")
    assert outcomes.count("refused") == end // BLOCK + 1 and "whole" in outcomes


def test_cut_inside_a_block_an_archive_is_refused(tmp_path: Path) -> None:
    whole = packed()
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    last = members_of(path)[-1]
    for cut in range(1, last.offset + last.num_bytes + BLOCK, 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cut short"):
            members_of(path)


def test_any_flipped_byte_of_a_header_is_refused(tmp_path: Path) -> None:
    whole = packed()
    path = tmp_path / "x.tar"
    for position in range(0, BLOCK, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no tar header"):
            members_of(path)


def special(name: str, kind: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        archive.addfile(info)
        after = tarfile.TarInfo("after.jpg")
        after.size = 2
        archive.addfile(after, io.BytesIO(b"ok"))

    return add


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("l.jpg", tarfile.SYMTYPE, "link in an archive, left out"),
        ("h.jpg", tarfile.LNKTYPE, "link in an archive, left out"),
        ("d.jpg", tarfile.CHRTYPE, "device in an archive, left out"),
        ("b.jpg", tarfile.BLKTYPE, "device in an archive, left out"),
        ("p.jpg", tarfile.FIFOTYPE, "pipe in an archive, left out"),
        ("../../etc/evil.jpg", tarfile.REGTYPE, "path that leads out of its archive, left out"),
        ("a/../../evil.jpg", tarfile.REGTYPE, "path that leads out of its archive, left out"),
        ("/etc/evil.jpg", tarfile.REGTYPE, "path that leads out of its archive, left out"),
    ],
)
def test_what_is_no_plain_file_is_left_out_and_said(
    tmp_path: Path, name: str, kind: bytes, reason: str
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(packed(more=special(name, kind, "/etc/passwd")))
    with Archive(str(path)) as archive:
        names = [member.name for member in archive]
        assert archive.left_out == [(reason, f"{name} in {path}")]
    assert names == [*(name for name, _ in CONTENT), "after.jpg"]


def with_header(header: bytes, change: dict[int, bytes]) -> bytes:
    """A header with fields written over and the sum made right again."""
    altered = bytearray(header)
    for position, value in change.items():
        altered[position : position + len(value)] = value
    altered[148:156] = b" " * 8
    altered[148:156] = b"%06o\0 " % sum(altered)
    return bytes(altered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({124: b"77777777777\0"}, "has 8589934591 bytes by its header, and"),
        ({124: b"\x80" + b"\0" * 3 + b"\x7f" * 8}, "bytes by its header, and"),
        ({124: b"\xff" * 12}, "the size of a member is no number"),
        ({124: b"-0000000001\0"}, "the size of a member is no number"),
        ({124: b"1_0\0"}, "the size of a member is no number"),
        ({124: b"99999999999\0"}, "the size of a member is no number"),
        ({156: b"S"}, "is sparse"),
        ({156: b"M"}, "unknown type b'M'"),
        ({156: b"L", 124: b"00777777777\0"}, "a name or pax header of 134217727 bytes"),
        ({156: b"x"}, "a pax header is damaged"),
    ],
)
def test_headers_that_cannot_be_right_are_refused(
    tmp_path: Path, change: dict[int, bytes], message: str
) -> None:
    whole = packed()
    path = tmp_path / "x.tar"
    path.write_bytes(with_header(whole[:BLOCK], change) + whole[BLOCK:])
    with pytest.raises(DataError, match=message):
        members_of(path)


def test_sizes_and_sums_of_other_writers_are_understood(tmp_path: Path) -> None:
    """Beyond 8 GB the size stands in a pax header alone; old writers summed signed bytes."""
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = 700, {"size": "700"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"x" * 700))
    whole = buffer.getvalue()
    header = with_header(whole[2 * BLOCK : 3 * BLOCK], {124: b"00000000000\0"})
    path = tmp_path / "x.tar"
    path.write_bytes(whole[: 2 * BLOCK] + header + whole[3 * BLOCK :])
    assert members_of(path) == [Member("a.jpg", 3 * BLOCK, 700)] == by_tarfile(path)
    whole = packed([("züge.jpg", b"abc")])
    header = bytearray(whole[:BLOCK])
    signed = int(header[148:154], 8) - 256 * sum(byte > 127 for byte in header)
    header[148:156] = b"%06o\0 " % signed
    assert header != whole[:BLOCK]
    path.write_bytes(header + whole[BLOCK:])
    assert members_of(path) == by_tarfile(path) and len(by_tarfile(path)) == 1


@pytest.mark.parametrize(
    "entry", ["GNU.sparse.major=1", "GNU.sparse.map=0,1", "GNU.sparse.realsize=9"]
)
def test_sparse_members_of_pax_archives_are_refused(tmp_path: Path, entry: str) -> None:
    key, value = entry.split("=")
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {key: value}
    path = tmp_path / "x.tar"
    path.write_bytes(packed(form=tarfile.PAX_FORMAT, more=lambda archive: archive.addfile(info)))
    with pytest.raises(DataError, match=r"'a\.jpg' is sparse"):
        members_of(path)


def test_a_global_header_may_not_rename_members(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}
    ) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    path = tmp_path / "x.tar"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="global pax header sets a path"):
        members_of(path)


def test_a_long_name_without_a_member_is_refused(tmp_path: Path) -> None:
    whole = packed([("n" * 150, b"")], tarfile.GNU_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(whole[: 2 * BLOCK] + bytes(2 * BLOCK))
    with pytest.raises(DataError, match="has no member"):
        members_of(path)


@pytest.mark.parametrize("num_zeros", [BLOCK, 2 * BLOCK, 10 * BLOCK, 1 << 20])
def test_zeros_after_the_end_are_what_tar_fills_up_with(tmp_path: Path, num_zeros: int) -> None:
    path = tmp_path / "x.tar"
    body = packed()
    path.write_bytes(body)
    last = members_of(path)[-1]
    body = body[: last.offset + last.num_bytes]
    path.write_bytes(body + bytes(num_zeros))
    assert len(members_of(path)) == 4
    path.write_bytes(body + bytes(num_zeros) + b"x")
    with pytest.raises(DataError, match="follow the end mark"):
        members_of(path)


def test_a_hole_of_an_unfinished_download_is_refused(tmp_path: Path) -> None:
    files = [(f"{i}.jpg", bytes([i]) * 5000) for i in range(1, 20)]
    whole = bytearray(packed(files))
    whole[6144:16384] = bytes(10240)
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    with pytest.raises(DataError, match="follow the end mark"):
        members_of(path)
    path.write_bytes(packed() + bytes(3 << 20))
    with pytest.raises(DataError, match="a hole of an unfinished download"):
        members_of(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_under_another_name_is_told(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(compress(packed([("a.jpg", random.Random(0).randbytes(5000))])))
    with pytest.raises(DataError, match=r"unpack it \(`mkdir FOLDER && tar xf x\.tar -C FOLDER`"):
        members_of(path)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"<html>Not found</html>" * 100)
    with pytest.raises(DataError, match="no tar header"):
        members_of(path)
    with pytest.raises(FileNotFoundError):
        members_of(tmp_path / "absent.tar")


@pytest.mark.parametrize(
    ("count", "size", "most_requests", "most_bytes"),
    [(3000, 100, 2, 4 << 20), (3, 20 << 20, 5, 17 << 20)],
)
def test_a_remote_archive_takes_few_requests(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int, most_requests: int, most_bytes: int
) -> None:
    filesystem = fsspec.filesystem("memory")
    files = [(f"{i:06d}.jpg", bytes([i % 251]) * size) for i in range(count)]
    filesystem.pipe("/archives/big.tar", packed(files))
    reads: list[int] = []
    whole = type(filesystem).cat_file

    def read(self: object, path: str, start: int, end: int) -> bytes:
        reads.append(end - start)
        return whole(self, path, start=start, end=end)

    monkeypatch.setattr(type(filesystem), "cat_file", read)
    found = members_of("memory://archives/big.tar")
    assert [member.name for member in found] == [name for name, _ in files]
    assert len(reads) <= most_requests and sum(reads) <= most_bytes
    filesystem.rm("/archives", recursive=True)


@pytest.mark.parametrize("faults", [[503, 503], [503, 500, "cut"], [429] * 5])
def test_passing_faults_of_an_archives_server_are_tried_again(
    tmp_path: Path, waits: list[float], faults: list[int | str]
) -> None:
    (tmp_path / "a.tar").write_bytes(packed())
    with serve(tmp_path) as server:
        server.faults = list(faults)
        assert members_of(f"{server.url}/a.tar") == by_tarfile(tmp_path / "a.tar")
        assert waits and not server.faults
        server.forever = 503
        with pytest.raises(
            StorageError, match=r"cannot look up .*a\.tar \(\d+ tries in 150 s\): status 503"
        ):
            members_of(f"{server.url}/a.tar")
        server.forever = None
        with pytest.raises(FileNotFoundError):
            members_of(f"{server.url}/none.tar")
