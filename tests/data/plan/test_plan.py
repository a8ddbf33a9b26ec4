"""The order is a pure function: properties of it, enumerated."""

import json
from bisect import bisect_right
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from drawn_sources import long_tail, order, source

from pipeline.data.plan.like_shapes import LikeShapes
from pipeline.data.plan.order import WINDOW_SHARDS
from pipeline.data.plan.sampling import repeat_factors
from pipeline.data.plan.slot import micro_batches, substitute
from pipeline.data.plan.steps import Plan, build_plan
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Transforms

SHARD_OF = {"tail": lambda i: i // 7, "b": np.repeat([0, 1, 2], (5, 3, 4)).__getitem__}
SHARD_OF |= {"x": lambda i: i // 6, "y": lambda i: 0}


def plans() -> list[Plan]:
    tail = long_tail()
    first, second = source("x", (6, 6)), source("y", (9,), weight=3.0)
    one = {"batch_size": 10, "seed": 5, "repeat_threshold": 0.2}
    return [
        build_plan([tail], **one),
        build_plan([tail, source("b", weight=0.4)], [first, second], mosaic=True, **one),
        build_plan([tail], [first], extra_ratio=0.3, **one),
        build_plan([tail], [first, second], extra_ratio=2.5, mosaic=True, **one),
        build_plan([tail], [first, second], extra_mode="mixed", extra_ratio=0.45, **one),
        build_plan([tail], [source("x", (6,) * 9), second], mosaic=True, window_shards=2, **one),
    ]


def test_every_sample_once_an_epoch_without_repeats() -> None:
    plan = build_plan([source(shards=(5, 1, 30, 4) * 11)], batch_size=8, seed=1)
    number = plan.epoch_lengths["a"]
    assert number == 440
    indices = [slot.index for slot in order(plan, range(3 * number // 8))]
    epochs = [indices[i : i + number] for i in range(0, 3 * number, number)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_windows_keep_reads_near_each_other_and_mix_within() -> None:
    plan = build_plan([source(shards=(20,) * 3 * WINDOW_SHARDS)], batch_size=1, seed=1)
    shards = np.array([slot.index // 20 for slot in order(plan, range(60 * WINDOW_SHARDS))])
    windows = shards.reshape(3, -1)
    assert [len(np.unique(window)) for window in windows] == [WINDOW_SHARDS] * 3
    # A random order of 16 shards has 1 in 16 neighbours from the same shard; sequential, 19 in 20.
    assert np.mean(shards[1:] == shards[:-1]) < 2.5 / WINDOW_SHARDS


def test_repeat_factors_are_those_of_the_formula() -> None:
    # f(0) = 3/4, f(1) = 1/4 (twice in one image counts once), f(2) = 1/4.
    four = source(shards=(4,), categories=[[0, 1, 1], [0, -1], [0], [2]])
    expected = [np.sqrt(0.9 / 0.25), np.sqrt(0.9 / 0.75), np.sqrt(0.9 / 0.75), np.sqrt(0.9 / 0.25)]
    np.testing.assert_allclose(repeat_factors(four, 0.9), expected)
    np.testing.assert_allclose(repeat_factors(four, 0.0), 1)
    np.testing.assert_allclose(repeat_factors(source(), 0.5), 1)


def test_resampling_has_exact_expectation_and_constant_length() -> None:
    tail = long_tail()
    factors = repeat_factors(tail, 0.2)
    assert factors.max() > 4
    plan = build_plan([tail], batch_size=1, seed=9, repeat_threshold=0.2)
    length = plan.epoch_lengths["tail"]
    assert length == np.ceil(factors.sum() - 1e-3)
    epochs = 100
    counts = np.stack(
        [
            np.bincount(
                [slot.index for slot in order(plan, range(e * length, (e + 1) * length))],
                minlength=tail.num_samples,
            )
            for e in range(epochs)
        ]
    )
    # The ceiling of the length is shared among the samples that repeat.
    assert np.all(counts >= np.floor(factors)) and np.all(counts <= np.ceil(factors + 0.02))
    assert np.all(counts.sum(axis=1) == length)
    assert np.abs(counts.mean(axis=0) - factors).max() < 4 * 0.5 / np.sqrt(epochs) + 0.02
    assert abs(counts.mean() - factors.mean()) < 1 / tail.num_samples


def test_one_shard_repeats_other_images_in_other_epochs() -> None:
    # The running sums of a single shard never move; only the offset of an epoch does.
    one = source(shards=(12,), categories=[[0]] * 9 + [[1]] * 3)
    factors = repeat_factors(one, 0.6)
    plan = build_plan([one], batch_size=1, seed=0, repeat_threshold=0.6)
    length = plan.epoch_lengths["a"]
    counts = np.bincount([slot.index for slot in order(plan, range(200 * length))], minlength=12)
    np.testing.assert_allclose(counts / 200, factors * length / factors.sum(), atol=0.14)


@pytest.mark.parametrize("plan", plans())
def test_same_global_sequence_for_every_world_size_and_start(plan: Plan) -> None:
    steps = range(40)
    reference = [slot for step in steps for slot in plan.batch(step)]
    for world_size in (1, 2, 3, 4, 5, 6, 16):
        assert order(plan, steps, world_size) == reference
    for start in (1, 7, 39):
        assert order(plan, range(start, 40), 3) == reference[start * 10 :]
    assert plan.batch(10**12) == plan.batch(10**12)


@pytest.mark.parametrize("plan", plans())
def test_no_position_twice_and_none_left_out(plan: Plan) -> None:
    slots = order(plan, range(60))
    for stream in ("train", "extra"):
        positions = [slot.position for slot in slots if slot.stream == stream]
        assert positions == list(range(len(positions)))
    assert len({slot.seed for slot in slots}) == len(slots)
    assert all(0 <= slot.seed < 2**63 for slot in slots)


@pytest.mark.parametrize("plan", plans())
def test_sources_of_a_step_are_those_of_its_batch(plan: Plan) -> None:
    for step in range(30):
        counts = Counter(slot.source for slot in plan.batch(step))
        assert counts == Counter(plan.sources(step))
        streams = {slot.stream for slot in plan.batch(step)}
        assert plan.kind(step) == ("mixed" if len(streams) == 2 else streams.pop())


@pytest.mark.parametrize("plan", plans())
def test_what_came_before_a_step_is_the_sum_of_its_steps(plan: Plan) -> None:
    kinds: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for step in range(60):
        assert plan.steps_before(step) == kinds
        assert Counter(plan.samples_before(step)) == samples
        kinds[plan.kind(step)] += 1
        samples.update(plan.sources(step))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 12])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 16])
def test_ranks_have_equal_shapes_by_padding(
    batch_size: int, world_size: int, micro_batch: int
) -> None:
    plan = build_plan([source()], batch_size=batch_size, seed=0)
    ranks = [plan.step(3, rank, world_size) for rank in range(world_size)]
    assert {len(slots) for slots in ranks} == {-(-batch_size // world_size)}
    cut = [micro_batches(slots, micro_batch) for slots in ranks]
    assert len({tuple(map(len, batches)) for batches in cut}) == 1
    sizes = {len(batch) for batch in cut[0]}
    assert len(sizes) == 1 and max(sizes) <= micro_batch
    everything = [slot for batches in cut for batch in batches for slot in batch]
    assert [slot for slot in everything if slot.weight] == plan.batch(3)
    real = {(slot.source, slot.index) for slot in plan.batch(3)}
    assert all((slot.source, slot.index) in real for slot in everything)
    assert len(everything) - batch_size < world_size * len(cut[0]) + world_size


@pytest.mark.parametrize(
    ("ratio", "start"),
    [(1.0, "tetete"), (2.0, "teetee"), (0.5, "ttette"), (1.5, "teteetetee"), (0.1, "t" * 10 + "e")],
)
def test_alternate_keeps_the_ratio_cumulatively(ratio: float, start: str) -> None:
    plan = build_plan([source()], [source("x")], batch_size=4, seed=0, extra_ratio=ratio)
    kinds = "".join(plan.kind(step)[0] for step in range(400))
    assert kinds.startswith(start)
    for steps in range(1, 400):
        train = kinds[:steps].count("t")
        extra = kinds[:steps].count("e")
        # The extra steps that belong to the last train step may still be to come.
        due = Fraction(repr(ratio))
        assert int((train - 1) * due) <= extra <= int(train * due)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 3.0, 100.0])
def test_mixed_gives_every_rank_its_share(ratio: float) -> None:
    plan = build_plan(
        [source()], [source("x")], batch_size=12, seed=0, extra_mode="mixed", extra_ratio=ratio
    )
    share = min(max(round(12 * ratio / (1 + ratio)), 1), 11)
    for step in range(20):
        assert plan.sources(step) == {"a": 12 - share, "x": share}
        for world_size in (2, 3, 4, 6):
            for rank in range(world_size):
                slots = plan.step(step, rank, world_size)
                extra = sum(slot.stream == "extra" for slot in slots)
                assert abs(extra - share / world_size) < 1


def test_sources_of_a_stream_keep_their_weights() -> None:
    weights = {"a": 1.0, "b": 2.5, "c": 0.1}
    sources = [source(name, (50,), weight=weight) for name, weight in weights.items()]
    plan = build_plan(sources, batch_size=1, seed=0)
    names = [slot.source for slot in order(plan, range(3600))]
    assert Counter(names) == {"a": 1000, "b": 2500, "c": 100}
    for number in range(1, 3600, 17):
        counts = Counter(names[:number])
        for name, weight in weights.items():
            assert abs(counts[name] - number * weight / 3.6) < 2


@pytest.mark.parametrize("rare", [0, 1])
def test_a_rare_source_has_its_turns_in_the_middle_of_what_it_waits_for(rare: int) -> None:
    weights = [1.0, 1.0]
    weights[1 - rare] = 40.0
    sources = [source(name, weight=weight) for name, weight in zip("ab", weights, strict=True)]
    names = [slot.source for slot in order(build_plan(sources, batch_size=1, seed=0), range(410))]
    turns = [place for place, name in enumerate(names) if name == "ab"[rare]]
    assert turns == pytest.approx([20 + 41 * k for k in range(10)], abs=1)


def test_mosaic_partners_come_from_the_window_being_read() -> None:
    shards = (10,) * 3 * WINDOW_SHARDS
    plan = build_plan([source()], [source("x", shards)], batch_size=5, seed=0, mosaic=True)
    extra = [slot for slot in order(plan, range(200)) if slot.stream == "extra"]
    assert all(slot.partners == () for slot in order(plan, range(20)) if slot.stream == "train")
    assert {len(slot.partners) for slot in extra} == {3}
    window = {slot.index for slot in extra[: 10 * WINDOW_SHARDS]}
    drawn = {p for slot in extra[: 10 * WINDOW_SHARDS] for p in slot.partners}
    assert drawn <= window and len(drawn) > 0.8 * len(window)


@pytest.mark.parametrize("chance", [0.0, 0.2, 1.0])
def test_train_images_are_pasted_into_as_often_as_asked_for(chance: float) -> None:
    plan = build_plan([source()], batch_size=500, seed=0, copy_paste_probability=chance)
    numbers = [len(slot.partners) for slot in order(plan, range(4))]
    assert set(numbers) <= {0, 1}
    assert np.mean(numbers) == pytest.approx(chance, abs=0.03)


def test_seed_and_data_change_the_order() -> None:
    def indices(seed: int, name: str = "a") -> list[int]:
        plan = build_plan([source(name, (40,))], batch_size=40, seed=seed)
        return [slot.index for slot in plan.batch(0)]

    assert indices(0) == indices(0)
    assert len({tuple(indices(0)), tuple(indices(1)), tuple(indices(0, "b"))}) == 3


def test_order_never_changes_between_versions() -> None:
    # A change of this list breaks the resuming of every run: raise PLAN_VERSION with it.
    plan = build_plan([source(shards=(4, 4, 4))], batch_size=12, seed=7)
    assert [slot.index for slot in plan.batch(0)] == [11, 6, 5, 1, 2, 3, 7, 10, 4, 0, 8, 9]
    assert plan.batch(0)[0].seed == 6171604058562951888


def test_state_survives_json_and_refuses_another_plan() -> None:
    common = {"batch_size": 8, "seed": 0}
    tail = long_tail()
    plan = build_plan([tail], [source("x")], **common)
    state = json.loads(json.dumps(plan.state()))
    build_plan([tail], [source("x")], **common).check(state)
    assert len(json.dumps(state)) < 1000
    others = {
        "seed was 0 and is 1": build_plan([tail], [source("x")], batch_size=8, seed=1),
        "batch_size was 8 and is 4": build_plan([tail], [source("x")], batch_size=4, seed=0),
        "train.tail.epoch_length": build_plan(
            [tail], [source("x")], repeat_threshold=0.2, **common
        ),
        "extra.x.digest was digest-x-12 and is digest-x-13": build_plan(
            [tail], [source("x", (13,))], **common
        ),
        "extra_ratio was 1 and is 2": build_plan([tail], [source("x")], extra_ratio=2.0, **common),
        "extra_slots": build_plan([tail], [source("x")], extra_mode="mixed", **common),
        "extra.x.share was 1 and is absent": build_plan([tail], **common),
        "extra.partners was 0 and is 3": build_plan([tail], [source("x")], mosaic=True, **common),
        "window_shards was 16 and is 4": build_plan(
            [tail], [source("x")], window_shards=4, **common
        ),
        "sampling was repeat_factor and is class_aware": build_plan(
            [tail], [source("x")], sampling="class_aware", **common
        ),
        "train.partner_chance was 0 and is 1/4": build_plan(
            [tail], [source("x")], copy_paste_probability=0.25, **common
        ),
        "like_shapes was 0 and is 1": build_plan(
            [tail], [source("x")], like_shapes=LikeShapes({}, Transforms(), 2), **common
        ),
    }
    for message, other in others.items():
        with pytest.raises(RecipeError, match=message):
            other.check(state)


def test_a_threshold_that_leaves_the_length_of_an_epoch_is_noticed() -> None:
    plan, other = (
        build_plan([long_tail()], batch_size=100, seed=0, repeat_threshold=threshold)
        for threshold in (0.2, 0.2005)
    )
    assert plan.epoch_lengths == other.epoch_lengths
    assert any(plan.batch(step) != other.batch(step) for step in range(40))
    with pytest.raises(RecipeError, match="repeat_threshold was 1/5 and is 401/2000"):
        other.check(plan.state())


def test_what_comes_next_is_in_the_shards_ahead() -> None:
    # Shards of 5 without repeats: a window of 3 is 15 positions, the last of an epoch is 1 shard.
    size, shards, window = 5, 7, 3
    plan = build_plan([source("a", (size,) * shards)], batch_size=5, seed=2, window_shards=window)
    read = [slot.index // size for slot in order(plan, range(3 * shards))]
    edges = [0, 3 * size, 6 * size, 7 * size]
    bounds = [epoch * shards * size + edge for epoch in range(3) for edge in edges[:-1]]
    bounds.append(3 * shards * size)
    windows = [set(read[a:b]) for a, b in pairwise(bounds)]
    assert [len(each) for each in windows] == [3, 3, 1] * 3
    for step in range(2 * shards):
        now = bisect_right(bounds, step * 5) - 1
        ahead = plan.shards_ahead(step)["a"]
        assert len(ahead) == len(set(ahead))
        assert set(ahead[: len(windows[now])]) == windows[now]
        assert set(ahead) == windows[now] | windows[now + 1]


@pytest.mark.parametrize("plan", plans())
def test_all_that_a_step_reads_is_in_its_shards_ahead(plan: Plan) -> None:
    for step in range(80):
        ahead = plan.shards_ahead(step)
        slots = plan.batch(step)
        # Sources that share a stream with others are told of too.
        assert {slot.source for slot in slots} <= ahead.keys()
        for slot in slots:
            found = {SHARD_OF[slot.source](index) for index in (slot.index, *slot.partners)}
            assert found <= set(ahead[slot.source])


def test_mixtures_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="source empty has no samples"):
        build_plan([source(), source("empty", ())], batch_size=2, seed=0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=rf"source b has weight {weight}, .* above 0"):
            build_plan([source()], [source("b", weight=weight)], batch_size=2, seed=0)
    with pytest.raises(DataError, match="2 sources of the mixture are called a"):
        build_plan([source()], [source()], batch_size=2, seed=0)


def test_substitute_is_another_sample_and_its_chain_covers_all() -> None:
    drawn = {substitute(11, 5, attempt, range(4, 9)) for attempt in range(100)}
    assert drawn == {4, 6, 7, 8}
    assert substitute(11, 5, 2, range(4, 9)) == substitute(11, 5, 2, range(4, 9))


def test_plan_of_millions_starts_anywhere_at_once() -> None:
    number, shard = 1_000_000, 1000
    large = source("large", (shard,) * (number // shard))
    plan = build_plan([source()], [large], batch_size=64, seed=0, mosaic=True)
    epochs = 1000 * number // 64
    slots = order(plan, range(2 * epochs, 2 * epochs + 20))
    assert len({slot.index for slot in slots if slot.stream == "extra"}) == 640
