"""As many workers as there is place for, on nodes that live and stay.

Ray's own policy counts what nodes have in all, from a view that may be 20 s old and knows nodes as
alive until their health checks have failed for 15 s: it asks for places on a node that is lost, or
about to be taken away, or full of other actors, and waits for them in vain.
"""

import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
from ray._private import state as ray_state
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.cluster.failures import lost_at_start
from pipeline.recipe import Recipe

GROW_S = 20.0
"""Seconds between two looks whether nodes have joined; two in a row have to find as many."""
NODE_PATIENCE_S = 2.0
"""How long a node may take to accept a connection."""
_ROUNDING = 1e-6
_LOOK_S = 1.0
"""Seconds between two looks while there are too few places."""

for _base, _name in (
    (TorchTrainer, "_initialize_and_run_controller"),
    (TorchTrainer, "_create_default_callbacks"),
    (ElasticScalingPolicy, "_get_reserved_resources"),
    (ControllerCallback, "on_controller_start_worker_group"),
):
    # What takes the place of nothing would never be called, and nobody would see it.
    assert hasattr(_base, _name), f"another Ray than constraints.txt has: no {_name}"


class Trainer(TorchTrainer):
    """Ray's, which counts places by `NodesThatStay` and goes on when a start loses a worker."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        expected = arguments.keys() >= {"scaling_policy", "failure_policy"}
        assert expected, "another Ray than constraints.txt has"
        given = self.train_loop_config
        arguments["failure_policy"] = StartsAgain(self.run_config.failure_config, given["office"])
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = NodesThatStay(
                self.scaling_config,
                given["office"],
                Recipe.model_validate_json(given["recipe"]),
                given["teachers"],
            )
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        """The run's own come first: they have to know a group before its setup can fail."""
        own = list(self.run_config.callbacks or ())
        return [*own, *(one for one in super()._create_default_callbacks() if one not in own)]


class StartsAgain(DefaultFailurePolicy):
    """Ray's policy, which counts workers that are lost while a group starts as others are counted.

    Ray itself tries some such starts again without end, and after others it ends the run. Nothing
    is tried again once the office has the error that the run is to end with: it would come again,
    and places for workers might be waited for first.
    """

    def __init__(self, failure_config: Any, office: Any) -> None:
        super().__init__(failure_config)
        self._office = office

    def make_decision(self, training_failed_error: Any) -> Any:
        try:
            if ray.get(self._office.error.remote()) is not None:
                return FailureDecision.RAISE
        except RayError:
            return FailureDecision.RAISE  # Without the office nobody could go on.
        lost = lost_at_start(training_failed_error)
        if lost is not None:
            training_failed_error = WorkerGroupError(str(lost), {})
        return super().make_decision(training_failed_error)


class NodesThatStay(ElasticScalingPolicy):
    """Ray's elastic policy, with places counted on the nodes of `nodes_that_stay`."""

    def __init__(
        self, scaling_config: Any, office: Any, recipe: Recipe, teachers: Sequence[Any]
    ) -> None:
        super().__init__(scaling_config)
        self._office, self._recipe, self._teachers = office, recipe, teachers
        self._growth: int | None = None
        """The number of workers, greater than now, that there was place for at the last look."""
        self._held: dict[str, int] = {}
        """Workers of the newest group by node: their places are free for the next one."""

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        self._held = {}
        for worker in worker_group_state.workers:
            node = worker.metadata.node_id
            self._held[node] = self._held.get(node, 0) + 1
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if not isinstance(decision, ResizeDecision):
            return decision
        before, self._growth = self._growth, decision.num_workers
        # A node that is lost comes as an error, and one that is taken away by its notice.
        grows = decision.num_workers > len(worker_group_state.workers)
        # Nodes often come one by one: it begins anew once, and not before it has gained anything.
        settled = decision.num_workers == before
        if grows and settled and ray.get(self._office.has_stepped.remote()):
            return decision
        return NoopDecision()

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._growth = None
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, ResizeDecision):
            time.sleep(_LOOK_S)  # Ray asks again at once.
        return decision

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ReschedulingState):
            self._held = {}  # The workers of before are gone, and no others came.

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """What each node that stays has for workers: free, or held by those of before.

        Without what others of the run wait for. None, for which nothing is decided, where Ray does
        not answer.
        """
        need = self.scaling_config._resources_per_worker_not_none
        try:
            free, stay = ray_state.available_resources_per_node(), nodes_that_stay()
            teachers, evaluation = self._needs_of_teachers(), self._need_of_evaluation()
        except RayError:
            return None
        places = {node: Counter(free.get(node, {})) for node in stay}
        for node, place in places.items():
            for key, amount in need.items():
                place[key] += self._held.get(node, 0) * amount + _ROUNDING
        for teacher in teachers:
            _take(places.values(), teacher, need)
        taken = _take(places.values(), evaluation, need)
        if sum(_count(one, need) for one in places.values()) < self.scaling_config.min_workers:
            taken.update(evaluation)  # It never stops the training.
        return {node: {key: place[key] for key in need} for node, place in places.items()}

    def _needs_of_teachers(self) -> list[Counter[str]]:
        """What those reserve that are being begun anew."""
        section = self._recipe.teacher
        each = Counter({"CPU": section.cpus_per_actor, "GPU": section.gpus_per_actor})
        return [each for actor in self._teachers if not _is_alive(actor)]

    def _need_of_evaluation(self) -> Counter[str]:
        """What the next one beside the training reserves; nothing while one has its place."""
        section = self._recipe.evaluation
        is_live = self._recipe.data.validation is not None and section.every > 0
        if not is_live or ray.get(self._office.is_evaluating.remote()):
            return Counter()
        return Counter({"CPU": section.cpus, "GPU": section.gpus})


def _take(
    places: Collection[Counter[str]], other: Counter[str], need: Mapping[str, float]
) -> Counter[str]:
    """Where `other` fits and costs the fewest workers, which has so much less then.

    A place of nothing where it fits nowhere: it waits in any case.
    """
    fitting = [place for place in places if place >= other]
    costs = [_count(place, need) - _count(place - other, need) for place in fitting]
    best = fitting[costs.index(min(costs))] if fitting else Counter()
    best.subtract(other)
    return best


def _count(place: Mapping[str, float], need: Mapping[str, float]) -> float:
    return min((place[key] // amount for key, amount in need.items() if amount), default=0.0)


def _is_alive(actor: Any) -> bool:
    found = ray_state.state.actor_table(actor._actor_id.hex())
    return bool(found.get("State") == "ALIVE")


def draining_nodes() -> dict[str, int]:
    """Ids of nodes that are about to be taken away, with the time in ms since 1970, 0: unknown."""
    found: dict[str, int] = ray_state.state.get_draining_nodes()
    return found


def answering_nodes() -> list[str]:
    """Ids of nodes that accept connections: some of Ray's living ones may be lost."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and _answers(node)]


def nodes_that_stay() -> list[str]:
    """Those of them that are not about to be taken away."""
    draining = draining_nodes()
    return [node for node in answering_nodes() if node not in draining]


def _answers(node: dict[str, Any]) -> bool:
    try:
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        socket.create_connection(address, timeout=NODE_PATIENCE_S).close()
    except OSError:
        return False
    return True
