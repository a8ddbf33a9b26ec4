"""What all ranks have to know alike: facts of a global batch, and what the first rank did."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.data.stream.batches import StepBatches
from pipeline.errors import LongtailError

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepFacts:
    """Of a global batch: its boxes, those by column, and whether any rank wants to stop.

    `labelled` is (C,), the boxes whose label is learnt; `unshared` is how many unreadable images
    some rank has met that the others do not know of.
    """

    num_boxes: float
    labelled: NDArray[np.int64]
    stop: bool
    unshared: int = 0


def agree_on_step(
    batches: StepBatches | None,
    failure: LongtailError | None,
    stop: bool,
    num_categories: int,
    device: torch.device,
    unshared: int = 0,
    *,
    coarse_boxes: bool = True,
) -> StepFacts:
    """One all-reduce before the first micro-batch of a step.

    Padding samples (all weights 0) do not count, so the facts are the same for any world size, nor,
    without `coarse_boxes`, those of image-level images, where nothing learns from them. A
    `failure` of any rank, to read its part, is raised on all ranks.
    """
    micro_batches = batches.micro_batches if batches else []
    numbers = torch.zeros(4 + num_categories)
    numbers[0], numbers[1], numbers[3] = float(stop), float(failure is not None), float(unshared)
    for target in (target for batch in micro_batches for target in batch.targets):
        learned = target.class_weight or target.box_weight or target.semantic_weight
        if learned and (coarse_boxes or not target.coarse):
            numbers[2] += len(target.labels)
        if target.class_weight:
            labels = target.labels[target.labels >= 0].cpu()
            numbers[4:] += torch.bincount(labels, minlength=num_categories)
    numbers = numbers.to(device)
    dist.all_reduce(numbers)
    numbers = numbers.cpu()
    if numbers[1]:
        raise first_failure(failure)
    labelled = numbers[4:].numpy().astype(np.int64)
    return StepFacts(float(numbers[2]), labelled, bool(numbers[0]), int(numbers[3]))


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
