"""Checks of common arguments."""

from __future__ import annotations

from typing import Any


def whole_numbers(**counts: Any) -> None:
    """Check that the arguments are whole numbers.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not hasattr(type(count), "__index__"):
            raise ValueError(f"{name}={count!r}: give a whole number")


def at_least_one(**counts: int) -> None:
    """Check that the arguments are whole numbers of at least one.

    Raises:
        ValueError: one is not; the message names it.
    """
    whole_numbers(**counts)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: at least one is needed")
