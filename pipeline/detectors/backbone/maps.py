"""Feature maps: levels with masks, norms over their channels, sizes."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureMap(NamedTuple):
    """A level: `features` (B, C, h, w) and `mask` (B, h, w), True on padding."""

    features: Tensor
    mask: Tensor


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer where a group would have under four channels.

    Fewer channels make a group's statistics depend on a handful of values on small maps.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) bool to (B, *size), by the nearest pixel as in DETR."""
    return F.interpolate(mask[None].float(), size=size)[0].to(torch.bool)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """(..., H, W) with zeros below and to the right, up to multiples of `multiple`."""
    height, width = images.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return images
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
