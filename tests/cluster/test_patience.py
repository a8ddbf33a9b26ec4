"""How long places for workers, and workers that are called back, are waited for; no cluster."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from near_office import Near
from tiny_world import tiny_recipe

from pipeline.cluster import connection  # first: it sets what Ray reads
from pipeline.cluster.group import Beat, TrainingOffice
from pipeline.errors import ClusterError

assert connection is not None

from ray.train import FailureConfig  # noqa: E402
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError  # noqa: E402
from ray.train.v2._internal.execution.controller.state import (  # noqa: E402
    ReschedulingState,
    ResizingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision  # noqa: E402
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision  # noqa: E402
from ray.train.v2.api.exceptions import ControllerError  # noqa: E402

from pipeline.cluster.controller import (  # noqa: E402
    RESOURCES_PATIENCE_S,
    SAVE_PATIENCE_S,
    SAY_AGAIN_S,
    Supervisor,
)
from pipeline.cluster.elastic import StartsAgain  # noqa: E402
from pipeline.cluster.watch import SILENT_S  # noqa: E402


class Clock:
    """Time that passes only where it is set, and in sleep, after which `then` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.then: Callable[[], None] = lambda: None
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(ray, "nodes", list)
    return Clock(monkeypatch)


def begin(office: TrainingOffice, folder: Path) -> Supervisor:
    """Of two workers that are there."""
    recipe = tiny_recipe(folder, "waits")
    supervisor = Supervisor(Near(office), recipe, recipe.run_dir)
    ranks = [SimpleNamespace(world_rank=rank) for rank in range(2)]
    workers = [SimpleNamespace(distributed_context=one, metadata=None) for one in ranks]
    supervisor.before_worker_group_start(None)
    supervisor.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    supervisor.after_worker_group_training_start(None)
    return supervisor


def warnings(office: TrainingOffice) -> list[str]:
    return [text for level, text in office.news()[1] if level == logging.WARNING]


def test_places_are_waited_for_half_an_hour_and_no_longer(clock: Clock, tmp_path: Path) -> None:
    office = TrainingOffice()
    supervisor = begin(office, tmp_path)
    lacking = ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2)))

    def look(now: float) -> list[str]:
        clock.now = now
        supervisor.after_controller_state_update(SchedulingState(None), lacking)
        return warnings(office)

    for begun in (0.0, 5000.0):  # The second time counts anew.
        supervisor.after_worker_group_training_start(None)
        [said] = look(begun)
        assert "waiting since 0 s for places for 2 workers of 1 CPUs each" in said
        assert "at most 30 minutes" in said
        assert look(begun + SAY_AGAIN_S - 1) == []
        assert len(look(begun + SAY_AGAIN_S + 1)) == 1
        look(begun + RESOURCES_PATIENCE_S)
    with pytest.raises(ClusterError) as caught:
        look(5000.0 + RESOURCES_PATIENCE_S + 1)
    assert caught.value.exit_code == 75 and "waited for 30 minutes" in str(caught.value)
    assert office.error() == ("ClusterError", str(caught.value))
    policy = StartsAgain(FailureConfig(max_failures=9), Near(office))
    assert policy.make_decision(ControllerError(caught.value)) is FailureDecision.RAISE


def call_back(clock: Clock, folder: Path, moves_until: float, beats_until: float) -> list[str]:
    """All are asked to save: rank 0 has at 10 s, rank 1 at 1000 s if it moves until then."""
    office = TrainingOffice()
    supervisor = begin(office, folder)

    def work() -> None:
        for rank, ends in ((0, 10.0), (1, 1000.0)):
            if clock.now > ends and (rank == 0 or moves_until > ends):
                office.leave(1, rank)
            elif clock.now <= beats_until:
                idle = max(0.0, clock.now - moves_until)
                office.beat(1, Beat(rank, rank, 0.0, "a", "a", 1, "step", 1, False, idle))

    clock.then = work
    decision = ResizeDecision(num_workers=3, resources_per_worker={})
    supervisor.after_controller_state_update(RunningState(), ResizingState(decision))
    return warnings(office)


@pytest.mark.parametrize(
    ("moves_until", "beats_until", "waited"),
    [(2000.0, 2000.0, 1000.0), (40.0, 2000.0, 40 + SAVE_PATIENCE_S), (2000.0, 5.0, 5 + SILENT_S)],
)
def test_who_is_called_back_is_waited_for_while_it_moves(
    clock: Clock, tmp_path: Path, moves_until: float, beats_until: float, waited: float
) -> None:
    said = call_back(clock, tmp_path, moves_until, beats_until)
    assert clock.now == pytest.approx(waited, abs=1.0)
    assert said == ([] if waited == 1000 else ["not all workers have saved; their steps are lost"])
