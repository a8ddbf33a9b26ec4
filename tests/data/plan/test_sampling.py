"""How often samples come: exact counts of each way of sampling, at bounded work."""

from collections import Counter
from itertools import pairwise
from math import lcm

import numpy as np
import pytest
from coloured_world import a_source, a_stream, some_data
from drawn_sources import long_tail, order, source

from pipeline.data.plan import sampling as sampling_module
from pipeline.data.plan.order import SourceOrder
from pipeline.data.plan.sampling import ClassAwareCopies, RepeatFactorCopies, repeat_factors
from pipeline.data.plan.steps import build_plan
from pipeline.data.shards.index import Index
from pipeline.errors import DataError

# 12 images in shards of 3; category 0 in six, 1 in three, 2 in one, 7 in two; two without any.
HELD = [[0], [0, 1], [], [0, 0], [1, 7], [0], [], [7], [0, -1], [1], [2, 0], [-1]]
IMAGES = {0: [0, 1, 3, 5, 8, 10], 1: [1, 4, 9], 2: [10], 7: [4, 7]}


def epochs_of(order: SourceOrder, number: int) -> list[list[int]]:
    length = order.epoch_length
    indices = [order.index(position) for position in range(number * length)]
    return [indices[i : i + length] for i in range(0, len(indices), length)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shards", [(12,), (3, 3, 3, 3), (1,) * 12, (5, 7)])
def test_class_aware_draws_each_category_and_then_each_image_alike(
    shards: tuple[int, ...], seed: int
) -> None:
    held = source("s", shards, HELD)
    own = SourceOrder(held, seed, sampling="class_aware", window_shards=2)
    # Nine images have a category, of which there are four: round(9 / 4) draws for each.
    assert own.epoch_length == 2 * 4 and own.num_left_out == 3
    every = lcm(6, 3, 1, 2)
    total = Counter(index for epoch in epochs_of(own, every) for index in epoch)
    expected: Counter[int] = Counter()
    for images in IMAGES.values():
        for image in images:
            expected[image] += 2 * every // len(images)
    assert total == expected


def test_class_aware_counts_of_one_category_are_exact_in_every_epoch_and_run_of_epochs() -> None:
    held = source("s", (4,) * 10, [[k % 3 if k < 30 else 3] for k in range(40)])
    own = SourceOrder(held, 5, sampling="class_aware", window_shards=3)
    assert own.epoch_length == 40
    epochs = epochs_of(own, 9)
    sums = np.zeros((10, 40), dtype=int)
    for k, epoch in enumerate(epochs):
        counts = np.bincount(epoch, minlength=40)
        by_category = [counts[:30][c::3].sum() for c in range(3)] + [counts[30:].sum()]
        assert by_category == [10] * 4
        sums[k + 1] = sums[k] + counts
    assert len({tuple(epoch) for epoch in epochs}) == 9
    uneven = source("s", (4,) * 10, [[0 if k < 33 else 1 + k % 3] for k in range(40)])
    own = SourceOrder(uneven, 5, sampling="class_aware", window_shards=3)
    counts = np.array([np.bincount(epoch, minlength=40) for epoch in epochs_of(own, 12)])
    for first in range(12):
        for last in range(first + 1, 13):
            frequent = counts[first:last, :33].sum(axis=0)
            assert frequent.max() - frequent.min() <= 1, "every image before any comes once more"
    assert np.all(counts[:, :33].sum(axis=1) == 10)


def test_a_class_aware_epoch_is_about_as_long_as_the_source() -> None:
    # 11 images of 4 categories: 2.75 draws for each, rounded; and never none.
    held = source("s", (4, 4, 3), [[0]] * 8 + [[1], [2], [3]])
    assert SourceOrder(held, 0, sampling="class_aware").epoch_length == 3 * 4
    many = source("s", (2,), [[0, 1, 2, 3, 4], []])
    assert SourceOrder(many, 0, sampling="class_aware").epoch_length == 5


def test_class_aware_images_of_an_epoch_are_spread_over_its_shards() -> None:
    held = source("s", (10,) * 40, [[0] if k % 4 else [1 + k % 3] for k in range(400)])
    own = SourceOrder(held, 0, sampling="class_aware", window_shards=40)
    for epoch in epochs_of(own, 3):
        frequent = np.bincount([i // 10 for i in epoch if i % 4], minlength=40)
        assert frequent.min() >= 1 and frequent.max() <= 4


def test_class_aware_offsets_favour_no_image() -> None:
    held = source("s", (6, 6), HELD)
    total = np.zeros(12)
    for seed in range(600):
        copies = ClassAwareCopies(held, seed)
        for shard in range(2):
            drawn = copies.of_shard(0, shard, 0)
            total[6 * shard : 6 * shard + 6] += drawn
    expected = np.zeros(12)
    for images in IMAGES.values():
        expected[images] += 2 / len(images)
    np.testing.assert_allclose(total / 600, expected, atol=0.07)


def test_class_aware_needs_a_category() -> None:
    with pytest.raises(DataError, match="source a has no category"):
        build_plan([source()], batch_size=2, seed=0, sampling="class_aware")
    minus = source("m", (3,), [[-1], [], [-1]])
    with pytest.raises(DataError, match="source m has no category"):
        build_plan([minus], batch_size=2, seed=0, sampling="class_aware")


def test_extra_data_are_sampled_uniformly_whatever_the_train_stream_is() -> None:
    extra = source("x", (4, 4), [[0]] * 7 + [[1]])
    plan = build_plan(
        [long_tail()], [extra], batch_size=4, seed=0, sampling="class_aware", repeat_threshold=0.5
    )
    assert plan.epoch_lengths["x"] == 8
    drawn = [slot.index for slot in order(plan, range(8)) if slot.stream == "extra"]
    assert sorted(drawn) == sorted([*range(8)] * 2)
    assert plan.left_out == {"tail": sum(np.diff(long_tail().category_offsets) == 0)}


def test_uniform_sampling_ignores_the_threshold() -> None:
    plan = build_plan([long_tail()], batch_size=400, seed=0, sampling="uniform", repeat_threshold=1)
    assert sorted(slot.index for slot in plan.batch(0)) == list(range(400))


def test_sources_are_gone_over_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = long_tail()
    whole, counts = repeat_factors(tail, 0.2), sampling_module.image_counts(tail)
    monkeypatch.setattr(sampling_module, "BLOCK", 7)
    blocks = list(tail.blocks())
    assert len(blocks) > 50 and blocks[0][0] == 0 and blocks[-1][1] == 400
    assert all(first[1] == second[0] for first, second in pairwise(blocks))
    np.testing.assert_array_equal(repeat_factors(tail, 0.2), whole)
    np.testing.assert_array_equal(sampling_module.image_counts(tail), counts)
    expected = [
        sum(c in tail.categories[a:b] for a, b in pairwise(tail.category_offsets))
        for c in range(len(counts))
    ]
    assert counts.tolist() == expected


@pytest.mark.parametrize("sampling", ["repeat_factor", "class_aware", "uniform"])
def test_a_position_costs_its_window_wherever_it_is(
    sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    shards: list[int] = []
    make_window = SourceOrder._make_window
    monkeypatch.setattr(
        SourceOrder,
        "_make_window",
        lambda self, epoch, window: (
            made.append((epoch, window)) or make_window(self, epoch, window)
        ),
    )
    for copies in (RepeatFactorCopies, ClassAwareCopies):
        of_shard = copies.of_shard
        monkeypatch.setattr(
            copies,
            "of_shard",
            lambda self, epoch, shard, before, of_shard=of_shard: (
                shards.append(shard) or of_shard(self, epoch, shard, before)
            ),
        )
    tail = long_tail(number=2000, shard=5)
    own = SourceOrder(tail, 1, sampling=sampling, repeat_threshold=0.2, window_shards=8)
    assert made == [] and shards == []
    length = own.epoch_length
    for position in (0, length // 2, 9 * length // 10, length - 1, 10**6 * length + length // 3):
        made.clear()
        shards.clear()
        own.index(position)
        own.neighbours(position, 3, 3)
        assert len(made) == 1 and made[0][0] == position // length
        assert len(shards) == len(set(shards)) == 8
    made.clear()
    for position in range(length):
        own.index(position)
    assert made == [(0, window) for window in range(50)]


def test_a_recipe_chooses_and_what_it_leaves_out_is_said(
    indexes: dict[str, Index], caplog: pytest.LogCaptureFixture
) -> None:
    data = some_data(sampling="class_aware", shuffle_shards=2)
    with caplog.at_level("WARNING"):
        plan = a_stream(indexes, data).plan
    # Of eleven images two have no box; the other nine have three categories.
    assert plan.epoch_lengths == {"train": 9, "extra": 7}
    assert "source train: 2 of its 11 images have no category and are left out" in caplog.text
    assert plan.state()["window_shards"] == 2 and plan.state()["sampling"] == "class_aware"
    caplog.clear()
    uniform = a_stream(indexes, some_data(sampling="uniform")).plan
    assert uniform.epoch_lengths["train"] == 11 and "left out" not in caplog.text
    assert a_stream(indexes, some_data()).plan.epoch_lengths["train"] > 11
    for wrong in ({"sampling": "balanced"}, {"shuffle_shards": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            some_data(**wrong)
    unlabelled = some_data(sampling="class_aware", train=[a_source("plain", use_labels=False)])
    with pytest.raises(DataError, match="source plain has no category"):
        a_stream(indexes, unlabelled)
