"""What targets must be, and how much of a batch is padding."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Targets, check_targets, collate
from pipeline.errors import DataError

BOX = (0.5, 0.5, 0.2, 0.2)


def some_targets(*boxes: tuple[float, ...], labels: list[int] | None = None) -> Targets:
    given = [0] * len(boxes) if labels is None else labels
    return Targets(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(given, dtype=torch.int64),
        7,
        (40, 60),
        (40, 60),
    )


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (torch.rand(2, 5), torch.zeros(2).long(), r"image 7: boxes are \(2, 5\) float32, and have"),
        (torch.rand(4), torch.zeros(1).long(), r"boxes are \(4,\) float32"),
        (torch.ones(2, 4).long(), torch.zeros(2).long(), r"boxes are \(2, 4\) int64"),
        (torch.rand(2, 4), torch.zeros(3).long(), r"labels are \(3,\) int64, and have .*\(2,\)"),
        (torch.rand(2, 4), torch.zeros(2, 1).long(), r"labels are \(2, 1\) int64"),
        (torch.rand(2, 4), torch.zeros(2), r"labels are \(2,\) float32"),
        (torch.rand(2, 4), torch.zeros(2).int(), r"labels are \(2,\) int32"),
    ],
)
def test_wrong_shapes_and_types(boxes: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Targets(boxes, labels, 7, (40, 60), (40, 60))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((0.5, math.nan, 0.2, 0.2), r"box 1 is \[0\.5, nan, 0\.2, 0\.2\], and boxes have to be"),
        ((0.5, math.inf, 0.2, 0.2), r"box 1 is \[0\.5, inf"),
        ((-0.1, 0.5, 0.2, 0.2), r"box 1 is \[-0\.1, .* from 0 to 1"),
        ((0.9, 0.5, 0.8, 0.2), r"box 1 is \[0.9, 0.5, 0.8, 0.2\].*clip what leaves the image"),
        ((20.0, 30.0, 10.0, 10.0), r"box 1 is \[20, 30, 10, 10\].*convert pixels or corners"),
    ],
)
def test_boxes_that_are_none(bad: tuple[float, ...], message: str) -> None:
    targets = [some_targets(BOX), some_targets(BOX, bad, BOX)]
    check_targets(targets[:1], 3)
    with pytest.raises(DataError, match="image 7: " + message):
        check_targets(targets, 3)
    with pytest.raises(DataError, match="lvis/000007: box 1"):
        check_targets(targets, 3, ["lvis/000006", "lvis/000007"])
    with pytest.raises(DataError, match=r"2 boxes are like it"):
        check_targets([some_targets(bad, BOX, bad)], 3)


@pytest.mark.parametrize(("label", "fits"), [(-1, True), (2, True), (3, False), (-2, False)])
def test_labels_are_columns_of_the_vocabulary(label: int, fits: bool) -> None:
    targets = [some_targets(BOX, BOX, labels=[1, label])]
    if fits:
        check_targets(targets, 3)
        return
    with pytest.raises(DataError, match=f"image 7: label {label} of box 1 is .* 3 categories"):
        check_targets(targets, 3)


def test_no_boxes_and_rounding_at_the_edge_are_no_error() -> None:
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    check_targets([some_targets(), some_targets((0.5, 0.5, above, 1.0), (-1e-8, 1.0, 0.0, 0.0))], 3)
    with pytest.raises(DataError, match="box 0"):
        check_targets([some_targets((0.5, 0.5, 1.0001, 1.0))], 3)


def test_padding_is_what_the_mask_says() -> None:
    sizes = [(40, 60), (64, 31), (8, 8)]
    images = [torch.zeros((3, *size), dtype=torch.uint8) for size in sizes]
    targets = [replace(some_targets(), size=size) for size in sizes]
    batch = collate(images, targets, ["a"] * 3, ["a/1"] * 3)
    assert batch.num_pixels() == (int(batch.mask.sum()), batch.mask.numel())
    assert batch.num_pixels()[0] == 3 * 64 * 64 - sum(h * w for h, w in sizes)
