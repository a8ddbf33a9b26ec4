"""Where the names of boxes stand on a picture: measured, whole inside it, and apart."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageFont

from pipeline.data.vocabulary.categories import clean_name

MIN_LONG_SIDE = 640
"""Smaller pictures are enlarged before they are drawn on, so that names can be read."""
SMALLEST_TEXT = 9

Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Size = tuple[int, int]
"""(width, height)."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Label:
    """A name and perhaps a score, `width` pixels wide at `text_size`, centred on its plate."""

    text: str
    text_size: int
    width: float
    plate: Rectangle


def canvas_size(picture: Size) -> Size:
    """The picture's own size, or that at which its long side is 640 where it is smaller."""
    scale = max(1.0, MIN_LONG_SIDE / max(picture))
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))


def frame_on(canvas: Size, bbox: Sequence[float], picture: Size) -> Rectangle:
    """An xywh box of the picture in pixels of the canvas, at least one wide and inside it."""
    x, y, width, height = bbox
    across, down = canvas[0] / picture[0], canvas[1] / picture[1]
    left = min(max(x * across, 0.0), canvas[0] - 1.0)
    top = min(max(y * down, 0.0), canvas[1] - 1.0)
    right = min(max((x + width) * across, left + 1), canvas[0])
    bottom = min(max((y + height) * down, top + 1), canvas[1])
    return left, top, right, bottom


def place_label(
    name: str,
    score: float | None,
    text_size: int,
    *,
    frame: Rectangle,
    canvas: Size,
    taken: Sequence[Rectangle],
) -> Label:
    """The label of a box where it covers least of the plates `taken`: above the box by choice.

    Text wider than the canvas is made smaller, and then the name is shortened.
    """
    ending = "" if score is None else f" {score:.2f}"
    text, size = _fitted(readable(name), ending, text_size, canvas[0])
    plate = _place(_plate_size(text, size), frame, canvas, taken)
    return Label(text, size, font(size).getlength(text), plate)


def readable(name: str) -> str:
    """A category name in the letters of Pillow's own font, which has no accents."""
    plain = unicodedata.normalize("NFKD", clean_name(name))
    kept = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return kept.encode("ascii", "replace").decode("ascii")


@lru_cache(maxsize=64)
def font(size: int) -> Font:
    """Pillow's own font, the same on every machine."""
    return ImageFont.load_default(size)


def overlap(a: Rectangle, b: Rectangle) -> float:
    """Pixels that two rectangles share."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return max(across, 0.0) * max(down, 0.0)


def _plate_size(text: str, size: int) -> tuple[int, int]:
    _, top, _, bottom = font(size).getbbox("Ag|")
    padding = max(3, round((bottom - top) / 4))
    return round(font(size).getlength(text)) + 2 * padding, round(bottom - top) + padding


def _fitted(name: str, score: str, text_size: int, width: int) -> tuple[str, int]:
    """The label at the largest size at which it fits the canvas, its name shortened if at none."""
    for size in range(text_size, SMALLEST_TEXT - 1, -1):
        if _plate_size(name + score, size)[0] <= width:
            return name + score, size
    while name and _plate_size(f"{name}...{score}", SMALLEST_TEXT)[0] > width:
        name = name[:-1]
    return f"{name}...{score}", SMALLEST_TEXT


def _place(
    plate: tuple[int, int], frame: Rectangle, canvas: Size, taken: Sequence[Rectangle]
) -> Rectangle:
    width, height = plate
    left, top, right, bottom = frame
    rows = [top - height, bottom, top, bottom - height]
    rows += [top - 2 * height, bottom + height, top - 3 * height, bottom + 2 * height]
    columns = [left, right - width, (left + right - width) / 2]
    corners = [(x, y) for y in [*rows, (top + bottom - height) / 2] for x in columns]
    places: list[Rectangle] = []
    for x, y in corners:
        x = max(0.0, min(x, canvas[0] - width))
        y = max(0.0, min(y, canvas[1] - height))
        places.append((round(x), round(y), round(x) + width, round(y) + height))
    return min(places, key=lambda place: sum(overlap(place, other) for other in taken))
