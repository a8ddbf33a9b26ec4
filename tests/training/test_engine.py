"""The engine against plain PyTorch, over ZeRO stages, ranks and micro-batches."""

import ctypes
import math
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_student import LAYOUTS, ToyDetector, run_ranks, toy_micro_batches

from pipeline.detectors.interface import LossContext
from pipeline.recipe import Training
from pipeline.training.agreement import on_first_rank
from pipeline.training.engine import (
    Engine,
    init_process_group,
    num_micro_batches,
    parameter_groups,
    schedule_factor,
)
from pipeline.training.student import Student

BATCH, MICRO = 12, 2
"""Images of a step, which one, two and three ranks share equally."""
CONTEXT = LossContext(num_boxes=12.0, class_columns=None)


def section(**changes: object) -> Training:
    return Training.model_validate(
        {
            "steps": 10,
            "batch_size": BATCH,
            "micro_batch": MICRO,
            "learning_rate": 1e-2,
            "backbone_learning_rate": 1e-3,
            "clip_norm": 0.5,
            "ema_decay": 0.75,
        }
        | changes
    )


def toy_student() -> Student:
    torch.manual_seed(0)
    return Student(ToyDetector())


def reference(steps: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Plain PyTorch on the whole batch: losses, weights and averaged weights."""
    student, training = toy_student(), section()
    optimizer = torch.optim.AdamW(parameter_groups(student, training))
    trainable = {n: p for n, p in student.named_parameters() if p.requires_grad}
    averaged = {name: p.detach().clone() for name, p in trainable.items()}
    losses = []
    for step in range(steps):
        [batch] = toy_micro_batches(step, BATCH, BATCH, 0, 1)
        loss = sum(student(batch.images, batch.mask, batch.targets, CONTEXT).values())
        loss.backward()
        nn.utils.clip_grad_norm_(trainable.values(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for name, parameter in trainable.items():
            averaged[name].lerp_(parameter.detach(), 1 - training.ema_decay)
    return losses, student.state_dict(), averaged


def make_engine(layout: str) -> Engine:
    init_process_group(torch.device("cpu"))
    accumulation = num_micro_batches(BATCH, MICRO, dist.get_world_size())
    return Engine(toy_student(), section(**LAYOUTS[layout]), accumulation)


def train_step(engine: Engine, step: int, spoil_rank: int | None = None) -> tuple[float, float]:
    """Global loss and gradient norm; one image of one rank may be made to give a NaN loss."""
    total = torch.zeros(())
    batches = toy_micro_batches(step, BATCH, MICRO, dist.get_rank(), dist.get_world_size())
    for i, batch in enumerate(batches):
        if spoil_rank == dist.get_rank() and i == 0:
            batch.targets[1].boxes.fill_(math.nan)
        total += engine.backward(engine.forward(batch.images, batch.mask, batch.targets, CONTEXT))
    norm = engine.step(step)
    dist.all_reduce(total)
    return total.item(), norm


def train_in_every_layout(steps: int) -> dict[str, object]:
    results = {}
    for layout in LAYOUTS:
        engine = make_engine(layout)
        losses = [train_step(engine, step)[0] for step in range(steps)]
        state = engine.state()
        results[layout] = [losses, state and [dict(state.weights), dict(state.averaged)]]
    return results


def spoil_in_every_layout() -> dict[str, object]:
    results = {}
    for layout in LAYOUTS:
        engine = make_engine(layout)
        train_step(engine, 0)
        before = engine.state()
        _, norm = train_step(engine, 1, spoil_rank=dist.get_world_size() - 1)
        after = engine.state()
        loss, next_norm = train_step(engine, 2)
        clean = make_engine(layout)
        train_step(clean, 0)
        clean_loss, clean_norm = train_step(clean, 2)
        same = before is None or (
            all(torch.equal(before.weights[n], after.weights[n]) for n in before.weights)
            and all(torch.equal(before.moments[n], after.moments[n]) for n in before.moments)
            and all(torch.equal(before.averaged[n], after.averaged[n]) for n in before.averaged)
            and before.updates == after.updates == 1
        )
        results[layout] = [norm, same, loss, clean_loss, next_norm, clean_norm]
    return results


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_layout_learns_as_plain_pytorch_on_the_whole_batch(world_size: int) -> None:
    losses, weights, averaged = reference(4)
    first, *_ = run_ranks(train_in_every_layout, world_size, 4)
    assert first.keys() == LAYOUTS.keys()
    for layout, (found, (found_weights, found_averaged)) in first.items():
        assert found == pytest.approx(losses, rel=1e-5), layout
        assert found_weights.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found_weights[name], tensor, rtol=1e-4, atol=1e-6)
        for name, tensor in averaged.items():
            torch.testing.assert_close(found_averaged[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any() -> None:
    for results in run_ranks(spoil_in_every_layout, 2):
        for layout, (norm, same, loss, clean_loss, next_norm, clean_norm) in results.items():
            assert not math.isfinite(norm), layout
            assert same, f"{layout}: weights or moments moved"
            assert loss == clean_loss and next_norm == clean_norm, f"{layout}: left over"


M_MMAP_THRESHOLD = -3
WIDE = 1024
"""Of a square weight: 4 MiB."""


class Wide(nn.Module):
    """32 MiB of weights, a fourth of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE, bias=False) for _ in range(8))
        self.layers[:2].requires_grad_(False)


def grown_while_gathering() -> dict[str, int]:
    """By layout: by how many bytes the process's peak was above what it held before."""
    # The C library gives back what is freed, so that what it kept for later is not counted.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16) == 1
    init_process_group(torch.device("cpu"))
    results = {}
    for layout in ("0", "1", "3"):
        engine = Engine(Wide(), section(**LAYOUTS[layout]), 1)
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
        before = resident("VmRSS")
        state = engine.state()
        results[layout] = resident("VmHWM") - before
        del engine, state
    return results


def resident(name: str) -> int:
    [kilobytes] = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


@pytest.mark.slow
def test_only_the_first_rank_holds_the_state_of_all_in_host_memory() -> None:
    whole = (8 + 3 * 6) * 4 * WIDE**2
    first, second = run_ranks(grown_while_gathering, 2)
    for layout in first:
        assert first[layout] > 0.9 * whole, layout
        assert second[layout] < 0.3 * whole, layout
    assert second["0"] < 4 * WIDE**2, "nothing is gathered there"


def wait_for_a_slow_first_rank() -> list[float]:
    """The timeouts of all groups in s, after the first rank took longer than the group's first."""
    dist.barrier()
    dist.set_timeout(timedelta(seconds=4))
    init_process_group(torch.device("cpu"), timedelta(seconds=300))
    on_first_rank(lambda: time.sleep(6))
    engines = [make_engine(layout) for layout in ("0", "1", "3")]
    assert len(engines) == 3
    made = dist.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in made]
    return [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.slow
def test_ranks_wait_longer_for_each_other_than_to_find_each_other() -> None:
    """In the groups that DeepSpeed has made too."""
    for timeouts in run_ranks(wait_for_a_slow_first_rank, 2):
        assert len(timeouts) >= 2 and set(timeouts) == {300.0}


@pytest.mark.parametrize(
    ("offload", "stage", "message"),
    [
        ("optimizer", 0, "offload 'optimizer' needs a zero_stage of at least 1, and it is 0"),
        ("all", 2, "offload 'all' needs a zero_stage of at least 3, and it is 2"),
    ],
)
def test_what_a_stage_cannot_offload_is_refused(offload: str, stage: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(offload=offload, zero_stage=stage)


def test_schedule_is_a_function_of_the_step() -> None:
    stepped = section(warmup_steps=3, drop_steps=[5, 8], drop_factor=0.1)
    factors = [schedule_factor(step, stepped) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    cosine = section(schedule="cosine", warmup_steps=2)
    factors = [schedule_factor(step, cosine) for step in range(10)]
    assert factors[2] == 1.0 and factors[6] == pytest.approx(0.5)
    assert factors[2:] == sorted(factors[2:], reverse=True) and factors[-1] > 0


def test_parameter_groups_are_by_backbone_and_by_decay_and_leave_out_frozen_parameters() -> None:
    student = toy_student()
    training = section(weight_decay=0.1)
    groups = parameter_groups(student, training)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {}
    for group in groups:
        assert group["lr"] == group["base_lr"]
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["lr"], group["weight_decay"]
    expected = {
        name: (1e-3 if "backbone" in name else 1e-2, 0.1 if parameter.ndim > 1 else 0.0)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    }
    assert found == expected
    assert len(set(expected.values())) == 4 and len(expected) < len(names)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world_size", "expected"),
    [(16, 2, 1, 8), (16, 2, 2, 4), (16, 3, 2, 3), (5, 2, 2, 2), (2, 2, 4, 1)],
)
def test_number_of_micro_batches(
    batch_size: int, micro_batch: int, world_size: int, expected: int
) -> None:
    assert num_micro_batches(batch_size, micro_batch, world_size) == expected
