"""Gradients of a forward pass in bfloat16: summed over ranks and micro-batches in float32, and a
parameter that took no part in a step has none of the step before."""

import pytest
import torch
import torch.distributed as dist
from test_engine import section
from torch import Tensor, nn
from toy_student import LAYOUTS, run_ranks

from pipeline.training.engine import Engine, init_process_group

BETA = 0.9
"""AdamW's first moment after one step is 1 - BETA of the gradient."""


class Pair(nn.Module):
    """Two weights; the second takes part in the loss where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 1, bias=False)
        self.second = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor, both: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            losses = {"loss/first": self.first(x)}
            if both:
                losses["loss/second"] = self.second(x)
        return {name: loss.float().sum() for name, loss in losses.items()}


def run_step(engine: Engine, step: int, addends: list[list[float]], both: list[bool]) -> float:
    """One step whose gradient is, for each number of a weight, the sum of all addends; for the
    second, of those of the micro-batches that it takes part in."""
    for addend, takes_part in zip(addends[dist.get_rank()], both, strict=True):
        engine.backward(engine.forward(torch.full((1, 3), addend), takes_part))
    return engine.step(step)


def first_moments(addends: list[list[float]]) -> dict[str, object]:
    """By layout: exp_avg of both weights after a step with `addends` of each rank, then that of
    the second, and the norm, after another step without it, then after one with its last part."""
    init_process_group(torch.device("cpu"))
    results = {}
    for layout, changes in LAYOUTS.items():
        torch.manual_seed(0)
        training = section(**changes, clip_norm=0.0, precision="bfloat16", weight_decay=0.0)
        engine = Engine(Pair(), training, len(addends[0]))
        run_step(engine, 0, addends, [True, True])
        state = engine.state()
        norm = run_step(engine, 1, addends, [False, False])
        later = engine.state()
        run_step(engine, 2, addends, [False, True])
        last = engine.state()
        if state is not None and later is not None and last is not None:
            moments = [state.moments[f"exp_avg/{name}.weight"] for name in ("first", "second")]
            after = [found.moments["exp_avg/second.weight"] for found in (later, last)]
            results[layout] = [*moments, *after, norm]
    return results


@pytest.mark.slow
def test_small_addends_are_not_lost_and_none_comes_twice() -> None:
    addends = [[1.0, 2.0**-10], [2.0**-11, 2.0**-12]]
    whole = sum(map(sum, addends))
    lost = torch.tensor(addends).bfloat16().sum().item()
    assert lost == 1.0 < whole, "in bfloat16 nothing of the small ones would be left"
    [results, _] = run_ranks(first_moments, 2, addends)
    assert results.keys() == LAYOUTS.keys()
    part = sum(last for _, last in addends)
    for layout, (first, second, later, last, norm) in results.items():
        for moment in (first, second):
            expected = torch.full((1, 3), (1 - BETA) * whole)
            torch.testing.assert_close(moment, expected, rtol=1e-6, atol=0.0, msg=layout)
        assert norm == pytest.approx(whole * 3**0.5, rel=1e-6), layout
        torch.testing.assert_close(later, BETA * second, rtol=1e-6, atol=0.0, msg=layout)
        expected = BETA * later + (1 - BETA) * part
        torch.testing.assert_close(last, expected, rtol=1e-6, atol=0.0, msg=layout)
