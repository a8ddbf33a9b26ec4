"""The ledger of samples: what each optimizer step consumed, by rank, for proof of exactly once.

    samples_rank0.jsonl     {"attempt": 2, "start": 6, "world_size": 2}
                            {"attempt": 2, "step": 7, "samples": [["lvis_train/41", 8812]],
                             "loss": "f00d..."}

An attempt is one life of the training workers; it begins after the step `start` of a checkpoint. A
sample is named with the seed of its place in the plan, so that its next epoch is another one. Each
rank appends a line after a step and before the step's checkpoint, so what a checkpoint holds has
lines.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.training.agreement import on_first_rank
from pipeline.training.space import append_line, read_lines

Sample = tuple[str, int]
"""A sample's id, `SOURCE/KEY`, and the seed of its place in the plan."""


class SampleLog:
    """One rank's file in a run directory; `attempt` is the same on all ranks."""

    def __init__(self, run_dir: Path, rank: int, attempt: int, start: int, world_size: int) -> None:
        self._path, self._attempt = run_dir / f"samples_rank{rank}.jsonl", attempt
        self._append({"start": start, "world_size": world_size})

    def write(self, step: int, batches: Sequence[Batch], losses: Sequence[Tensor]) -> None:
        """Enter a rank's part of step `step` (from 1) and the sums of its micro-batches' losses.

        Padding is left out. On a GPU it waits for the losses.
        """
        samples = [
            (sample_id, target.seed)
            for batch in batches
            for sample_id, target in zip(batch.sample_ids, batch.targets, strict=True)
            if target.class_weight or target.box_weight or target.semantic_weight
        ]
        values = torch.stack([loss.detach().float().cpu() for loss in losses])
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
        self._append({"step": step, "samples": samples, "loss": digest})

    def _append(self, values: dict[str, Any]) -> None:
        append_line(self._path, json.dumps({"attempt": self._attempt, **values}))


def open_samples(run_dir: Path, start: int) -> SampleLog:
    """The log of this rank for the attempt that begins after step `start`; all ranks call it."""

    def next_attempt() -> int:
        return max((line["attempt"] for _, line in _lines_by_rank(run_dir)), default=0) + 1

    attempt = on_first_rank(next_attempt)
    return SampleLog(run_dir, dist.get_rank(), attempt, start, dist.get_world_size())


@dataclass
class StepRecord:
    """A step of one attempt over all ranks: its samples, each rank's digest of its loss, and how
    many ranks there were (0 where the line that says so was cut short)."""

    samples: Counter[Sample] = field(default_factory=Counter)
    losses: dict[int, str] = field(default_factory=dict)
    world_size: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every rank has written its line."""
        return len(self.losses) == self.world_size


@dataclass
class SampleLedger:
    """What counted, by step: the last attempt at each step that the next attempt built on.

    `redone` are steps that were done again, once for each time; `differing` those of them whose
    samples or, in as many ranks, losses were not the same again. `attempts` is their number.
    """

    counted: dict[int, StepRecord]
    redone: list[int]
    differing: list[int]
    attempts: int

    def missing(self, steps: int) -> list[int]:
        """Steps from 1 to `steps` of which nothing counted."""
        return [step for step in range(1, steps + 1) if step not in self.counted]

    def beyond(self, other: "SampleLedger") -> Counter[Sample]:
        """Samples of each step beyond those of the same step of `other`, a ledger of the same plan:
        what `other` lost, or what is repeated here."""
        found: Counter[Sample] = Counter()
        for step, record in self.counted.items():
            found += record.samples - other.counted.get(step, StepRecord()).samples
        return found


def read_samples(run_dir: Path) -> SampleLedger:
    """The ledger of a run, in which an attempt undoes what came after the step it began from."""
    starts: dict[int, int] = {}
    world_sizes: dict[int, int] = {}
    done: dict[int, dict[int, StepRecord]] = {}
    for rank, line in _lines_by_rank(run_dir):
        steps = done.setdefault(line["attempt"], {})
        if "start" in line:
            starts[line["attempt"]] = line["start"]
            world_sizes[line["attempt"]] = line["world_size"]
            continue
        record = steps.setdefault(line["step"], StepRecord())
        record.samples.update((str(name), int(seed)) for name, seed in line["samples"])
        record.losses[rank] = line["loss"]
    counted: dict[int, StepRecord] = {}
    earlier: dict[int, StepRecord] = {}
    redone, differing = [], []
    for attempt, steps in sorted(done.items()):
        start = starts.get(attempt, min(steps, default=1) - 1)
        for record in steps.values():
            record.world_size = world_sizes.get(attempt, 0)
        counted = {step: record for step, record in counted.items() if step <= start}
        for step in sorted(steps.keys() & earlier.keys()):
            redone.append(step)
            if not _alike(earlier[step], steps[step]):
                differing.append(step)
        counted |= steps
        earlier |= steps
    return SampleLedger(counted, redone, differing, len(done))


def _alike(first: StepRecord, second: StepRecord) -> bool:
    """Whether a step was the same again, as far as lines of it were written."""
    if first.world_size == second.world_size:
        shared = first.losses.keys() & second.losses.keys()
        if any(first.losses[rank] != second.losses[rank] for rank in shared):
            return False
    if first.is_whole and second.is_whole:
        return first.samples == second.samples
    # A kill came between the lines of two ranks.
    return not first.samples - second.samples or not second.samples - first.samples


def _lines_by_rank(run_dir: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for path in sorted(run_dir.glob("samples_rank*.jsonl")):
        rank = int(path.stem.removeprefix("samples_rank"))
        for text in read_lines(path):
            try:
                line = json.loads(text)
            except ValueError:
                continue  # A kill cut it short.
            yield rank, line
