"""Figures of an evaluation as lines of text."""

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.results import AP_KEYS, Results


def format_table(results: Results) -> str:
    """The protocol line, the nine figures in aligned columns, recall, and what was counted.

    Other protocols follow where their figures are others: they have rows of their own, named.
    """
    counts = results["counts"]
    groups = counts["categories_with_ground_truth"]
    frequencies = elsewhere = ""
    if any(groups[frequency] for frequency in "rcf"):
        frequencies = f" ({groups['r']:,} rare, {groups['c']:,} common, {groups['f']:,} frequent)"
    if counts.get("detections_elsewhere"):
        elsewhere = f"{counts['detections_elsewhere']:,} on images that are not evaluated, "
    lines = [
        results["protocol"],
        "".join(f"{key:>8}" for key in AP_KEYS),
        _row(results),
        *_recall(results),
        f"{counts['instances']:,} boxes of {groups['all']:,} categories{frequencies}; "
        f"{counts['detections']:,} detections, {elsewhere}{counts['detections_over_limit']:,} "
        f"beyond the limit, {counts['detections_counted']:,} in categories that count",
    ]
    for other in (results.get("protocols") or {}).values():
        if _row(other) != _row(results):
            lines += [other["protocol"], _row(other), *_recall(other)]
    point = results.get("operating_point")
    if point is not None:
        precision, recall, iou = (
            format_fraction(point[key]) for key in ("precision", "recall", "mean_iou")
        )
        lines.append(
            f"at score {point['score_threshold']:.3f} and IoU {point['iou_threshold']:.2f}: "
            f"precision {precision}, recall {recall}, mean IoU of the true positives {iou}"
        )
    return "\n".join(lines)


def _row(figures: Mapping[str, Any]) -> str:
    return "".join(f"{format_fraction(figures[key]):>8}" for key in AP_KEYS)


def _recall(figures: Mapping[str, Any]) -> list[str]:
    """One line of average recalls, each after its name, or none: Pascal VOC has none."""
    recalls = [key for key in figures if key.startswith("AR")]
    line = "".join(f"  {key} {format_fraction(figures[key])}" for key in recalls)
    return [line] if line else []


def format_fraction(value: float | None) -> str:
    """Four decimals, or a dash where the figure is undefined."""
    return "-" if value is None else f"{value:.4f}"


def format_comparison(results: Results, official: Mapping[str, float | None]) -> str:
    """Our figures beside the official package's, with their differences."""
    lines = [f"{'':>8}{'ours':>10}{'official':>10}{'difference':>12}"]
    for key in (key for key in official if key in results):
        ours, theirs = results[key], official[key]
        if ours is None or theirs is None:
            difference = "-" if ours is theirs else "differs"
        else:
            difference = f"{ours - theirs:.1e}"
        figures = f"{format_fraction(ours):>10}{format_fraction(theirs):>10}"
        lines.append(f"{key:>8}{figures}{difference:>12}")
    return "\n".join(lines)
