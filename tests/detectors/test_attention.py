import itertools
import math

import torch
from torch import Tensor, nn

from pipeline.detectors.attention import DeformableAttention, QueryAttention, sample_and_sum

SHAPES = [(5, 7), (3, 4), (2, 1)]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Value (2, S, 2, 3), locations (2, 4, 2, 3, 2, 2) partly outside the maps, and weights."""
    generator = torch.Generator().manual_seed(0)
    size = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, size, 2, 3, generator=generator, dtype=dtype)
    locations = torch.rand(2, 4, 2, 3, 2, 2, generator=generator, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(2, 4, 2, 3, 2, generator=generator, dtype=dtype)
    return value, locations, weights


def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Bilinear reading by loops over every query, head, level, point and corner."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = [0, *itertools.accumulate(h * w for h, w in SHAPES)]
    ranges = [range(n) for n in (batch, queries, heads, levels, points)]
    for b, q, m, level, p in itertools.product(*ranges):
        height, width = SHAPES[level]
        x = float(locations[b, q, m, level, p, 0]) * width - 0.5
        y = float(locations[b, q, m, level, p, 1]) * height - 0.5
        for column, row in itertools.product(
            (math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)
        ):
            if 0 <= column < width and 0 <= row < height:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                cell = value[b, starts[level] + row * width + column, m]
                output[b, q, m] += share * weights[b, q, m, level, p] * cell
    return output.flatten(2)


def test_sampling_equals_loops() -> None:
    value, locations, weights = inputs(torch.float64)
    result = sample_and_sum(value, SHAPES, locations, weights)
    torch.testing.assert_close(result, reference(value, locations, weights))


def test_gradients_equal_finite_differences() -> None:
    tensors = [x.requires_grad_() for x in inputs(torch.float64)]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: sample_and_sum(value, SHAPES, locations, weights), tensors
    )


def make_attention() -> DeformableAttention:
    torch.manual_seed(0)
    return DeformableAttention(dim=8, num_heads=4, num_levels=3, num_points=2)


def test_offsets_start_as_one_ray_for_each_head() -> None:
    bias = make_attention().sampling_offsets.bias.view(4, 3, 2, 2)
    rays = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for level in range(3):
        torch.testing.assert_close(bias[:, level, 0], rays, atol=1e-6, rtol=0)
        torch.testing.assert_close(bias[:, level, 1], 2 * rays, atol=1e-6, rtol=0)


def test_padding_is_not_read() -> None:
    attention = make_attention()
    size = sum(h * w for h, w in SHAPES)
    memory, query = torch.randn(1, size, 8), torch.randn(1, 5, 8)
    boxes = torch.rand(1, 5, 3, 4)
    mask = torch.zeros(1, size, dtype=torch.bool)
    mask[:, ::2] = True
    changed = torch.where(mask[..., None], 1e3, memory)
    first = attention(query, boxes, memory, mask, SHAPES)
    torch.testing.assert_close(attention(query, boxes, changed, mask, SHAPES), first)
    assert not torch.allclose(attention(query, boxes, changed, ~mask, SHAPES), first)


def test_query_attention_equals_multihead_attention() -> None:
    torch.manual_seed(0)
    ours, theirs = QueryAttention(12, 3, 0.0), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    content, position = torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    query = content + position
    expected = theirs(query, query, content)[0]
    torch.testing.assert_close(ours(content, position), expected)

    allowed = torch.rand(2, 3, 7) > 0.3
    allowed[:, :, 5] = True
    blocked = torch.zeros(2, 7, 7, dtype=torch.bool)
    blocked[:, :3] = ~allowed
    blocked[:, 3:, :3] = True
    mask = blocked.repeat_interleave(3, dim=0)
    expected = theirs(query, query, content, attn_mask=mask)[0]
    torch.testing.assert_close(ours(content, position, allowed), expected)
