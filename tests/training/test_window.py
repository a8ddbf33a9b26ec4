"""What a metrics line says of padding and of boxes left out, over all ranks."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from toy_student import run_ranks

from pipeline.data.batch import Targets, collate
from pipeline.data.stream.batches import StepBatches
from pipeline.data.stream.reader import CROWDED, VANISHED
from pipeline.recipe import Training
from pipeline.training.window import Window


def a_step(sizes: list[tuple[int, int]], dropped: dict[str, int]) -> StepBatches:
    images = [torch.zeros((3, *size), dtype=torch.uint8) for size in sizes]
    targets = [
        Targets(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), 1, size, size)
        for size in sizes
    ]
    batch = collate(images, targets, ["a"] * len(sizes), ["a/1"] * len(sizes), 8)
    return StepBatches(0, [batch], "train", {"a": len(sizes)}, Counter(dropped))


def values_of_two_steps() -> dict[str, object]:
    window, section = Window(), Training(steps=9, batch_size=4)
    first = dist.get_rank() == 0
    loss = {"loss/class": torch.tensor(0.5)}
    window.add(a_step([(8, 8), (4, 8)], {CROWDED: 3}), loss, 1.0)
    window.add(a_step([(8, 16)] if first else [(4, 4)], {VANISHED: 2 - first}), loss, 1.0)
    values = window.values(section, 0.1, torch.device("cpu"))
    window.add(a_step([(8, 8)], {}), loss, 1.0)
    following = window.values(section, 0.1, torch.device("cpu"))
    return {"values": values, "following": following}


def test_padding_and_dropped_boxes_are_those_of_all_ranks() -> None:
    for result in run_ranks(values_of_two_steps, 2):
        values = result["values"]
        # Two ranks: 32 of 128 pixels each, then 0 of 128 and 48 of 64.
        assert values["padding"] == pytest.approx((2 * 32 + 48) / (2 * 128 + 128 + 64))
        assert values["dropped"] == {VANISHED: 3, CROWDED: 6}
        assert values["loss/class"] == pytest.approx(2 * 2 * 0.5 / 2)
        assert result["following"]["padding"] == 0 and result["following"]["dropped"] == {}
