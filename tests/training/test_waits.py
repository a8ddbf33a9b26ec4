"""How often a training step waits for its device: once for each micro-batch, for the matcher."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from dino_student import dino_batches, dino_context, dino_student
from far_device import FAR, FarTensor, Watch, far_batch, to_far
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.recipe import Semantic
from pipeline.training.student import Student


def losses_of(student: Student, batch: Batch, soft: list[Tensor], step: int) -> dict[str, Tensor]:
    context = dino_context(step, 2)
    columns = context.class_columns
    if batch.images.device.type == FAR.type:
        soft, columns = [FarTensor(part) for part in soft], FarTensor(columns)
    context = context._replace(class_columns=columns)
    losses = student(batch.images, batch.mask, batch.targets, context, soft)
    torch.stack(list(losses.values())).sum().backward()
    return losses


@pytest.mark.parametrize("head", ["language", "linear"])
@pytest.mark.parametrize("step", range(5))
def test_a_micro_batch_waits_for_the_matcher_alone(
    monkeypatch: pytest.MonkeyPatch, step: int, head: str
) -> None:
    # Autocast knows nothing of this device; in float32 it does nothing.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # Nor is this the tracing of a compiler, for which attention samples in its plainest way.
    monkeypatch.setattr("pipeline.detectors.sampling.choice._is_traced", lambda *_: False)
    [(batch, soft)] = dino_batches(step, 2, 2)
    near = dino_student(class_head={"kind": head})
    expected = losses_of(near, batch, soft, step)
    student = dino_student(class_head={"kind": head})
    with Watch() as watch:
        to_far(student)
        found = losses_of(student, far_batch(batch), soft, step)
    assert watch.waits == ["matcher.py: copy to the CPU"]
    for name, loss in expected.items():
        torch.testing.assert_close(found[name].near, loss.detach(), msg=name)
    # Fresh offsets point at the very edges of cells, where a rounding error turns a gradient.
    pairs = [
        (ours.grad.near.flatten(), theirs.grad.flatten())
        for (name, ours), theirs in zip(student.named_parameters(), near.parameters(), strict=True)
        if "sampling_offsets" not in name
    ]
    gradient, wanted = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("way", ["boxes", "max_size", "image_box", "max_score"])
def test_image_level_images_and_their_negatives_do_not_wait_either(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr("pipeline.detectors.sampling.choice._is_traced", lambda *_: False)
    [(batch, soft)] = dino_batches(2, 2, 2)
    facts = {"sampled_negatives": False, "negative_categories": (1, 5)}
    batch = replace(batch, targets=[replace(target, **facts) for target in batch.targets])
    semantic = Semantic(layers="all", columns="federated", entropy_weighting=True)
    changes = {"losses": {"image_level": way}, "semantic": semantic}
    expected = losses_of(dino_student(**changes), batch, soft, 2)
    student = dino_student(**changes)
    with Watch() as watch:
        to_far(student)
        found = losses_of(student, far_batch(batch), soft, 2)
    assert watch.waits == ["matcher.py: copy to the CPU"]
    assert float(expected["loss/image_level" if way != "boxes" else "loss/class"].detach()) > 0
    for name, loss in expected.items():
        torch.testing.assert_close(found[name].near, loss.detach(), msg=name)


def test_what_waits_is_seen() -> None:
    with Watch() as watch:
        far = torch.arange(4.0).to(FAR, non_blocking=True)
        assert watch.waits == []
        assert isinstance(far[:2] * 2 + torch.ones(2, device=FAR), FarTensor)
        far[torch.tensor([1, 2]).to(FAR, non_blocking=True)].sum()
        assert watch.waits == []
        far[far > 1]
        assert float(far.sum()) == 6
        far.cpu()
        far.nonzero()
        torch.ones(2).to(FAR)
        far.new_tensor([1, 2])
        torch.tensor([1.0], device=FAR)
        assert bool((far >= 0).all())
    assert [wait.removeprefix("test_waits.py: ") for wait in watch.waits] == [
        "index by a mask",
        "_local_scalar_dense",
        "copy to the CPU",
        "nonzero",
        "copy from the CPU that is waited for",
        *["tensor made there from numbers"] * 2,
        "_local_scalar_dense",
    ]
