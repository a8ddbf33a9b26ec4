"""How large the parts of each miniature world are."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """Categories whose counts of images fall evenly on a log axis from `most` to `least`."""

    categories: int
    most: int
    least: int

    def counts(self) -> list[int]:
        steps = np.geomspace(self.most, self.least, self.categories)
        return [int(count) for count in np.rint(steps)]


@dataclass(frozen=True)
class World:
    """Sizes of all parts; bands go from the most frequent categories to the rarest."""

    train: tuple[Band, ...]
    validation: tuple[Band, ...]
    objects365: Band
    imagenet_common: int
    """How many common categories have image-level data beside all the rare ones."""
    imagenet_images: tuple[int, int]
    captions: int
    version: int
    """Of what is drawn: a folder of another one is refused."""
    imagenet_sizes: tuple[float, float] = (0.45, 0.9)
    """Sizes of ImageNet's objects, as fractions of the shorter side of their image."""
    rare_shapes: tuple[str, ...] = ()
    """Shapes that rare categories have, and no other of LVIS or Objects365."""


WORLDS: dict[str, World] = {
    "tiny": World(
        train=(Band(6, 20, 11), Band(6, 9, 1)),
        validation=(Band(6, 6, 4), Band(6, 3, 2)),
        objects365=Band(6, 20, 6),
        imagenet_common=1,
        imagenet_images=(2, 4),
        captions=96,
        version=3,
    ),
    "quickstart": World(
        train=(Band(24, 212, 106), Band(24, 95, 12), Band(24, 10, 1)),
        validation=(Band(24, 25, 14), Band(24, 10, 7), Band(24, 7, 5)),
        objects365=Band(48, 400, 45),
        imagenet_common=8,
        imagenet_images=(20, 30),
        captions=6000,
        version=3,
    ),
    "benchmark": World(
        train=(Band(24, 700, 110), Band(24, 98, 12), Band(24, 10, 1)),
        validation=(Band(24, 130, 80), Band(24, 50, 35), Band(24, 30, 20)),
        objects365=Band(48, 2000, 220),
        imagenet_common=24,
        imagenet_images=(80, 120),
        captions=30000,
        version=4,
        imagenet_sizes=(0.7, 0.95),
        rare_shapes=("star", "cross"),
    ),
}
