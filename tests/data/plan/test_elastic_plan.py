"""Exactly once, whatever the world: all world sizes, all steps, and runs that are killed."""

import json
from collections import Counter

import numpy as np
import pytest
from drawn_sources import long_tail, source
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.plan.like_shapes import LikeShapes
from pipeline.data.plan.sampling import StreamSource, repeat_factors
from pipeline.data.plan.slot import Slot, micro_batches
from pipeline.data.plan.steps import Plan, build_plan
from pipeline.errors import RecipeError
from pipeline.recipe import Transforms

MICRO_BATCH = 3


def sources() -> dict[str, StreamSource]:
    tail = long_tail(number=60, num_categories=9, shard=4)
    others = [source("x", (6, 6)), source("y", (9,), weight=3.0), source("b", (7,), weight=0.4)]
    return {each.name: each for each in [tail, *others]}


def sizes_of(given: StreamSource) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sides = np.random.default_rng(given.num_samples).integers(200, 900, (2, given.num_samples))
    return sides[0], sides[1]


def make_plan(name: str) -> Plan:
    """Made anew, as each process of each life of a run makes it."""
    all_sources = sources()
    tail, x, y, b = all_sources.values()
    common = {"batch_size": 10, "seed": 5, "repeat_threshold": 0.3, "window_shards": 3}
    sizes = {name: sizes_of(each) for name, each in all_sources.items()}
    shapes = LikeShapes(sizes, Transforms(), MICRO_BATCH)
    match name:
        case "repeat_factor":
            return build_plan([tail], **common)
        case "uniform":
            return build_plan([tail, b], [x], sampling="uniform", extra_ratio=0.5, **common)
        case "class_aware":
            return build_plan([tail], [x, y], sampling="class_aware", mosaic=True, **common)
        case "mixed":
            return build_plan([tail, b], [x, y], extra_mode="mixed", extra_ratio=0.45, **common)
        case "pasted":
            return build_plan([tail], copy_paste_probability=0.4, **common)
        case "like_shapes":
            return build_plan([tail], [x, y], mosaic=True, like_shapes=shapes, **common)
        case "mixed_like_shapes":
            return build_plan(
                [tail, b], [x], extra_mode="mixed", mosaic=True, like_shapes=shapes, **common
            )
    raise AssertionError(name)


PLANS = [
    "repeat_factor",
    "uniform",
    "class_aware",
    "mixed",
    "pasted",
    "like_shapes",
    "mixed_like_shapes",
]


def key(slot: Slot) -> tuple[object, ...]:
    return slot.stream, slot.position, slot.source, slot.index, slot.seed, slot.partners


def global_batch(plan: Plan, step: int, world_size: int) -> list[tuple[object, ...]]:
    """What all ranks train on in their micro-batches, padding left out."""
    ranks = [micro_batches(plan.step(step, r, world_size), MICRO_BATCH) for r in range(world_size)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    slots = [slot for batches in ranks for batch in batches for slot in batch]
    assert len({slot.shape_seed for slot in slots}) == 1
    return sorted(key(slot) for slot in slots if slot.weight)


@pytest.mark.parametrize("name", PLANS)
def test_every_world_size_has_the_same_batches_at_every_step(name: str) -> None:
    plan = make_plan(name)
    steps = 3 * max(plan.epoch_lengths.values()) // plan.batch_size + 1
    for step in range(steps):
        reference = sorted(map(key, plan.batch(step)))
        assert len(set(reference)) == plan.batch_size
        for world_size in range(1, 17):
            assert global_batch(plan, step, world_size) == reference


@pytest.mark.parametrize("name", PLANS)
def test_an_epoch_has_every_sample_its_number_of_times(name: str) -> None:
    plan = make_plan(name)
    indices: dict[str, list[int]] = {each: [] for each in plan.epoch_lengths}
    step = 0
    while any(len(indices[each]) < 3 * n for each, n in plan.epoch_lengths.items()):
        slots = sorted(plan.batch(step), key=lambda slot: (slot.stream, slot.position))
        for slot in slots:
            indices[slot.source].append(slot.index)
        step += 1
    tail = sources()["tail"]
    factors = repeat_factors(tail, 0.3)
    for each, length in plan.epoch_lengths.items():
        for epoch in range(3):
            counts = np.bincount(
                indices[each][epoch * length : (epoch + 1) * length],
                minlength=sources()[each].num_samples,
            )
            if each != "tail" or plan.sampling == "uniform":
                assert counts.tolist() == [1] * length
            elif plan.sampling == "class_aware":
                assert np.all((counts > 0) <= (np.diff(tail.category_offsets) > 0))
            else:
                # The sum is made whole by the samples that repeat.
                assert np.all(counts >= np.floor(factors))
                assert np.all(counts <= np.ceil(factors + 0.1))


@pytest.mark.parametrize("name", PLANS)
def test_saved_on_some_ranks_and_resumed_on_others(name: str) -> None:
    plan = make_plan(name)
    reference = [sorted(map(key, plan.batch(step))) for step in range(24)]
    for saved in range(1, 24, 5):
        for before, after in ((1, 16), (16, 1), (4, 3), (7, 5), (2, 8), (10, 11)):
            state = json.loads(json.dumps(make_plan(name).state()))
            seen = [global_batch(plan, step, before) for step in range(saved)]
            resumed = make_plan(name)
            resumed.check(state)
            seen += [global_batch(resumed, step, after) for step in range(saved, 24)]
            assert seen == reference
    for other in PLANS:
        if other != name:
            with pytest.raises(RecipeError, match="cannot go on in the same order"):
                make_plan(other).check(plan.state())


lives = st.lists(
    st.tuples(
        st.integers(1, 16),  # world size
        st.integers(0, 3),  # reader processes of each rank
        st.integers(0, 9),  # steps until it is killed
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(PLANS), lives=lives, every=st.integers(1, 5), data=st.data())
def test_a_run_that_is_killed_commits_what_it_would_have(
    name: str, lives: list[tuple[int, int, int]], every: int, data: st.DataObject
) -> None:
    last = 20
    committed: list[list[tuple[object, ...]]] = []
    for world_size, workers, steps in [*lives, (2, 1, last)]:
        start = len(committed)
        done = []
        for step in range(start, min(start + steps, last)):
            done.append(read_by_workers(name, step, world_size, workers, data))
        kept = len(done) if start + len(done) == last else len(done) - (start + len(done)) % every
        committed.extend(done[:kept])
    plan = make_plan(name)
    assert len(committed) == last
    assert committed == [sorted(map(key, plan.batch(step))) for step in range(last)]
    positions = Counter((slot[0], slot[1]) for batch in committed for slot in batch)
    assert set(positions.values()) == {1}


def read_by_workers(
    name: str, step: int, world_size: int, workers: int, data: st.DataObject
) -> list[tuple[object, ...]]:
    """A global batch, its micro-batches read in any order, each by a process with its own plan."""
    plans = [make_plan(name) for _ in range(max(workers, 1))]
    found = []
    for rank in data.draw(st.permutations(range(world_size))):
        slots = plans[0].step(step, rank, world_size)
        jobs = range(len(micro_batches(slots, MICRO_BATCH)))
        for job in data.draw(st.permutations(jobs)):
            plan = plans[job % len(plans)]
            batches = micro_batches(plan.step(step, rank, world_size), MICRO_BATCH)
            found.extend(key(slot) for slot in batches[job] if slot.weight)
    return sorted(found)
