"""Through the real stream: the same samples, seeds and pixels for every layout and every start."""

from itertools import product

import pytest
from coloured_world import a_source, a_stream, fingerprints, joined, some_data

from pipeline.data.shards.index import Index
from pipeline.recipe import Data

STEPS = 7
BATCH = 6


def mixture(name: str, **given: object) -> Data:
    plain = a_source("plain", use_labels=False, weight=0.5)
    match name:
        case "train":
            return some_data(extra=[], **given)
        case "alternate":
            return some_data(extra=[a_source("extra"), plain], extra_ratio=0.6, **given)
        case "mixed":
            return some_data(extra=[a_source("extra"), plain], extra_mode="mixed", **given)
        case "like_shapes":
            return some_data(aspect_ratio_grouping=True, **given)
        case "class_aware":
            return some_data(sampling="class_aware", shuffle_shards=2, **given)
    raise AssertionError(name)


MIXTURES = ("train", "alternate", "mixed", "like_shapes", "class_aware")


@pytest.fixture(scope="module")
def references(indexes: dict[str, Index]) -> dict[str, list[tuple[int, str, str]]]:
    """(step, sample id, digest of seed, pixels and targets) from one rank that reads in line."""
    return {
        name: fingerprints(
            list(a_stream(indexes, mixture(name), batch_size=BATCH).iterate(0, STEPS))
        )
        for name in MIXTURES
    }


@pytest.mark.parametrize(("name", "world_size"), product(MIXTURES, (1, 2, 3, 4)))
def test_every_world_has_the_same_global_batches(
    indexes: dict[str, Index],
    references: dict[str, list[tuple[int, str, str]]],
    name: str,
    world_size: int,
) -> None:
    ranks = [
        list(a_stream(indexes, mixture(name), rank, world_size, BATCH).iterate(0, STEPS))
        for rank in range(world_size)
    ]
    expected = references[name]
    assert len(expected) == STEPS * BATCH
    for step in range(STEPS):
        together = joined(fingerprints([steps[step]]) for steps in ranks)
        wanted = [entry for entry in expected if entry[0] == step]
        # Batches of like shapes deal their samples out in another order, and those alone.
        assert sorted(together) == sorted(wanted)
        assert name == "like_shapes" or together == wanted


@pytest.mark.parametrize("name", MIXTURES)
def test_any_step_is_one_to_go_on_from(
    indexes: dict[str, Index], references: dict[str, list[tuple[int, str, str]]], name: str
) -> None:
    for start in range(STEPS):
        stream = a_stream(indexes, mixture(name), batch_size=BATCH)
        expected = [entry for entry in references[name] if entry[0] >= start]
        assert fingerprints(list(stream.iterate(start, STEPS))) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "name"), product((1, 2, 3), MIXTURES))
def test_any_number_of_reader_processes_gives_the_same(
    indexes: dict[str, Index],
    references: dict[str, list[tuple[int, str, str]]],
    workers: int,
    name: str,
) -> None:
    data, start = mixture(name, workers=workers), workers
    ranks = [
        list(a_stream(indexes, data, rank, 2, BATCH).iterate(start, STEPS)) for rank in range(2)
    ]
    together = joined(fingerprints(steps) for steps in ranks)
    assert sorted(together) == sorted(entry for entry in references[name] if entry[0] >= start)
