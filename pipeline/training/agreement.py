"""What all ranks have to know alike: facts of a global batch, and what the first rank did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.data.stream import StepBatches
from pipeline.errors import LongtailError

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepFacts:
    """Of a global batch: its boxes, those by column, and whether any rank wants to stop.

    `labelled` is (C,), the boxes whose label is learnt.
    """

    num_boxes: float
    labelled: NDArray[np.int64]
    stop: bool


def agree_on_step(
    batches: StepBatches | None,
    failure: LongtailError | None,
    stop: bool,
    num_categories: int,
    device: torch.device,
) -> StepFacts:
    """One all-reduce before the first micro-batch of a step.

    Padding samples (all weights 0) do not count, so the facts are the same for any world size. A
    `failure` of any rank, to read its part, is raised on all ranks.
    """
    micro_batches = batches.micro_batches if batches else []
    numbers = torch.zeros(3 + num_categories)
    numbers[0], numbers[1] = float(stop), float(failure is not None)
    for target in (target for batch in micro_batches for target in batch.targets):
        if target.class_weight or target.box_weight or target.semantic_weight:
            numbers[2] += len(target.labels)
        if target.class_weight:
            labels = target.labels[target.labels >= 0].cpu()
            numbers[3:] += torch.bincount(labels, minlength=num_categories)
    numbers = numbers.to(device)
    dist.all_reduce(numbers)
    numbers = numbers.cpu()
    if numbers[1]:
        raise first_failure(failure)
    labelled = numbers[3:].numpy().astype(np.int64)
    return StepFacts(float(numbers[2]), labelled, bool(numbers[0]))


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


def gather_strings(strings: Sequence[str]) -> list[str]:
    """The strings of all ranks, in rank order."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(strings))
    return [text for part in gathered for text in part]
