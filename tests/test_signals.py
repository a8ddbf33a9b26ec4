"""Being asked to stop: once, twice by a scheduler, and again by somebody who means it."""

import os
import signal

import pytest

from pipeline import signals
from pipeline.signals import stop_signals


class EndedError(Exception):
    """Raised by the handler that was there before."""


@pytest.fixture(autouse=True)
def handler_before() -> object:
    def end(*_: object) -> None:
        raise EndedError

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_same_request_may_come_twice() -> None:
    with stop_signals() as stop:
        assert not stop.is_set()
        ask()
        ask()
        assert stop.is_set()
    with pytest.raises(EndedError):
        ask()


def test_a_later_request_acts_as_if_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_S", -1.0)
    with pytest.raises(EndedError), stop_signals() as stop:
        ask()
        assert stop.is_set()
        ask()
