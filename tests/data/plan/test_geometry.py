"""Large-scale jitter: boxes where their pixels are, scales as published, sizes bounded."""

from random import Random

import numpy as np
import pytest
import torch
from drawn_pictures import drawn, extent, generator
from pydantic import ValidationError

from pipeline.data.plan.geometry import canvas_divisor, largest_canvas, smallest_canvas, train_view
from pipeline.data.transforms import train_transform
from pipeline.recipe import Transforms

JITTER = Transforms(large_scale_jitter=True, jitter_size=128)


def test_rectangle_lies_in_its_box_after_jitter() -> None:
    boxes = [(10, 20, 60, 90), (70, 5, 130, 50), (80, 60, 140, 100)]
    whole, cut, vanished = 0, 0, 0
    for seed in range(150):
        picture = train_transform(drawn((110, 150), boxes, [0, 1, 2]), JITTER, generator(seed))
        assert max(picture.size) <= 128 and picture.image.dtype == torch.uint8
        assert len(picture.labels) + picture.vanished == 3
        vanished += picture.vanished
        height, width = picture.size
        for box, label in zip(picture.boxes.tolist(), picture.labels.tolist(), strict=True):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
            assert min(box[2] - box[0], box[3] - box[1]) >= 1
            found = extent(picture, label)
            if min(box[2] - box[0], box[3] - box[1]) < 6:
                continue
            assert found == pytest.approx(box, abs=1.6)
            edge = min(box[0], box[1], width - box[2], height - box[3]) == 0
            cut += edge
            whole += not edge
    assert whole > 100 and cut > 30 and vanished > 0


def test_jitter_draws_scales_evenly_and_parts_anywhere() -> None:
    longest, corners = [], []
    for seed in range(2000):
        view = train_view((300, 400), JITTER, generator(seed))
        share = max(view.part.width / 400, 1 / 400)
        longest.append(view.size[1] / share / 128)
        if view.part.width < 300:
            corners.append(view.part.left / (400 - view.part.width))
    scales = np.array(longest)
    np.testing.assert_allclose(
        np.quantile(scales, [0, 0.25, 0.5, 0.75, 1]), [0.1, 0.575, 1.05, 1.525, 2.0], atol=0.06
    )
    np.testing.assert_allclose(
        np.quantile(corners, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.06
    )
    small = [
        view
        for view in (train_view((300, 400), JITTER, generator(s)) for s in range(99))
        if view.size[1] < 128
    ]
    assert small and all(view.part == (0, 0, 300, 400) for view in small)
    assert all(abs(view.size[0] / view.size[1] - 0.75) < 0.04 for view in small)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 2500), (5000, 5000)])
def test_jitter_of_extreme_shapes_is_bounded(size: tuple[int, int]) -> None:
    for seed in range(40):
        view = train_view(size, JITTER, generator(seed))
        assert 1 <= min(view.size) and max(view.size) <= 128
        assert 0 <= view.part.top < view.part.top + view.part.height <= size[0]
        assert 0 <= view.part.left < view.part.left + view.part.width <= size[1]


@pytest.mark.parametrize("size", [(500, 2500), (2400, 600), (480, 640), (300, 300)])
def test_crops_are_drawn_as_dino_draws_them(size: tuple[int, int]) -> None:
    # Resize to a short side, no longest side, then a crop of each side by itself (DETR).
    random = Random(0)
    expected = []
    for _ in range(3000):
        scale = random.choice([400, 500, 600]) / min(size)
        sides = [int(side * scale) for side in size]
        crop = [random.randint(min(384, side), min(600, side)) for side in sides]
        place = [random.randint(0, side - length) for side, length in zip(sides, crop, strict=True)]
        expected.append([number / scale for number in (*place, *crop)])
    always = Transforms(crop_probability=1.0)
    parts = [train_view(size, always, generator(seed)).part for seed in range(3000)]
    for axis in range(2):
        for found, wanted in (
            (np.array(parts)[:, axis], np.array(expected)[:, axis]),
            (np.array(parts)[:, 2 + axis], np.array(expected)[:, 2 + axis]),
        ):
            shares = np.linspace(0.05, 0.95, 10)
            np.testing.assert_allclose(
                np.quantile(found, shares), np.quantile(wanted, shares), atol=0.03 * size[axis]
            )


def test_one_short_side_for_a_step_and_crops_of_ones_own() -> None:
    transforms = Transforms()
    sides, parts = set(), set()
    for seed in range(40):
        view = train_view((480, 640), transforms, generator(seed), shape_seed=11)
        own = train_view((480, 640), transforms, generator(seed))
        assert (view.flip, view.part) == (own.flip, own.part)
        sides.add(min(view.size))
        parts.add(view.part)
    assert len(sides) == 1 and len(parts) > 10
    drawn_sides = {
        min(train_view((480, 640), transforms, generator(0), shape_seed=s).size) for s in range(150)
    }
    assert drawn_sides == set(transforms.short_sides)


def test_canvases_of_a_recipe() -> None:
    plain, coarse = Transforms(), Transforms(canvas_multiple=128)
    jitter = Transforms(large_scale_jitter=True, jitter_size=1000)
    assert (canvas_divisor(plain), smallest_canvas(plain)) == (32, 0)
    assert (canvas_divisor(coarse), smallest_canvas(coarse)) == (128, 0)
    assert (canvas_divisor(jitter), smallest_canvas(jitter)) == (32, 1000)
    assert largest_canvas(coarse, 1, mosaics=False) == (896, 1408)
    assert largest_canvas(jitter, 4, mosaics=False) == (1024, 1024)
    assert largest_canvas(jitter, 4, mosaics=True) == (1280, 1280)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"canvas_multiple": 48}, "canvas_multiple 48 is no multiple of size_divisor 32"),
        ({"jitter_scales": (2.0, 0.1)}, "jitter_scales .* 2.0 is over 0.1"),
        ({"copy_paste_scales": (3, 2)}, "copy_paste_scales .* 3.0 is over 2.0"),
        ({"jitter_scales": (0, 1)}, "greater than 0"),
        ({"copy_paste_probability": 1.5}, "less than or equal to 1"),
    ],
)
def test_transforms_that_cannot_be_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Transforms.model_validate(given)
