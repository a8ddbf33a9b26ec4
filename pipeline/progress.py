"""Progress for people: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class LogLines(logging.Handler):
    """Log records as plain lines on stderr, above a bar that is being drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=sys.stderr)


class Progress:
    """Counts up to a total that may be told later; `update` takes the number done so far."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self._started = self._last_line = time.monotonic()
        self._first: int | None = None
        self._printed = -1
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self.title, unit=self.unit, dynamic_ncols=True, leave=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done; `note` holds the newest figures."""
        if self._first is None:
            self._first = done
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        waiting = now - self._last_line < SECONDS_BETWEEN_LINES and done < total
        if waiting or done == self._printed:
            return
        self._last_line, self._printed = now, done
        rate = (done - self._first) / max(now - self._started, 1e-9)
        speed = f", {rate:,.1f} {self.unit}/s" if rate > 0 else ""
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        extra = f", {note}" if note else ""
        print(f"{self.title}: {done:,} of {total:,} {self.unit}{speed}{extra}{left}", flush=True)
