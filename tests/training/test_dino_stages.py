"""The real detector with the semantic branch: plain PyTorch and each ZeRO stage learn the same.

Whatever a step holds (no boxes at all, none on one rank, image-level labels, boxes without labels),
every parameter takes part in it, or ZeRO-3 would update one with an old gradient.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dino_student import KINDS, dino_batches, dino_context, dino_student
from small_dino import SMALL
from torch import Tensor, nn
from toy_student import LAYOUTS, run_ranks

from pipeline.recipe import Training
from pipeline.training.engine import Engine, init_process_group, parameter_groups
from pipeline.training.student import Student

BATCH, MICRO = 4, 1
STEPS = len(KINDS)
EMA_DECAY = 0.8


@dataclass(frozen=True)
class Case:
    """What trains, in which layouts, and how near to plain PyTorch losses and weights come."""

    layouts: tuple[str, ...]
    detector: dict[str, Any] = field(default_factory=dict)
    recomputed: bool = False
    """The transformer's layers are computed again in the backward pass."""
    precision: str = "float32"
    whole: bool = True
    """PyTorch alone has the batch at once, rather than image by image."""
    restart_after: int | None = None
    losses: float = 1e-5
    weights: float = 5e-3


FROZEN = {"frozen_stages": 2, "layer_decay": 0.7, "checkpointed_stages": 4}
CASES = {
    "coarse boxes": Case(("0", "1", "2", "3", "3 all")),
    "detic": Case(("0", "3"), {"losses": {"image_level": "max_score"}}),
    # Stages frozen, rates that fall with depth, everything checkpointed, averages; and each engine
    # is made anew from its own state on the way.
    "frozen and checkpointed": Case(
        ("0", "1", "2", "3", "3 all"),
        {"backbone": SMALL["backbone"] | FROZEN},
        recomputed=True,
        restart_after=3,
    ),
    # A weight that differs in its last digits may round to another bfloat16.
    "bfloat16": Case(
        ("0", "2", "3", "3 all"), precision="bfloat16", whole=False, losses=2e-3, weights=0.1
    ),
}


def training(case: Case, **changes: Any) -> Training:
    section = {
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch": MICRO,
        "learning_rate": 1e-4,
        "backbone_learning_rate": 1e-5,
        "clip_norm": 0.1,
        "ema_decay": EMA_DECAY,
        "precision": case.precision,
    }
    return Training.model_validate(section | changes)


def student_of(case: Case) -> Student:
    student = dino_student(**case.detector)
    student.precision = case.precision
    student.detector.set_activation_checkpointing(case.recomputed)
    return student


@dataclass
class Learnt:
    """Losses and gradient norms of the steps, then weights and their averages."""

    losses: list[dict[str, float]]
    norms: list[float]
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor]


def plainly(case: Case) -> Learnt:
    """PyTorch alone, without ranks."""
    student = student_of(case)
    optimizer = torch.optim.AdamW(parameter_groups(student, training(case)))
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    learnt = Learnt([], [], {}, {name: p.detach().clone() for name, p in trained.items()})
    for step in range(STEPS):
        context, sums = dino_context(step, BATCH), {}
        for batch, soft in dino_batches(step, BATCH, BATCH if case.whole else MICRO):
            found = student(batch.images, batch.mask, batch.targets, context, soft)
            sum(found.values()).backward()
            for name, loss in found.items():
                sums[name] = sums.get(name, 0.0) + loss.item()
        assert [name for name, p in trained.items() if p.grad is None] == []
        learnt.norms.append(float(nn.utils.clip_grad_norm_(student.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        learnt.losses.append(sums)
        for name, parameter in trained.items():
            learnt.averaged[name].lerp_(parameter.detach(), 1 - EMA_DECAY)
    learnt.weights = student.state_dict()
    return learnt


def in_layouts(name: str) -> dict[str, Any]:
    """The same with two ranks of two micro-batches each."""
    init_process_group(torch.device("cpu"))
    case, results = CASES[name], {}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = BATCH // (MICRO * world_size)
    for layout in case.layouts:
        section = training(case, **LAYOUTS[layout])
        engine, losses, norms = Engine(student_of(case), section, accumulation), [], []
        for step in range(STEPS):
            context, sums = dino_context(step, BATCH), {}
            for batch, soft in dino_batches(step, BATCH, MICRO, rank, world_size):
                found = engine.forward(batch.images, batch.mask, batch.targets, context, soft)
                engine.backward(found)
                for key, loss in found.items():
                    assert loss.dtype == torch.float32
                    sums[key] = sums.get(key, torch.zeros(())) + loss.detach()
            norms.append(engine.step(step))
            numbers = torch.stack([sums[key] for key in sorted(sums)])
            dist.all_reduce(numbers)
            losses.append(dict(zip(sorted(sums), numbers.tolist(), strict=True)))
            if step + 1 == case.restart_after:
                shared = [engine.state()]
                dist.broadcast_object_list(shared)
                student = student_of(case)
                student.load_state_dict(shared[0].weights)
                engine = Engine(student, section, accumulation, shared[0])
        state = engine.state()
        last = state and [dict(state.weights), dict(state.averaged)]
        results[layout] = [losses, norms, last]
    return results


def assert_near(
    found: dict[str, Tensor], plain: dict[str, Tensor], fresh: Any, most: float
) -> None:
    """Off by less than `most` of the way that a tensor went."""
    for name, tensor in plain.items():
        moved, gap = (tensor - fresh[name]).norm(), (found[name] - tensor).norm()
        # AdamW makes steps of rounding errors too, where there is no gradient (keys' biases).
        assert gap <= most * moved, f"{name} is off by {gap:.3g} of {moved:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layout_learns_as_plain_pytorch_on_the_whole_batch(name: str) -> None:
    case = CASES[name]
    plain, fresh = plainly(case), student_of(case).state_dict()
    assert plain.losses[1]["loss/box_l1"] == 0 < plain.losses[1]["loss/class"], "without boxes"
    assert plain.losses[2]["loss/box_l1"] == 0 < plain.losses[2]["loss/semantic"], "image level"
    if name == "detic":
        level = [step["loss/image_level"] > 0 for step in plain.losses]
        assert level == [False, False, True, False, False, False, True]
    frozen = fresh.keys() - plain.averaged.keys()
    assert any("backbone" in key for key in frozen) == (name == "frozen and checkpointed")
    first, *_ = run_ranks(in_layouts, 2, name)
    assert tuple(first) == case.layouts
    for layout, (losses, norms, (weights, averaged)) in first.items():
        for step, (ours, theirs) in enumerate(zip(losses, plain.losses, strict=True)):
            close = pytest.approx(theirs, rel=case.losses, abs=1e-7)
            assert ours == close, f"{layout}, step {step}"
        assert norms == pytest.approx(plain.norms, rel=case.losses), layout
        assert weights.keys() == plain.weights.keys()
        assert averaged.keys() == plain.averaged.keys()
        assert all(torch.equal(weights[key], fresh[key]) for key in frozen), layout
        assert_near(weights, plain.weights, fresh, case.weights)
        assert_near(averaged, plain.averaged, fresh, case.weights)
