"""Between driver and workers: a wish to stop goes in, progress, messages and errors come out."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.signals import stop_signals

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a note with the newest figures."""
News = tuple[int, int, str]
"""What `OnProgress` is called with."""

POLL_S = 0.5
"""Seconds between two looks of the driver at what is under way."""


class Office:
    """An actor between driver and workers: a wish to stop goes in, progress and errors come out.

    Only plain values pass through it, so it survives whatever the workers go through.
    """

    def __init__(self) -> None:
        self._stop = False
        self._error: tuple[str, str] | None = None
        self._progress: dict[int, News] = {}
        self._messages: list[tuple[int, str]] = []

    def stop(self) -> None:
        self._stop = True

    def report(self, news: News, part: int = 0) -> bool:
        """Take the progress of one of several parts; whether the reporter should stop."""
        self._progress[part] = news
        return self._stop

    def log(self, level: int, message: str) -> None:
        self._messages.append((level, message))

    def fail(self, name: str, message: str) -> None:
        """Keep the first error of a worker."""
        self._error = self._error or (name, message)

    def error(self) -> tuple[str, str] | None:
        return self._error

    def news(self) -> tuple[News | None, list[tuple[int, str]]]:
        """Progress of all parts together, and the messages since the last call."""
        messages, self._messages = self._messages, []
        if not self._progress:
            return None, messages
        done, totals, notes = zip(*self._progress.values(), strict=True)
        return (sum(done), sum(totals), notes[-1]), messages


class OfficeHandler(logging.Handler):
    """Sends a worker's log records to the driver."""

    def __init__(self, office: Any) -> None:
        super().__init__(logging.INFO)
        self._office = office

    def emit(self, record: logging.LogRecord) -> None:
        self._office.log.remote(record.levelno, record.getMessage())


def open_office(kind: type[Office]) -> Any:
    """The actor, on the driver's own node, which the loss of another node leaves alone."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()


def show(office: Any, on_progress: OnProgress | None) -> None:
    progress, messages = ray.get(office.news.remote())
    for level, message in messages:
        logger.log(level, "%s", message)
    if progress is not None and on_progress is not None:
        on_progress(*progress)


def wish_to_stop(stop: threading.Event | None) -> AbstractContextManager[threading.Event]:
    return stop_signals() if stop is None else nullcontext(stop)
