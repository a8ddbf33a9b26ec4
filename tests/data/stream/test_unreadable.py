"""Images and shards that cannot be read: substitutes, budgets, errors."""

import logging
from pathlib import Path

import numpy as np
import pytest
from coloured_world import VOCABULARY, a_stream, fingerprints, joined, make_index, some_data

from pipeline.data.images import decode_pixels
from pipeline.data.shards.index import Index
from pipeline.data.stream import reader as reader_module
from pipeline.errors import DataError, StorageError


def test_unreadable_image_has_the_same_substitute_on_every_rank(
    indexes: dict[str, Index], unreadable: set[bytes]
) -> None:
    data = some_data()
    good = fingerprints(list(a_stream(indexes, data).iterate(0, 10)))
    unreadable.add(indexes["train"].read(4).image)
    stream = a_stream(indexes, data)
    reference = fingerprints(list(stream.iterate(0, 10)))
    assert stream.ledger.unreadable == {"train/000004": "damaged"}
    changed = [new for new, old in zip(reference, good, strict=True) if new != old]
    assert len(changed) == sum(sample_id == "train/000004" for _, sample_id, _ in good) > 0
    # From the same shard, which holds the samples 3, 4 and 5.
    assert {sample_id for _, sample_id, _ in changed} <= {"train/000003", "train/000005"}
    ranks = [list(a_stream(indexes, data, rank, 2).iterate(0, 10)) for rank in range(2)]
    together = joined(fingerprints(steps) for steps in ranks)
    assert sorted(together) == sorted(reference)


def test_unreadable_images_beyond_the_budget_stop_the_run(
    indexes: dict[str, Index], unreadable: set[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    unreadable.update(indexes["train"].read(i).image for i in (0, 4, 8))
    stream = a_stream(indexes, some_data(bad_sample_budget=3))
    with caplog.at_level(logging.WARNING):
        for _ in stream.iterate(0, 12):
            pass
    assert sorted(stream.ledger.unreadable) == [f"train/00000{i}" for i in (0, 4, 8)]
    assert caplog.text.count("another sample takes its place") == 3
    stream = a_stream(indexes, some_data(bad_sample_budget=2))
    with pytest.raises(DataError, match=r"source train: 3 images .*bad_sample_budget 2"):
        for _ in stream.iterate(0, 12):
            pass


def test_shard_of_nothing_readable_is_given_up(
    indexes: dict[str, Index], unreadable: set[bytes]
) -> None:
    unreadable.update(indexes["train"].read(i).image for i in range(11))
    with pytest.raises(DataError, match=r"source train: .* unreadable images in a row"):
        next(a_stream(indexes, some_data()).iterate(0, 1))


def test_image_of_another_size_than_its_annotation_is_unreadable(
    indexes: dict[str, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = np.zeros((400, 500, 3), dtype=np.uint8)
    wrong = indexes["train"].read(4).image
    monkeypatch.setattr(
        reader_module,
        "decode_pixels",
        lambda data: larger if data == wrong else decode_pixels(data),
    )
    stream = a_stream(indexes, some_data())
    for _ in stream.iterate(0, 10):
        pass
    assert "500x400" in stream.ledger.unreadable["train/000004"]


def test_damaged_shard_is_never_substituted(indexes: dict[str, Index], tmp_path: Path) -> None:
    broken = make_index(tmp_path, "train", VOCABULARY, [[3]] * 6)
    shard = Path(broken.shard_url(1))
    shard.write_bytes(shard.read_bytes()[:700])
    stream = a_stream({**indexes, "train": broken}, some_data(extra=[]))
    with pytest.raises(StorageError, match=r"000003\.tar"):
        for _ in stream.iterate(0, 3):
            pass
