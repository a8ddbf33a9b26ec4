"""Loss and AP of several runs over steps, one colour for each run."""

from collections.abc import Sequence

from pipeline.report.accuracy import comparable_curves, top_of
from pipeline.report.charts import Series, line_chart
from pipeline.report.compared import Compared
from pipeline.report.elements import figure, grid, legend, note, section
from pipeline.report.run_data import points

_LOSSES = (
    ("loss", "Total loss"),
    ("loss/class", "Class loss, matched queries"),
    ("loss/box_l1", "Box L1 loss, matched queries"),
    ("loss/box_giou", "Box GIoU loss, matched queries"),
    ("loss/semantic", "Semantic loss, matched queries"),
)
_GROUPS = (
    ("AP", "AP, all categories"),
    ("APr", "APr, rare categories"),
    ("APc", "APc, common categories"),
    ("APf", "APf, frequent categories"),
)


def curves_section(runs: Sequence[Compared]) -> str:
    """AP groups first, then losses."""
    accuracy = grid(*(_accuracy(runs, key, title) for key, title in _GROUPS))
    losses = grid(*(_loss(runs, key, title) for key, title in _LOSSES))
    hollow = any(one.obstacles for one in runs) or any(
        len(comparable_curves(one.run.curve)) > 1 for one in runs
    )
    parts = []
    if accuracy:
        text = "Every evaluation of every run."
        if hollow:
            text += " Hollow points are on other images or under another protocol: not comparable."
        parts.append(section("Average precision over steps", note(text), accuracy))
    if losses:
        text = (
            "Terms are as weighted by each run's recipe, so that losses of runs with different "
            "weights or terms differ by them; points of long curves are means of neighbouring "
            "steps, which the words beside the pointer name."
        )
        parts.append(section("Losses over steps", note(text), losses))
    return "".join(parts)


def _accuracy(runs: Sequence[Compared], key: str, title: str) -> str:
    series: list[Series] = []
    shown = []
    for one in runs:
        before = len(series)
        for label, events in comparable_curves(one.run.curve):
            apart = bool(label or one.obstacles)
            name = f"{one.label}, {label}" if label else one.label
            values = points(events, key)
            if values:
                series.append(Series(name, one.style + (" hollow" if apart else ""), values))
        if len(series) > before:
            shown.append((one.label, one.style + (" hollow" if one.obstacles else "")))
    chart = line_chart(series, f"{title} over steps", y_range=(0.0, top_of(series)), dots=True)
    return figure(title, legend(shown), chart)


def _loss(runs: Sequence[Compared], key: str, title: str) -> str:
    series = [
        Series(one.label, one.style, values)
        for one in runs
        for values in [points(one.run.steps, key)]
        if any(value for _, value in values)
    ]
    shown = legend([(one.name, one.style) for one in series])
    chart = line_chart(series, f"{title} over steps", log=True, averaged=True)
    return figure(title, shown, chart)
