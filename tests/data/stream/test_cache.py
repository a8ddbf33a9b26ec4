"""The cache of whole shards: bounded, shared, and never believed without a look."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from coloured_world import VOCABULARY, make_index
from faulty_server import FaultyServer, serve

from pipeline.data.shards.index import Index, load_index
from pipeline.data.storage import transient
from pipeline.data.stream import cache as cache_module
from pipeline.data.stream.cache import ShardCache
from pipeline.data.stream.fetch import CachedShards
from pipeline.errors import StorageError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    make_index(tmp_path / "served", "train", VOCABULARY, [[3], [5], [8]] * 4)
    with serve(tmp_path / "served") as server:
        yield server


@pytest.fixture
def index(server: FaultyServer) -> Index:
    return load_index(f"{server.url}/train")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30)


def fetched(server: FaultyServer) -> list[str]:
    """Names of the shards that were asked for, as often as they were."""
    tars = [request.split()[1] for request in server.requests if ".tar" in request]
    return [Path(tar).name for tar in tars if not tar.startswith("HEAD")]


def local(server: FaultyServer) -> Index:
    return load_index(str(server.folder / "train"))


def test_shards_are_fetched_once_for_all_readers(
    server: FaultyServer, index: Index, cache: ShardCache
) -> None:
    whole = local(server)
    for _ in range(2):
        reader = CachedShards(index, cache)
        for i in range(12):
            found, expected = reader.sample(i), whole.read(i)
            assert (found.key, found.image) == (expected.key, expected.image)
    assert sorted(fetched(server)) == [shard.file for shard in index.shards]


def _open_and_close(folder: Path, url: str) -> None:
    os.close(ShardCache(folder, 1 << 30).open(load_index(url), 0))


def test_processes_that_want_the_same_shard_fetch_it_once(
    server: FaultyServer, index: Index, cache: ShardCache
) -> None:
    context = multiprocessing.get_context("forkserver")
    wanted = cache.folder, index.url
    processes = [context.Process(target=_open_and_close, args=wanted) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert fetched(server) == ["000000.tar"]


def test_the_cache_stays_within_its_bytes_and_the_oldest_go_first(
    server: FaultyServer, index: Index, tmp_path: Path
) -> None:
    sizes = [shard.num_bytes for shard in index.shards]
    cache = ShardCache(tmp_path / "cache", sum(sizes[:3]))
    held = cache.open(index, 0)
    for position in (1, 2, 0, 3):
        os.close(cache.open(index, position))
        time.sleep(0.01)
    names = {path.stem for path in cache.folder.glob("*.tar")}
    # Shard 1 was opened least recently; 0 was opened again.
    assert names == {index.shards[position].sha256 for position in (0, 2, 3)}
    os.close(cache.open(index, 1))
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.max_bytes
    assert os.pread(held, 4, 0)
    os.close(held)


def bytes_in(folder: Path) -> int:
    """Of its shards, whole or not; one that gets its name meanwhile is one file."""
    sizes = {}
    for path in folder.glob("*.tar*"):
        with suppress(FileNotFoundError):
            found = path.stat()
            sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def test_fetches_side_by_side_stay_within_the_bytes_too(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(shard.num_bytes for shard in index.shards)
    small = ShardCache(tmp_path / "cache", int(2.5 * largest))
    held, download = [], cache_module._download

    def slow_download(url: str, num_bytes: int, path: Path) -> str:
        time.sleep(0.05)
        digest = download(url, num_bytes, path)
        held.append(bytes_in(path.parent))
        return digest

    monkeypatch.setattr(cache_module, "_download", slow_download)
    positions = range(len(index.shards))
    with ThreadPoolExecutor(len(positions)) as pool:
        list(pool.map(lambda position: small.fetch_ahead(index, position), positions))
    assert len(held) == len(positions) > 2
    assert max(held) <= small.max_bytes


def test_a_cache_smaller_than_a_shard_says_which_key_is_wrong(index: Index, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"000000\.tar .*data\.reading\.cache_gigabytes"):
        ShardCache(tmp_path / "cache", 100).open(index, 0)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_copy_that_was_damaged_is_fetched_again(
    server: FaultyServer, index: Index, cache: ShardCache, damage: str
) -> None:
    os.close(cache.open(index, 1))
    path = cache.folder / f"{index.shards[1].sha256}.tar"
    data = bytearray(path.read_bytes())
    _, start, _ = index.span(4)
    data[start + 30] ^= 255
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:700]), "empty": b""}[damage])
    assert CachedShards(index, cache).sample(4).image == local(server).read(4).image
    assert fetched(server) == ["000003.tar"] * 2


def test_a_shard_that_is_not_what_the_index_says_is_an_error_that_names_it(
    server: FaultyServer, index: Index, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A body that is too short may have been cut on its way, so it is asked for again.
    monkeypatch.setattr(transient, "PATIENCE_S", 1.0)
    path = server.folder / "train" / "000000.tar"
    other = bytearray(path.read_bytes())
    other[2000] ^= 1
    path.write_bytes(other)
    with pytest.raises(StorageError, match=r"000000\.tar has another sha256"):
        CachedShards(index, cache).sample(0)
    (server.folder / "train" / "000003.tar").unlink()
    with pytest.raises(StorageError, match=r"000003\.tar is missing"):
        CachedShards(index, cache).sample(3)
    (server.folder / "train" / "000006.tar").write_bytes(b"short")
    with pytest.raises(StorageError, match=r"000006\.tar"):
        CachedShards(index, cache).sample(6)
    assert not [path for path in cache.folder.iterdir() if path.suffix != ".lock"]


def test_a_killed_fetch_leaves_neither_a_lock_nor_a_part(
    server: FaultyServer, index: Index, cache: ShardCache
) -> None:
    server.forever = "hold"
    context = multiprocessing.get_context("forkserver")
    # Its index is read before the server stops answering.
    process = context.Process(target=_fetch_held, args=(cache.folder, index))
    process.start()
    part = cache.folder / f"{index.shards[0].sha256}.tar.part"
    deadline = time.monotonic() + 60
    while not part.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    assert part.exists()
    server.forever = None
    # Whatever shard is fetched next, what the killed one has left goes.
    os.close(cache.open(index, 1))
    assert not part.exists()
    assert CachedShards(index, cache).sample(0).image == local(server).read(0).image


def _fetch_held(folder: Path, index: Index) -> None:
    os.close(ShardCache(folder, 1 << 30).open(index, 0))


def test_a_full_disk_is_a_plain_error(
    index: Index, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot grow \(No space left.*data\.reading\.cache"):
        cache.open(index, 0)
    assert not list(cache.folder.glob("*.tar*part")) and not list(cache.folder.glob("*.tar"))


def test_a_folder_that_cannot_be_made_is_a_plain_error(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be used .*data\.reading\.cache"):
        ShardCache(tmp_path / "file" / "cache", 1 << 30).open(index, 0)
