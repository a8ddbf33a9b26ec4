"""What Ray Train's controller is told to do and to say, without a cluster."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from near_office import Near
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from tiny_world import tiny_recipe
from torch.distributed import DistStoreError

from pipeline.cluster import connection  # first: it sets what Ray reads
from pipeline.cluster.group import TrainingOffice
from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.recipe import Recipe
from pipeline.training.checkpoint import first_manifest
from pipeline.training.manifest import (
    MANIFEST,
    checkpoint_dir,
    newest_verified,
    publish,
    read_manifest,
)

assert connection is not None

from ray.train import FailureConfig, ScalingConfig  # noqa: E402
from ray.train.v2._internal.exceptions import (  # noqa: E402
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import (  # noqa: E402
    ErroredState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision  # noqa: E402
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision  # noqa: E402
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError  # noqa: E402

from pipeline.cluster import elastic  # noqa: E402
from pipeline.cluster.controller import Supervisor  # noqa: E402
from pipeline.cluster.elastic import NodesThatStay, StartsAgain  # noqa: E402


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
    with pytest.raises(WorkerGroupError) as caught:
        supervisor.after_controller_state_update(
            RunningState(), RestartingState(training_failed_error=killed)
        )
    error = office.error()
    assert error is not None and error[0] == "MemoryExceeded" and "micro_batch" in error[1]
    policy = StartsAgain(FailureConfig(max_failures=9), Near(office))
    assert policy.make_decision(ControllerError(caught.value)) is FailureDecision.RAISE


def test_an_unreadable_manifest_is_passed_over_in_words_as_by_the_workers(recipe: Recipe) -> None:
    supervisor = Supervisor(None, recipe, recipe.run_dir)
    assert supervisor._from_checkpoint() == "from the beginning"
    good = checkpoint_dir(recipe.run_dir, 1)
    publish(good, first_manifest(recipe, Vocabulary([])), lambda _: None)
    for step, text in ((2, "{"), (4, "[]")):
        checkpoint_dir(recipe.run_dir, step).mkdir(parents=True)
        (checkpoint_dir(recipe.run_dir, step) / MANIFEST).write_text(text)
    (checkpoint_dir(recipe.run_dir, 6) / MANIFEST).mkdir(parents=True)
    checkpoint_dir(recipe.run_dir, 8).touch()
    assert newest_verified(recipe.run_dir) == good
    assert supervisor._from_checkpoint() == f"from step {read_manifest(good).step}"


def test_a_rank_that_was_ended_is_named_and_not_who_lacks_it(recipe: Recipe) -> None:
    office = TrainingOffice()
    supervisor = Supervisor(Near(office), recipe, recipe.run_dir)
    lacks = WorkerGroupError("lost", {0: RuntimeError("Connection closed by peer")})
    supervisor.before_worker_group_start(None)
    assert supervisor._describe(lacks) == "rank 0 lost its connection to another rank"
    office.blame(1, 1)
    assert supervisor._describe(lacks) == "rank 1 was lost: its process ended"
    supervisor.before_worker_group_start(None)
    office.blame(1, 1)
    assert "rank 0" in supervisor._describe(lacks), "that was a group before"


def test_what_a_starting_group_loses_is_counted_and_its_places_are_free(recipe: Recipe) -> None:
    gone = WorkerGroupStartupFailedError("At least one failed")
    gone.__cause__ = ActorDiedError()
    broken = RayTaskError("setup", "", DistStoreError("timed out after 9s")).as_instanceof_cause()
    fault = RayTaskError("setup", "", TypeError("a fault of ours")).as_instanceof_cause()
    policy = StartsAgain(FailureConfig(max_failures=2), Near(TrainingOffice()))
    assert policy.make_decision(ControllerError(fault)) is FailureDecision.RAISE
    losses = [ControllerError(one) for one in (gone, broken, ActorDiedError())]
    no_places = ControllerError(WorkerGroupStartupTimeoutError(2))
    for loss in losses[:2]:
        assert policy.make_decision(no_places) is FailureDecision.RETRY
        assert policy.make_decision(loss) is FailureDecision.RETRY
    assert policy.make_decision(losses[2]) is FailureDecision.RAISE

    office, ended = TrainingOffice(), []
    supervisor = Supervisor(Near(office), recipe, recipe.run_dir)
    group = SimpleNamespace(
        get_workers=list, has_started=lambda: True, abort=lambda: ended.append(1)
    )
    for number, loss in enumerate(losses, start=1):
        supervisor.before_worker_group_start(None)
        supervisor.after_worker_group_start(group)
        supervisor.after_controller_state_update(SchedulingState(None), ReschedulingState(loss))
        assert len(ended) == number and not office.is_there()
    said = [text for level, text in office.news()[1] if level == logging.WARNING]
    words = ("was lost: its process ended", "lost its connection to another rank")
    for text, what, number in zip(said, (*words, words[0]), (1, 2, 3), strict=True):
        assert f"while the workers started, one {what}; restart {number} of 3" in text
    supervisor.after_controller_state_update(
        SchedulingState(None), ShuttingDownState(next_state=ErroredState(losses[0]))
    )
    error = office.error()
    assert error is not None and error[0] == "ClusterError" and "loss 4 of workers" in error[1]
    assert len(ended) == 3, "there is none that starts"


def test_what_a_worker_has_told_ends_the_run_and_is_not_tried_again(recipe: Recipe) -> None:
    office = TrainingOffice()
    policy = StartsAgain(FailureConfig(max_failures=2), Near(office))
    raised = WorkerGroupError("failed", {0: TypeError("a shard is damaged")})
    assert policy.make_decision(raised) is FailureDecision.RETRY
    office.fail("StorageError", "a shard is damaged")
    assert policy.make_decision(raised) is FailureDecision.RAISE

    supervisor = Supervisor(Near(office), recipe, recipe.run_dir)
    supervisor.after_controller_state_update(
        RunningState(), ShuttingDownState(next_state=ErroredState(raised))
    )
    assert office.error() == ("StorageError", "a shard is damaged"), "and no other is told"


free: dict[str, float] = {}
"""CPUs that are free on each node."""


def policy_of(
    office: TrainingOffice,
    cpus: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    teachers: Sequence[bool] = (),
) -> NodesThatStay:
    """`teachers`: which of them live."""
    free.clear()
    free.update(cpus)
    found = {node: {"NodeID": node, "Alive": True} for node in (*cpus, "lost")}
    monkeypatch.setattr(ray, "nodes", lambda: list(found.values()))
    monkeypatch.setattr(elastic, "_answers", lambda node: node["NodeID"] != "lost")
    monkeypatch.setattr(elastic, "draining_nodes", lambda: {"leaving": 0})
    monkeypatch.setattr(
        elastic.ray_state,
        "available_resources_per_node",
        lambda: {node: {"CPU": number} for node, number in (free | {"lost": 8.0}).items()},
    )
    monkeypatch.setattr(NodesThatStay, "_maybe_send_resource_request", lambda _: None)
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1})
    monkeypatch.setattr(elastic, "_is_alive", lambda lives: lives)
    return NodesThatStay(scaling, Near(office), recipe, teachers)


def group_on(*nodes: str) -> Any:
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
    return SimpleNamespace(workers=workers, num_workers=len(workers), start_time=float("-inf"))


def test_places_are_free_or_held_by_the_group_of_before(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On nodes that answer and are not about to be taken away."""
    cpus = {"a": 1.0, "b": 0.5, "leaving": 4.0}
    policy = policy_of(TrainingOffice(), cpus, monkeypatch, recipe)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    policy.make_decision_for_running_worker_group(group_on("b", "b", "leaving"), None)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    policy.after_controller_state_update(None, ReschedulingState(None))
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1


def test_places_of_teachers_and_evaluations_are_left_to_them(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = recipe.teacher.model_copy(update={"cpus_per_actor": 0.5})
    evaluation = recipe.evaluation.model_copy(update={"every": 2, "cpus": 2})
    data = recipe.data.model_copy(update={"validation": recipe.data.train[0]})
    recipe = recipe.model_copy(update={"teacher": teacher})

    office = TrainingOffice()

    def count(changed: Recipe, *teachers: bool) -> int:
        cpus = {"a": 3.0, "b": 1.5, "c": 1.0}
        policy = policy_of(office, cpus, monkeypatch, changed, teachers)
        return int(policy.make_decision_for_non_running_worker_group().num_workers)

    assert count(recipe, True, True) == 5
    assert count(recipe, True, False) == 5, "it finds its place in what no worker can use"
    assert [count(recipe, *[False] * number) for number in (2, 3)] == [4, 4]
    live = recipe.model_copy(update={"evaluation": evaluation})
    assert count(live) == 5, "without data to evaluate on"
    live = live.model_copy(update={"data": data})
    assert count(live) == 3
    assert count(live, *[False] * 3) == 2, "teachers and evaluation"
    monkeypatch.setattr(ScalingConfig, "min_workers", 4)
    assert count(live) == 5, "it does not stop the training"
    office.evaluates(True)
    assert count(live) == 5, "it has its place already"


def test_growth_waits_until_it_is_settled_and_a_step_is_done(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = TrainingOffice()
    office.begin_group()
    policy = policy_of(office, {"a": 1.0, "b": 0.0}, monkeypatch, recipe)
    state = group_on("b")

    def look() -> int | None:
        policy._latest_monitor_time = float("-inf")
        decision = policy.make_decision_for_running_worker_group(state, None)
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    assert [look(), look()] == [None, None], "not a step is done"
    office.report((0, 8, ""))
    office.report((1, 8, ""))
    assert look() == 2
    free["a"] = 2.0
    assert [look(), look()] == [None, 3]
    free["a"] = 0.0
    assert [look(), look()] == [None, None], "as many as there are"
