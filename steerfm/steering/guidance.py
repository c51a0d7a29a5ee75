"""Guidance: shifts of a step uphill, by the gradient of the value, by its gradient at the endpoint, or without a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steerfm.checks import at_least_one
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.rewards import RewardError
from steerfm.rows import cuts
from steerfm.scores import counted_from
from steerfm.steering.lookahead import Endpoints
from steerfm.steering.value import Evaluation, Problem, Shared, View
from steerfm.steering.weights import log_mean_exp


def evaluate(guidance: Guidance, view: View, rows: int | None) -> Evaluation:
    """`Guidance.evaluate`, in parts of at most ``rows`` particles if the guidance follows a gradient: the graph of each part is
    freed before the next one is built. Group-wise rewards always receive all particles, even when ``rows`` is set."""
    if rows is None or len(view.x) <= rows or not guidance.differentiates or view.problem.reward.groupwise:
        return guidance.evaluate(view)
    shared, parts = Shared(view.noise), []
    for part in cuts(len(view.x), rows):
        of = replace(view, problem=view.problem.select(part), x=view.x[part], noise=shared.part(part))
        with counted_from(part.start):
            parts.append(guidance.evaluate(of))
    return Evaluation.join(parts)


def needs_gradient(guidance: Guidance | None) -> bool:
    """Whether this guidance only works with rewards that have a gradient."""
    return guidance is not None and guidance.differentiates and not (isinstance(guidance, Optional) and not guidance.required)


class Guidance(Protocol):
    """A shift of each step uphill. Any object with these members is a guidance.

    Attributes:
        differentiates: whether it follows the gradient of the reward. If so, it may also be `Optional`.
    """

    differentiates: bool

    def evaluate(self, view: View) -> Evaluation:
        """Value and direction."""
        ...

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        """The shift of the step's mean, (b, *shape)."""
        ...


@runtime_checkable
class Optional(Protocol):
    """A guidance by gradient. Unless it is ``required``, a reward without a gradient runs without guidance."""

    @property
    def required(self) -> bool: ...


@runtime_checkable
class Tilting(Protocol):
    """A guidance that changes the noise of a step, and not its mean."""

    def tilted(self, evaluation: Evaluation, z: Tensor) -> Tensor:
        """The noise (b, *shape) that replaces the standard normal z."""
        ...


@dataclass(frozen=True)
class MapGradient:
    """grad_x V_t(x) by backpropagation through the reward, the decoder and the look-ahead.

    The shift is scale * std^2 grad V for a stochastic transition (the optimal shift of a Gaussian under a locally linear
    value) and scale * (t - s) kappa_s grad V for a deterministic one (the exact tilted velocity, kappa = (1 - t)/t, capped).
    With `Posterior` endpoints this is MFM-G (2601.14430), with `Renoise` weighted Diamond guidance (2602.05993).

    Args:
        scale: factor of the shift; 1 is the value from theory.
        normalised: make the shift ``scale`` times as long as the step's displacement, for any scale of the reward (FMRG).
        cap: longest shift, relative to the displacement: gradients of look-aheads are heavy-tailed at basin borders.
        ascent: chi(t), an additional drift chi grad V (FMTT's extra ascent); a bias, unless the correction accounts for it.
        largest: cap of kappa, which is infinite at t = 0 (the releases cap it at 20 to 25). For an exact V the cap is a bias,
            since kappa grad V is finite: make it large there.
    """

    scale: float = 1.0
    normalised: bool = False
    cap: float | None = 1.0
    ascent: Callable[[float], float] | None = None
    largest: float = 20.0
    differentiates = True

    def evaluate(self, view: View) -> Evaluation:
        return through_map(view)

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        assert evaluation.direction is not None
        coefficient = self.scale * (std**2 if std else (t - s) * self._kappa(flow_map, s))
        if self.ascent is not None:
            coefficient += (t - s) * self.ascent(s)
        displacement = _norm(mean - x)
        if self.normalised:
            return self.scale * displacement * evaluation.direction / _norm(evaluation.direction).clamp_min(1e-12)
        return capped(coefficient * evaluation.direction, displacement, self.cap)

    def _kappa(self, flow_map: FlowMap, t: float) -> float:
        return self.largest if t <= 0 else min(self.largest, flow_map.interpolant.score_coefficient(t))


@dataclass(frozen=True)
class EndpointGradient(MapGradient):
    """As `MapGradient`, but the gradient stops at the endpoint: dz/dx is replaced by the identity, without a network backward.

    FlowChef's approximation (2412.00100), good where trajectories are straight.

    Args:
        required: whether a reward without a gradient is an error; if not, such a reward runs without guidance.
        dimension: dimension of states for which ``scale`` holds. In larger states the scale grows as sqrt(d / dimension):
            steps get longer with the dimension, the gradient of a reward in nats does not.
    """

    required: bool = True
    dimension: float = math.inf

    def evaluate(self, view: View) -> Evaluation:
        return at_endpoint(view)

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        larger = max(1.0, math.sqrt(x[0].numel() / self.dimension))
        return MapGradient.shift(replace(self, scale=larger * self.scale), flow_map, evaluation, x, mean, s, t, std)


@dataclass(frozen=True)
class NoiseGradient:
    """The gradient of the value in the noise of a step, and not in its mean (NoiseTilt, Hwang et al. 2606.18066).

        x' = mean + std (sqrt(share) w + sqrt(1 - share |w|^2 / d) z),      w the gradient, made `white`

    So states stay where the map was trained: as far from the mean as noise is, and without structure that noise lacks. The
    result does not depend on the reward's scale or on ``strength``. A row without a gradient keeps its noise. A step without
    noise, such as the last one, is not guided. No correction has weights for this guidance.

    Args:
        share: of the noise's variance for the gradient, in (0, 1]; variance lost to whitening is replaced by noise.
        through: whether the gradient goes through the map, as in the paper, or stops at the endpoint, as in
            `EndpointGradient`.
    """

    share: float = 0.2
    through: bool = False
    differentiates = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: of the noise's variance, in (0, 1]")

    def evaluate(self, view: View) -> Evaluation:
        return through_map(view) if self.through else at_endpoint(view)

    def tilted(self, evaluation: Evaluation, z: Tensor) -> Tensor:
        """See `Tilting`."""
        assert evaluation.direction is not None
        w = white(evaluation.direction)
        remaining = 1 - self.share * w.flatten(1).square().mean(1)
        return self.share**0.5 * w + expand_time(remaining.clamp_min(0).sqrt(), z) * z

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        """Zeros: the mean does not change."""
        return torch.zeros_like(mean)


@dataclass(frozen=True)
class FreeGradient:
    """grad V without any derivative, for black-box rewards: MFM-GF (Potaptchik et al. 2601.14430).

        grad V = (alpha/sigma^2) (E_q[x_1 | x_t] - E[x_1 | x_t]) = (alpha/sigma^2) (sum_k softmax(log_w + beta r)_k z_k - mean)

    This is exact for samples of the posterior as their number grows: use look-ahead `Posterior`, or `Renoise`. A single
    endpoint gives no gradient.

    Args:
        scale: as in `MapGradient`.
        cap: as in `MapGradient`.
    """

    scale: float = 1.0
    cap: float | None = 1.0
    differentiates = False

    def evaluate(self, view: View) -> Evaluation:
        ends, weights = view.judge()
        change = ((weights.log_w + weights.tempered).softmax(1) - weights.log_w.softmax(1)).to(ends.z)
        direction = torch.einsum("bk,bk...->b...", change, ends.z)
        value = log_mean_exp(weights.log_w, weights.tempered)
        return Evaluation(value, weights.tilt[:, 0], weights.beta, ends.z[:, 0], direction, scores=weights.scores)

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        assert evaluation.direction is not None
        path = flow_map.interpolant
        alpha, sigma = path.alpha(s), path.sigma(s)
        d_alpha, d_sigma = path.derivatives(s)
        # kappa alpha / sigma^2 in one piece: finite at t = 0, where kappa is not
        coefficient = std**2 * alpha / sigma**2 if std else (t - s) * (d_alpha * sigma - alpha * d_sigma) / sigma
        return capped(self.scale * coefficient * evaluation.direction, _norm(mean - x), self.cap)


@dataclass(frozen=True)
class EndpointAscent:
    """Improve the endpoint by a few reward-gradient steps, then move towards it (FMRG-E, 2604.27147).

        x' = X_{s,t}(x) + w (z_opt - z),      w = (1 - s) t, zero at both ends

    Args:
        iterations: gradient steps on the endpoint; each costs a reward call and a reward backward, no network.
        rate: length of each step, relative to the norm of the endpoint.
        cap: longest shift, relative to the displacement; None for no cap.
    """

    iterations: int = 3
    rate: float = 0.1
    cap: float | None = None
    differentiates = True

    def __post_init__(self) -> None:
        at_least_one(iterations=self.iterations)

    def evaluate(self, view: View) -> Evaluation:
        start = z = view.endpoints(view.x).z[:, 0].detach()
        first = None
        for _ in range(self.iterations):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                evaluation = view.value(Endpoints(z.unsqueeze(1)))
                gradient = gradient_of(view.problem, evaluation.value, z)
            first = first or evaluation
            z = z.detach() + self.rate * _norm(start) * gradient / _norm(gradient).clamp_min(1e-12)
        assert first is not None
        return replace(first, value=first.value.detach(), direction=z - start)

    def shift(
        self, flow_map: FlowMap, evaluation: Evaluation, x: Tensor, mean: Tensor, s: float, t: float, std: float
    ) -> Tensor:
        assert evaluation.direction is not None
        return capped((1 - s) * t * evaluation.direction, _norm(mean - x), self.cap)


GUIDANCES: dict[str, Any] = {
    "map": MapGradient(),
    "endpoint": EndpointGradient(),
    "free": FreeGradient(),
    "ascent": EndpointAscent(),
    "noise": NoiseGradient(),
}
"""Guidances by their names in configurations."""


def through_map(view: View) -> Evaluation:
    """The value and its gradient in the state, through the reward, the decoder and the look-ahead."""
    with torch.enable_grad():
        x = view.x.detach().requires_grad_()
        evaluation = view.value(view.endpoints(x))
        gradient = gradient_of(view.problem, evaluation.value, x)
    return replace(evaluation, value=evaluation.value.detach(), direction=gradient)


def at_endpoint(view: View) -> Evaluation:
    """The value, and the sum of its gradients at the endpoints: through the reward and the decoder only."""
    ends = view.endpoints(view.x)
    with torch.enable_grad():
        z = ends.z.detach().requires_grad_()
        evaluation = view.value(replace(ends, z=z))
        gradient = gradient_of(view.problem, evaluation.value, z)
    return replace(evaluation, value=evaluation.value.detach(), direction=gradient.sum(1))


SURE = 3.9
"""Order statistics of noise lie within this many standard deviations of their mean, all but one in 10,000."""


def white(x: Tensor) -> Tensor:
    """Whiten rows (b, *shape): return rows that could be draws of N(0, I), in similar directions. Zeros stay zeros.

    Each row is first scaled to the length of noise, sqrt(d). Then every coefficient of its spectrum is limited to the largest
    size that white noise has at that rank, and every value of the row likewise. (2606.18066 projects on such limits of order
    statistics from both sides, in more domains and in tiles.) Structure makes a row shorter; noise hardly changes.
    """
    flat = x.flatten(1).float()
    x = x.float() * expand_time(flat.shape[1] ** 0.5 / flat.norm(dim=1).clamp_min(1e-30), x)
    axes = tuple(range(1, x.ndim))
    spectrum = torch.fft.fftn(x, dim=axes, norm="ortho")
    spectrum = spectrum * _shortening(spectrum.abs(), lambda u: (-torch.log1p(-u)).sqrt())  # |N(0, 1) + i N(0, 1)| / sqrt(2)
    x = torch.fft.ifftn(spectrum, dim=axes, norm="ortho").real
    return x * _shortening(x.abs(), lambda u: 2**0.5 * torch.erfinv(u))  # |N(0, 1)|


def _shortening(sizes: Tensor, quantile: Callable[[Tensor], Tensor]) -> Tensor:
    """Factors of at most 1, (b, *shape), that limit sizes to the order statistics of a distribution."""
    flat = sizes.flatten(1)
    d = flat.shape[1]
    share = torch.arange(1, d + 1, device=flat.device, dtype=torch.float64) / (d + 1)
    most = quantile((share + SURE * (share * (1 - share) / (d + 2)).sqrt()).clamp_max(1 - 1e-4 / d)).to(flat)
    limit = most[flat.argsort(1).argsort(1)]
    return (limit / flat.clamp_min(1e-30)).clamp_max(1.0).view_as(sizes)


def capped(shift: Tensor, displacement: Tensor, cap: float | None) -> Tensor:
    """``shift`` with its norm, per row, limited to cap * displacement."""
    if cap is None:
        return shift
    return shift * (cap * displacement / _norm(shift).clamp_min(1e-12)).clamp_max(1.0)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of every row, broadcastable against x."""
    return expand_time(x.flatten(1).norm(dim=1), x)


FREE = "a gradient-free method (FeynmanKac with guidance=None, BestOfN)"


def gradient_of(problem: Problem, v: Tensor, x: Tensor, instead: str = FREE) -> Tensor:
    """The gradient (b, *shape) of values v (b,) with respect to x.

    Args:
        problem: with one row for each row of x; names the reward in errors.
        v: (b,) values from the problem's reward, with a graph to x if the reward has a gradient.
        x: (b, *shape) the variable.
        instead: methods that would work, for the error message.

    Raises:
        RewardError: there is no gradient, or it is not finite.
    """
    gradient = torch.autograd.grad(v.sum(), x, allow_unused=True)[0] if v.requires_grad else None
    name = problem.reward.name
    if gradient is None:
        raise RewardError(f"reward {name!r} has no gradient: use {instead}")
    finite = torch.isfinite(gradient).flatten(1).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        what = f"the gradient of reward {name!r} times strength {problem.strength[row].item():g} is not finite"
        raise RewardError(f"{what}: lower the strength, smooth it, or use {instead}", sample=row)
    return gradient
