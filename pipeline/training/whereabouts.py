"""Where this process is in the training, for whoever watches over it (free of torch).

A rank that hangs cannot say so. The loop notes each stage that it begins, a thread beside it passes
the newest note on, and who gets the notes of all ranks sees which one has stopped moving.
"""

import threading
import time
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Note:
    """One stage of a step, in words; `since` is of `time.monotonic`.

    `stages` is how many the rank has begun in this step: alike on all ranks at the same place.
    `waits` says that the rank does nothing there but wait for others.
    """

    step: int
    stage: str
    stages: int
    waits: bool
    since: float


class Whereabouts:
    """The newest note of a process; written by the training thread, read by others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._note = Note(0, "start", 0, False, time.monotonic())

    def enter(self, stage: str, step: int | None = None, *, waits: bool = False) -> None:
        """Begin a stage, of the step under way or of another one."""
        with self._lock:
            before, now = self._note, time.monotonic()
            if step is None or step == before.step:
                self._note = Note(before.step, stage, before.stages + 1, waits, now)
            else:
                self._note = Note(step, stage, 0, waits, now)

    def move(self) -> None:
        """Say that the stage goes on: with the next of several files, with another try."""
        with self._lock:
            self._note = replace(self._note, since=time.monotonic())

    def note(self) -> Note:
        """The newest note."""
        with self._lock:
            return self._note


here = Whereabouts()
"""Of this process: one rank, one record, whichever part of the training it is in."""
