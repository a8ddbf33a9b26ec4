"""The few pieces of HTML that every section of the report is made of."""

from collections.abc import Sequence
from html import escape

_LARGEST = 1e100
_MOST = 10**12
DASH = "\u2013"


def section(title: str, *parts: str) -> str:
    """A titled section, or nothing where it has nothing to show."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def figure(title: str, *parts: str) -> str:
    """A titled chart, or nothing where the last part, the chart, is empty."""
    if not parts[-1]:
        return ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def grid(*figures: str) -> str:
    """Figures two in a row, where there is room, or nothing where there are none."""
    body = "".join(figures)
    return f'<div class="grid2">{body}</div>' if body else ""


def note(text: str) -> str:
    """A line of plain text beside what it explains."""
    return f'<p class="note">{escape(text)}</p>'


def folded(summary: str, body: str) -> str:
    """Something that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values as a row of plain text, or nothing where there are none."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return f"<dl>{items}</dl>" if items else ""


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(name, class) pairs with a sample of each line."""
    items = []
    for name, style in entries:
        sample = f'<line class="line {style}" x1="0" x2="22" y1="5" y2="5"/>'
        if "hollow" in style.split():
            sample += f'<circle class="dot {style}" cx="11" cy="5" r="3.5"/>'
        items.append(
            f'<li><svg viewBox="0 0 22 10" class="swatch">{sample}</svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def bar_legend(entries: Sequence[tuple[str, str]]) -> str:
    """(name, class) pairs with a square in the colour of each bar."""
    items = "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for name, style in entries)
    return f'<ul class="legend">{items}</ul>'


def mark_legend(entries: Sequence[tuple[str, str]]) -> str:
    """(name, class) pairs with a sample of each mark."""
    shapes = {"rare": "M6 0l6 6l-6 6l-6-6z", "common": "M1 6a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"}
    items = "".join(
        f'<li><svg viewBox="0 0 12 12" class="swatch square"><path class="mark {style}" '
        f'd="{shapes.get(style, "M1.500 1.500h9v9h-9z")}"/></svg>{escape(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def breakable(name: str) -> str:
    """A name as HTML; a long one breaks after a low line rather than inside a word."""
    return escape(name).replace("_", "_<wbr>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table of HTML cells; the first column is text, the others are numbers."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def number(value: object) -> float | None:
    """A finite number that an axis can hold, or None for whatever else stands in a file."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None


def whole(value: object) -> int | None:
    """A count, step or id, from 0 to 10^12, or None for whatever else stands in a file."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _MOST else None


def fraction(value: object) -> str:
    """Three decimals, or a dash where a figure is undefined."""
    known = number(value)
    return DASH if known is None else f"{known:.3f}"


def count(value: object) -> str:
    """A whole number with separators, or a dash."""
    known = number(value)
    return DASH if known is None else f"{known:,.0f}"


def difference(value: float | None) -> str:
    """A signed difference of fractions, coloured by its sign; a dash where there is none."""
    if value is None:
        return DASH
    style = "gain" if value >= 0.0005 else "loss" if value <= -0.0005 else "same"
    sign = {"gain": "+", "loss": "\u2212", "same": "\u00b1"}[style]
    return f'<span class="{style}">{sign}{abs(value):.3f}</span>'


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
