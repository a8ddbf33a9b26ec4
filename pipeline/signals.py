"""Being asked to stop: SIGTERM of a scheduler, SIGINT of a person."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_REQUEST_S = 3.0
"""Schedulers signal every process of a job, and the job's script then passes it on."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; one that comes more than `SAME_REQUEST_S`
    later acts as if not caught.

    In a thread other than the main one nothing can be caught, and the event stays clear.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    asked: list[float] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        if not asked:
            asked.append(time.monotonic())
            stop.set()
        elif time.monotonic() - asked[0] > SAME_REQUEST_S:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def signals_kept() -> Iterator[None]:
    """Put the handlers of SIGTERM and SIGINT back that a library replaces inside the block."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
