"""The draw of federated columns: what is present, then others by the root of their count."""

import numpy as np
import pytest
import torch

from pipeline.detectors.interface import Shares
from pipeline.recipe import Losses
from pipeline.training.agreement import StepFacts
from pipeline.training.step_context import class_columns, loss_context


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


def facts(labelled: list[int], sampled: list[int]) -> StepFacts:
    counts = np.array(labelled), np.array(sampled)
    return StepFacts(3.0, *counts, Shares(), 2.0, stop=False, unshared=0)


def test_what_labels_of_whole_images_name_is_added_to_the_sample_and_marked() -> None:
    counts = np.array([1000, 100, 10, 1, 0, 500])
    section, device = Losses(federated_categories=3), torch.device("cpu")
    found = loss_context(
        facts([2, 0, 0, 1, 1, 0], [2, 0, 0, 0, 0, 0]), counts, section, 1, 7, device
    )
    sample = class_columns(np.array([2, 0, 0, 0, 0, 0]) > 0, counts, section, 1, 7)
    assert sample is not None and len(sample) == 3 and found.class_columns is not None
    assert set(found.class_columns.tolist()) == {*sample.tolist(), 3, 4}
    assert found.sampled_columns is not None
    assert found.class_columns[found.sampled_columns].tolist() == sample.tolist()
    assert (found.num_boxes, found.num_images) == (3.0, 2.0)
    alone = loss_context(
        facts([2, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]), counts, section, 1, 7, device
    )
    assert alone.class_columns is not None and alone.class_columns.tolist() == sample.tolist()
    assert alone.sampled_columns is None
    every = loss_context(facts([2, 0, 0, 1, 1, 0], [0] * 6), counts, Losses(), 1, 7, device)
    assert every.class_columns is None and every.sampled_columns is None


def test_where_there_is_nothing_to_draw_from_only_what_is_named_counts() -> None:
    """Without image counts there is no sample: that does not mean the whole vocabulary."""
    named, section = facts([0, 1, 0, 2], [0] * 4), Losses(federated_categories=2)
    found = loss_context(named, np.zeros(4, np.int64), section, 1, 7, torch.device("cpu"))
    assert found.class_columns is not None and found.class_columns.tolist() == [1, 3]
    assert found.sampled_columns is not None and not found.sampled_columns.any()
