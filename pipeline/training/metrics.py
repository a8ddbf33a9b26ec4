"""metrics.jsonl: one line an event, of trainers and evaluations, passed on to the sinks."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe
from pipeline.training.locks import open_lock, try_lock
from pipeline.training.manifest import write_atomically
from pipeline.training.sinks import open_sinks
from pipeline.training.space import append_line, read_lines, with_room

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_PASSED_ON = ".passed_on"
"""A file with the number of bytes of metrics.jsonl that the sinks have had."""


class SinkFeed:
    """Gives the sinks what was appended to metrics.jsonl, by this process or by another.

    Whoever has one must hold the run (`log.run_lock`). A sink that fails is left out from then on
    with a warning: figures on a server are not worth a training run. With `step`, the sinks are
    told to forget what comes after it.
    """

    def __init__(self, recipe: Recipe, step: int | None = None) -> None:
        self._run_dir = recipe.run_dir
        self._sinks = open_sinks(recipe, step)

    def pass_on(self) -> None:
        """Send the lines that the sinks have not had."""
        offset = _read_offset(self._run_dir)
        for line in read_lines(self._run_dir / METRICS, offset):
            if not line.endswith(b"\n"):
                break  # A kill cut it short.
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:
                continue  # Not a line of ours, or the offset was in the middle of one.
            self._each(lambda sink, event=event: sink.write(event["step"], sink_values(event)))
        _write_offset(self._run_dir, offset)

    def close(self) -> None:
        """Pass on what is left, and let the sinks write what they hold back."""
        self.pass_on()
        self._each(lambda sink: sink.close())

    def _each(self, work: Any) -> None:
        for sink in list(self._sinks):
            try:
                work(sink)
            except Exception as error:  # whatever a service's client raises
                self._sinks.remove(sink)
                name = type(sink).__name__
                logger.warning("%s failed and gets no more figures: %s", name, error)


def append_event(run_dir: Path, event: str, step: int, values: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl, whole and at once, whoever else appends."""
    with _exclusive(run_dir):
        append_line(run_dir / METRICS, json.dumps({"event": event, "step": step, **values}))


def sink_values(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line, under the names that they have in the sinks.

    Figures of an evaluation on a subset are named apart from those on all images.
    """
    prefix = ""
    if event["event"] == "evaluation":
        prefix = "evaluation_subset/" if "subset" in event else "evaluation/"
    return {
        prefix + name: float(value)
        for name, value in event.items()
        if name not in ("event", "step") and isinstance(value, int | float)
    }


def remove_lines_after(run_dir: Path, step: int) -> None:
    """Keep the lines up to `step`, and no line that a kill cut short."""
    with _exclusive(run_dir):
        path = run_dir / METRICS
        with_room(path, 0, path.touch)
        offset, place, kept, passed = _read_offset(run_dir), 0, [], 0
        lines = read_lines(path)
        for line in lines:
            place += len(line)
            if line.endswith(b"\n") and _step_of(line) <= step:
                kept.append(line)
                passed += len(line) if place <= offset else 0
        if kept != lines:
            _write_offset(run_dir, passed)  # First: a kill in between must not skip lines.
            write_atomically(path, b"".join(kept).decode())


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _read_offset(run_dir: Path) -> int:
    """What a damaged file says counts as nothing: sinks rather hear twice than never again."""
    try:
        size = (run_dir / METRICS).stat().st_size
        offset = int((run_dir / _PASSED_ON).read_text())
    except (OSError, ValueError):
        return 0
    return offset if 0 <= offset <= size else 0


def _write_offset(run_dir: Path, offset: int) -> None:
    partial, text = run_dir / f"{_PASSED_ON}.tmp", str(offset)

    def write() -> None:
        partial.write_text(text)
        partial.replace(run_dir / _PASSED_ON)

    with_room(partial, len(text), write)


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Only one process at a time appends or rewrites: a line must not go to a file that is gone."""
    with open_lock(run_dir / ".metrics_lock") as lock:
        try_lock(lock, wait=True)
        yield
