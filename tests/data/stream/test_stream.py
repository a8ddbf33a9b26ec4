"""From shards to batches: the same bytes for every world size and worker count."""

import threading
from pathlib import Path

import pytest
import torch
from coloured_world import (
    VOCABULARY,
    a_source,
    a_stream,
    fingerprints,
    joined,
    make_index,
    some_data,
)

from pipeline.data.shards.index import Index
from pipeline.errors import StorageError


@pytest.mark.parametrize("mode", ["alternate", "mixed"])
def test_same_bytes_for_every_world_size_and_start(indexes: dict[str, Index], mode: str) -> None:
    data = some_data(extra_mode=mode)
    reference = fingerprints(list(a_stream(indexes, data).iterate(0, 8)))
    assert len(reference) == 8 * 6
    assert len({content for _, _, content in reference}) == len(reference)
    for world_size in (2, 3, 4, 7):
        ranks = [
            list(a_stream(indexes, data, rank, world_size).iterate(3, 8))
            for rank in range(world_size)
        ]
        shapes = {tuple(len(b.targets) for s in steps for b in s.micro_batches) for steps in ranks}
        assert len(shapes) == 1
        together = joined(fingerprints(steps) for steps in ranks)
        assert sorted(together) == sorted(entry for entry in reference if entry[0] >= 3)
        by_step = [joined(fingerprints([steps[k]]) for steps in ranks) for k in range(5)]
        assert joined(by_step) == [entry for entry in reference if entry[0] >= 3]


def test_same_bytes_from_worker_processes_and_errors_arrive_as_they_are(
    indexes: dict[str, Index], tmp_path: Path
) -> None:
    reference = fingerprints(list(a_stream(indexes, some_data()).iterate(2, 8)))
    stream = a_stream(indexes, some_data(workers=2))
    assert fingerprints(list(stream.iterate(2, 8))) == reference
    broken = make_index(tmp_path, "train", VOCABULARY, [[3]] * 3)
    Path(broken.shard_url(0)).write_bytes(b"")
    stream = a_stream({**indexes, "train": broken}, some_data(workers=1, extra=[]))
    with pytest.raises(StorageError, match=r"^(?!Caught).*000000\.tar"):
        next(stream.iterate(0, 1))


def test_padding_weighs_nothing_and_repeats_a_sample(indexes: dict[str, Index]) -> None:
    data = some_data(extra=[])
    last = list(a_stream(indexes, data, rank=0, world_size=4, batch_size=5).iterate(0, 3))
    for step in last:
        targets = [target for batch in step.micro_batches for target in batch.targets]
        assert len(targets) == 2
        real, padding = targets
        assert (real.class_weight, real.box_weight, real.semantic_weight) == (1, 1, 1)
        assert (padding.class_weight, padding.box_weight, padding.semantic_weight) == (0, 0, 0)
        assert torch.equal(real.boxes, padding.boxes)
        assert step.sources == {"train": 5}


def test_sources_and_streams_of_steps(indexes: dict[str, Index]) -> None:
    extra = [a_source("extra"), a_source("plain", use_labels=False, weight=0.5)]
    steps = list(a_stream(indexes, some_data(extra=extra, extra_ratio=2.0)).iterate(0, 6))
    assert [step.stream for step in steps] == ["train", "extra", "extra"] * 2
    assert steps[1].sources == {"extra": 4, "plain": 2}
    for step in steps:
        names = [name for batch in step.micro_batches for name in batch.source]
        assert {name: names.count(name) for name in step.sources} == step.sources
    mixed = list(a_stream(indexes, some_data(extra_mode="mixed")).iterate(0, 4))
    assert all(step.sources == {"train": 3, "extra": 3} for step in mixed)


def test_leaving_the_stream_early_ends_its_thread(indexes: dict[str, Index]) -> None:
    stream = a_stream(indexes, some_data())
    steps = stream.iterate(0, 100)
    next(steps)
    assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())
    assert list(stream.iterate(5, 5)) == []
