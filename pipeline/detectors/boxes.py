"""Boxes: two layouts, generalised IoU, and the inverse of the sigmoid."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size to two corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) two corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of xyxy boxes, elementwise with broadcasting.

    (..., 4) and (..., 4) give (...); pass `a[:, None]` and `b[None]` for all pairs. A box without
    area has IoU 0 with everything, and the result is always finite: `eps` is added to both
    denominators, with the value of the DETR family's code, which small boxes feel.
    """
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    hull_area = hull.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    return intersection / (union + eps) - (hull_area - union) / (hull_area + eps)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of values in [0, 1], kept `eps` away from both ends (DINO's eps)."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def within_logit_bounds(x: Tensor, eps: float = 1e-3) -> Tensor:
    """`inverse_sigmoid(x).sigmoid()`, by arithmetic that rounds alike wherever a value stands.

    Logarithm and exponential may differ in the last bit between a vector's lanes and its remainder,
    so that a box would depend on what else is in the batch.
    """
    x = x.clamp(min=0, max=1)
    above, below = x.clamp(min=eps), (1 - x).clamp(min=eps)
    return above / (above + below)
