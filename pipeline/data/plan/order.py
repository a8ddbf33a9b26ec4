"""The endless order of a source, made window by window on demand, and of several in proportion.

Pure, and free of torch.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan.draws import draw, permutation
from pipeline.data.plan.sampling import ONE, SHIFT, Sampling, StreamSource, make_copies
from pipeline.data.plan.slot import Slot, StreamName
from pipeline.errors import DataError

WINDOW_SHARDS = 16
"""Shards that are shuffled together, where a recipe does not say."""


class SourceOrder:
    """Epochs of one length, one after the other, without end.

    In each epoch the shards are permuted and `sampling` says how often each of their samples
    comes. Then `window_shards` shards at a time are shuffled together. A position costs the window
    that it is in and the table of its epoch's shards, wherever it is. Kept are the last windows,
    two epochs' tables, and what `sampling` keeps: 4 bytes for each sample where samples repeat,
    24 for each pair of shard and category where sampling is class-aware.
    """

    def __init__(
        self,
        source: StreamSource,
        seed: int,
        *,
        sampling: Sampling = "repeat_factor",
        repeat_threshold: float = 0.0,
        window_shards: int = WINDOW_SHARDS,
    ) -> None:
        if source.num_samples == 0:
            raise DataError(
                f"source {source.name} has no samples; give it data or take it out of the recipe"
            )
        assert np.all(source.shard_of[1:] >= source.shard_of[:-1]), "samples are by shard"
        self.name = source.name
        self.digest = source.digest
        self._seed = seed
        self._window_shards = window_shards
        self._edges = source.shard_edges
        self._copies = make_copies(source, sampling, repeat_threshold, seed)
        self.epoch_length = self._copies.epoch_length
        self.num_left_out = self._copies.num_left_out
        """Samples that never come: those without a category, where sampling is class-aware."""
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def index(self, position: int) -> int:
        """The sample at a position of this source."""
        window, place = self._locate(position)
        return int(window[place])

    def neighbours(self, position: int, seed: int, number: int) -> tuple[int, ...]:
        """Samples of the window that is read at `position`, drawn from `seed`."""
        window, _ = self._locate(position)
        places = [draw(seed, "partner", k) % len(window) for k in range(number)]
        return tuple(int(window[place]) for place in places)

    def shards_ahead(self, position: int) -> list[int]:
        """The shards that are read at `position` and after it: of its window and of the next."""
        epoch, place = divmod(position, self.epoch_length)
        shards, _, bounds = self._epoch(epoch)
        first = (int(np.searchsorted(bounds, place, side="right")) - 1) * self._window_shards
        ahead = shards[first : first + 2 * self._window_shards].tolist()
        if first + self._window_shards >= len(shards):
            ahead += self._epoch(epoch + 1)[0][: self._window_shards].tolist()
        return list(dict.fromkeys(ahead))

    def _locate(self, position: int) -> tuple[NDArray[np.int64], int]:
        epoch, place = divmod(position, self.epoch_length)
        _, _, bounds = self._epoch(epoch)
        window = int(np.searchsorted(bounds, place, side="right")) - 1
        return self._window(epoch, window), place - int(bounds[window])

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray]:
        """The order of the shards, the sum before each, the position of each window."""
        shards = permutation(len(self._edges) - 1, self.name, self._seed, epoch)
        offset = draw(self.name, self._seed, epoch, "offset") % ONE
        sums = np.concatenate(
            [[offset], offset + np.cumsum(self._copies.shard_sums(epoch)[shards])]
        )
        edges = np.append(np.arange(0, len(shards), self._window_shards), len(shards))
        return shards, sums, sums[edges] >> SHIFT

    def _make_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        shards, sums, _ = self._epoch(epoch)
        first = window * self._window_shards
        parts = []
        for k in range(first, min(first + self._window_shards, len(shards))):
            shard = int(shards[k])
            samples = np.arange(self._edges[shard], self._edges[shard + 1])
            copies = self._copies.of_shard(epoch, shard, int(sums[k]))
            parts.append(samples if copies is None else np.repeat(samples, copies))
        joined = np.concatenate(parts)
        return joined[permutation(len(joined), self.name, self._seed, epoch, window)]


class StreamOrder:
    """Several sources in proportion to their weights, each wrapping around by itself.

    A slot has `partners` further samples of its source with the probability `partner_chance`.
    """

    def __init__(
        self,
        name: StreamName,
        orders: Sequence[SourceOrder],
        weights: Sequence[Fraction],
        seed: int,
        *,
        partners: int = 0,
        partner_chance: float = 1.0,
    ) -> None:
        self.name = name
        self.seed = seed
        self.partners = partners
        self.partner_chance = partner_chance
        self.orders = list(orders)
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

    def shards_ahead(self, position: int) -> dict[str, list[int]]:
        """By source, the shards that are read at a position and after it."""
        before = self._before(position)
        return {o.name: o.shards_ahead(p) for o, p in zip(self.orders, before, strict=True)}

    def slot(self, position: int) -> Slot:
        """The slot at a position of this stream."""
        before, after = self._before(position), self._before(position + 1)
        source = next(k for k in range(len(before)) if after[k] > before[k])
        order = self.orders[source]
        seed = draw(self.seed, self.name, position) >> 1
        index = order.index(before[source])
        number = self.partners
        if self.partner_chance < 1 and draw(seed, "partnered") >= self.partner_chance * 2**64:
            number = 0
        partners = order.neighbours(before[source], seed, number)
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
