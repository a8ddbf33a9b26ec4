"""What a training step keeps beside weights, gradients and moments: counted, and not computed.

The real student runs forward and backward on fake tensors (`live_bytes.py`). Two things look at
values, which fake tensors have none of: the Hungarian matching, which gives any pairs here, and
kernels for deformable sampling, in whose place stands what they keep and allocate.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pipeline.check.live_bytes import (
    LiveBytes,
    autocast_as_on_gpu,
    fake_mode,
    replaced,
    without_memory,
)
from pipeline.data.batch import Targets
from pipeline.detectors import attention, build_detector
from pipeline.detectors.dino import losses
from pipeline.detectors.dino.detector import DinoDetector
from pipeline.detectors.dino.heads import LanguageHead
from pipeline.detectors.dino.matcher import Matches, PaddedTargets, matching_costs
from pipeline.detectors.interface import LossContext
from pipeline.detectors.sampling import Shapes, portable
from pipeline.recipe import Losses, Recipe
from pipeline.semantics.branch import SemanticBranch
from pipeline.training.student import Student


class MicroBatch(NamedTuple):
    """Images of one size, boxes of each, and how many class columns their step has."""

    images: int
    height: int
    width: int
    boxes: int
    columns: int


class StepBytes(NamedTuple):
    """Of one micro-batch: what waits for the backward pass, and the most at any moment, the
    gradient that is being made included and those of finished parameters not."""

    saved: int
    peak: int


def meta_student(recipe: Recipe, num_categories: int) -> Student:
    """The student of a recipe on the meta device: shapes, and nothing else."""
    text, language = None, recipe.detector.class_head.kind == "language"
    # The first value of the head's bias is found by a trial, which needs numbers.
    no_bias = recipe.detector.class_head.model_copy(update={"bias": False})
    section = recipe.detector.model_copy(update={"class_head": no_bias})
    with torch.device("meta"):
        if language or recipe.semantic is not None:
            from pipeline.semantics.clip import model_config

            text = torch.empty(num_categories, model_config(recipe.teacher.model)["embed_dim"])
        detector = build_detector(
            section,
            num_categories=num_categories,
            text_embeddings=text if language else None,
            pretrained=False,
        )
        for head in detector.modules():
            if isinstance(head, LanguageHead) and recipe.detector.class_head.bias:
                head.bias = nn.Parameter(torch.empty(1))
        branch = None
        if recipe.semantic is not None:
            assert text is not None
            branch = SemanticBranch(detector.feature_dim, text, 1.0, recipe.semantic)
    detector.set_activation_checkpointing(recipe.training.activation_checkpointing)
    return Student(detector, branch, recipe.semantic, recipe.training.precision)


def step_bytes(student: Student, batch: MicroBatch, *, on_gpu: bool) -> StepBytes:
    """Count one micro-step of a student on the meta device, whose tensors become fake ones.

    `on_gpu` lets autocast choose dtypes as it does there; kernels keep the same on both.
    """
    mode, live = fake_mode(), LiveBytes()
    without_memory(student, mode)
    student.train()
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
    targets = targets_of(batch)
    whole = batch.columns >= cast(DinoDetector, student.detector).num_categories
    context = LossContext(
        float(batch.images * batch.boxes), None if whole else torch.arange(batch.columns)
    )
    mask = torch.zeros(batch.images, batch.height, batch.width, dtype=torch.bool)
    with mode:
        images = torch.empty(batch.images, 3, batch.height, batch.width, dtype=torch.uint8)
        soft = [torch.empty(batch.boxes, width) for width in _taught(student, len(targets))]
    with ExitStack() as stack:
        stack.enter_context(
            replaced((attention, "sample_and_sum", _sample), (losses, "match", _match))
        )
        if on_gpu:
            stack.enter_context(autocast_as_on_gpu())
        stack.enter_context(live)
        found = student(images, mask, targets, context, soft)
        total = torch.stack(list(found.values())).sum()
        del found
        saved = live.live
        total.backward()
    return StepBytes(saved, live.peak)


def _forget_gradient(parameter: Tensor) -> None:
    """Gradients of parameters are counted by arithmetic, for they stay over micro-steps."""
    parameter.grad = None


def targets_of(batch: MicroBatch) -> list[Targets]:
    """Boxes along the diagonal, labelled one category after another."""
    places = torch.linspace(0.1, 0.9, batch.boxes)
    sides = torch.full_like(places, 0.1)
    boxes = torch.stack([places, places, sides, sides], dim=1)
    labels, size = torch.arange(batch.boxes) % batch.columns, (batch.height, batch.width)
    return [Targets(boxes, labels, i, size, size, seed=i) for i in range(batch.images)]


def _taught(student: Student, number: int) -> list[int]:
    """For each image the width of what the branch learns; of nothing without one."""
    branch, section = student.branch, student.semantic
    if branch is None or section is None or section.labels == "hard":
        return []
    text = cast(SemanticBranch, branch).text_embeddings
    return [text.shape[1 if section.objective == "features" else 0]] * number


class _Sampling(torch.autograd.Function):
    """What the kernels of `detectors/sampling` keep for the backward pass, and what they make."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        return value.new_empty((*locations.shape[:2], value.shape[2] * value.shape[3]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, locations, weights = ctx.saved_tensors
        gradient = torch.zeros_like(value, dtype=torch.float32)
        return gradient.to(value.dtype), torch.empty_like(locations), torch.empty_like(weights)


def _sample(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, kernel: str = "auto"
) -> Tensor:
    if kernel == "portable":
        return portable.sample_and_sum(value, shapes, locations, weights)
    output: Tensor = _Sampling.apply(
        value.contiguous(), locations.contiguous(), weights.contiguous()
    )
    return output


def _match(section: Losses, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Matches:
    """The first queries in order, after the costs that the real matching would have computed."""
    with torch.no_grad():
        matching_costs(section, logits, boxes, targets)
    pairs = [
        (image, number)
        for image, count in enumerate(targets.counts)
        for number in range(min(count, logits.shape[2]))
    ]
    image, number = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    image, number = (part.expand(len(logits), -1) for part in (image, number))
    return Matches(image, number, number, finite=True)
