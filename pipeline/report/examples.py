"""Validation photographs with their ground truth and the detections on them."""

from collections import Counter
from collections.abc import Sequence
from html import escape

from pipeline.data.vocabulary.categories import clean_name
from pipeline.evaluation.labels import (
    Label,
    Rectangle,
    Size,
    canvas_size,
    frame_on,
    overlap,
    place_label,
)
from pipeline.report.elements import note, section
from pipeline.report.picture_boxes import dark_edge, name_plate, titled_frame
from pipeline.report.run_data import RunData, subset_of
from pipeline.report.stored import Example, ExampleBox

_ROW_HEIGHT = 230
_LABELLED = 6
"""So many of the best detections carry their names, and all rare ones."""
_TEXT_SHARE = 23
"""Text is this part of a picture's height, so that it can be read at the height of a row."""
_LISTED = 12


def examples_section(run: RunData) -> str:
    """A grid of example pictures, of the evaluation that the page shows."""
    shown = run.shown
    if shown is None or not shown.examples:
        return ""
    subset = subset_of(shown.results)
    seen = note(f"Evaluation at step {shown.step:,}{f', {subset}' if subset else ''}.")
    key = (
        '<p class="note">Dashed: ground truth, named below. Solid: detections, as many as there '
        "are ground-truth boxes, of overlapping ones the best; names and scores of rare ones and "
        f"of the best {_LABELLED}, where there is room for them. "
        '<span class="rare">Red: rare categories.</span> All names show on hover.</p>'
    )
    pictures = "".join(_picture(example) for example in shown.examples)
    return section("Examples", seen, key, f'<div class="pictures">{pictures}</div>')


def _picture(example: Example) -> str:
    size = example.width, example.height
    canvas = canvas_size(size)
    unit = canvas[1] / 68
    truth = "".join(
        _truth(box, frame_on(canvas, box.bbox, size), unit) for box in example.ground_truth
    )
    frames = [frame_on(canvas, box.bbox, size) for box in example.detections]
    found = "".join(
        _detection(box, frame, unit)
        for box, frame in reversed(list(zip(example.detections, frames, strict=True)))
    )
    names = "".join(
        name_plate(label, rare=box.is_rare)
        for box, label in _labels(example.detections, frames, canvas)
    )
    ratio = size[0] / size[1]
    return (
        f'<figure style="flex:{ratio:.3f} 1 {ratio * _ROW_HEIGHT:.0f}px">'
        f'<svg viewBox="0 0 {canvas[0]} {canvas[1]}" role="img" '
        f'aria-label="image {example.image_id} with boxes">'
        f'<image href="{example.url}" width="{canvas[0]}" height="{canvas[1]}" '
        f'preserveAspectRatio="none"/>{truth}{found}{names}</svg>'
        f"<figcaption>{caption_of(example)}</figcaption></figure>"
    )


def caption_of(example: Example) -> str:
    """Which image, and what is on it: rare categories first, then those with most boxes."""
    count = len(example.ground_truth)
    caption = f"Image {example.image_id}, {count} {'box' if count == 1 else 'boxes'}"
    times = Counter((not box.is_rare, clean_name(box.name)) for box in example.ground_truth)
    order = sorted(times, key=lambda one: (one[0], -times[one], one[1]))
    words = [
        (escape(name) if common else f'<span class="rare">{escape(name)}</span>')
        + (f" x {times[common, name]}" if times[common, name] > 1 else "")
        for common, name in order
    ]
    if len(words) > _LISTED:
        words[_LISTED:] = [f"and {len(words) - _LISTED} other categories"]
    return f"{caption}: {', '.join(words)}" if words else caption


def _labels(
    boxes: Sequence[ExampleBox], frames: Sequence[Rectangle], canvas: Size
) -> list[tuple[ExampleBox, Label]]:
    """Names of the rare detections, then of the best, each off those before it and inside."""
    order = sorted(range(len(boxes)), key=lambda place: (not boxes[place].is_rare, place))
    text_size = round(canvas[1] / _TEXT_SHARE)
    labels: list[tuple[ExampleBox, Label]] = []
    for place in order:
        box, taken = boxes[place], [label.plate for _, label in labels]
        if not box.is_rare and place >= _LABELLED:
            continue
        label = place_label(
            box.name, box.score, text_size, frame=frames[place], canvas=canvas, taken=taken
        )
        left, top, right, bottom = label.plate
        inside = 0 <= left and right <= canvas[0] and 0 <= top and bottom <= canvas[1]
        if inside and not any(overlap(label.plate, other) for other in taken):
            labels.append((box, label))
    return labels


def _truth(box: ExampleBox, frame: Rectangle, unit: float) -> str:
    style = "truth rare" if box.is_rare else "truth"
    dash = f"stroke-dasharray:{1.4 * unit:.2f} {0.9 * unit:.2f}"
    words = f"ground truth: {clean_name(box.name)}"
    line = titled_frame(style, frame, f"stroke-width:{0.45 * unit:.2f};{dash}", words)
    return dark_edge(frame, 0.75 * unit) + line


def _detection(box: ExampleBox, frame: Rectangle, unit: float) -> str:
    style = "found rare" if box.is_rare else "found"
    words = f"{clean_name(box.name)}, score {box.score:.3f}"
    return titled_frame(style, frame, f"stroke-width:{0.5 * unit:.2f}", words)
