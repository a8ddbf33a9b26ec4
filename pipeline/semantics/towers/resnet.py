"""CLIP's ModifiedResNets: the trunk once, RoIAlign on its last map, the attention pool."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor
from torchvision.ops import roi_align

from pipeline.semantics.towers.regions import AT_ONCE, rows_of

_STRIDE = 32


class ResNetRegions:
    """Regions as RichSem reads them (framework figure: the pooler)."""

    def __init__(self, visual: ModifiedResNet, image_scale: float) -> None:
        self._visual, self._image_scale = visual, image_scale

    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionReader`."""
        height, width = pixels.shape[-2:]
        if self._image_scale != 1:
            size = [max(round(side * self._image_scale), 1) for side in (height, width)]
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=self._image_scale < 1)
        seen_height, seen_width = pixels.shape[-2:]
        # The trunk's pooling drops what is left over of a stride, so objects at the edge need this.
        padding = (0, -seen_width % _STRIDE, 0, -seen_height % _STRIDE)
        pixels = F.pad(pixels, padding).contiguous(memory_format=torch.channels_last)
        rows = rows_of(boxes, (seen_width / width, seen_height / height))
        features = trunk(self._visual, pixels)
        parts = [region_embeddings(self._visual, features, part) for part in rows.split(AT_ONCE)]
        return torch.cat(parts)


def trunk(visual: ModifiedResNet, pixels: Tensor) -> Tensor:
    """The image tower up to its attention pool: (B, 3, H, W) to (B, E, H / 32, W / 32)."""
    states = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        states = layer(states)
    return states


def region_embeddings(
    visual: ModifiedResNet, features: Tensor, boxes: Tensor | list[Tensor]
) -> Tensor:
    """(N, D) unit rows of all boxes, in pixels of what the trunk saw.

    `boxes` are xyxy of each image, or (N, 5) with the image's index before them.
    """
    grid = math.isqrt(len(visual.attnpool.positional_embedding) - 1)
    regions = roi_align(
        features, boxes, grid, spatial_scale=1 / _STRIDE, sampling_ratio=0, aligned=True
    )
    return F.normalize(attention_pool(visual.attnpool, regions), dim=-1)


def attention_pool(pool: AttentionPool2d, regions: Tensor) -> Tensor:
    """The attention pool, evaluated for the one query that it returns.

    `regions` is (N, E, G, G) with the grid that the pool was trained for; gives (N, D). The key
    and value projections are folded into the query's side, so they act on one vector for each head
    and not on every position.
    """
    tokens = regions.flatten(2).transpose(1, 2)  # (N, G * G, E)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    tokens = tokens + pool.positional_embedding
    number, _, width = tokens.shape
    heads, depth = pool.num_heads, width // pool.num_heads
    query = pool.q_proj(tokens[:, 0]).view(number, heads, depth) * depth**-0.5
    # A key's bias adds the same to the scores of all positions, which the softmax takes out.
    key = pool.k_proj.weight.view(heads, depth, width)
    scores = torch.einsum("nhd,hde->nhe", query, key) @ tokens.transpose(1, 2)  # (N, heads, L)
    attended = scores.softmax(dim=-1) @ tokens  # (N, heads, E)
    value = pool.v_proj.weight.view(heads, depth, width)
    values = torch.einsum("nhe,hde->nhd", attended, value).reshape(number, width)
    return pool.c_proj(values + pool.v_proj.bias)
