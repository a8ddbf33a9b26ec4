"""Validation photographs with their ground truth and the detections on them."""

from html import escape
from typing import Any

from pipeline.report.elements import section
from pipeline.report.run_data import Example, RunData

_ROW_HEIGHT = 230
_LABELLED = 6
"""So many of the best detections carry a label, and all rare ones; the rest show it on hover."""


def examples_section(run: RunData) -> str:
    """A grid of the last evaluation's example pictures."""
    examples = run.evaluations[-1].examples if run.evaluations else []
    if not examples:
        return ""
    note = (
        '<p class="note">Dashed: ground truth. Solid: detections, as many as there are '
        "ground-truth boxes, best first, of overlapping ones the best. "
        '<span class="rare">Red: rare categories.</span> Names of all boxes show on hover.</p>'
    )
    pictures = "".join(_picture(example) for example in examples)
    return section("Examples", note, f'<div class="pictures">{pictures}</div>')


def _picture(example: Example) -> str:
    width, height = example.width, example.height
    unit = height / 68
    truth = "".join(_truth(box, unit) for box in example.ground_truth)
    found = "".join(
        _detection(box, unit, width, place < _LABELLED or box["frequency"] == "r")
        for place, box in reversed(list(enumerate(example.detections)))
    )
    rare = sorted({box["name"] for box in example.ground_truth if box["frequency"] == "r"})
    count = len(example.ground_truth)
    caption = f"Image {example.image_id}, {count} {'box' if count == 1 else 'boxes'}"
    if rare:
        caption += f'; rare: <span class="rare">{escape(", ".join(rare))}</span>'
    ratio = width / height
    return (
        f'<figure style="flex:{ratio:.3f} 1 {ratio * _ROW_HEIGHT:.0f}px">'
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="image {example.image_id} with boxes">'
        f'<image href="{example.url}" width="{width}" height="{height}"/>{truth}{found}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _frame(box: dict[str, Any]) -> str:
    x, y, width, height = (float(value) for value in box["bbox"])
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'


def _truth(box: dict[str, Any], unit: float) -> str:
    style = "truth rare" if box["frequency"] == "r" else "truth"
    dash = f"stroke-dasharray:{1.4 * unit:.2f} {0.9 * unit:.2f}"
    return (
        f'<rect class="under" {_frame(box)} style="stroke-width:{0.75 * unit:.2f}"/>'
        f'<rect class="{style}" {_frame(box)} style="stroke-width:{0.45 * unit:.2f};{dash}">'
        f"<title>ground truth: {escape(box['name'])}</title></rect>"
    )


def _detection(box: dict[str, Any], unit: float, width: int, labelled: bool) -> str:
    style = "found rare" if box["frequency"] == "r" else "found"
    name, score = escape(box["name"]), float(box["score"])
    x, y, *_ = (float(value) for value in box["bbox"])
    size = 2.9 * unit
    label = f"{box['name']} {score:.2f}"
    left = max(0.0, min(x, width - 0.56 * size * len(label)))
    top = y - 0.35 * size if y > 1.4 * size else y + size
    text = (
        f'<text x="{left:.1f}" y="{top:.1f}" style="font-size:{size:.1f}px;'
        f'stroke-width:{0.22 * size:.1f}px">{escape(label)}</text>'
    )
    return (
        f'<g class="{style}"><rect {_frame(box)} style="stroke-width:{0.5 * unit:.2f}">'
        f"<title>{name}, score {score:.3f}</title></rect>{text if labelled else ''}</g>"
    )
