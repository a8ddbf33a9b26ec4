"""What storage does wrong: passing faults are tried again, lasting ones name the URL."""

import builtins
import http.server
import logging
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import FaultyServer, serve
from fsspec.registry import _registry
from raw_data import LVIS, data_of, in_line, write, write_lvis

from pipeline.data.shards.index import load_index
from pipeline.data.shards.preparing import prepare_source, shards_url
from pipeline.data.storage import files, transient
from pipeline.data.storage.files import (
    exists,
    list_directory,
    open_filesystem,
    publish_bytes,
    read_bytes,
    read_range,
)
from pipeline.data.storage.transient import is_passing, persist
from pipeline.errors import RecipeError, StorageError


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(transient, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "web" / "file", bytes(range(256)) * 40)
    with serve(tmp_path / "web") as found:
        yield found


WHOLE = bytes(range(256)) * 40


@pytest.mark.parametrize(
    "faults",
    [[500, 500], [503], [429, 502, 504], ["cut"], ["cut", 500, "cut"], ["short"]],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_passing_faults_are_tried_again(server: FaultyServer, faults: list[int | str]) -> None:
    number = len(faults)
    server.faults = list(faults)
    assert read_range(f"{server.url}/file", 1000, 9000) == WHOLE[1000:9000]
    assert len(server.requests) == number + 1 and not server.faults
    if "short" not in faults:
        server.faults = list(faults)
        assert read_bytes(f"{server.url}/file") == WHOLE


def test_a_fault_that_lasts_names_the_url_and_the_tries(
    server: FaultyServer, waits: list[float]
) -> None:
    server.forever = 503
    url = f"{server.url}/file"
    with pytest.raises(StorageError, match=rf"read {url} \(\d+ tries in 150 s\): status 503"):
        read_bytes(url)
    assert len(server.requests) == len(waits) + 1 > 6
    with pytest.raises(StorageError, match=r"cannot look up .*status 503"):
        exists(url)
    server.forever = "cut"
    with pytest.raises(StorageError, match=rf"cannot read {url} \(\d+ tries"):
        read_bytes(url)


@pytest.mark.parametrize("status", [404, 403, 401, 416])
def test_what_would_fail_again_is_not_tried_again(server: FaultyServer, status: int) -> None:
    server.forever = status
    error = FileNotFoundError if status == 404 else StorageError
    with pytest.raises(error, match="file"):
        read_range(f"{server.url}/file", 0, 10)
    assert len(server.requests) == 1


def _wrapped(cause: BaseException, link: str) -> BaseException:
    """A connection error as packages make one of an error of TLS."""
    if link == "argument":
        return ConnectionError(cause)
    error = ConnectionError("cannot connect")
    setattr(error, f"__{link}__", cause)
    return error


@pytest.mark.parametrize("link", ["argument", "cause", "context"])
def test_a_certificate_that_is_refused_would_be_again(link: str) -> None:
    refused = ssl.SSLCertVerificationError("self-signed certificate")
    for error in (refused, _wrapped(refused, link), _wrapped(_wrapped(refused, link), link)):
        assert not is_passing(error)
    assert is_passing(_wrapped(ssl.SSLEOFError("cut in the handshake"), link))


def test_a_web_server_whose_certificate_is_refused(waits: list[float], tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    pair = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-keyout", str(pair[0]), "-out", str(pair[1])]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair[1], pair[0])
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}/x"
        with pytest.raises(StorageError, match=f"cannot read {url}: .*[Cc]ertificate"):
            read_bytes(url)
        server.shutdown()
    assert not waits


def test_a_missing_file_and_a_server_fault_differ(server: FaultyServer) -> None:
    assert exists(f"{server.url}/file") and not exists(f"{server.url}/nothing")
    server.faults = [500, 500]
    assert exists(f"{server.url}/file")
    server.faults = [500]
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{server.url}/nothing")


def test_waits_grow_and_vary_and_last_for_longer_than_a_minute(
    waits: list[float],
) -> None:
    def refuse() -> bytes:
        raise ConnectionRefusedError("nobody listens")

    for _ in range(2):
        with pytest.raises(StorageError, match=r"tries in 150 s\): nobody listens"):
            persist("read", "http://x/y", refuse)
    number = len(waits) // 2
    for k, wait in enumerate(waits[:6]):
        assert 0.125 * 2**k <= wait <= 0.25 * 2**k
    assert waits[:6] != waits[number : number + 6] and max(waits) <= 15
    assert sum(waits) == pytest.approx(300)


def test_a_store_that_is_gone_for_a_while_is_waited_for(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every answer is an error for a while; a reader says so and goes on."""
    monkeypatch.setattr(transient, "_SAID_AFTER_S", 0.1)
    server.forever = 503
    back = threading.Timer(1.0, lambda: setattr(server, "forever", None))
    back.start()
    with caplog.at_level(logging.WARNING):
        assert read_range(f"{server.url}/file", 0, 100) == WHOLE[:100]
    back.join()
    assert len(server.requests) > 3
    assert caplog.text.count("status 503; trying again for up to ") == 1


def test_a_server_that_never_answers_is_given_up(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr(files, "ANSWER_S", 0.3)
    server.faults = ["hold"]
    assert read_range(f"{server.url}/file", 0, 100) == WHOLE[:100]
    server.forever = "hold"
    monkeypatch.setattr(transient, "PATIENCE_S", 0.002)
    with pytest.raises(StorageError, match=r"\(\d tries in 0 s\): .*[Tt]imeout"):
        read_bytes(f"{server.url}/file")
    assert len(waits) > 1


def test_nobody_there_is_a_storage_error(waits: list[float]) -> None:
    with pytest.raises(StorageError, match=r"cannot read http://127.0.0.1:9/x \(\d+ tries"):
        read_bytes("http://127.0.0.1:9/x")


def prepared_web(folder: Path) -> None:
    write_lvis(folder, num_images=10)
    data = data_of(folder, LVIS, samples_per_shard=4, shards=str(folder / "web"))
    prepare_source(LVIS, data, in_line)


def test_shards_are_read_from_a_web_server(server: FaultyServer, tmp_path: Path) -> None:
    prepared_web(tmp_path)
    local = load_index(str(tmp_path / "web" / "lvis_train"))
    server.faults = [500, 503]
    index = load_index(f"{server.url}/lvis_train")
    server.faults = [500]
    assert index.image_id.tolist() == local.image_id.tolist()
    server.faults = ["cut"]
    assert index.read(5).image == local.read(5).image
    index.verify()
    # Nothing is fetched again: the columns are on this machine.
    before = len(server.requests)
    assert load_index(index.url).width.sum() == 400
    assert [line.split()[1] for line in server.requests[before:]] == ["/lvis_train/index.json"]
    # `prepare` finds them, and cannot write any.
    data = data_of(tmp_path, LVIS, shards=server.url)
    assert prepare_source(LVIS, data, in_line).digest == local.digest
    assert shards_url(data, LVIS) == index.url
    (tmp_path / "web" / "lvis_train" / "index.json").unlink()
    with pytest.raises(StorageError, match="run `longtail prepare` first"):
        prepare_source(LVIS, data, in_line)
    with pytest.raises(RecipeError, match="a web server takes no files"):
        publish_bytes(f"{server.url}/x", b"x")


def test_a_login_page_in_place_of_a_shard_is_refused(
    server: FaultyServer, tmp_path: Path, waits: list[float]
) -> None:
    prepared_web(tmp_path)
    index = load_index(f"{server.url}/lvis_train")
    assert index.width.sum() == 400
    server.faults = ["html"]
    with pytest.raises(StorageError, match=r"0000\d\d\.tar: sample 5 .* was replaced"):
        index.read(5)
    server.forever = "html"
    with pytest.raises(StorageError, match=r"000000\.tar .*10400 bytes came instead of 20480"):
        index.verify()
    with pytest.raises(StorageError, match=r"index\.json is damaged"):
        load_index(index.url)
    copies = tmp_path / "cache" / "longtail" / "indexes"
    for copy in copies.iterdir():
        copy.unlink()
    with pytest.raises(StorageError, match=r"index\.bin"):
        server.forever = None
        index = load_index(index.url)
        server.forever = "html"
        index.image_id  # noqa: B018
    assert not [copy for copy in copies.iterdir() if copy.suffix != ".lock"]


def test_a_copy_that_was_damaged_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    prepared_web(tmp_path)
    assert load_index(f"{server.url}/lvis_train").width.sum() == 400
    (copy,) = [path for path in (tmp_path / "cache/longtail/indexes").iterdir() if not path.suffix]
    for damage in (copy.read_bytes()[:-9], b"\1" + copy.read_bytes()[1:]):
        copy.write_bytes(damage)
        assert load_index(f"{server.url}/lvis_train").width.sum() == 400


@pytest.mark.parametrize(
    ("url", "module", "command"),
    [
        ("s3://bucket/x", "s3fs", r"pip install 'longtail\[s3\]'"),
        ("gs://bucket/x", "gcsfs", r"pip install 'longtail\[gs\]'"),
        ("hf://datasets/a/b", "huggingface_hub", "pip install 'huggingface_hub'"),
    ],
)
def test_a_scheme_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, command: str
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: object, **options: object) -> object:
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {module!r}")
        return real(name, *arguments, **options)

    protocol = url.partition(":")[0]
    monkeypatch.delitem(_registry, protocol, raising=False)
    for name in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RecipeError, match=command):
        open_filesystem(url)


def test_listing_a_web_server(server: FaultyServer, waits: list[float]) -> None:
    assert list_directory(f"{server.url}/nowhere/") == ({}, [])
    server.faults = [503]
    assert list_directory(f"{server.url}/nowhere/") == ({}, [])
    server.forever = 500
    with pytest.raises(StorageError, match="cannot list"):
        list_directory(f"{server.url}/nowhere/")
