"""The table and the plot of table4_miniature.py: means, deviations, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean, stdev

KEYS = ("AP", "APr", "APc", "APf")
BASELINE, METHOD = "dino", "richsem"

Result = dict[str, object]
"""A finished run: row, seed, recipe, steps, samples, seconds, and the figures of `KEYS` from 0 to
1, None where no category is of that kind."""

_WIDTH, _LEFT, _PANEL, _GAP, _LINE, _TOP = 860, 250, 270, 40, 30, 46


def values(results: Sequence[Result], row: str, key: str) -> dict[int, float]:
    """A figure of a row by seed, in points (0 to 100), where there is one."""
    return {
        int(str(result["seed"])): 100 * float(str(result[key]))
        for result in results
        if result["row"] == row and result[key] is not None
    }


def deviation(numbers: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN for fewer than two."""
    return stdev(numbers) if len(numbers) > 1 else math.nan


def paired(
    results: Sequence[Result], row: str, key: str, other: str = BASELINE
) -> tuple[float, float, int]:
    """Mean of `row` minus `other` over seeds that both have, its standard error, the number.

    A pair has the seed and so the pre-trained weights in common. NaN where there is no pair, and
    for the error where there is only one.
    """
    one, base = values(results, row, key), values(results, other, key)
    differences = [one[seed] - base[seed] for seed in sorted(one.keys() & base.keys())]
    if not differences:
        return math.nan, math.nan, 0
    error = deviation(differences) / math.sqrt(len(differences))
    return fmean(differences), error, len(differences)


def markdown(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Figures of each row, its differences to the baseline, and the method's to the other rows."""
    rows = [row for row in titles if any(result["row"] == row for result in results)]
    steps = sorted({int(str(result["steps"])) for result in results})
    assert len(steps) == 1, f"rows with different optimiser steps do not compare: {steps}"
    lines = [
        f"Mean and standard deviation over seeds, in points; {steps[0]:,} optimiser steps each.",
        "",
        "| row | seeds | " + " | ".join(KEYS) + " | minutes a run |",
        "|---|---|" + "---|" * (len(KEYS) + 1),
    ]
    for row in rows:
        own = [result for result in results if result["row"] == row]
        cells = [_cell(list(values(results, row, key).values())) for key in KEYS]
        minutes = fmean(float(str(result["seconds"])) for result in own) / 60
        lines.append(f"| {titles[row]} | {len(own)} | {' | '.join(cells)} | {minutes:.1f} |")
    pairs = [(row, BASELINE) for row in rows if row != BASELINE]
    title = f"Each row minus {titles[BASELINE]}"
    lines += _differences(results, title, [(titles[row], row, base) for row, base in pairs])
    if METHOD in rows:
        others = [row for row in rows if row not in (METHOD, BASELINE)]
        title = f"{titles[METHOD]}, minus each other row"
        lines += _differences(results, title, [(titles[row], METHOD, row) for row in others])
    return "\n".join(lines) + "\n"


def _differences(
    results: Sequence[Result], title: str, pairs: Sequence[tuple[str, str, str]]
) -> list[str]:
    """Lines of a table of paired differences: `pairs` has (label, row, row that is taken off)."""
    if not pairs:
        return []
    lines = [
        "",
        f"{title}, with the same seed: mean and its standard error.",
        "",
        "| row | pairs | " + " | ".join(KEYS) + " |",
        "|---|---|" + "---|" * len(KEYS),
    ]
    for label, row, other in pairs:
        found = [paired(results, row, key, other) for key in KEYS]
        cells = [_signed(mean, error) for mean, error, _ in found]
        lines.append(f"| {label} | {found[0][2]} | {' | '.join(cells)} |")
    return lines


def plot(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """AP and APr of each row as SVG: a dot for each seed, a line at the mean."""
    rows = [row for row in titles if any(result["row"] == row for result in results)]
    height = _TOP + _LINE * len(rows) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13" role="img">',
        "<title>Table 4 in miniature: AP and APr of each row, a dot for each seed</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, row in enumerate(rows):
        y = _TOP + _LINE * i + _LINE / 2
        parts.append(
            f'<text x="{_LEFT - 14}" y="{y + 4}" text-anchor="end" fill="#222222">'
            f"{escape(titles[row])}</text>"
        )
    for panel, key in enumerate(("AP", "APr")):
        by_row = [list(values(results, row, key).values()) for row in rows]
        parts += _panel(by_row, key, _LEFT + panel * (_PANEL + _GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(by_row: Sequence[Sequence[float]], key: str, left: int) -> list[str]:
    """One figure's axis and its dots; the axis spans whole fives around all of them."""
    every = [number for numbers in by_row for number in numbers] or [0.0]
    low, high = 5 * math.floor(min(every) / 5), 5 * math.floor(max(every) / 5) + 5
    bottom = _TOP + _LINE * len(by_row)
    parts = [
        f'<text x="{left + _PANEL / 2}" y="20" text-anchor="middle" fill="#222222" '
        f'font-weight="bold">{key}</text>'
    ]
    for tick in range(low, high + 1, 5 if high - low <= 30 else 10):
        x = left + _PANEL * (tick - low) / (high - low)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 10}" y2="{bottom}" stroke="#dddddd"/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555555">{tick}</text>'
        )
    for i, numbers in enumerate(by_row):
        if not numbers:
            continue
        y = _TOP + _LINE * i + _LINE / 2
        places = [left + _PANEL * (number - low) / (high - low) for number in numbers]
        mean = fmean(places)
        parts.append(
            f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 10}" y2="{y + 10}" stroke="#b3261e" '
            f'stroke-width="2.5"><title>mean {fmean(numbers):.2f}</title></line>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="#2a5db0" fill-opacity="0.75">'
            f"<title>{number:.2f}</title></circle>"
            for x, number in zip(places, numbers, strict=True)
        ]
    return parts


def _cell(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    spread = deviation(numbers)
    return f"{fmean(numbers):.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")


def _signed(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
