"""Readings on their way from a reader process: pixels in memory that both sides keep mapped.

A tensor that is sent costs a file, a handshake, and a fault for each page on both sides: for a
photograph of 800x1066 about as much time as its decoding. So both sides map a few slabs once.
Images are collated into one, and it is used again when nothing in the training process looks at
them any more.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.data.batch import Batch, Targets, batch_views
from pipeline.data.stream.reader import Reading

NO_SLAB = -1


class Slabs:
    """`number` slabs of `num_bytes` in shared memory; a page takes memory once it is written to.

    Picklable to a process that is being started. Only the process that made them gives them out.
    """

    def __init__(self, number: int, num_bytes: int) -> None:
        storage = torch.UntypedStorage._new_shared(number * num_bytes)
        self._memory = torch.empty(0, dtype=torch.uint8).set_(storage).view(number, num_bytes)
        self._free = deque(range(number))

    def take(self) -> int:
        """The number of a slab that nobody uses, or `NO_SLAB`."""
        return self._free.pop() if self._free else NO_SLAB

    def give_back(self, slab: int) -> None:
        """The slab may be taken again."""
        if slab != NO_SLAB:
            self._free.append(slab)

    def memory(self, slab: int) -> Tensor | None:
        """The bytes of a slab."""
        return None if slab == NO_SLAB else self._memory[slab]

    def lend(self, slab: int) -> Tensor:
        """The bytes of a slab, which is free when the last tensor that shares them is gone."""
        array = self._memory[slab].numpy()
        weakref.finalize(array, self._free.append, slab).atexit = False
        return torch.from_numpy(array)


@dataclass(frozen=True)
class PackedReading:
    """A reading without its batch, and that in a form that is quickly sent.

    `shape` is (B, H, W) of the images where they are in slab number `slab`; else they are `tensors`
    (images and mask), or there is no batch and nothing is there.
    """

    reading: Reading
    slab: int
    shape: tuple[int, int, int] | None = None
    tensors: tuple[Tensor, Tensor] | None = None
    targets: Sequence[dict[str, Any]] = ()
    source: Sequence[str] = ()
    sample_ids: Sequence[str] = ()


def pack(reading: Reading, slabs: Slabs, slab: int) -> PackedReading:
    """The reading for another process."""
    batch = reading.batch
    if batch is None:
        return PackedReading(reading, slab)
    # Boxes and labels are small: numpy arrays travel inside the message.
    targets = [
        {**vars(t), "boxes": t.boxes.numpy(), "labels": t.labels.numpy()} for t in batch.targets
    ]
    memory = slabs.memory(slab)
    number, height, width = batch.mask.shape
    lies_there = memory is not None and batch.images.data_ptr() == memory.data_ptr()
    return PackedReading(
        reading=replace(reading, batch=None),
        slab=slab,
        shape=(number, height, width) if lies_there else None,
        tensors=None if lies_there else (batch.images, batch.mask),
        targets=targets,
        source=batch.source,
        sample_ids=batch.sample_ids,
    )


def unpack(packed: PackedReading, slabs: Slabs, *, pin_memory: bool) -> Reading:
    """The reading that was packed; its slab is free when the images are gone."""
    if packed.shape is not None:
        memory = slabs.lend(packed.slab)
        images, mask = batch_views(memory, packed.shape)
    else:
        slabs.give_back(packed.slab)
        if packed.tensors is None:
            return packed.reading
        images, mask = packed.tensors
    targets = [Targets(**fields) for fields in map(_with_tensors, packed.targets)]
    batch = Batch(images, mask, targets, list(packed.source), list(packed.sample_ids))
    return replace(packed.reading, batch=batch.pin_memory() if pin_memory else batch)


def _with_tensors(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, **{name: torch.from_numpy(fields[name]) for name in ("boxes", "labels")}}
