"""What prepared shards hold, counted from their index; only some samples are read themselves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.data.sample import Sample
from pipeline.data.shards.index import Index
from pipeline.data.vocabulary.categories import Frequency, Vocabulary

PERCENTILES = (0, 5, 50, 95, 100)
LOOKED_AT = 200
"""Captions and negative lists stand in the samples alone, so they are counted in so many."""


@dataclass(frozen=True)
class ShardFacts:
    """Counts of one source. Sizes are pixels at `PERCENTILES`: of the shorter, the longer side."""

    samples: int
    shards: int
    num_bytes: int
    boxes: int
    unlabelled_boxes: int
    images_without_boxes: int
    most_boxes: int
    image_counts: dict[int, int]
    box_counts: dict[int, int]
    groups: dict[int, Frequency]
    declared: bool
    """Whether the groups are the data set's own, or follow from the images counted here."""
    shorter: list[int]
    longer: list[int]
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    unreadable: list[tuple[str, str]]

    def group_counts(self) -> dict[Frequency, tuple[int, int]]:
        """By frequency group: categories in all, and those with a box here."""
        every = Counter(self.groups.values())
        seen = Counter(group for number, group in self.groups.items() if self.image_counts[number])
        return {group: (every[group], seen[group]) for group in ("r", "c", "f") if every[group]}


@dataclass(frozen=True)
class SampleFacts:
    """Counts over `samples` of the source that were read, spread evenly over it."""

    samples: int
    captions: int
    coarse: int
    with_negatives: int
    negatives: int
    not_exhaustive: int


def facts_of(index: Index) -> ShardFacts:
    """Count a source by the columns of its index, without its samples."""
    image_counts = index.image_counts()
    boxes_of = np.diff(index.category_offsets)
    declared = any(index.vocabulary.frequencies)
    sides = np.stack([index.width, index.height])
    labelled = index.category_ids[index.category_ids >= 0]
    numbers, counts = np.unique(labelled, return_counts=True)
    box_counts = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    dropped, examples, unreadable = (
        index.report.get(part) for part in ("dropped", "examples", "unreadable")
    )
    return ShardFacts(
        samples=index.num_samples,
        shards=len(index.shards),
        num_bytes=sum(shard.num_bytes for shard in index.shards),
        boxes=len(index.category_ids),
        unlabelled_boxes=len(index.category_ids) - len(labelled),
        images_without_boxes=int((boxes_of == 0).sum()),
        most_boxes=int(boxes_of.max(initial=0)),
        image_counts=image_counts,
        box_counts={number: box_counts.get(number, 0) for number in index.vocabulary.ids},
        groups=_groups(index.vocabulary, image_counts, declared),
        declared=declared,
        shorter=_percentiles(sides.min(axis=0)),
        longer=_percentiles(sides.max(axis=0)),
        dropped=dict(dropped) if isinstance(dropped, Mapping) else {},
        examples=dict(examples) if isinstance(examples, Mapping) else {},
        unreadable=[tuple(entry) for entry in unreadable] if isinstance(unreadable, list) else [],
    )


def look_at(index: Index) -> SampleFacts:
    """Read up to `LOOKED_AT` samples; raises `StorageError` for a damaged or missing shard."""
    number = min(index.num_samples, LOOKED_AT)
    places = np.linspace(0, index.num_samples - 1, number).round().astype(int)
    samples: Sequence[Sample] = [index.read(place) for place in places.tolist()]
    return SampleFacts(
        samples=number,
        captions=sum(bool(sample.caption) for sample in samples),
        coarse=sum(sample.coarse for sample in samples),
        with_negatives=sum(bool(sample.negative_category_ids) for sample in samples),
        negatives=sum(len(sample.negative_category_ids) for sample in samples),
        not_exhaustive=sum(len(sample.not_exhaustive_category_ids) for sample in samples),
    )


def choose_samples(
    index: Index, number: int, *, category_id: int | None = None, rare_first: bool = False
) -> list[int]:
    """Up to `number` samples to show, the same each time: of categories from rare to frequent.

    Each is an image of another category, as far as there are any; the categories stand at even
    steps between the one with the fewest images and the one with the most, or with `rare_first`
    are those with the fewest. With a `category_id`, only its images.
    """
    # One order of all samples decides every choice; it follows from the data alone.
    rng = np.random.Generator(np.random.Philox(key=int(index.digest, 16)))
    priority = rng.permutation(index.num_samples)
    boxes_of = np.diff(index.category_offsets)
    if category_id is not None:
        owners = np.repeat(np.arange(index.num_samples), boxes_of)
        found = np.unique(owners[index.category_ids == category_id])
        return found[np.argsort(priority[found])][:number].tolist()
    chosen: dict[int, None] = {}
    best = _best_of_categories(index, priority, boxes_of)
    picks = np.arange(len(best)) if rare_first else np.linspace(0, len(best) - 1, number)
    for pick in np.unique(picks.round().astype(int)) if len(best) else ():
        for place in best[pick]:
            if place not in chosen and len(chosen) < number:
                chosen[place] = None
                break
    rest = (place for place in np.argsort(priority).tolist() if place not in chosen)
    chosen.update(
        (place, None) for place, _ in zip(rest, range(number - len(chosen)), strict=False)
    )
    return list(chosen)


def _best_of_categories(
    index: Index, priority: NDArray[np.int64], boxes_of: NDArray[np.int64]
) -> list[list[int]]:
    """A few images of each category that has any, fewest images first."""
    owners = np.repeat(np.arange(index.num_samples), boxes_of)
    labelled = np.flatnonzero(index.category_ids >= 0)
    ids = index.category_ids[labelled]
    order = labelled[np.lexsort((priority[owners[labelled]], ids))]
    counts = index.image_counts()
    starts = np.flatnonzero(np.diff(index.category_ids[order], prepend=-1))
    found = [
        (counts.get(int(index.category_ids[order[start]]), 0), start, stop)
        for start, stop in pairwise([*starts.tolist(), len(order)])
    ]
    return [
        list(dict.fromkeys(owners[order[a : min(b, a + 64)]].tolist())) for _, a, b in sorted(found)
    ]


def _groups(
    vocabulary: Vocabulary, image_counts: Mapping[int, int], declared: bool
) -> dict[int, Frequency]:
    """As declared, or by LVIS's rule of 10 and 100 images."""
    if declared:
        return {c.id: c.frequency for c in vocabulary.categories if c.frequency is not None}
    return {
        number: "r" if count <= 10 else "c" if count <= 100 else "f"
        for number, count in image_counts.items()
    }


def _percentiles(values: NDArray[np.int32]) -> list[int]:
    if not len(values):
        return [0] * len(PERCENTILES)
    return [int(value) for value in np.percentile(values, PERCENTILES, method="nearest")]
