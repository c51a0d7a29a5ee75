"""Ctrl-C and SIGTERM: the first stops a run where it can be continued, the second kills it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A run was asked to stop. No `KeyboardInterrupt`: Lightning ends the process itself at one.

    Attributes:
        number: of the signal; a process that it ends has the exit code 128 + number.
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(where)
        self.number, self.where = number, where


class Pending:
    """The signal that came, or 0."""

    number = 0

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle the first signal; the second has the system's own effect."""
        _forget()
        self.number = number
        print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Handle signals, again where another library has put itself before."""
        if not self.number and threading.current_thread() is threading.main_thread():
            for number in STOPS:
                signal.signal(number, self.note)


def said(where: str = "") -> str:
    """The line that a run which was stopped leaves."""
    return f"stopped; {where}{': ' if where else ''}the same command continues where it was"


@contextmanager
def raised() -> Iterator[None]:
    """Inside, the first signal raises `Stopped`, where the program stands; a second has the system's own effect. In an import,
    which would make another error of it, the process ends at once: files are whole at any time."""

    def stop(number: int, frame: FrameType | None) -> None:
        _forget()
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                print(said(), file=sys.stderr, flush=True)
                os._exit(128 + number)
            frame = frame.f_back
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def held() -> Iterator[Pending]:
    """Inside, the first signal is only noted: a step goes to its end. A second has the system's own effect."""
    pending = Pending()
    with _handled(pending.note):
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
