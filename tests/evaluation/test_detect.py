"""From raw predictions to detections, with a detector that says what the test tells it to."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Targets, collate
from pipeline.data.vocabulary.categories import Category, Vocabulary
from pipeline.detectors.interface import Predictions
from pipeline.errors import DataError
from pipeline.evaluation.detect import detect, select_top

VOCABULARY = Vocabulary([Category(id=7, name="cup"), Category(id=40, name="kite")])


class FixedDetector(nn.Module):
    """Gives the same boxes for every image, and remembers the pixels that it saw."""

    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.25, 0.25, 0.25)
    feature_dim = 4

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        super().__init__()
        self.logits, self.boxes = logits, boxes
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, images: Tensor, mask: Tensor) -> Predictions:
        self.seen.append(images)
        self.modes.append(self.training)
        size = len(images)
        return Predictions(self.logits.expand(size, -1, -1), self.boxes.expand(size, -1, -1))


def batch(*image_ids: int) -> Batch:
    targets = [
        Targets(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            image_id=image_id,
            size=(20, 30),
            original_size=(200, 300),
        )
        for image_id in image_ids
    ]
    images = [torch.full((3, 20, 30), 255, dtype=torch.uint8) for _ in targets]
    return collate(images, targets, ["s"] * len(targets), [str(i) for i in image_ids])


def fixed_detector() -> FixedDetector:
    logits = torch.tensor([[2.0, -1.0], [-3.0, 3.0], [0.0, -9.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.0, 0.0, 0.2, 0.2], [0.9, 0.9, 0.4, 0.4]])
    return FixedDetector(logits, boxes)


def test_queries_and_categories_compete_for_the_places() -> None:
    detector = fixed_detector()
    done: list[int] = []
    found = detect(detector, [batch(11, 5), batch(9)], "cpu", 4, VOCABULARY, progress=done.append)
    assert done == [2, 1]
    assert found.image_id.tolist() == [11] * 4 + [5] * 4 + [9] * 4
    assert found.images is not None and found.images.tolist() == [11, 5, 9]
    assert found.category_id[:4].tolist() == [40, 7, 7, 40]  # columns to ids of the data set
    expected = torch.sigmoid(torch.tensor([3.0, 2.0, 0.0, -1.0])).tolist()
    assert found.score[:4].tolist() == pytest.approx(expected)
    # cxcywh of the image -> xywh in pixels of the photograph (300 wide, 200 high), cut at borders
    assert found.bbox[0].tolist() == pytest.approx([0, 0, 30, 20])
    assert found.bbox[1].tolist() == pytest.approx([120, 60, 60, 80])
    assert found.bbox[2].tolist() == pytest.approx([210, 140, 90, 60])


def test_pixels_are_normalised_and_the_mode_is_put_back() -> None:
    detector = fixed_detector().train()
    detect(detector, [batch(1)], "cpu", 2, VOCABULARY)
    pixels = detector.seen[0]
    assert pixels.shape == (1, 3, 32, 32) and pixels[0, 0, 0, 0] == pytest.approx(2.0)
    assert pixels[0, :, 20:].abs().max() == 0  # padding
    assert detector.modes == [False] and detector.training


def test_fewer_candidates_than_places_and_no_image_at_all() -> None:
    assert len(detect(fixed_detector(), [batch(1)], "cpu", 300, VOCABULARY)) == 6
    nothing = detect(fixed_detector(), [], "cpu", 300, VOCABULARY)
    assert len(nothing) == 0 and nothing.images is not None and len(nothing.images) == 0


def test_a_box_outside_the_photograph_keeps_no_area() -> None:
    predictions = Predictions(torch.zeros(1, 1, 1), torch.tensor([[[1.5, 0.5, 0.2, 0.2]]]))
    (_, _, bbox), *_ = select_top(predictions, [(100, 100)], 300)
    assert bbox[0, 2] == 0 and bbox[0, 0] <= 100


def test_an_image_that_comes_twice_is_refused() -> None:
    with pytest.raises(DataError, match=r"\[3\] came twice"):
        detect(fixed_detector(), [batch(3), batch(3)], "cpu", 4, VOCABULARY)


def test_a_diverged_detector_is_named() -> None:
    detector = FixedDetector(torch.full((1, 2), float("nan")), torch.full((1, 4), 0.5))
    with pytest.raises(DataError, match="nan\\) has a score outside"):
        detect(detector, [batch(3)], "cpu", 4, VOCABULARY)
