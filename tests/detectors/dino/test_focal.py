import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from pipeline.detectors.dino import focal
from pipeline.detectors.dino.focal import SumOfFocalLosses

POSITIVE = torch.tensor([[3, 40], [77, 60]])
"""Flat positions in logits of two layers, two images, three queries and seven columns."""


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits from very sure to very unsure, weights of queries, and of the positives."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 7, generator=generator).to(dtype) * 8
    weight = torch.rand(2, 3, generator=generator).to(dtype)
    query = POSITIVE // 7 % 6
    return logits, weight, weight.flatten()[query]


def with_one_hot(logits: Tensor, weight: Tensor, positive_weight: Tensor) -> Tensor:
    target = torch.zeros(logits.numel(), dtype=logits.dtype)
    target[POSITIVE[positive_weight > 0]] = 1
    loss = sigmoid_focal_loss(logits, target.view(logits.shape), alpha=0.3, gamma=2)
    return (loss * weight[:, :, None]).flatten(1).sum(1)


@pytest.mark.parametrize("block", [1, 20, 1 << 17])
@pytest.mark.parametrize("labelled", [(True, True), (True, False)])
def test_value_and_gradient_are_those_of_torchvision(
    block: int, labelled: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(focal, "_BLOCK", block)
    logits, weight, positive_weight = drawn()
    positive_weight = positive_weight * torch.tensor(labelled)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = SumOfFocalLosses.apply(ours, weight, POSITIVE, positive_weight, 0.3, 2.0)
    expected = with_one_hot(theirs, weight, positive_weight)
    torch.testing.assert_close(loss, expected)
    upstream = torch.tensor([1.5, -0.5])
    (loss * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_gradient_equals_finite_differences(gamma: float) -> None:
    logits, weight, positive_weight = drawn(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: SumOfFocalLosses.apply(x, weight, POSITIVE, positive_weight, 0.25, gamma), logits
    )


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([1e4, -1e4, 90.0, -90.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 7)
    logits.requires_grad_()
    positive = torch.tensor([[1]])
    loss = SumOfFocalLosses.apply(logits, torch.ones(1, 1), positive, torch.ones(1, 1), 0.25, 2.0)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
