"""The sigmoid focal loss in one pass: value and derivative together, no one-hot target."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# On a CPU a block of this many elements stays in the cache through all operations on it (2.5 times
# as fast as whole tensors); on a GPU every block would be another dozen of kernel launches.
_BLOCK = 1 << 17


class SumOfFocalLosses(torch.autograd.Function):
    """(L,) weighted sums of the focal loss (Lin et al. 2017) over the entries of each layer.

    `logits` is (L, B, Q, K) float32 and `weight` (B, Q), of every entry of a query. All entries are
    negatives but those at `positive` (L, P) int64, flat positions in `logits`, each at most once in
    effect: entry i of them counts as a positive with `positive_weight` (L, P), which is its query's
    weight, or 0 where there is no positive after all. What negatives weigh in each column of each
    image is `negatives` (B, K), and `matched` (B, K), nowhere less, on queries with a positive; 1
    where they are not given. Only the derivative is stored, one tensor of the size of `logits`,
    where autograd would keep four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weight: Tensor,
        positive: Tensor,
        positive_weight: Tensor,
        alpha: float,
        gamma: float,
        negatives: Tensor | None = None,
        matched: Tensor | None = None,
    ) -> Tensor:
        num_layers, num_images, num_queries, num_columns = logits.shape
        rows = logits.reshape(-1, num_columns)
        row_weight = (1 - alpha) * weight.flatten().repeat(num_layers)[:, None]
        sums, slopes = rows.new_empty(len(rows), 1), torch.empty_like(rows)
        block = max(1, _BLOCK // max(num_columns, 1)) if rows.device.type == "cpu" else len(rows)
        for start in range(0, len(rows), max(block, 1)):
            part = slice(start, start + block)
            value, slope = _negative(rows[part], gamma)
            if negatives is not None:
                _weigh(value, slope, negatives, start, logits.shape)
            torch.sum(value, 1, keepdim=True, out=sums[part])
            torch.mul(slope, row_weight[part], out=slopes[part])
        total = (sums * row_weight).view(num_layers, -1).sum(1)

        chosen = logits.reshape(-1)[positive]  # (L, P)
        as_positive, positive_slope = _negative(-chosen, gamma)
        as_negative, negative_slope = _negative(chosen, gamma)
        if negatives is not None:
            image = positive // (num_queries * num_columns) % num_images
            counted = negatives[image, positive % num_columns]
            as_negative, negative_slope = as_negative * counted, negative_slope * counted
        change = alpha * as_positive - (1 - alpha) * as_negative
        slope = -alpha * positive_slope - (1 - alpha) * negative_slope
        slopes.view(-1).index_add_(0, positive.flatten(), (slope * positive_weight).flatten())
        if negatives is not None and matched is not None:
            row = positive // num_columns
            more = (matched - negatives)[row // num_queries % num_images]  # (L, P, K)
            more = more.scatter(2, (positive % num_columns)[..., None], 0.0)
            more = (1 - alpha) * more * positive_weight[..., None]
            value, steep = _negative(rows[row], gamma)
            total = total + (value * more).sum((1, 2))
            slopes.index_add_(0, row.flatten(), (steep * more).flatten(0, 1))
        ctx.save_for_backward(slopes)
        ctx.shape = logits.shape
        return total + (change * positive_weight).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        gradient = slopes.view(ctx.shape) * gradients[0][:, None, None, None]
        return gradient, None, None, None, None, None, None, None


def _weigh(value: Tensor, slope: Tensor, negatives: Tensor, start: int, shape: torch.Size) -> None:
    """Multiply a block of rows, from row `start` on, by what its images' columns weigh, in place.

    All rows together need no copy of the weights; a block that fits the cache gathers its own.
    """
    _, num_images, num_queries, _ = shape
    if len(value) == shape[:3].numel():
        value.view(shape).mul_(negatives[:, None])
        slope.view(shape).mul_(negatives[:, None])
        return
    row = torch.arange(start, start + len(value), device=value.device)
    weight = negatives[row // num_queries % num_images]
    value.mul_(weight)
    slope.mul_(weight)


def _negative(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The focal loss of a negative without alpha, p^gamma * -log(1 - p), and its derivative by the
    logit. A positive's are those of `-x`, the derivative with the other sign."""
    p = x.sigmoid()
    power = p.square() if gamma == 2 else p**gamma
    value = power * F.softplus(x)
    # power * (gamma * (1 - p) * softplus + p), rearranged to work in place.
    scaled = value * gamma
    slope = power.sub_(scaled).mul_(p).add_(scaled)
    return value, slope
