"""Which negatives of the class loss count in which image, and that the loss follows."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from pipeline.data.batch import Targets
from pipeline.detectors.dino import focal
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.dino.focal import SumOfFocalLosses
from pipeline.detectors.dino.losses import Assignment, focal_loss, pad_targets
from pipeline.detectors.dino.negatives import Negatives, negative_weights
from pipeline.detectors.interface import LossContext
from pipeline.recipe import Losses

MakeTargets = Callable[..., list[Targets]]
COLUMNS = torch.tensor([9, 1, 4, 7, 2])


def labelled(*labels: int, **facts: object) -> Targets:
    boxes = torch.full((len(labels), 4), 0.5)
    tensor = torch.tensor(labels, dtype=torch.int64)
    return replace(Targets(boxes, tensor, 0, (64, 64), (64, 64)), **facts)


def weights_of(
    targets: list[Targets], columns: Tensor | None, sampled: Tensor | None = None
) -> Negatives | None:
    return negative_weights(targets, pad_targets(targets, columns, 10), columns, 10, sampled)


def test_named_and_verified_columns_alone_count_where_labels_are_not_exhaustive() -> None:
    targets = [
        labelled(4, 4, sampled_negatives=False),
        labelled(1, sampled_negatives=False, negative_categories=(7, 3)),
        labelled(2, 9, sampled_negatives=False, not_exhaustive_categories=(9,)),
        labelled(sampled_negatives=False),
        labelled(2),
        labelled(2, negative_categories=(7,), not_exhaustive_categories=(2,)),
        labelled(-1, sampled_negatives=False, class_weight=0.0),
    ]
    found = weights_of(targets, COLUMNS)
    assert found is not None and found.matched.tolist() == [[1] * 5] * 7
    assert found.unmatched.tolist() == [  # columns 9, 1, 4, 7, 2
        [0, 0, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0],
    ]
    every = weights_of(targets, None)
    assert every is not None
    named = [row.nonzero().flatten().tolist() for row in every.unmatched[:4]]
    assert named == [[4], [1, 3, 7], [2], []]


def test_what_only_image_labels_name_is_no_negative_of_box_images() -> None:
    """Columns 4 and 9 are not of the sample."""
    targets = [labelled(1, 7), labelled(4, sampled_negatives=False), labelled(2)]
    found = weights_of(targets, COLUMNS, torch.tensor([False, True, False, True, True]))
    assert found is not None
    sample = [0, 1, 0, 1, 1]
    assert found.unmatched.tolist() == [sample, [0, 0, 1, 0, 0], sample]
    assert found.matched.tolist() == [sample, [1, 1, 1, 1, 1], sample]


def test_box_data_need_no_weights() -> None:
    assert weights_of([labelled(1, negative_categories=(7,)), labelled()], COLUMNS) is None


@pytest.mark.parametrize("block", [1, 20, 1 << 17])
def test_value_and_gradient_are_those_of_torchvision(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(focal, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) * 8
    weight = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    negatives = (torch.rand(3, 5, generator=generator) < 0.5).double()
    # Layer 0: image 0, query 1, column 2 and image 2, query 3, column 0. Layer 1: others.
    place = torch.tensor([[0 * 20 + 7, 2 * 20 + 15], [60 + 1 * 20 + 4, 60 + 2 * 20 + 11]])
    positive_weight = weight.flatten()[place // 5 % 12]
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = SumOfFocalLosses.apply(ours, weight, place, positive_weight, 0.3, 2.0, negatives)
    target = torch.zeros(logits.numel(), dtype=torch.float64)
    target[place.flatten()] = 1
    target = target.view(logits.shape)
    counts = torch.maximum(target, negatives[None, :, None].expand_as(target))
    plain = sigmoid_focal_loss(theirs, target, alpha=0.3, gamma=2)
    expected = (plain * weight[:, :, None] * counts).flatten(1).sum(1)
    torch.testing.assert_close(loss, expected)
    (loss * torch.tensor([1.5, -0.5])).sum().backward()
    (expected * torch.tensor([1.5, -0.5])).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_gradient_reaches_what_is_not_known_to_be_absent(
    make_detector: Callable[..., DinoDetector], make_targets: MakeTargets
) -> None:
    """All class terms of a linear head: a row that nothing names or verifies stays as it is, but
    for the queries that answer for a label, of which there are none here."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    targets = make_targets([2, 1], sampled_negatives=False, negative_categories=(11,))
    targets = [replace(target, labels=torch.full_like(target.labels, -1)) for target in targets]
    rows = {}
    for known in (False, True):
        detector = make_detector(class_head={"kind": "linear"})
        given = [replace(target, sampled_negatives=not known) for target in targets]
        losses = detector(images, mask, given, LossContext(3.0, torch.arange(1, 12))).losses
        torch.stack([v for k, v in losses.items() if k.startswith("loss/class")]).sum().backward()
        heads = detector.class_embed, detector.encoder_class_embed
        for head in heads:
            assert isinstance(head.weight.grad, Tensor)
        rows[known] = [set(h.weight.grad.abs().sum(1).nonzero().flatten().tolist()) for h in heads]
    assert rows == {False: [set(range(1, 12))] * 2, True: [{11}] * 2}


def test_a_query_that_answers_for_a_label_takes_every_column_for_a_negative() -> None:
    """Of an image whose label is not exhaustive, against torchvision's loss on those entries."""
    targets = [labelled(4, sampled_negatives=False), labelled(1, 7)]
    padded = pad_targets(targets, COLUMNS, 10)
    negatives = negative_weights(targets, padded, COLUMNS, 10)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 5, generator=generator, dtype=torch.float64) * 3
    assignment = Assignment(
        torch.tensor([[0, 1, 1]]),
        torch.tensor([[2, 0, 1]]),
        torch.tensor([[0, 0, 1]]),
        torch.ones(2, 3, dtype=torch.float64),
    )
    target = torch.zeros(1, 2, 3, 5, dtype=torch.float64)
    target[0, 0, 2, 2] = target[0, 1, 0, 1] = target[0, 1, 1, 3] = 1
    counts = torch.ones(1, 2, 3, 5, dtype=torch.float64)
    counts[0, 0, :2] = torch.tensor([0, 0, 1, 0, 0])  # Queries 0 and 1 of the first image.
    image_weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    assert negatives is not None
    loss = focal_loss(
        Losses(),
        ours,
        assignment,
        padded,
        image_weight,
        Negatives(*(n.double() for n in negatives)),
    )
    plain = sigmoid_focal_loss(theirs, target, alpha=0.25, gamma=2)
    expected = (plain * counts * image_weight[:, None, None]).sum()
    torch.testing.assert_close(loss[0], expected)
    loss.sum().backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
