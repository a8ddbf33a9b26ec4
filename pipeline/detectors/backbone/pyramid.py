"""The simple feature pyramid of ViTDet (Li et al. 2022): all levels from one map."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.detectors.backbone.maps import ChannelNorm

CHANNELS = 256
LEVELS = 4


class MaxPool(nn.Module):
    """Half the size, by the largest of each 2x2; an odd edge is a cell of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=2, ceil_mode=True)


class SimplePyramid(nn.Module):
    """Levels of `CHANNELS` channels from a map (B, dim, h, w) at the patch's stride.

    `indices` choose among 4, 2, 1 and 1/2 times its size: strides 4, 8, 16 and 32 for patches of
    16. Two, one or no deconvolutions or a max-pooling are followed by a 1x1 and a 3x3 convolution
    without bias, each with LayerNorm over channels.
    """

    def __init__(self, dim: int, indices: list[int]) -> None:
        super().__init__()
        self.indices = indices
        self.levels = nn.ModuleList(_level(dim, index) for index in indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


def _level(dim: int, index: int) -> nn.Sequential:
    parts: list[nn.Module]
    if index == 0:
        parts = [
            nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2),
            ChannelNorm(dim // 2, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, kernel_size=2, stride=2),
        ]
        dim = dim // 4
    elif index == 1:
        parts = [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)]
        dim = dim // 2
    elif index == 2:
        parts = []
    else:
        parts = [MaxPool()]
    return nn.Sequential(
        *parts,
        nn.Conv2d(dim, CHANNELS, kernel_size=1, bias=False),
        ChannelNorm(CHANNELS, eps=1e-6),
        nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1, bias=False),
        ChannelNorm(CHANNELS, eps=1e-6),
    )
