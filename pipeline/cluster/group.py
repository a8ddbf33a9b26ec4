"""What the driver, Ray Train's controller and the workers know together of a group of workers.

A group is what trains between two starts: its world size stays. One that is lost, or called back,
is followed by another, which goes on from the newest checkpoint.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import ActorUnavailableError, RayError

from pipeline.cluster.office import News, Office
from pipeline.errors import ClusterError
from pipeline.training.whereabouts import here

DRIVER_PATIENCE_S = 60.0
"""How long a worker goes on when the driver's machine does not answer its beats."""
_BEATS_S = (0.2, 5.0)
"""Fewest and most seconds between two beats of a worker."""


@dataclass(frozen=True)
class Beat:
    """Where a rank is, as it says; `idle_s` is for how long, when it said so.

    `pid` and `created` name its process on the node with the id `node`, `host` that node's address.
    The rest is of `training.whereabouts.Note`.
    """

    rank: int
    pid: int
    created: float
    node: str
    host: str
    step: int
    stage: str
    stages: int
    waits: bool
    idle_s: float


class TrainingOffice(Office):
    """The office of training workers, which also keeps the newest beat of each."""

    def __init__(self) -> None:
        super().__init__()
        self._group = 0
        self._there = False
        self._ended = False
        self._recalled = False
        self._evaluates = False
        self._reports = 0
        self._blamed: int | None = None
        self._left: set[int] = set()
        self._beats: dict[int, tuple[Beat, float]] = {}

    def begin_group(self) -> int:
        """Places for workers are asked for; the number of the group."""
        self._group += 1
        self._there = self._ended = self._recalled = False
        self._reports, self._blamed = 0, None
        self._left.clear()
        self._beats.clear()
        return self._group

    def start_group(self) -> None:
        """The workers are there, and will hear of a wish to stop."""
        self._there = True

    def is_there(self) -> bool:
        """Whether there are workers, or none that could save anything."""
        return self._there

    def end_group(self, group: int) -> None:
        """Some of its workers are lost: where the others are no longer matters."""
        if group == self._group:
            self._ended, self._there = True, False
            self._beats.clear()

    def evaluates(self, is_under_way: bool) -> None:
        """An evaluation beside the training has begun, or the last has ended."""
        self._evaluates = is_under_way

    def is_evaluating(self) -> bool:
        """Whether an evaluation has its place already."""
        return self._evaluates

    def blame(self, group: int, rank: int) -> None:
        """The rank hangs, and is about to be ended."""
        if group == self._group:
            self._blamed = rank

    def blamed(self) -> int | None:
        """Which rank is ended because it hung: Ray may tell only of others that lack it."""
        return self._blamed

    def group(self) -> int:
        return self._group

    def recall(self) -> None:
        """Ask all workers of the group to save, and then to wait for their end."""
        self._recalled = True

    def report(self, news: News, part: int = 0) -> bool:
        self._reports += 1
        return super().report(news, part) or self._recalled

    def has_stepped(self) -> bool:
        """Whether the group has done a step: the first rank reports before each, and at the end."""
        return self._reports > 1

    def beat(self, group: int, beat: Beat) -> None:
        if group == self._group and not self._ended and beat.rank not in self._left:
            self._beats[beat.rank] = beat, time.monotonic()

    def beats(self) -> list[tuple[Beat, float]]:
        """The newest beat of each rank, and the seconds since it came."""
        now = time.monotonic()
        return [(beat, now - came) for beat, came in self._beats.values()]

    def leave(self, group: int, rank: int) -> bool:
        """A worker trains no longer; whether it is to wait for its end, having been called back.

        One of a group that another has followed was called back too, and says so late.
        """
        if group != self._group:
            return True
        self._left.add(rank)
        self._beats.pop(rank, None)
        return self._recalled and not self._stop and self._error is None

    def num_left(self) -> int:
        return len(self._left)


@contextmanager
def beating(office: Any, group: int, rank: int, timeout_s: float | None) -> Iterator[None]:
    """Tell the office all the time where this process is in the training.

    A process whose driver is gone ends itself, with the exit code of `ClusterError`.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(office, group, rank, timeout_s, stop), daemon=True, name="beats"
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _beat(office: Any, group: int, rank: int, timeout_s: float | None, stop: Any) -> None:
    least, most = _BEATS_S
    interval = min(most, max(least, (timeout_s or 600) / 40))
    context, created = ray.get_runtime_context(), psutil.Process().create_time()
    node, host = context.get_node_id(), ray.util.get_node_ip_address()
    answers: deque[tuple[Any, float]] = deque()
    away: float | None = None
    while not stop.wait(interval):
        note, now = here.note(), time.monotonic()
        beat = Beat(
            rank, os.getpid(), created, node, host,
            note.step, note.stage, note.stages, note.waits, now - note.since,
        )  # fmt: skip
        answers.append((office.beat.remote(group, beat), now))
        while answers and ray.wait([answers[0][0]], timeout=0)[0]:
            try:
                ray.get(answers.popleft()[0])
                away = None
            except ActorUnavailableError:  # A connection broke; Ray makes another.
                away = now if away is None else away
            except RayError:  # The office lives in the driver's node, as long as the driver.
                os._exit(ClusterError.exit_code)
        # Looked at after the wait: a process that was stopped finds all its answers there.
        unanswered = min([now if away is None else away, *(sent for _, sent in answers)])
        if now - unanswered > DRIVER_PATIENCE_S:
            os._exit(ClusterError.exit_code)


def wait_for_end(office: Any) -> None:
    """Wait to be ended, for as long as there is a driver."""
    answered = time.monotonic()
    while True:
        try:
            ray.get(office.group.remote(), timeout=DRIVER_PATIENCE_S)
            answered = time.monotonic()
        except ActorUnavailableError:
            if time.monotonic() - answered > DRIVER_PATIENCE_S:
                os._exit(ClusterError.exit_code)
        except RayError:
            os._exit(ClusterError.exit_code)
        time.sleep(1)
