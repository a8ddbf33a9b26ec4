"""Scenes of the miniature world: patterned, coloured shapes on textured ground."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PATTERNS = ("solid", "striped", "dotted", "checkered")
COLOURS = {
    "red": (212, 38, 42),
    "orange": (242, 132, 28),
    "yellow": (240, 214, 48),
    "green": (62, 168, 62),
    "teal": (22, 164, 168),
    "blue": (44, 82, 214),
    "purple": (124, 56, 182),
    "pink": (242, 128, 186),
}
GROUNDS = {
    "grass": ((96, 122, 74), (62, 92, 56)),
    "sand": ((206, 188, 152), (176, 156, 120)),
    "water": ((104, 134, 156), (70, 100, 128)),
    "snow": ((218, 221, 227), (186, 193, 204)),
    "asphalt": ((112, 112, 114), (78, 78, 82)),
    "wood": ((150, 114, 82), (114, 82, 58)),
}
MAX_HIDDEN = 0.4
"""Largest share of an object that later objects may cover."""
_SUPERSAMPLING = 3
_PLACEMENTS = 200
_MAX_TURN = math.radians(25)

Floats = NDArray[np.float32]


class Composition(NamedTuple):
    """What an object is: the whole of its category name."""

    pattern: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """The name in words, such as "striped teal ring"."""
        return " ".join(self)


class Placed(NamedTuple):
    """An object as drawn: `box` xyxy is tight around its visible pixels, which `area` counts."""

    box: tuple[int, int, int, int]
    area: int


class Canvas(NamedTuple):
    """Size in pixels, kind of ground, and the range of object sizes as pixels of their diameter."""

    width: int
    height: int
    ground: str
    sizes: tuple[float, float]


def draw_scene(
    rng: np.random.Generator, canvas: Canvas, objects: Sequence[Composition]
) -> tuple[Image.Image, list[Placed]]:
    """Draw `objects` in order, later ones in front, none hidden by more than `MAX_HIDDEN`."""
    pixels = _ground(rng, canvas)
    owner = np.full((canvas.height, canvas.width), -1, np.int16)
    full_areas: list[int] = []
    for position, composition in enumerate(objects):
        patch, alpha, left, top = _place(rng, canvas, composition, owner, full_areas)
        rows, columns = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
        cover = alpha[..., None]
        pixels[rows, columns] = pixels[rows, columns] * (1 - cover) + patch * cover
        inside = alpha > 0.5
        owner[rows, columns][inside] = position
        full_areas.append(int(inside.sum()))
    pixels *= np.float32(rng.uniform(0.85, 1.1))
    noise = rng.standard_normal((canvas.height, canvas.width, 1), dtype=np.float32)
    pixels += noise * np.float32(rng.uniform(2, 8))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image, [_visible(owner, position) for position in range(len(objects))]


def _place(
    rng: np.random.Generator,
    canvas: Canvas,
    composition: Composition,
    owner: NDArray[np.int16],
    full_areas: Sequence[int],
) -> tuple[Floats, Floats, int, int]:
    """A patch with its opacity, and a place where it hides no earlier object too much."""
    diameter = float(rng.uniform(*canvas.sizes))
    visible = np.bincount(owner.ravel() + 1, minlength=len(full_areas) + 1)[1:]
    spare = visible - (1 - MAX_HIDDEN) * np.array(full_areas)
    for attempt in range(_PLACEMENTS):
        if attempt % 8 == 0:
            size = min(diameter * 0.85 ** (attempt // 8), 0.95 * min(canvas.width, canvas.height))
            alpha, u, v = _silhouette(rng, composition.shape, max(size, 6.0))
        height, width = alpha.shape
        left = int(rng.integers(0, canvas.width - width + 1))
        top = int(rng.integers(0, canvas.height - height + 1))
        covered = owner[top : top + height, left : left + width][alpha > 0.5]
        hidden = np.bincount(covered + 1, minlength=len(full_areas) + 1)[1:]
        if np.all(hidden <= spare):
            return _paint(rng, composition, u, v), alpha, left, top
    raise AssertionError(f"no room for {composition.name} on {canvas}")


def _visible(owner: NDArray[np.int16], position: int) -> Placed:
    mine = owner == position
    rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Placed(box, int(mine.sum()))


def _silhouette(
    rng: np.random.Generator, shape: str, diameter: float
) -> tuple[Floats, Floats, Floats]:
    """Opacity of a shape turned and squeezed at random, and each pixel's place on the shape.

    All three are (H, W) with about `diameter` pixels on the longer side; places are in units of
    the shape's radius, in the shape's own turned frame.
    """
    angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
    squeeze = rng.uniform(0.8, 1.0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    to_pixels = turn @ np.diag([1.0, squeeze]) * diameter / 2
    outer, hole = _OUTLINES[shape]()
    corners = outer @ to_pixels.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    width, height = (max(int(side), 3) for side in np.ceil(high - low))
    middle = (low + high) / 2
    offset = np.array([width, height]) / 2 - middle
    mask = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(mask)
    for polygon, value in ((outer, 255), (hole, 0)):
        if polygon is not None:
            points = (polygon @ to_pixels.T + offset) * _SUPERSAMPLING
            pen.polygon([tuple(point) for point in points.tolist()], fill=value)
    small = mask.reduce(_SUPERSAMPLING)
    x, y = np.meshgrid(np.arange(width) + 0.5 - offset[0], np.arange(height) + 0.5 - offset[1])
    inverse = np.linalg.inv(to_pixels)
    u = inverse[0, 0] * x + inverse[0, 1] * y
    v = inverse[1, 0] * x + inverse[1, 1] * y
    alpha = np.asarray(small, np.float32) / np.float32(255)
    return alpha, u.astype(np.float32), v.astype(np.float32)


def _paint(rng: np.random.Generator, composition: Composition, u: Floats, v: Floats) -> Floats:
    """(H, W, 3) colours of the pattern under a light that falls from a random side."""
    own = np.array(COLOURS[composition.colour], np.float32) + rng.normal(0, 7, 3)
    neutral = (238, 234, 224) if rng.random() < 0.6 else (38, 36, 42)
    mark = np.array(neutral, np.float32) + rng.normal(0, 5, 3)
    share = _pattern(rng, composition.pattern, u, v)[..., None]
    light = rng.uniform(0, 2 * math.pi)
    shade = 1 + 0.14 * (u * math.cos(light) + v * math.sin(light)) + rng.uniform(-0.1, 0.06)
    grain = rng.normal(0, rng.uniform(1, 6), u.shape)
    painted = (own * (1 - share) + mark * share) * shade[..., None] + grain[..., None]
    return painted.astype(np.float32)


def _pattern(rng: np.random.Generator, pattern: str, u: Floats, v: Floats) -> Floats:
    """How much of the second tone each pixel shows, 0 to 1, with soft edges."""
    if pattern == "solid":
        return np.zeros_like(u)
    marks = rng.uniform(2.2, 3.4)
    a = u * marks + rng.random()
    b = v * marks + rng.random()
    if pattern == "striped":
        wave = np.sin(2 * math.pi * a)
    elif pattern == "checkered":
        wave = np.sin(math.pi * a) * np.sin(math.pi * b) * 2
    else:
        b = b + 0.5 * (np.floor(a) % 2)
        wave = (0.34 - np.hypot(a % 1 - 0.5, b % 1 - 0.5)) * 6
    return np.clip(0.5 + 2 * wave, 0, 1).astype(np.float32)


def _ground(rng: np.random.Generator, canvas: Canvas) -> Floats:
    """(H, W, 3) textured ground: a gradient, blotches or streaks, and some scribbles."""
    width, height = canvas.width, canvas.height
    light, dark = (np.array(tone, np.float32) for tone in GROUNDS[canvas.ground])
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * math.cos(angle)
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32) * math.sin(angle)
    blend = x[None, :] + y[:, None]
    # Water and wood are streaked along one side, the other grounds are blotched.
    blotches = (3, 14) if canvas.ground in ("water", "wood") else (8, 8)
    blotches = blotches if rng.random() < 0.5 else blotches[::-1]
    coarse = Image.fromarray(rng.normal(0, 0.28, blotches).astype(np.float32))
    blend = blend + np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels = dark + (light - dark) * np.clip(0.5 + blend, 0, 1)[..., None]
    pixels = pixels + rng.normal(0, 6, 3).astype(np.float32)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _scribble(rng, picture)
    return np.array(picture, np.float32)


def _scribble(rng: np.random.Generator, picture: Image.Image) -> None:
    """Thin lines and arcs that are no object: the distractors of this world."""
    pen = ImageDraw.Draw(picture)
    width, height = picture.size
    for _ in range(int(rng.integers(0, 5))):
        x0, x1 = sorted(rng.uniform(-0.1, 1.1, 2) * width)
        y0, y1 = sorted(rng.uniform(-0.1, 1.1, 2) * height)
        tone = tuple(int(value) for value in rng.integers(30, 230, 3))
        thickness = int(rng.integers(1, 4))
        if rng.random() < 0.5:
            pen.line((x0, y1, x1, y0), fill=tone, width=thickness)
        else:
            start = float(rng.uniform(0, 360))
            end = start + float(rng.uniform(40, 160))
            pen.arc((x0, y0, x1 + 2, y1 + 2), start, end, fill=tone, width=thickness)


def _circle(radius: float) -> NDArray[np.float64]:
    turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def _spokes(radii: Sequence[float], first: float = -math.pi / 2) -> NDArray[np.float64]:
    turns = first + np.linspace(0, 2 * math.pi, len(radii), endpoint=False)
    return np.array(radii)[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def _cross() -> NDArray[np.float64]:
    arm, reach = 0.32, 0.94
    quarter = np.array([[reach, -arm], [reach, arm], [arm, arm]])
    turns = [np.array([[0, -1], [1, 0]]), np.eye(2)]
    corners, turn = [], turns[1]
    for _ in range(4):
        corners.append(quarter @ turn.T)
        turn = turns[0] @ turn
    return np.concatenate(corners)


_Outline = Callable[[], tuple[NDArray[np.float64], NDArray[np.float64] | None]]
_OUTLINES: dict[str, _Outline] = {
    "disc": lambda: (_circle(1.0), None),
    "ring": lambda: (_circle(1.0), _circle(0.5)),
    "square": lambda: (_spokes([1.0] * 4, math.pi / 4), None),
    "triangle": lambda: (_spokes([1.0] * 3), None),
    "star": lambda: (_spokes([1.0, 0.42] * 5), None),
    "cross": lambda: (_cross(), None),
}
SHAPES = tuple(_OUTLINES)
COMPOSITIONS = tuple(Composition(p, c, s) for p in PATTERNS for c in COLOURS for s in SHAPES)
