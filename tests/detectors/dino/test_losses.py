from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from pipeline.data.batch import Targets
from pipeline.detectors.boxes import cxcywh_to_xyxy
from pipeline.detectors.dino.losses import (
    Assignment,
    LayerOutputs,
    Outputs,
    box_losses,
    compute_losses,
    focal_loss,
    matched_assignment,
    pad_targets,
)
from pipeline.detectors.dino.matcher import match
from pipeline.detectors.interface import LossContext
from pipeline.recipe import Losses

MakeTargets = Callable[..., list[Targets]]


def predictions() -> LayerOutputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 12, generator=generator) * 3
    return LayerOutputs(logits, torch.rand(2, 3, 8, 4, generator=generator) * 0.4 + 0.3)


def matched(outputs: LayerOutputs, targets: list[Targets]) -> Assignment:
    matches = match(Losses(), outputs.logits, outputs.boxes, pad_targets(targets, None, 12))
    return matched_assignment(matches, outputs.logits)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_focal_loss_agrees_with_torchvision(make_targets: MakeTargets, gamma: float) -> None:
    section, targets, outputs = Losses(focal_gamma=gamma), make_targets([2, 0, 3]), predictions()
    assignment = matched(outputs, targets)
    image_weight = torch.tensor([1.0, 0.5, 2.0])
    loss = focal_loss(
        section, outputs.logits, assignment, pad_targets(targets, None, 12), image_weight
    )
    for layer in range(2):
        onehot = torch.zeros(3, 8, 12)
        for image, query, box in zip(
            *(part[layer].tolist() for part in assignment[:3]), strict=True
        ):
            onehot[image, query, targets[image].labels[box]] = 1
        expected = sigmoid_focal_loss(outputs.logits[layer], onehot, alpha=0.25, gamma=gamma)
        expected = (expected * image_weight[:, None, None]).sum()
        torch.testing.assert_close(loss[layer], expected)


def test_unlabelled_boxes_are_no_positives(make_targets: MakeTargets) -> None:
    """Their queries are background to the class loss, as without boxes."""
    outputs = predictions()
    blind = [
        replace(target, labels=torch.full_like(target.labels, -1))
        for target in make_targets([2, 0, 3])
    ]
    padded, one = pad_targets(blind, None, 12), torch.ones(3)
    loss = focal_loss(Losses(), outputs.logits, matched(outputs, blind), padded, one)
    none = make_targets([0, 0, 0])
    padded = pad_targets(none, None, 12)
    expected = focal_loss(Losses(), outputs.logits, matched(outputs, none), padded, one)
    torch.testing.assert_close(loss, expected)


def test_box_losses_agree_with_torchvision(make_targets: MakeTargets) -> None:
    targets, outputs = make_targets([2, 0, 3]), predictions()
    assignment = matched(outputs, targets)
    padded = pad_targets(targets, None, 12)
    l1, giou = box_losses(outputs.boxes, assignment, padded, torch.tensor([1.0, 1.0, 0.5]))
    for layer in range(2):
        image, query, box = (part[layer] for part in assignment[:3])
        weight = torch.tensor([1.0, 1.0, 0.5])[image]
        ours = outputs.boxes[layer, image, query]
        true = torch.stack(
            [targets[i].boxes[b] for i, b in zip(image.tolist(), box.tolist(), strict=True)]
        )
        expected = F.l1_loss(ours, true, reduction="none").sum(1)
        torch.testing.assert_close(l1[layer], (expected * weight).sum())
        expected = 1 - generalized_box_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(true)).diagonal()
        torch.testing.assert_close(giou[layer], (expected * weight).sum())


def losses_of(
    targets: list[Targets], columns: Tensor | None, outputs: LayerOutputs
) -> dict[str, Tensor]:
    logits = outputs.logits if columns is None else outputs.logits[..., columns]
    every = Outputs(
        LayerOutputs(logits[:1], outputs.boxes[:1]),
        LayerOutputs(logits[1:], outputs.boxes[1:]),
        None,
        None,
    )
    return compute_losses(Losses(), every, targets, LossContext(4.0, columns), 12)[0]


def test_only_the_federated_columns_count(make_targets: MakeTargets) -> None:
    targets, outputs = make_targets([2, 0, 3]), predictions()
    labels = torch.cat([target.labels for target in targets]).unique()
    columns = torch.cat([labels, torch.tensor([c for c in range(12) if c not in labels][:2])])
    columns = columns.flip(0)
    few = losses_of(targets, columns, outputs)
    hidden = outputs.logits.clone()
    left_out = [c for c in range(12) if c not in columns]
    hidden[..., left_out] = -1e4  # a negative so sure costs nothing
    every = losses_of(targets, None, LayerOutputs(hidden, outputs.boxes))
    assert few.keys() == every.keys()
    for key, value in few.items():
        torch.testing.assert_close(value, every[key])


def test_a_label_outside_the_columns_is_our_bug(make_targets: MakeTargets) -> None:
    targets, outputs = make_targets([2, 0, 3]), predictions()
    columns = torch.tensor([c for c in range(12) if c != int(targets[0].labels[0])])
    with pytest.raises(AssertionError, match="class_columns"):
        losses_of(targets, columns, outputs)
    unlearned = [replace(targets[0], class_weight=0.0), *make_targets([0, 0])]
    assert float(losses_of(unlearned, columns, outputs)["loss/class"]) > 0


def test_labels_that_are_not_learned_do_not_choose_who_learns_the_box(
    make_targets: MakeTargets,
) -> None:
    outputs = predictions()
    off = [replace(target, class_weight=0.0) for target in make_targets([2, 0, 3])]
    other = [replace(target, labels=(target.labels + 5) % 12) for target in off]
    found, expected = losses_of(off, None, outputs), losses_of(other, None, outputs)
    on = losses_of(make_targets([2, 0, 3]), None, outputs)
    for key, value in found.items():
        assert torch.equal(value, expected[key])
        assert not key.startswith("loss/class") or float(value) == 0
    assert found["loss/box_l1"] < on["loss/box_l1"]


def test_not_finite_predictions_give_a_loss_that_is_not_finite(make_targets: MakeTargets) -> None:
    targets, outputs = make_targets([2, 0, 3]), predictions()
    outputs.boxes[0, 0, 7] = torch.nan
    assert not losses_of(targets, None, outputs)["loss/class"].isfinite()


def test_degenerate_boxes_give_finite_losses(make_targets: MakeTargets) -> None:
    targets, outputs = make_targets([2, 0, 3]), predictions()
    flat = targets[0].boxes.clone()
    flat[:, 2:] = 0
    targets[0] = replace(targets[0], boxes=flat)
    outputs.boxes[:, 0] = flat[0]
    outputs.boxes.requires_grad_()
    total = torch.stack(list(losses_of(targets, None, outputs).values())).sum()
    total.backward()
    assert total.isfinite()
    assert outputs.boxes.grad is not None and outputs.boxes.grad.isfinite().all()
