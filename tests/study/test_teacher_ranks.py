"""Ranks of ground-truth boxes under a teacher whose answers are known, and jittered boxes."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Batch, Targets
from pipeline.study import teacher_ranks
from pipeline.study.jitter import jittered
from pipeline.study.teacher_ranks import BoxRanks, rank_boxes, top, top_of_categories

NUM_CATEGORIES = 6


def targets(image_id: int, labels: list[int], size: tuple[int, int] = (50, 80)) -> Targets:
    rng = np.random.default_rng(image_id)
    centre = rng.uniform(0.3, 0.7, (len(labels), 2))
    boxes = np.concatenate([centre, rng.uniform(0.05, 0.5, (len(labels), 2))], axis=1)
    return Targets(
        boxes=torch.from_numpy(boxes.astype(np.float32)).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        image_id=image_id,
        size=size,
        original_size=size,
    )


def batch_of(*every: Targets) -> Batch:
    images = torch.zeros(len(every), 3, 64, 96, dtype=torch.uint8)
    return Batch(images, torch.zeros(len(every), 64, 96, dtype=torch.bool), list(every))


@dataclass
class KnownTeacher:
    """Says of a box what follows from where it is, so that no order of boxes can be mixed up."""

    calls: list[int] = field(default_factory=list)

    def answers(self, boxes: Tensor) -> Tensor:
        angles = boxes.double().sum(dim=1, keepdim=True) * 37 + torch.arange(NUM_CATEGORIES) * 2.3
        return (4 * angles.sin()).softmax(dim=1)

    def soft_labels(self, batch: Batch) -> list[Tensor]:
        self.calls.append(sum(len(target.boxes) for target in batch.targets))
        return [self.answers(target.boxes) for target in batch.targets]


def test_ranks_follow_from_the_distributions() -> None:
    first, second = targets(1, [2, 0, 5]), targets(2, [3])
    found = rank_boxes(KnownTeacher(), batch_of(first, second, targets(3, [])), (0.0,), seed=0)
    assert len(found) == 1
    soft = KnownTeacher().answers(torch.cat([first.boxes, second.boxes])).tolist()
    labels = [2, 0, 5, 3]
    assert found[0].column.tolist() == labels
    for row, label, rank, best in zip(soft, labels, found[0].rank, found[0].first, strict=True):
        assert sorted(row, reverse=True).index(row[label]) == rank
        assert row.index(max(row)) == best
    assert np.allclose(found[0].overlap, 1)


def test_boxes_without_a_label_are_left_out() -> None:
    whole, part = targets(4, [2, -1, 5]), targets(4, [2, 0, 5])
    found = rank_boxes(KnownTeacher(), batch_of(whole), (0.0,), seed=0)[0]
    every = rank_boxes(KnownTeacher(), batch_of(part), (0.0,), seed=0)[0]
    assert found.column.tolist() == [2, 5]
    assert found.rank.tolist() == [every.rank[0], every.rank[2]]


class FlatTeacher:
    """Holds all categories for equally likely, or gives no number at all."""

    def __init__(self, value: float) -> None:
        self.value = value

    def soft_labels(self, batch: Batch) -> list[Tensor]:
        return [torch.full((len(t.boxes), NUM_CATEGORIES), self.value) for t in batch.targets]


@pytest.mark.parametrize("value", [1 / NUM_CATEGORIES, 0.0, float("nan")])
def test_what_says_nothing_is_never_right(value: float) -> None:
    found = rank_boxes(FlatTeacher(value), batch_of(targets(1, [2, 0])), (0.0,), seed=0)[0]
    assert found.rank.tolist() == [NUM_CATEGORIES - 1] * 2


def test_levels_together_or_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(targets(1, [2, 0, 5]), targets(2, [3]), targets(9, []))
    levels = (0.0, 0.3, 0.6, 1.0)
    teacher = KnownTeacher()
    together = rank_boxes(teacher, batch, levels, seed=7)
    assert teacher.calls == [16]
    monkeypatch.setattr(teacher_ranks, "_BOXES_AT_ONCE", 8)
    teacher = KnownTeacher()
    split = rank_boxes(teacher, batch, levels, seed=7)
    assert teacher.calls == [8, 8]
    for a, b, level in zip(together, split, levels, strict=True):
        assert np.array_equal(a.rank, b.rank) and np.array_equal(a.first, b.first)
        moved = torch.cat([jittered(target, level, 7) for target in batch.targets])
        best = KnownTeacher().answers(moved).argmax(dim=1)
        assert a.first.tolist() == best.tolist(), "each level sees its own boxes"
    assert all(a.overlap.mean() > b.overlap.mean() for a, b in pairwise(together))


def test_jitter_is_the_stated_one() -> None:
    # In the middle of a large image nothing is cut, so the draws can be read off the boxes.
    many = Targets(
        boxes=torch.tensor([[0.5, 0.5, 0.1, 0.2]]).repeat(4000, 1),
        labels=torch.zeros(4000, dtype=torch.int64),
        image_id=5,
        size=(1000, 1000),
        original_size=(1000, 1000),
    )
    drawn = []
    for noise in (0.2, 0.9):
        boxes = jittered(many, noise, 3).double()
        shift = (boxes[:, :2] - 0.5) / torch.tensor([0.1, 0.2]) / (noise / 2)
        growth = (boxes[:, 2:] / torch.tensor([0.1, 0.2]) - 1) / noise
        draws = torch.cat([shift, growth], dim=1)
        assert draws.abs().max() <= 1 + 1e-4
        assert draws.mean(dim=0).abs().max() < 0.05
        assert (draws.std(dim=0) - 3**-0.5).abs().max() < 0.02, "uniform in [-1, 1]"
        assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.06, "independent"
        drawn.append(draws)
    assert torch.allclose(*drawn, atol=2e-3), "the same draws at every level"


def test_jitter_belongs_to_seed_and_image() -> None:
    one = targets(1, [0] * 5)
    assert torch.equal(jittered(one, 0.0, 3), one.boxes)
    assert torch.equal(jittered(one, 0.5, 3), jittered(one, 0.5, 3))
    assert not torch.equal(jittered(one, 0.5, 3), jittered(one, 0.5, 4))
    other = Targets(one.boxes, one.labels, 2, one.size, one.original_size)
    assert not torch.equal(jittered(one, 0.5, 3), jittered(other, 0.5, 3))


def test_jittered_boxes_stay_in_the_image_and_are_a_pixel_large() -> None:
    corners = torch.tensor([[0.01, 0.02, 0.02, 0.04], [0.99, 0.98, 0.02, 0.04], [0.5, 0.5, 1, 1]])
    boxes = corners.repeat(400, 1)
    some = Targets(boxes, torch.zeros(1200, dtype=torch.int64), 8, (40, 60), (40, 60))
    moved = jittered(some, 1.0, 0)
    low, high = moved[:, :2] - moved[:, 2:] / 2, moved[:, :2] + moved[:, 2:] / 2
    assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6
    assert (moved[:, 2] >= 1 / 60 - 1e-6).all() and (moved[:, 3] >= 1 / 40 - 1e-6).all()


def test_both_averages() -> None:
    column = np.array([0, 0, 0, 2])
    ranks = BoxRanks(column, np.array([0, 4, 4, 0]), column, np.ones(4), np.zeros(4))
    every = np.ones(3, bool)
    assert top(ranks.rank, 1) == 0.5 and top(ranks.rank, 5) == 1
    assert top(np.zeros(0, np.int64), 1) is None
    # One third of the first category, all of the last; the middle one has no box.
    assert top_of_categories(ranks, every, 1) == pytest.approx((1 / 3 + 1) / 2)
    assert top_of_categories(ranks, np.array([False, True, False]), 1) is None
