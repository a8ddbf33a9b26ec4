"""SigLIP's ViTs: a map of the whole image, and the attention pool over each region's tokens."""

from collections.abc import Sequence

from open_clip.timm_model import TimmModel
from torch import Tensor

from pipeline.semantics.towers.regions import AT_ONCE, positions, read_regions, to_cells

_TOKENS_AT_ONCE = 32768


class SiglipRegions:
    """The head that SigLIP (Zhai et al., ICCV 2023) pools an image with, over RoIAlign's tokens.

    A region gives as many tokens as an image of the size that the tower was trained with.
    """

    def __init__(self, visual: TimmModel, image_scale: float) -> None:
        assert visual.trunk.num_prefix_tokens == 0
        self._visual, self._image_scale = visual, image_scale
        self._grid: tuple[int, int] = tuple(visual.trunk.patch_embed.grid_size)

    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionReader`."""
        trunk = self._visual.trunk
        cell = trunk.patch_embed.patch_size[0]
        pixels, rows = to_cells(pixels, boxes, cell, self._image_scale)
        states = trunk.patch_embed.proj(pixels)
        grid = (states.shape[2], states.shape[3])
        states = trunk.patch_embed.norm(states.flatten(2).transpose(1, 2))
        states = trunk.norm_pre(states + positions(trunk.pos_embed[0], self._grid, grid))
        states = trunk.norm(trunk.blocks(states))
        features = states.transpose(1, 2).unflatten(2, grid)
        at_once = min(max(_TOKENS_AT_ONCE // (self._grid[0] * self._grid[1]), 1), AT_ONCE)
        return read_regions(features, rows, self._grid, self._pool, at_once)

    def _pool(self, regions: Tensor) -> Tensor:
        tokens = regions.flatten(2).transpose(1, 2)
        return self._visual.head(self._visual.trunk.forward_head(tokens))
