import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torchvision.ops import generalized_box_iou

from pipeline.data.batch import Targets
from pipeline.detectors.boxes import cxcywh_to_xyxy
from pipeline.detectors.dino.losses import (
    LayerOutputs,
    Outputs,
    box_costs,
    compute_losses,
    pad_targets,
)
from pipeline.detectors.dino.matcher import assign, match, matching_costs
from pipeline.detectors.interface import LossContext
from pipeline.recipe import Losses

MakeTargets = Callable[..., list[Targets]]


def test_assignment_is_the_cheapest_of_all() -> None:
    random = np.random.default_rng(0)
    costs = random.normal(size=(3, 5, 3)).astype(np.float32)
    image, query, box = assign(costs, image=2)
    assert (image == 2).all()
    for layer in range(3):
        best = min(
            sum(costs[layer, q, b] for b, q in enumerate(order))
            for order in itertools.permutations(range(5), 3)
        )
        assert math.isclose(costs[layer, query[layer], box[layer]].sum(), best, rel_tol=1e-5)


def predictions(queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, queries, 12, generator=generator)
    return logits, torch.rand(2, 3, queries, 4, generator=generator) * 0.4 + 0.3


def test_matches_are_one_to_one_and_know_the_right_query(make_targets: MakeTargets) -> None:
    targets = make_targets([2, 0, 4])
    logits, boxes = predictions(9)
    for layer, image in itertools.product(range(2), (0, 2)):
        for box, label in enumerate(targets[image].labels):
            query = 2 * box + layer
            boxes[layer, image, query] = targets[image].boxes[box]
            logits[layer, image, query, label] = 8.0
    matches = match(Losses(), logits, boxes, pad_targets(targets, None, 12))
    assert matches.finite and matches.image.shape == (2, 6)
    for layer in range(2):
        assert matches.image[layer].tolist() == [0, 0, 2, 2, 2, 2]
        assert matches.query[layer].tolist() == [2 * int(b) + layer for b in matches.box[layer]]


def test_unlabelled_boxes_cost_no_class(make_targets: MakeTargets) -> None:
    target = make_targets([2])[0]
    blind = Targets(target.boxes, torch.full((2,), -1), 0, (64, 64), (64, 64))
    logits, boxes = (x[:, :1] for x in predictions(5))
    costs = matching_costs(Losses(), logits, boxes, pad_targets([blind], None, 12))
    other = matching_costs(Losses(), logits * 3 + 1, boxes, pad_targets([blind], None, 12))
    torch.testing.assert_close(costs, other)


def test_costs_weigh_class_l1_and_giou(make_targets: MakeTargets) -> None:
    targets = make_targets([2])
    logits, boxes = (x[:1, :1] for x in predictions(5))
    section = Losses(cost_class=0, cost_box_l1=3, cost_box_giou=7)
    costs = matching_costs(section, logits, boxes, pad_targets(targets, None, 12))[0, 0]
    true = targets[0].boxes
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes[0, 0]), cxcywh_to_xyxy(true))
    expected = 3 * torch.cdist(boxes[0, 0], true, p=1) - 7 * giou
    torch.testing.assert_close(costs, expected)
    section = Losses(cost_class=2, cost_box_l1=0, cost_box_giou=0)
    costs = matching_costs(section, logits, boxes, pad_targets(targets, None, 12))[0, 0]
    p = logits[0, 0][:, targets[0].labels].sigmoid()
    expected = 2 * (-0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(costs, expected, rtol=1e-4, atol=1e-4)


def test_less_cost_of_coarse_boxes_lets_the_surest_query_answer() -> None:
    """A query on the object, sure of its label, and one as loose as the coarse box, which is not:
    by costs of 1 the loose one answers for the label, by a quarter of it the sure one. Boxes that
    are exact keep their costs."""
    whole, label = torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([3])
    coarse = Targets(whole, label, 0, (64, 64), (64, 64), coarse=True)
    exact = replace(coarse, coarse=False)
    boxes = torch.tensor([[0.5, 0.5, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9]]).expand(1, 2, 2, 4)
    logits = torch.full((1, 2, 2, 12), -4.0)
    logits[:, :, 0, 3] = 1.0

    def answering(section: Losses) -> list[list[int]]:
        outputs = LayerOutputs(logits, boxes)
        both = Outputs(outputs, outputs, None, None)
        context = LossContext(2.0, None)
        return compute_losses(section, both, [coarse, exact], context, 12)[1].query.tolist()

    # In a decoder layer and in the encoder.
    assert answering(Losses()) == [[1, 1], [1, 1]]
    assert answering(Losses(coarse_box_cost=0.25)) == [[0, 1], [0, 1]]
    assert box_costs(Losses(), [coarse, exact]) is None
    assert box_costs(Losses(coarse_box_cost=0.25), [exact]) is None


def test_costs_that_are_not_finite_are_reported(make_targets: MakeTargets) -> None:
    targets = make_targets([2, 1, 0])
    logits, boxes = predictions(5)
    logits[0, 0, 3] = torch.nan
    matches = match(Losses(), logits, boxes, pad_targets(targets, None, 12))
    assert not matches.finite and 3 not in matches.query[0, :2].tolist()


def test_more_boxes_than_queries(make_targets: MakeTargets) -> None:
    logits, boxes = predictions(4)
    matches = match(Losses(), logits, boxes, pad_targets(make_targets([6, 0, 1]), None, 12))
    assert matches.image[0].tolist() == [0, 0, 0, 0, 2]
    assert len(set(matches.box[0, :4].tolist())) == 4
