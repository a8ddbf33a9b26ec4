"""Precision over recall, of all categories by IoU threshold and of each frequency group."""

from collections.abc import Mapping
from typing import Any

from pipeline.report.charts import Series, line_chart
from pipeline.report.elements import figure, grid, legend, note, number, section
from pipeline.report.run_data import RunData, subset_of

_THRESHOLDS = (("0.50", "c1"), ("0.75", "c2"), ("0.50:0.95", "c3"))
_GROUPS = (
    ("r", "rare", "rare"),
    ("c", "common", "common"),
    ("f", "frequent", "frequent"),
    ("all", "all categories", "all"),
)


def curves_section(run: RunData) -> str:
    """Four charts of the evaluation that the page shows, or nothing where it has no curves."""
    shown = run.shown
    precision = shown.curves.get("precision") if shown else None
    if shown is None or not isinstance(precision, Mapping):
        return ""
    recall = shown.curves.get("recall")

    def series(name: str, style: str, group: str, iou: str) -> Series:
        curves = precision.get(group)
        values = curves.get(iou) if isinstance(curves, Mapping) else None
        return Series(name, style, _points(recall, values))

    by_iou = [series(f"IoU {iou}", style, "all", iou) for iou, style in _THRESHOLDS]
    charts = [_chart("All categories, by IoU threshold", by_iou)]
    for iou, _ in _THRESHOLDS:
        groups = [series(name, style, group, iou) for group, name, style in _GROUPS]
        charts.append(_chart(f"By frequency of the category, IoU {iou}", groups))
    body = grid(*charts)
    subset = subset_of(shown.results)
    text = (
        f"Mean precision over categories at 101 recalls, of the evaluation at step {shown.step:,}"
        f"{f', {subset}' if subset else ''}. The mean height of a line is its AP."
    )
    return section("Precision and recall", note(text), body) if body else ""


def _points(recall: Any, precision: Any) -> list[tuple[float, float]]:
    """Pairs that are known; -1 stands for undefined in COCO's own tables."""
    if not isinstance(recall, list) or not isinstance(precision, list):
        return []
    pairs = [(number(x), number(y)) for x, y in zip(recall, precision, strict=False)]
    return [(x, y) for x, y in pairs if x is not None and y is not None and y >= 0]


def _chart(title: str, series: list[Series]) -> str:
    known = [one for one in series if one.points]
    chart = line_chart(
        known,
        f"Precision over recall: {title}",
        size=(520, 260),
        axis_titles=("recall", "precision"),
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
    )
    return figure(title, legend([(one.name, one.style) for one in known]), chart)
