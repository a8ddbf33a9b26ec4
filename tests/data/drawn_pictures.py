"""Black pictures with a filled rectangle in each box, and where such colours are."""

import numpy as np
import torch
from PIL import Image

from pipeline.data.transforms import Picture, as_picture
from pipeline.recipe import Transforms

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=np.uint8)
SMALL = Transforms(
    short_sides=[90, 100, 140],
    max_side=300,
    crop_short_sides=[80, 120],
    crop_sizes=(60, 100),
    mosaic_cell=80,
)


def drawn(
    size: tuple[int, int], boxes: list[tuple[int, int, int, int]], labels: list[int]
) -> Picture:
    """Black, with a filled rectangle for each xyxy box in the colour of its label."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
        pixels[top:bottom, left:right] = COLOURS[label]
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return as_picture(Image.fromarray(pixels), array, np.array(labels, dtype=np.int64))


def extent(picture: Picture, label: int) -> list[float] | None:
    """xyxy of the pixels that have the colour of a label."""
    colour = torch.from_numpy(COLOURS[label]).int().view(3, 1, 1)
    far = (picture.image.int() - colour).abs().amax(dim=0)
    rows, columns = torch.nonzero(far < 100, as_tuple=True)
    if not len(rows):
        return None
    return [
        float(columns.min()),
        float(rows.min()),
        float(columns.max()) + 1,
        float(rows.max()) + 1,
    ]


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))
