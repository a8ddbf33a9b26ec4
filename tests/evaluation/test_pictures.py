"""Drawn pictures: colours where the boxes are, names whole and apart."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.evaluation import pictures
from pipeline.evaluation.labels import readable
from pipeline.evaluation.pictures import LabelledBox, draw_boxes

GREY = (128, 128, 128)


def colour_mask(picture: Image.Image, colour: str) -> np.ndarray:
    return (np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=2)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is True."""
    y, x = np.nonzero(mask)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def test_lines_are_where_the_box_is_and_rare_is_red() -> None:
    photograph = grey(800, 600)
    boxes = [
        LabelledBox("cup", "f", 0.9, (100, 200, 300, 150)),
        LabelledBox("kite", "r", 0.5, (500, 300, 200, 250)),
    ]
    picture = draw_boxes(photograph, boxes)
    assert picture.size == (800, 600)
    for colours, expected in (
        (pictures.OTHER, (100, 200, 400, 350)),
        (pictures.RARE, (500, 300, 700, 550)),
    ):
        assert extent(colour_mask(picture, colours[0])) == pytest.approx(expected, abs=2)
    assert extent(colour_mask(picture, pictures.RARE[1]))[3] <= 301, "the name stands above"
    assert (np.asarray(photograph) == GREY).all(), "the photograph itself is not drawn on"
    inside = np.asarray(picture)[220:330, 120:380]
    assert (inside == GREY).all(), "what is in the box can be seen"


def test_a_small_photograph_is_enlarged_so_that_names_can_be_read() -> None:
    picture = draw_boxes(grey(96, 48), [LabelledBox("cup", "f", 0.9, (24, 12, 48, 24))])
    assert picture.size == (640, 320)
    lines = extent(colour_mask(picture, pictures.OTHER[0]))
    assert lines == pytest.approx((160, 80, 480, 240), abs=3)


@pytest.mark.parametrize(
    "bbox",
    [
        (0, 0, 640, 480),
        (600, 0, 40, 10),
        (630, 470, 10, 10),
        (0, 470, 5, 10),
        (639.9, 479.9, 0.1, 0.1),
        (300, 200, 0, 0),
    ],
)
def test_names_are_whole_at_every_edge(bbox: tuple[float, float, float, float]) -> None:
    name = "Christmas_tree_ornament"
    picture = draw_boxes(grey(640, 480), [LabelledBox(name, "c", 0.87, bbox)])
    plate = colour_mask(picture, pictures.OTHER[1])
    left, top, right, bottom = extent(plate)
    height = bottom - top
    assert 10 <= height <= 40 and right - left > 7 * height, "as large as anywhere else"
    assert (np.asarray(picture)[plate.argmax() // 640] != GREY).any()
    text = (np.asarray(picture)[top:bottom, left:right].min(axis=2) > 200).sum()
    reference = draw_boxes(grey(640, 480), [LabelledBox(name, "c", 0.87, (200, 200, *bbox[2:]))])
    white = (np.asarray(reference).min(axis=2) > 200).sum()
    assert text == pytest.approx(white, rel=0.02), "no letter is cut"


def test_names_stay_off_one_another_where_there_is_room() -> None:
    boxes = [LabelledBox("tennis racket", "c", 0.9 - i / 50, (200, 200, 90, 90)) for i in range(8)]
    picture = draw_boxes(grey(640, 480), boxes)
    alone = draw_boxes(grey(640, 480), boxes[:1])
    one, all_of_them = (colour_mask(p, pictures.OTHER[1]).sum() for p in (alone, picture))
    assert all_of_them > 7.5 * one


def test_the_best_name_is_on_top() -> None:
    boxes = [
        LabelledBox("cup", "r" if i == 50 else "f", 0.99 if i == 50 else 0.4, (300, 200, 20, 20))
        for i in range(100)
    ]
    picture = draw_boxes(grey(640, 480), boxes)
    best = draw_boxes(grey(640, 480), [boxes[50]])
    plate = extent(colour_mask(best, pictures.RARE[1]))
    assert picture.crop(plate).tobytes() == best.crop(plate).tobytes()


def test_text_grows_with_the_picture_and_shrinks_into_it() -> None:
    heights = []
    for scale in (1, 4):
        box = LabelledBox("cup", "f", 0.9, (100 * scale, 100 * scale, 200 * scale, 200 * scale))
        picture = draw_boxes(grey(640 * scale, 480 * scale), [box])
        left, top, right, bottom = extent(colour_mask(picture, pictures.OTHER[1]))
        heights.append(bottom - top)
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.2)
    narrow = draw_boxes(grey(64, 640), [LabelledBox("word " * 30, "f", 0.9, (0, 300, 64, 100))])
    left, top, right, bottom = extent(colour_mask(narrow, pictures.OTHER[1]))
    assert 0 <= left and right <= 64 and bottom - top >= 8


def test_every_letter_has_a_shape() -> None:
    assert readable("crêpe_(Breton)") == "crepe (Breton)"
    assert readable("jalapeño") == "jalapeno"
    assert readable("茶") == "?"
    assert draw_boxes(grey(10, 10), []).size == (640, 640)
