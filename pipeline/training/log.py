"""What a run writes while it trains: metrics.jsonl, TensorBoard, recipe.yaml, environment.json."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.data.stream import StepBatches
from pipeline.errors import StorageError
from pipeline.recipe import Recipe, Training
from pipeline.training.manifest import write_atomically

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
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append one line, whole and at once; numbers of a step go to TensorBoard too."""
        line = json.dumps({"event": event, "step": step, **values})
        self._file.write(line + "\n")
        self._file.flush()
        if event == "step":
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
            self._board.flush()


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


class Window:
    """Sums over the steps since the last metrics line; every rank has one."""

    def __init__(self) -> None:
        self._restart()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `data_wait` or `teacher_wait`."""
        begun = time.perf_counter()
        yield
        self._waits[name] += time.perf_counter() - begun

    def add(self, batches: StepBatches, losses: Mapping[str, Tensor], norm: float) -> None:
        """Count a step; losses of one that was skipped (`norm` not finite) are left out."""
        self._steps += 1
        self._samples.update(batches.sources)
        self._last["stream"] = batches.stream
        if math.isfinite(norm):
            self._applied += 1
            self._last["grad_norm"] = norm
            for name, loss in losses.items():
                self._losses[name] = self._losses.get(name, 0.0) + loss

    def values(self, section: Training, rate: float, device: torch.device) -> dict[str, Any]:
        """Means per step over all ranks, for a metrics line; starts the next window."""
        seconds = (time.perf_counter() - self._begun) / self._steps
        names = sorted(self._losses)
        sums = [torch.as_tensor(self._losses[name], device=device).double() for name in names]
        waits = [torch.tensor(wait, device=device).double() for wait in self._waits.values()]
        numbers = torch.stack([*sums, *waits])
        dist.all_reduce(numbers)
        *totals, data_wait, teacher_wait = numbers.tolist()
        means = {n: total / self._applied for n, total in zip(names, totals, strict=True)}
        ranks_and_steps = dist.get_world_size() * self._steps
        values = {
            "loss": sum(means.values()) if means else None,
            **means,
            "learning_rate": rate,
            **self._last,
            "images_per_second": section.batch_size / seconds,
            "data_wait": data_wait / ranks_and_steps,
            "teacher_wait": teacher_wait / ranks_and_steps,
            "seconds": seconds,
            "samples": dict(self._samples),
        }
        self._restart()
        return values

    def _restart(self) -> None:
        self._begun = time.perf_counter()
        self._steps, self._applied = 0, 0
        self._losses: dict[str, Tensor | float] = {}
        self._waits = {"data_wait": 0.0, "teacher_wait": 0.0}
        self._samples: Counter[str] = Counter()
        self._last: dict[str, Any] = {"grad_norm": None, "stream": None}
