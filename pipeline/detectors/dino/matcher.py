"""Hungarian matching of predictions to boxes (DETR, section 3.1), all layers at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline import recipe
from pipeline.detectors.boxes import cxcywh_to_xyxy, generalized_iou

# A cost that is not finite must not stop one rank alone: see `match`.
_UNMATCHABLE = 1e6


class PaddedTargets(NamedTuple):
    """The boxes of a batch in one layout: `boxes` (B, N, 4) cxcywh; `columns` (B, N) int64, the
    position of the label among the class columns in use, -1 without one; `counts`, real boxes of
    each image; `box_cost` (B,), what box costs are multiplied by, None for 1. Padding is a box in
    the middle without a label."""

    boxes: Tensor
    columns: Tensor
    counts: list[int]
    box_cost: Tensor | None = None


class Matches(NamedTuple):
    """Pairs, each layer having the same number P of them in the same order of images.

    All are int64: `image`, `query` and `box` are (L, P). `finite` is False where a cost was not.
    """

    image: Tensor
    query: Tensor
    box: Tensor
    finite: bool


def matching_costs(
    losses: recipe.Losses, logits: Tensor, boxes: Tensor, targets: PaddedTargets
) -> Tensor:
    """(L, B, Q, N) float32 cost of each query for each box.

    `logits` (L, B, Q, K) and `boxes` (L, B, Q, 4) cxcywh; boxes without a label cost no class.
    """
    layers, _, queries, _ = logits.shape
    columns = targets.columns.clamp(min=0)[None, :, None].expand(layers, -1, queries, -1)
    probability = logits.gather(3, columns).sigmoid()
    alpha, gamma, eps = losses.focal_alpha, losses.focal_gamma, 1e-8
    negative = (1 - alpha) * probability**gamma * -(1 - probability + eps).log()
    positive = alpha * (1 - probability) ** gamma * -(probability + eps).log()
    labelled = (targets.columns >= 0)[None, :, None]
    class_cost = (positive - negative) * labelled
    l1 = torch.cdist(boxes, targets.boxes[None].expand(layers, -1, -1, -1), p=1)
    giou = generalized_iou(
        cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(targets.boxes)[None, :, None]
    )
    box_cost = losses.cost_box_l1 * l1 - losses.cost_box_giou * giou
    if targets.box_cost is not None:
        box_cost = box_cost * targets.box_cost[:, None, None]
    return losses.cost_class * class_cost + box_cost


@torch.no_grad()
def match(losses: recipe.Losses, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Matches:
    """The cheapest one-to-one matching of each layer and image.

    A cost that is not finite counts as very high and is reported in `finite`: the loss is then
    made not finite, and all ranks together decide what to do about the step.
    """
    device = logits.device
    cost = matching_costs(losses, logits, boxes, targets)
    costs = cost.cpu().numpy()  # one transfer for all layers
    real = [costs[:, image, :, :count] for image, count in enumerate(targets.counts)]
    finite = all(bool(np.isfinite(block).all()) for block in real)
    pairs = [assign(block, image) for image, block in enumerate(real)]
    whole = torch.from_numpy(np.concatenate(pairs, axis=2))
    image, query, box = whole.to(device, non_blocking=True)
    return Matches(image, query, box, finite)


def assign(costs: NDArray[np.float32], image: int) -> NDArray[np.int64]:
    """(3, L, P) image, query and box of each pair, from (L, Q, N) costs of one image."""
    costs = np.nan_to_num(costs, nan=_UNMATCHABLE, posinf=_UNMATCHABLE, neginf=_UNMATCHABLE)
    layers: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]] = [
        linear_sum_assignment(layer) for layer in costs
    ]
    query = np.stack([rows for rows, _ in layers]).astype(np.int64)
    box = np.stack([columns for _, columns in layers]).astype(np.int64)
    return np.stack([np.full_like(query, image), query, box])
