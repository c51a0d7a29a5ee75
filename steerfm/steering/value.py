"""The value of a state and its gradient, through interchangeable look-aheads.

    V_t(x) = log mean_k exp(log_w_k + beta(t) strength r(z_k)),      z_k the look-ahead's endpoints

estimates log E[exp(strength r(x_1)) | x_t = x] at beta = 1. The tempering beta rises from 0 to 1 so that the particles are
not all judged on a far look-ahead at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfm.flowmap import Condition, FlowMap, map_condition
from steerfm.interpolant import expand_time
from steerfm.rewards import Prompts, Reward, RewardError, Scores
from steerfm.steering.lookahead import Endpoints, Lookahead, log_mean_exp
from steerfm.steering.weights import wide

Tempering = Callable[[float], float]


# --- tempering -------------------------------------------------------------------------------------------------------
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


TEMPERINGS: dict[str, Tempering] = {"linear": Power(1.0), "exponential": Exponential(), "none": untempered}


# --- the problem -----------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """What is steered: the map, the reward, and one row per particle of everything that depends on the output.

    Attributes:
        flow_map, reward: as given.
        strength: (b,) strength of the tilt per particle.
        cond: condition per particle; labels (b,) and prompts for rewards that read them.
    """

    flow_map: FlowMap
    reward: Reward
    strength: Tensor
    cond: Condition = None
    labels: Tensor | None = None
    prompts: Prompts = None

    def score(self, z: Tensor, k: int = 1) -> Scores:
        """Scores of b * k endpoints in model space, ``k`` for each particle."""
        labels = None if self.labels is None else self.labels.repeat_interleave(k)
        prompts = None if self.prompts is None else [prompt for prompt in self.prompts for _ in range(k)]
        return self.reward.evaluate(self.flow_map.decode(z), prompts, labels)


# --- the value -------------------------------------------------------------------------------------------------------
@dataclass
class Evaluation:
    """What is known about the particles at one time.

    Attributes:
        value: (b,) V_t(x), tempered, in the wide dtype.
        tilt: (b,) strength * r of the first endpoint, untempered.
        endpoint: (b, *shape) the first endpoint.
        direction: (b, *shape) what a guidance adds to the state, before its coefficient; None without guidance.
    """

    value: Tensor
    tilt: Tensor
    endpoint: Tensor | None = None
    direction: Tensor | None = None

    def select(self, rows: Tensor) -> Evaluation:
        """The evaluations of the given particles (b,)."""
        endpoint = None if self.endpoint is None else self.endpoint[rows]
        direction = None if self.direction is None else self.direction[rows]
        return Evaluation(self.value[rows], self.tilt[rows], endpoint, direction)


def value(problem: Problem, ends: Endpoints, beta: float) -> tuple[Tensor, Tensor]:
    """(V (b,), tilt (b,)) of the endpoints of a look-ahead; differentiable where gradients are on."""
    b, k = ends.z.shape[:2]
    r = problem.score(ends.z.flatten(0, 1), k).total.view(b, k)
    tilt = problem.strength.unsqueeze(1) * r.to(wide(r.device))
    return log_mean_exp(ends.log_w, beta * tilt), tilt[:, 0].detach()


def evaluate(problem: Problem, lookahead: Lookahead, x: Tensor, t: float, beta: float) -> Evaluation:
    """The value without a gradient."""
    ends = lookahead.endpoints(problem.flow_map, x, t, problem.cond)
    return Evaluation(*value(problem, ends, beta), ends.z[:, 0])


# --- guidance --------------------------------------------------------------------------------------------------------
class Guidance(Protocol):
    """How a step is pushed uphill; any object with these three members is one.

    The shift of a step is coefficient * direction, with the norm capped at ``cap`` times the step's own displacement.
    """

    @property
    def cap(self) -> float | None: ...

    def evaluate(self, problem: Problem, lookahead: Lookahead, x: Tensor, t: float, beta: float) -> Evaluation:
        """Value and direction at x."""
        ...

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        """What is added to the step's mean, (b, *shape)."""
        ...


@dataclass(frozen=True)
class MapGradient:
    """grad_x V_t(x) by backpropagation through the reward, the decoder and the look-ahead.

    The shift is scale * std^2 grad V for a stochastic transition (the optimal shift of a Gaussian under a locally linear
    value) and scale * (t - s) kappa_s grad V for a deterministic one (the exact tilted velocity, kappa = (1 - t)/t, capped).

    Args:
        scale: multiplies the shift; 1 is the theory's.
        normalised: make the shift ``scale`` times as long as the step's displacement, whatever the reward's scale (FMRG).
        cap: longest shift, relative to the displacement: gradients of look-aheads are heavy-tailed at basin borders.
    """

    scale: float = 1.0
    normalised: bool = False
    cap: float | None = 1.0

    def evaluate(self, problem: Problem, lookahead: Lookahead, x: Tensor, t: float, beta: float) -> Evaluation:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ends = lookahead.endpoints(problem.flow_map, x, t, problem.cond)
            v, tilt = value(problem, ends, beta)
            gradient = _gradient(problem.reward, v, x)
        return Evaluation(v.detach(), tilt, ends.z[:, 0].detach(), gradient)

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        assert evaluation.direction is not None
        coefficient = std**2 if std else (t - s) * capped_score_coefficient(flow_map, s)
        displacement = _norm(mean - x)
        if self.normalised:
            return self.scale * displacement * evaluation.direction / _norm(evaluation.direction).clamp_min(1e-12)
        return capped(self.scale * coefficient * evaluation.direction, displacement, self.cap)


@dataclass(frozen=True)
class EndpointGradient(MapGradient):
    """As `MapGradient`, but the gradient stops at the endpoint: dz/dx is taken as the identity, no network backward.

    FlowChef's approximation (2412.00100), good where trajectories are straight.
    """

    def evaluate(self, problem: Problem, lookahead: Lookahead, x: Tensor, t: float, beta: float) -> Evaluation:
        ends = lookahead.endpoints(problem.flow_map, x, t, problem.cond)
        with torch.enable_grad():
            z = ends.z.detach().requires_grad_()
            v, tilt = value(problem, replace(ends, z=z), beta)
            gradient = _gradient(problem.reward, v, z)
        return Evaluation(v.detach(), tilt, ends.z[:, 0], gradient.sum(1))


@dataclass(frozen=True)
class EndpointAscent:
    """Improve the endpoint itself by a few reward-gradient steps, then move towards it (FMRG-E, 2604.27147).

        x' = X_{s,t}(x) + w (z_opt - z),      w = (1 - s) t, zero at both ends

    Args:
        iterations: gradient steps on the endpoint; each costs a reward call and a reward backward, no network.
        rate: length of each step, relative to the norm of the endpoint.
        cap: longest shift, relative to the displacement; None for no cap.
    """

    iterations: int = 3
    rate: float = 0.1
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: at least one is needed")

    def evaluate(self, problem: Problem, lookahead: Lookahead, x: Tensor, t: float, beta: float) -> Evaluation:
        ends = lookahead.endpoints(problem.flow_map, x, t, problem.cond)
        start = z = ends.z[:, 0].detach()
        tilts = []
        for _ in range(self.iterations):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                v, tilt = value(problem, Endpoints(z.unsqueeze(1)), beta)
                gradient = _gradient(problem.reward, v, z)
            tilts.append(tilt)
            z = z.detach() + self.rate * _norm(start) * gradient / _norm(gradient).clamp_min(1e-12)
        return Evaluation(beta * tilts[0], tilts[0], start, z - start)

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        assert evaluation.direction is not None
        return capped((1 - s) * t * evaluation.direction, _norm(mean - x), self.cap)


GUIDANCES: dict[str, Any] = {"map": MapGradient(), "endpoint": EndpointGradient(), "ascent": EndpointAscent()}
"""Guidances by the name that configurations use."""


KAPPA_CAP = 20.0
"""Largest kappa_t that multiplies a gradient; kappa is infinite at t = 0 (the releases cap it at 20 to 25)."""


def capped_score_coefficient(flow_map: FlowMap, t: float) -> float:
    """min(kappa_t, KAPPA_CAP); see `Interpolant.score_coefficient`."""
    return KAPPA_CAP if t <= 0 else min(KAPPA_CAP, flow_map.interpolant.score_coefficient(t))


def capped(shift: Tensor, displacement: Tensor, cap: float | None) -> Tensor:
    """``shift`` with its norm, per row, cut at cap * displacement."""
    if cap is None:
        return shift
    return shift * (cap * displacement / _norm(shift).clamp_min(1e-12)).clamp_max(1.0)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of every row, broadcastable against x."""
    return expand_time(x.flatten(1).norm(dim=1), x)


def _gradient(reward: Reward, v: Tensor, x: Tensor) -> Tensor:
    gradient = torch.autograd.grad(v.sum(), x, allow_unused=True)[0] if v.requires_grad else None
    if gradient is None:
        raise RewardError(
            f"reward {reward.name!r} has no gradient: use a gradient-free method (FeynmanKac with guidance=None, BestOfN)"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise RewardError(f"the gradient of reward {reward.name!r} is not finite: use a gradient-free method, or smooth it")
    return gradient


def repeat_rows(cond: Condition, k: int) -> Condition:
    """One row per output to one row per particle."""
    return map_condition(lambda c: c.repeat_interleave(k, 0), cond)
