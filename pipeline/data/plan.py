"""The global sample order, a pure function of (data, seed, step); free of torch.

Every random number is a hash, or a raw word of a Philox generator, keyed by what it decides and
never by a process: any rank computes its slice of any step at once, whatever ran before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, RecipeError

PLAN_VERSION = 1
WINDOW_SHARDS = 16
"""Shards that are shuffled together: more mixes better, fewer keep reads more sequential."""
MOSAIC_PARTNERS = 3

_SHIFT = 20
_ONE = 1 << _SHIFT
"""Repeat factors are whole numbers of 2**-20, so that their sums are exact."""

StreamName = Literal["train", "extra"]
StepKind = Literal["train", "extra", "mixed"]


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


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a batch.

    `position` counts within the stream and `seed` is drawn from it. `weight` is 0 for padding,
    which repeats a real sample. `partners` are further samples of the source, for a mosaic.
    """

    stream: StreamName
    source: str
    index: int
    position: int
    seed: int
    weight: int = 1
    partners: tuple[int, ...] = ()


def repeat_factors(source: StreamSource, threshold: float) -> NDArray[np.float64]:
    """r(I) = max over the categories c of image I of max(1, sqrt(threshold / f(c))), shape (N,).

    f(c) is the share of the source's images that hold c (LVIS, Gupta et al. 2019, appendix B).
    """
    factors = np.ones(source.num_samples)
    kept = source.categories >= 0
    if threshold <= 0 or not kept.any():
        return factors
    images = np.repeat(np.arange(source.num_samples), np.diff(source.category_offsets))
    width = int(source.categories.max()) + 1
    pairs = np.sort(images[kept] * width + source.categories[kept])
    images, categories = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], width)
    frequency = np.bincount(categories, minlength=width) / source.num_samples
    of_category = np.sqrt(threshold / np.maximum(frequency, 1 / source.num_samples))
    starts = np.flatnonzero(np.diff(images, prepend=-1))
    largest = np.maximum.reduceat(of_category[categories], starts)
    factors[images[starts]] = np.maximum(largest, 1)
    return factors


def substitute(seed: int, index: int, attempt: int, among: range) -> int:
    """The sample that takes the place of an unreadable one: an index of `among`, not `index`.

    Depends on the slot's seed and not on who reads it, so every world size picks the same.
    """
    assert index in among and len(among) > 1
    step = 1 + _draw(seed, "substitute", index, attempt) % (len(among) - 1)
    return among[(index - among.start + step) % len(among)]


def micro_batches(slots: Sequence[Slot], micro_batch: int) -> list[list[Slot]]:
    """Cut a rank's slots into batches of one size, at most `micro_batch`, padded with weight 0."""
    count = -(-len(slots) // micro_batch)
    size = -(-len(slots) // count)
    padded = [*slots, *(replace(slots[-1], weight=0) for _ in range(count * size - len(slots)))]
    return [padded[i * size : (i + 1) * size] for i in range(count)]


def build_plan(
    train: Sequence[StreamSource],
    extra: Sequence[StreamSource] = (),
    *,
    batch_size: int,
    seed: int,
    extra_mode: Literal["alternate", "mixed"] = "alternate",
    extra_ratio: float = 1.0,
    repeat_threshold: float = 0.0,
    mosaic: bool = False,
) -> "Plan":
    """Plan the train stream (with repeat factors) and the extra one (each sample once an epoch).

    Raises `DataError` for a source without samples.
    """
    streams = {"train": _StreamOrder("train", train, seed, repeat_threshold, partners=0)}
    if extra:
        partners = MOSAIC_PARTNERS if mosaic else 0
        streams["extra"] = _StreamOrder("extra", extra, seed, 0.0, partners)
    return Plan(
        streams=streams,
        batch_size=batch_size,
        seed=seed,
        mixed=bool(extra) and extra_mode == "mixed",
        ratio=_exact(extra_ratio) if extra else Fraction(),
    )


@dataclass(frozen=True)
class Plan:
    """Which samples each step has; made by `build_plan`."""

    streams: dict[str, "_StreamOrder"]
    batch_size: int
    seed: int
    mixed: bool
    ratio: Fraction
    extra_slots: int = field(init=False)
    """Slots of a mixed batch that are extra."""

    def __post_init__(self) -> None:
        share = round(self.batch_size * self.ratio / (1 + self.ratio))
        slots = min(max(share, 1), self.batch_size - 1) if self.mixed else 0
        object.__setattr__(self, "extra_slots", slots)

    def kind(self, step: int) -> StepKind:
        """Whether a step takes train data, extra data or both."""
        return "mixed" if self.mixed else self._alternate(step)[0]

    def batch(self, step: int) -> list[Slot]:
        """All slots of the global batch."""
        return self._slots(step, range(self.batch_size))

    def step(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """The ceil(batch_size / world_size) slots of one rank: a contiguous part of the batch,
        and padding of weight 0 where the batch does not divide."""
        assert 0 <= rank < world_size
        start = rank * self.batch_size // world_size
        stop = (rank + 1) * self.batch_size // world_size
        slots = self._slots(step, range(start, stop))
        padding = -(-self.batch_size // world_size) - len(slots)
        if padding:
            real = slots[0] if slots else self._slots(step, range(start, start + 1))[0]
            slots.extend([replace(real, weight=0)] * padding)
        return slots

    def sources(self, step: int) -> dict[str, int]:
        """How many slots of the global batch each source has."""
        counts: dict[str, int] = {}
        for name, start, number in self._shares(step):
            counts |= self.streams[name].counts(start, start + number)
        return counts

    @property
    def epoch_lengths(self) -> dict[str, int]:
        """Positions in one pass over each source, repeats included."""
        orders = [order for stream in self.streams.values() for order in stream.orders]
        return {order.name: order.epoch_length for order in orders}

    def state(self) -> dict[str, int | str]:
        """What the order depends on: goes into a checkpoint's manifest beside the step."""
        state: dict[str, int | str] = {
            "version": PLAN_VERSION,
            "window_shards": WINDOW_SHARDS,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "extra_slots": self.extra_slots,
            "extra_ratio": str(self.ratio),
        }
        for name, stream in self.streams.items():
            state[f"{name}.partners"] = stream.partners
            for order, share in zip(stream.orders, stream.shares, strict=True):
                state[f"{name}.{order.name}.digest"] = order.digest
                state[f"{name}.{order.name}.epoch_length"] = order.epoch_length
                state[f"{name}.{order.name}.share"] = str(share)
        return state

    def check(self, state: dict[str, int | str]) -> None:
        """Refuse (`RecipeError`) the state of a plan that gives another order."""
        own = self.state()
        changed = [
            f"{key} was {state.get(key, 'absent')} and is {own.get(key, 'absent')}"
            for key in sorted(own.keys() | state.keys())
            if own.get(key) != state.get(key)
        ]
        if changed:
            raise RecipeError(
                f"the data or the recipe differ from those of the checkpoint, so the run cannot go "
                f"on in the same order: {'; '.join(changed)}. Restore what changed, or give the "
                "recipe another name to start a new run"
            )

    def _shares(self, step: int) -> list[tuple[StreamName, int, int]]:
        """(stream, first position, number of positions) of a step."""
        if self.mixed:
            own, other = self.batch_size - self.extra_slots, self.extra_slots
            return [("train", step * own, own), ("extra", step * other, other)]
        name, number = self._alternate(step)
        return [(name, number * self.batch_size, self.batch_size)]

    def _alternate(self, step: int) -> tuple[StreamName, int]:
        """The stream of a step and how many steps of that stream came before it.

        n train steps have floor(n * ratio) extra ones right after them, so the ratio holds
        cumulatively.
        """
        rounds = int(Fraction(step + 1) / (1 + self.ratio)) + 1
        while rounds + int(rounds * self.ratio) > step:
            rounds -= 1
        extra = int(rounds * self.ratio)
        past = step - rounds - extra
        return ("extra", extra + past - 1) if past else ("train", rounds)

    def _slots(self, step: int, places: range) -> list[Slot]:
        shares = self._shares(step)
        if len(shares) == 1:
            name, start, _ = shares[0]
            return [self.streams[name].slot(start + place) for place in places]
        (_, start, _), (_, extra_start, number) = shares
        slots = []
        for place in places:
            before = place * number // self.batch_size
            if (place + 1) * number // self.batch_size > before:
                slots.append(self.streams["extra"].slot(extra_start + before))
            else:
                slots.append(self.streams["train"].slot(start + place - before))
        return slots


class _StreamOrder:
    """Several sources in proportion to their weights, each wrapping around by itself."""

    def __init__(
        self,
        name: StreamName,
        sources: Sequence[StreamSource],
        seed: int,
        repeat_threshold: float,
        partners: int,
    ) -> None:
        self.name = name
        self.seed = seed
        self.partners = partners
        self.orders = [_SourceOrder(source, seed, repeat_threshold) for source in sources]
        weights = [_exact(source.weight) for source in sources]
        total = sum(weights, Fraction())
        self.shares = [weight / total for weight in weights]
        # Source k takes its part of what the sources after it leave: an order of positions in
        # which every count is monotone, which independent rounding would not give.
        sums = [sum(weights[:k], Fraction()) for k in range(len(weights) + 1)]
        self._left = [sums[k] / sums[k + 1] for k in range(len(weights))]

    def counts(self, start: int, stop: int) -> dict[str, int]:
        """How many of the positions from `start` to `stop` each source has."""
        pairs = zip(self.orders, self._before(start), self._before(stop), strict=True)
        return {order.name: after - before for order, before, after in pairs}

    def slot(self, position: int) -> Slot:
        """The slot at a position of this stream."""
        before, after = self._before(position), self._before(position + 1)
        source = next(k for k in range(len(before)) if after[k] > before[k])
        order = self.orders[source]
        seed = _draw(self.seed, self.name, position) >> 1
        index = order.index(before[source])
        partners = order.neighbours(before[source], seed, self.partners)
        return Slot(self.name, order.name, index, position, seed, partners=partners)

    def _before(self, position: int) -> list[int]:
        """How many positions of each source come before `position`."""
        counts = [0] * len(self.orders)
        for k in range(len(counts) - 1, 0, -1):
            left = self._left[k]
            # Rounded, not cut, so that no source has to wait for its first turn.
            rest = (position * left.numerator + left.denominator // 2) // left.denominator
            counts[k] = position - rest
            position = rest
        counts[0] = position
        return counts


class _SourceOrder:
    """The endless order of one source: epochs of one length, made window by window on demand.

    In each epoch the shards are permuted and systematic resampling runs over them: a sample of
    repeat factor r comes floor(r) or ceil(r) times, r times on average, and the epoch has always
    the same length. Then `WINDOW_SHARDS` shards at a time are shuffled together.
    """

    def __init__(self, source: StreamSource, seed: int, repeat_threshold: float) -> None:
        if source.num_samples == 0:
            raise DataError(
                f"source {source.name} has no samples; give it data or take it out of the recipe"
            )
        assert np.all(np.diff(source.shard_of) >= 0), "samples are listed shard by shard"
        self.name = source.name
        self.digest = source.digest
        self._seed = seed
        starts = np.flatnonzero(np.diff(source.shard_of, prepend=source.shard_of[0] - 1))
        self._shards = np.append(starts, source.num_samples)
        self._factors = _fixed_point(repeat_factors(source, repeat_threshold))
        if self._factors is None:
            self._shard_sums = np.diff(self._shards) << _SHIFT
        else:
            self._shard_sums = np.add.reduceat(self._factors, starts, dtype=np.int64)
        self.epoch_length = int(self._shard_sums.sum()) >> _SHIFT
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def index(self, position: int) -> int:
        """The sample at a position of this source."""
        window, place = self._locate(position)
        return int(window[place])

    def neighbours(self, position: int, seed: int, number: int) -> tuple[int, ...]:
        """Samples of the window that is read at `position`, drawn from `seed`."""
        window, _ = self._locate(position)
        places = [_draw(seed, "partner", k) % len(window) for k in range(number)]
        return tuple(int(window[place]) for place in places)

    def _locate(self, position: int) -> tuple[NDArray[np.int64], int]:
        epoch, place = divmod(position, self.epoch_length)
        _, _, bounds = self._epoch(epoch)
        window = int(np.searchsorted(bounds, place, side="right")) - 1
        return self._window(epoch, window), place - int(bounds[window])

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray]:
        """The order of the shards, the sum of factors before each, the position of each window."""
        shards = _permutation(len(self._shards) - 1, self.name, self._seed, epoch)
        offset = _draw(self.name, self._seed, epoch, "offset") % _ONE
        sums = np.concatenate([[offset], offset + np.cumsum(self._shard_sums[shards])])
        edges = np.append(np.arange(0, len(shards), WINDOW_SHARDS), len(shards))
        return shards, sums, sums[edges] >> _SHIFT

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        shards, sums, _ = self._epoch(epoch)
        parts = []
        for k in range(window * WINDOW_SHARDS, min((window + 1) * WINDOW_SHARDS, len(shards))):
            start, stop = self._shards[shards[k]], self._shards[shards[k] + 1]
            samples = np.arange(start, stop)
            if self._factors is not None:
                ends = sums[k] + np.cumsum(self._factors[start:stop], dtype=np.int64)
                copies = np.diff(ends >> _SHIFT, prepend=sums[k] >> _SHIFT)
                samples = np.repeat(samples, copies)
            parts.append(samples)
        joined = np.concatenate(parts)
        return joined[_permutation(len(joined), self.name, self._seed, epoch, window)]


def _fixed_point(factors: NDArray[np.float64]) -> NDArray[np.int32] | None:
    """Factors in units of 2**-20 whose sum is a whole number of ones; None where all are 1."""
    repeated = np.flatnonzero(factors > 1)
    if not len(repeated):
        return None
    units = np.minimum(np.rint(factors * _ONE), np.iinfo(np.int32).max - _ONE).astype(np.int32)
    missing = -int(units.sum(dtype=np.int64)) % _ONE
    units[repeated] += missing // len(repeated)
    units[repeated[: missing % len(repeated)]] += 1
    return units


def _exact(number: float) -> Fraction:
    """The decimal that a recipe gives, so that 0.1 is a tenth."""
    return Fraction(repr(number))


def _key(size: int, *parts: int | str) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=size).digest(), "little")


def _draw(*key: int | str) -> int:
    """64 random bits that belong to `key`."""
    return _key(8, *key)


def _permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    """The permutation of `length` that belongs to `key`."""
    # Raw words, because numpy may change what a Generator makes of them (NEP 19).
    words = np.random.Philox(key=_key(16, *key)).random_raw(length)
    return np.argsort(words, kind="stable")
