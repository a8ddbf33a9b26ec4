"""What Ray Train's controller is told to do and to say, without a cluster."""

import logging
from pathlib import Path
from typing import Any

import pytest
import ray
from near_office import Near
from ray.exceptions import OutOfMemoryError
from tiny_world import tiny_recipe

from pipeline.cluster import connection  # first: it sets what Ray reads
from pipeline.cluster.group import TrainingOffice
from pipeline.recipe import Recipe
from pipeline.training.manifest import MANIFEST, checkpoint_dir

assert connection is not None

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # noqa: E402
from ray.train.v2._internal.execution.controller.state import (  # noqa: E402
    RestartingState,
    RunningState,
)
from ray.train.v2.api.exceptions import WorkerGroupError  # noqa: E402

from pipeline.cluster.controller import Supervisor  # noqa: E402


@pytest.fixture()
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(ray, "nodes", list)
    return tiny_recipe(tmp_path, "controlled")


def begin(supervisor: Any, office: TrainingOffice, steps: int) -> None:
    supervisor.before_worker_group_start(None)
    for step in range(steps + 1):
        office.report((step, 8, ""))


def test_a_machine_without_memory_is_named_and_tried_once_more(recipe: Recipe) -> None:
    office = TrainingOffice()
    supervisor = Supervisor(Near(office), recipe, recipe.run_dir)
    full = WorkerHealthCheckFailedError("failed", failure=OutOfMemoryError("node is low"))
    killed = WorkerGroupError("lost", {1: full})
    for steps in (3, 1):  # Others may have used it up: the run goes on.
        begin(supervisor, office, steps)
        supervisor.after_controller_state_update(
            RunningState(), RestartingState(training_failed_error=killed)
        )
        assert office.error() is None
    said = [text for level, text in office.news()[1] if level == logging.WARNING]
    assert (
        "rank 1 was ended by Ray, for the memory of its machine was used up; restart 1" in said[0]
    )
    begin(supervisor, office, 0)
    supervisor.after_controller_state_update(
        RunningState(), RestartingState(training_failed_error=killed)
    )
    error = office.error()
    assert error is not None and error[0] == "MemoryExceeded" and "micro_batch" in error[1]


def test_a_damaged_manifest_is_passed_over_in_words(recipe: Recipe) -> None:
    supervisor = Supervisor(None, recipe, recipe.run_dir)
    assert supervisor._from_checkpoint() == "from the beginning"
    for step, text in ((2, "{"), (4, "[]")):
        checkpoint_dir(recipe.run_dir, step).mkdir(parents=True)
        (checkpoint_dir(recipe.run_dir, step) / MANIFEST).write_text(text)
    (checkpoint_dir(recipe.run_dir, 6) / MANIFEST).mkdir(parents=True)
    assert supervisor._from_checkpoint() == "from the beginning"
