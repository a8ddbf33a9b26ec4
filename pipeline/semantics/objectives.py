"""What the semantic branch minimises for one region: divergences, a distance, their weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(logits: Tensor, target: Tensor, columns: Tensor | None = None) -> Tensor:
    """(M,) KL(target || softmax of logits), both (M, C), targets summing to 1.

    With `columns` (K,) both distributions are renormalised over them, and a region counts by the
    mass that its target has there. That is the part of the whole divergence that lies within the
    columns (its chain rule), so a target that lies elsewhere teaches nothing, where the bare
    renormalised one would be a magnified remainder.
    """
    if columns is None:
        return F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    target = target[:, columns]
    mass = target.sum(-1)
    within = target / mass[:, None].clamp(min=torch.finfo(target.dtype).tiny)
    inside = logits[:, columns].log_softmax(-1)
    return mass * F.kl_div(inside, within, reduction="none").sum(-1)


def distance(embeddings: Tensor, target: Tensor) -> Tensor:
    """(M,) L1 distance of unit rows, both (M, D)."""
    return (embeddings - target).abs().sum(-1)


def entropy_weight(target: Tensor) -> Tensor:
    """(M,) 2 H / log C of distributions (M, C): 0 for a sure one, 2 for the uniform one."""
    return 2 * torch.special.entr(target).sum(-1) / math.log(target.shape[1])


def one_hot(labels: Tensor, num_categories: int) -> Tensor:
    """(M, C) float32 of labels (M,) int64; a label of -1 gives that of the first category."""
    zeros = torch.zeros((len(labels), num_categories), device=labels.device)
    return zeros.scatter(1, labels.clamp(min=0)[:, None], 1.0)
