"""How often each sample of a source comes in an epoch; pure, and free of torch.

Every way of sampling gives whole numbers of copies by systematic resampling: a sample that is due
x times comes floor(x) or ceil(x) times, x times on average, and the epoch has always one length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan.draws import draw
from pipeline.errors import DataError

BLOCK = 1 << 20
"""Boxes that are looked at together, which bounds the memory of going over a source."""
SHIFT = 20
ONE = 1 << SHIFT
"""Sums are counted in units of 2**-20 positions, so that they are exact."""

Sampling = Literal["repeat_factor", "class_aware", "uniform"]


@dataclass(frozen=True)
class StreamSource:
    """What the plan needs to know of one source.

    `shard_of` is (N,), the shard of each sample, never decreasing. Sample i has the categories
    `categories[category_offsets[i] : category_offsets[i + 1]]`; negative ones do not count.
    """

    name: str
    num_samples: int
    shard_of: NDArray[np.integer]
    category_offsets: NDArray[np.integer]
    categories: NDArray[np.integer]
    weight: float = 1.0
    digest: str = ""

    @property
    def shard_edges(self) -> NDArray[np.int64]:
        """(shards + 1,): the samples of shard k are `shard_edges[k] : shard_edges[k + 1]`."""
        starts = np.flatnonzero(self.shard_of[1:] != self.shard_of[:-1]) + 1
        return np.concatenate([[0], starts, [self.num_samples]])

    def pairs(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(samples, categories) from sample `start` to before `stop`, each pair once, in order."""
        offsets = self.category_offsets[start : stop + 1]
        if not len(self.categories):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        categories = self.categories[offsets[0] : offsets[-1]].astype(np.int64)
        samples = np.repeat(np.arange(start, stop), np.diff(offsets))
        kept = categories >= 0
        width = int(categories.max(initial=0)) + 1
        keys = np.sort(samples[kept] * width + categories[kept])
        samples, categories = np.divmod(keys[np.diff(keys, prepend=-1) > 0], width)
        return samples, categories

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of runs of samples that have about `BLOCK` boxes together."""
        if not len(self.categories):
            return
        start = 0
        while start < self.num_samples:
            boxes = int(self.category_offsets[start]) + BLOCK
            stop = int(np.searchsorted(self.category_offsets, boxes, side="right")) - 1
            stop = min(max(stop, start + 1), start + BLOCK, self.num_samples)
            yield start, stop
            start = stop


def image_counts(source: StreamSource) -> NDArray[np.int64]:
    """In how many images each category is, shape (largest category + 1,)."""
    counts = np.zeros(int(source.categories.max(initial=-1)) + 1, dtype=np.int64)
    for start, stop in source.blocks():
        counts += np.bincount(source.pairs(start, stop)[1], minlength=len(counts))
    return counts


def repeat_factors(source: StreamSource, threshold: float) -> NDArray[np.float64]:
    """r(I) = max over the categories c of image I of max(1, sqrt(threshold / f(c))), shape (N,).

    f(c) is the share of the source's images that hold c (LVIS, Gupta et al. 2019, appendix B).
    """
    factors = np.ones(source.num_samples)
    if threshold <= 0:
        return factors
    frequency = image_counts(source) / source.num_samples
    of_category = np.sqrt(threshold / np.maximum(frequency, 1 / source.num_samples))
    for start, stop in source.blocks():
        samples, categories = source.pairs(start, stop)
        if not len(samples):
            continue
        starts = np.flatnonzero(np.diff(samples, prepend=-1))
        largest = np.maximum.reduceat(of_category[categories], starts)
        factors[samples[starts]] = np.maximum(largest, 1)
    return factors


class Copies(Protocol):
    """How often the samples of a source come; `epoch_length` positions in every epoch."""

    epoch_length: int
    num_left_out: int
    """Samples that no epoch has."""

    def shard_sums(self, epoch: int) -> NDArray[np.int64]:
        """What each shard adds to the sum that positions are cut from, in units of 2**-20."""
        ...

    def of_shard(self, epoch: int, shard: int, before: int) -> NDArray[np.int64] | None:
        """How often each sample of a shard comes, where the sum before it is `before`; None for
        once each."""
        ...


def make_copies(
    source: StreamSource, sampling: Sampling, threshold: float, seed: int
) -> "RepeatFactorCopies | ClassAwareCopies":
    """How a source is sampled; raises `DataError` for classes of a source that has none."""
    if sampling == "class_aware":
        return ClassAwareCopies(source, seed)
    return RepeatFactorCopies(source, threshold if sampling == "repeat_factor" else 0.0)


class RepeatFactorCopies:
    """Each sample as often as its repeat factor says, on average; once each at threshold 0."""

    num_left_out = 0

    def __init__(self, source: StreamSource, threshold: float) -> None:
        self._edges = source.shard_edges
        self._factors = _fixed_point(repeat_factors(source, threshold)) if threshold > 0 else None
        if self._factors is None:
            self._sums = np.diff(self._edges) << SHIFT
        else:
            self._sums = np.add.reduceat(self._factors, self._edges[:-1], dtype=np.int64)
        self.epoch_length = int(self._sums.sum()) >> SHIFT

    def shard_sums(self, epoch: int) -> NDArray[np.int64]:
        """The sum of the repeat factors of each shard, the same in every epoch."""
        return self._sums

    def of_shard(self, epoch: int, shard: int, before: int) -> NDArray[np.int64] | None:
        """Whole positions between the running sums of the factors."""
        if self._factors is None:
            return None
        factors = self._factors[self._edges[shard] : self._edges[shard + 1]]
        ends = before + np.cumsum(factors, dtype=np.int64)
        return np.diff(ends >> SHIFT, prepend=before >> SHIFT)


class ClassAwareCopies:
    """Every category equally often, and within a category every image (Shen et al. 2016).

    With m = round(images / categories), an epoch draws each of the C categories m times: m * C
    positions. Image r of the n that hold category c is drawn floor(m / n) or ceil(m / n) times for
    it, evenly spread over the list, and the list is gone through to the end before an image has
    one draw more than another: draws of epochs e are those of whole numbers in
    [(r + e) * m + u, (r + e + 1) * m + u) that n divides, u drawn for the category. An image of
    several categories is drawn for each of them. Images without a category are never drawn.
    """

    def __init__(self, source: StreamSource, seed: int) -> None:
        self._source = source
        self._edges = source.shard_edges
        self._counts = image_counts(source)
        present = np.flatnonzero(self._counts)
        if not len(present):
            raise DataError(
                f"source {source.name} has no category, which class-aware sampling draws by; set "
                "data.sampling to repeat_factor or uniform, or take the source out of data.train"
            )
        self._offsets = np.zeros_like(self._counts)
        for category in present.tolist():
            count = int(self._counts[category])
            self._offsets[category] = draw(source.name, seed, "category", category) % count
        self._count_runs()
        labelled = source.num_samples - self.num_left_out
        self._draws = max(round(labelled / len(present)), 1)
        self.epoch_length = self._draws * len(present)

    def shard_sums(self, epoch: int) -> NDArray[np.int64]:
        """How many positions the samples of each shard take."""
        first, last = self._run_first, self._run_first + self._run_length
        draws = self._drawn(epoch, self._run_category, first, last)
        return np.add.reduceat(np.append(draws, 0), self._run_edges[:-1]) * self._filled << SHIFT

    def of_shard(self, epoch: int, shard: int, before: int) -> NDArray[np.int64] | None:
        """Draws of each sample for all of its categories."""
        start, stop = int(self._edges[shard]), int(self._edges[shard + 1])
        samples, categories = self._source.pairs(start, stop)
        runs = slice(int(self._run_edges[shard]), int(self._run_edges[shard + 1]))
        order = np.argsort(categories, kind="stable")
        run = np.searchsorted(self._run_category[runs], categories[order])
        begins = np.searchsorted(categories[order], self._run_category[runs])
        rank = self._run_first[runs][run] + np.arange(len(order)) - begins[run]
        draws = self._drawn(epoch, categories[order], rank, rank + 1)
        copies = np.zeros(stop - start, dtype=np.int64)
        np.add.at(copies, samples[order] - start, draws)
        return copies

    def _drawn(
        self,
        epoch: int,
        categories: NDArray[np.int64],
        first: NDArray[np.int64],
        last: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Draws of an epoch that go to the images `first` to before `last` of each category."""
        counts, offsets = self._counts[categories], self._offsets[categories]
        # The list begins again after n images, and n * m draws of it are a whole number.
        shift = epoch % counts
        begin = ((first + shift) * self._draws + offsets) // counts
        return ((last + shift) * self._draws + offsets) // counts - begin

    def _count_runs(self) -> None:
        """Which categories each shard holds, in how many images, after how many of the same.

        A run for each pair of shard and category is all that an epoch's order needs.
        """
        seen = np.zeros_like(self._counts)
        categories, firsts, lengths, edges = [], [], [], [0]
        labelled = 0
        for start, stop in zip(self._edges[:-1].tolist(), self._edges[1:].tolist(), strict=True):
            samples, of_sample = self._source.pairs(start, stop)
            labelled += len(np.unique(samples))
            own, number = np.unique(of_sample, return_counts=True)
            categories.append(own)
            firsts.append(seen[own])
            lengths.append(number)
            seen[own] += number
            edges.append(edges[-1] + len(own))
        self.num_left_out = self._source.num_samples - labelled
        self._run_category = np.concatenate(categories)
        self._run_first = np.concatenate(firsts)
        self._run_length = np.concatenate(lengths)
        self._run_edges = np.array(edges)
        self._filled = np.diff(self._run_edges) > 0


def _fixed_point(factors: NDArray[np.float64]) -> NDArray[np.int32] | None:
    """Factors in units of 2**-20 whose sum is a whole number of ones; None where all are 1."""
    repeated = np.flatnonzero(factors > 1)
    if not len(repeated):
        return None
    units = np.minimum(np.rint(factors * ONE), np.iinfo(np.int32).max - ONE).astype(np.int32)
    missing = -int(units.sum(dtype=np.int64)) % ONE
    units[repeated] += missing // len(repeated)
    units[repeated[: missing % len(repeated)]] += 1
    return units
