"""Samples out of shards, here and elsewhere: the same bytes, and requests side by side."""

import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from coloured_world import VOCABULARY, a_stream, fingerprints, make_index, some_data
from faulty_server import FaultyServer, serve

from pipeline.data.shards.index import Index, load_index
from pipeline.data.stream import fetch as fetch_module
from pipeline.data.stream.fetch import (
    CachedShards,
    LocalShards,
    OpenShards,
    RangeReads,
    open_source,
)
from pipeline.data.stream.web_ranges import WebRanges
from pipeline.errors import StorageError
from pipeline.recipe import ShardReading


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    folder = tmp_path_factory.mktemp("served")
    make_index(folder, "train", VOCABULARY, [[3], [5, 8], [8]] * 6)
    make_index(folder, "extra", VOCABULARY, [[3], [5], [8]] * 3)
    with serve(folder) as server:
        yield server


def local(server: FaultyServer, name: str = "train") -> Index:
    return load_index(str(server.folder / name))


def remote(server: FaultyServer, name: str = "train") -> Index:
    return load_index(f"{server.url}/{name}")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_where_shards_are_decides_how_they_are_read(server: FaultyServer) -> None:
    assert isinstance(open_source(local(server), ShardReading(how="shards")), LocalShards)
    assert isinstance(open_source(remote(server), ShardReading()), RangeReads)
    assert isinstance(open_source(remote(server), ShardReading(how="shards")), CachedShards)


def test_local_shards_give_what_the_index_gives(server: FaultyServer) -> None:
    index = local(server)
    shards = LocalShards(index)
    for i in reversed(range(18)):
        found, expected = shards.sample(i), index.read(i)
        assert (found.key, found.image) == (expected.key, expected.image)
        assert found.boxes.tolist() == expected.boxes.tolist()
    # What is open does not travel.
    again = pickle.loads(pickle.dumps(shards))
    assert again.sample(3).key == shards.sample(3).key


def test_no_more_files_stay_open_than_the_limit(server: FaultyServer) -> None:
    before = open_files()
    files = OpenShards(
        lambda k: os.open(server.folder / "train" / f"{3 * k:06d}.tar", os.O_RDONLY), limit=2
    )
    for k in (0, 1, 2, 3, 2, 3, 4, 0):
        assert len(files.read(k, 0, 512)) == 512
        assert open_files() <= before + 2
    files.close()
    assert open_files() == before


def test_shards_of_a_large_window_are_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make_index(tmp_path, "train", VOCABULARY, [[3]] * 3 * 80)
    opened: list[str] = []
    plain = os.open

    def noted(path: str, flags: int) -> int:
        opened.append(path)
        return plain(path, flags)

    monkeypatch.setattr(fetch_module.os, "open", noted)
    for window, expected in ((80, 80), (16, 160)):
        opened.clear()
        shards = open_source(index, ShardReading(), window)
        for i in (*range(0, 240, 3), *range(1, 240, 3)):
            shards.sample(i)
        shards.close()
        assert len([path for path in opened if path.endswith(".tar")]) == expected
    monkeypatch.setattr(fetch_module.resource, "getrlimit", lambda _: (400, 4000))
    assert [fetch_module._open_shards(window) for window in (16, 48, 1000)] == [64, 96, 100]


def test_damaged_local_shards_are_named(tmp_path: Path) -> None:
    index = make_index(tmp_path, "train", VOCABULARY, [[3]] * 9)
    cut, gone, other = (Path(index.shard_url(k)) for k in range(3))
    cut.write_bytes(cut.read_bytes()[:1500])
    gone.unlink()
    data = bytearray(other.read_bytes())
    data[600] ^= 255
    other.write_bytes(data)
    shards = LocalShards(index)
    with pytest.raises(StorageError, match=r"000000\.tar.* cut short"):
        shards.sample(2)
    with pytest.raises(StorageError, match=r"000003\.tar is missing"):
        shards.sample(3)
    with pytest.raises(StorageError, match=r"000006\.tar.* is not what was written"):
        shards.sample(6)


def test_expected_samples_are_asked_for_side_by_side(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, asked, lock = 0, 0, 0, threading.Lock()
    plain = fetch_module.WebRanges.read

    def slow(self: WebRanges, url: str, start: int, stop: int) -> bytes | None:
        nonlocal now, most, asked
        with lock:
            now, asked = now + 1, asked + 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return plain(self, url, start, stop)

    monkeypatch.setattr(fetch_module.WebRanges, "read", slow)
    index = remote(server)
    reads = RangeReads(index, in_flight=6)
    reads.expect(range(12))
    reads.expect(range(6))
    for i in range(12):
        assert reads.sample(i).image == local(server).read(i).image
    assert most == 6 and asked == 12
    # Asked for by nobody: forgotten, and read when wanted all the same.
    reads.expect(range(18))
    for _ in range(10):
        reads.expect(range(18))
    assert reads.sample(17).key == local(server).read(17).key
    reads.close()
    assert reads.sample(0).key == local(server).read(0).key


def test_what_nobody_comes_for_is_forgotten(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = RangeReads(remote(server), in_flight=1)
    reads.expect(range(18))
    assert len(reads._waiting) <= fetch_module.FORGOTTEN_AFTER
    reads.close()


@pytest.mark.parametrize("how", ["ranges", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_from_a_server(
    server: FaultyServer, tmp_path: Path, how: str, workers: int
) -> None:
    names = ("train", "extra")
    here = {name: local(server, name) for name in names}
    there = {name: remote(server, name) for name in names}
    reading = {"how": how, "cache": str(tmp_path / "cache"), "in_flight": 5}
    reference = fingerprints(list(a_stream(here, some_data()).iterate(1, 9)))
    data = some_data(workers=workers, reading=reading)
    assert fingerprints(list(a_stream(there, data).iterate(1, 9))) == reference


def test_transient_faults_are_ridden_out_and_others_reach_the_run(server: FaultyServer) -> None:
    there = {name: remote(server, name) for name in ("train", "extra")}
    reference = fingerprints(list(a_stream(there, some_data()).iterate(0, 2)))
    stream = a_stream(there, some_data(reading={"in_flight": 2}))
    server.faults = [503, "cut", 500]
    assert fingerprints(list(stream.iterate(0, 2))) == reference
    assert not server.faults
    path = server.folder / "train" / "000000.tar"
    moved = path.rename(path.with_suffix(".away"))
    with pytest.raises(StorageError, match=r"000000\.tar is missing"):
        for _ in a_stream(there, some_data(extra=[], workers=1)).iterate(0, 9):
            pass
    moved.rename(path)
