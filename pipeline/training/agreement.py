"""What all ranks have to know alike: facts of a global batch, and what the first rank did."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.data.stream.batches import StepBatches
from pipeline.detectors.interface import Shares
from pipeline.errors import LongtailError

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepFacts:
    """Of a global batch: its boxes, those by column, and whether any rank wants to stop.

    `labelled` is (C,), the boxes whose label is learnt, `sampled` (C,) those of them on boxes to be
    detected, in images that take for absent what they do not name; `coarse_images` is the number of
    image-level images, `unshared` how many unreadable images some rank has met that the others do
    not know of.
    """

    num_boxes: float
    labelled: NDArray[np.int64]
    sampled: NDArray[np.int64]
    shares: Shares
    coarse_images: float
    stop: bool
    unshared: int


def agree_on_step(
    batches: StepBatches | None,
    failure: LongtailError | None,
    stop: bool,
    num_categories: int,
    device: torch.device,
    unshared: int = 0,
    *,
    coarse_boxes: bool = True,
    semantics: Literal["none", "hard", "soft"] = "soft",
) -> StepFacts:
    """One all-reduce before the first micro-batch of a step.

    Padding samples (all weights 0) do not count, so the facts are the same for any world size. Nor
    do boxes that have no term: without `coarse_boxes` those of image-level images have none of
    class and box, without a label a box has none of class, nor, with hard labels, of `semantics`.
    A `failure` of any rank, to read its part, is raised on all ranks.
    """
    micro_batches = batches.micro_batches if batches else []
    said = torch.tensor([float(stop), float(failure is not None), float(unshared)])
    total, coarse_images = torch.zeros(1), torch.zeros(1)
    by_term = torch.zeros(2, 3)
    labelled, sampled = torch.zeros(num_categories), torch.zeros(num_categories)
    for target in (target for batch in micro_batches for target in batch.targets):
        detects = coarse_boxes or not target.coarse
        teaches = semantics != "none" and target.semantic_weight > 0
        classes, boxes = target.class_weight * detects > 0, target.box_weight * detects > 0
        labels = target.labels[target.labels >= 0].cpu()
        named, every = len(labels), len(target.labels)
        taught = named if semantics == "hard" else every
        by_term[int(target.extra)] += torch.tensor(
            [named * classes, every * boxes, taught * teaches]
        )
        total += every * (classes or boxes or teaches)
        coarse_images += bool(target.coarse and target.class_weight)
        if target.class_weight:
            counts = torch.bincount(labels, minlength=num_categories)
            labelled += counts
            sampled += counts * (target.sampled_negatives and detects)
    parts = [said, total, coarse_images, by_term.flatten(), labelled, sampled]
    numbers = torch.cat(parts).to(device)
    dist.all_reduce(numbers)
    said, total, coarse_images, by_term, labelled, sampled = numbers.cpu().split(
        [len(part) for part in parts]
    )
    if said[1]:
        raise first_failure(failure)
    by_term = by_term.view(2, 3)
    # A stream that has no box with the term has no term, but for its background.
    shares = torch.where(by_term > 0, total / by_term.clamp(min=1), 1.0)
    return StepFacts(
        float(total),
        labelled.numpy().astype(np.int64),
        sampled.numpy().astype(np.int64),
        Shares(*((float(train), float(extra)) for train, extra in shares.T)),
        float(coarse_images),
        bool(said[0]),
        int(said[2]),
    )


def first_failure(failure: LongtailError | None) -> LongtailError:
    """The failure of the lowest rank that has one; at least one rank has."""
    failures: list[LongtailError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next(found for found in failures if found is not None)


def on_first_rank(function: Callable[[], Result]) -> Result:
    """The result of a call on rank 0 alone, on every rank; what it raises is raised on all."""
    outcome: list[Result | LongtailError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except LongtailError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], LongtailError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def gather_unreadable(own: Mapping[str, str]) -> dict[str, str]:
    """Unreadable images of all ranks with their reasons, by sample id."""
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(own))
    return {sample_id: reason for part in gathered for sample_id, reason in part.items()}


def gather_strings(strings: Sequence[str]) -> list[str]:
    """The strings of all ranks, in rank order."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(strings))
    return [text for part in gathered for text in part]
