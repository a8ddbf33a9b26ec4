"""Augmentation with torchvision v2 on tv_tensors; uint8 from the decoder to the device.

Crops and resizes are worked out first and done as one `resized_crop`. All randomness comes from
the generator that is passed in, because v2's random transforms draw from the global one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from pipeline.data.plan.geometry import (
    Rectangle,
    fit_inside,
    fit_short_side,
    flip_and_crop,
    train_view,
)
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
    `vanished` counts the boxes that crops have left nothing of, so far. `origin` (N, 2) says which
    boxes they are: the number of the sample in its index, and of the box in the sample.
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    origin: NDArray[np.int64]
    vanished: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[1], self.image.shape[2]

    def normalised_boxes(self) -> Tensor:
        """Boxes (N, 4) as cxcywh fractions of the image."""
        height, width = self.size
        # numpy's calls take a fraction of torch's, which is most of the time for so few numbers.
        scale = np.array([width, height, width, height], dtype=np.float32)
        corners = self.boxes.as_subclass(Tensor).numpy() / scale
        low, high = corners[:, :2], corners[:, 2:]
        return torch.from_numpy(np.concatenate([(low + high) / 2, high - low], axis=1))

    def keep(self, kept: Tensor) -> "Picture":
        """The same picture with the boxes for which `kept` (N,) bool is True."""
        boxes = as_boxes(self.boxes.as_subclass(Tensor)[kept], self.size)
        labels, origin = self.labels[kept], self.origin[kept.numpy()]
        return replace(self, boxes=boxes, labels=labels, origin=origin)


def as_picture(
    image: Image.Image | NDArray[np.uint8],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    origin: NDArray[np.int64] | None = None,
) -> Picture:
    """A decoded RGB image with its boxes, xyxy in pixels; an (H, W, 3) array is not copied.

    Without an `origin` its boxes are all those of sample 0.
    """
    array = image if isinstance(image, np.ndarray) else np.array(image)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    return Picture(
        image=tv_tensors.Image(pixels),
        boxes=as_boxes(torch.from_numpy(boxes.reshape(-1, 4)), pixels.shape[1:]),
        labels=torch.from_numpy(labels),
        origin=origins(0, len(labels)) if origin is None else origin,
    )


def origins(sample: int, number: int) -> NDArray[np.int64]:
    """(N, 2) of all `number` boxes of a sample."""
    return np.stack([np.full(number, sample), np.arange(number)], axis=1)


def train_transform(
    picture: Picture,
    transforms: Transforms,
    rng: np.random.Generator,
    shape_seed: int | None = None,
) -> Picture:
    """A training photograph as `geometry.train_view` draws it."""
    view = train_view(picture.size, transforms, rng, shape_seed)
    result = _render(picture, view.part, view.size, view.flip)
    # Jitter makes an image up to ten times smaller, with all that is in it.
    return _without_vanished(result, MIN_SIDE) if transforms.large_scale_jitter else result


def mosaic_transform(
    pictures: Sequence[Picture], transforms: Transforms, rng: np.random.Generator
) -> Picture:
    """Four pictures, each flipped and cropped by itself, around a random centre of one canvas.

    The canvas is twice `mosaic_cell` square. Each picture is scaled to fit a cell, stands against
    the centre, and is clipped by the canvas, as are its boxes.
    """
    cell = transforms.mosaic_cell
    centre_y, centre_x = (int(cell * rng.uniform(0.5, 1.5)) for _ in range(2))
    canvas = torch.full((2 * cell, 2 * cell, 3), PAD_VALUE, dtype=torch.uint8).permute(2, 0, 1)
    boxes, labels, origins, vanished = [], [], [], 0
    assert len(pictures) == 4
    for k, picture in enumerate(pictures):
        probability = transforms.extra_crop_probability
        flip, part = flip_and_crop(picture.size, transforms, rng, probability)
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
        origins.append(piece.origin)
        vanished += piece.vanished
    placed = as_boxes(torch.cat(boxes), canvas.shape[1:])
    return _without_vanished(
        Picture(
            image=tv_tensors.Image(canvas),
            boxes=F.clamp_bounding_boxes(placed),
            labels=torch.cat(labels),
            origin=np.concatenate(origins),
            vanished=vanished,
        ),
        MIN_MOSAIC_SIDE,
    )


def evaluation_transform(picture: Picture, transforms: Transforms) -> Picture:
    """One resize, the same for every epoch; every box stays."""
    short_side, longest = transforms.evaluation_short_side, transforms.evaluation_max_side
    size = fit_short_side(picture.size, short_side, longest)
    return _resized_crop(picture, Rectangle(0, 0, *picture.size), size)


def draw_boxes(picture: Picture, number: int, rng: np.random.Generator) -> Picture:
    """`number` of the picture's boxes, each as likely as any other, in their order."""
    kept = torch.zeros(len(picture.labels), dtype=torch.bool)
    kept[torch.from_numpy(rng.permutation(len(kept))[:number])] = True
    return picture.keep(kept)


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
    # Pixels stay interleaved, as they are decoded. A part that is cut out of them has gaps between
    # its rows, with which the resize takes three times as long, so it is copied first.
    cut = F.crop(picture.image, *part).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return Picture(
        image=F.resize(tv_tensors.wrap(cut, like=picture.image), list(size), antialias=True),
        boxes=F.resized_crop(picture.boxes, *part, list(size)),
        labels=picture.labels,
        origin=picture.origin,
    )


def _without_vanished(picture: Picture, min_side: float) -> Picture:
    boxes = picture.boxes.as_subclass(Tensor).numpy()
    kept = (boxes[:, 2:] - boxes[:, :2] >= min_side).all(axis=1)
    if kept.all():
        return picture
    vanished = picture.vanished + len(kept) - int(kept.sum())
    return replace(picture.keep(torch.from_numpy(kept)), vanished=vanished)


def as_boxes(boxes: Tensor, size: Sequence[int]) -> tv_tensors.BoundingBoxes:
    canvas = (size[0], size[1])
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
