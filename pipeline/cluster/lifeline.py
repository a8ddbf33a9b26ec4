"""Notices that Ray is gone, and ends the driver with an error that says so.

When its head dies, every call of Ray waits, until Ray's own client ends the process after 60 s with
exit code 1. The thread here looks itself, and ends the process first: nothing is lost by that, for
all that outlives a failure is in the run directory.
"""

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

import psutil

from pipeline.errors import ClusterError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
REMOTE_LOOK_S = 3.0
"""Seconds between two looks at processes here, and at a head by network."""
REMOTE_PATIENCE_S = 25.0
"""How long the head of a joined cluster may leave everybody without an answer."""
HEAD_PROCESSES = ("gcs_server", "raylet")

FindLoss = Callable[[], str | None]
"""What of Ray is gone, or None."""


class Lifeline:
    """A thread that ends this process with `ClusterError`'s code when `find_loss` finds one."""

    def __init__(self, find_loss: FindLoss, interval_s: float) -> None:
        self._find_loss, self._interval_s = find_loss, interval_s
        self._stopped = threading.Event()
        # Before Ray's own, which ends at exit what is watched here: the last is called first.
        atexit.register(self.stop)
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def stop(self) -> None:
        """Look no more; Ray is about to be ended on purpose."""
        self._stopped.set()
        atexit.unregister(self.stop)

    def _watch(self) -> None:
        below: list[psutil.Process] = []
        while not self._stopped.wait(self._interval_s):
            loss = self._find_loss()
            if loss is not None and not self._stopped.is_set():
                _end(loss, below)
            below = psutil.Process().children(recursive=True)


def head_here(processes: Collection[psutil.Process]) -> FindLoss:
    """Looks at the head's processes among those that this process has started."""
    head = {}
    for one in processes:
        with suppress(psutil.Error):  # It has ended meanwhile.
            name = one.name()
            if name in HEAD_PROCESSES:
                head[one] = name

    def find_loss() -> str | None:
        gone = [name for one, name in head.items() if not _lives(one)]
        return f"{' and '.join(sorted(gone))} of this machine ended" if gone else None

    return find_loss


def head_at(address: str) -> FindLoss:
    """Looks whether HOST:PORT of a head accepts connections."""
    host, _, port = address.rpartition(":")
    silent_since: float | None = None

    def find_loss() -> str | None:
        nonlocal silent_since
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            silent_since = None
        except OSError as error:
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if now - silent_since > REMOTE_PATIENCE_S:
                return f"the head at {address} does not answer ({error})"
        return None

    return find_loss


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end(loss: str, below: Collection[psutil.Process]) -> None:
    """End what is left of Ray under this process, and the process itself."""
    error = ClusterError(
        f"Ray is gone: {loss}. What was trained since the newest checkpoint is done again: the "
        "same command goes on from there, when the cluster is back"
    )
    for process in below:
        with suppress(psutil.Error):
            process.kill()
    with suppress(OSError, ValueError):
        print(f"\nlongtail: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(error.exit_code)
