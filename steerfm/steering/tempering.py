"""Tempering: the inverse temperature beta of the value along the path.

beta(t) rises from 0 to 1, so that early, uncertain look-aheads do not decide everything. It is a function of time, or adapts
to each output during the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steerfm.flowmap import FlowMap
from steerfm.interpolant import Interpolant

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
class Damping:
    """beta(t) = 1 / (1 + curvature v_t), v_t = 1 / (1 / std^2 + (t / (1 - t))^2): what guidance by one endpoint lacks.

    The gradient at one draw, or at the denoiser, takes the reward to be linear over all ends of a path, and follows it too far
    inside a mode ("Are we really tilting?", 2606.02884, has a damping of this kind). For data of standard deviation ``std`` on
    the linear path v_t is the variance of those ends. With strength * r = -curvature |x - c|^2 / 2 the damped gradient is then
    that of the value, so that the tilt is sampled as steps grow. The formula is derived here. It moves no mass between modes.

    Args:
        curvature: of strength times the reward, downwards, at least 0.
        std: of the data inside a mode, above 0.
    """

    curvature: float = 1.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.curvature < math.inf and 0 < self.std < math.inf):
            raise ValueError(f"curvature={self.curvature}, std={self.std}: at least 0, and above 0")

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `steerfm.capabilities.Choosy`: v_t is that of the linear path."""
        return "" if type(flow_map.interpolant) is Interpolant else "holds on the linear path alone: take tempering=none"

    def __call__(self, t: float) -> float:
        far = (1 - t) ** 2
        return 1 / (1 + self.curvature * far / (far / self.std**2 + t**2))


@dataclass(frozen=True)
class Adaptive:
    """The largest beta at which each step keeps a given share of the effective sample size, per output.

    beta is found by bisection (adaptive SMC, Del Moral et al. 2012; DAS 2501.05803). It is 0 at t = 0, never falls, and is 1 at
    t = 1. Needs correction twisted. beta depends on the particles, so log Z is consistent but no longer unbiased.

    Args:
        ess: share of the ESS that one step keeps, in (0, 1).
    """

    ess: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.ess < 1:
            raise ValueError(f"ess={self.ess}: must be between 0 and 1")

    def __call__(self, t: float) -> float:
        """The upper bound of beta: 0 at t = 0, 1 later."""
        return 0.0 if t <= 0 else 1.0


TEMPERINGS: dict[str, Tempering] = {
    "linear": Power(1.0),
    "exponential": Exponential(),
    "adaptive": Adaptive(),
    "damping": Damping(),
    "none": untempered,
}
"""Temperings by their names in configurations; a number p stands for t^p."""
