"""What Ray Train's controller tells of a run: failures, restarts, waiting, notices of preemption.

`Supervisor` is called by the controller, in its process, which is on the driver's node.
"""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    ShuttingDownState,
)
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipeline.cluster.elastic import answering_nodes, draining_nodes, nodes_that_stay
from pipeline.cluster.failures import (
    describe_failures,
    in_words,
    is_gone,
    is_preemption,
    lost_at_start,
    lost_ranks,
    out_of_memory,
)
from pipeline.cluster.watch import SILENT_S
from pipeline.errors import ClusterError, MemoryExceeded, StorageError
from pipeline.recipe import Recipe
from pipeline.training.manifest import list_checkpoints, read_manifest
from pipeline.training.out_of_memory import memory_advice

RESOURCES_PATIENCE_S = 1800.0
"""How long a run waits for places for its workers before it ends."""
SAY_AGAIN_S = 300.0
"""Seconds between two lines on that the run waits."""
SAVE_PATIENCE_S = 300.0
"""How long workers that are called back may stand still over their step and its checkpoint."""
_NOTICES_S = 1.0
_WAITING = (InitializingState, RestartingState, ReschedulingState)


class Supervisor(ControllerCallback, WorkerGroupCallback):
    """Tells the office what happens to the workers, and saves them from what is announced."""

    def __init__(self, office: Any, recipe: Recipe, run_dir: Path) -> None:
        self._office, self._recipe, self._run_dir = office, recipe, run_dir
        self._workers: dict[int, Any] = {}
        """Ray's metadata of each rank: pid, node_id, node_ip."""
        self._group = self._failures = 0
        self._starting: Any = None
        """Ray's group of workers, until its training has begun and Ray's controller has it."""
        self._lacked_memory = False
        """Whether Ray has ended a worker for its machine's memory, and no step was done since."""
        self._waiting: float | None = None
        self._said = self._looked = float("-inf")
        self._announced: set[str] = set()

    # The life of a group.

    def before_worker_group_start(self, _context: Any) -> None:
        self._group = ray.get(self._office.begin_group.remote())

    def after_worker_group_start(self, group: Any) -> None:
        self._starting = group
        self._workers = {
            worker.distributed_context.world_rank: worker.metadata for worker in group.get_workers()
        }

    def after_worker_group_training_start(self, group: Any) -> None:
        self._starting = None
        ray.get(self._office.start_group.remote())
        waited = "" if self._waiting is None else f" after {time.monotonic() - self._waiting:.0f} s"
        self._waiting, self._said = None, float("-inf")
        self._announced.clear()
        if waited or self._recipe.cluster.is_elastic:
            number = len(self._workers)
            begin = "1 worker begins" if number == 1 else f"{number} workers begin"
            self._say(logging.INFO, f"{begin}{waited}")

    def after_worker_group_poll_status(self, status: Any) -> None:
        now = time.monotonic()
        if now - self._looked > _NOTICES_S and not status.errors:
            self._looked = now
            with suppress(RayError):  # Looked at again soon.
                self._heed_notices()

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Keep workers from nodes that are lost or about to be; Ray knows of it only later."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        stay = nodes_that_stay()
        if not stay or len(stay) == len(alive):
            return None
        return {ray._raylet.RAY_NODE_ID_KEY: f"in({','.join(stay)})"}

    def after_controller_state_update(self, before: Any, state: Any) -> None:
        if isinstance(state, ReschedulingState | ShuttingDownState):
            self._free_places()
        if isinstance(state, ReschedulingState) and not isinstance(before, ReschedulingState):
            self._starts_again(state.training_failed_error)
        elif isinstance(state, RestartingState) and not isinstance(before, RestartingState):
            self._restarts(state.training_failed_error)
        elif isinstance(state, ResizingState):
            number = state.scaling_decision.num_workers
            self._say(logging.INFO, f"there is place for {number} workers: all save, to go on so")
            self._call_back()
        elif isinstance(state, ShuttingDownState) and isinstance(state.next_state, ErroredState):
            self._ends(state.next_state.training_failed_error)
        if isinstance(state, _WAITING):
            lost = isinstance(state, ReschedulingState) and lost_at_start(
                state.training_failed_error
            )
            self._wait(isinstance(state, ReschedulingState) and not lost)

    # What goes wrong.

    def _restarts(self, error: Exception) -> None:
        ray.get(self._office.end_group.remote(self._group))
        self._waiting = time.monotonic()
        if is_preemption(error):
            self._say(logging.INFO, f"the run goes on elsewhere, {self._from_checkpoint()}")
            return
        if not isinstance(error, WorkerGroupError):
            return
        if self._told_by_worker(error):
            raise error  # `StartsAgain` is asked anew, and ends the run.
        self._failures += 1
        what = self._describe(error)
        number = f"restart {self._failures} of {self._recipe.cluster.max_failures}"
        self._say(logging.WARNING, f"{what}; {number}, {self._from_checkpoint()}")

    def _free_places(self) -> None:
        """Of a group that failed while it started: Ray's controller does not know it, nor ends it.

        Ended as at an abort: what is set up may wait for ever for the worker that is gone.
        """
        group, self._starting = self._starting, None
        if group is not None and group.has_started():
            group.abort()

    def _starts_again(self, error: Exception) -> None:
        lost = lost_at_start(error)
        if lost is not None:
            ray.get(self._office.end_group.remote(self._group))
            self._failures += 1
            number = f"restart {self._failures} of {self._recipe.cluster.max_failures}"
            self._say(logging.WARNING, f"{_at_start(lost)}; {number}, {self._from_checkpoint()}")

    def _ends(self, error: Exception) -> None:
        lost = lost_at_start(error)
        if lost is not None and ray.get(self._office.error.remote()) is None:
            self._fail(self._too_often(_at_start(lost)))
        if not isinstance(error, WorkerGroupError) or self._told_by_worker(error):
            return
        if lost_ranks(error.worker_failures):
            self._fail(self._too_often(self._describe(error)))

    def _too_often(self, what: str) -> ClusterError:
        return ClusterError(
            f"{what}; that was loss {self._failures + 1} of workers, and cluster.max_failures is "
            f"{self._recipe.cluster.max_failures}. The same command goes on "
            f"{self._from_checkpoint()}"
        )

    def _told_by_worker(self, error: Any) -> bool:
        """Whether the run ends with an error that a worker has told, or that deaths tell.

        The memory of a machine may be used up by others: only a death that comes again says that
        this run needs too much.
        """
        if ray.get(self._office.error.remote()) is not None:
            return True
        again = self._lacked_memory and not ray.get(self._office.has_stepped.remote())
        killed = out_of_memory(error.worker_failures)
        self._lacked_memory = again or killed is not None
        if killed is None or not again:
            return False
        where = f"rank {killed} on node {self._place(killed)} was ended by Ray, for the memory of "
        what = f"{where}its machine was used up, for the second time without a step in between"
        self._fail(MemoryExceeded(memory_advice(self._recipe, what)))
        return True

    def _place(self, rank: int) -> str:
        return str(self._workers[rank].node_ip) if rank in self._workers else "unknown"

    # Waiting for places.

    def _wait(self, lacking: bool) -> None:
        """Say what is waited for, once a start has failed for it; give up after the patience."""
        now = time.monotonic()
        self._waiting = now if self._waiting is None else self._waiting
        seconds = now - self._waiting
        if not lacking and seconds < 5:
            return
        if now - self._said > SAY_AGAIN_S:
            self._said = now
            self._say(
                logging.WARNING,
                f"waiting since {seconds:.0f} s for {self._lacking()}; at most "
                f"{RESOURCES_PATIENCE_S / 60:.0f} minutes",
            )
        if seconds > RESOURCES_PATIENCE_S:
            error = ClusterError(
                f"the cluster had no {self._lacking()}, waited for {seconds / 60:.0f} minutes. "
                "Give it the nodes, or lower cluster.workers; the same command goes on "
                f"{self._from_checkpoint()}"
            )
            self._fail(error)
            raise error

    def _lacking(self) -> str:
        cluster = self._recipe.cluster
        each = f"{cluster.cpus_per_worker:g} CPUs"
        if cluster.gpus_per_worker:
            each += f" and {cluster.gpus_per_worker:g} GPUs"
        there = "Ray does not say what is free"
        with suppress(RayError):
            stay, free = nodes_that_stay(), ray.available_resources()
            there = (
                f"there are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free on "
                f"{len(stay)} nodes"
            )
        return f"places for {cluster.min_workers} workers of {each} each ({there})"

    # What is announced.

    def _heed_notices(self) -> None:
        """Save when a node is about to be taken away, and go on without it."""
        draining = {
            node: deadline
            for node, deadline in draining_nodes().items()
            if any(worker.node_id == node for worker in self._workers.values())
        }
        if not draining:
            return
        deadline_ms = min((one for one in draining.values() if one), default=None)
        if not draining.keys() <= self._announced:
            self._announced |= draining.keys()
            left = ""
            if deadline_ms is not None:
                left = f" in {deadline_ms / 1000 - time.time():.0f} s"
            hosts = {w.node_ip for w in self._workers.values() if w.node_id in draining}
            names = ", ".join(sorted(hosts))
            self._say(logging.WARNING, f"node {names} will be taken away{left}: all workers save")
            ray.get(self._office.recall.remote())
        late = deadline_ms is not None and time.time() * 1000 > deadline_ms
        if late or ray.get(self._office.num_left.remote()) == len(self._workers):
            ranks = {
                node: [rank for rank, worker in self._workers.items() if worker.node_id == node]
                for node in draining
            }
            raise PreemptionError(PreemptionInfo(deadline_ms, ranks), drain_timed_out=late)

    def _call_back(self) -> None:
        """Make all workers save, so that nothing is lost by what follows; wait for them."""
        ray.get(self._office.recall.remote())
        begun = time.monotonic()
        while ray.get(self._office.num_left.remote()) < len(self._workers):
            waited, beats = time.monotonic() - begun, ray.get(self._office.beats.remote())
            silent = waited > SILENT_S and any(age > SILENT_S for _, age in beats)
            stands_s = min((beat.idle_s + age for beat, age in beats), default=waited)
            if silent or min(waited, stands_s) > SAVE_PATIENCE_S:
                self._say(logging.WARNING, "not all workers have saved; their steps are lost")
                return
            time.sleep(0.2)

    # Words.

    def _describe(self, error: Any) -> str:
        try:
            nodes = answering_nodes()
        except RayError:  # No node is called lost then.
            nodes = [worker.node_id for worker in self._workers.values()]
        failures, blamed = error.worker_failures, ray.get(self._office.blamed.remote())
        if blamed is not None and not any(is_gone(one) for one in failures.values()):
            failures = {**failures, blamed: ActorDiedError()}
        return describe_failures(failures, self._workers, nodes)

    def _from_checkpoint(self) -> str:
        """In words; one whose manifest cannot be read is passed over, as the workers do.

        They look at its files too, which takes long.
        """
        with suppress(StorageError):
            for directory in reversed(list_checkpoints(self._run_dir)):
                with suppress(StorageError):
                    return f"from step {read_manifest(directory).step}"
        return "from the beginning"

    def _say(self, level: int, message: str) -> None:
        ray.get(self._office.log.remote(level, message))

    def _fail(self, error: Exception) -> None:
        ray.get(self._office.fail.remote(type(error).__name__, str(error)))


def _at_start(lost: BaseException) -> str:
    return f"while the workers started, one {in_words(lost)}"
