"""Tempering: how hot the value is on the way.

beta(t) rises from 0 to 1, so that the particles are not all judged on a far look-ahead at the start. It is a function of
time, or chosen per output as the run goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Tempering = Callable[[float], float]


@dataclass(frozen=True)
class Power:
    """beta(t) = t^p; p = 1 is linear."""

    p: float = 1.0

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"p={self.p}: the power must be positive")

    def __call__(self, t: float) -> float:
        return t**self.p


@dataclass(frozen=True)
class Exponential:
    """beta(t) = ((1 + gamma)^t - 1) / gamma: late for a large gamma (the shape of DAS's schedule, 2501.05803)."""

    gamma: float = 10.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma}: must be positive")

    def __call__(self, t: float) -> float:
        return ((1 + self.gamma) ** t - 1) / self.gamma


def untempered(t: float) -> float:
    """beta = 1 from the start: the full reward at every time."""
    return 1.0


@dataclass(frozen=True)
class Adaptive:
    """beta as large as the particles bear: each step keeps this share of the effective sample size, per output.

    Chosen by bisection (adaptive SMC, Del Moral et al. 2012; DAS 2501.05803). Zero at t = 0, never falling, one at t = 1.
    Needs correction twisted. The choice depends on the particles, so log Z is consistent but no longer unbiased.

    Args:
        ess: in (0, 1); what one step leaves of the ESS.
    """

    ess: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.ess < 1:
            raise ValueError(f"ess={self.ess}: a share, between 0 and 1")

    def __call__(self, t: float) -> float:
        """Its bounds: 0 at t = 0, at most 1 later."""
        return 0.0 if t <= 0 else 1.0


TEMPERINGS: dict[str, Tempering] = {
    "linear": Power(1.0),
    "exponential": Exponential(),
    "adaptive": Adaptive(),
    "none": untempered,
}
"""Temperings by the name that configurations use; a number p stands for t^p."""
