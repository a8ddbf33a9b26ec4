"""Batches of like shapes: the same samples, less padding, sizes known before anything is read."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from coloured_world import SMALL, a_stream, fingerprints, some_data
from drawn_sources import source

from pipeline.data.plan.like_shapes import LikeShapes
from pipeline.data.plan.slot import Slot, micro_batches
from pipeline.data.plan.steps import Plan, build_plan
from pipeline.data.shards.index import Index
from pipeline.recipe import Transforms

COMMON = {"batch_size": 24, "seed": 3}


TRAIN, EXTRA = source("a", (10,) * 20), source("x", (10,) * 9)


def like_shapes(micro_batch: int) -> LikeShapes:
    shapes = np.array([(480, 640), (640, 480), (640, 640), (427, 640), (612, 612), (333, 500)])
    rng = np.random.default_rng(0)
    sizes = {each.name: shapes[rng.integers(6, size=each.num_samples)].T for each in (TRAIN, EXTRA)}
    pairs = {name: (heights, widths) for name, (heights, widths) in sizes.items()}
    return LikeShapes(pairs, Transforms(), micro_batch)


def a_plan(grouped: bool, **given: object) -> Plan:
    shapes = like_shapes(2) if grouped else None
    return build_plan([TRAIN], [EXTRA], mosaic=True, like_shapes=shapes, **COMMON, **given)


def content(slots: list[Slot]) -> Counter[Slot]:
    return Counter(replace(slot, shape_seed=None) for slot in slots if slot.weight)


def padded_share(plan: Plan, shapes: LikeShapes, world_size: int, steps: int) -> float:
    padding, total = 0, 0
    for step in range(steps):
        for rank in range(world_size):
            for batch in micro_batches(plan.step(step, rank, world_size), shapes.micro_batch):
                sizes = np.array([shapes.size_of(slot) for slot in batch])
                canvas = -(-sizes.max(axis=0) // 32) * 32
                total += len(sizes) * canvas.prod()
                padding += len(sizes) * canvas.prod() - sizes.prod(axis=1).sum()
    return padding / total


@pytest.mark.parametrize("mode", ["alternate", "mixed"])
def test_grouping_changes_the_order_of_a_batch_and_nothing_else(mode: str) -> None:
    plain, grouped = a_plan(False, extra_mode=mode), a_plan(True, extra_mode=mode)
    for step in range(20):
        assert content(plain.batch(step)) == content(grouped.batch(step))
        assert plain.sources(step) == grouped.sources(step)
        [seed] = {slot.shape_seed for slot in grouped.batch(step)}
        assert seed is not None and {slot.shape_seed for slot in plain.batch(step)} == {None}
    seeds = [grouped.batch(step)[0].shape_seed for step in range(20)]
    assert len(set(seeds)) == 20


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8, 13, 16, 30])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_micro_batches_are_neighbours_in_the_order_of_shapes(
    world_size: int, micro_batch: int
) -> None:
    plan = build_plan([TRAIN], like_shapes=like_shapes(micro_batch), **COMMON)
    place = {slot: k for k, slot in enumerate(plan.batch(4))}
    ranks = [
        micro_batches(plan.step(4, rank, world_size), micro_batch) for rank in range(world_size)
    ]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    real = [slot for batches in ranks for batch in batches for slot in batch if slot.weight]
    assert Counter(real) == Counter(plan.batch(4))
    for micro_step in range(len(ranks[0])):
        places = [place[slot] for batches in ranks for slot in batches[micro_step] if slot.weight]
        assert places == list(range(places[0], places[0] + len(places)))


def test_less_of_a_batch_is_padding() -> None:
    shapes = like_shapes(4)
    plain = build_plan([TRAIN], **COMMON)
    grouped = build_plan([TRAIN], like_shapes=shapes, **COMMON)
    before, after = (padded_share(plan, shapes, 3, 25) for plan in (plain, grouped))
    assert before > 0.25 and after < 0.12


def test_sizes_are_known_before_anything_is_read(indexes: dict[str, Index]) -> None:
    data = some_data(aspect_ratio_grouping=True, transforms=SMALL)
    stream = a_stream(indexes, data, batch_size=6)
    shapes = stream.plan.like_shapes
    assert shapes is not None
    kinds = Counter()
    for step in stream.iterate(0, 12):
        slots = [slot for slot in stream.plan.step(step.step, 0, 1)]
        targets = [target for batch in step.micro_batches for target in batch.targets]
        assert [shapes.size_of(slot) for slot in slots] == [target.size for target in targets]
        if step.stream == "train":
            sides = {min(target.size) for target in targets if max(target.size) < SMALL.max_side}
            assert len(sides) <= 1
            kinds.update(sides)
    assert set(kinds) == {48, 64}


OPTIONS = {
    "like_shapes": {"aspect_ratio_grouping": True},
    "class_aware": {"sampling": "class_aware", "shuffle_shards": 2},
    "jitter": {"transforms": {"large_scale_jitter": True, "jitter_size": 72}},
    "paste": {"transforms": {"copy_paste_probability": 0.6}},
    "all": {
        "aspect_ratio_grouping": True,
        "sampling": "class_aware",
        "transforms": {"copy_paste_probability": 0.6, "canvas_multiple": 64},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_pixels_for_every_world_size_and_start_with_each_option(
    indexes: dict[str, Index], name: str
) -> None:
    given = dict(OPTIONS[name])
    given["transforms"] = SMALL.model_copy(update=dict(given.get("transforms", {})))
    data = some_data(**given)
    reference = sorted(fingerprints(list(a_stream(indexes, data).iterate(0, 10))))
    plain = sorted(fingerprints(list(a_stream(indexes, some_data()).iterate(0, 10))))
    assert len(reference) == 60 and reference != plain
    for world_size in (2, 3, 4, 7):
        found = []
        for rank in range(world_size):
            found += fingerprints(list(a_stream(indexes, data, rank, world_size).iterate(4, 10)))
        assert sorted(found) == [entry for entry in reference if entry[0] >= 4]


def test_jittered_batches_have_one_shape(indexes: dict[str, Index]) -> None:
    jittered = SMALL.model_copy(update={"large_scale_jitter": True, "jitter_size": 80})
    stream = a_stream(indexes, some_data(transforms=jittered, extra=[]))
    batches = [batch for step in stream.iterate(0, 10) for batch in step.micro_batches]
    assert {tuple(batch.images.shape) for batch in batches} == {(2, 3, 96, 96)}
    longest = {max(target.size) for batch in batches for target in batch.targets}
    assert max(longest) == 80 and min(longest) < 40
    for batch in batches:
        for mask, target in zip(batch.mask, batch.targets, strict=True):
            assert (~mask).sum() == target.size[0] * target.size[1]


def test_canvases_are_multiples(indexes: dict[str, Index]) -> None:
    coarse = SMALL.model_copy(update={"canvas_multiple": 96})
    stream = a_stream(indexes, some_data(transforms=coarse))
    shapes = {b.images.shape[2:] for step in stream.iterate(0, 10) for b in step.micro_batches}
    assert shapes == {(96, 96)}
