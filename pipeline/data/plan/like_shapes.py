"""Slots of a global batch in the order of their shapes, so that little of a batch is padding.

Free of torch. What is in the batch stays as it is: only its order changes, and all of its
photographs get one short side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan.draws import generator
from pipeline.data.plan.geometry import train_view
from pipeline.data.plan.slot import Slot
from pipeline.recipe import Transforms


@dataclass(frozen=True)
class LikeShapes:
    """How the slots of a global batch are dealt to ranks in micro-batches of like shapes.

    `sizes` are the heights and widths, (N,) each, of the images of every source by its name. The
    size of an example follows from them and its slot, crops included, so none has to be read.
    """

    sizes: Mapping[str, tuple[NDArray[np.integer], NDArray[np.integer]]]
    transforms: Transforms
    micro_batch: int

    def arrange(self, slots: Sequence[Slot], shape_seed: int) -> list[Slot]:
        """Slots from wide to tall, mosaics last, all with the `shape_seed` of their step."""
        seeded = [replace(slot, shape_seed=shape_seed) for slot in slots]

        def shape(slot: Slot) -> tuple[bool, float, int]:
            height, width = self.size_of(slot)
            return _is_mosaic(slot), height / width, height

        return sorted(seeded, key=shape)

    def deal(self, slots: Sequence[Slot], rank: int, world_size: int) -> list[Slot]:
        """One rank's whole micro-batches of an arranged batch.

        In each micro-step the ranks have neighbouring parts of it, so that none waits for another.
        Parts that are a slot short are padded with weight 0.
        """
        most = -(-len(slots) // world_size)
        count = -(-most // self.micro_batch)
        parts = world_size * count
        size = -(-len(slots) // parts)
        dealt: list[Slot] = []
        for part in range(rank, parts, world_size):
            start, stop = part * len(slots) // parts, (part + 1) * len(slots) // parts
            dealt.extend(slots[start:stop])
            padding = replace(slots[start], weight=0)
            dealt.extend([padding] * (size - (stop - start)))
        return dealt

    def size_of(self, slot: Slot) -> tuple[int, int]:
        """(height, width) of a slot's example, as it will be when its image is readable."""
        if _is_mosaic(slot):
            return 2 * self.transforms.mosaic_cell, 2 * self.transforms.mosaic_cell
        heights, widths = self.sizes[slot.source]
        size = int(heights[slot.index]), int(widths[slot.index])
        return train_view(size, self.transforms, generator(slot.seed), slot.shape_seed).size


def _is_mosaic(slot: Slot) -> bool:
    return slot.stream == "extra" and bool(slot.partners)
