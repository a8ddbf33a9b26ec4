"""Who is named when a run stands still, and what failures are called."""

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from near_office import Near
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

from pipeline.cluster import (
    connection,  # first: it sets what Ray reads
    group,
    watch,
)
from pipeline.cluster.group import Beat, TrainingOffice
from pipeline.cluster.watch import (
    MARGIN_S,
    NEVER_S,
    Watch,
    end_process,
    find_hang,
    rendezvous_timeout_s,
)
from pipeline.recipe import Cluster
from pipeline.training.whereabouts import Whereabouts

assert connection is not None and ray is not None

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # noqa: E402
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError  # noqa: E402
from ray.train.v2.api.preemption import PreemptionInfo  # noqa: E402

from pipeline.cluster.failures import (  # noqa: E402
    describe_failures,
    is_preemption,
    lost_ranks,
    out_of_memory,
)

WAITS = Beat(0, 10, 1.0, "a" * 8, "10.0.0.1", 12, "agreement", 2, True, 605.0)
WORKS = Beat(1, 11, 1.0, "b" * 8, "10.0.0.2", 12, "data", 1, False, 613.0)
GONE = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())


def test_who_works_while_others_wait_is_named() -> None:
    hang = find_hang([(WAITS, 0.5), (WORKS, 0.5)], 600)
    assert hang is not None and str(hang) == (
        "rank 1 (pid 11, node 10.0.0.2) is in 'data' of step 12 since 614 s; the other ranks are "
        "in 'agreement' of step 12"
    )


def test_who_does_not_beat_is_named_wherever_it_seems_to_be() -> None:
    stopped = replace(WAITS, rank=2, idle_s=0.2)
    hang = find_hang([(WAITS, 0.5), (WORKS, 0.5), (stopped, 640.0)], 600)
    assert hang is not None and hang.culprit is stopped
    assert "has not answered for 640 s" in str(hang)


def test_where_all_work_who_is_furthest_behind_is_named() -> None:
    ahead = replace(WORKS, rank=2, stage="backward", stages=4)
    later = replace(WORKS, rank=3, step=13, stages=0)
    hang = find_hang([(ahead, 0.1), (WORKS, 0.1), (later, 0.1)], 600)
    assert hang is not None and hang.culprit is WORKS
    deadlock = find_hang([(replace(WAITS, rank=3), 0.1), (WAITS, 0.1)], 600)
    assert deadlock is not None and deadlock.culprit is WAITS


def test_while_anybody_moves_nobody_hangs() -> None:
    moving = replace(WORKS, rank=2, stage="writing the checkpoint", idle_s=599.0)
    assert find_hang([(WAITS, 0.5), (WORKS, 0.5), (moving, 0.5)], 600) is None
    assert find_hang([], 600) is None


def test_a_stage_that_begins_is_progress_and_a_new_step_counts_anew() -> None:
    whereabouts = Whereabouts()
    whereabouts.enter("data", 3)
    whereabouts.enter("agreement", waits=True)
    first = whereabouts.note()
    whereabouts.enter("forward")
    second = whereabouts.note()
    assert (first.step, first.stage, first.stages, first.waits) == (3, "agreement", 1, True)
    assert (second.stage, second.stages, second.waits) == ("forward", 2, False)
    assert second.since >= first.since
    whereabouts.move()
    third = whereabouts.note()
    assert third.since > second.since and replace(third, since=second.since) == second
    whereabouts.enter("data", 4)
    assert (whereabouts.note().step, whereabouts.note().stages) == (4, 0)


def test_ranks_look_for_each_other_longer_than_a_stage_may_take() -> None:
    assert rendezvous_timeout_s(Cluster(hang_timeout=700)) == 700 + MARGIN_S
    for off in (0, None):
        assert rendezvous_timeout_s(Cluster(hang_timeout=off)) == NEVER_S


def test_beats_of_workers_that_are_gone_are_forgotten() -> None:
    office = TrainingOffice()
    office.begin_group()
    office.beat(1, WAITS)
    office.beat(1, WORKS)
    assert [beat.rank for beat, _ in office.beats()] == [0, 1]
    assert not office.leave(1, 1), "it was not called back"
    office.beat(1, WORKS)
    office.beat(0, replace(WORKS, rank=7))
    assert [beat.rank for beat, _ in office.beats()] == [0] and office.num_left() == 1
    office.end_group(1)
    office.beat(1, WAITS)
    assert office.beats() == []
    assert office.begin_group() == 2
    office.beat(2, WORKS)
    office.end_group(1)
    assert [beat.rank for beat, _ in office.beats()] == [1] and office.num_left() == 0
    office.begin_group()
    assert office.beats() == []


def test_workers_that_are_called_back_wait_unless_the_run_is_to_stop() -> None:
    office = TrainingOffice()
    office.begin_group()
    assert not office.report((1, 2, ""))
    office.recall()
    assert office.report((1, 2, "")) and office.leave(1, 0)
    office.stop()
    assert not office.leave(1, 1)
    office.begin_group()
    assert office.leave(1, 1), "one of a group that is over has nothing to say"
    assert office.report((1, 2, "")), "the wish to stop outlives a group"


def test_a_process_is_ended_unless_another_has_its_number() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    created = psutil.Process(process.pid).create_time()
    assert not end_process(process.pid, created - 3600) and process.poll() is None
    assert end_process(process.pid, created + 5), "the clock was set by 5 s meanwhile"
    assert process.wait(timeout=60) == -9
    assert end_process(process.pid, created), "it is gone already"


def test_the_watch_looks_again_after_a_kill_that_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(watch, "END_PATIENCE_S", 0.0)
    outcomes = [False, True]
    monkeypatch.setattr(watch, "_end", lambda _: outcomes.pop(0))
    office = TrainingOffice()
    office.begin_group()
    office.beat(1, WORKS)
    looker = Watch(Near(office), 600)
    looker.look()
    assert len(outcomes) == 1 and len(office.beats()) == 1, "it still hangs"
    looker.look()
    assert not outcomes and office.beats() == []
    looker.look()


@pytest.mark.parametrize("timeout_s", [600, None])
def test_a_stall_is_told_less_and_less_often_and_anew_after_progress(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, timeout_s: float | None
) -> None:
    monkeypatch.setattr(watch.ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(watch, "_end", lambda _: pytest.fail("ended before its time"))
    office = TrainingOffice()
    office.begin_group()
    looker = Watch(Near(office), timeout_s)

    def told(idle_s: float) -> bool:
        caplog.clear()
        office.beat(1, replace(WORKS, idle_s=idle_s))
        monkeypatch.setattr(looker, "_next", 0.0)
        looker.look()
        return "no progress: rank 1 (pid 11, node 10.0.0.2) is in 'data'" in caplog.text

    for idle_s, expected in ((59, False), (61, True), (119, False), (121, True), (239, False)):
        assert told(idle_s) is expected, idle_s
    assert not told(0) and told(61)


def test_an_office_that_is_away_for_a_moment_ends_no_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def get(_: Any, **__: Any) -> None:
        asked.append(1)
        if len(asked) < 4:
            raise ActorUnavailableError("connection reset", None)
        raise ActorDiedError

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(group.ray, "get", get)
    monkeypatch.setattr(group.os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(SystemExit, match="75"):
        group.wait_for_end(Near(TrainingOffice()))
    assert len(asked) == 4


def worker(pid: int) -> Any:
    return SimpleNamespace(pid=pid, node_ip="10.0.0.9", node_id=f"node {pid}")


def test_a_lost_rank_is_named_and_not_those_that_lack_it() -> None:
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    failures = {0: peer, 1: GONE}
    workers = {0: worker(5), 1: worker(6)}
    said = describe_failures(failures, workers, ["node 5", "node 6"])
    assert said == "rank 1 (pid 6, node 10.0.0.9) was lost: its process ended"
    said = describe_failures(failures, workers, ["node 5"])
    assert said == "rank 1 (pid 6, node 10.0.0.9) was lost with its node"
    assert lost_ranks(failures) == [0, 1] and lost_ranks({0: peer}) == [0]
    said = describe_failures({0: peer}, workers, ["node 5"])
    assert said == "rank 1 (pid 6, node 10.0.0.9) was lost with its node"
    said = describe_failures({0: peer}, workers, ["node 5", "node 6"])
    assert said == "rank 0 (pid 5, node 10.0.0.9) lost its connection to another rank"
    fault = TypeError("a fault of ours")
    assert lost_ranks({0: fault}) == []
    said = describe_failures({0: peer, 1: fault}, {}, [])
    assert said == "rank 1 raised TypeError: a fault of ours"


def test_preemption_and_memory_are_told_apart_from_other_losses() -> None:
    info = PreemptionInfo(None, {"a": [0]})
    assert is_preemption(PreemptionError(info))
    assert not is_preemption(WorkerGroupError("lost", {1: GONE}))
    full = WorkerHealthCheckFailedError("failed", failure=OutOfMemoryError("node is low"))
    assert out_of_memory({0: GONE, 1: full}) == 1 and out_of_memory({0: GONE}) is None


@pytest.mark.parametrize("workers", [2, [1, 2], [3, 3]])
def test_workers_are_a_number_or_a_range(workers: int | list[int]) -> None:
    section = Cluster.model_validate({"workers": workers})
    low, high = (workers, workers) if isinstance(workers, int) else workers
    assert (section.min_workers, section.max_workers) == (low, high)
    assert section.is_elastic is isinstance(workers, list)
