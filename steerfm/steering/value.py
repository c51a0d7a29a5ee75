"""The value of a state and its gradient, through interchangeable look-aheads.

    V_t(x) = log mean_k exp(log_w_k + beta strength r(z_k)),      z_k the look-ahead's endpoints

estimates log E[exp(strength r(x_1)) | x_t = x] at beta = 1. The tempering beta rises from 0 to 1 so that the particles are
not all judged on a far look-ahead at the start; it is a function of time, or chosen per output as the run goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfm.flowmap import Condition, FlowMap, take_rows
from steerfm.interpolant import expand_time
from steerfm.randomness import stream
from steerfm.rewards import Prompts, Reward, RewardError, Scores
from steerfm.sampling import Noise
from steerfm.steering.lookahead import Endpoints, Lookahead
from steerfm.steering.weights import at_least_one, log_mean_exp, wide

Tempering = Callable[[float], float]
Beta = Callable[[Endpoints, Tensor], Tensor]
"""The inverse temperature (b,) of one evaluation, from the endpoints with their log-weights and strength * r (b, k)."""


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


# --- the problem -----------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """What is steered: the map, the reward, and one row per particle of everything that depends on the output.

    Attributes:
        flow_map, reward: as given.
        strength: (b,) strength of the tilt per particle.
        cond: condition per particle; labels (b,) and prompts for rewards that read them.
        groups: (b,) the output of each particle, for rewards that compare the particles of one.
    """

    flow_map: FlowMap
    reward: Reward
    strength: Tensor
    cond: Condition = None
    labels: Tensor | None = None
    prompts: Prompts = None
    groups: Tensor | None = None

    def score(self, z: Tensor, k: int = 1) -> Scores:
        """Scores of b * k endpoints in model space, ``k`` for each particle."""
        labels = None if self.labels is None else self.labels.repeat_interleave(k)
        prompts = None if self.prompts is None else [prompt for prompt in self.prompts for _ in range(k)]
        groups = None if self.groups is None else self.groups.repeat_interleave(k)
        return self.reward.evaluate(self.flow_map.decode(z), prompts, labels, groups)

    def tilt(self, r: Tensor) -> Tensor:
        """strength * r of rewards (b * k,), ``k`` for each particle, in the wide dtype.

        Raises:
            RewardError: a product that is not finite.
        """
        strength = self.strength.to(wide(r.device)).repeat_interleave(len(r) // len(self.strength))
        tilt = strength * r.to(strength)
        finite = torch.isfinite(tilt.detach())
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise RewardError(
                f"strength {strength[row].item():g} times reward {self.reward.name!r} ({r[row].item():g}) is not finite: "
                "lower the strength", sample=row,
            )  # fmt: skip
        return tilt

    def has_gradient(self) -> bool:
        """Whether the reward has a gradient, tried on one picture: a plain function does not say it of itself."""
        if not self.reward.differentiable:
            return False
        one = self.select(torch.zeros(1, dtype=torch.long, device=self.strength.device))
        with torch.enable_grad():
            z = self.probe().requires_grad_()
            try:
                total = one.score(z).total
            except Exception:  # what is wrong with the reward, the run without a gradient will say
                return False
            return total.requires_grad and torch.autograd.grad(total.sum(), z, allow_unused=True)[0] is not None

    def probe(self) -> Tensor:
        """A state (1, *shape) to try the reward on."""
        z = torch.randn(1, *self.flow_map.shape, generator=stream(0, "probe"), dtype=torch.float32)
        return z.to(self.flow_map.device, self.flow_map.dtype)

    def select(self, rows: Tensor) -> Problem:
        """The problem of the given particles (b',)."""
        return replace(
            self,
            strength=self.strength[rows],
            cond=take_rows(self.cond, rows),
            labels=None if self.labels is None else self.labels[rows],
            prompts=None if self.prompts is None else [self.prompts[row] for row in rows.tolist()],
            groups=None if self.groups is None else self.groups[rows],
        )


# --- the value -------------------------------------------------------------------------------------------------------
@dataclass
class Evaluation:
    """What is known about the particles at one time.

    Attributes:
        value: (b,) V_t(x), tempered, in the wide dtype.
        tilt: (b,) strength * r of the first endpoint, untempered.
        beta: (b,) inverse temperature of the value.
        endpoint: (b, *shape) the first endpoint.
        direction: (b, *shape) what a guidance adds to the state, before its coefficient; None without guidance.
        memory: (b,) what a correction carries along the path; None where it carries nothing.
        scores: of the first endpoint, where that was scored.
    """

    value: Tensor
    tilt: Tensor
    beta: Tensor
    endpoint: Tensor | None = None
    direction: Tensor | None = None
    memory: Tensor | None = None
    scores: Scores | None = None

    @classmethod
    def join(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of consecutive particles as one."""
        first = parts[0]
        named = {k: torch.cat([vars(p)[k] for p in parts]) for k, value in vars(first).items() if isinstance(value, Tensor)}
        return replace(first, **named, scores=first.scores and Scores.join([p.scores for p in parts if p.scores]))

    def select(self, rows: Tensor) -> Evaluation:
        """The evaluations of the given particles (b',)."""
        parts = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts, scores=None if self.scores is None else self.scores[rows])


@dataclass
class Weighed:
    """Endpoints judged: log_w, tilt (b, k) log-weights and strength * r; beta (b,); scores of the first endpoints, (b,)."""

    log_w: Tensor
    tilt: Tensor
    beta: Tensor
    scores: Scores

    @property
    def tempered(self) -> Tensor:
        return self.beta.unsqueeze(1) * self.tilt


@dataclass
class View:
    """One look at the particles: the problem, how to look, where, and how hot.

    Attributes:
        x: (b, *shape) at time t.
        noise: a stream of its own for look-aheads that draw.
        beta: see `Beta`.
    """

    problem: Problem
    lookahead: Lookahead
    noise: Noise
    x: Tensor
    t: float
    beta: Beta

    def endpoints(self, x: Tensor) -> Endpoints:
        return self.lookahead.endpoints(self.problem.flow_map, x, self.t, self.problem.cond, self.noise)

    def weigh(self, ends: Endpoints) -> Weighed:
        """Score all endpoints in one call; differentiable in ``ends`` where gradients are on."""
        b, k = ends.z.shape[:2]
        scores = self.problem.score(ends.z.flatten(0, 1), k)
        tilt = self.problem.tilt(scores.total).view(b, k)
        log_w = torch.zeros_like(tilt) if ends.log_w is None else ends.log_w.to(tilt)
        return Weighed(log_w, tilt, self.beta(replace(ends, log_w=log_w.detach()), tilt.detach()), scores[::k])

    def value(self, ends: Endpoints) -> Evaluation:
        """V and what it is made of; differentiable in ``ends`` where gradients are on."""
        found = self.weigh(ends)
        value = log_mean_exp(found.log_w, found.tempered)
        return Evaluation(value, found.tilt[:, 0].detach(), found.beta, ends.z[:, 0].detach(), scores=found.scores)


def look(view: View) -> Evaluation:
    """The evaluation without a direction."""
    return view.value(view.endpoints(view.x))


def evaluate(guidance: Guidance, view: View, rows: int | None) -> Evaluation:
    """`Guidance.evaluate`, at most ``rows`` particles at a time where it follows a gradient: the graph of a part is freed
    before the next one is built. A reward that compares particles sees them all, whatever ``rows``."""
    if rows is None or len(view.x) <= rows or not guidance.differentiates or view.problem.reward.groupwise:
        return guidance.evaluate(view)
    shared, index, parts = Shared(view.noise), torch.arange(len(view.x), device=view.x.device), []
    for begin in range(0, len(view.x), rows):
        part = slice(begin, begin + rows)
        of = replace(view, problem=view.problem.select(index[part]), x=view.x[part], noise=shared.part(part))
        try:
            parts.append(guidance.evaluate(of))
        except RewardError as error:
            error.sample = None if error.sample is None else error.sample + begin
            raise
    return Evaluation.join(parts)


class Shared(Noise):
    """A stream of noise whose draws are made once, for all rows, and handed out in parts."""

    def __init__(self, noise: Noise, drawn: list[Tensor] | None = None, rows: slice = slice(None)) -> None:
        super().__init__(noise.seeds, noise.k)
        self.noise, self.drawn, self.rows, self.next = noise, [] if drawn is None else drawn, rows, 0

    def part(self, rows: slice) -> Shared:
        return Shared(self.noise, self.drawn, rows)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `Noise.normal`, of these rows."""
        if self.next == len(self.drawn):
            self.drawn.append(self.noise.normal(shape, like))
        self.next += 1
        return self.drawn[self.next - 1][self.rows]


def needs_gradient(guidance: Guidance | None) -> bool:
    """Whether a reward without a gradient cannot be steered by it."""
    return guidance is not None and guidance.differentiates and getattr(guidance, "required", True)


# --- guidance --------------------------------------------------------------------------------------------------------
class Guidance(Protocol):
    """How a step is pushed uphill; any object with these members is one.

    Attributes:
        differentiates: whether it follows the gradient of the reward. A guidance that does may also have ``required``: whether
            a reward without one is an error (so it is where it has no such member); if not, it is steered without guidance.
    """

    differentiates: bool

    def evaluate(self, view: View) -> Evaluation:
        """Value and direction."""
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
    With `Posterior` endpoints this is MFM-G (2601.14430), with `Renoise` weighted Diamond guidance (2602.05993).

    Args:
        scale: multiplies the shift; 1 is the theory's.
        normalised: make the shift ``scale`` times as long as the step's displacement, whatever the reward's scale (FMRG).
        cap: longest shift, relative to the displacement: gradients of look-aheads are heavy-tailed at basin borders.
        ascent: chi(t), a further drift chi grad V (FMTT's extra ascent); a bias, unless the correction pays for it.
        largest: cap of kappa, which is infinite at t = 0 (the releases cap it at 20 to 25). For an exact V it is a bias, since
            kappa grad V is finite: take it large there.
    """

    scale: float = 1.0
    normalised: bool = False
    cap: float | None = 1.0
    ascent: Callable[[float], float] | None = None
    largest: float = 20.0
    differentiates = True

    def evaluate(self, view: View) -> Evaluation:
        with torch.enable_grad():
            x = view.x.detach().requires_grad_()
            found = view.value(view.endpoints(x))
            gradient = gradient_of(view.problem, found.value, x)
        return replace(found, value=found.value.detach(), direction=gradient)

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
    """As `MapGradient`, but the gradient stops at the endpoint: dz/dx is taken as the identity, no network backward.

    FlowChef's approximation (2412.00100), good where trajectories are straight.

    Args:
        required: whether a reward without a gradient is an error; if not, it is steered without one.
    """

    required: bool = True

    def evaluate(self, view: View) -> Evaluation:
        ends = view.endpoints(view.x)
        with torch.enable_grad():
            z = ends.z.detach().requires_grad_()
            found = view.value(replace(ends, z=z))
            gradient = gradient_of(view.problem, found.value, z)
        return replace(found, value=found.value.detach(), direction=gradient.sum(1))


@dataclass(frozen=True)
class FreeGradient:
    """grad V without any derivative, so for black-box rewards too: MFM-GF (Potaptchik et al. 2601.14430).

        grad V = (alpha/sigma^2) (E_q[x_1 | x_t] - E[x_1 | x_t]) = (alpha/sigma^2) (sum_k softmax(log_w + beta r)_k z_k - mean)

    exact for samples of the posterior as their number grows: use look-ahead `Posterior`, or `Renoise`; one endpoint has no
    gradient at all.

    Args:
        scale, cap: as in `MapGradient`.
    """

    scale: float = 1.0
    cap: float | None = 1.0
    differentiates = False

    def evaluate(self, view: View) -> Evaluation:
        ends = view.endpoints(view.x)
        found = view.weigh(ends)
        moved = ((found.log_w + found.tempered).softmax(1) - found.log_w.softmax(1)).to(ends.z)
        direction = torch.einsum("bk,bk...->b...", moved, ends.z)
        value = log_mean_exp(found.log_w, found.tempered)
        return Evaluation(value, found.tilt[:, 0], found.beta, ends.z[:, 0], direction, scores=found.scores)

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
    differentiates = True

    def __post_init__(self) -> None:
        at_least_one(iterations=self.iterations)

    def evaluate(self, view: View) -> Evaluation:
        start = z = view.endpoints(view.x).z[:, 0].detach()
        first = None
        for _ in range(self.iterations):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                found = view.value(Endpoints(z.unsqueeze(1)))
                gradient = gradient_of(view.problem, found.value, z)
            first = first or found
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
}
"""Guidances by the name that configurations use."""


def capped(shift: Tensor, displacement: Tensor, cap: float | None) -> Tensor:
    """``shift`` with its norm, per row, cut at cap * displacement."""
    if cap is None:
        return shift
    return shift * (cap * displacement / _norm(shift).clamp_min(1e-12)).clamp_max(1.0)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of every row, broadcastable against x."""
    return expand_time(x.flatten(1).norm(dim=1), x)


FREE = "a gradient-free method (FeynmanKac with guidance=None, BestOfN)"


def gradient_of(problem: Problem, v: Tensor, x: Tensor, instead: str = FREE) -> Tensor:
    """The gradient (b, *shape) of values v (b,) in x, which the reward of a problem gave.

    Args:
        problem: with a row for each of x, for errors.
        v: (b,), with a graph to x where the reward has a gradient.
        x: (b, *shape).
        instead: methods that would work, for errors.

    Raises:
        RewardError: there is none, or it is not finite.
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
