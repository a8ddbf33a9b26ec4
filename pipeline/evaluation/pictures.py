"""Photographs with labelled boxes, for people to look at."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.vocabulary import Frequency, clean_name

RARE, OTHER = ("#ff3b30", "#c9211a"), ("#48b4ff", "#1568ad")
"""Lines and plates: red for rare categories, as in the report, and blue for all others."""
PAPER, HALO = "#ffffff", "#101418"
MIN_LONG_SIDE = 640
"""Smaller photographs are enlarged before they are drawn on, so that names can be read."""
SMALLEST_TEXT = 9

Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Size = tuple[int, int]
"""(width, height)."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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


@dataclass(frozen=True, slots=True)
class _Label:
    text: str
    font: Font
    plate: Rectangle


def draw_boxes(photograph: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """A new RGB picture with all boxes and their names, the best detection on top.

    Each name stands on a plate of its own colour, whole inside the picture, and off the names of
    better detections where there is room. Text grows with the picture, and is smaller at boxes
    that are small.
    """
    scale = max(1.0, MIN_LONG_SIDE / max(photograph.size))
    size = max(1, round(photograph.width * scale)), max(1, round(photograph.height * scale))
    picture = photograph.convert("RGB")
    picture = picture.resize(size, Image.Resampling.BICUBIC) if scale > 1 else picture.copy()
    canvas = ImageDraw.Draw(picture)
    unit = (size[0] * size[1]) ** 0.5 / 100
    line = max(2, round(unit / 1.9))
    best_first = sorted(boxes, key=lambda box: -box.score)
    frames = [_frame(box, photograph.size, size) for box in best_first]
    labels: list[_Label] = []
    for box, frame in zip(best_first, frames, strict=True):
        side = ((frame[2] - frame[0]) * (frame[3] - frame[1])) ** 0.5
        text_size = round(min(max(0.15 * side, 1.8 * unit), 2.5 * unit))
        text, font = _fitted(readable(box.name), f" {box.score:.2f}", max(11, text_size), size[0])
        plate = _place(_plate_size(text, font), frame, size, [label.plate for label in labels])
        labels.append(_Label(text, font, plate))
    drawn = list(zip(best_first, frames, labels, strict=True))[::-1]
    for box, frame, _ in drawn:
        _draw_frame(canvas, frame, box.colours[0], line)
    for box, _, label in drawn:
        left, top, right, bottom = label.plate
        canvas.rectangle((left, top, right - 1, bottom - 1), fill=box.colours[1], outline=HALO)
        middle = (left + right) / 2, (top + bottom) / 2
        canvas.text(middle, label.text, fill=PAPER, font=label.font, anchor="mm")
    return picture


def readable(name: str) -> str:
    """A category name in the letters of Pillow's own font, which has no accents."""
    plain = unicodedata.normalize("NFKD", clean_name(name))
    kept = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return kept.encode("ascii", "replace").decode("ascii")


def _frame(box: LabelledBox, photograph: Size, picture: Size) -> Rectangle:
    """The box in pixels of the picture, at least one pixel wide and inside it."""
    x, y, width, height = box.bbox
    across, down = picture[0] / photograph[0], picture[1] / photograph[1]
    left = min(max(x * across, 0.0), picture[0] - 1.0)
    top = min(max(y * down, 0.0), picture[1] - 1.0)
    right = min(max((x + width) * across, left + 1), picture[0])
    bottom = min(max((y + height) * down, top + 1), picture[1])
    return left, top, right, bottom


def _draw_frame(canvas: ImageDraw.ImageDraw, frame: Rectangle, colour: str, line: int) -> None:
    """A coloured line with a thin dark edge on both sides, which shows on any background."""
    left, top, right, bottom = round(frame[0]), round(frame[1]), round(frame[2]), round(frame[3])
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    canvas.rectangle((left, top, right, bottom), outline=HALO, width=line + 2)
    if right - left > 2 and bottom - top > 2:
        inner = left + 1, top + 1, right - 1, bottom - 1
        canvas.rectangle(inner, outline=colour, width=line)


@lru_cache(maxsize=64)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _plate_size(text: str, font: Font) -> tuple[int, int]:
    _, top, _, bottom = font.getbbox("Ag|")
    padding = max(3, round((bottom - top) / 4))
    return round(font.getlength(text)) + 2 * padding, round(bottom - top) + padding


def _fitted(name: str, score: str, text_size: int, width: int) -> tuple[str, Font]:
    """The label in the largest font in which it fits the picture, its name shortened if none."""
    for size in range(text_size, SMALLEST_TEXT - 1, -1):
        if _plate_size(name + score, _font(size))[0] <= width:
            return name + score, _font(size)
    font = _font(SMALLEST_TEXT)
    while name and _plate_size(f"{name}...{score}", font)[0] > width:
        name = name[:-1]
    return f"{name}...{score}", font


def _place(
    plate: tuple[int, int], frame: Rectangle, picture: Size, taken: Sequence[Rectangle]
) -> Rectangle:
    """Where the plate covers least of the plates before it: above the box by choice."""
    width, height = plate
    left, top, right, bottom = frame
    rows = [top - height, bottom, top, bottom - height]
    rows += [top - 2 * height, bottom + height, top - 3 * height, bottom + 2 * height]
    columns = [left, right - width, (left + right - width) / 2]
    corners = [(x, y) for y in [*rows, (top + bottom - height) / 2] for x in columns]
    places: list[Rectangle] = []
    for x, y in corners:
        x = max(0.0, min(x, picture[0] - width))
        y = max(0.0, min(y, picture[1] - height))
        places.append((round(x), round(y), round(x) + width, round(y) + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: Rectangle, b: Rectangle) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return max(across, 0.0) * max(down, 0.0)
