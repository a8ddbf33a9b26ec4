"""What all readers share: boxes in cells of a map, RoIAlign in parts, positions of any grid."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

AT_ONCE = 256
"""Boxes that are read together, however many a batch has: it bounds the memory."""


def rows_of(boxes: Sequence[Tensor], scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """(N, 5) index of the image and xyxy of each box, times `scale` (of x, of y)."""
    index = [box.new_full((len(box), 1), i) for i, box in enumerate(boxes)]
    factors = torch.tensor([1.0, *scale, *scale])
    rows = torch.cat([torch.cat(index), torch.cat(list(boxes))], dim=1)
    return rows * factors.to(rows, non_blocking=True)


def read_regions(
    features: Tensor,
    rows: Tensor,
    grid: int | tuple[int, int],
    read: Callable[[Tensor], Tensor],
    at_once: int = AT_ONCE,
) -> Tensor:
    """(N, D): `read` of each region, (n, E, *grid), of a map (B, E, h, w).

    `rows` (N, 5) are boxes in cells of the map. Each bin is the mean of as many bilinear samples as
    it has cells (RoIAlign, He et al. 2017, without rounding and aligned to cells' centres).
    """
    return torch.cat(
        [
            read(roi_align(features, part, grid, 1.0, sampling_ratio=0, aligned=True))
            for part in rows.split(at_once)
        ]
    )


def to_cells(
    pixels: Tensor, boxes: Sequence[Tensor], cell: int, image_scale: float
) -> tuple[Tensor, Tensor]:
    """Images resized by `image_scale` to whole cells of `cell` pixels, and rows of boxes in cells.

    Each side is rounded to the nearest multiple by resizing, so that no padding is seen.
    """
    height, width = pixels.shape[-2:]
    cells = [max(round(side * image_scale / cell), 1) for side in (height, width)]
    size = [number * cell for number in cells]
    if size != [height, width]:
        shrinks = size[0] < height or size[1] < width
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=shrinks)
    return pixels, rows_of(boxes, (cells[1] / width, cells[0] / height))


def positions(embedding: Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positional embeddings (P + h * w, E) of a `trained` grid (h, w) for another grid.

    The first P rows are of tokens without a place. Bicubic, as open_clip does for weights of
    another resolution.
    """
    if grid == trained:
        return embedding
    number = trained[0] * trained[1]
    free, placed = embedding[:-number], embedding[-number:]
    placed = placed.T.reshape(1, -1, *trained)
    placed = F.interpolate(placed, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([free, placed.flatten(2)[0].T])
