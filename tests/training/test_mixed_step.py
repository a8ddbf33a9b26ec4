"""A step with both streams is a step of each, added up: from its batch to its losses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_dino import NUM_CATEGORIES, SMALL
from torch import Tensor

from pipeline.data.batch import Batch, Targets
from pipeline.data.stream.batches import StepBatches
from pipeline.detectors import build_detector
from pipeline.detectors.interface import LossContext
from pipeline.recipe import DetectorSection, Losses, Semantic
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.agreement import agree_on_step
from pipeline.training.loop import join_process_group
from pipeline.training.step_context import loss_context
from pipeline.training.student import Student

CPU = torch.device("cpu")
COUNTS = np.arange(NUM_CATEGORIES)[::-1] * 10 + 1
SIDE = 64

KINDS: dict[str, dict[str, Any]] = {
    "labels": {},
    "no labels": {"class_weight": 0.0},
    "no boxes": {"box_weight": 0.0},
    "no semantics": {"semantic_weight": 0.0},
    "not exhaustive": {"not_exhaustive_categories": (11,)},
}


def boxes_of(number: int, *labels: int) -> Targets:
    generator = torch.Generator().manual_seed(number)
    centres = torch.rand(len(labels), 2, generator=generator) * 0.5 + 0.25
    extents = torch.rand(len(labels), 2, generator=generator) * 0.4 + 0.05
    size = (SIDE, SIDE)
    column = torch.tensor(labels, dtype=torch.int64)
    return Targets(torch.cat([centres, extents], 1), column, number, size, size, number)


def whole(number: int, *labels: int, **kind: Any) -> Targets:
    facts: dict[str, Any] = {"coarse": True, "extra": True, "sampled_negatives": False}
    return replace(boxes_of(number, *labels), **(facts | kind))


def student_of(**losses: Any) -> Student:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(NUM_CATEGORIES, 16), dim=-1)
    section = DetectorSection.model_validate(SMALL | {"losses": losses})
    detector = build_detector(section, num_categories=NUM_CATEGORIES, text_embeddings=text)
    semantic = Semantic()
    branch = SemanticBranch(detector.feature_dim, text, 20.0, semantic)
    return Student(detector, branch, semantic)


def context_of(targets: list[Targets], section: Losses) -> LossContext:
    """As the loop makes it."""
    join_process_group(CPU)
    images = torch.zeros(len(targets), 3, SIDE, SIDE, dtype=torch.uint8)
    names = ["images"] * len(targets)
    batch = Batch(
        images, torch.zeros(len(targets), SIDE, SIDE, dtype=torch.bool), targets, names, names
    )
    batches = StepBatches(0, [batch], "mixed", ["images"], {})
    coarse = section.image_level == "boxes"
    facts = agree_on_step(batches, None, False, NUM_CATEGORIES, CPU, coarse_boxes=coarse)
    return loss_context(facts, COUNTS, section, 0, 0, CPU)


def losses_of(student: Student, targets: list[Targets], context: LossContext) -> dict[str, Tensor]:
    images, soft = [], []
    for target in targets:
        generator = torch.Generator().manual_seed(target.seed)
        images.append(torch.randint(256, (3, SIDE, SIDE), generator=generator).to(torch.uint8))
        count = len(target.labels)
        soft.append(torch.randn(count, NUM_CATEGORIES, generator=generator).softmax(-1))
    mask = torch.zeros(len(targets), SIDE, SIDE, dtype=torch.bool)
    with torch.no_grad():
        return student(torch.stack(images), mask, targets, context, soft)


@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("way", ["boxes", "max_size"])
@pytest.mark.parametrize("kind", KINDS)
def test_box_images_learn_the_same_whatever_else_is_in_the_step(
    kind: str, way: str, columns: int
) -> None:
    student = student_of(image_level=way, federated_categories=columns)
    section = student.detector.section.losses  # type: ignore[union-attr]
    photographs = [boxes_of(1, 0, 3, 3), boxes_of(2), boxes_of(3, 7)]
    images = [whole(4, 11, 10, 9, **KINDS[kind]), whole(5, 0, 8, **KINDS[kind])]
    alone = losses_of(student, photographs, context_of(photographs, section))
    mixed = losses_of(student, photographs, context_of([*photographs, *images], section))
    for key, value in alone.items():
        torch.testing.assert_close(mixed[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("columns", [0, 5])
def test_the_background_of_detics_images_is_their_own(columns: int) -> None:
    """Where their negatives are sampled, they are background; photographs learn as before."""
    student = student_of(image_level="max_size", federated_categories=columns)
    section = student.detector.section.losses  # type: ignore[union-attr]
    photographs = [boxes_of(1, 0, 3, 3), boxes_of(2), boxes_of(3, 7)]
    images = [whole(4, 11, 10, 9, sampled_negatives=True)]
    context = context_of([*photographs, *images], section)
    alone = losses_of(student, photographs, context_of(photographs, section))
    for key, value in losses_of(student, photographs, context).items():
        torch.testing.assert_close(value, alone[key], rtol=1e-5, atol=1e-6, msg=key)
    background = losses_of(student, images, context)
    silent = losses_of(student, [replace(images[0], sampled_negatives=False)], context)
    for key in ("loss/class", "loss/class_0", "loss/class_encoder"):
        assert float(background[key]) > 0 and float(silent[key]) == 0, key
    assert float(background["loss/class_dn"]) == 0


@pytest.mark.parametrize("way", ["boxes", "max_size"])
@pytest.mark.parametrize("kind", KINDS)
def test_image_level_images_learn_the_same_too(kind: str, way: str) -> None:
    """With all columns: those that a step draws are others where it has no photographs."""
    student = student_of(image_level=way, federated_categories=0)
    section = student.detector.section.losses  # type: ignore[union-attr]
    photographs = [boxes_of(1, 0, 3, 3), boxes_of(3, 7)]
    images = [whole(4, 11, 10, 9, **KINDS[kind]), whole(5, 0, 8, **KINDS[kind])]
    alone = losses_of(student, images, context_of(images, section))
    mixed = losses_of(student, images, context_of([*photographs, *images], section))
    assert any(float(value) for value in alone.values())
    for key, value in alone.items():
        torch.testing.assert_close(mixed[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_a_step_of_one_stream_has_one_normaliser() -> None:
    """To the bit: nothing is multiplied by what is nearly one."""
    for targets in ([boxes_of(1, 0, 3, 3), boxes_of(2)], [whole(4, 11, 10, 9), whole(5, 1)]):
        context = context_of(targets, Losses(federated_categories=0))
        extra = targets[0].extra
        assert all(share[extra] == 1.0 for share in context.shares)
        assert context.num_boxes == sum(len(target.labels) for target in targets)
