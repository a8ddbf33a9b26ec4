"""Boxes are where their pixels are, whatever the augmentation drew."""

import numpy as np
import pytest
import torch
from drawn_pictures import SMALL, drawn, extent, generator

from pipeline.data.plan.geometry import fit_inside, fit_short_side, largest_canvas
from pipeline.data.transforms import (
    PAD_VALUE,
    evaluation_transform,
    mosaic_transform,
    train_transform,
)
from pipeline.recipe import Transforms


def test_rectangle_lies_in_its_box_after_flips_and_crops() -> None:
    boxes = [(10, 20, 60, 90), (70, 5, 130, 50), (80, 60, 140, 100)]
    seen, dropped = 0, 0
    for seed in range(120):
        picture = train_transform(drawn((110, 150), boxes, [0, 1, 2]), SMALL, generator(seed))
        assert picture.image.dtype == torch.uint8
        assert max(picture.size) <= 300 and min(picture.size) in (90, 100, 140)
        for label in range(3):
            kept = torch.nonzero(picture.labels == label)
            found = extent(picture, label)
            if not len(kept):
                dropped += 1
                assert found is None or min(found[2] - found[0], found[3] - found[1]) <= 2
                continue
            seen += 1
            box = picture.boxes[kept[0, 0]].tolist()
            # A crop magnifies up to 2.4 times, and with it the blur at the edge.
            assert found is None or np.abs(np.subtract(found, box)).max() <= 2.5
        assert picture.vanished == 3 - len(picture.labels)
    assert seen > 250 and dropped > 3


def test_flip_moves_the_box_to_the_other_side() -> None:
    always = SMALL.model_copy(
        update={"flip_probability": 1.0, "crop_probability": 0.0, "extra_crop_probability": 0.0}
    )
    picture = train_transform(drawn((100, 200), [(0, 10, 50, 30)], [1]), always, generator(0))
    scale = picture.size[0] / 100
    expected = torch.tensor([[150.0, 10, 200, 30]]) * scale
    torch.testing.assert_close(picture.boxes.as_subclass(torch.Tensor), expected)
    found = extent(picture, 1)
    assert found is not None and found[2] == picture.size[1]


def test_mosaic_boxes_are_the_visible_parts() -> None:
    parts = [
        drawn(size, [(0, 0, size[1], size[0])], [label])
        for label, size in enumerate([(60, 100), (200, 50), (40, 40), (120, 121)])
    ]
    for seed in range(60):
        picture = mosaic_transform(parts, SMALL, generator(seed))
        assert picture.size == (160, 160) and picture.image.dtype == torch.uint8
        for label in range(4):
            kept = torch.nonzero(picture.labels == label)
            found = extent(picture, label)
            if len(kept):
                assert found == pytest.approx(picture.boxes[kept[0, 0]].tolist())
        covered = torch.zeros(160, 160, dtype=torch.bool)
        for left, top, right, bottom in picture.boxes.int().tolist():
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
        if picture.vanished == 0:
            assert torch.all(picture.image[:, ~covered] == PAD_VALUE)


def test_mosaic_stands_around_a_centre_drawn_from_the_middle_half() -> None:
    parts = [drawn((80, 80), [(0, 0, 80, 80)], [label]) for label in range(4)]
    whole = SMALL.model_copy(update={"crop_probability": 0.0, "extra_crop_probability": 0.0})
    centres = []
    for seed in range(200):
        boxes = mosaic_transform(parts, whole, generator(seed)).boxes
        centre = boxes[0, 2:].tolist()
        assert boxes[3, :2].tolist() == centre
        assert boxes[1, [0, 3]].tolist() == centre and boxes[2, [2, 1]].tolist() == centre
        centres.append(centre)
    spread = np.array(centres)
    assert spread.min() >= 40 and spread.max() < 120
    np.testing.assert_allclose(spread.mean(axis=0), 80, atol=6)


def test_mosaic_drops_slivers_with_their_labels() -> None:
    # 1.6 pixels wide on the canvas: 2 of 100, scaled to a cell of 80.
    part = drawn((100, 100), [(0, 0, 2, 100), (10, 0, 100, 100)], [0, 1])
    whole = SMALL.model_copy(update={"crop_probability": 0.0, "extra_crop_probability": 0.0})
    picture = mosaic_transform([part] * 4, whole, generator(1))
    assert picture.labels.tolist() == [1] * 4 and picture.vanished == 4
    assert len(picture.boxes) == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 2500), (2500, 3)])
def test_extreme_shapes_are_bounded_in_every_branch(size: tuple[int, int]) -> None:
    cropping = SMALL.model_copy(update={"crop_probability": 1.0, "extra_crop_probability": 1.0})
    whole = drawn(size, [(0, 0, size[1], size[0])], [0])
    for transforms in (SMALL, cropping):
        for seed in range(5):
            picture = train_transform(whole, transforms, generator(seed))
            assert 1 <= min(picture.size) and max(picture.size) <= 300
            assert mosaic_transform([whole] * 4, transforms, generator(seed)).size == (160, 160)
    assert max(evaluation_transform(whole, Transforms()).size) <= 1333


def test_crop_of_an_image_smaller_than_the_crop_keeps_all_of_it() -> None:
    large = Transforms(
        crop_probability=1.0,
        extra_crop_probability=1.0,
        crop_short_sides=[100],
        crop_sizes=(384, 600),
    )
    picture = train_transform(drawn((50, 50), [(0, 0, 50, 50)], [0]), large, generator(0))
    assert picture.normalised_boxes().tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_image_without_boxes() -> None:
    empty = drawn((50, 60), [], [])
    for picture in (
        train_transform(empty, SMALL, generator(0)),
        mosaic_transform([empty] * 4, SMALL, generator(0)),
        evaluation_transform(empty, SMALL),
    ):
        assert picture.boxes.shape == (0, 4) and picture.labels.shape == (0,)
        assert picture.normalised_boxes().shape == (0, 4)


def test_sizes_follow_the_rule() -> None:
    assert fit_short_side((480, 640), 800, 1333) == (800, 1067)
    assert fit_short_side((400, 1000), 800, 1333) == (533, 1333)
    assert fit_short_side((640, 480), 480, 1333) == (640, 480)
    assert fit_inside((50, 200), 80) == (20, 80)


def test_evaluation_only_resizes() -> None:
    transforms = Transforms(evaluation_short_side=96, evaluation_max_side=400)
    picture = evaluation_transform(drawn((48, 64), [(8, 12, 40, 36)], [2]), transforms)
    assert picture.size == (96, 128)
    assert picture.boxes.tolist() == [[16, 24, 80, 72]]
    torch.testing.assert_close(
        picture.normalised_boxes(), torch.tensor([[24 / 64, 24 / 48, 32 / 64, 24 / 48]])
    )


def test_only_the_given_generator_decides() -> None:
    source = drawn((110, 150), [(10, 20, 60, 90)], [0])
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        results.append(
            [train_transform(source, SMALL, generator(5)).image for _ in range(2)]
            + [mosaic_transform([source] * 4, SMALL, generator(5)).image]
        )
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    sizes = {train_transform(source, SMALL, generator(seed)).size for seed in range(60)}
    assert {min(size) for size in sizes} == {90, 100, 140}


def test_crops_are_of_the_sizes_asked_for() -> None:
    one = Transforms(
        short_sides=[100],
        crop_probability=1.0,
        extra_crop_probability=1.0,
        crop_short_sides=[100],
        crop_sizes=(50, 80),
    )
    # The box spans the image, so after the crop it spans the crop: none is lost, none is smaller.
    shapes = set()
    for seed in range(100):
        picture = train_transform(drawn((100, 150), [(0, 0, 150, 100)], [0]), one, generator(seed))
        assert picture.normalised_boxes().tolist() == [[0.5, 0.5, 1.0, 1.0]]
        height, width = picture.size
        assert 100 <= max(height, width) <= 160
        shapes.add((height, width))
    assert len(shapes) > 30


@pytest.mark.parametrize("num_images", [1, 2])
def test_no_batch_is_larger_than_the_largest_canvas(num_images: int) -> None:
    transforms = SMALL.model_copy(update={"size_divisor": 32})
    height, width = largest_canvas(transforms, num_images, mosaics=False)
    assert (height, width) == ((160, 320) if num_images == 1 else (320, 320))
    rng = np.random.default_rng(0)
    most = 0
    drawn_sizes = rng.integers(10, 2000, size=(300, 2)).tolist()
    for size in [*drawn_sizes, [100, 5000], [5000, 100]]:
        fitted = fit_short_side((size[0], size[1]), max(SMALL.short_sides), SMALL.max_side)
        most = max(most, *fitted)
        assert min(fitted) <= height and max(fitted) <= width
    assert most == SMALL.max_side <= width
    assert largest_canvas(SMALL.model_copy(update={"mosaic_cell": 200}), 1, mosaics=True) == (
        416,
        416,
    )
