"""Inputs of deformable sampling, and the definition by loops that all ways are held against."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = list[tuple[int, int]]
Sample = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]
Sampled = tuple[Tensor, Tensor, Tensor, Tensor]
"""The output, and the gradients of value, locations and weights."""


class Scene(NamedTuple):
    """Value (B, S, M, D), locations (B, Q, M, L, P, 2) partly outside the maps, weights, and the
    output's gradient."""

    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> "Scene":
        value, locations, weights = (x.to(dtype) for x in (self.value, *self[2:4]))
        return Scene(value, self.shapes, locations, weights, self.gradient.to(dtype))


def draw(
    depth: int = 16,
    shapes: Shapes | None = None,
    batch: int = 2,
    queries: int = 9,
    heads: int = 3,
    points: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """Odd sizes, a map of one cell, and samples on borders, beyond them and far away."""
    shapes = shapes or [(5, 7), (3, 4), (1, 1)]
    generator = torch.Generator().manual_seed(depth + queries)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    cells, levels = sum(h * w for h, w in shapes), len(shapes)
    pairs = (batch, queries, heads, levels, points)
    locations = torch.rand((*pairs, 2), generator=generator, dtype=torch.float64) * 1.6 - 0.3
    edges = torch.tensor([-50, 0.5, 0.5, 1e12, -1e12, 9, 3, 3, 1.3, 0.2, -7, -7])
    locations.view(-1)[:12] = edges[: locations.numel()]
    weights = torch.rand(pairs, generator=generator, dtype=torch.float64)
    return Scene(
        normal(batch, cells, heads, depth),
        shapes,
        locations.to(dtype),
        weights.to(dtype),
        normal(batch, queries, heads * depth),
    )


def halved(scene: Scene) -> Scene:
    """With `value` in bfloat16, and a gradient that fits into it."""
    gradient = scene.gradient.bfloat16().float()
    return scene._replace(value=scene.value.bfloat16(), gradient=gradient)


def loops(scene: Scene) -> Sampled:
    """Every query, head, level, point and corner in turn, in float64, and the derivative of each
    product by hand."""
    value, shapes, locations, weights, gradient = scene.to(torch.float64)
    batch, queries, heads, levels, points, _ = locations.shape
    depth = value.shape[-1]
    output = torch.zeros(batch, queries, heads, depth, dtype=torch.float64)
    gradient = gradient.view_as(output)
    grad_value, grad_locations, grad_weights = map(torch.zeros_like, (value, locations, weights))
    starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
    for b, q, m, level, p in itertools.product(
        *map(range, (batch, queries, heads, levels, points))
    ):
        height, width = shapes[level]
        x = float(locations[b, q, m, level, p, 0]) * width - 0.5
        y = float(locations[b, q, m, level, p, 1]) * height - 0.5
        weight = weights[b, q, m, level, p]
        for i, j in itertools.product((0, 1), (0, 1)):
            row, column = math.floor(y) + i, math.floor(x) + j
            if not (0 <= row < height and 0 <= column < width):
                continue
            up, across = 1 - abs(y - row), 1 - abs(x - column)
            cell = starts[level] + row * width + column
            output[b, q, m] += weight * up * across * value[b, cell, m]
            dot = gradient[b, q, m] @ value[b, cell, m]
            grad_value[b, cell, m] += weight * up * across * gradient[b, q, m]
            grad_weights[b, q, m, level, p] += up * across * dot
            grad_locations[b, q, m, level, p, 0] += weight * dot * (2 * j - 1) * up * width
            grad_locations[b, q, m, level, p, 1] += weight * dot * (2 * i - 1) * across * height
    return output.flatten(2), grad_value, grad_locations, grad_weights


def run(sample: Sample, scene: Scene) -> Sampled:
    """The output and gradients of one way to sample."""
    tensors = [x.clone().requires_grad_() for x in (scene.value, scene.locations, scene.weights)]
    output = sample(tensors[0], scene.shapes, tensors[1], tensors[2])
    output.backward(scene.gradient.to(output.dtype))
    gradients = [x.grad for x in tensors]
    assert all(gradient is not None for gradient in gradients)
    return (output.detach(), *gradients)


def assert_close(found: Sampled, expected: Sampled) -> None:
    """The output and all gradients are equal, but for rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)


def assert_near(found: Tensor | None, expected: Tensor, rtol: float = 2e-5) -> None:
    """Every number is equal to a part of the largest one."""
    assert found is not None and found.shape == expected.shape
    limit = rtol * float(expected.detach().abs().max())
    difference = float((found.detach().double() - expected.detach().double()).abs().max())
    assert difference <= limit, f"{difference} is more than {limit}"
