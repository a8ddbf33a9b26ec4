"""What a run writes while it trains: recipe.yaml, environment.json, metrics.jsonl and the sinks."""

import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from pipeline.data.images import decoder_name
from pipeline.data.vocabulary.category_map import CategoryMap
from pipeline.detectors.sampling import kernel_in_use
from pipeline.errors import StorageError
from pipeline.recipe import Recipe
from pipeline.training.device import worker_device
from pipeline.training.locks import open_lock, try_lock
from pipeline.training.manifest import write_atomically
from pipeline.training.metrics import SinkFeed, append_event, remove_lines_after

logger = logging.getLogger(__name__)

LOCK_PATIENCE_S = 180.0
"""How long another process may hold the run directory: one of a killed driver takes seconds to go,
and the lock of a lost machine stays at a file server until that gives its client up."""
SAY_S = 10.0
"""Seconds of waiting for it after which the log says so."""


class RunLog:
    """One open log of a run, for one rank. Lines of steps after `step`, which a resumed run does
    again, are removed first."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        self._run_dir = run_dir = recipe.run_dir
        write_atomically(run_dir / "recipe.yaml", recipe.to_yaml())
        write_atomically(run_dir / "environment.json", json.dumps(environment(recipe), indent=1))
        remove_lines_after(run_dir, step)
        for source in (*recipe.data.train, *recipe.data.extra):
            if absent := recipe.terms_left_out(source):
                logger.info("source %s: %s", source.name, absent)
        self._feed = SinkFeed(recipe, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.close()

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Append one line; the sinks get it too, and those of evaluations since the last."""
        append_event(self._run_dir, event, step, values)
        self._feed.pass_on()


def write_category_maps(run_dir: Path, maps: Mapping[str, CategoryMap]) -> None:
    """`category_maps/SOURCE.csv` of each source whose categories are not the detector's own."""
    for name, found in maps.items():
        if not found.is_identity:
            write_atomically(run_dir / "category_maps" / f"{name}.csv", found.to_csv())


def environment(recipe: Recipe) -> dict[str, Any]:
    """Machine and versions, for whoever wants to reproduce the run."""
    precision: torch.dtype = getattr(torch, recipe.training.precision)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "world_size": dist.get_world_size(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "deformable_attention": kernel_in_use(
            worker_device(recipe), recipe.detector.kernel, precision
        ),
        "jpeg_decoder": decoder_name(),
        "packages": {
            distribution.name: distribution.version
            for distribution in sorted(
                importlib.metadata.distributions(), key=lambda found: found.name.lower()
            )
        },
    }


@contextmanager
def run_lock(run_dir: Path, patience_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
    """Hold a run directory against any other process, for as long as this one lives.

    Raises `StorageError` when another holds it for `patience_s` seconds, and where it cannot be
    written or locked.
    """
    begun, said = time.monotonic(), False
    deadline = begun + patience_s
    with open_lock(run_dir / ".lock") as file:
        while not try_lock(file):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"another process is training in {run_dir}; wait for it or stop it"
                )
            if not said and time.monotonic() > begun + SAY_S:
                said = True
                logger.info("%s is held by another process; waiting for it to end", run_dir)
            time.sleep(0.2)
        yield
