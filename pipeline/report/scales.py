"""Scales with readable ticks, numbers as people read them, and curves with fewer points to draw."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]

_MAX_POINTS = 120


@dataclass(frozen=True, slots=True)
class Scale:
    """Data from `low` to `high` on pixels from `start` to `end`, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5, *, whole: bool = False) -> list[float]:
        """Round values inside the scale, about `count` of them; with `whole`, only integers."""
        return self._log_ticks(count) if self.log else self._linear_ticks(count, whole)

    def _linear_ticks(self, count: int, whole: bool) -> list[float]:
        step = round_step((self.high - self.low) / count)
        if whole:
            step = float(math.ceil(step))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        # Rounding may put the outermost ticks outside by the last bit of a float.
        return [
            min(max(position * step, self.low), self.high) for position in range(first, last + 1)
        ]

    def _log_ticks(self, count: int) -> list[float]:
        low = math.floor(math.log10(self.low))
        high = math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if self.high < 1500 * self.low else (1,)
        stride = max(1, (high - low) // count)
        ticks = [
            factor * 10.0**power for power in range(low, high + 1, stride) for factor in factors
        ]
        return [tick for tick in ticks if self.low <= tick * (1 + 1e-9) <= self.high * (1 + 2e-9)]


def round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `step`."""
    if step < 1e-300:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))


def format_number(value: float) -> str:
    """Short and exact enough for an axis or a tooltip."""
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3g}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 0.001:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def sampled(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most `limit` of the points as they are: both ends, the lowest, the highest, every n-th."""
    if len(points) <= limit:
        return list(points)
    last, heights = len(points) - 1, [y for _, y in points]
    kept = {round(place * last / (limit - 3)) for place in range(limit - 2)}
    kept |= {heights.index(min(heights)), heights.index(max(heights))}
    return [points[place] for place in sorted(kept)]


def grouped(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Sequence[Point]]:
    """The points as at most `limit` groups of neighbours: one each, or else two or more each."""
    if len(points) <= limit:
        return [[point] for point in points]
    groups = min(limit, len(points) // 2)
    ends = [round(place * len(points) / groups) for place in range(groups + 1)]
    return [points[start:end] for start, end in pairwise(ends)]
