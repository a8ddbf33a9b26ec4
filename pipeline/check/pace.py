"""Time, data rate and GPU-hours of a run, as far as something was measured; else unknown."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pipeline.data.plan.steps import Plan
from pipeline.data.shards.index import Index
from pipeline.data.storage.files import is_local_path
from pipeline.recipe import Recipe, ShardReading
from pipeline.training.metrics import METRICS


class StepTime(NamedTuple):
    """Seconds of a step, or None, and where they are from, or why they are not known."""

    seconds: float | None
    origin: str


def step_time(recipe: Recipe, workers: int, given: float | None) -> StepTime:
    """What the user gives; else the median of an earlier run of this recipe at this world size.

    Nothing is scaled from one world size or machine to another.
    """
    if given is not None:
        return StepTime(given, "given")
    found = _measured(recipe.run_dir)
    ask = "give --step-seconds, or train a few hundred steps and run this again"
    if found is None:
        return StepTime(None, f"{recipe.run_dir} has no steps measured; {ask}")
    seconds, ranks = found
    if ranks != workers:
        return StepTime(
            None,
            f"{recipe.run_dir} took {seconds:.3g} s a step with {ranks or 'unknown'} workers, "
            f"which says little of {workers}; {ask}",
        )
    return StepTime(seconds, f"median of {recipe.run_dir}, with {workers} workers")


def _measured(run_dir: Path) -> tuple[float, int | None] | None:
    """Seconds of a step and the world size of a run, None where nothing was logged."""
    try:
        lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    seconds = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # A kill cut it short.
        if isinstance(event, dict) and event.get("event") == "step":
            value = event.get("seconds")
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                seconds.append(float(value))
    # The first line holds what is compiled, allocated and cached once.
    seconds = seconds[1:] or seconds
    if not seconds:
        return None
    try:
        facts = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        ranks = facts["world_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return median(seconds), None
    return median(seconds), ranks if isinstance(ranks, int) else None


class Reads(NamedTuple):
    """Bytes and images that a run reads, `bytes_of_step` those of the step that reads most.

    `of_machine` are the bytes of whole shards that each machine fetches in the run; None where
    samples are read one by one, from where they are.
    """

    images: float
    num_bytes: float
    bytes_of_step: float
    of_machine: float | None


def reads_of(
    plan: Plan, indexes: Mapping[str, Index | None], steps: int, reading: ShardReading
) -> Reads:
    """From the mean bytes of a sample in its shards, and how many samples an example is made of."""
    slots = plan.samples_before(steps)
    images = num_bytes = 0.0
    of_steps = []
    for name, stream in plan.streams.items():
        read = 1 + stream.partners * stream.partner_chance
        sizes = [mean_bytes(indexes[order.name]) for order in stream.orders]
        counts = [slots[order.name] for order in stream.orders]
        images += read * sum(counts)
        num_bytes += read * sum(count * size for count, size in zip(counts, sizes, strict=True))
        places = plan.extra_slots if name == "extra" else plan.batch_size - plan.extra_slots
        if not plan.mixed:
            places = plan.batch_size
        mean = sum(size * float(share) for size, share in zip(sizes, stream.shares, strict=True))
        of_steps.append(read * places * mean)
    of_step = sum(of_steps) if plan.mixed else max(of_steps)
    return Reads(images, num_bytes, of_step, _whole_shards(plan, indexes, slots, reading))


def _whole_shards(
    plan: Plan,
    indexes: Mapping[str, Index | None],
    slots: Mapping[str, int],
    reading: ShardReading,
) -> float | None:
    """Bytes of the shards that a machine fetches: every one that is elsewhere, in each epoch, and
    once in all where the cache holds them together."""
    sizes = {
        name: sum(shard.num_bytes for shard in index.shards)
        for name, index in indexes.items()
        if index is not None and name in slots and not is_local_path(index.url)
    }
    if reading.how != "shards" or not sizes:
        return None
    kept = sum(sizes.values()) <= reading.cache_gigabytes * 1e9
    fetched = 0.0
    for name, size in sizes.items():
        epochs = slots[name] / plan.epoch_lengths[name]
        fetched += size * (min(epochs, 1.0) if kept else epochs)
    return fetched


def mean_bytes(index: Index | None) -> float:
    """Of a sample in its shard, with its annotation and what the tar adds."""
    assert index is not None, "only prepared sources are planned"
    return sum(shard.num_bytes for shard in index.shards) / max(index.num_samples, 1)
