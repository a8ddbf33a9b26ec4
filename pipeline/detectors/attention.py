"""Attention: multi-scale deformable (Deformable DETR, section 4.1), and that among the queries."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.detectors.sampling import KernelChoice, Shapes, level_sizes, sample_and_sum


class DeformableAttention(nn.Module):
    """Each query reads `num_points` samples of each level around its reference point or box."""

    kernel: KernelChoice = "auto"

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
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        # In place: a projection's derivative does not need its output.
        value = self.value_proj(memory).masked_fill_(memory_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).float().unflatten(2, (heads, -1))
        weights = self.attention_weights(query).float().unflatten(2, (heads, -1)).softmax(-1)
        if reference.shape[-1] == 2:
            widths_and_heights = level_sizes(shapes, query.device).flip(1)
            unit = self._per_coordinate(widths_and_heights.reciprocal())
        else:
            unit = self._per_coordinate(reference[..., 2:] * (0.5 / points))
        # Locations stay float32: in bfloat16 one is not exact to a pixel.
        centre = self._per_coordinate(reference[..., :2].float())
        locations = torch.addcmul(centre, offsets, unit)
        output = sample_and_sum(
            value.unflatten(2, (heads, -1)),
            shapes,
            locations.view(batch, length, heads, levels, points, 2),
            weights.view(batch, length, heads, levels, points),
            self.kernel,
        )
        return self.output_proj(output)

    def _per_coordinate(self, pairs: Tensor) -> Tensor:
        """(..., L, 2) to (..., 1, L * P * 2): one long row for each query is several times as fast
        to add and multiply as broadcast pairs."""
        repeated = pairs[..., None, :].expand(*pairs.shape[:-1], self.num_points, 2)
        return repeated.flatten(-3)[..., None, :]


def use_kernel(module: nn.Module, kernel: KernelChoice) -> None:
    """Let all deformable attention within `module` sample by the recipe's `detector.kernel`."""
    for part in module.modules():
        if isinstance(part, DeformableAttention):
            part.kernel = kernel


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
