"""What the errors mean with which workers of Ray Train end."""

from collections.abc import Collection, Mapping
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "remote process exited or there was a network error",
    "NCCL communicator was aborted",
)
"""In what a rank raises because another one is gone."""
PEER_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
MEMORY_SIGNS = ("NODE_OUT_OF_MEMORY", "running low on memory", "memory pressure")


def lost_ranks(failures: Mapping[int, Exception]) -> list[int]:
    """Ranks whose process or node is gone, or that lack another rank's."""
    return [rank for rank, error in failures.items() if is_gone(error) or _lacks_peer(error)]


def is_gone(error: BaseException) -> bool:
    """Whether the worker's process is no more, or does not answer Ray."""
    cause = _cause(error)
    return isinstance(cause, RayError | WorkerHealthCheckTimeoutError)


def lost_at_start(error: BaseException) -> BaseException | None:
    """What Ray's controller failed with because a worker was lost while its group started."""
    if not isinstance(error, ControllerError):
        return None
    cause: BaseException = error.controller_failure
    if isinstance(cause, WorkerGroupStartupFailedError):
        return cause.__cause__ or cause
    if isinstance(cause, RayTaskError):
        # Raised in a worker: by what is set up there.
        return cause.cause if _lacks_peer(cause.cause) else None
    return cause if isinstance(cause, RayError) else None


def is_preemption(error: BaseException) -> bool:
    """Whether Ray counts a failure as the taking away of a node that was announced."""
    if isinstance(error, WorkerGroupError):
        causes = [_cause(one) for one in error.worker_failures.values()]
        return any(isinstance(one, RayActorError) and one.preempted for one in causes)
    return isinstance(error, PreemptionError)


def out_of_memory(failures: Mapping[int, Exception]) -> int | None:
    """The rank that Ray has ended because its node's memory was used up, if one was."""
    return next((rank for rank, error in failures.items() if _lacked_memory(error)), None)


def describe_failures(
    failures: Mapping[int, Exception], workers: Mapping[int, Any], nodes: Collection[str]
) -> str:
    """Which ranks ended, where and why, in one line; what only followed from others is left out.

    `workers` has Ray's metadata of each rank, `nodes` are the ids of those that answer.
    """
    first = {rank: error for rank, error in failures.items() if is_gone(error)}
    first = first or {rank: e for rank, e in failures.items() if not _lacks_peer(e)}
    said = {rank: in_words(error) for rank, error in (first or failures).items()}
    if all(is_gone(error) or _lacks_peer(error) for error in failures.values()):
        # The others notice it before Ray does, so the lost may not be among the failures yet.
        lost = {rank for rank, worker in workers.items() if worker.node_id not in nodes}
        said = (said if first else {}) | dict.fromkeys(lost, "was lost with its node") or said
    parts = []
    for rank, what in sorted(said.items())[:4]:
        worker = workers.get(rank)
        place = f" (pid {worker.pid}, node {worker.node_ip})" if worker else ""
        parts.append(f"rank {rank}{place} {what}")
    more = f", and {len(said) - 4} more" if len(said) > 4 else ""
    return "; ".join(parts) + more


def in_words(error: BaseException) -> str:
    """What a rank ended with, to follow its name."""
    cause = _cause(error)
    text = " ".join(str(cause).split())
    if isinstance(cause, WorkerHealthCheckTimeoutError):
        return "does not answer Ray"
    if _lacked_memory(cause):
        return "was ended by Ray, for the memory of its machine was used up"
    if isinstance(cause, RayActorError):
        return "was lost: its process ended"
    if _lacks_peer(cause):
        return "lost its connection to another rank"
    return f"raised {type(cause).__name__}: {text[:200]}"


def _lacked_memory(error: BaseException) -> bool:
    cause = _cause(error)
    told = isinstance(cause, RayError) and any(sign in str(cause) for sign in MEMORY_SIGNS)
    return told or isinstance(cause, OutOfMemoryError)


def _cause(error: BaseException) -> BaseException:
    if isinstance(error, WorkerHealthCheckFailedError):
        return error.health_check_failure
    return error


def _lacks_peer(error: BaseException) -> bool:
    named = type(error).__name__ in PEER_ERRORS
    return named or any(sign in str(error) for sign in PEER_SIGNS)
