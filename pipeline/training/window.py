"""What a metrics line says of the steps since the line before: means, waits, memory."""

import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.stream.batches import StepBatches
from pipeline.data.stream.reader import LEFT_OUT
from pipeline.recipe import Training

WAITS = ("data_wait", "teacher_wait", "checkpoint_wait", "evaluation_wait")
"""Seconds of a step, in the mean over steps and ranks, that are not its own work."""


class Window:
    """Sums over the `steps` steps since the last metrics line; every rank has one."""

    def __init__(self) -> None:
        self._restart()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to one of the waits."""
        begun = time.perf_counter()
        yield
        self._waits[name] += time.perf_counter() - begun

    def add(self, batches: StepBatches, losses: Mapping[str, Tensor], norm: float) -> None:
        """Count a step; losses of one that was skipped (`norm` not finite) are left out."""
        self.steps += 1
        self._samples.update(batches.sources)
        self._dropped.update(batches.dropped)
        for batch in batches.micro_batches:
            padding, pixels = batch.num_pixels()
            self._padding += padding
            self._pixels += pixels
        self._last["stream"] = batches.stream
        if math.isfinite(norm):
            self._applied += 1
            self._last["grad_norm"] = norm
            for name, loss in losses.items():
                self._losses[name] = self._losses.get(name, 0.0) + loss

    def values(self, section: Training, rate: float, device: torch.device) -> dict[str, Any]:
        """Means per step over all ranks, for a metrics line; starts the next window."""
        seconds = (time.perf_counter() - self._begun) / self.steps
        names = sorted(self._losses)
        sums = [torch.as_tensor(self._losses[name], device=device).double() for name in names]
        dropped = [self._dropped[reason] for reason in LEFT_OUT]
        counts = [*self._waits.values(), self._padding, self._pixels, *dropped]
        of_host = torch.tensor(counts, dtype=torch.float64, device=device)
        numbers = torch.stack([*sums, *of_host])
        dist.all_reduce(numbers)
        totals = numbers[: len(names)].tolist()
        *waited, padding, pixels = numbers[len(names) : -len(LEFT_OUT)].tolist()
        dropped = numbers[-len(LEFT_OUT) :].tolist()
        means = {n: total / self._applied for n, total in zip(names, totals, strict=True)}
        ranks_and_steps = dist.get_world_size() * self.steps
        values = {
            "loss": sum(means.values()) if means else None,
            **means,
            "learning_rate": rate,
            **self._last,
            "images_per_second": section.batch_size / seconds,
            **{n: wait / ranks_and_steps for n, wait in zip(self._waits, waited, strict=True)},
            "padding": padding / pixels,
            "seconds": seconds,
            "steps": self.steps,
            **_memory(device),
            "samples": dict(self._samples),
            "dropped": {
                reason: int(count) for reason, count in zip(LEFT_OUT, dropped, strict=True) if count
            },
        }
        self._restart()
        return values

    def _restart(self) -> None:
        self._begun = time.perf_counter()
        self.steps, self._applied = 0, 0
        self._losses: dict[str, Tensor | float] = {}
        self._waits = dict.fromkeys(WAITS, 0.0)
        self._samples: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._padding, self._pixels = 0, 0
        self._last: dict[str, Any] = {"grad_norm": None, "stream": None}


def _memory(device: torch.device) -> dict[str, float]:
    """The largest memory that this process has held so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"memory_gb": kilobytes * 1024 / 1e9}
    if device.type == "cuda":
        memory["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return memory
