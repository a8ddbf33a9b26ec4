"""The data plan of a cluster, simulated on one machine: many ranks, a node lost, shards and nodes.

    python benchmarks/plan_at_scale.py [--ranks 512] [--ranks-per-node 8] [--batch-size 1024]

ImageNet-21k beside Objects365 v2 and LVIS, as columns with nothing behind them: 14.2 M + 1.74 M +
0.1 M samples in shards of 1000, categories drawn by a power law, extra data in turn with box data
and as 2x2 mosaics. Printed are time and memory of making the plan and of what a rank asks of it for
a step; how evenly steps fall on nodes and shards; and what changes when a node is lost.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from plan import IMAGENET, LVIS, OBJECTS365, SHARD, a_source, measured

from pipeline.data.plan.slot import Slot
from pipeline.data.plan.steps import Plan, build_plan

FIRST_STEP = 10_000


def make_plan(divide: int, batch_size: int) -> tuple[Plan, float, float, float]:
    """The plan, its seconds, and its peak and held megabytes, the columns not counted."""
    shapes = {"imagenet21k": IMAGENET, "objects365": OBJECTS365, "lvis": LVIS}
    sources = {
        name: a_source(name, images // divide, categories, boxes, seed)
        for seed, (name, (images, categories, boxes)) in enumerate(shapes.items())
    }
    for name, source in sources.items():
        shards = int(source.shard_of[-1]) + 1
        print(f"  {name:12} {source.num_samples:>10,} samples in {shards:,} shards")
    seconds, peak, held, plan = measured(
        lambda: build_plan(
            [sources["lvis"], sources["objects365"]],
            [sources["imagenet21k"]],
            batch_size=batch_size,
            seed=0,
            repeat_threshold=0.001,
            mosaic=True,
        )
    )
    assert isinstance(plan, Plan)
    return plan, seconds, peak, held


def milliseconds(works: Iterable[Callable[[], object]]) -> list[float]:
    """Of each, one after the other."""
    found = []
    for work in works:
        begun = time.perf_counter()
        work()
        found.append((time.perf_counter() - begun) * 1e3)
    return found


def print_times(plan: Plan, ranks: int) -> None:
    """What one rank pays for its own part of a step, and what all of them would pay together."""
    steps = range(FIRST_STEP, FIRST_STEP + 20)

    def of_rank(step: int, rank: int) -> Callable[[], object]:
        return lambda: plan.step(step, rank, ranks)

    first = milliseconds([of_rank(FIRST_STEP + 1_000_000, ranks - 1)])[0]
    one = milliseconds([of_rank(step, ranks // 2) for step in steps])
    every = milliseconds([of_rank(FIRST_STEP + 40, rank) for rank in range(ranks)])
    whole = milliseconds([lambda: plan.batch(FIRST_STEP + 41)])[0]
    print(
        f"  a rank's part of a step: first of an unknown epoch {first:.1f} ms, then "
        f"{np.median(one):.2f} ms (most {max(one):.1f}); all {ranks} ranks one after the other "
        f"{sum(every):.0f} ms; the whole batch {whole:.0f} ms"
    )


def shards_of(plan: Plan, slots: Iterable[Slot]) -> Counter[tuple[str, int]]:
    """Reads of each shard, the partners of mosaics included."""
    return Counter(
        (slot.source, index // SHARD) for slot in slots for index in (slot.index, *slot.partners)
    )


def nodes_of(plan: Plan, step: int, ranks: int, per_node: int) -> list[list[Slot]]:
    """The slots of each node in a step."""
    return [
        [slot for rank in range(first, first + per_node) for slot in plan.step(step, rank, ranks)]
        for first in range(0, ranks, per_node)
    ]


def print_balance(plan: Plan, ranks: int, per_node: int, steps: int) -> None:
    """Reads of nodes and of shards, for each kind of step."""
    for kind in ("train", "extra"):
        chosen = [s for s in range(FIRST_STEP, FIRST_STEP + 4 * steps) if plan.kind(s) == kind]
        of_shards: Counter[tuple[str, int]] = Counter()
        of_nodes = np.zeros(-(-ranks // per_node))
        distinct, busiest = [], []
        touched: list[set[tuple[str, int]]] = [set() for _ in of_nodes]
        for step in chosen[:steps]:
            whole: Counter[tuple[str, int]] = Counter()
            for node, slots in enumerate(nodes_of(plan, step, ranks, per_node)):
                reads = shards_of(plan, slots)
                of_nodes[node] += reads.total()
                distinct.append(len(reads))
                touched[node] |= set(reads)
                whole.update(reads)
            busiest.append(max(whole.values()))
            of_shards.update(whole)
        sizes = [len(shards) for shards in touched]
        print(
            f"  {steps} {kind} steps: {of_nodes.sum() / steps:,.0f} reads a step, nodes "
            f"{of_nodes.min() / of_nodes.mean():.3f} to {of_nodes.max() / of_nodes.mean():.3f} of "
            f"the mean; {len(of_shards)} shards, {min(sizes)} to {max(sizes)} of them read by "
            f"each node, {np.mean(distinct):.1f} by a node in a step; the busiest shard has "
            f"{np.mean(busiest):.0f} reads a step"
        )


def print_loss(plan: Plan, ranks: int, per_node: int) -> None:
    """The next step on one node less: time to plan it, that it is the same, and what moves."""
    step, fewer = FIRST_STEP + 100, ranks - per_node
    before = nodes_of(plan, step, ranks, per_node)
    begun = time.perf_counter()
    plan.step(step, 0, fewer)
    seconds = time.perf_counter() - begun
    after = nodes_of(plan, step, fewer, per_node)

    def real(nodes: list[list[Slot]]) -> list[Slot]:
        return [slot for slots in nodes for slot in slots if slot.weight]

    if not real(before) == real(after) == plan.batch(step):
        raise SystemExit(f"step {step} has another global batch with {fewer} ranks than {ranks}")
    home = {slot.position: node for node, slots in enumerate(before) for slot in slots}
    moved = sum(
        home[slot.position] != node
        for node, slots in enumerate(after)
        for slot in slots
        if slot.weight
    )
    loads = [sum(slot.weight for slot in plan.step(step, rank, fewer)) for rank in range(fewer)]
    print(
        f"  a node lost, {ranks} to {fewer} ranks: a rank plans its part in {seconds * 1e3:.2f} "
        f"ms; the global batch is the same, {min(loads)} to {max(loads)} images a rank, {moved} of "
        f"{plan.batch_size} samples of the step on another node"
    )


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16, help="of each kind, for the balance")
    parser.add_argument("--divide", type=int, default=1, help="so many times fewer images")
    given = parser.parse_args()
    if given.ranks % given.ranks_per_node or given.ranks <= given.ranks_per_node:
        parser.error("--ranks has to be a multiple of --ranks-per-node, and more than one of it")
    nodes = given.ranks // given.ranks_per_node
    print(f"{given.ranks} ranks on {nodes} nodes, batches of {given.batch_size}")
    plan, seconds, peak, held = make_plan(given.divide, given.batch_size)
    print(f"  plan: {seconds:.2f} s, {peak:.0f} MB at its peak, {held:.1f} MB held by each process")
    print_times(plan, given.ranks)
    print_balance(plan, given.ranks, given.ranks_per_node, given.steps)
    print_loss(plan, given.ranks, given.ranks_per_node)


if __name__ == "__main__":
    main()
