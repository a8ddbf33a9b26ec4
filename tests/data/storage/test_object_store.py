"""Prepared to and read from S3, served on the loopback address by moto, with faults in between."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from passing_server import PassingServer, use_store
from raw_data import LVIS, data_of, in_line, write_lvis

from pipeline.data.shards.index import load_index
from pipeline.data.shards.preparing import prepare_source
from pipeline.data.storage.files import (
    exists,
    list_directory,
    publish_bytes,
    read_bytes,
    read_range,
)
from pipeline.errors import StorageError

pytest.importorskip("s3fs", reason="longtail[s3] is not installed")


class Proxy(PassingServer):
    """Passes requests on, but for `faults`, taken one by one, and then `forever`."""

    def __init__(self, port: int) -> None:
        self.faults: list[int | str] = []
        self.forever: int | str | None = None
        self.requests = 0
        super().__init__(port)

    def fault(self, path: str) -> int | str | None:
        self.requests += 1
        return self.faults.pop(0) if self.faults else self.forever


@pytest.fixture
def proxy(moto_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    found = Proxy(moto_port)
    use_store(monkeypatch, found.url, tmp_path / "cache")
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    type(s3).clear_instance_cache()
    if not s3.exists("bucket"):
        s3.mkdir("bucket")
    found.requests = 0
    yield found
    type(s3).clear_instance_cache()
    found.close()


def test_prepared_to_s3_as_to_a_disk(proxy: Proxy, tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=10)
    local = prepare_source(LVIS, data_of(tmp_path, LVIS, samples_per_shard=4), in_line)
    data = data_of(tmp_path, LVIS, samples_per_shard=4, shards="s3://bucket/a")
    proxy.faults = [500, 503, 500]
    index = prepare_source(LVIS, data, in_line)
    assert index.url == "s3://bucket/a/lvis_train" and index.digest == local.digest
    assert not proxy.faults
    proxy.faults = [503, "cut", 500]
    index = load_index(index.url)
    assert index.image_id.tolist() == local.image_id.tolist()
    proxy.faults = ["cut"]
    assert [index.read(i).image for i in range(10)] == [local.read(i).image for i in range(10)]
    index.verify()
    assert prepare_source(LVIS, data, in_line).digest == index.digest
    fsspec.filesystem("s3").rm_file("bucket/a/lvis_train/000001.tar")
    with pytest.raises(StorageError, match=r"000001\.tar is missing; run `longtail prepare`"):
        index.read(5)
    asked: list[int] = []

    def once(function, arguments):  # type: ignore[no-untyped-def]
        asked.append(len(arguments))
        return in_line(function, arguments)

    assert prepare_source(LVIS, data, once).digest == index.digest
    assert asked == [1]


def test_prepared_from_s3(proxy: Proxy, tmp_path: Path) -> None:
    write_lvis(tmp_path, num_images=6)
    for path in [*tmp_path.rglob("*.jpg"), tmp_path / "lvis.json"]:
        publish_bytes(f"s3://bucket/raw/{path.relative_to(tmp_path)}", path.read_bytes())
    proxy.faults = [500, 503]
    index = prepare_source(
        LVIS, data_of("s3://bucket/raw", LVIS, shards=str(tmp_path / "out")), in_line
    )
    assert index.digest == prepare_source(LVIS, data_of(tmp_path, LVIS), in_line).digest


def test_lasting_faults_of_s3(proxy: Proxy, waits: list[float]) -> None:
    publish_bytes("s3://bucket/file", bytes(1000))
    proxy.forever, proxy.requests = 503, 0
    with pytest.raises(StorageError, match=r"s3://bucket/file \(\d+ tries in 150 s\)") as caught:
        read_range("s3://bucket/file", 0, 10)
    tries = int(str(caught.value).partition("(")[2].partition(" ")[0])
    assert proxy.requests == tries == len(waits) + 1 > 6, "one place tries again"
    with pytest.raises(StorageError, match=r"cannot look up s3://bucket/file \(\d+ tries"):
        exists("s3://bucket/file")
    proxy.forever, proxy.requests = 403, 0
    with pytest.raises(StorageError, match="s3://bucket/file"):
        read_bytes("s3://bucket/file")
    assert proxy.requests == 1
    proxy.forever = None
    with pytest.raises(FileNotFoundError):
        read_bytes("s3://bucket/none")
    assert not exists("s3://bucket/none") and list_directory("s3://bucket/none") == ({}, [])
    with pytest.raises(StorageError, match="no_such_bucket"):
        publish_bytes("s3://no_such_bucket/x", b"x")
    assert read_range("s3://bucket/file", 0, 10) == bytes(10)
