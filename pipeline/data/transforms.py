"""Augmentation with torchvision v2 on tv_tensors; uint8 from the decoder to the device.

Crops and resizes are worked out first and done as one `resized_crop`. All randomness comes from
the generator that is passed in, because v2's random transforms draw from the global one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F

from pipeline.recipe import Transforms

PAD_VALUE = 114
"""Grey of a mosaic's empty corners (Mosaic in YOLOX and MMDetection)."""
MIN_SIDE = 1.0
"""A box that a crop leaves narrower than this, in pixels of the result, is dropped."""
MIN_MOSAIC_SIDE = 2.0


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with its boxes.

    `image` is (3, H, W) uint8, `boxes` (N, 4) float32 xyxy in pixels, `labels` (N,) int64.
    `vanished` counts the boxes that crops have left nothing of, so far.
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    vanished: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[1], self.image.shape[2]

    def normalised_boxes(self) -> Tensor:
        """Boxes (N, 4) as cxcywh fractions of the image."""
        height, width = self.size
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return box_convert(self.boxes.as_subclass(Tensor) / scale, "xyxy", "cxcywh")

    def keep(self, kept: Tensor) -> "Picture":
        """The same picture with the boxes for which `kept` (N,) bool is True."""
        boxes = self.boxes.as_subclass(Tensor)[kept]
        return replace(self, boxes=_boxes(boxes, self.size), labels=self.labels[kept])


class Rectangle(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


def as_picture(
    image: Image.Image, boxes: NDArray[np.float32], labels: NDArray[np.int64]
) -> Picture:
    """A decoded RGB image with its boxes, xyxy in pixels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return Picture(
        image=tv_tensors.Image(pixels),
        boxes=_boxes(torch.from_numpy(boxes.reshape(-1, 4)), pixels.shape[1:]),
        labels=torch.from_numpy(labels),
    )


def train_transform(picture: Picture, transforms: Transforms, rng: np.random.Generator) -> Picture:
    """Flip, DINO's crop branch (resize, crop), then a resize to one of the short sides."""
    flip, part = _flip_and_crop(picture.size, transforms, rng, transforms.crop_probability)
    short_side = _choose(transforms.short_sides, rng)
    size = fit_short_side((part.height, part.width), short_side, transforms.max_side)
    return _render(picture, part, size, flip)


def mosaic_transform(
    pictures: Sequence[Picture], transforms: Transforms, rng: np.random.Generator
) -> Picture:
    """Four pictures, each flipped and cropped by itself, around a random centre of one canvas.

    The canvas is twice `mosaic_cell` square. Each picture is scaled to fit a cell, stands against
    the centre, and is clipped by the canvas, as are its boxes.
    """
    cell = transforms.mosaic_cell
    centre_y, centre_x = (int(cell * rng.uniform(0.5, 1.5)) for _ in range(2))
    canvas = torch.full((3, 2 * cell, 2 * cell), PAD_VALUE, dtype=torch.uint8)
    boxes, labels, vanished = [], [], 0
    assert len(pictures) == 4
    for k, picture in enumerate(pictures):
        probability = transforms.extra_crop_probability
        flip, part = _flip_and_crop(picture.size, transforms, rng, probability)
        height, width = fit_inside((part.height, part.width), cell)
        piece = _render(picture, part, (height, width), flip)
        top = centre_y - height if k < 2 else centre_y
        left = centre_x - width if k % 2 == 0 else centre_x
        skip_y, skip_x = max(-top, 0), max(-left, 0)
        visible = piece.image[:, skip_y : 2 * cell - top, skip_x : 2 * cell - left]
        y, x = top + skip_y, left + skip_x
        canvas[:, y : y + visible.shape[1], x : x + visible.shape[2]] = visible
        boxes.append(piece.boxes + torch.tensor([left, top, left, top]))
        labels.append(piece.labels)
        vanished += piece.vanished
    placed = _boxes(torch.cat(boxes), canvas.shape[1:])
    return _without_vanished(
        Picture(
            image=tv_tensors.Image(canvas),
            boxes=F.clamp_bounding_boxes(placed),
            labels=torch.cat(labels),
            vanished=vanished,
        ),
        MIN_MOSAIC_SIDE,
    )


def evaluation_transform(picture: Picture, transforms: Transforms) -> Picture:
    """One resize, the same for every epoch; every box stays."""
    short_side, longest = transforms.evaluation_short_side, transforms.evaluation_max_side
    size = fit_short_side(picture.size, short_side, longest)
    return _resized_crop(picture, Rectangle(0, 0, *picture.size), size)


def fit_short_side(size: tuple[int, int], short_side: int, max_side: int) -> tuple[int, int]:
    """Scale (height, width) so that the short side is `short_side` and none is over `max_side`."""
    scale = min(short_side / min(size), max_side / max(size))
    return _scaled(size, scale, max_side)


def fit_inside(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Scale (height, width) to the largest that fits a square of `side`."""
    return _scaled(size, side / max(size), side)


def _scaled(size: tuple[int, int], scale: float, max_side: int) -> tuple[int, int]:
    # A very long and thin image keeps at least one pixel.
    height, width = (min(max(round(side * scale), 1), max_side) for side in size)
    return height, width


def _flip_and_crop(
    size: tuple[int, int],
    transforms: Transforms,
    rng: np.random.Generator,
    crop_probability: float,
) -> tuple[bool, Rectangle]:
    """Draw the flip and the part of an image of `size` that is kept."""
    flip = bool(rng.random() < transforms.flip_probability)
    if rng.random() >= crop_probability:
        return flip, Rectangle(0, 0, *size)
    # The crop is drawn in pixels of the resized image and made in those of the original.
    short_side = _choose(transforms.crop_short_sides, rng)
    spans = []
    for side, scaled in zip(
        size, fit_short_side(size, short_side, transforms.max_side), strict=True
    ):
        low, high = (min(bound, scaled) for bound in sorted(transforms.crop_sizes))
        length = _integer(low, high, rng)
        start = _integer(0, scaled - length, rng)
        first = min(round(start * side / scaled), side - 1)
        stop = max(round((start + length) * side / scaled), first + 1)
        spans.append((first, stop - first))
    (top, height), (left, width) = spans
    return flip, Rectangle(top, left, height, width)


def _render(picture: Picture, part: Rectangle, size: tuple[int, int], flip: bool) -> Picture:
    result = _resized_crop(picture, part, size)
    if flip:
        image, boxes = F.horizontal_flip(result.image), F.horizontal_flip(result.boxes)
        result = replace(result, image=image, boxes=boxes)
    if part == Rectangle(0, 0, *picture.size):
        return result
    return _without_vanished(result, MIN_SIDE)


def _resized_crop(picture: Picture, part: Rectangle, size: tuple[int, int]) -> Picture:
    """Only cuts and scales; boxes outside the part come back without area."""
    return Picture(
        image=F.resized_crop(picture.image, *part, list(size), antialias=True),
        boxes=F.resized_crop(picture.boxes, *part, list(size)),
        labels=picture.labels,
    )


def _without_vanished(picture: Picture, min_side: float) -> Picture:
    boxes = picture.boxes.as_subclass(Tensor)
    kept = (boxes[:, 2:] - boxes[:, :2] >= min_side).all(dim=1)
    return replace(picture.keep(kept), vanished=picture.vanished + int((~kept).sum()))


def _boxes(boxes: Tensor, size: Sequence[int]) -> tv_tensors.BoundingBoxes:
    canvas = (size[0], size[1])
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)


def _choose(values: Sequence[int], rng: np.random.Generator) -> int:
    return values[_integer(0, len(values) - 1, rng)]


def _integer(low: int, high: int, rng: np.random.Generator) -> int:
    """Uniform from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))
