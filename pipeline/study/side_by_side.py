"""One photograph twice, with the detections of two checkpoints, and arrows on what one misses."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

from PIL import Image

from pipeline.data.images import decode_image
from pipeline.data.sample import Sample
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
from pipeline.report.picture_boxes import dark_edge, name_plate, titled_frame

_MAX_SIDE = 640
_TEXT_SHARE = 22
_OTHERS_NAMED = 3
_TIP = 0.15
"""How far within its box an arrow's tip is, as a share of the box."""
_MAX_HEIGHT = 440
"""Of a picture on the page, in pixels; a higher one has room at its sides."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A box to draw, xywh in pixels of the photograph; `score` is None for ground truth."""

    name: str
    rare: bool
    bbox: tuple[float, float, float, float]
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """What one checkpoint makes of a photograph.

    `finders` are the detections that find a rare object, `others` some that do not, `missed` the
    rare objects that are not found; `arrows` are the rare objects that only one of the two
    checkpoints finds, with True where it is this one.
    """

    title: str
    finders: Sequence[Shown]
    others: Sequence[Shown]
    missed: Sequence[Shown]
    arrows: Sequence[tuple[Shown, bool]]


def pair(sample: Sample, sides: Sequence[Side]) -> str:
    """Two pictures beside each other."""
    photograph = decode_image(sample.image)
    url = _data_url(photograph)
    return "".join(_picture(photograph.size, url, sample.image_id, side) for side in sides)


def _data_url(photograph: Image.Image) -> str:
    scale = min(1.0, _MAX_SIDE / max(photograph.size))
    width, height = (max(1, round(side * scale)) for side in photograph.size)
    buffer = BytesIO()
    photograph.resize((width, height), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=84, optimize=True
    )
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(size: Size, url: str, image_id: int, side: Side) -> str:
    canvas = canvas_size(size)
    unit = canvas[1] / 68
    missed = "".join(_missed(box, frame_on(canvas, box.bbox, size), unit) for box in side.missed)
    finders = [(box, frame_on(canvas, box.bbox, size)) for box in side.finders]
    others = [(box, frame_on(canvas, box.bbox, size)) for box in side.others]
    frames = "".join(_other(box, frame, unit) for box, frame in reversed(others))
    frames += "".join(_finder(box, frame, unit) for box, frame in reversed(finders))
    arrows = [(_arrow(frame_on(canvas, box.bbox, size), canvas), here) for box, here in side.arrows]
    named = [*finders, *[one for one in others if not one[0].rare][:_OTHERS_NAMED]]
    names = "".join(
        name_plate(label, rare=box.rare) for box, label in _labels(named, canvas, arrows)
    )
    drawn = "".join(_draw_arrow(points, here, unit) for points, here in arrows)
    return (
        '<figure style="flex:1 1 calc(50% - 7px)">'
        f'<svg viewBox="0 0 {canvas[0]} {canvas[1]}" style="max-height:{_MAX_HEIGHT}px" role="img" '
        f'aria-label="image {image_id}, {escape(side.title)}">'
        f'<image href="{url}" width="{canvas[0]}" height="{canvas[1]}" '
        f'preserveAspectRatio="none"/>{missed}{frames}{drawn}{names}</svg>'
        f"<figcaption>{_caption(side, image_id)}</figcaption></figure>"
    )


def _finder(box: Shown, frame: Rectangle, unit: float) -> str:
    line = titled_frame("found rare", frame, f"stroke-width:{0.8 * unit:.2f}", _words(box))
    return dark_edge(frame, 1.2 * unit) + line


def _other(box: Shown, frame: Rectangle, unit: float) -> str:
    style = "found rare" if box.rare else "found"
    return titled_frame(style, frame, f"stroke-width:{0.3 * unit:.2f}", _words(box))


def _words(box: Shown) -> str:
    return f"{clean_name(box.name)}, score {box.score:.3f}"


def _missed(box: Shown, frame: Rectangle, unit: float) -> str:
    dash = f"stroke-dasharray:{1.3 * unit:.2f} {1.0 * unit:.2f}"
    words = f"not found: {clean_name(box.name)}"
    line = titled_frame("truth rare", frame, f"stroke-width:{0.55 * unit:.2f};{dash}", words)
    return dark_edge(frame, 0.8 * unit) + line


def _labels(
    boxes: Sequence[tuple[Shown, Rectangle]],
    canvas: Size,
    arrows: Sequence[tuple[Sequence[tuple[float, float]], bool]],
) -> list[tuple[Shown, Label]]:
    """Names, each off the arrows and off those before it; without room, rare ones stand anyway."""
    text_size = round(canvas[1] / _TEXT_SHARE)
    blocked = [_bounds(points) for points, _ in arrows]
    labels: list[tuple[Shown, Label]] = []
    for box, frame in boxes:
        taken = [*blocked, *(label.plate for _, label in labels)]
        label = place_label(box.name, box.score, text_size, frame=frame, canvas=canvas, taken=taken)
        if box.rare or not any(overlap(label.plate, other) for other in taken):
            labels.append((box, label))
    return labels


def _arrow(frame: Rectangle, canvas: Size) -> list[tuple[float, float]]:
    """Where an arrow lies that points into a frame from a corner: its tip first, then around it.

    It comes from outside by the corner with most room, or from the middle where none has room.
    """
    left, top, right, bottom = frame
    length = canvas[1] / 6
    inwards = _TIP * (right - left), _TIP * (bottom - top)
    corners = [
        (x + (inwards[0] if across < 0 else -inwards[0]),
         y + (inwards[1] if down < 0 else -inwards[1]), across, down)
        for x, across in ((left, -1), (right, 1))
        for y, down in ((top, -1), (bottom, 1))
    ]  # fmt: skip

    def room(corner: tuple[float, float, int, int]) -> float:
        x, y, across, down = corner
        return min(x if across < 0 else canvas[0] - x, y if down < 0 else canvas[1] - y)

    x, y, across, down = max(corners, key=room)
    if room((x, y, across, down)) < 0.75 * length:
        across, down = -across, -down
    turn = math.atan2(down, across)
    shape = [
        (0, 0),
        (0.45, 0.22),
        (0.45, 0.09),
        (1, 0.09),
        (1, -0.09),
        (0.45, -0.09),
        (0.45, -0.22),
    ]
    cosine, sine = math.cos(turn), math.sin(turn)
    return [
        (x + length * (a * cosine - b * sine), y + length * (a * sine + b * cosine))
        for a, b in shape
    ]


def _bounds(points: Sequence[tuple[float, float]]) -> Rectangle:
    across, down = zip(*points, strict=True)
    return min(across), min(down), max(across), max(down)


def _draw_arrow(points: Sequence[tuple[float, float]], here: bool, unit: float) -> str:
    """Filled where this checkpoint finds the object, hollow where the other does."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    fill = "#ffd60a" if here else "rgb(255 255 255 / .25)"
    words = "found here, not by the other" if here else "found by the other, not here"
    return (
        f'<polygon points="{path}" style="fill:{fill};stroke:#101418;'
        f'stroke-width:{0.5 * unit:.2f};stroke-linejoin:round"/>'
        f'<polygon points="{path}" style="fill:none;stroke:#ffd60a;'
        f'stroke-width:{0.25 * unit:.2f};stroke-linejoin:round"><title>{words}</title></polygon>'
    )


def _caption(side: Side, image_id: int) -> str:
    """Which checkpoint, and what it finds or misses that the other does not."""

    def named(here: bool) -> str:
        names = [clean_name(box.name) for box, found in side.arrows if found is here]
        times = {name: names.count(name) for name in dict.fromkeys(names)}
        return ", ".join(
            f'<span class="rare">{escape(name)}</span>' + (f" x {number}" if number > 1 else "")
            for name, number in times.items()
        )

    parts = [f"<b>{escape(side.title)}</b>, image {image_id}"]
    for here, verb in ((True, "finds"), (False, "misses")):
        if named(here):
            parts.append(f"{verb} {named(here)}")
    return "; ".join(parts)
