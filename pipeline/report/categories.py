"""AP of every category against its training images, and the best and worst rare ones."""

import math
from collections.abc import Sequence

from pipeline.report.charts import Mark, scatter_chart
from pipeline.report.elements import (
    breakable,
    count,
    figure,
    fraction,
    grid,
    mark_legend,
    note,
    section,
    table,
)
from pipeline.report.run_data import RunData, subset_of
from pipeline.report.stored import CategoryRow, Evaluation

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_LISTED = 20


def categories_section(run: RunData) -> str:
    """A mark for each category, and the rare categories at both ends."""
    shown = run.shown
    rows = shown.categories if shown else []
    defined = [row for row in rows if row.ap is not None]
    if shown is None or not defined:
        return ""
    return section(
        "Categories",
        _scatter(defined),
        _extremes(defined),
        note(_seen(shown, len(rows) - len(defined))),
    )


def _seen(evaluation: Evaluation, undefined: int) -> str:
    text = f"Evaluation at step {evaluation.step:,}."
    subset = subset_of(evaluation.results)
    if subset:
        text += f" Only {subset}."
    if undefined:
        text += f" {undefined:,} categories without ground truth in these images are left out."
    return text


def _scatter(rows: Sequence[CategoryRow]) -> str:
    known = [row for row in rows if row.train_images is not None]
    marks = [
        Mark(place(row), row.ap or 0.0, FREQUENCIES.get(row.frequency, "plain"), _describe(row))
        for row in rarest_last(known)
    ]
    chart = scatter_chart(
        marks,
        trend(marks),
        "AP of each category against its training images",
        ("training images with the category (logarithmic)", "AP"),
    )
    return figure(
        "AP of each category against its training images (line: mean of neighbours)",
        frequency_legend(known),
        f'<div class="wide">{chart}</div>' if chart else "",
    )


def place(row: CategoryRow) -> float:
    """Training images; a category that was never seen has no place on a logarithmic axis."""
    return max(float(row.train_images or 0), 0.5)


def rarest_last(rows: Sequence[CategoryRow]) -> list[CategoryRow]:
    """In the order of drawing, so that rare categories are never hidden."""
    return sorted(rows, key=lambda row: "fcr".find(row.frequency))


def frequency_legend(rows: Sequence[CategoryRow]) -> str:
    """The groups that are there, each with its mark."""
    present = {row.frequency for row in rows}
    return mark_legend([(name, name) for key, name in FREQUENCIES.items() if key in present])


def _describe(row: CategoryRow) -> str:
    images = "unknown" if row.train_images is None else f"{row.train_images:,}"
    return f"{row.name}: AP {row.ap:.3f}, {images} training images, {row.instances:,} boxes here"


def trend(marks: Sequence[Mark]) -> list[tuple[float, float]]:
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
    best = min(_LISTED, math.ceil(len(ordered) / 2))
    parts = [_list_categories(f"Best {kind}", ordered[:best])]
    if len(ordered) > best:
        worst = ordered[max(best, len(ordered) - _LISTED) :]
        parts.append(_list_categories(f"Worst {kind}", worst[::-1]))
    return grid(*parts)


def _list_categories(title: str, rows: Sequence[CategoryRow]) -> str:
    cells = [
        [
            breakable(row.name),
            count(row.train_images),
            f"{row.instances:,}",
            f'<span class="meter {FREQUENCIES.get(row.frequency, "plain")}" '
            f'style="--share:{row.ap or 0:.3f}"></span>{fraction(row.ap)}',
        ]
        for row in rows
    ]
    return figure(title, table(["category", "train images", "boxes", "AP"], cells, "names"))
