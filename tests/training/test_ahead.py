"""Asking ahead: the same steps, a bounded number held, and errors when they are due."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.stream.batches import StepBatches
from pipeline.errors import DataError
from pipeline.training.ahead import asked_ahead


class Asked:
    temperature = 1.0

    def __init__(self, batches_ahead: int) -> None:
        self.batches_ahead = batches_ahead
        self.asked: list[str] = []

    def ask(self, batch: Batch) -> None:
        self.asked.extend(batch.sample_ids)

    def labels(self, batch: Batch) -> list[Tensor]:
        raise AssertionError("nobody takes any here")


def stream(number: int, read: list[int], broken: int | None = None) -> Iterator[StepBatches]:
    images = torch.zeros((1, 3, 4, 4), dtype=torch.uint8)
    mask = torch.zeros((1, 4, 4), dtype=torch.bool)
    for step in range(number):
        if step == broken:
            raise DataError(f"step {step} is broken")
        read.append(step)
        parts = [Batch(images, mask, [], ["a"], [f"{step}.{part}"]) for part in range(2)]
        yield StepBatches(step, parts, "train", {})


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_the_same_steps_with_so_many_asked_for(ahead: int) -> None:
    read: list[int] = []
    source = Asked(ahead)
    for expected, batches in enumerate(asked_ahead(stream(6, read), source)):
        assert batches.step == expected
        assert len(read) == min(expected + 1 + ahead, 6), "no more are held"
        assert source.asked == [f"{step}.{part}" for step in read for part in range(2)]
    assert expected == 5


@pytest.mark.parametrize("source", [None, Asked(0)])
def test_nothing_is_held_where_nobody_works_ahead(source: Asked | None) -> None:
    read: list[int] = []
    for batches in asked_ahead(stream(3, read), source):
        assert read[-1] == batches.step
    assert read == [0, 1, 2]


def test_steps_before_an_error_come_first() -> None:
    steps = asked_ahead(stream(6, [], broken=3), Asked(2))
    assert [next(steps).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="step 3 is broken"):
        next(steps)


def test_the_stream_is_closed_with_it() -> None:
    closed = []

    def steps() -> Iterator[StepBatches]:
        try:
            yield from stream(9, [])
        finally:
            closed.append(True)

    ahead = asked_ahead(steps(), Asked(2))
    next(ahead)
    ahead.close()
    assert closed == [True]
