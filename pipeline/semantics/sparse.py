"""Soft labels of which only the largest probabilities are kept, with where they stand."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_SHORT = 2**16
"""Categories that an index of two bytes can tell apart."""


@dataclass(frozen=True)
class SparseLabels:
    """Rows of N boxes as `values` (N, K) float32 and the `columns` (N, K) where they stand.

    What a row's values leave of 1 is spread evenly over its other categories, so that a dense row
    sums to 1. `columns` is None where K is all `num_categories` in their order: the rows are exact.
    """

    values: NDArray[np.float32]
    columns: NDArray[np.uint16] | NDArray[np.int32] | None
    num_categories: int

    @classmethod
    def of(cls, labels: Tensor, top_k: int | None) -> "SparseLabels":
        """The `top_k` largest of each row of `labels` (N, C), or all; waits for their device.

        No probability moves by more than the smallest one kept, and a row by no more than twice
        its rest, in sum.
        """
        number = labels.shape[1]
        if top_k is None or top_k >= number:
            return cls(labels.float().cpu().numpy(), None, number)
        values, columns = labels.float().topk(top_k, dim=1)
        places = columns.cpu().numpy()
        packed = places.astype(np.uint16) if number <= MOST_SHORT else places.astype(np.int32)
        return cls(values.cpu().numpy(), packed, number)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        """Bytes of values and columns."""
        return self.values.nbytes + (0 if self.columns is None else self.columns.nbytes)

    def rest(self) -> NDArray[np.float32]:
        """(N,) the mass that is spread: the cross entropy with a row is wrong by what it weighs."""
        if self.columns is None:
            return np.zeros(len(self), dtype=np.float32)
        rest: NDArray[np.float32] = (1 - self.values.sum(axis=1)).clip(min=0)
        return rest

    def dense(self, device: torch.device | str) -> Tensor:
        """(N, C) float32 rows, made on `device` without waiting for it."""
        values = _tensor(self.values).to(device, non_blocking=True)
        if self.columns is None:
            return values
        columns = _tensor(self.columns.astype(np.int32)).to(device, non_blocking=True).long()
        return _spread(values, columns, self.num_categories)


def keep_largest(labels: Tensor, top_k: int | None) -> Tensor:
    """`SparseLabels.of(labels, top_k).dense()` on the labels' device, without waiting for it."""
    number = labels.shape[1]
    if top_k is None or top_k >= number:
        return labels
    return _spread(*labels.float().topk(top_k, dim=1), number)


def _spread(values: Tensor, columns: Tensor, number: int) -> Tensor:
    rest = (1 - values.sum(dim=1, keepdim=True)).clamp(min=0)
    rows = (rest / (number - values.shape[1])).repeat(1, number)
    return rows.scatter_(1, columns, values)


def _tensor(array: NDArray[np.float32] | NDArray[np.int32]) -> Tensor:
    """A tensor of an array that may not be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
