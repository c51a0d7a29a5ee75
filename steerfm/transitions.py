"""Transitions: kernels from x_s to x_t, one step of a sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from steerfm.capabilities import can, needs
from steerfm.flowmap import FlowMap
from steerfm.interpolant import Interpolant
from steerfm.rows import Condition

NO_DRAWS = "a transition by draws of the posterior needs a look-ahead that draws them: lookahead=posterior"


@dataclass
class Step:
    """The Gaussian kernel of one transition: x' ~ N(mean, std^2 I); deterministic if std = 0.

    Attributes:
        mean: (b, *shape).
        std: standard deviation, the same for all rows.
    """

    mean: Tensor
    std: float

    def sample(self, noise: Tensor | None) -> Tensor:
        """mean + std * noise; ``noise`` (b, *shape) may be None if std = 0."""
        if self.std == 0 or noise is None:
            return self.mean
        return torch.add(self.mean, noise, alpha=self.std)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I), (b,), summed over all entries in float64.

        Raises:
            ValueError: the kernel is deterministic and has no density.
        """
        if self.std == 0:
            raise ValueError("a deterministic transition has no density: use Renoise or Diffuse")
        d = self.mean[0].numel()
        squares = ((x - self.mean) / self.std).flatten(1).square().sum(1, dtype=torch.float64)
        return -0.5 * squares - d * (math.log(self.std) + 0.5 * math.log(2 * math.pi))


class Transition(Protocol):
    """A move of the whole batch from time s to time t: any object with these members.

    The step to t = 1 should be deterministic: noise that is added to the data would stay there. A transition that guarantees
    this can also be `Landing`; one that can use an endpoint `Sharing`; one that does not fit every map
    `steerfm.capabilities.Choosy`.
    """

    @property
    def stochastic(self) -> bool:
        """Whether the steps before the last have noise."""
        ...

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        """The kernel from x (b, *shape) at time s to time t > s.

        Args:
            flow_map: the map.
            x: (b, *shape) states at time s.
            s: time of x.
            t: later time.
            cond: condition of each row, or None.
            endpoint: (b, *shape) of the kind in `Sharing`, if available.
        """
        ...


@runtime_checkable
class Sharing(Protocol):
    """A transition that can reuse the endpoint of a look-ahead.

    Attributes:
        endpoint: kind of the endpoint: "jump" for X_{s,1}(x) or "denoised" for E[x_1 | x_s = x], which save a network call;
            "posterior" for a sample of p(x_1 | x_s = x); "" for none.
    """

    @property
    def endpoint(self) -> str: ...


@runtime_checkable
class Landing(Protocol):
    """A transition with the attribute ``lands``: its step to t = 1 is deterministic, so it needs no gradient there."""

    @property
    def lands(self) -> bool: ...


@dataclass(frozen=True)
class Jump:
    """x' = X_{s,t}(x): deterministic.

    Args:
        hops: equal jumps from s to t; each costs one call.
    """

    hops: int = 1
    endpoint, lands = "jump", True

    @property
    def stochastic(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if self.hops < 1:
            raise ValueError(f"hops={self.hops}: at least one jump is needed")

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        if endpoint is not None and t == 1 and self.hops == 1:
            return Step(endpoint, 0.0)
        for i in range(self.hops):
            x = flow_map.jump(x, s + (t - s) * (i / self.hops), s + (t - s) * ((i + 1) / self.hops), cond)
        return Step(x, 0.0)

    def lacks(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`. A jump of a velocity is an Euler step."""
        if can(flow_map, "velocity") or (len(times) == 2 and self.hops == 1 and can(flow_map, "generator")):
            return ""
        if can(flow_map, "endpoint"):
            return needs("two_time", "take transition=renoise, which jumps to the data and noises back, or steps=1")
        return needs("two_time", "take steps=1")


@dataclass(frozen=True)
class Renoise:
    """Jump to r = t + gamma (1 - t), then noise back: x' = (alpha_t/alpha_r) X_{s,r}(x) + std z.

    For an exact flow map this keeps every marginal p_t exactly, in any number of steps. gamma = 0 is `Jump`; gamma = 1
    jumps to the data and back, as multistep consistency sampling does (Song et al. 2303.01469, algorithm 1). So do draws of
    the posterior in place of the jump.

    Args:
        gamma: how far to overshoot, in [0, 1].
        endpoint: "jump", or "posterior" for the look-ahead `Posterior`, whose draws are noised back.
    """

    gamma: float = 1.0
    endpoint: str = "jump"
    lands = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: must be in [0, 1]")
        if self.endpoint not in ("jump", "posterior"):
            raise ValueError(f"endpoint={self.endpoint!r}: must be jump or posterior")
        if self.endpoint == "posterior" and self.gamma < 1:
            raise ValueError(f"gamma={self.gamma}: draws of the posterior are at the data, take gamma=1 or endpoint=jump")

    @property
    def stochastic(self) -> bool:
        return self.gamma > 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        if endpoint is None and self.endpoint == "posterior":
            raise ValueError(NO_DRAWS)
        r = t + self.gamma * (1 - t)
        scale, std = flow_map.interpolant.renoise(r, t)
        x_r = endpoint if endpoint is not None and r == 1 else flow_map.jump(x, s, r, cond)
        return Step(x_r if scale == 1 else scale * x_r, std)

    def lacks(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`."""
        if self.gamma == 0 or len(times) == 2:
            return Jump().lacks(flow_map, times)
        if can(flow_map, "endpoint" if self.gamma == 1 else "two_time"):
            return ""
        if can(flow_map, "velocity"):
            return needs("endpoint", "take transition=midpoint, bridge or diffuse, which only need a velocity")
        if can(flow_map, "endpoint"):
            return needs("two_time", "take gamma=1, which jumps to the data and noises back")
        return needs("endpoint", "take steps=1")


@dataclass(frozen=True)
class Auto(Renoise):
    """`Renoise`, unless the method prefers another transition for the map and the reward: see `steerfm.Funnel`."""


@dataclass(frozen=True)
class Diffuse:
    """Euler-Maruyama step of dx = (b + eps score) dt + sqrt(2 eps) dW, with marginals p_t for any eps_t >= 0.

    Args:
        epsilon: a constant, or a function of time. Default eps_t = sigma_t: it stays stable although the score grows like
            1 / sigma_t towards the data; a large constant does not.
    """

    epsilon: float | Callable[[float], float] | None = None
    endpoint, lands = "", True

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, float | int) and not self.epsilon >= 0:
            raise ValueError(f"epsilon={self.epsilon}: must be at least 0")

    @property
    def stochastic(self) -> bool:
        return self.epsilon != 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        path, h = flow_map.interpolant, t - s
        b = flow_map.velocity(x, s, cond)
        if t >= 1:
            return Step(x + h * b, 0.0)
        if self.epsilon is None:
            epsilon = path.sigma(s)
        else:
            epsilon = self.epsilon(s) if callable(self.epsilon) else self.epsilon
        return Step(x + h * (b + epsilon * path.score(x, b, s)), math.sqrt(2 * epsilon * h))

    def lacks(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`."""
        return "" if can(flow_map, "velocity") else _no_velocity(flow_map)


@dataclass(frozen=True)
class Midpoint:
    """The velocity's ODE by the midpoint rule to r = t + churn (t - s), then noise back: x' = (alpha_t/alpha_r) x_r + std z.

        x_r = x + (r - s) b(x + (r - s)/2 b(x, s), (s + r)/2)

    Costs two velocities per step; a denoiser look-ahead shares the first one. The error is of order 1 / steps^2, but 1 / steps
    for `Bridge`, `Diffuse` and Euler steps: on three modes, 8 steps are closer to the target than 64 of those. It is the
    sampler of Karras et al. 2206.00364 (algorithm 2) with the noise after the step, so that the step has a Gaussian density.

    Args:
        churn: new noise, in steps: 0 for none (the ODE), 1 for as much as one step removes; at least 0.
    """

    churn: float = 1.0
    endpoint, lands = "denoised", True

    def __post_init__(self) -> None:
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn={self.churn}: must be at least 0 and finite")

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        path, r = flow_map.interpolant, min(1.0, t + self.churn * (t - s))
        b = flow_map.velocity(x, s, cond) if endpoint is None else path.velocity_from_denoised(x, endpoint, s)
        half = (r - s) / 2
        x_r = x + 2 * half * flow_map.velocity(x + half * b, s + half, cond)
        scale, std = path.renoise(r, t)
        return Step(x_r if scale == 1 else scale * x_r, std)

    def lacks(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`."""
        return "" if can(flow_map, "velocity") else _no_velocity(flow_map)


@dataclass(frozen=True)
class Bridge:
    """x' ~ p(x_t | x_s = x, x_1 = z): noise to data through a given endpoint z.

    With z = E[x_1 | x_s = x] it is DDPM's ancestral step (eta = 1) or DDIM's (eta = 0; Song et al. 2010.02502, equation 12),
    which are exact only in the limit of many steps. If z is a sample of the posterior and eta = 1, the step is exact for any
    number of steps (GLASS, 2602.05993). That needs a look-ahead that draws z.

    Args:
        eta: share of new noise, in [0, 1]; the rest follows from x.
        endpoint: "denoised", or "posterior" for the look-ahead `Posterior`.
    """

    eta: float = 1.0
    endpoint: str = "denoised"
    lands = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: must be in [0, 1]")
        if self.endpoint not in ("denoised", "posterior"):
            raise ValueError(f"endpoint={self.endpoint!r}: must be denoised or posterior")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        path = flow_map.interpolant
        if endpoint is None:
            if self.endpoint == "posterior":
                raise ValueError(NO_DRAWS)
            endpoint = flow_map.denoise(x, s, cond)
        if t >= 1:
            return Step(endpoint, 0.0)
        keep, share, std = self.coefficients(path, s, t)
        return Step(keep * x + share * endpoint, std)

    def lacks(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`."""
        return "" if can(flow_map, "velocity") else _no_velocity(flow_map)

    def coefficients(self, path: Interpolant, s: float, t: float) -> tuple[float, float, float]:
        """(keep, share, std) of the step to t < 1, N(keep x + share z, std^2 I)."""
        # Given z, the path back is x_t -> x_s with this scale and std; Bayes' rule gives the kernel forward.
        rho = path.alpha(s) * path.sigma(t) / (path.alpha(t) * path.sigma(s))
        std = self.eta * path.sigma(t) * math.sqrt(1 - rho**2)
        keep = math.sqrt(path.sigma(t) ** 2 - std**2) / path.sigma(s)
        return keep, path.alpha(t) - keep * path.alpha(s), std


def _no_velocity(flow_map: FlowMap) -> str:
    return needs("velocity", "take transition=renoise" if can(flow_map, "endpoint") else "take transition=jump and steps=1")


def usual(flow_map: FlowMap) -> Transition:
    """The default transition of a map: its own, or `Jump`; `Renoise` for a map that only jumps to the data."""
    if flow_map.transition is not None:
        return flow_map.transition
    return Renoise() if can(flow_map, "endpoint") and not can(flow_map, "velocity") else Jump()


TRANSITIONS: dict[str, type] = {
    "jump": Jump, "renoise": Renoise, "diffuse": Diffuse, "bridge": Bridge, "midpoint": Midpoint, "auto": Auto
}  # fmt: skip
"""Transitions by their names in configurations."""
