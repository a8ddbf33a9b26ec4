import torch
from torchvision.ops import box_convert, generalized_box_iou

from pipeline.detectors.boxes import (
    cxcywh_to_xyxy,
    generalized_iou,
    inverse_sigmoid,
    within_logit_bounds,
    xyxy_to_cxcywh,
)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    """xyxy boxes in the unit square."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_conversions_agree_with_torchvision_and_invert_each_other() -> None:
    boxes = random_boxes(50, seed=0)
    converted = xyxy_to_cxcywh(boxes)
    torch.testing.assert_close(converted, box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(cxcywh_to_xyxy(converted), boxes)


def test_generalized_iou_agrees_with_torchvision() -> None:
    a, b = random_boxes(30, seed=1), random_boxes(40, seed=2)
    expected = generalized_box_iou(a, b)
    torch.testing.assert_close(generalized_iou(a[:, None], b[None], eps=0.0), expected)
    torch.testing.assert_close(generalized_iou(a, b[:30], eps=0.0), expected.diagonal())


def test_small_boxes_feel_the_epsilon_of_the_public_code() -> None:
    a, b = torch.tensor([0.1, 0.1, 0.11, 0.12]), torch.tensor([0.1, 0.1, 0.12, 0.12])
    inside = generalized_iou(a, b)  # areas 2e-4 within 4e-4, which is the hull too
    torch.testing.assert_close(inside, torch.tensor(2e-4 / 4.01e-4), rtol=1e-4, atol=0)
    apart = generalized_iou(a, a + 0.1)  # of the hull of 0.11 x 0.12, 4e-4 is filled
    expected = torch.tensor(-(0.0132 - 4e-4) / (0.0132 + 1e-6))
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=0)


def test_degenerate_boxes_give_finite_values_and_gradients() -> None:
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    inverted = torch.tensor([[0.6, 0.6, 0.4, 0.4]])
    line = torch.tensor([[0.1, 0.5, 0.9, 0.5]])
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    degenerate = torch.cat([point, inverted, line])
    boxes = torch.cat([degenerate, unit]).requires_grad_()
    value = generalized_iou(boxes[:, None], boxes[None])
    value.sum().backward()
    assert value.isfinite().all() and value.min() >= -1 and value.max() <= 1
    assert boxes.grad is not None and boxes.grad.isfinite().all()


def test_inverse_sigmoid_inverts_and_is_bounded() -> None:
    x = torch.linspace(-6, 6, 20)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x, rtol=1e-4, atol=1e-4)
    ends = inverse_sigmoid(torch.tensor([-0.5, 0.0, 1.0, 1.5]))
    assert ends.isfinite().all() and ends.abs().max() < 7


def test_logit_bounds_are_those_of_the_logit_and_round_alike_everywhere() -> None:
    x = torch.linspace(-0.2, 1.2, 1001)
    bounded = within_logit_bounds(x)
    torch.testing.assert_close(bounded, inverse_sigmoid(x).sigmoid(), rtol=0, atol=1e-6)
    assert all(torch.equal(within_logit_bounds(x[i:]), bounded[i:]) for i in range(1, 40))
