"""Which part of an image is kept, and its size after; all draws, no pixels, free of torch.

The plan asks here how large an example will be before anybody has read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.data.plan.draws import draw
from pipeline.recipe import Transforms


class Rectangle(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class View:
    """A part of an image, brought to `size` (height, width), mirrored or not."""

    part: Rectangle
    size: tuple[int, int]
    flip: bool


def train_view(
    size: tuple[int, int],
    transforms: Transforms,
    rng: np.random.Generator,
    shape_seed: int | None = None,
) -> View:
    """Draw the view of a training photograph of `size` (height, width).

    Flip, DINO's crop branch (resize, crop), then a resize to one of the short sides, which is
    drawn from `shape_seed` where one is given; or large-scale jitter, where the recipe says so.
    """
    if transforms.large_scale_jitter:
        return _jittered_view(size, transforms, rng)
    flip, part = flip_and_crop(size, transforms, rng, transforms.crop_probability)
    if shape_seed is None:
        short_side = _choose(transforms.short_sides, rng)
    else:
        number = draw(shape_seed, "short side") % len(transforms.short_sides)
        short_side = transforms.short_sides[number]
    kept = fit_short_side((part.height, part.width), short_side, transforms.max_side)
    return View(part, kept, flip)


def flip_and_crop(
    size: tuple[int, int],
    transforms: Transforms,
    rng: np.random.Generator,
    crop_probability: float,
) -> tuple[bool, Rectangle]:
    """Draw the flip and the part of an image of `size` that is kept."""
    flip = bool(rng.random() < transforms.flip_probability)
    if rng.random() >= crop_probability:
        return flip, Rectangle(0, 0, *size)
    # The crop is drawn in pixels of the resized image and made in those of the original. As in
    # DINO that resize has no longest side: a panorama keeps the height that is asked for.
    scale = _choose(transforms.crop_short_sides, rng) / min(size)
    spans = []
    for side in size:
        scaled = round(side * scale)
        low, high = (min(bound, scaled) for bound in sorted(transforms.crop_sizes))
        length = _integer(low, high, rng)
        spans.append(_span(side, scaled, _integer(0, scaled - length, rng), length))
    (top, height), (left, width) = spans
    return flip, Rectangle(top, left, height, width)


def fit_short_side(size: tuple[int, int], short_side: int, max_side: int) -> tuple[int, int]:
    """Scale (height, width) so that the short side is `short_side` and none is over `max_side`."""
    scale = min(short_side / min(size), max_side / max(size))
    return _scaled(size, scale, max_side)


def fit_inside(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Scale (height, width) to the largest that fits a square of `side`."""
    return _scaled(size, side / max(size), side)


def canvas_divisor(transforms: Transforms) -> int:
    """What the sides of a training canvas are multiples of."""
    return transforms.canvas_multiple or transforms.size_divisor


def smallest_canvas(transforms: Transforms) -> int:
    """The side that no training canvas is below: the square of large-scale jitter, or 0."""
    return transforms.jitter_size if transforms.large_scale_jitter else 0


def largest_canvas(transforms: Transforms, num_images: int, *, mosaics: bool) -> tuple[int, int]:
    """(height, width) that no training batch of so many images exceeds, with its padding.

    A wide image beside a tall one makes a batch as high as it is wide; for one image the sides may
    stand for each other.
    """
    longest = transforms.max_side
    shortest = longest if num_images > 1 else min(max(transforms.short_sides), longest)
    if transforms.large_scale_jitter:
        shortest = longest = transforms.jitter_size
    cell = 2 * transforms.mosaic_cell if mosaics else 0
    divisor = canvas_divisor(transforms)
    height, width = (-(-max(side, cell) // divisor) * divisor for side in (shortest, longest))
    return height, width


def _jittered_view(size: tuple[int, int], transforms: Transforms, rng: np.random.Generator) -> View:
    """A random scale, and of what is over the square a random part (Ghiasi et al. 2021)."""
    flip = bool(rng.random() < transforms.flip_probability)
    square = transforms.jitter_size
    low, high = transforms.jitter_scales
    scale = square * (low + (high - low) * rng.random()) / max(size)
    spans, kept = [], []
    for side in size:
        scaled = max(round(side * scale), 1)
        length = min(scaled, square)
        spans.append(_span(side, scaled, _integer(0, scaled - length, rng), length))
        kept.append(length)
    (top, height), (left, width) = spans
    return View(Rectangle(top, left, height, width), (kept[0], kept[1]), flip)


def _span(side: int, scaled: int, start: int, length: int) -> tuple[int, int]:
    """(first, length) in pixels of the original of a span in those of the scaled image."""
    first = min(round(start * side / scaled), side - 1)
    stop = max(round((start + length) * side / scaled), first + 1)
    return first, stop - first


def _scaled(size: tuple[int, int], scale: float, max_side: int) -> tuple[int, int]:
    # A very long and thin image keeps at least one pixel.
    height, width = (min(max(round(side * scale), 1), max_side) for side in size)
    return height, width


def _choose(values: Sequence[int], rng: np.random.Generator) -> int:
    return values[_integer(0, len(values) - 1, rng)]


def _integer(low: int, high: int, rng: np.random.Generator) -> int:
    """Uniform from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))
