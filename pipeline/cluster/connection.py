"""To the recipe's Ray cluster, or to one on this machine, and back."""

import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import Any

import psutil

from pipeline.cluster.lifeline import LOOK_S, REMOTE_LOOK_S, Lifeline, head_at, head_here
from pipeline.errors import LongtailError, RecipeError
from pipeline.recipe import Cluster
from pipeline.signals import signals_kept

# Ray reads these when it is imported or started; what the user has set stays.
os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        # Nothing but `start_ray` starts or joins one.
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # A process of 115 MB; `controller.py` looks for notices of preemption itself.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # How long workers wait for places on nodes that may be gone, before nodes are counted anew.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
        **os.environ,
    }
)

import ray
from ray._private import ray_constants

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often Ray is started on this machine before a start that timed out ends the program."""
PATIENCE_S = 60.0
"""How long the head of a cluster to join may take until it answers."""
_lifeline: Lifeline | None = None
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def start_ray(section: Cluster) -> None:
    """Connect to the cluster of the recipe or of `RAY_ADDRESS`, or start one on this machine's
    loopback address.

    Does nothing when this process has one. Ray asks every caller for a token; a new one is passed
    on by environment, which other users cannot read. Raises `RecipeError` where a cluster cannot be
    joined, `LongtailError` where Ray does not start here.
    """
    if ray.is_initialized():
        return
    before = {*_children()}
    # Ray sets RAY_ADDRESS for what is submitted to it as a job.
    address = section.address or os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
        _watch_over_ray(None)
    else:
        _start_here(section)
        _watch_over_ray({*_children()} - before)


def stop_ray() -> None:
    """Leave the cluster, and end the one that `start_ray` started; does nothing without one."""
    if _lifeline is not None:
        _lifeline.stop()
    if ray.is_initialized():
        ray.shutdown()


def _watch_over_ray(started: set[psutil.Process] | None) -> None:
    """From now on; `started` are the processes of a Ray of our own, None of one that was joined."""
    global _lifeline
    if started is None:
        head = ray.get_runtime_context().gcs_address
        _lifeline = Lifeline(head_at(head), REMOTE_LOOK_S)
    else:
        _lifeline = Lifeline(head_here(started), LOOK_S)


def _join(address: str) -> None:
    if "://" in address:
        raise RecipeError(
            f"cluster.address (or RAY_ADDRESS) is {address}; give HOST:PORT of the head, or auto "
            "on a machine of the cluster: the program itself has to run inside the cluster, where "
            "launch/submit.sh brings it"
        )
    _wait_for_head(address)
    _stay_on_loopback(address.rpartition(":")[0] in _LOOPBACK)
    try:
        _initialise(address=address)
    except ray.exceptions.AuthenticationError as error:
        raise RecipeError(
            f"the Ray cluster at {address} was not joined without a token: {_first_line(error)}. "
            "Name the file that holds the cluster's token by RAY_AUTH_TOKEN_PATH; for a cluster "
            "that asks for none, and runs the code of everybody who reaches its port, set "
            "RAY_AUTH_MODE=disabled"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"the Ray cluster at {address} cannot be joined: {_first_line(error)}. It answers at "
            "that address, so compare its token (RAY_AUTH_TOKEN_PATH), RAY_AUTH_MODE and Ray's "
            "version with those here; this machine has to be one of its nodes"
        ) from error


def _wait_for_head(address: str) -> None:
    """Return when something accepts connections at HOST:PORT: Ray itself waits without end."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", which Ray resolves at once.
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"no Ray cluster answers at {address} ({error}), tried for {PATIENCE_S:.0f} s; "
                    "cluster.address (or RAY_ADDRESS) is HOST:PORT of its head: start it, correct "
                    "the address, or leave both unset to start Ray on this machine"
                ) from error
            time.sleep(1)


def _start_here(section: Cluster) -> None:
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _stay_on_loopback(True)
    workers = section.max_workers * section.cpus_per_worker
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _initialise(
                # By name: without it Ray would look for a cluster that others run on this machine.
                address="local",
                num_cpus=max(os.cpu_count() or 1, -int(-workers // 1)),
                object_store_memory=section.object_store_megabytes * 2**20,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:
            # Ray raises a bare Exception where a busy machine was slower than its 30 seconds.
            if attempt < ATTEMPTS and "timed out" in str(error).lower():
                logger.warning("Ray did not start: %s; trying again", _first_line(error))
                continue
            raise LongtailError(
                f"Ray did not start on this machine ({attempt} of {ATTEMPTS} attempts): "
                f"{_first_line(error)}. Look at free memory, /dev/shm (it has to hold cluster."
                f"object_store_megabytes, {section.object_store_megabytes} MB) and /tmp/ray/"
                "session_latest/logs, then run the same command again"
            ) from error


def _stay_on_loopback(wanted: bool) -> None:
    """Whether Ray takes 127.0.0.1 as it is given: it would put the machine's address in its place,
    and then listen on all addresses. This is what it does by itself on Windows and macOS."""
    assert hasattr(ray_constants, "ENABLE_RAY_CLUSTER"), "another Ray; see who listens where"
    ray_constants.ENABLE_RAY_CLUSTER = not wanted
    # For the processes that Ray starts.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = str(int(not wanted))


def _initialise(**arguments: Any) -> None:
    """`ray.init`, after whose failure nothing is left half started."""
    before = set(_children())
    with signals_kept():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
        except BaseException:
            ray.shutdown()
            left = set(_children()) - before  # Ray forgets those of a failed start.
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
            raise


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:300]
