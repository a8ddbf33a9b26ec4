"""Deformable sampling as a plain composition of PyTorch's operators: what a tracer can follow."""

import torch.nn.functional as F
from torch import Tensor

from pipeline.detectors.sampling.levels import Shapes


def sample_and_sum(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See `pipeline.detectors.sampling.choice.sample_and_sum`; all samples are kept for the
    backward pass."""
    batch, _, heads, _ = value.shape
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B * M, D, S)
    # (B, Q, M, L, P, ...) to (L, B * M, Q, P, ...): grid_sample wants one image for each head.
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)
    output = maps.new_zeros(())
    parts = maps.split([height * width for height, width in shapes], dim=2)
    for level, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        samples = F.grid_sample(
            part.unflatten(2, shape), grids[level], "bilinear", "zeros", align_corners=False
        )
        output = output + (samples * shares[level][:, None]).sum(-1)  # (B * M, D, Q)
    return output.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)
