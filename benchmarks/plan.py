"""What the plan costs and gives: at scale, by the size of its shuffle window, by like shapes.

    python benchmarks/plan.py scale
    python benchmarks/plan.py mixing
    python benchmarks/plan.py padding --sizes SIZES.csv --sizes instances_train2017.json

`scale` plans ImageNet-21k, Objects365 and LVIS (categories drawn by a power law) beside a
permutation of everything, a list of repetitions and torch's WeightedRandomSampler. `mixing` sets
what a batch sees against what a reader has to hold. `padding` takes the sizes of real images, a csv
with the columns image_w and image_h or a json with `images`.
"""

import argparse
import csv
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan.like_shapes import LikeShapes
from pipeline.data.plan.order import SourceOrder
from pipeline.data.plan.sampling import Sampling, StreamSource, repeat_factors
from pipeline.data.plan.slot import Slot, micro_batches
from pipeline.data.plan.steps import Plan, build_plan
from pipeline.recipe import Transforms

SHARD = 1000
IMAGENET, OBJECTS365, LVIS = (14_197_122, 21_841, 1), (1_742_289, 365, 14), (100_170, 1203, 12)
"""Images, categories, and boxes of an image."""


def a_source(name: str, images: int, categories: int, boxes: int, seed: int) -> StreamSource:
    """A source of the size of a real one, the frequency of its categories a power law."""
    rng = np.random.default_rng(seed)
    chances = 1 / np.arange(1, categories + 1, dtype=np.float64) ** 1.2
    held = rng.choice(categories, size=images * boxes, p=chances / chances.sum())
    return StreamSource(
        name=name,
        num_samples=images,
        shard_of=np.arange(images, dtype=np.int32) // SHARD,
        category_offsets=np.arange(0, images * boxes + 1, boxes),
        categories=held.astype(np.int32),
    )


def measured(make: Callable[[], object]) -> tuple[float, float, float, object]:
    """Seconds, then peak and held megabytes of a second time, and what was made."""
    begun = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - begun
    del made
    tracemalloc.start()
    made = make()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak / 1e6, held / 1e6, made


def row(name: str, seconds: float, peak: float, held: float, rest: str = "") -> None:
    """One line of the table."""
    print(f"{name:<44} {seconds:>9.2f} s {peak:>9.0f} MB peak {held:>8.0f} MB held  {rest}")


def scale(divide: int) -> None:
    """Build plans of 16 million samples, and ask them for slots here and there."""
    shapes = {"imagenet21k": IMAGENET, "objects365": OBJECTS365, "lvis": LVIS}
    sources = {
        name: a_source(name, images // divide, categories, boxes, seed)
        for seed, (name, (images, categories, boxes)) in enumerate(shapes.items())
    }
    train, extra = [sources["lvis"], sources["objects365"]], [sources["imagenet21k"]]
    for sampling in ("uniform", "repeat_factor", "class_aware"):
        seconds, peak, held, plan = measured(
            lambda sampling=sampling: build_plan(
                train, extra, batch_size=64, seed=0, sampling=sampling, repeat_threshold=0.001
            )
        )
        assert isinstance(plan, Plan)
        row(f"longtail, {sampling}", seconds, peak, held, f"{plan.epoch_lengths}")
        for stream in plan.streams.values():
            print(f"    {stream.name}: {first_slots(stream.orders[-1])}")
        begun = time.perf_counter()
        for step in range(50):
            plan.batch(10_000 + step)
        print(f"    {(time.perf_counter() - begun) / 50 * 1e3:.1f} ms a step of 64, 50 in a row")
    peers(sources)


def first_slots(order: SourceOrder) -> str:
    """Milliseconds of the first slot of epochs that nothing is known of yet, and of the next."""
    texts = []
    for epoch, share in ((1, 0.0), (2, 0.5), (3, 0.9), (1000, 0.9)):
        position = int((epoch + share) * order.epoch_length)
        tracemalloc.start()
        order.index(position + order.epoch_length * 5000)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        begun = time.perf_counter()
        order.index(position)
        first = time.perf_counter() - begun
        texts.append(f"epoch {epoch} at {share:.0%} {first * 1e3:.1f} ms, {peak:.1f} MB")
    return f"first slot of {order.name}: " + "; ".join(texts)


def peers(sources: dict[str, StreamSource]) -> None:
    """The ways that need the whole epoch at once, whatever of it is read."""
    import torch
    from torch.utils.data import WeightedRandomSampler

    number = sum(source.num_samples for source in sources.values())
    rng = np.random.default_rng(0)
    seconds, peak, held, _ = measured(lambda: rng.permutation(number))
    row("peer: permutation of everything, an epoch", seconds, peak, held)
    trained = sources["objects365"]

    def repeated() -> NDArray[np.int64]:
        factors = repeat_factors(trained, 0.001)
        whole = np.floor(factors)
        copies = (whole + (rng.random(len(factors)) < factors - whole)).astype(np.int64)
        indices: NDArray[np.int64] = np.repeat(np.arange(len(factors)), copies)
        return indices[rng.permutation(len(indices))]

    seconds, peak, held, _ = measured(repeated)
    row("peer: list of repetitions, objects365, an epoch", seconds, peak, held)
    weights = torch.ones(number, dtype=torch.double)
    seconds, peak, held, _ = measured(lambda: iter(WeightedRandomSampler(weights, number)))
    row("peer: WeightedRandomSampler.__iter__", seconds, peak, held)

    def drawn() -> object:
        return next(iter(WeightedRandomSampler(weights, number)))

    row("peer: WeightedRandomSampler, its first index", *measured(drawn)[:3])
    try:
        next(iter(WeightedRandomSampler(torch.ones(2**24 + 1), 1)))
        print("peer: WeightedRandomSampler takes 2**24 + 1 samples")
    except RuntimeError as error:
        print(f"peer: WeightedRandomSampler of 2**24 + 1 samples: {error}")


def mixing(shards: int) -> None:
    """What a batch of 32 sees of shards and of classes that lie together, by the window."""
    classes = shards * 3 // 2
    labels = np.arange(shards * SHARD) * classes // (shards * SHARD)
    source = StreamSource(
        name="sorted",
        num_samples=shards * SHARD,
        shard_of=np.arange(shards * SHARD, dtype=np.int32) // SHARD,
        category_offsets=np.arange(shards * SHARD + 1),
        categories=labels.astype(np.int32),
    )
    print(
        f"{shards} shards of {SHARD}, {classes} classes, sorted by class; batches of 32\n"
        "window   shards held   shards in 1000 samples   shards in a batch   effective classes   "
        "classes in 10,000 samples"
    )
    rng = np.random.default_rng(0)
    for window in [w for w in (1, 4, 16, 64, 256) if w < shards] + [shards]:
        order = SourceOrder(source, 0, sampling="uniform", window_shards=window)
        starts = [int(s) * 10_000 for s in rng.choice(shards // 10, size=10, replace=False)]
        runs = [[order.index(start + k) for k in range(10_000)] for start in starts]
        print(f"{window:>6} {window:>13} {described(np.array(runs), labels)}")
    print(f"perfect {'all':>12} {described(rng.integers(len(labels), size=(10, 10_000)), labels)}")


def described(runs: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """Columns of the table of `mixing` for runs of 10,000 positions."""
    per_thousand = np.mean([len(np.unique(part // SHARD)) for part in runs.reshape(-1, 1000)])
    batches = runs[:, : 10_000 // 32 * 32].reshape(-1, 32)
    in_batch = np.mean([len(np.unique(batch // SHARD)) for batch in batches])
    same = np.mean([np.mean(np.bincount(labels[b])[labels[b]] - 1) / 31 for b in batches])
    met = np.mean([len(np.unique(labels[run])) for run in runs])
    effective = f"{1 / same:.0f}" if same else "all"
    return f"{per_thousand:>24.0f} {in_batch:>19.1f} {effective:>19} {met:>27.0f}"


def read_sizes(path: Path) -> NDArray[np.int64]:
    """(N, 2) heights and widths of a csv with image_w and image_h, or of a json with `images`."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            pairs = [(int(r["image_h"]), int(r["image_w"])) for r in csv.DictReader(file)]
    else:
        tree = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(image["height"], image["width"]) for image in tree["images"]]
    return np.array(pairs)


def padding(paths: list[Path], ranks: int, batch_size: int, steps: int) -> None:
    """Padded share, waiting ranks and distinct canvases, with and without like shapes."""
    sizes = np.concatenate([read_sizes(path) for path in paths])
    print(
        f"{len(sizes)} images of {', '.join(path.name for path in paths)}; {steps} steps of "
        f"{batch_size}, {ranks} ranks, DINO's transforms\n"
        "micro-batch  like shapes  multiple   padded   slowest rank / mean   canvases   pixels"
    )
    source = StreamSource(
        name="sizes",
        num_samples=len(sizes),
        shard_of=np.arange(len(sizes), dtype=np.int32) // SHARD,
        category_offsets=np.zeros(1, dtype=np.int64),
        categories=np.zeros(0, dtype=np.int32),
    )
    sampling: Sampling = "uniform"
    for micro_batch in (2, 4, 8):
        plain = 0.0
        for multiple in (32, 128):
            for grouped in (False, True):
                shapes = LikeShapes(
                    {"sizes": (sizes[:, 0], sizes[:, 1])}, Transforms(), micro_batch
                )
                plan = build_plan(
                    [source],
                    batch_size=batch_size,
                    seed=0,
                    sampling=sampling,
                    like_shapes=shapes if grouped else None,
                )
                padded, slowest, canvases = padded_of(plan, shapes, ranks, steps, multiple)
                # For the same pixels of images, since the short sides that are drawn differ.
                pixels = 1 / (1 - padded)
                plain = plain or pixels
                print(
                    f"{micro_batch:>11}  {'yes' if grouped else 'no':>11}  {multiple:>8} "
                    f"{padded:>8.1%} {slowest:>21.2f} {canvases:>10} {pixels / plain:>7.2f}x"
                )


def padded_of(
    plan: Plan, shapes: LikeShapes, ranks: int, steps: int, multiple: int
) -> tuple[float, float, int]:
    """Padded share, pixels of the slowest rank over the mean, distinct canvases."""
    of_images, loads, canvases = 0, [], set()
    for step in range(steps):
        batches = [
            micro_batches(plan.step(step, rank, ranks), shapes.micro_batch) for rank in range(ranks)
        ]
        load = []
        for of_rank in batches:
            pixels = 0
            for batch in of_rank:
                height, width, images = canvas_of(batch, shapes, multiple)
                canvases.add((height, width))
                pixels += len(batch) * height * width
                of_images += images
            load.append(pixels)
        loads.append(load)
    table = np.array(loads)
    slowest = float((table.max(axis=1) / table.mean(axis=1)).mean())
    return float(1 - of_images / table.sum()), slowest, len(canvases)


def canvas_of(batch: list[Slot], shapes: LikeShapes, multiple: int) -> tuple[int, int, int]:
    """Height and width of a micro-batch, and the pixels of its images."""
    sizes = np.array([shapes.size_of(slot) for slot in batch])
    height, width = (-(-sizes.max(axis=0) // multiple) * multiple).tolist()
    return height, width, int(sizes.prod(axis=1).sum())


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("scale", help="millions of samples, beside naive peers")
    verb.add_argument("--divide", type=int, default=1, help="so many times fewer images")
    verb = verbs.add_parser("mixing", help="shuffle window: mixing against shards held")
    verb.add_argument("--shards", type=int, default=1000)
    verb = verbs.add_parser("padding", help="padded pixels with and without like shapes")
    verb.add_argument("--sizes", type=Path, action="append", required=True)
    verb.add_argument("--ranks", type=int, default=8)
    verb.add_argument("--batch-size", type=int, default=64)
    verb.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    if given.verb == "scale":
        scale(given.divide)
    elif given.verb == "mixing":
        mixing(given.shards)
    else:
        padding(given.sizes, given.ranks, given.batch_size, given.steps)


if __name__ == "__main__":
    main()
