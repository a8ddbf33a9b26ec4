"""Arithmetic of ZeRO's stages, against numbers written out by hand."""

import pytest
from torch import nn

from pipeline.check.ranks import LAYOUTS, Layout, ModelSize, Training, rank_memory

SIZE = ModelSize(parameters=1000, trained=800, buffers=40)
FOUR = Training(workers=4, micro_steps=3, averaged=True, on_gpu=True, activations=10_000)


def test_the_size_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(10, 5), nn.BatchNorm1d(5))
    model[0].requires_grad_(False)
    # 55 of the linear layer, 10 of the norm; its buffers are two floats for each and a long.
    assert ModelSize.of(model) == (65, 10, 2 * 5 * 4 + 8)


@pytest.mark.parametrize(
    ("layout", "parameters", "gradients", "moments", "averages", "copies", "host"),
    [
        # float32 throughout: 4 bytes a parameter and a gradient, 8 of moments.
        (Layout(0), 4040, 3200, 6400, 3200, 3200, 0),
        # A copy of its part of the weights, and two buckets.
        (Layout(1), 4040, 3200, 1600, 800, 800 + 6400, 0),
        (Layout(2), 4040, 800, 1600, 800, 800 + 6400, 0),
        # A bucket twice, and the whole model gathered, for it is small.
        (Layout(3), 1040, 800, 1600, 800, 6400 + 4000, 0),
        # On the host: moments, averages, AdamW's weights and gradients, what goes back to the
        # device, and at stage 2 sums of gradients.
        (Layout(1, "optimizer"), 4040, 3200, 0, 0, 6400, 1600 + 800 + 3 * 800),
        (Layout(2, "optimizer"), 4040, 800, 0, 0, 6400, 1600 + 800 + 4 * 800),
        # Sums of gradients instead of a way back, and no gradient on the device.
        (Layout(3, "optimizer"), 1040, 0, 0, 0, 6400 + 4000, 1600 + 800 + 3 * 800),
        (Layout(3, "all"), 40, 0, 0, 0, 6400 + 4000, 1000 + 1600 + 800 + 3 * 800),
    ],
    ids=str,
)
def test_each_stage_divides_what_it_divides(
    layout: Layout,
    parameters: int,
    gradients: int,
    moments: int,
    averages: int,
    copies: int,
    host: int,
) -> None:
    found = rank_memory(layout, SIZE, FOUR)
    parts = found.parameters, found.gradients, found.moments, found.averages, found.copies
    assert parts == (parameters, gradients, moments, averages, copies)
    # Stage 2 has a micro-step's part of the gradient beside the sum of those before.
    adding = 800 if layout == Layout(2) else 0
    assert found.total == sum(parts) + 10_000 + adding
    assert found.host == host


def test_one_worker_divides_nothing() -> None:
    alone = FOUR._replace(workers=1, averaged=False)
    found = {layout: rank_memory(layout, SIZE, alone) for layout in LAYOUTS}
    assert found[Layout(0)].total == 4040 + 3200 + 6400 + 10_000
    assert {m.received for m in found.values()} == {0}
    for layout in LAYOUTS[1:4]:
        assert found[layout].moments == 6400 and found[layout].averages == 0


def test_what_is_received_in_a_step() -> None:
    received = {str(layout): rank_memory(layout, SIZE, FOUR).received for layout in LAYOUTS}
    # Three quarters of the gradients, then of the sums: an all-reduce. Stage 1 gathers weights.
    assert received["0"] == received["1"] == (3200 + 3200) * 3 // 4
    assert received["2"] == (3 * 3200 + 3200) * 3 // 4
    # In each micro-step the weights, frozen ones too, which stay for the backward pass.
    assert received["3"] == received["3+all"] == (3 * 3200 + 3 * 4000) * 3 // 4


def test_a_large_model_is_gathered_twice_and_never_whole() -> None:
    large = ModelSize(2_000_000_000, 2_000_000_000, 0)
    found = rank_memory(Layout(3), large, FOUR._replace(micro_steps=1, averaged=False))
    assert found.copies == 4 * (2 * 50_000_000 + 550_000_000)
    assert found.received == 4 * (2_000_000_000 + 2_000_000_000 + 1_500_000_000) * 3 // 4


def test_the_largest_of_what_passes_counts() -> None:
    few = FOUR._replace(activations=100)
    assert rank_memory(Layout(0), SIZE, few).working == 3200  # roots of the second moments
    assert rank_memory(Layout(1), SIZE, few).working == 1600  # and a flat gradient, of a quarter
    assert rank_memory(Layout(3, "all"), SIZE, few).working == 100
    taught = few._replace(teacher=70, teacher_peak=9000)
    found = rank_memory(Layout(2), SIZE, taught)
    assert found.teacher == 70 and found.working == 9000
