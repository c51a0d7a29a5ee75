"""Ctrl-C and SIGTERM: the first stops a run where it can be continued, the second kills it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop.

    Attributes:
        number: of the signal; a process that it ends has the exit code 128 + number.
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(where)
        self.number, self.where = number, where


class Pending:
    """The signal that came, or 0."""

    number = 0


@contextmanager
def raised() -> Iterator[None]:
    """Inside, the first signal raises `Stopped`, where the program stands; a second has the system's own effect."""

    def stop(number: int, _: FrameType | None) -> None:
        _forget()
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def held() -> Iterator[Pending]:
    """Inside, the first signal is only noted: a step goes to its end. A second has the system's own effect."""
    pending = Pending()

    def note(number: int, _: FrameType | None) -> None:
        _forget()
        pending.number = number
        print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    with _handled(note):
        yield pending


def _forget() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handled(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread has signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
