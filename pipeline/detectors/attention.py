"""Attention: multi-scale deformable (Deformable DETR, section 4.1), and that among the queries."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]
"""(height, width) of each level."""


class _SampleAndSum(torch.autograd.Function):
    """Bilinear samples times weights, summed; samples are taken again in the backward pass.

    They would be `num_levels * num_points` times the size of the queries. Against autograd's own
    derivative this is as fast on small maps, 1.5 times as fast on large ones.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grids: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        """(N, D, Q) from `maps` (N, D, S), `grids` (L, N, Q, P, 2) and `weights` (L, N, Q, P)."""
        output = maps.new_zeros((*maps.shape[:2], grids.shape[2]))
        for image, grid, weight in zip(_unflatten(maps, shapes), grids, weights, strict=True):
            samples = _sample(image, grid)  # (N, D, Q, P)
            output += samples.mul_(weight[:, None]).sum(-1)
        ctx.save_for_backward(maps, grids, weights)
        ctx.shapes = shapes
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        maps, grids, weights = ctx.saved_tensors
        gradient = gradients[0][..., None]  # (N, D, Q, 1)
        grad_maps, grad_grids, grad_weights = [], [], []
        for image, grid, weight in zip(_unflatten(maps, ctx.shapes), grids, weights, strict=True):
            samples = _sample(image, grid).mul_(gradient)
            grad_weights.append(samples.sum(1))
            torch.mul(gradient, weight[:, None], out=samples)
            grad_image, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                samples, image, grid, 0, 0, False, [True, True]
            )
            grad_maps.append(grad_image.flatten(2))
            grad_grids.append(grad_grid)
        return torch.cat(grad_maps, 2), torch.stack(grad_grids), torch.stack(grad_weights), None


def _unflatten(maps: Tensor, shapes: Shapes) -> list[Tensor]:
    """(N, D, S) to (N, D, h, w) for each level."""
    parts = maps.split([height * width for height, width in shapes], dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)


def sample_and_sum(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of `value`, over all levels and points.

    `value` is (B, S, M, D) for M heads, with the levels of `shapes` (height, width) one after the
    other along S; `locations` (B, Q, M, L, P, 2) are xy, 0 to 1 over a level's whole map, and read
    zeros outside it; `weights` is (B, Q, M, L, P). Gives (B, Q, M * D).
    """
    batch, _, heads, depth = value.shape
    # (B, Q, M, L, P, 2) to (L, B * M, Q, P, 2): grid_sample wants one image for each head.
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2).contiguous()
    per_level = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).contiguous()
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).contiguous()  # (B * M, D, S)
    output: Tensor = _SampleAndSum.apply(maps, grids, per_level, shapes)
    return output.view(batch, heads * depth, -1).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query reads `num_points` samples of each level around its reference point or box."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as rays, one direction for each head, one step longer for each point."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = rays[:, None, None, :] * steps[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(
                offsets.expand(-1, self.num_levels, -1, -1).reshape(-1)
            )
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        shapes: Shapes,
    ) -> Tensor:
        """(B, Q, dim) from (B, Q, dim) queries.

        `reference` is (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes, as fractions of each
        level's whole map; `memory` is (B, S, dim), and `memory_mask` (B, S), True on padding.
        """
        batch, length, _ = query.shape
        per_head = (batch, length, self.num_heads)
        value = self.value_proj(memory).masked_fill(memory_mask[..., None], 0.0)
        value = value.unflatten(2, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).view(*per_head, self.num_levels, self.num_points, 2)
        weights = self.attention_weights(query).view(*per_head, -1).float().softmax(-1)
        weights = weights.view(*per_head, self.num_levels, self.num_points)
        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            unit = offsets.new_tensor([(w, h) for h, w in shapes], dtype=torch.float32).reciprocal()
            locations = centre + offsets.float() * unit[:, None]
        else:
            half_size = reference[:, :, None, :, None, 2:] * 0.5
            locations = centre + offsets.float() / self.num_points * half_size
        # Sampling stays in float32: in bfloat16 a location is not exact to a pixel.
        with torch.autocast(query.device.type, enabled=False):
            output = sample_and_sum(value.float(), shapes, locations, weights)
        return self.output_proj(output.to(value.dtype))


class QueryAttention(nn.Module):
    """Self-attention of the decoder, with the parameters of `nn.MultiheadAttention`.

    Matching queries come last and see one another only; denoising queries come first and see what
    `denoising_mask` allows. The two parts are separate products, so that no denoising query can
    leak into a matching one, and the larger part needs no mask.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights and zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, content: Tensor, position: Tensor, denoising_mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, dim) from (B, T, dim); `denoising_mask` is (B, N, T), True where allowed."""
        dim = content.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        both = F.linear(content + position, weight[: 2 * dim], bias[: 2 * dim])
        value = self._heads(F.linear(content, weight[2 * dim :], bias[2 * dim :]))
        query, key = (self._heads(part) for part in both.chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        first = 0 if denoising_mask is None else denoising_mask.shape[1]
        output = F.scaled_dot_product_attention(
            query[:, :, first:], key[:, :, first:], value[:, :, first:], dropout_p=dropout
        )
        if denoising_mask is not None:
            denoised = F.scaled_dot_product_attention(
                query[:, :, :first],
                key,
                value,
                attn_mask=denoising_mask[:, None],
                dropout_p=dropout,
            )
            output = torch.cat([denoised, output], dim=2)
        return self.out_proj(output.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
