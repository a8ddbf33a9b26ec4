"""Boxes of one image, with what is in them, pasted into another (of boxes: there are no masks).

After Ghiasi et al. 2021, whose pastes are cut out along masks: here the whole rectangle comes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from pipeline.data.plan.geometry import Rectangle
from pipeline.data.transforms import MIN_SIDE, Picture, as_boxes
from pipeline.recipe import Transforms

MOST_OF_A_SIDE = 0.5
"""What is pasted is made smaller where it would take more than this share of a side."""
MIN_PASTED_SIDE = 4
"""A box that would be pasted smaller, in pixels, is not."""


@dataclass(frozen=True, slots=True)
class Pasted:
    """A picture with what was pasted in. `num_hidden` boxes are gone, covered by pasted ones."""

    picture: Picture
    num_pasted: int
    num_hidden: int


def copy_paste(
    picture: Picture, partner: Picture, transforms: Transforms, rng: np.random.Generator
) -> Pasted:
    """Paste up to `copy_paste_boxes` boxes of `partner` into `picture`, at random places.

    Each category of the partner is as likely as any other, and then each of its boxes, so that a
    rare one beside a crowd is not passed over. A rectangle keeps its size relative to the image's
    short side, times a draw of `copy_paste_scales`, and is mirrored or not. Other boxes of the
    partner come along where no more than the share `copy_paste_hidden` of them is cut off. Boxes
    of which pasted rectangles cover more than that share are left out, the others end where they
    are still seen.
    """
    number = 1 + int(rng.random() * transforms.copy_paste_boxes)
    image = picture.image.clone()
    topmost = np.zeros(picture.size, dtype=np.int64)
    boxes, labels, layers = [_array(picture)], [picture.labels], [0] * len(picture.labels)
    origins = [picture.origin]
    for layer, box in enumerate(_choose_boxes(partner, number, rng), start=1):
        part = _outline(_array(partner)[box], partner.size)
        place = _place(part, partner.size, picture.size, transforms, rng)
        flip = bool(rng.random() < transforms.flip_probability)
        if place is None:
            continue
        top, left, height, width = place
        patch = F.resized_crop(partner.image, *part, [height, width], antialias=True)
        image[:, top : top + height, left : left + width] = patch.flip(2) if flip else patch
        topmost[top : top + height, left : left + width] = layer
        within, kept = _boxes_within(partner, part, place, flip, transforms.copy_paste_hidden)
        boxes.append(within)
        labels.append(partner.labels[torch.from_numpy(kept)])
        origins.append(partner.origin[kept])
        layers.extend([layer] * len(within))
    together = np.concatenate(boxes)
    seen = np.array(
        [
            _cut_to_seen(box, topmost, layer, transforms.copy_paste_hidden)
            for box, layer in zip(together, layers, strict=True)
        ],
        dtype=bool,
    )
    pasted = replace(
        picture,
        image=tv_tensors.Image(image),
        boxes=as_boxes(torch.from_numpy(together), picture.size),
        labels=torch.cat(labels),
        origin=np.concatenate(origins),
    ).keep(torch.from_numpy(seen))
    return Pasted(pasted, len(together) - len(picture.labels), int((~seen).sum()))


def _choose_boxes(picture: Picture, number: int, rng: np.random.Generator) -> list[int]:
    """Up to `number` different boxes: a category, then one of its boxes that are left."""
    left: dict[int, list[int]] = {}
    for box, label in enumerate(picture.labels.tolist()):
        left.setdefault(label, []).append(box)
    chosen: list[int] = []
    while left and len(chosen) < number:
        label = list(left)[int(rng.random() * len(left))]
        chosen.append(left[label].pop(int(rng.random() * len(left[label]))))
        if not left[label]:
            del left[label]
    return chosen


def _outline(box: NDArray[np.float32], size: tuple[int, int]) -> Rectangle:
    """The whole pixels that a box touches."""
    left, top = np.floor(box[:2]).astype(int).clip(0, [size[1] - 1, size[0] - 1]).tolist()
    right, bottom = np.ceil(box[2:]).astype(int).clip([left + 1, top + 1], size[::-1]).tolist()
    return Rectangle(top, left, bottom - top, right - left)


def _place(
    part: Rectangle,
    partner_size: tuple[int, int],
    size: tuple[int, int],
    transforms: Transforms,
    rng: np.random.Generator,
) -> Rectangle | None:
    """Where in an image of `size` a part of another goes; None where it would be too small."""
    low, high = transforms.copy_paste_scales
    scale = (low + (high - low) * rng.random()) * min(size) / min(partner_size)
    room = MOST_OF_A_SIDE * min(size[0] / part.height, size[1] / part.width)
    height, width = (int(side * min(scale, room)) for side in (part.height, part.width))
    down, right = rng.random(), rng.random()
    if min(height, width) < MIN_PASTED_SIDE:
        return None
    top, left = int(down * (size[0] - height + 1)), int(right * (size[1] - width + 1))
    return Rectangle(top, left, height, width)


def _boxes_within(
    partner: Picture, part: Rectangle, place: Rectangle, flip: bool, hidden: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The partner's boxes that are mostly within `part`, as they lie at `place`; and which."""
    boxes = _array(partner)
    corner = np.array([part.left, part.top], dtype=np.float32)
    low = (boxes[:, :2] - corner).clip(0, [part.width, part.height])
    high = (boxes[:, 2:] - corner).clip(0, [part.width, part.height])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept = area - (high - low).prod(axis=1) <= hidden * area
    scale = np.array([place.width / part.width, place.height / part.height])
    low, high = low * scale, high * scale
    if flip:
        low[:, 0], high[:, 0] = place.width - high[:, 0], place.width - low[:, 0]
    kept &= (high - low >= MIN_PASTED_SIDE / 2).all(axis=1)
    origin = np.array([place.left, place.top])
    placed = np.concatenate([low + origin, high + origin], axis=1).astype(np.float32)
    return placed[kept], kept


def _cut_to_seen(
    box: NDArray[np.float32], topmost: NDArray[np.int64], layer: int, hidden: float
) -> bool:
    """Move the edges of a box to what later layers leave of it; False where that is too little."""
    height, width = topmost.shape
    part = _outline(box, (height, width))
    rows, columns = (
        slice(part.top, part.top + part.height),
        slice(part.left, part.left + part.width),
    )
    seen = topmost[rows, columns] <= layer
    if seen.all():
        return True
    if (~seen).mean() > hidden or not seen.any():
        return False
    across, down = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    box[:2] = np.maximum(box[:2], [part.left + across[0], part.top + down[0]])
    box[2:] = np.minimum(box[2:], [part.left + across[-1] + 1, part.top + down[-1] + 1])
    return bool((box[2:] - box[:2] >= MIN_SIDE).all())


def _array(picture: Picture) -> NDArray[np.float32]:
    array: NDArray[np.float32] = picture.boxes.as_subclass(Tensor).numpy()
    return array
