"""Ranges by plain HTTP: as many bytes, fewer ways to ask, and no credential that gets out."""

import logging
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from coloured_world import VOCABULARY, a_stream, fingerprints, make_index, some_data
from passing_server import PassingServer, use_store

from pipeline.data.shards.index import load_index
from pipeline.data.storage.files import publish_bytes
from pipeline.data.stream import web_ranges
from pipeline.data.stream.fetch import RangeReads
from pipeline.data.stream.web_ranges import (
    MAX_REFUSALS,
    RENEWED_BEFORE_S,
    VALID_S,
    WebRanges,
)
from pipeline.errors import StorageError

s3fs = pytest.importorskip("s3fs", reason="longtail[s3] is not installed")

URL = "s3://signed/a folder/file+1.bin"
DATA = bytes(range(256)) * 8
NO_SECRETS = ("Signature", "testing")
"""What is in every signed URL: its signature, and the key's name."""


class Gate(PassingServer):
    """Passes requests on, but for signed ones where it is told what to say to them."""

    def __init__(self, port: int) -> None:
        self.signed = self.plain = 0
        self.refuse: list[int | str] = []
        self.always: int | str | None = None
        self.closed: int | None = None
        """A status for every request, signed or not."""
        super().__init__(port)

    def fault(self, path: str) -> int | str | None:
        if "Signature=" not in path:
            self.plain += 1
            return self.closed
        self.signed += 1
        return self.closed or (self.refuse.pop(0) if self.refuse else self.always)


@pytest.fixture
def gate(moto_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(moto_port)
    use_store(monkeypatch, found.url, tmp_path / "cache")
    s3fs.S3FileSystem.clear_instance_cache()
    if not fsspec.filesystem("s3").exists("signed"):
        fsspec.filesystem("s3").mkdir("signed")
    publish_bytes(URL, DATA)
    found.signed = found.plain = 0
    yield found
    s3fs.S3FileSystem.clear_instance_cache()
    found.close()


@pytest.fixture
def signings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was signed."""
    asked: list[str] = []
    sign = s3fs.S3FileSystem.sign

    def noted(self, path: str, **given: object) -> str:  # type: ignore[no-untyped-def]
        asked.append(path)
        return str(sign(self, path, **given))

    monkeypatch.setattr(s3fs.S3FileSystem, "sign", noted)
    return asked


def test_a_url_is_signed_once_for_many_ranges(gate: Gate, signings: list[str]) -> None:
    reads = WebRanges(4)
    for start in range(0, 2000, 100):
        assert reads.read(URL, start, start + 37) == DATA[start : start + 37]
    assert (gate.signed, gate.plain) == (20, 0)
    assert signings == ["signed/a folder/file+1.bin"]


def test_a_url_is_signed_anew_before_it_ends(
    gate: Gate, signings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e6
    monkeypatch.setattr(web_ranges.time, "monotonic", lambda: now)
    reads = WebRanges(4)
    assert reads.read(URL, 0, 9) == DATA[:9]
    now += VALID_S - RENEWED_BEFORE_S - 1
    assert reads.read(URL, 9, 18) == DATA[9:18] and len(signings) == 1
    now += 2
    assert reads.read(URL, 0, 9) == DATA[:9] and len(signings) == 2


def test_a_refused_url_is_signed_anew(gate: Gate, signings: list[str]) -> None:
    reads = WebRanges(4)
    for _ in range(2 * MAX_REFUSALS):
        gate.refuse = [403]
        assert reads.read(URL, 5, 50) == DATA[5:50]
    assert len(signings) == 2 * MAX_REFUSALS + 1 and gate.plain == 0


@pytest.mark.parametrize("fault", [403, 400, 501, "whole"])
def test_a_store_that_takes_no_signed_url_is_asked_by_its_own_client(
    gate: Gate, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    gate.always = fault
    reads = WebRanges(4)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert all(reads.read(URL, 5, 50) is None for _ in range(9))
    assert gate.signed in (MAX_REFUSALS, MAX_REFUSALS + 1)
    assert caplog.text.count(f"plain HTTP does not serve {URL}") == 1


@pytest.mark.parametrize("fault", [500, 503, "short"])
def test_faults_that_pass_do_not_end_signing(gate: Gate, fault: int | str) -> None:
    reads = WebRanges(4)
    gate.refuse = [fault] * 2 * MAX_REFUSALS
    assert all(reads.read(URL, 5, 50) is None for _ in range(2 * MAX_REFUSALS))
    assert reads.read(URL, 5, 50) == DATA[5:50]


def test_where_nothing_can_be_signed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert WebRanges(4).read("memory://x", 0, 1) is None

    def unable(self: object, path: str, **given: object) -> str:
        raise NotImplementedError("Sign is not implemented for this filesystem")

    monkeypatch.setattr(s3fs.S3FileSystem, "sign", unable)
    reads = WebRanges(4)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert reads.read(URL, 0, 1) is None and reads.read(URL, 0, 1) is None
    assert gate.signed == 0 and caplog.text.count("NotImplementedError") == 1


def test_a_web_server_is_asked_without_a_signature(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("s3").chmod(URL, acl="public-read")
    gate.plain = 0
    url = f"{gate.url}/signed/a%20folder/file+1.bin"
    reads = WebRanges(4)
    assert [reads.read(url, start, start + 9) for start in range(5)] == [
        DATA[start : start + 9] for start in range(5)
    ]
    assert (gate.signed, gate.plain) == (0, 5)
    assert all(reads.read(f"{gate.url}/signed/missing", 0, 9) is None for _ in range(9))
    assert gate.plain == 5 + MAX_REFUSALS
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Token": "mine"}})
    assert WebRanges(4).read(url, 0, 9) is None


def test_the_stream_is_the_same_from_s3(gate: Gate, tmp_path: Path) -> None:
    folders = {name: [[3], [5, 8], [8]] * 3 for name in ("train", "extra")}
    here = {n: make_index(tmp_path, n, VOCABULARY, objects) for n, objects in folders.items()}
    for path in tmp_path.glob("*/*"):
        if path.parent.name in folders:
            publish_bytes(f"s3://signed/{path.relative_to(tmp_path)}", path.read_bytes())
    there = {name: load_index(f"s3://signed/{name}") for name in folders}
    for index in there.values():
        assert index.width.min() > 0  # Fetched now, so that what follows are samples.
    reference = fingerprints(list(a_stream(here, some_data()).iterate(0, 6)))
    gate.signed = gate.plain = 0
    assert fingerprints(list(a_stream(there, some_data()).iterate(0, 6))) == reference
    # A connection that breaks is not refused: the store's own client asks then, once.
    assert gate.signed >= 6 * 6 and gate.plain < gate.signed / 4
    found = list(a_stream(there, some_data(workers=1)).iterate(0, 6))
    assert fingerprints(found) == reference and gate.plain < gate.signed / 4
    gate.always = 403
    assert fingerprints(list(a_stream(there, some_data()).iterate(0, 6))) == reference
    assert gate.plain >= 6 * 6


def test_no_credential_gets_out(
    gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture, waits: list[float]
) -> None:
    make_index(tmp_path, "train", VOCABULARY, [[3]] * 4)
    for path in (tmp_path / "train").iterdir():
        publish_bytes(f"s3://signed/secret/{path.name}", path.read_bytes())
    index = load_index("s3://signed/secret")
    reads = RangeReads(index, in_flight=1)
    caplog.set_level(logging.WARNING, "werkzeug")  # The server's own.
    # Botocore itself writes down what it signs, where somebody sets its logger to DEBUG.
    for name in ("pipeline", "urllib3", "fsspec", "aiohttp", "asyncio", "s3fs"):
        caplog.set_level(logging.DEBUG, name)
    assert reads.sample(0).key == "000000"
    kept = pickle.dumps(reads)
    for status in (403, 404, 500):
        gate.closed = status
        with pytest.raises(StorageError, match=r"s3://signed/secret/000000\.tar") as caught:
            reads.sample(1)
        text = "".join(traceback.format_exception(caught.value))
        assert not any(secret in text for secret in NO_SECRETS), text
    gate.closed = None
    assert "000000.tar?..." in caplog.text
    for secret in NO_SECRETS:
        assert secret not in caplog.text and secret.encode() not in kept
    assert pickle.loads(kept).sample(3).key == "000003"
