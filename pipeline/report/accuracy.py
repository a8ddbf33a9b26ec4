"""Average precision: the headline, its course over steps, and its spread over categories."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.report.charts import Mark, Series, bar_chart, line_chart, scatter_chart
from pipeline.report.elements import figure, fraction, legend, mark_legend, section, table
from pipeline.report.run_data import CategoryRow, Evaluation, RunData, points

_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
_GROUPS = {"r": "rare", "c": "common", "f": "frequent"}
_CURVES = (("APr", "rare"), ("APc", "common"), ("APf", "frequent"), ("AP", "all"))
_LISTED = 10


def headline(run: RunData) -> str:
    """The four figures that count, large; then every evaluation in a table, with its protocol."""
    if not run.curve:
        return '<section><p class="note">This run has not been evaluated.</p></section>'
    last = run.curve[-1]
    large = [("AP", "all categories", ""), ("APr", "rare", "rare")]
    large += [("APc", "common", "common"), ("APf", "frequent", "frequent")]
    cards = "".join(
        f'<div class="card {style}"><span class="figure">{fraction(last.get(key))}</span>'
        f'<span class="key">{key}</span><span class="what">{what}</span></div>'
        for key, what, style in large
    )
    recall = sorted({key for event in run.curve for key in event if key.startswith("AR@")})
    head = ["step", *_COLUMNS, *recall]
    rows = [
        [f"{event['step']:,}", *(fraction(event.get(key)) for key in head[1:])]
        for event in reversed(run.curve)
    ]
    marked = [f'<span class="{_style_of(key)}">{key}</span>' for key in head]
    return section(
        "Average precision",
        f'<div class="cards">{cards}</div>',
        table(marked, rows),
        f'<p class="note">{escape(_protocol(last))}</p>',
    )


def _style_of(key: str) -> str:
    return dict(_CURVES[:3]).get(key, "")


def _protocol(results: dict[str, Any]) -> str:
    counts = results.get("counts")
    text = str(results.get("protocol", "Protocol not recorded with this evaluation")) + "."
    if not isinstance(counts, dict):
        return text
    groups = counts["categories_with_ground_truth"]
    return (
        f"{text} {counts['instances']:,} boxes of {groups['all']:,} categories ({groups['r']:,} "
        f"rare, {groups['c']:,} common, {groups['f']:,} frequent) and {counts['detections']:,} "
        f"detections. Fractions of 1; a dash is undefined (no ground truth)."
    )


def groups_section(run: RunData) -> str:
    """APr, APc and APf over steps, or as bars where there is one evaluation."""
    if not run.curve:
        return ""
    if len(run.curve) == 1:
        bars = [(key, style, run.curve[0].get(key)) for key, style in _CURVES]
        return figure("By frequency of the category", bar_chart(bars, "AP by frequency group"))
    series = [Series(key, style, points(run.curve, key)) for key, style in _CURVES]
    values = [value for one in series for _, value in one.points]
    top = min(1.0, math.ceil(max(values, default=0.0) * 10 + 1e-9) / 10 + 0.02)
    chart = line_chart(
        series, "AP by frequency group over steps", y_range=(0.0, max(top, 0.1)), dots=True
    )
    shown = [(one.name, one.style) for one in series if one.points]
    return figure("By frequency of the category", legend(shown), chart)


def bar_of_sizes(run: RunData) -> str:
    """AP by object size and by IoU threshold, of the last evaluation."""
    if not run.curve:
        return ""
    last = run.curve[-1]
    bars = [(key, "plain", last.get(key)) for key in ("APs", "APm", "APl", "AP50", "AP75")]
    return figure("By size of the object and by IoU", bar_chart(bars, "AP by size and IoU"))


def categories_section(run: RunData) -> str:
    """AP of each category against its training images, and the best and worst rare ones."""
    rows = run.evaluations[-1].categories if run.evaluations else []
    defined = [row for row in rows if row.ap is not None]
    if not defined:
        return ""
    return section(
        "Categories",
        _scatter(defined),
        _extremes(defined),
        _seen(run.evaluations[-1], len(rows) - len(defined)),
    )


def _seen(evaluation: Evaluation, undefined: int) -> str:
    text = f"Evaluation at step {evaluation.step:,}."
    if undefined:
        text += f" {undefined:,} categories without ground truth in these images are left out."
    return f'<p class="note">{text}</p>'


def _scatter(rows: Sequence[CategoryRow]) -> str:
    known = [row for row in rows if row.train_images is not None]
    marks = [
        Mark(
            # A category that was never seen in training has no place on a logarithmic axis.
            x=max(float(row.train_images or 0), 0.5),
            y=row.ap or 0.0,
            style=_GROUPS.get(row.frequency, "plain"),
            text=_describe(row),
        )
        for row in sorted(known, key=lambda row: "fcr".find(row.frequency))
    ]
    present = {row.frequency for row in known}
    entries = [(name, name) for key, name in _GROUPS.items() if key in present]
    chart = scatter_chart(
        marks,
        _trend(marks),
        "AP of each category against its training images",
        ("training images with the category (logarithmic)", "AP"),
    )
    return figure(
        "AP of each category against its training images (line: mean of neighbours)",
        mark_legend(entries),
        f'<div class="wide">{chart}</div>' if chart else "",
    )


def _describe(row: CategoryRow) -> str:
    images = "unknown" if row.train_images is None else f"{row.train_images:,}"
    return f"{row.name}: AP {row.ap:.3f}, {images} training images, {row.instances:,} boxes here"


def _trend(marks: Sequence[Mark]) -> list[tuple[float, float]]:
    """Means of about ten groups of like size, by training images; equal counts stay together."""
    size = max(5, math.ceil(len(marks) / 10))
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: mark.x):
        if not groups or (len(groups[-1]) >= size and groups[-1][-1].x < mark.x):
            groups.append([])
        groups[-1].append(mark)
    if len(groups) > 1 and len(groups[-1]) < size / 2:
        groups[-2:] = [[*groups[-2], *groups[-1]]]
    return [
        (
            math.exp(sum(math.log(mark.x) for mark in group) / len(group)),
            sum(mark.y for mark in group) / len(group),
        )
        for group in groups
    ]


def _extremes(rows: Sequence[CategoryRow]) -> str:
    """The best and the worst rare categories; of the whole list where none is rare."""
    rare = [row for row in rows if row.frequency == "r"]
    kind = "rare categories" if rare else "categories"
    ordered = sorted(rare or rows, key=lambda row: (-(row.ap or 0.0), row.name))
    count = min(_LISTED, math.ceil(len(ordered) / 2))
    parts = [_list_categories(f"Best {kind}", ordered[:count])]
    if len(ordered) > count:
        worst = ordered[max(count, len(ordered) - _LISTED) :]
        parts.append(_list_categories(f"Worst {kind}", worst[::-1]))
    return f'<div class="grid2">{"".join(parts)}</div>'


def _list_categories(title: str, rows: Sequence[CategoryRow]) -> str:
    cells = [
        [
            escape(row.name),
            "&ndash;" if row.train_images is None else f"{row.train_images:,}",
            f"{row.instances:,}",
            f'<span class="meter {_GROUPS.get(row.frequency, "plain")}" '
            f'style="--share:{row.ap or 0:.3f}"></span>{fraction(row.ap)}',
        ]
        for row in rows
    ]
    return figure(title, table(["category", "train images", "boxes", "AP"], cells, "names"))
