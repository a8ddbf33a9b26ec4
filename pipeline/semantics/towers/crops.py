"""Any tower: each box cut out of the image and resized to what the tower was trained with."""

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.semantics.towers.regions import read_regions, rows_of

_PIXELS_AT_ONCE = 64 * 224 * 224


class CropRegions:
    """Regions as images (ViLD, Gu et al., ICLR 2022, without its second, wider crop).

    The box's edges are not rounded, and its aspect is not kept: the whole of it becomes the square.
    A pixel of the crop is the mean of bilinear samples, about one for each pixel that it covers, so
    large boxes do not alias. Boxes of all images go through the tower in parts of bounded memory.
    """

    def __init__(self, visual: nn.Module, size: tuple[int, int]) -> None:
        self._visual, self._size = visual, size
        self._at_once = max(_PIXELS_AT_ONCE // (size[0] * size[1]), 1)

    def __call__(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionReader`."""
        return read_regions(pixels, rows_of(boxes), self._size, self._embed, self._at_once)

    def _embed(self, crops: Tensor) -> Tensor:
        found = self._visual(crops)
        # Towers that also train a captioner (CoCa) give their tokens too.
        return found[0] if isinstance(found, tuple) else found
