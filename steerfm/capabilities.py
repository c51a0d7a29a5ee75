"""What a map can do, and what that means for those who use it.

    two_time    every jump X_{s,t} is right: flow maps; they can do all that follows
    endpoint    jumps to the data are right, X_{s,1}: consistency models
    velocity    the velocity u(x, t, t) is right: flow matching and diffusion models; a jump is then an Euler step
    generator   one jump from noise to data is right, X_{0,1}: one-step generators
    posterior   draws of p(x_1 | x_t) are right, beside all else that a map can do: posterior maps

A map names what it can do (`FlowMap.capabilities`). Parts of methods that need some of it have a method ``lacks``, which says
what a map lacks, so that `steer` and `finetune` refuse what would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

GENERATOR = frozenset({"generator"})
ENDPOINT = GENERATOR | {"endpoint"}
VELOCITY = frozenset({"velocity"})
TWO_TIME = ENDPOINT | VELOCITY | {"two_time"}

KINDS: dict[str, frozenset[str]] = {
    "two_time": TWO_TIME,
    "endpoint": ENDPOINT,
    "velocity": VELOCITY,
    "generator": GENERATOR,
    "posterior": frozenset({"posterior"}),
}
"""All that each capability brings with it."""

WORDS = {
    "two_time": "jumps between any two times",
    "endpoint": "jumps to the data",
    "velocity": "a velocity",
    "generator": "one jump from noise to data",
    "posterior": "draws of the posterior",
}
"""Each capability in words."""


class Capable(Protocol):
    """What has capabilities: a `FlowMap`."""

    @property
    def capabilities(self) -> Collection[str]: ...


@runtime_checkable
class Choosy(Protocol):
    """A method, or a part of one, that does not fit every map; any object with this member is one."""

    def lacks(self, flow_map: Any, times: Any) -> str:
        """What a `FlowMap` lacks for it at these times (None for its own), and what to take instead; "" where it fits."""
        ...


def closed(names: Collection[str]) -> frozenset[str]:
    """Capabilities with all that they bring with them.

    Raises:
        ValueError: an unknown one.
    """
    if isinstance(names, str):
        names = (names,)
    for name in names:
        if name not in KINDS:
            raise ValueError(f"unknown capability {name!r}; capabilities: {', '.join(KINDS)}")
    return frozenset().union(*(KINDS[name] for name in names))


def can(flow_map: Capable, name: str) -> bool:
    """Whether a map has a capability, of itself or by another one."""
    return name in closed(flow_map.capabilities)


def in_words(flow_map: Capable) -> str:
    """What a map can do, in words: the widest of its capabilities."""
    has = closed(flow_map.capabilities)
    widest = [name for name in KINDS if name in has and not any(name in KINDS[other] for other in has if other != name)]
    return " and ".join(WORDS[name] for name in widest) or "nothing"


def in_steps(flow_map: Capable, n: int) -> str:
    """So many steps of a map in words: 4 jumps, or 4 steps where it can make none."""
    return f"{n} {step_of(flow_map)}{'' if n == 1 else 's'}"


def step_of(flow_map: Capable) -> str:
    """What one step of a map is: a jump, or a step of an ODE or SDE solver."""
    return "jump" if can(flow_map, "generator") else "step"


def check_method(method: object, flow_map: Capable, times: Sequence[float] | None = None) -> None:
    """Refuse a method, of steering or of tuning, that would be wrong for a map.

    Args:
        times: that will be visited; None for the method's own.

    Raises:
        ValueError: what the map lacks, and what to take in place of it.
    """
    if isinstance(method, Choosy) and (why := method.lacks(flow_map, times)):
        raise ValueError(f"{type(method).__name__} does not fit this model, which has only {in_words(flow_map)}: {why}")


def needs(name: str, instead: str) -> str:
    """What a part answers for its ``lacks``."""
    return f"needs {WORDS[name]}: {instead}"
