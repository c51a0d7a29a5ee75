"""Ctrl-C and SIGTERM: the first signal stops a run so that it can be resumed, the second kills it."""

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
    """A signal stopped the run. Not a `KeyboardInterrupt`, at which Lightning would end the process itself.

    Attributes:
        number: of the signal; the exit code of the process is 128 + number.
        where: the folder of the run, or "".
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(where)
        self.number, self.where = number, where


class Pending:
    """A signal that has arrived; its number is 0 before."""

    number = 0

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle the first signal; the second one has its default effect."""
        _forget()
        self.number = number
        print("stopping after this step; again to stop at once", file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Install the handler, again if another library has replaced it."""
        if not self.number and threading.current_thread() is threading.main_thread():
            for number in STOPS:
                signal.signal(number, self.note)


def stop_message(where: str = "") -> str:
    """The last line of a run that was stopped."""
    return f"stopped; {where}{': ' if where else ''}the same command continues where it was"


@contextmanager
def raised() -> Iterator[None]:
    """A context in which the first signal raises `Stopped`; a second one has its default effect. During an import, which would
    turn it into another error, the process ends at once; this is safe, since writes are atomic."""

    def stop(number: int, frame: FrameType | None) -> None:
        _forget()
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                print(stop_message(), file=sys.stderr, flush=True)
                os._exit(128 + number)
            frame = frame.f_back
        raise Stopped(number)

    with _handle(stop):
        yield


@contextmanager
def held() -> Iterator[Pending]:
    """A context in which the first signal is only recorded, so that a step can finish. A second one has its default effect."""
    pending = Pending()
    with _handle(pending.note):
        yield pending


def _forget() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handle(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread has signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
