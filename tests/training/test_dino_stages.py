"""The real detector with the semantic branch: plain PyTorch and each ZeRO stage learn the same.

Whatever a step holds (no boxes at all, none on one rank, image-level labels, boxes without labels),
every parameter takes part in it, or ZeRO-3 would update one with an old gradient.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from dino_student import KINDS, dino_batches, dino_context, dino_student
from torch import Tensor, nn
from toy_student import run_ranks

from pipeline.recipe import Training
from pipeline.training.engine import Engine, init_process_group, parameter_groups

BATCH, MICRO = 4, 1
STEPS = len(KINDS)
SECTION = {
    "steps": STEPS,
    "batch_size": BATCH,
    "micro_batch": MICRO,
    "learning_rate": 1e-4,
    "backbone_learning_rate": 1e-5,
    "clip_norm": 0.1,
}


def training(**changes: Any) -> Training:
    return Training.model_validate(SECTION | changes)


def plainly(**changes: Any) -> tuple[list[dict[str, float]], list[float], dict[str, Tensor]]:
    """PyTorch alone on the whole batch: losses and gradient norms of the steps, then weights."""
    student = dino_student(**changes)
    optimizer = torch.optim.AdamW(parameter_groups(student, training()))
    losses, norms = [], []
    for step in range(STEPS):
        [(batch, soft)] = dino_batches(step, BATCH, BATCH)
        context = dino_context(step, BATCH)
        of_step = student(batch.images, batch.mask, batch.targets, context, soft)
        sum(of_step.values()).backward()
        missing = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        norms.append(float(nn.utils.clip_grad_norm_(student.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: loss.item() for name, loss in of_step.items()})
    return losses, norms, student.state_dict()


def by_stage(stages: list[int], changes: dict[str, Any]) -> dict[int, Any]:
    """The same with two ranks of two micro-batches each."""
    init_process_group(torch.device("cpu"))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    for stage in stages:
        accumulation = BATCH // (MICRO * world_size)
        engine = Engine(dino_student(**changes), training(zero_stage=stage), accumulation)
        losses, norms = [], []
        for step in range(STEPS):
            context, sums = dino_context(step, BATCH), {}
            for batch, soft in dino_batches(step, BATCH, MICRO, rank, world_size):
                found = engine.forward(batch.images, batch.mask, batch.targets, context, soft)
                engine.backward(found)
                for name, loss in found.items():
                    sums[name] = sums.get(name, torch.zeros(())) + loss.detach()
            norms.append(engine.step(step))
            numbers = torch.stack([sums[name] for name in sorted(sums)])
            dist.all_reduce(numbers)
            losses.append(dict(zip(sorted(sums), numbers.tolist(), strict=True)))
        state = engine.state()
        results[stage] = [losses, norms, state and dict(state.weights)]
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "changes"),
    [([0, 1, 2, 3], {}), ([0, 3], {"losses": {"image_level": "max_score"}})],
    ids=["coarse boxes", "detic"],
)
def test_every_stage_learns_as_plain_pytorch_on_the_whole_batch(
    stages: list[int], changes: dict[str, Any]
) -> None:
    losses, norms, weights = plainly(**changes)
    assert losses[1]["loss/box_l1"] == 0 < losses[1]["loss/class"], "a step without boxes"
    assert losses[2]["loss/box_l1"] == 0 < losses[2]["loss/semantic"], "image-level labels"
    if changes:
        level = [step["loss/image_level"] > 0 for step in losses]
        assert level == [False, False, True, False, False, False, True]
    fresh = dino_student(**changes).state_dict()
    first, *_ = run_ranks(by_stage, 2, stages, changes)
    for stage, (stage_losses, stage_norms, stage_weights) in first.items():
        for step, (ours, theirs) in enumerate(zip(stage_losses, losses, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), f"stage {stage} step {step}"
        assert stage_norms == pytest.approx(norms, rel=1e-5), f"stage {stage}"
        assert stage_weights.keys() == weights.keys()
        for name, tensor in weights.items():
            moved = (tensor - fresh[name]).norm()
            gap = (stage_weights[name] - tensor).norm()
            # AdamW makes steps of rounding errors too, where there is no gradient (keys' biases).
            assert gap <= 5e-3 * moved, f"stage {stage}: {name} is off by {gap:.3g} of {moved:.3g}"
