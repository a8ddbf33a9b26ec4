"""Charts as inline SVG: scales with readable ticks, lines, points and bars.

Colours and fonts come from classes that the page's style sheet defines, so that light and dark
follow the reader's setting. What a mark stands for is in its `<title>`, shown on hover.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_MAX_POINTS = 100
_HOVER_POINTS = 48


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name in the legend, its class in the style sheet, and its points by x."""

    name: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a scatter chart; `style` also decides its shape, `text` is shown on hover."""

    x: float
    y: float
    style: str
    text: str


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

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale, about `count` of them."""
        return self._log_ticks(count) if self.log else self._linear_ticks(count)

    def _linear_ticks(self, count: int) -> list[float]:
        step = round_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [position * step for position in range(first, last + 1)]

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
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))


def format_number(value: float) -> str:
    """Short and exact enough for an axis or a tooltip."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 0.001:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def thin(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most `limit` points, each the mean of neighbours."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def line_chart(
    series: Sequence[Series],
    title: str,
    *,
    size: tuple[int, int] = (520, 230),
    y_title: str = "",
    y_range: tuple[float, float] | None = None,
    dots: bool = False,
    log: bool = False,
) -> str:
    """Lines over steps. The y axis starts at 0; with `log` it is logarithmic from 30 times up."""
    drawn = [Series(one.name, one.style, thin(one.points)) for one in series if one.points]
    if not drawn:
        return ""
    x_values = [x for one in drawn for x, _ in one.points]
    x_scale = Scale(min(x_values), max(max(x_values), min(x_values) + 1), _LEFT, size[0] - _RIGHT)
    y_scale = _value_scale([y for one in drawn for _, y in one.points], size[1], y_range, log)
    parts = [_axes(x_scale, y_scale, size, ("step", y_title))]
    parts += [_line(one, x_scale, y_scale, dots) for one in drawn]
    return _svg(size, title, parts)


def _value_scale(
    values: Sequence[float], height: int, given: tuple[float, float] | None, log: bool
) -> Scale:
    start, end = height - _BOTTOM, _TOP
    if given is not None:
        return Scale(*given, start, end)
    low, high = min(values), max(values)
    if log and 0 < low and high > 30 * low:
        return Scale(low / 1.1, high * 1.1, start, end, log=True)
    low = min(low, 0.0)
    step = round_step((high - low) / 4)
    top = step * math.ceil(high / step - 1e-9) if high > low else 1.0
    return Scale(step * math.floor(low / step), top, start, end)


def _line(series: Series, x_scale: Scale, y_scale: Scale, dots: bool) -> str:
    name = escape(series.name)
    places = [(x_scale(x), y_scale(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line {series.style}" points="{path}"><title>{name}</title>']
    parts.append("</polyline>")
    every = 1 if dots else max(1, len(places) // _HOVER_POINTS)
    kind = "dot" if dots or len(places) == 1 else "hover"
    for (step, value), (x, y) in list(zip(series.points, places, strict=True))[::every]:
        text = f"{name}, step {step:,.0f}: {format_number(value)}"
        parts.append(
            f'<circle class="{kind} {series.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{text}</title></circle>"
        )
    return "".join(parts)


def scatter_chart(
    marks: Sequence[Mark],
    trend: Sequence[Point],
    title: str,
    axis_titles: tuple[str, str],
    size: tuple[int, int] = (1040, 400),
) -> str:
    """Marks over a logarithmic x axis and a y axis from 0 to 1, with a trend line behind them."""
    if not marks:
        return ""
    high = max(max(mark.x for mark in marks) * 1.15, 2.0)
    low = min(min(mark.x for mark in marks), high / 2) / 1.15
    x_scale = Scale(low, high, _LEFT, size[0] - _RIGHT, log=True)
    y_scale = Scale(0.0, 1.0, size[1] - _BOTTOM, _TOP)
    parts = [_axes(x_scale, y_scale, size, axis_titles)]
    if len(trend) > 1:
        path = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in trend)
        parts.append(f'<polyline class="line trend" points="{path}"/>')
    parts += [_mark(mark, x_scale(mark.x), y_scale(mark.y)) for mark in marks]
    return _svg(size, title, parts)


def _mark(mark: Mark, x: float, y: float) -> str:
    shapes = {
        "rare": f"M{x:.1f} {y - 5.5:.1f}l5 5.5l-5 5.5l-5-5.5z",
        "common": f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    }
    square = f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z"
    path = shapes.get(mark.style, square)
    return f'<path class="mark {mark.style}" d="{path}"><title>{escape(mark.text)}</title></path>'


def bar_chart(bars: Sequence[tuple[str, str, float | None]], title: str, width: int = 520) -> str:
    """Horizontal bars from 0 to 1: (label, class, value); None is said to be undefined."""
    row, left, right = 34, 92, 70
    size = (width, len(bars) * row + 34)
    scale = Scale(0.0, 1.0, left, width - right)
    bottom = len(bars) * row + 4
    parts = [
        f'<line class="grid" x1="{scale(tick):.1f}" x2="{scale(tick):.1f}" y1="4" y2="{bottom}"/>'
        f'<text class="tick" x="{scale(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
        f"{format_number(tick)}</text>"
        for tick in scale.ticks()
    ]
    for position, (label, style, value) in enumerate(bars):
        y = position * row + 8
        length = scale(value or 0.0) - left
        shown = "undefined" if value is None else f"{value:.3f}"
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 16}" text-anchor="end">{escape(label)}'
            f'</text><rect class="bar {style}" x="{left}" y="{y}" width="{length:.1f}" height="22" '
            f'rx="2"><title>{escape(label)}: {shown}</title></rect>'
            f'<text class="value" x="{left + length + 8:.1f}" y="{y + 16}">{shown}</text>'
        )
    return _svg(size, title, parts)


def share_bar(shares: Sequence[tuple[str, str, float]], title: str, width: int = 1040) -> str:
    """One bar, divided: (label, class, share of 1)."""
    x, parts = 0.0, []
    for label, style, share in shares:
        length = share * width
        text = f"{escape(label)}: {share:.1%}"
        parts.append(
            f'<rect class="bar {style}" x="{x:.1f}" y="0" width="{max(length - 1.5, 0.5):.1f}" '
            f'height="26" rx="2"><title>{text}</title></rect>'
        )
        x += length
    return _svg((width, 26), title, parts)


def _axes(x_scale: Scale, y_scale: Scale, size: tuple[int, int], titles: tuple[str, str]) -> str:
    bottom, right = size[1] - _BOTTOM, size[0] - _RIGHT
    parts = []
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{format_number(tick)}</text>"
        )
    for tick in x_scale.ticks(8 if size[0] > 700 else 5):
        x = x_scale(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{format_number(tick)}</text>"
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="axis-title" x="{right}" y="{size[1] - 6}" text-anchor="end">'
        f"{escape(titles[0])}</text>"
    )
    if titles[1]:
        middle = (bottom + _TOP) / 2
        parts.append(
            f'<text class="axis-title" text-anchor="middle" '
            f'transform="translate(12 {middle:.0f}) rotate(-90)">{escape(titles[1])}</text>'
        )
    return "".join(parts)


def _svg(size: tuple[int, int], title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
