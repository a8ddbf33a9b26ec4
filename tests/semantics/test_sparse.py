"""Sparse soft labels: what is kept is kept exactly, what is not is bounded, and it is small."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.semantics.sparse import SparseLabels, keep_largest


def rows(number: int = 7, categories: int = 50, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(number, categories, generator=generator)).softmax(dim=1)


@pytest.mark.parametrize("top_k", [None, 50, 51, 1000])
def test_all_of_them_are_the_rows_bit_by_bit(top_k: int | None) -> None:
    sparse = SparseLabels.of(rows(), top_k)
    assert torch.equal(sparse.dense("cpu"), rows())
    assert keep_largest(rows(), top_k).equal(rows())
    assert sparse.columns is None and sparse.num_bytes == 7 * 50 * 4
    assert (sparse.rest() == 0).all()


@pytest.mark.parametrize("top_k", [1, 8, 49])
def test_the_largest_are_exact_and_the_rest_is_spread_evenly(top_k: int) -> None:
    exact = rows()
    sparse = SparseLabels.of(exact, top_k)
    dense = sparse.dense("cpu")
    assert torch.equal(keep_largest(exact, top_k), dense), "the same where nothing is packed"
    for row, ours, rest in zip(exact.double().numpy(), dense.numpy(), sparse.rest(), strict=True):
        order = np.argsort(-row, kind="stable")
        kept, others = order[:top_k], order[top_k:]
        assert ours[kept].tolist() == row[kept].tolist()
        assert rest == pytest.approx(row[others].sum(), abs=1e-6)
        # The rest is 1 less what is kept, in float32.
        assert ours[others] == pytest.approx(np.full(len(others), row[others].mean()), abs=3e-7)
    assert dense.sum(dim=1).tolist() == pytest.approx([1.0] * 7, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_the_error_is_within_what_is_promised(top_k: int) -> None:
    exact = rows(40, 200, seed=1)
    sparse = SparseLabels.of(exact, top_k)
    error = (sparse.dense("cpu") - exact).abs()
    smallest = exact.sort(dim=1, descending=True).values[:, top_k - 1]
    assert (error.max(dim=1).values <= smallest + 1e-7).all()
    assert (error.sum(dim=1) <= 2 * torch.from_numpy(sparse.rest()) + 1e-6).all()
    assert error.max() > 0


def test_one_row_that_is_certain_and_none_at_all() -> None:
    certain = torch.zeros(1, 5)
    certain[0, 3] = 1.0
    assert torch.equal(SparseLabels.of(certain, 2).dense("cpu"), certain)
    empty = SparseLabels.of(torch.zeros(0, 5), 2)
    assert empty.dense("cpu").shape == (0, 5) and len(empty) == 0 and empty.num_bytes == 0


@pytest.mark.parametrize(("categories", "width"), [(1203, 2), (65536, 2), (65537, 4)])
def test_a_row_takes_few_bytes(categories: int, width: int) -> None:
    exact = rows(2, categories)
    sparse = SparseLabels.of(exact, 32)
    assert sparse.num_bytes == 2 * 32 * (4 + width)
    assert torch.equal(sparse.dense("cpu").argmax(dim=1), exact.argmax(dim=1))
    # A photograph of 300 boxes, the most that an image has, at the paper's size.
    assert 300 * sparse.num_bytes / 2 < 3 * 800 * 1066 / 20


def test_rows_come_back_from_memory_that_may_not_be_written_to() -> None:
    sparse = SparseLabels.of(rows(), 4)
    for array in (sparse.values, sparse.columns):
        assert array is not None
        array.flags.writeable = False
    assert torch.equal(sparse.dense("cpu"), SparseLabels.of(rows(), 4).dense("cpu"))
