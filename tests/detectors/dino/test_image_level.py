"""Detic's image-level loss on DINO: which query, which value, and what it leaves alone."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Targets
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.dino.image_level import (
    ImageLabels,
    choose_queries,
    image_labels,
    image_level_losses,
    without_image_level,
)
from pipeline.detectors.interface import LossContext, TrainingOutput
from pipeline.recipe import Losses

MakeDetector = Callable[..., DinoDetector]
MakeTargets = Callable[..., list[Targets]]
Images = tuple[Tensor, Tensor]
WAYS = ("max_size", "image_box", "max_score")
COLUMNS = torch.tensor([7, 0, 3, 5, 11])


def coarse(*labels: int, **facts: object) -> Targets:
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(labels), 4).clone()
    tensor = torch.tensor(labels, dtype=torch.int64)
    target = Targets(boxes, tensor, 0, (64, 64), (64, 64), coarse=True, sampled_negatives=False)
    return replace(target, **facts)


def with_way(way: str, **changes: object) -> dict[str, object]:
    return {"image_level": way, **changes}


def test_value_by_hand() -> None:
    """Two layers, three categories; an image with labels 0 and 2, and one with label 1, of 8.

    Binary cross-entropy of a logit x is log(1 + e^-x) where it is wanted, else log(1 + e^x).
    """
    logits = torch.tensor(
        [[[1.0, -2.0, 0.0], [0.5, 0.5, -1.0], [2.0, 3.0, -4.0]], [[0.0] * 3] * 3]
    ).double()
    labels = image_labels(Losses(image_level="max_size"), [coarse(0, 2), coarse(1)])
    assert labels.image.tolist() == [0, 0, 1] and labels.box.tolist() == [0, 1, 0]
    section = Losses(image_level="max_size", weight_image_level=0.3)
    losses = image_level_losses(section, logits, labels, LossContext(1.0, None, 8.0))

    def entropy(row: list[float], label: int) -> float:
        return sum(math.log1p(math.exp(-x if k == label else x)) for k, x in enumerate(row))

    total = entropy([1, -2, 0], 0) / 2 + entropy([0.5, 0.5, -1], 2) / 2 + entropy([2, 3, -4], 1)
    assert float(losses["loss/image_level_0"]) == pytest.approx(0.3 * total / 8, rel=1e-12)
    even = 0.3 * (1 + 1) * 3 * math.log(2) / 8
    assert float(losses["loss/image_level"]) == pytest.approx(even, rel=1e-12)
    assert losses.keys() == {"loss/image_level", "loss/image_level_0"}


def test_categories_of_an_image_share_its_weight() -> None:
    targets = [
        coarse(4, 4, 1),
        coarse(),
        coarse(3, 3, class_weight=0.0),
        replace(coarse(5, 5), coarse=False),
    ]
    labels = image_labels(Losses(image_level="max_size"), targets)
    assert labels.label.tolist() == [4, 4, 1, 3, 3]
    assert labels.weight.tolist() == [0.25, 0.25, 0.5, 0, 0]
    assert len(image_labels(Losses(), targets).label) == 0


def test_the_chosen_query() -> None:
    """Of each layer on its own: the largest box, the last query, the best score of the label."""
    boxes = torch.full((2, 2, 3, 4), 0.1)
    boxes[0, 0, 1, 2:] = torch.tensor([0.9, 0.2])
    boxes[0, 0, 2, 2:] = torch.tensor([0.5, 0.5])
    boxes[0, 1, 0, 2:] = 0.3
    boxes[1, 0, 0, 2:], boxes[1, 1, 1, 2:] = 0.7, 0.7
    logits = torch.zeros(2, 2, 3, 5)
    logits[0, 1, 2, 0] = 5.0  # column 0 is category 7
    logits[0, 1, 1, 2] = 5.0  # column 2 is category 3
    logits[1, 1, 0, 0], logits[1, 1, 2, 2] = 5.0, 5.0
    labels = ImageLabels(
        torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), torch.tensor([0, 7, 3]), torch.ones(3)
    )
    found = {
        way: choose_queries(Losses(image_level=way), logits, boxes, labels, COLUMNS, 12).tolist()
        for way in WAYS
    }
    assert found["max_size"] == [[2, 0, 0], [0, 1, 1]]
    assert found["image_box"] == [[2, 2, 2], [2, 2, 2]]
    assert [row[1:] for row in found["max_score"]] == [[2, 1], [0, 2]]


def test_other_losses_do_not_see_image_level_boxes(make_targets: MakeTargets) -> None:
    section = Losses(image_level="max_score")
    targets = [*make_targets([2]), coarse(1, 2)]
    kept, emptied = without_image_level(section, targets)
    assert kept is targets[0]
    assert len(emptied.boxes) == len(emptied.labels) == 0
    assert (emptied.class_weight, emptied.box_weight, emptied.semantic_weight) == (0, 0, 1)
    assert without_image_level(Losses(), targets) == targets
    [background] = without_image_level(section, [coarse(1, 2, sampled_negatives=True)])
    assert (len(background.boxes), background.class_weight, background.box_weight) == (0, 1, 0)


@pytest.mark.parametrize("way", WAYS)
def test_where_negatives_are_sampled_all_queries_are_background_but_for_the_labels(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images, way: str
) -> None:
    """By hand for the last layer: 0.75 p^2 -log(1 - p) of every query in the sample's columns that
    the image does not name; columns that are no sample teach nothing."""
    detector = make_detector(losses=with_way(way), denoising={"num_queries": 0})
    facts = {"sampled_negatives": True}
    targets = [coarse(7, **facts), coarse(0, 3, **facts), coarse(5), coarse(7, 7, 3, **facts)]
    sample = torch.tensor([True, True, False, True, True])
    context = LossContext(4.0, COLUMNS, 4.0, sample)
    losses = detector(*images, targets, context).losses
    with torch.no_grad():
        logits, _ = detector(*images)
    if way == "image_box":  # its last query is another one than in inference
        assert losses["loss/class"].item() > 0
    else:
        expected = 0.0
        for target, rows in zip(targets, logits.double(), strict=True):
            named = set(target.labels.tolist()) | {3}
            for column in [c for c in COLUMNS.tolist() if c not in named]:
                p = rows[:, column].sigmoid()
                wanted = 0.75 * p.square() * -(1 - p).log() * target.sampled_negatives
                expected += float(wanted.sum())
        assert losses["loss/class"].item() == pytest.approx(expected / 4, rel=1e-5)
    assert losses["loss/box_l1"].item() == losses["loss/box_giou"].item() == 0
    alone = detector(*images, [replace(t, sampled_negatives=False) for t in targets], context)
    for key in ("loss/image_level", "loss/image_level_0"):
        assert torch.equal(losses[key], alone.losses[key])


def train(
    detector: DinoDetector, images: Images, targets: list[Targets], columns: Tensor | None = None
) -> TrainingOutput:
    output = detector(*images, targets, LossContext(4.0, columns, 4.0))
    assert isinstance(output, TrainingOutput)
    return output


@pytest.mark.parametrize("way", WAYS)
def test_an_image_level_batch_has_that_loss_alone(
    make_detector: MakeDetector, images: Images, way: str
) -> None:
    detector = make_detector(losses=with_way(way))
    targets = [coarse(7), coarse(0, 3), coarse(5), coarse(7, 7, 3)]
    output = train(detector, images, targets, COLUMNS)
    for key, loss in output.losses.items():
        on = key.startswith("loss/image_level")
        assert (float(loss) > 0) == on, key
        if not on:
            gradients = torch.autograd.grad(
                loss, list(detector.parameters()), retain_graph=True, allow_unused=True
            )
            assert all(g is None or not g.any() for g in gradients), key
    torch.stack(list(output.losses.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert detector.class_embed.weight.grad.any() and detector.backbone.body is not None
    for part in ("backbone", "encoder", "decoder"):
        assert any(p.grad.any() for p in getattr(detector, part).parameters()), part
    # The boxes of the choice, and the classes of the encoder, learn nothing from it.
    for head in (detector.encoder_class_embed, detector.encoder_bbox_embed, detector.label_embed):
        assert not any(p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_box_images_learn_as_without_it(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images, way: str
) -> None:
    targets = make_targets([3, 1, 0, 2])
    plain = train(make_detector(), images, targets).losses
    found = train(make_detector(losses=with_way(way)), images, targets).losses
    for key, value in plain.items():
        assert torch.equal(found[key], value), key
    extra = found.keys() - plain.keys()
    assert extra == {"loss/image_level", "loss/image_level_0"}
    assert all(float(found[key]) == 0 for key in extra)


@pytest.mark.parametrize("way", WAYS)
def test_a_mixed_batch_adds_up(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images, way: str
) -> None:
    """Image by image and together, with the same normalisers."""
    detector = make_detector(losses=with_way(way))
    targets = [*make_targets([3, 1]), coarse(0, 3), coarse(5)]
    columns = torch.tensor([t for t in range(12)])
    together = train(detector, images, targets, columns)
    alone = [
        train(detector, (images[0][i : i + 1], images[1][i : i + 1]), targets[i : i + 1], columns)
        for i in range(4)
    ]
    for key, value in together.losses.items():
        parts = sum(part.losses[key] for part in alone)
        torch.testing.assert_close(parts, value, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_largest_predicted_box(
    make_detector: MakeDetector, images: Images
) -> None:
    """Against the inference outputs of the same weights, which end with the last layer."""
    detector = make_detector(losses=with_way("max_size"), denoising={"num_queries": 0})
    targets = [coarse(7), coarse(0, 3), coarse(5), coarse(11)]
    loss = train(detector, images, targets, COLUMNS).losses["loss/image_level"]
    with torch.no_grad():
        logits, boxes = detector(*images)
    expected = 0.0
    for i, target in enumerate(targets):
        row = logits[i, (boxes[i, :, 2] * boxes[i, :, 3]).argmax()].double()
        for label in target.labels.tolist():
            wanted = torch.zeros(12, dtype=torch.float64)
            wanted[label] = 1
            probability = row.sigmoid()
            entropy = -(wanted * probability.log() + (1 - wanted) * (1 - probability).log()).sum()
            expected += float(entropy) / len(target.labels)
    assert float(loss) == pytest.approx(0.1 * expected / 4, rel=1e-5)


def test_the_image_box_is_where_the_last_query_begins(
    make_detector: MakeDetector, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = make_detector(losses=with_way("image_box"))
    seen = []
    forward = detector.decoder.forward

    def spy(queries: object, *rest: object) -> object:
        seen.append(queries.boxes)  # type: ignore[attr-defined]
        return forward(queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(detector.decoder, "forward", spy)
    box_image = replace(coarse(7), coarse=False)
    train(detector, images, [coarse(7), box_image, coarse(0), box_image], COLUMNS)
    assert seen[0][[0, 2], -1].tolist() == [[0.5, 0.5, 1, 1]] * 2
    assert not (seen[0][[1, 3], -1] == torch.tensor([0.5, 0.5, 1, 1])).all(1).any()


def test_the_branch_learns_from_the_chosen_queries(
    make_detector: MakeDetector, make_targets: MakeTargets, images: Images
) -> None:
    detector = make_detector(losses=with_way("max_size"))
    targets = [*make_targets([2, 0]), coarse(0, 3), coarse(5)]
    output = train(detector, images, targets)
    matched, denoised = output.matched
    pairs = sorted(zip(matched.image.tolist(), matched.box.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)]
    assert set(denoised.image.tolist()) == {0}
    assert torch.equal(matched.features[-3], matched.features[-2])  # one query for both labels
    assert len(output.earlier) == 1 and len(output.earlier[0][0].image) == 5
