"""Where training gets soft labels from: asked for ahead, taken when they are needed."""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.batch import Batch, Targets
from pipeline.semantics.sparse import SparseLabels, keep_largest


class LabelMaker(Protocol):
    """What a teacher does: `Teacher`, or what stands in for it in a benchmark."""

    temperature: float

    def soft_labels(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, C) float32 distributions, on the batch's device."""


class SoftLabels(Protocol):
    """A source of soft labels. Batches are asked for in the order in which they are taken."""

    @property
    def temperature(self) -> float:
        """What the teacher multiplies cosines by before its softmax; the branch does so too."""

    @property
    def batches_ahead(self) -> int:
        """How many steps are to be asked for before their labels are taken."""

    def ask(self, batch: Batch) -> None:
        """Begin to make the labels of a batch, which is as the stream gave it."""

    def labels(self, batch: Batch) -> list[Tensor]:
        """Each image's (N_i, C) float32 distributions, on the batch's device.

        `batch` is the earliest that was asked for and not taken, and may have moved to a device.
        """


class InProcess:
    """The teacher in the training process: labels are made when they are taken."""

    batches_ahead = 0

    def __init__(self, teacher: LabelMaker, top_k: int | None) -> None:
        self._teacher, self._top_k = teacher, top_k
        self.temperature = teacher.temperature

    def ask(self, batch: Batch) -> None:
        """Nothing: there is nobody else to work on it."""

    def labels(self, batch: Batch) -> list[Tensor]:
        """See `SoftLabels`."""
        labels = self._teacher.soft_labels(batch)
        return [keep_largest(rows, self._top_k) for rows in labels]


def dense_labels(sparse: SparseLabels, batch: Batch) -> list[Tensor]:
    """The rows of a batch's boxes, in their order, as (N_i, C) for each image, on its device."""
    counts = [len(target.boxes) for target in batch.targets]
    return list(sparse.dense(batch.images.device).split(counts))


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way to another process: `images` (B, H, W, 3) uint8, `mask` (B, H, W)."""

    images: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    targets: list[dict[str, Any]]
    sample_ids: list[str]

    @classmethod
    def of(cls, batch: Batch) -> "PackedBatch":
        """A batch that is on the CPU; its pixels are not copied, for they are interleaved there."""
        targets = [
            {**vars(t), "boxes": t.boxes.numpy(), "labels": t.labels.numpy()} for t in batch.targets
        ]
        images = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
        return cls(images, batch.mask.numpy(), targets, batch.sample_ids)

    def batch(self) -> Batch:
        """The batch, on arrays that may not be written to."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            images = torch.from_numpy(self.images).permute(0, 3, 1, 2)
            mask = torch.from_numpy(self.mask)
            targets = [
                Targets(**{**t, **{k: torch.from_numpy(t[k]) for k in ("boxes", "labels")}})
                for t in self.targets
            ]
        return Batch(images, mask, targets, [], self.sample_ids)
