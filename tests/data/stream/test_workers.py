"""Reader processes: killed ones lose nothing, and shared memory is never written while in use."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from coloured_world import a_stream, fingerprints, some_data
from torch import Tensor

from pipeline.data.batch import Batch, Targets, collate
from pipeline.data.shards.index import Index
from pipeline.data.stream.reader import Reading
from pipeline.data.stream.workers import MAX_RESTARTS, Ahead, read_ahead
from pipeline.errors import DataError, LongtailError


class Numbers:
    """Images filled with the number of their job; some jobs kill the process that reads them."""

    def __init__(self, deadly: Path | None = None, always: bool = False) -> None:
        self.deadly = deadly
        self.always = always

    def read(self, job: int, memory: Tensor | None = None) -> Reading:
        if self.deadly is not None and job == 5 and (self.always or not self.deadly.exists()):
            self.deadly.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 1_000:
            return Reading(error=DataError("the thousandth"))
        boxes = torch.full((job % 3, 4), 0.5)
        targets = Targets(boxes, torch.zeros(job % 3, dtype=torch.int64), job, (40, 60), (40, 60))
        image = torch.full((3, 40, 60 + job % 5), job % 256, dtype=torch.uint8)
        return Reading(batch=collate([image], [targets], ["s"], [f"s/{job}"], memory=memory))

    def expect(self, job: int) -> None:
        pass

    def close(self) -> None:
        pass


def batch_of(reading: Reading) -> Batch:
    assert reading.batch is not None
    return reading.batch


def check(batch: Batch, job: int) -> None:
    assert batch.sample_ids == [f"s/{job}"] and len(batch.targets[0].labels) == job % 3
    width = 60 + job % 5
    assert (batch.images[0, :, :40, :width] == job % 256).all()
    assert (batch.images[0, :, 40:] == 0).all() and (batch.images[0, :, :, width:] == 0).all()
    assert not batch.mask[0, :40, :width].any()
    assert batch.mask[0, 40:].all() and batch.mask[0, :, width:].all()


@pytest.mark.parametrize("num_bytes", [0, 4 * 64 * 64, 1 << 20])
def test_readings_arrive_in_order_whether_or_not_a_slab_holds_them(num_bytes: int) -> None:
    ahead = Ahead(2, num_bytes=num_bytes)
    readings = list(read_ahead(Numbers(), range(40), workers=2, ahead=ahead))
    assert len(readings) == 40
    for job, reading in enumerate(readings):
        check(batch_of(reading), job)


def test_a_slab_is_used_again_and_never_while_somebody_looks_at_it() -> None:
    ahead = Ahead(1, num_bytes=1 << 16)
    places, kept = set(), []
    for job, reading in enumerate(read_ahead(Numbers(), range(120), workers=1, ahead=ahead)):
        batch = batch_of(reading)
        places.add(batch.images.data_ptr())
        if job in (3, 50):
            # A part of the images alone keeps them.
            kept.append((job, batch.images[0, 0]))
        check(batch, job)
        for earlier, part in kept:
            assert (part[:40, :60] == earlier % 256).all()
        del batch, reading
    assert job == 119 and len(places) <= 6


def test_a_killed_reader_process_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deadly = Numbers(tmp_path / "killed")
    with caplog.at_level(logging.WARNING):
        readings = list(read_ahead(deadly, range(20), workers=2, ahead=Ahead(1, num_bytes=1 << 16)))
    assert (tmp_path / "killed").exists()
    for job, reading in enumerate(readings):
        check(batch_of(reading), job)
    assert len(readings) == 20 and "read again by new processes" in caplog.text


@pytest.mark.slow
def test_reader_processes_that_die_each_time_end_the_run(tmp_path: Path) -> None:
    deadly = Numbers(tmp_path / "killed", always=True)
    readings = read_ahead(deadly, range(20), workers=1, ahead=Ahead(1, num_bytes=1 << 16))
    with pytest.raises(LongtailError, match=f"killed {MAX_RESTARTS + 1} times .*data.workers 1"):
        for job, reading in enumerate(readings):
            check(batch_of(reading), job)
    assert job == 4


class Environment(Numbers):
    """Fails with the value of a variable."""

    def read(self, job: int, memory: Tensor | None = None) -> Reading:
        return Reading(error=DataError(os.environ.get("LONGTAIL_TEST", "none")))


def test_a_reader_has_the_environment_of_its_training_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value in ("none", "first", "second", "none"):
        if value == "none":
            monkeypatch.delenv("LONGTAIL_TEST", raising=False)
        else:
            monkeypatch.setenv("LONGTAIL_TEST", value)
        (reading,) = read_ahead(Environment(), range(1), workers=1, ahead=Ahead(1))
        assert str(reading.error) == value


def test_an_error_does_not_cost_a_slab() -> None:
    jobs = [1_000] * 20 + list(range(20))
    readings = list(read_ahead(Numbers(), jobs, workers=1, ahead=Ahead(1, num_bytes=1 << 16)))
    assert all(str(reading.error) == "the thousandth" for reading in readings[:20])
    for job, reading in enumerate(readings[20:]):
        check(batch_of(reading), job)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_random_kills_change_no_batch(indexes: dict[str, Index], seed: int) -> None:
    reference = fingerprints(list(a_stream(indexes, some_data()).iterate(0, 40)))
    steps, found = a_stream(indexes, some_data(workers=2)).iterate(0, 40), []
    rng = torch.Generator().manual_seed(seed)
    kills = set(torch.randint(2, 30, (3,), generator=rng).tolist())
    for step in steps:
        found.append(step)
        readers = multiprocessing.active_children()
        if step.step in kills and readers:
            victim = readers[int(torch.randint(len(readers), (1,), generator=rng))]
            os.kill(victim.pid or 0, signal.SIGKILL)
    assert fingerprints(found) == reference
    assert [step.step for step in found] == list(range(40))
