"""What a run writes while it trains: metrics.jsonl, TensorBoard, recipe.yaml, environment.json."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.stream import StepBatches
from pipeline.errors import StorageError
from pipeline.recipe import Recipe, Training
from pipeline.training.manifest import write_atomically
from pipeline.training.sinks import open_sinks

METRICS = "metrics.jsonl"


class RunLog:
    """One open log of a run, for one rank. Lines of steps after `step`, which a resumed run does
    again, are removed first."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        run_dir = recipe.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
        if not (run_dir / "environment.json").exists():
            text = json.dumps(environment(), indent=1)
            write_atomically(run_dir / "environment.json", text)
        remove_lines_after(run_dir / METRICS, step)
        self._run_dir = run_dir
        self._sinks = open_sinks(recipe, step)
        (run_dir / METRICS).touch()
        self._read = (run_dir / METRICS).stat().st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pass_on()
        for sink in self._sinks:
            sink.close()

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers go to the sinks too, and those of evaluations since the last."""
        append_event(self._run_dir, event, step, values)
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the sinks what was appended to metrics.jsonl, by this process or by another."""
        with (self._run_dir / METRICS).open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # Another process is still writing it.
            self._read += len(line)
            event = json.loads(line)
            for sink in self._sinks:
                sink.write(event["step"], sink_values(event))


def append_event(run_dir: Path, event: str, step: int, values: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl, whole and at once, whoever else appends."""
    line = json.dumps({"event": event, "step": step, **values}) + "\n"
    descriptor = os.open(run_dir / METRICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def sink_values(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line, under the names that they have in the sinks.

    Figures of an evaluation on a subset are named apart from those on all images.
    """
    prefix = ""
    if event["event"] == "evaluation":
        prefix = "evaluation_subset/" if "subset" in event else "evaluation/"
    return {
        prefix + name: float(value)
        for name, value in event.items()
        if name not in ("event", "step") and isinstance(value, int | float)
    }


def remove_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, and no line that a kill cut short."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if _line_step(line) <= step]
    wanted = "".join(line + "\n" for line in kept)
    if wanted != text:
        write_atomically(path, wanted)


def environment() -> dict[str, Any]:
    """Machine and versions, for whoever wants to reproduce the run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "world_size": dist.get_world_size(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {
            distribution.name: distribution.version
            for distribution in sorted(
                importlib.metadata.distributions(), key=lambda found: found.name.lower()
            )
        },
    }


def _memory(device: torch.device) -> dict[str, float]:
    """The largest memory that this process has held so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"memory_gb": kilobytes * 1024 / 1e9}
    if device.type == "cuda":
        memory["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return memory


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


@contextmanager
def run_lock(run_dir: Path, patience_s: float = 30.0) -> Iterator[None]:
    """Hold a run directory against any other process, for as long as this one lives.

    Workers of a driver that was killed need some seconds to go, so it waits; raises `StorageError`
    after `patience_s` seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with (run_dir / ".lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"another process is training in {run_dir}; wait for it or stop it"
                    ) from None
                time.sleep(0.2)
        yield


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
        waits = [torch.tensor(wait, device=device).double() for wait in self._waits.values()]
        numbers = torch.stack([*sums, *waits])
        dist.all_reduce(numbers)
        totals, waited = numbers.tolist()[: len(names)], numbers.tolist()[len(names) :]
        means = {n: total / self._applied for n, total in zip(names, totals, strict=True)}
        ranks_and_steps = dist.get_world_size() * self.steps
        values = {
            "loss": sum(means.values()) if means else None,
            **means,
            "learning_rate": rate,
            **self._last,
            "images_per_second": section.batch_size / seconds,
            **{n: wait / ranks_and_steps for n, wait in zip(self._waits, waited, strict=True)},
            "seconds": seconds,
            "steps": self.steps,
            **_memory(device),
            "samples": dict(self._samples),
        }
        self._restart()
        return values

    def _restart(self) -> None:
        self._begun = time.perf_counter()
        self.steps, self._applied = 0, 0
        self._losses: dict[str, Tensor | float] = {}
        self._waits = dict.fromkeys(WAITS, 0.0)
        self._samples: Counter[str] = Counter()
        self._last: dict[str, Any] = {"grad_norm": None, "stream": None}
