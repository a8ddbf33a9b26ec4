"""Charts as inline SVG: lines, points and bars.

Colours and fonts come from classes that the page's style sheet defines, so that light and dark
follow the reader's setting. What a mark stands for is in its `<title>`; the page's script shows the
same words beside the pointer, for lines out of `data-at`, one entry for each point of the line.
A line of many points shows some of them, as they are; only where a chart asks for it, as losses do,
are neighbours averaged, and then the words say from where to where.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.report.scales import Point, Scale, format_number, grouped, round_step, sampled

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 42
_TITLED_POINTS = 24
"""Where the page's script does not run, so many points of a line tell their value."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name in the legend, its classes in the style sheet, and its points by x."""

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


def line_chart(
    series: Sequence[Series],
    title: str,
    *,
    size: tuple[int, int] = (520, 236),
    axis_titles: tuple[str, str] = ("step", ""),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    dots: bool = False,
    log: bool = False,
    averaged: bool = False,
) -> str:
    """Lines over steps, or over what `axis_titles` says.

    The y axis starts at 0; with `log` it is logarithmic where values differ 30 times and more. With
    `averaged`, points of a long line are means of neighbours, which those of an AP must never be.
    """
    assert not (dots and averaged)
    drawn = [_drawn(one, axis_titles[0], averaged) for one in series if one.points]
    if not drawn:
        return ""
    x_values = [x for one in series for x, _ in one.points]
    low, high = x_range or (min(x_values), max(max(x_values), min(x_values) + 1))
    x_scale = Scale(low, high, _LEFT, size[0] - _RIGHT)
    y_scale = _value_scale([y for one in drawn for _, y in one.points], size[1], y_range, log)
    parts = [_axes(x_scale, y_scale, size, axis_titles)]
    parts += [_line(one, (x_scale, y_scale), dots) for one in drawn]
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


@dataclass(frozen=True, slots=True)
class _Line:
    """The points of a series that are drawn, and what the words say of each: at what, where."""

    name: str
    style: str
    points: Sequence[Point]
    at: str
    where: Sequence[str]


def _drawn(series: Series, x_title: str, averaged: bool) -> _Line:
    def said(x: float) -> str:
        return format_number(round(x) if x_title == "step" else x)

    groups = grouped(series.points)
    if averaged and len(groups) < len(series.points):
        means = [
            (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
            for group in groups
        ]
        where = [f"{said(group[0][0])} to {said(group[-1][0])}" for group in groups]
        return _Line(series.name, series.style, means, f"mean of {x_title}s", where)
    points = sampled(series.points)
    return _Line(series.name, series.style, points, x_title, [said(x) for x, _ in points])


def _line(line: _Line, scales: tuple[Scale, Scale], dots: bool) -> str:
    name, title = escape(line.name), escape(line.at)
    values = [format_number(y) for _, y in line.points]
    places = [(scales[0](x), scales[1](y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    at = ";".join(f"{x}|{y}" for x, y in zip(line.where, values, strict=True))
    parts = [
        f'<polyline class="line {line.style}" points="{path}" data-x="{title}" '
        f'data-at="{at}"><title>{name}</title></polyline>'
    ]
    every = 1 if dots else max(1, len(places) // _TITLED_POINTS)
    kind = "dot" if dots or len(places) == 1 else "hover"
    marks = list(zip(line.where, values, places, strict=True))
    for where, value, (x, y) in marks[::every]:
        parts.append(
            f'<circle class="{kind} {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{name}, {title} {where}: {value}</title></circle>"
        )
    return "".join(parts)


def scatter_chart(
    marks: Sequence[Mark],
    trend: Sequence[Point],
    title: str,
    axis_titles: tuple[str, str],
    *,
    size: tuple[int, int] = (1040, 400),
    y_range: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Marks over a logarithmic x axis, with a trend line behind them."""
    if not marks:
        return ""
    high = max(max(mark.x for mark in marks) * 1.15, 2.0)
    low = min(min(mark.x for mark in marks), high / 2) / 1.15
    x_scale = Scale(low, high, _LEFT, size[0] - _RIGHT, log=True)
    y_scale = Scale(*y_range, size[1] - _BOTTOM, _TOP)
    parts = [_axes(x_scale, y_scale, size, axis_titles)]
    if y_range[0] < 0 < y_range[1]:
        zero = f'y1="{y_scale(0):.1f}" y2="{y_scale(0):.1f}"'
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{size[0] - _RIGHT}" {zero}/>')
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


def rank_chart(
    columns: Sequence[tuple[str, str, float]],
    guides: Sequence[tuple[float, str]],
    title: str,
    axis_titles: tuple[str, str],
    *,
    size: tuple[int, int] = (1040, 340),
) -> str:
    """A column for each (text, class, value of at least 1), as given, over a logarithmic y axis;
    `guides` are values with a line across and a word at its end."""
    if not columns:
        return ""
    high = max(2.0, *(value for _, _, value in columns))
    x_scale = Scale(1, len(columns) + 1, _LEFT, size[0] - _RIGHT)
    y_scale = Scale(0.7, high * 1.2, size[1] - _BOTTOM, _TOP, log=True)
    parts = [_axes(x_scale, y_scale, size, axis_titles)]
    wide = x_scale(2) - x_scale(1)
    gap = min(1.5, wide / 4) if wide > 2 else 0.0
    # Columns without a gap would show seams between them, where their edges are smoothed.
    parts.append('<g shape-rendering="crispEdges">' if not gap else "<g>")
    for k, (text, style, value) in enumerate(columns, start=1):
        top = y_scale(value)
        parts.append(
            f'<rect class="bar {style}" x="{x_scale(k):.2f}" y="{top:.1f}" '
            f'width="{wide - gap:.2f}" height="{size[1] - _BOTTOM - top:.1f}">'
            f"<title>{escape(text)}</title></rect>"
        )
    parts.append("</g>")
    for value, word in guides:
        if value < high:
            y, right = y_scale(value), size[0] - _RIGHT
            parts.append(
                f'<line class="guide" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{right}" y="{y - 5:.1f}" text-anchor="end">'
                f"{escape(word)}</text>"
            )
    return _svg(size, title, parts)


def bar_chart(bars: Sequence[tuple[str, str, float | None]], title: str, width: int = 520) -> str:
    """Horizontal bars from 0 to 1: (label, class, value); None is said to be undefined."""
    row, left, right = 34, 92, 76
    size = (width, len(bars) * row + 34)
    scale = Scale(0.0, 1.0, left, width - right)
    bottom = len(bars) * row + 4
    parts = [
        f'<line class="grid" x1="{scale(tick):.1f}" x2="{scale(tick):.1f}" y1="4" y2="{bottom}"/>'
        f'<text class="tick" x="{scale(tick):.1f}" y="{bottom + 17}" text-anchor="middle">'
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
    return _svg(size, title, parts, "chart bars")


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
    for tick in x_scale.ticks(8 if size[0] > 700 else 6, whole=titles[0] == "step"):
        x = x_scale(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{format_number(tick)}</text>"
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="axis-title" x="{right}" y="{size[1] - 5}" text-anchor="end">'
        f"{escape(titles[0])}</text>"
    )
    if titles[1]:
        middle = (bottom + _TOP) / 2
        parts.append(
            f'<text class="axis-title" text-anchor="middle" '
            f'transform="translate(13 {middle:.0f}) rotate(-90)">{escape(titles[1])}</text>'
        )
    return "".join(parts)


def _svg(size: tuple[int, int], title: str, parts: Sequence[str], style: str = "chart") -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )
