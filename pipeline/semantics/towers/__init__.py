"""Image towers of CLIP, each with a way to read the regions of an image."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class RegionReader(Protocol):
    """Reads boxes with a frozen image tower."""

    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """(N, D) embeddings of all boxes, image after image, of any length.

        `pixels` (B, 3, H, W) are images of one size without padding, normalised as the tower wants;
        `boxes` holds each image's (N_i, 4) xyxy in pixels.
        """
