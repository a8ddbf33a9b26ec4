"""The driver's watch over training workers: one that hangs is named, and ended."""

import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.group import Beat
from pipeline.recipe import Cluster

logger = logging.getLogger(__name__)

STALL_S = 60.0
"""After so long without progress, and after twice, four times as long, the log says who is waited
for: a store that is away, say, whose readers' warnings stay in files of their own."""
SILENT_S = 30.0
"""Without a beat for so long, or for half the timeout, a process is stopped or its node away."""
END_PATIENCE_S = 60.0
"""How long the end of a process on its node may take: Ray starts another process there for it."""
SAME_S = 60.0
"""How much a clock may have been set while a process whose beginning it tells was at work."""
NEVER_S = 24 * 3600
"""How long ranks wait for each other: with its moves one may take longer over a save, or over a
teacher, than any timeout of the watch, which alone tells that from a hang."""
MARGIN_S = 120
"""While ranks find each other nobody beats yet; that takes no longer than a stage and this."""


def rendezvous_timeout_s(section: Cluster) -> float:
    """How long ranks wait to find each other, before there is anything to watch."""
    return section.hang_timeout + MARGIN_S if section.hang_timeout else NEVER_S


class Hang(NamedTuple):
    """A rank that the others wait for: its newest beat, which came `age_s` ago; the others'."""

    culprit: Beat
    age_s: float
    is_silent: bool
    others: list[Beat]

    def __str__(self) -> str:
        one, silent = self.culprit, ""
        if self.is_silent:
            silent = f", and its process has not answered for {self.age_s:.0f} s"
        places = {(other.step, other.stage) for other in self.others}
        where = ", ".join(f"'{stage}' of step {step}" for step, stage in sorted(places)[:3])
        waiting = f"; the other ranks are in {where}" if self.others else ""
        return (
            f"rank {one.rank} (pid {one.pid}, node {one.host}) is in '{one.stage}' of step "
            f"{one.step} since {one.idle_s + self.age_s:.0f} s{silent}{waiting}"
        )


def find_hang(beats: Sequence[tuple[Beat, float]], timeout_s: float) -> Hang | None:
    """The rank that holds up all others, once none of them has moved for `timeout_s`.

    `beats` are the newest of each rank with the seconds since they came. The one that is meant does
    not beat; or else is at work, not waiting for others; or else has begun the fewest stages.
    """
    if not beats or min(beat.idle_s + age for beat, age in beats) <= timeout_s:
        return None
    silent = [(beat, age) for beat, age in beats if age > min(SILENT_S, timeout_s / 2)]
    at_work = [(beat, age) for beat, age in beats if not beat.waits]
    culprit, age = min(
        silent or at_work or beats,
        key=lambda one: (one[0].step, one[0].stages, one[0].idle_s + one[1], one[0].rank),
    )
    others = [beat for beat, _ in beats if beat is not culprit]
    return Hang(culprit, age, bool(silent), others)


class Watch:
    """Looks at the beats of a run's workers, as often as its timeout asks for."""

    def __init__(self, office: Any, timeout_s: float | None) -> None:
        self._office, self._timeout_s = office, timeout_s
        self._next, self._stall_s = 0.0, STALL_S

    def look(self) -> None:
        """End the worker that hangs, if one does; the run then goes on from its checkpoint."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + min(10.0, (self._timeout_s or NEVER_S) / 20)
        group = ray.get(self._office.group.remote())
        beats = ray.get(self._office.beats.remote())
        hang = find_hang(beats, self._timeout_s) if self._timeout_s else None
        if hang is None:
            self._tell(beats)
            return
        logger.warning("%s; no rank has moved for cluster.hang_timeout, so it is ended", hang)
        ray.get(self._office.blame.remote(group, hang.culprit.rank))
        if _end(hang.culprit):
            # Of these workers nothing more is expected; those that follow begin to beat anew.
            ray.get(self._office.end_group.remote(group))
        else:
            self._next = time.monotonic() + END_PATIENCE_S

    def _tell(self, beats: Sequence[tuple[Beat, float]]) -> None:
        """Say who the others wait for, less and less often, until there is progress."""
        if find_hang(beats, STALL_S) is None:
            self._stall_s = STALL_S
            return
        stall = find_hang(beats, self._stall_s)
        if stall is not None:
            self._stall_s *= 2
            logger.warning("no progress: %s", stall)


def _end(beat: Beat) -> bool:
    """SIGKILL from its own node: a stopped process cannot end itself. Whether it is gone."""
    on_node = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(end_process)
    reason = "the process of this number began at another time"
    try:
        if ray.get(remote.remote(beat.pid, beat.created), timeout=END_PATIENCE_S):
            return True
    except RayError as error:
        reason = str(error).strip().partition("\n")[0]
    logger.warning("rank %d was not ended on its node: %s", beat.rank, reason)
    return False


def end_process(pid: int, created: float) -> bool:
    """SIGKILL to the process that began at `created`, in s since 1970; whether it is gone.

    Times are compared loosely: one is told from the clock, which may have been set since.
    """
    try:
        if abs(psutil.Process(pid).create_time() - created) > SAME_S:
            return False
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass
    return True
