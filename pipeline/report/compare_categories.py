"""Which categories gained and lost against the first run, by frequency group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.categories import (
    FREQUENCIES,
    frequency_legend,
    place,
    rarest_last,
    trend,
)
from pipeline.report.charts import Mark, scatter_chart
from pipeline.report.compared import Compared
from pipeline.report.elements import (
    breakable,
    count,
    difference,
    figure,
    folded,
    fraction,
    grid,
    note,
    section,
    table,
)
from pipeline.report.stored import CategoryRow

_LISTED = 20


@dataclass(frozen=True, slots=True)
class Change:
    """One category's AP in the first run and in another."""

    row: CategoryRow
    before: float
    after: float

    @property
    def difference(self) -> float:
        """Positive where the other run is better."""
        return self.after - self.before


def category_sections(runs: Sequence[Compared]) -> str:
    """A section for each run but the first, where the figures are comparable."""
    return "".join(_section(runs[0], other) for other in runs[1:])


def _section(first: Compared, other: Compared) -> str:
    title = f"Categories: {other.label} against {first.label}"
    before, after = first.run.shown, other.run.shown
    if before is None or after is None:
        return ""
    if other.obstacles:
        return section(title, note("Not shown, because the two runs are not comparable (above)."))
    earlier = {(row.category_id, row.name): row.ap for row in before.categories}
    changes = [
        Change(row, known, row.ap)
        for row in after.categories
        if row.ap is not None and (known := earlier.get((row.category_id, row.name))) is not None
    ]
    if not changes:
        return ""
    others = sum(row.ap is not None for row in after.categories) - len(changes)
    return section(
        title,
        _summary(changes),
        _scatter(changes),
        *(_extremes(changes, group, name) for group, name in _present(changes)),
        note(f"{others:,} categories have an AP in this run only.") if others else "",
    )


def _present(changes: Sequence[Change]) -> list[tuple[str, str]]:
    """Groups that are there, rare first; categories without a frequency at the end."""
    known = {change.row.frequency for change in changes}
    groups = [(key, name) for key, name in FREQUENCIES.items() if key in known]
    return [*groups, *((key, "other") for key in sorted(known - set(FREQUENCIES)))]


def _summary(changes: Sequence[Change]) -> str:
    rows = []
    for group, name in _present(changes):
        part = [one.difference for one in changes if one.row.frequency == group]
        gained = sum(value > 0 for value in part)
        lost = sum(value < 0 for value in part)
        mean = sum(part) / len(part)
        cells = [f"{len(part):,}", f"{gained:,}", f"{lost:,}", f"{len(part) - gained - lost:,}"]
        rows.append([f'<span class="{name}">{name}</span>', *cells, difference(mean)])
    heads = ["categories", "in both runs", "gained", "lost", "unchanged", "mean difference"]
    return table(heads, rows, "names summary")


def _scatter(changes: Sequence[Change]) -> str:
    by_row = {one.row.category_id: one for one in changes if one.row.train_images is not None}
    rows = rarest_last([one.row for one in by_row.values()])
    marks = [
        Mark(
            place(row),
            by_row[row.category_id].difference,
            FREQUENCIES.get(row.frequency, "plain"),
            _describe(by_row[row.category_id]),
        )
        for row in rows
    ]
    reach = max((abs(mark.y) for mark in marks), default=0.0)
    limit = max(0.1, math.ceil(reach * 10 + 0.2) / 10)
    chart = scatter_chart(
        marks,
        trend(marks),
        "Difference of AP of each category against its training images",
        ("training images with the category (logarithmic)", "difference of AP"),
        y_range=(-limit, limit),
    )
    return figure(
        "Difference of AP against training images (line: mean of neighbours)",
        frequency_legend(rows),
        f'<div class="wide">{chart}</div>' if chart else "",
    )


def _describe(change: Change) -> str:
    row = change.row
    images = "unknown" if row.train_images is None else f"{row.train_images:,}"
    return (
        f"{row.name}: {change.difference:+.3f}, AP {change.before:.3f} to {change.after:.3f}, "
        f"{images} training images, {row.instances:,} boxes here"
    )


def _extremes(changes: Sequence[Change], group: str, name: str) -> str:
    """The categories of a group that gained and that lost most; rare ones lie open."""
    part = sorted(
        (one for one in changes if one.row.frequency == group),
        key=lambda one: (-one.difference, one.row.name),
    )
    gained = [one for one in part if one.difference > 0][:_LISTED]
    lost = [one for one in reversed(part) if one.difference < 0][:_LISTED]
    body = grid(
        _list_changes(f"Gained most, {name} categories", name, gained),
        _list_changes(f"Lost most, {name} categories", name, lost),
    )
    if not body:
        return note(f"No {name} category changed.")
    if group == "r":
        return body
    return folded(f"{name.capitalize()} categories: {len(gained)} gained, {len(lost)} lost", body)


def _list_changes(title: str, style: str, changes: Sequence[Change]) -> str:
    rows = [
        [
            f'<span class="{style}">{breakable(one.row.name)}</span>',
            count(one.row.train_images),
            fraction(one.before),
            fraction(one.after),
            difference(one.difference),
        ]
        for one in changes
    ]
    heads = ["category", "train images", "first", "here", "difference"]
    return figure(title, table(heads, rows, "names") if rows else "")
