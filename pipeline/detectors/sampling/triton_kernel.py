"""Deformable sampling on a GPU in Triton, forward and backward.

Arithmetic and sums are float32; `value` and the output may be bfloat16 or float16. Gradients of
locations and weights are each written once. Those of a cell are added by atomics in whatever order
the GPU comes to them, so the last bits of that gradient change from run to run, as those of the
published CUDA kernel do; `detector.kernel: portable` is deterministic.
"""
# Triton reads the annotations of its functions itself.
# mypy: allow-untyped-defs, allow-incomplete-defs

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.detectors.sampling.levels import Shapes, level_sizes

NUMBERS = 2048
"""Of a program's block: pairs of query and head times the head's depth."""


@triton.jit
def _axis(fraction, size):
    """The cell below a coordinate, and how far above its centre it is.

    Far outside is as far as just outside, so that no index overflows; comparisons leave NaN alone.
    """
    position = fraction * size - 0.5
    position = tl.where(position < -2.0, -2.0, position)
    position = tl.where(position > size + 1.0, size + 1.0, position)
    floor = tl.floor(position)
    return floor.to(tl.int32), position - floor


@triton.jit
def _cell(first, row, column, height, width, heads, depth, channel, known):
    """Offsets (BLOCK, DEPTH) of one cell for each pair, and a mask of those that exist."""
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell = tl.where(exists, row * width + column, 0).to(tl.int64)
    offsets = (first + cell * heads * depth)[:, None] + channel[None, :]
    return offsets, known & exists[:, None]


@triton.jit
def _forward(
    value,
    locations,
    weights,
    sizes,
    output,
    pairs,
    queries,
    cells,
    heads,
    depth,
    levels,
    points,
    BLOCK: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DEPTH)
    here = pair < pairs
    known = here[:, None] & (channel < depth)[None, :]
    # The map's first cell, for the image and head of each pair.
    first = (pair // heads // queries * cells * heads + pair % heads) * depth
    sums = tl.zeros((BLOCK, DEPTH), dtype=tl.float32)
    sample = pair * levels * points
    for level in range(levels):
        height = tl.load(sizes + 2 * level)
        width = tl.load(sizes + 2 * level + 1)
        for _ in range(points):
            column, right = _axis(tl.load(locations + 2 * sample, mask=here, other=0.0), width)
            row, above = _axis(tl.load(locations + 2 * sample + 1, mask=here, other=0.0), height)
            weight = tl.load(weights + sample, mask=here, other=0.0)
            for corner in tl.static_range(4):
                i = corner // 2
                j = corner % 2
                share = (above if i else 1.0 - above) * (right if j else 1.0 - right) * weight
                offsets, mask = _cell(
                    first, row + i, column + j, height, width, heads, depth, channel, known
                )
                read = tl.load(value + offsets, mask=mask, other=0.0).to(tl.float32)
                sums += share[:, None] * read
            sample += 1
        first += (height * width).to(tl.int64) * heads * depth
    target = output + pair[:, None] * depth + channel[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=known)


@triton.jit
def _backward(
    gradient,
    value,
    locations,
    weights,
    sizes,
    grad_value,
    grad_locations,
    grad_weights,
    pairs,
    queries,
    cells,
    heads,
    depth,
    levels,
    points,
    WANTS_VALUE: tl.constexpr,  # noqa: N803
    WANTS_SAMPLES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DEPTH)
    here = pair < pairs
    known = here[:, None] & (channel < depth)[None, :]
    first = (pair // heads // queries * cells * heads + pair % heads) * depth
    grad = tl.load(gradient + pair[:, None] * depth + channel[None, :], mask=known, other=0.0)
    grad = grad.to(tl.float32)
    sample = pair * levels * points
    for level in range(levels):
        height = tl.load(sizes + 2 * level)
        width = tl.load(sizes + 2 * level + 1)
        for _ in range(points):
            column, right = _axis(tl.load(locations + 2 * sample, mask=here, other=0.0), width)
            row, above = _axis(tl.load(locations + 2 * sample + 1, mask=here, other=0.0), height)
            weight = tl.load(weights + sample, mask=here, other=0.0)
            grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
            grad_x = tl.zeros((BLOCK,), dtype=tl.float32)
            grad_y = tl.zeros((BLOCK,), dtype=tl.float32)
            for corner in tl.static_range(4):
                i = corner // 2
                j = corner % 2
                up = above if i else 1.0 - above
                across = right if j else 1.0 - right
                offsets, mask = _cell(
                    first, row + i, column + j, height, width, heads, depth, channel, known
                )
                if WANTS_SAMPLES:
                    read = tl.load(value + offsets, mask=mask, other=0.0).to(tl.float32)
                    product = tl.sum(read * grad, axis=1)
                    grad_weight += up * across * product
                    grad_x += up * product if j else -up * product
                    grad_y += across * product if i else -across * product
                if WANTS_VALUE:
                    part = (weight * up * across)[:, None] * grad
                    tl.atomic_add(grad_value + offsets, part, mask=mask, sem="relaxed")
            if WANTS_SAMPLES:
                tl.store(grad_weights + sample, grad_weight, mask=here)
                tl.store(grad_locations + 2 * sample, grad_x * weight * width, mask=here)
                tl.store(grad_locations + 2 * sample + 1, grad_y * weight * height, mask=here)
            sample += 1
        first += (height * width).to(tl.int64) * heads * depth


class _SampleAndSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, sizes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.sizes = sizes
        batch, length = locations.shape[:2]
        output = value.new_empty((batch, length, value.shape[2] * value.shape[3]))
        grid, numbers, blocks = _launch(value, locations)
        with _on(value.device):
            _forward[grid](value, locations, weights, sizes, output, *numbers, **blocks)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        value, locations, weights = ctx.saved_tensors
        wants_value, *wants_samples, _ = ctx.needs_input_grad
        # A pointer is needed even where nothing is written.
        grad_value = torch.zeros_like(value, dtype=torch.float32) if wants_value else weights
        grad_locations = torch.empty_like(locations) if any(wants_samples) else locations
        grad_weights = torch.empty_like(weights) if any(wants_samples) else weights
        grid, numbers, blocks = _launch(value, locations)
        with _on(value.device):
            _backward[grid](
                gradients[0].contiguous(),
                value,
                locations,
                weights,
                ctx.sizes,
                grad_value,
                grad_locations,
                grad_weights,
                *numbers,
                WANTS_VALUE=wants_value,
                WANTS_SAMPLES=any(wants_samples),
                **blocks,
            )
        return (
            grad_value.to(value.dtype) if wants_value else None,
            grad_locations if wants_samples[0] else None,
            grad_weights if wants_samples[1] else None,
            None,
        )


def sample_and_sum(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See `pipeline.detectors.sampling.choice.sample_and_sum`; only `value` may be a half."""
    output: Tensor = _SampleAndSum.apply(
        value.contiguous(),
        locations.contiguous(),
        weights.contiguous(),
        level_sizes(shapes, value.device),
    )
    return output


def _launch(value: Tensor, locations: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Grid, numbers that both kernels take, and the sizes of their blocks."""
    batch, queries, heads, levels, points, _ = locations.shape
    depth = value.shape[3]
    padded = triton.next_power_of_2(depth)
    block = max(1, NUMBERS // padded)
    pairs = batch * queries * heads
    numbers = (pairs, queries, value.shape[1], heads, depth, levels, points)
    return (triton.cdiv(pairs, block),), numbers, {"BLOCK": block, "DEPTH": padded}


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
