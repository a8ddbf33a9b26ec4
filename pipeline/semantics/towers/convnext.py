"""ConvNeXt CLIPs: the trunk once, the mean of each region, the head."""

from collections.abc import Sequence

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor

from pipeline.semantics.towers.regions import read_regions, to_cells

_STRIDE = 32


class ConvNextRegions:
    """The tower's own pooling, a mean, over a region (FC-CLIP, Yu et al., NeurIPS 2023)."""

    def __init__(self, visual: TimmModel, image_scale: float) -> None:
        self._visual, self._image_scale = visual, image_scale

    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionReader`."""
        pixels, rows = to_cells(pixels, boxes, _STRIDE, self._image_scale)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features = self._visual.trunk.forward_features(pixels)
        return read_regions(features, rows, 1, self._head)

    def _head(self, regions: Tensor) -> Tensor:
        return self._visual.head(self._visual.trunk.forward_head(regions))
