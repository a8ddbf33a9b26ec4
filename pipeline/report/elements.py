"""The few pieces of HTML that every section of the report is made of."""

from collections.abc import Sequence
from html import escape


def section(title: str, *parts: str) -> str:
    """A titled section, or nothing where it has nothing to show."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def figure(title: str, *parts: str) -> str:
    """A titled chart, or nothing where the last part, the chart, is empty."""
    if not parts[-1]:
        return ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(name, class) pairs with a sample of each colour."""
    items = "".join(
        f'<li><svg viewBox="0 0 18 10" class="swatch"><line class="line {style}" x1="0" x2="18" '
        f'y1="5" y2="5"/></svg>{escape(name)}</li>'
        for name, style in entries
    )
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


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table of HTML cells; the first column is text, the others are numbers."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def fraction(value: object) -> str:
    """Three decimals, or a dash where a figure is undefined."""
    return f"{value:.3f}" if isinstance(value, int | float) else "&ndash;"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
