"""A training worker's side of the pool of teachers: batches go out, soft labels come back."""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
)
from torch import Tensor

from pipeline.cluster.tasks import unwrapped
from pipeline.data.batch import Batch
from pipeline.errors import LongtailError
from pipeline.semantics.soft_labels import PackedBatch, dense_labels
from pipeline.training.whereabouts import here

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often a batch is sent to actors that die over it, before the run ends with an error."""
PATIENCE_S = 300.0
"""How long a pool of which no actor answers is waited for: less than the default of
`cluster.hang_timeout`, which would end the rank that waits."""
SILENT_S = 120.0
"""How long an actor may leave the question unanswered whether it lives: one that is at work has a
thread of its own for the answer, however long it takes over a batch."""
PATIENT_S = 30.0
"""Seconds of waiting for one batch or for the first actor after which the log says so."""
_LOOK_S = 0.2
_GONE = (RayActorError, ObjectLostError, OutOfMemoryError, NodeDiedError)
"""What Ray says of an actor that is no more: the last two where its memory or its node was."""


@dataclass
class _Request:
    """A batch to be sent, or that was: `pixels` and `answer` refer to Ray objects."""

    sample_ids: list[str]
    pixels: Any
    actor: int | None = None
    answer: Any = None
    attempts: int = 0


class TeacherPool:
    """`SoftLabels` of actors that work on the next batches; it is one training worker's.

    Several workers may have pools of the same actors. A batch whose actor dies is sent again to
    another, or to the same when it is back, up to `ATTEMPTS` times. What a teacher raises is
    raised by `temperature` and `labels` as itself.
    """

    def __init__(self, actors: Sequence[Any], batches_ahead: int, rank: int = 0) -> None:
        self._actors = list(actors)
        self.batches_ahead = batches_ahead
        self._turn = rank
        self._sent: deque[_Request] = deque()
        self._away: dict[int, Any] = {}
        """Actors that have died, with the call that will tell when they are back."""
        self._temperature: float | None = None

    @property
    def temperature(self) -> float:
        """See `SoftLabels`; waits for the first actor that has loaded the teacher."""
        if self._temperature is None:
            self._away = {i: actor.load.remote() for i, actor in enumerate(self._actors)}
            self._wait_for_any()
        assert self._temperature is not None
        return self._temperature

    def ask(self, batch: Batch) -> None:
        """See `SoftLabels`; waits for nobody, so that all waiting for a teacher is in `labels`."""
        self._sent.append(_Request(batch.sample_ids, ray.put(PackedBatch.of(batch))))
        self._look()
        if len(self._away) < len(self._actors):
            self._send_unsent()

    def labels(self, batch: Batch) -> list[Tensor]:
        """See `SoftLabels`."""
        self._send_unsent()
        request = self._sent.popleft()
        assert request.sample_ids == batch.sample_ids, "batches are taken as they were asked for"
        begun, said = time.monotonic(), False
        while True:
            try:
                return dense_labels(_answer(request.answer, PATIENT_S), batch)
            except GetTimeoutError:
                if not said:
                    seconds = time.monotonic() - begun
                    logger.warning("waiting for a teacher's soft labels since %.0f s", seconds)
                said = True
                self._end_silent(request)
            except _GONE as error:
                self._send_again(request, error)

    def _send_unsent(self) -> None:
        """What was asked for while no actor was there."""
        for request in self._sent:
            if request.actor is None:
                self._send(request)

    def _send(self, request: _Request) -> None:
        """To the actor with the least to do for this worker, of those that are not away."""
        self._look()
        if len(self._away) == len(self._actors):
            self._wait_for_any()
        load = Counter(other.actor for other in self._sent)
        number = len(self._actors)
        turns = [(self._turn + i) % number for i in range(number)]
        request.actor = min((i for i in turns if i not in self._away), key=lambda i: load[i])
        self._turn = request.actor + 1
        request.answer = self._actors[request.actor].labels.remote(request.pixels)

    def _send_again(self, request: _Request, error: Exception) -> None:
        """The batch that an actor died over, and what else waited for that actor."""
        here.move()
        request.attempts += 1
        if request.attempts >= ATTEMPTS:
            raise LongtailError(
                f"{request.attempts} teacher actors in a row died over the batch of "
                f"{', '.join(request.sample_ids[:4])} ({_first_line(error)}); its memory may be "
                "too small: give each actor more (teacher.gpus_per_actor, fewer teacher.actors), "
                "or set teacher.placement=in_process, and run the same command again"
            )
        gone = request.actor
        assert gone is not None, "it was sent"
        if gone not in self._away:
            logger.warning(
                "teacher actor %d is gone (%s); its batches are sent again",
                gone,
                _first_line(error),
            )
            self._away[gone] = self._actors[gone].load.remote()
        self._send(request)
        for other in list(self._lost(gone)):
            self._send(other)

    def _end_silent(self, request: _Request) -> None:
        """End the actor of a request if its process hangs; Ray begins it anew, as one that died."""
        assert request.actor is not None, "it was sent"
        actor = self._actors[request.actor]
        if not ray.wait([actor.pid.remote(), request.answer], timeout=SILENT_S)[0]:
            logger.warning("teacher actor %d does not answer; it is ended", request.actor)
            ray.kill(actor, no_restart=False)

    def _lost(self, actor: int) -> Iterator[_Request]:
        """Requests that wait for an actor and that it has not answered."""
        for request in self._sent:
            if request.actor != actor:
                continue
            try:
                _answer(request.answer, 0)
            except (GetTimeoutError, *_GONE):
                yield request

    def _look(self) -> None:
        """Take back the actors that have loaded the teacher; raises what loading raised."""
        for i, answer in list(self._away.items()):
            try:
                self._temperature = _answer(answer, 0)
            except GetTimeoutError:
                continue
            except _GONE:
                self._away[i] = self._actors[i].load.remote()
            else:
                del self._away[i]

    def _wait_for_any(self) -> None:
        begun, said = time.monotonic(), False
        while True:
            self._look()
            if len(self._away) < len(self._actors):
                here.move()
                return
            waited = time.monotonic() - begun
            if waited > PATIENCE_S:
                raise LongtailError(
                    f"none of the {len(self._actors)} teacher actors has begun to work in "
                    f"{waited:.0f} s; the cluster may lack what each reserves (teacher."
                    "gpus_per_actor, teacher.cpus_per_actor): `ray status` shows what is asked "
                    "for; give it that, or set teacher.placement=in_process"
                )
            if waited > PATIENT_S and not said:
                logger.warning("no teacher actor has begun to work in %.0f s", waited)
                said = True
            time.sleep(_LOOK_S)


def _answer(reference: Any, seconds: float) -> Any:
    """What a call gives; raises what its teacher raised, without Ray's traceback around it."""
    if not ray.wait([reference], timeout=seconds)[0]:
        raise GetTimeoutError
    return unwrapped(reference)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
