"""Where figures go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio; by recipe.

Only one process of a run writes to them at a time, the one that holds the run: the first trainer
while there is one, which also passes on the figures of evaluations, else an evaluation.
"""

import importlib
import logging
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.training.manifest import write_atomically

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the numbers of one step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add them; steps may come late, as those of evaluations do."""

    def close(self) -> None:
        """Write what is still held back."""


def open_sinks(recipe: Recipe, step: int | None = None) -> list[Sink]:
    """The sinks that the recipe names; with `step`, TensorBoard forgets what comes after it.

    Raises `RecipeError` when the package of one is not installed; one that cannot be opened for
    another reason is left out with a warning.
    """
    section = recipe.logging
    wanted: list[Callable[[], Sink]] = []
    if section.tensorboard:
        wanted.append(lambda: TensorBoardSink(recipe.run_dir / "tensorboard", step))
    if section.wandb is not None:
        wanted.append(partial(WandbSink, section.wandb, recipe))
    if section.trackio is not None:
        wanted.append(partial(TrackioSink, section.trackio, recipe))
    sinks = []
    for make in wanted:
        try:
            sinks.append(make())
        except RecipeError:
            raise
        except Exception as error:  # whatever a service's client raises: no network, no key
            logger.warning("figures go to one sink less, it cannot be opened: %s", error)
    return sinks


class TensorBoardSink:
    """Event files in the run directory."""

    def __init__(self, folder: Path, step: int | None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class WandbSink:
    """One Weights & Biases run, taken up again by its id; `WANDB_MODE=offline` needs no network."""

    def __init__(self, project: str, recipe: Recipe) -> None:
        self._run = _import("wandb", "logging.wandb").init(
            project=project,
            name=recipe.name,
            id=_run_id(recipe.run_dir),
            resume="allow",
            dir=str(recipe.run_dir),
            config=recipe.model_dump(mode="json"),
        )
        # Its own step only goes forward, and evaluations come late.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


class TrackioSink:
    """One trackio run, kept on this machine."""

    def __init__(self, project: str, recipe: Recipe) -> None:
        self._package = _import("trackio", "logging.trackio")
        self._package.init(
            project=project,
            name=f"{recipe.name}-{_run_id(recipe.run_dir)}",
            config=recipe.model_dump(mode="json"),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._package.finish()


def _import(package: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RecipeError(
            f"{key} is set, but {package} cannot be imported ({error}); `pip install {package}`, "
            f"or set {key} to null"
        ) from None


def _run_id(run_dir: Path) -> str:
    """What other services know this run directory by, now and after a restart."""
    path = run_dir / "run_id"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
