"""Sources as the plan sees them, and what all ranks together read of a plan."""

import numpy as np

from pipeline.data.plan.sampling import StreamSource
from pipeline.data.plan.slot import Slot
from pipeline.data.plan.steps import Plan


def source(
    name: str = "a",
    shards: tuple[int, ...] = (5, 3, 4),
    categories: list[list[int]] | None = None,
    weight: float = 1.0,
) -> StreamSource:
    number = sum(shards)
    categories = [[] for _ in range(number)] if categories is None else categories
    return StreamSource(
        name=name,
        num_samples=number,
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), shards),
        category_offsets=np.cumsum([0, *map(len, categories)]),
        categories=np.array([c for of_image in categories for c in of_image], dtype=np.int32),
        weight=weight,
        digest=f"digest-{name}-{number}",
    )


def long_tail(number: int = 400, num_categories: int = 30, shard: int = 7) -> StreamSource:
    rng = np.random.default_rng(3)
    chances = 1 / np.arange(1, num_categories + 1)
    categories = [
        rng.choice(num_categories, size=rng.integers(0, 4), p=chances / chances.sum()).tolist()
        for _ in range(number)
    ]
    shards = (*[shard] * (number // shard), number % shard)
    return source("tail", tuple(n for n in shards if n), categories)


def order(plan: Plan, steps: range, world_size: int = 1) -> list[Slot]:
    """What all ranks together read, padding left out."""
    return [
        slot
        for step in steps
        for rank in range(world_size)
        for slot in plan.step(step, rank, world_size)
        if slot.weight
    ]
