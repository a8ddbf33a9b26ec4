"""Deformable sampling in PyTorch alone: sums over bags of rows, nothing stored but the inputs.

The weighted sum of a query's samples is `embedding_bag` with the cells of the maps as table: no
sample is ever written to memory. So is the gradient of a cell, a sum over the samples around it,
once these are sorted by cell; nothing is scattered, so it is deterministic on a GPU too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.detectors.sampling.levels import Shapes

_SUM = 0
"""The number of `embedding_bag`'s mode."""


class _Axis(NamedTuple):
    """One coordinate of all samples of a level, each (N,), for the cell below and that above."""

    cells: tuple[Tensor, Tensor]
    """Kept within the map."""
    shares: tuple[Tensor, Tensor]
    """Parts of the sample, zero for a cell outside the map."""
    inside: tuple[Tensor, Tensor]
    lower: Tensor
    """The cell below, -1 where a sample lies between the border and the first cell's centre."""


class _Level(NamedTuple):
    """One level's samples, N = B * Q * M * P."""

    number: int
    shape: tuple[int, int]
    start: int
    x: _Axis
    y: _Axis
    weight: Tensor

    def corners(self) -> Iterator[tuple[int, int]]:
        """(row, column) of the four cells around a sample: 0 is below, 1 above."""
        return ((row, column) for row in (0, 1) for column in (0, 1))


class _SampleAndSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        batch, length = locations.shape[:2]
        points = locations.shape[4]
        table = value.reshape(-1, value.shape[3])
        output = table.new_zeros((weights.numel() // (len(shapes) * points), table.shape[1]))
        firsts = _image_and_head(batch, value.shape[1] * value.shape[2], locations)
        for level in _levels(shapes, locations, weights):
            shares = [share * level.weight for share in level.y.shares]
            for row, column in level.corners():
                rows = _rows(level, row, column, firsts, value.shape[2])
                share = shares[row] * level.x.shares[column]
                output += _bags(table, rows, share, points)
        return output.view(batch, length, value.shape[2] * value.shape[3])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        value, locations, weights = ctx.saved_tensors
        heads, depth = value.shape[2:]
        gradient, table = gradients[0].reshape(-1, depth), value.reshape(-1, depth)
        firsts = _image_and_head(len(value), value.shape[1] * heads, locations)
        wants_value, wants_locations, wants_weights, _ = ctx.needs_input_grad
        grad_value = torch.empty_like(value) if wants_value else None
        grad_locations = torch.empty_like(locations) if wants_locations else None
        grad_weights = torch.empty_like(weights) if wants_weights else None
        for level in _levels(ctx.shapes, locations, weights):
            if wants_locations or wants_weights:
                dots = {
                    (row, column): _products(
                        table, _rows(level, row, column, firsts, heads), gradient
                    )
                    for row, column in level.corners()
                }
                _write_gradients(level, dots, grad_locations, grad_weights)
            if grad_value is not None:
                _write_value_gradient(level, gradient, locations, grad_value)
        return grad_value, grad_locations, grad_weights, None


def sample_and_sum(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See `pipeline.detectors.sampling.choice.sample_and_sum`; all tensors have one dtype."""
    output: Tensor = _SampleAndSum.apply(value, locations, weights, tuple(shapes))
    return output


def _levels(shapes: Shapes, locations: Tensor, weights: Tensor) -> Iterator[_Level]:
    start = 0
    for number, (height, width) in enumerate(shapes):
        x = _axis(locations[:, :, :, number, :, 0], width)
        y = _axis(locations[:, :, :, number, :, 1], height)
        yield _Level(number, (height, width), start, x, y, weights[:, :, :, number].reshape(-1))
        start += height * width


def _axis(fraction: Tensor, size: int) -> _Axis:
    # Far outside is as far as just outside, and has no overflow; NaN stays NaN in the shares.
    position = (fraction * size).sub_(0.5).clamp_(-2.0, size + 1.0).reshape(-1)
    floor = position.floor()
    lower = floor.to(torch.int32)
    above = position.sub_(floor)
    inside = (lower >= 0) & (lower < size), (lower >= -1) & (lower < size - 1)
    shares = (1 - above).mul_(inside[0]), above * inside[1]
    cells = lower.clamp(0, size - 1), (lower + 1).clamp_(0, size - 1)
    return _Axis(cells, shares, inside, lower)


def _image_and_head(batch: int, stride: int, locations: Tensor) -> Tensor:
    """(N,) image times `stride` plus head, for each sample of a level."""
    _, length, heads, _, points, _ = locations.shape
    device = locations.device
    assert batch * stride < 2**31, "more cells than 32 bits count"
    image = torch.arange(batch, dtype=torch.int32, device=device) * stride
    head = torch.arange(heads, dtype=torch.int32, device=device)
    both = (image[:, None] + head)[:, None, :, None]
    return both.expand(batch, length, heads, points).reshape(-1)


def _rows(level: _Level, row: int, column: int, firsts: Tensor, heads: int) -> Tensor:
    """(N,) rows of the table that one corner of each sample reads."""
    _, width = level.shape
    cells = (level.y.cells[row] * width).add_(level.x.cells[column]).add_(level.start)
    return cells.mul_(heads).add_(firsts)


def _bags(table: Tensor, rows: Tensor, shares: Tensor, points: int) -> Tensor:
    """(N / points, D) sums of `points` rows each, times their shares."""
    return F.embedding_bag(
        rows.view(-1, points), table, mode="sum", per_sample_weights=shares.view(-1, points)
    )


def _products(table: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """(N,) scalar products of each row with its query's gradient (N / points, D): what autograd
    computes for the shares of a bag, without summing the bags again."""
    queries = len(gradient)
    query = torch.arange(queries, dtype=torch.int32, device=rows.device)
    points = len(rows) // max(queries, 1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient, table, rows, query * points, query.repeat_interleave(points), _SUM
    )


def _write_gradients(
    level: _Level,
    dots: dict[tuple[int, int], Tensor],
    grad_locations: Tensor | None,
    grad_weights: Tensor | None,
) -> None:
    """Gradients of one level's locations and weights, from the products of its four corners."""
    height, width = level.shape
    (left, right), (below, above) = level.x.shares, level.y.shares
    rows = [(dots[row, 0] * left).add_(dots[row, 1] * right) for row in (0, 1)]
    if grad_weights is not None:
        part = grad_weights[:, :, :, level.number]
        part.copy_((rows[0] * below).add_(rows[1] * above).view(part.shape))
    if grad_locations is not None:
        columns = [(dots[0, column] * below).add_(dots[1, column] * above) for column in (0, 1)]
        for i, axis, (low, high), size in (
            (0, level.x, columns, width),
            (1, level.y, rows, height),
        ):
            slope = high.mul_(axis.inside[1]).sub_(low.mul_(axis.inside[0]))
            part = grad_locations[:, :, :, level.number, :, i]
            part.copy_(slope.mul_(level.weight).mul_(size).view(part.shape))


def _write_value_gradient(
    level: _Level, gradient: Tensor, locations: Tensor, grad_value: Tensor
) -> None:
    """One level's gradient of `value`.

    Samples are sorted by the cell below them, on a map with one row and column more, for samples
    between the border and the first centres. Each corner's sums lie on that map; they are added
    where the corner is.
    """
    batch, _, heads, depth = grad_value.shape
    (height, width), x, y = level.shape, level.x, level.y
    image = (height + 1) * (width + 1) * heads
    count = batch * image
    firsts = _image_and_head(batch, image, locations)
    bag = ((y.lower + 1) * (width + 1)).add_(x.lower).add_(1).mul_(heads).add_(firsts)
    read = (x.inside[0] | x.inside[1]) & (y.inside[0] | y.inside[1])
    bag, order = bag.masked_fill_(~read, count).sort(stable=True)
    offsets = torch.searchsorted(bag, torch.arange(count + 1, dtype=torch.int32, device=bag.device))
    queries = order // locations.shape[4]
    across = [share.index_select(0, order) for share in x.shares]
    down = [(share * level.weight).index_select(0, order) for share in y.shares]
    end = level.start + height * width
    target = grad_value[:, level.start : end].unflatten(1, level.shape)
    target.zero_()
    for row, column in level.corners():
        sums = F.embedding_bag(
            queries, gradient, offsets, mode="sum", per_sample_weights=down[row] * across[column]
        )
        padded = sums[:count].view(batch, height + 1, width + 1, heads, depth)
        target += padded[:, 1 - row : height + 1 - row, 1 - column : width + 1 - column]
