"""Steering methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

from steerfm.registry import Kind, build
from steerfm.steering.outcome import Fitting, Method
from steerfm.steering.presets import METHODS

METHOD = Kind(
    "method",
    lambda thing: all(callable(getattr(thing, name, None)) for name in ("run", "check")),
    "an object with the interface of steerfm.steering.Method",
    "steerfm.methods()",
    METHODS,
)


M = TypeVar("M", bound=Method)


@overload
def method(spec: M, /) -> M: ...
@overload
def method(spec: str | Mapping[str, Any], /, **arguments: Any) -> Fitting: ...
def method(spec: str | Mapping[str, Any] | Method, /, **arguments: Any) -> Method:
    """A steering method by name.

    >>> steerfm.method("fmrg_j", stop=0.8).within(64)

    Args:
        spec: a name from `methods`; ``FILE.py:NAME`` for a class of your own; {name: NAME, ...}; or a method.
        arguments: of its class; a part by name or as a dictionary of its arguments.

    Raises:
        ValueError: there is no such method or argument; the message suggests the nearest one.
    """
    return build(spec, METHOD, arguments)


def methods() -> list[str]:
    """The names of the steering methods; ``steering`` is a free combination of parts."""
    return list(METHODS)
