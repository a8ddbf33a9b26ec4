"""Prepared sources of coloured images, and images that cannot be read."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from coloured_world import VOCABULARY, make_index

from pipeline.data.images import decode_pixels
from pipeline.data.sample import UNLABELLED
from pipeline.data.shards.index import Index
from pipeline.data.storage import transient
from pipeline.data.stream import reader as reader_module
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import DataError


@pytest.fixture(scope="session")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    folder = tmp_path_factory.mktemp("world")
    objects = [[3], [5, 8], [], [3, 5, 8], [8], [5], [3, 3], [], [8, 5], [3], [5]]
    whole = [[UNLABELLED], [UNLABELLED, UNLABELLED], [UNLABELLED], [], [UNLABELLED]]
    return {
        "train": make_index(folder, "train", VOCABULARY, objects),
        "extra": make_index(folder, "extra", VOCABULARY, [[3], [5], [8], [3], [5], [8], [3]]),
        "plain": make_index(folder, "plain", Vocabulary([]), whole),
        "validation": make_index(folder, "validation", VOCABULARY, objects),
    }


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """Encoded images that the decoder refuses, as a decoder of another version might."""
    refused: set[bytes] = set()

    def decode(data: bytes) -> np.ndarray:
        if data in refused:
            raise DataError("damaged")
        return decode_pixels(data)

    monkeypatch.setattr(reader_module, "decode_pixels", decode)
    return refused


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries, on a clock that only they move: tries that take long change nothing."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=found.append, monotonic=lambda: sum(found))
    monkeypatch.setattr(transient, "time", clock)
    return found


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    """The port of moto's S3 on the loopback address."""
    pytest.importorskip("s3fs", reason="longtail[s3] is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()
