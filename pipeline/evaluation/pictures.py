"""Photographs with labelled boxes, for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pipeline.data.vocabulary.categories import Frequency
from pipeline.evaluation.labels import (
    Label,
    Rectangle,
    canvas_size,
    font,
    frame_on,
    place_label,
)

RARE, OTHER = ("#ff3b30", "#c9211a"), ("#48b4ff", "#1568ad")
"""Lines and plates: red for rare categories, as in the report, and blue for all others."""
PAPER, HALO = "#ffffff", "#101418"


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """One detection to draw; `bbox` is xywh in pixels of the photograph."""

    name: str
    frequency: Frequency | None
    score: float
    bbox: tuple[float, float, float, float]

    @property
    def colours(self) -> tuple[str, str]:
        """Of the line and of the plate."""
        return RARE if self.frequency == "r" else OTHER


def draw_boxes(photograph: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """A new RGB picture with all boxes and their names, the best detection on top.

    Each name stands on a plate of its own colour, whole inside the picture, and off the names of
    better detections where there is room. Text grows with the picture, and is smaller at boxes
    that are small.
    """
    size = canvas_size(photograph.size)
    picture = photograph.convert("RGB")
    enlarged = size != photograph.size
    picture = picture.resize(size, Image.Resampling.BICUBIC) if enlarged else picture.copy()
    canvas = ImageDraw.Draw(picture)
    unit = (size[0] * size[1]) ** 0.5 / 100
    line = max(2, round(unit / 1.9))
    best_first = sorted(boxes, key=lambda box: -box.score)
    frames = [frame_on(size, box.bbox, photograph.size) for box in best_first]
    labels: list[Label] = []
    for box, frame in zip(best_first, frames, strict=True):
        side = ((frame[2] - frame[0]) * (frame[3] - frame[1])) ** 0.5
        text_size = max(11, round(min(max(0.15 * side, 1.8 * unit), 2.5 * unit)))
        taken = [label.plate for label in labels]
        labels.append(
            place_label(box.name, box.score, text_size, frame=frame, canvas=size, taken=taken)
        )
    drawn = list(zip(best_first, frames, labels, strict=True))[::-1]
    for box, frame, _ in drawn:
        _draw_frame(canvas, frame, box.colours[0], line)
    for box, _, label in drawn:
        left, top, right, bottom = label.plate
        canvas.rectangle((left, top, right - 1, bottom - 1), fill=box.colours[1], outline=HALO)
        middle = (left + right) / 2, (top + bottom) / 2
        canvas.text(middle, label.text, fill=PAPER, font=font(label.text_size), anchor="mm")
    return picture


def _draw_frame(canvas: ImageDraw.ImageDraw, frame: Rectangle, colour: str, line: int) -> None:
    """A coloured line with a thin dark edge on both sides, which shows on any background."""
    left, top, right, bottom = round(frame[0]), round(frame[1]), round(frame[2]), round(frame[3])
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    canvas.rectangle((left, top, right, bottom), outline=HALO, width=line + 2)
    if right - left > 2 and bottom - top > 2:
        inner = left + 1, top + 1, right - 1, bottom - 1
        canvas.rectangle(inner, outline=colour, width=line)
