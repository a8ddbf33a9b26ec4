"""DINO's terms beside arithmetic by hand, in float64, and the whole criterion in its float32."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors.dino.denoising import DenoisingLayout
from pipeline.detectors.dino.losses import (
    ImageWeights,
    LayerOutputs,
    Outputs,
    compute_losses,
    detection_losses,
    image_weights,
    matched_assignment,
    pad_targets,
)
from pipeline.detectors.dino.matcher import match
from pipeline.detectors.dino.negatives import Negatives, negative_weights
from pipeline.detectors.interface import LossContext, Shares
from pipeline.recipe import Losses

EPS = 1e-6
"""In both denominators of the GIoU, as in the DETR family's code."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def positive(x: float) -> float:
    return 0.25 * (1 - sigmoid(x)) ** 2 * -math.log(sigmoid(x))


def negative(x: float) -> float:
    return 0.75 * sigmoid(x) ** 2 * -math.log(1 - sigmoid(x))


def in_double(
    section: Losses, outputs: LayerOutputs, targets: Sequence[Targets]
) -> dict[str, Tensor]:
    """The sums of the three terms in float64, of matches in float32."""
    padded = pad_targets(targets, None, outputs.logits.shape[3])
    assignment = matched_assignment(
        match(section, *outputs, padded), outputs.logits.new_ones(outputs.logits.shape).double()
    )
    negatives = negative_weights(targets, padded, None, outputs.logits.shape[3])
    weights = image_weights(targets, Shares())
    if negatives is not None:
        negatives = Negatives(*(part.double() for part in negatives))
    return detection_losses(
        section,
        LayerOutputs(outputs.logits.double(), outputs.boxes.double()),
        assignment,
        padded._replace(boxes=padded.boxes.double()),
        ImageWeights(weights.classes.double(), weights.boxes.double(), negatives),
    )


def test_two_boxes_and_three_queries() -> None:
    """The first query holds the first box, the second is far from the second, the third is idle.

    The first: sides 1/2 around a box with sides 1/4, so L1 = 1/4 + 1/4 and GIoU = IoU = 1/4. The
    second: opposite corners, so L1 = 3/4 + 3/4 and GIoU = 0 - (1 - 2/16) = -7/8. A decoder layer
    has the queries in this order, the encoder in the reverse.
    """
    logits = torch.tensor([[2.0, -1.0, 0.5], [-2.0, 1.5, 0.0], [-3.0, -4.0, -1.0]])[None, None]
    boxes = torch.tensor([[4, 4, 4, 4], [1, 1, 2, 2], [4, 4, 0.5, 0.5]])[None, None] / 8
    truth = torch.tensor([[4, 4, 2, 2], [7, 7, 2, 2]]) / 8
    first, last = LayerOutputs(logits, boxes), LayerOutputs(logits.flip(2), boxes.flip(2))
    targets = [Targets(truth, torch.tensor([0, 1]), 0, (8, 8), (8, 8))]
    # A cost of classes that leaves no doubt of who is matched to whom.
    section = Losses(cost_class=1000.0, weight_class=3.0, weight_box_l1=5.0, weight_box_giou=2.0)
    background = [-1.0, 0.5, -2.0, 0.0, -3.0, -4.0, -1.0]
    expected = {
        "class": 3 * (positive(2.0) + positive(1.5) + sum(negative(x) for x in background)),
        "box_l1": 5 * (0.5 + 1.5),
        "box_giou": 2 * ((1 - 1 / 16 / (1 / 4 + EPS)) + (1 + (1 - 1 / 8) / (1 + EPS))),
    }
    for outputs in (first, last):
        for key, value in in_double(section, outputs, targets).items():
            assert value.tolist() == [pytest.approx(expected[key], rel=1e-12)], key
    every = Outputs(first, last, None, None)
    losses, matches = compute_losses(section, every, targets, LossContext(4.0, None), 3)
    assert matches.query.tolist() == [[0, 1], [1, 2]]
    for key, value in expected.items():
        for suffix in ("", "_encoder"):
            assert float(losses[f"loss/{key}{suffix}"]) == pytest.approx(value / 4, rel=1e-6)


def test_an_image_level_image() -> None:
    """What is named or verified as absent counts for all queries, all else for the one that answers
    for the label."""
    logits = torch.tensor([[2.0, -1.0, 0.5], [-2.0, 1.5, 0.0]])[None, None]
    boxes = torch.tensor([[0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5]])[None, None]
    target = Targets(
        torch.tensor([[0.5, 0.5, 1, 1]]),
        torch.tensor([0]),
        0,
        (8, 8),
        (8, 8),
        coarse=True,
        sampled_negatives=False,
        negative_categories=(2,),
    )
    found = in_double(Losses(), LayerOutputs(logits, boxes), [target])
    expected = positive(2.0) + negative(-1.0) + negative(0.5) + negative(-2.0) + negative(0.0)
    assert found["class"].tolist() == [pytest.approx(expected, rel=1e-12)]
    assert found["box_l1"].tolist() == [0]
    assert found["box_giou"].tolist() == [pytest.approx(2 * (1 - 1 / (1 + EPS)), rel=1e-6)]


def test_denoising_queries() -> None:
    """Two groups of a positive and a negative, each query weighing a half, and one without a group.

    The first positive lies on the box, of area 1/8, the second half beside it: L1 = 1/8, and an
    overlap of 1/16 in a union of 3/16, which fills the hull.
    """
    logits = torch.tensor([[2.0, -1.0], [-2.0, 1.5], [0.5, 0.0], [-3.0, -0.5], [9.0, 9.0]])
    boxes = torch.tensor([[4, 4, 2, 4], [1, 1, 2, 2], [5, 4, 2, 4], [7, 7, 2, 2], [4, 4, 8, 8]]) / 8
    layout = DenoisingLayout(
        group=torch.tensor([[0, 0, 1, 1, -1]]),
        weight=torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0]]),
        labels=torch.zeros(1, 5, dtype=torch.int64),
        boxes=boxes[None],
        image=torch.tensor([0, 0]),
        query=torch.tensor([0, 2]),
        box=torch.tensor([0, 0]),
    )
    matching = LayerOutputs(logits[None, None, :1], boxes[None, None, :1])
    every = Outputs(matching, matching, LayerOutputs(logits[None, None], boxes[None, None]), layout)
    truth = torch.tensor([[4, 4, 2, 4]]) / 8
    target = Targets(truth, torch.tensor([1]), 0, (8, 8), (8, 8))
    losses, _ = compute_losses(Losses(), every, [target], LossContext(4.0, None), 2)
    background = [2.0, -2.0, 1.5, 0.5, -3.0, -0.5]
    expected = {
        "class": (positive(-1.0) + positive(0.0) + sum(negative(x) for x in background)) / 2,
        "box_l1": 5 * (0 + 1 / 8) / 2,
        "box_giou": 2 * (2 - 1 / 8 / (1 / 8 + EPS) - 1 / 16 / (3 / 16 + EPS)) / 2,
    }
    for key, value in expected.items():
        assert float(losses[f"loss/{key}_dn"]) == pytest.approx(value / 4, rel=1e-5), key
