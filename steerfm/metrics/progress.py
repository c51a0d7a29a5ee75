"""Progress bars that a caller may give to a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Progress = Callable[[str, int], AbstractContextManager[Callable[[int, int], Any]]]
"""(what, total) to a context with tick(done, total)."""


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int, int], Any]]:
    """No progress bar."""
    yield lambda done, total: None
