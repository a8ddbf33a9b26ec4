"""The draw of federated columns: what is present, then others by the root of their count."""

import numpy as np
import pytest

from pipeline.recipe import Losses
from pipeline.training.step_context import class_columns


def test_federated_columns() -> None:
    counts = np.array([1000, 100, 10, 1, 0, 500, 50, 5, 2, 3])
    present = np.zeros(10, dtype=bool)
    present[[3, 4]] = True
    section = Losses(federated_categories=5)
    columns = class_columns(present, counts, section, seed=1, step=7)
    assert columns is not None and len(columns) == 5 and {3, 4} <= set(columns.tolist())
    assert columns.tolist() == class_columns(present, counts, section, seed=1, step=7).tolist()
    drawn = [
        class_columns(present, counts, section, seed=1, step=step).tolist() for step in range(2000)
    ]
    assert len({tuple(columns) for columns in drawn}) > 20
    often = np.bincount(np.concatenate(drawn), minlength=10) / 2000
    assert often[0] > often[5] > often[1] > often[6] > often[2] > often[8] > 0
    everything = np.ones(10, dtype=bool)
    assert class_columns(everything, counts, section, 1, 7).tolist() == list(range(10))
    assert class_columns(present, counts, Losses(federated_categories=0), 1, 7) is None
    assert class_columns(present, counts, Losses(federated_categories=10), 1, 7) is None


def test_the_first_drawn_column_has_the_stated_probability() -> None:
    counts = np.array([9, 1, 4])
    first = [
        int(class_columns(np.zeros(3, bool), counts, Losses(federated_categories=1), 0, step)[0])
        for step in range(6000)
    ]
    share = np.bincount(first, minlength=3) / 6000
    assert share == pytest.approx(np.array([3, 1, 2]) / 6, abs=0.02)
