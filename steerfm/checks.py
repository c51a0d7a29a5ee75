"""Checks of arguments that many functions take."""

from __future__ import annotations

from typing import Any


def whole_numbers(**counts: Any) -> None:
    """Refuse what is no whole number, by name.

    Raises:
        ValueError: naming the argument.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not hasattr(type(count), "__index__"):
            raise ValueError(f"{name}={count!r}: give a whole number")


def at_least_one(**counts: int) -> None:
    """Refuse counts below one, and what is no whole number, by name.

    Raises:
        ValueError: naming the argument.
    """
    whole_numbers(**counts)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: at least one is needed")
