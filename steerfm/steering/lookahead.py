"""Look-aheads: where will x_t end? One signature, any number of endpoints, evaluated as one batch.

endpoints(flow_map, x, t, cond, noise) -> Endpoints(z: (b, k, *shape), log_w: (b, k))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from steerfm import glass, transitions
from steerfm.capabilities import can, needs
from steerfm.checks import at_least_one
from steerfm.closed_form import GaussianMixture
from steerfm.flowmap import FlowMap
from steerfm.processes import alone
from steerfm.rows import Condition, repeat_rows
from steerfm.sampling import Noise


@dataclass
class Endpoints:
    """Candidate data for every row.

    Attributes:
        z: (b, k, *shape) endpoints in model space.
        log_w: (b, k) their log-weights, up to a constant per row; None for equal weights.
    """

    z: Tensor
    log_w: Tensor | None = None


class Lookahead(Protocol):
    """Any object with this member is a look-ahead; it may also be `Sharing`, and `Choosy`."""

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        """Endpoints of x (b, *shape) at time t < 1; ``noise`` is a stream with one row per row of x."""
        ...


@runtime_checkable
class Sharing(Protocol):
    """A look-ahead that says what its first endpoint is, for a transition that can use it.

    Attributes:
        kind: "jump", "denoised" or "posterior", see `steerfm.transitions.Sharing`; "" for anything else.
    """

    @property
    def kind(self) -> str: ...


@runtime_checkable
class Choosy(Protocol):
    """A look-ahead that does not see right through every map; any object with this member is one."""

    def blind(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """What the map lacks for looks from all but the last of the times, and what to take in its place; "" where it fits."""
        ...


class _ByVelocity:
    """What look-aheads by the velocity share."""

    def blind(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`."""
        return "" if can(flow_map, "velocity") else needs("velocity", "take lookahead=jump")


# --- one endpoint ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Denoise(_ByVelocity):
    """z = E[x_1 | x_t = x], one call: blurry and off the data early on, exact at t = 1.

    What DPS (2209.14687), FK steering (2501.06848) and DAS (2501.05803) look at.
    """

    kind = "denoised"

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        return Endpoints(flow_map.denoise(x, t, cond).unsqueeze(1))


@dataclass(frozen=True)
class Jump(transitions.Jump):
    """z = X_{t,1}(x), the sample that is going to come out (FMTT 2511.22688, FMRG 2604.27147). Also the transition.

    Args:
        hops: equal jumps from t to 1; each costs one call.
    """

    @property
    def kind(self) -> str:
        return "jump" if self.hops == 1 else ""

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        return Endpoints(flow_map.lookahead(x, t, cond, self.hops).unsqueeze(1))

    def blind(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`."""
        if can(flow_map, "two_time") or (self.hops == 1 and can(flow_map, "endpoint")):
            return ""
        if can(flow_map, "velocity"):
            return needs("endpoint", "take lookahead=denoise, rollout or posterior, which need no more than a velocity")
        if can(flow_map, "endpoint"):
            return needs("two_time", "take hops=1")
        if self.hops == 1 and list(times[:-1]) == [0.0] and can(flow_map, "generator"):
            return ""
        return needs("endpoint", "take steps=1")


@dataclass(frozen=True)
class Rollout(_ByVelocity):
    """z = the end of the ODE from x by Euler steps of the velocity: what a jump shows, without a flow map, for many calls.

    Args:
        steps: equal steps from t to 1.
    """

    steps: int = 8
    kind = ""

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps)

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        h = (1 - t) / self.steps
        for i in range(self.steps):
            x = x + h * flow_map.velocity(x, t + i * h, cond)
        return Endpoints(x.unsqueeze(1))


# --- many endpoints --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Smooth(_ByVelocity):
    """z_j = E[x_1 | x_t = x] + scale sigma_t e_j: the denoiser blurred by noise (LGD-MC, Song et al. 2023, equation 11).

    One call for all. A Gaussian stands in for the posterior.

    Args:
        k: endpoints.
        scale: standard deviation, relative to that of the noise in x.
    """

    k: int = 4
    scale: float = 1.0
    kind = ""

    def __post_init__(self) -> None:
        at_least_one(k=self.k)

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        z = flow_map.denoise(x, t, cond).unsqueeze(1)
        return Endpoints(z + self.scale * flow_map.interpolant.sigma(t) * _draw(noise, self.k, x))


@dataclass(frozen=True)
class Renoise:
    """Noise back to t' < t, jump to the data, weight: z_j ~ p(x_1 | x_t = x) by importance sampling.

        x_{t',j} = (alpha_t'/alpha_t) x + std e_j,   z_j = X_{t',1}(x_{t',j}),   SNR(t') = SNR(t) / snr_factor
        log w_j = log p(x_t = x | z_j)  +  log p_{t'}(x_{t',j})  -  log q(x_{t',j} | x)
                     likelihood              reference                proposal

    Weighted Diamond Maps (2602.05993). The reference is not known for a network: the trapezoid
    (s_t(x) + s_t'(x_t'))/2 . (x_t' - x) stands in, up to a constant. Costs k jumps, and k + 1 velocities for the
    trapezoid. The terms grow with the dimension: for pictures a few endpoints hold all the weight.

    Args:
        snr_factor: above 1; 1.5 to 5 is good, close to 1 the endpoints are all alike.
        k: endpoints.
        terms: those of the weight. With all three the value is consistent as k grows (with an exact reference). **Any
            other choice is biased**; () weighs them equally, as the released heuristic does.
        reference: log p_t(x) as a function of x (b, *shape) and t, where it is known; default the trapezoid.
    """

    snr_factor: float = 2.0
    k: int = 4
    terms: Sequence[str] = ("likelihood", "reference", "proposal")
    reference: Callable[[Tensor, float], Tensor] | None = None
    kind = ""

    def __post_init__(self) -> None:
        at_least_one(k=self.k)
        if not self.snr_factor > 1:
            raise ValueError(f"snr_factor={self.snr_factor}: must be above 1, to noise back")
        unknown = set(self.terms) - {"likelihood", "reference", "proposal"}
        if unknown:
            raise ValueError(f"unknown terms {sorted(unknown)}: likelihood, reference and proposal there are")

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        path, k = flow_map.interpolant, self.k
        e = _draw(noise, k, x)
        cond_k = repeat_rows(cond, k)
        if t <= 0:  # nothing is known yet: fresh samples, equally likely
            return Endpoints(flow_map.lookahead((e + 0 * x.unsqueeze(1)).flatten(0, 1), 0.0, cond_k).view_as(e))
        back = path.time_at(path.alpha(t) / path.sigma(t) / self.snr_factor**0.5)
        scale, std = path.renoise(t, back)
        x_back = scale * x.unsqueeze(1) + std * e
        z = flow_map.lookahead(x_back.flatten(0, 1), back, cond_k).view_as(e)
        log_w = x.new_zeros(x.shape[0], k)
        if "likelihood" in self.terms:
            log_w = log_w - _squares(x.unsqueeze(1) - path.alpha(t) * z) / (2 * path.sigma(t) ** 2)
        if "proposal" in self.terms:
            log_w = log_w + _squares(e) / 2
        if "reference" in self.terms:
            log_w = log_w + self._reference(flow_map, x, x_back, t, back, cond, cond_k)
        return Endpoints(z, log_w)

    def blind(self, flow_map: FlowMap, times: Sequence[float]) -> str:
        """See `Choosy`. The trapezoid of the weights reads the score."""
        if not can(flow_map, "endpoint"):
            return Jump().blind(flow_map, times)
        scored = "reference" in self.terms and self.reference is None
        return _ByVelocity().blind(flow_map, times) if scored else ""

    def _reference(
        self, flow_map: FlowMap, x: Tensor, x_back: Tensor, t: float, back: float, cond: Condition, cond_k: Condition
    ) -> Tensor:
        """log p_{t'}(x_{t'}) up to a constant per row, (b, k); its gradient is the score, whatever stands in for its value."""
        if self.reference is not None:
            return self.reference(x_back.flatten(0, 1), back).view(x_back.shape[:2])
        with torch.no_grad():
            score_back = flow_map.score(x_back.flatten(0, 1), back, cond_k).view_as(x_back)
            mean_score = (flow_map.score(x, t, cond).unsqueeze(1) + score_back) / 2
            trapezoid = _dot(mean_score, x_back - x.unsqueeze(1))
        return trapezoid + _dot(score_back, x_back - x_back.detach())


@dataclass(frozen=True)
class Posterior(_ByVelocity):
    """z_j ~ p(x_1 | x_t = x). A map that draws posteriors does so by jumps of its own, one call each (`FlowMap.posterior`); for
    any other velocity it is the inner ODE of GLASS flows (2602.05993), by the midpoint rule, two calls per step.

        dz/ds = (D(x, z, s) - z)/(1 - s),  z_0 ~ N(0, I),   s from 0 to 1

    D is the denoiser given both the outer state and the inner one, which are one observation of higher signal-to-noise
    ratio: kappa = (alpha_t/sigma_t)^2 + (s/(1 - s))^2. Exact as ``steps`` grows.

    Args:
        steps: of the inner ODE.
        k: endpoints, in the mean over the times of many steps.
        hops: jumps of a map that draws posteriors; 0 to integrate the ODE of its velocity all the same.
        early: p: more endpoints where they spread wide, k (1 + p) (1 - t)^p of them at time t, at least 1. 0: k at every time.
            At as many draws in all, p = 2 brings guidance nearer to a known target (docs/posterior.md).
    """

    steps: int = 4
    k: int = 1
    hops: int = 1
    early: float = 0.0
    kind = "posterior"

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, k=self.k)
        if self.hops < 0:
            raise ValueError(f"hops={self.hops}: jumps of a map that draws posteriors; 0 for the ODE of its velocity")
        if not 0 <= self.early < math.inf:
            raise ValueError(f"early={self.early}: the power with which the number of endpoints falls, at least 0")

    def number(self, t: float | Tensor) -> int:
        """Of endpoints at time t."""
        time = t.flatten()[0].item() if isinstance(t, Tensor) else t
        return max(1, round(self.k * (1 + self.early) * (1 - time) ** self.early))

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        z = _draw(noise, self.number(t), x)
        return Endpoints(glass.posterior(flow_map, x, t, z, cond, self.steps, self.hops))


@dataclass(frozen=True)
class ExactPosterior:
    """z_j ~ p(x_1 | x_t = x) of a `GaussianMixture` exactly: the truth that the other look-aheads are tested against.

    Not for a gradient through the map: which component is drawn does not depend smoothly on x.

    Args:
        mixture: whose flow map is steered.
        k: endpoints.
    """

    mixture: GaussianMixture
    k: int = 1
    kind = "posterior"

    def endpoints(self, flow_map: FlowMap, x: Tensor, t: float, cond: Condition, noise: Noise | None = None) -> Endpoints:
        posterior = self.mixture.posterior(x, t)
        columns = _draw(noise, self.k, x, (x.shape[1] + 1,))
        u = torch.special.ndtr(columns[..., -1].double())
        component = torch.searchsorted(posterior.weights.double().cumsum(1), u).clamp_max(posterior.means.shape[1] - 1)
        row = torch.arange(len(x), device=x.device).unsqueeze(1)
        factors, e = posterior.factors[row, component], columns[..., :-1]
        moved = factors * e if posterior.diagonal else (factors @ e.unsqueeze(-1)).squeeze(-1)
        return Endpoints((posterior.means[row, component] + moved).to(x.dtype))


LOOKAHEADS: dict[str, type] = {
    "denoise": Denoise,
    "jump": Jump,
    "rollout": Rollout,
    "smooth": Smooth,
    "renoise": Renoise,
    "posterior": Posterior,
}
"""Look-aheads by the name that configurations use."""


def residual(flow_map: FlowMap, x: Tensor, t: float, cond: Condition = None) -> Tensor:
    """|d/dt X_{t,1}(x) + b . grad X_{t,1}(x)| / |b| per row, (b,): 0 for a true flow map.

    The look-ahead must not change along the path; where it does, weights that rely on that (simple Jarzynski) are wrong.
    """
    times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
    b = flow_map.velocity(x, times, cond)

    def look(x: Tensor, t: Tensor) -> Tensor:
        return flow_map.lookahead(x, t, cond)

    with torch.no_grad(), alone():  # a derivative forwards is not shared out
        change = torch.func.jvp(look, (x, times), (b.detach(), torch.ones_like(times)))[1]
    return change.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-12)


# --- shared pieces ---------------------------------------------------------------------------------------------------
def _draw(noise: Noise | None, k: int, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """(b, k, *shape) standard normal."""
    if noise is None:
        raise ValueError("this look-ahead draws its endpoints: pass noise=, a stream with one row per row of x")
    return noise.normal((k, *(x.shape[1:] if shape is None else shape)), x)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over everything after the first two axes: (b, k)."""
    return (a * b).flatten(2).sum(2)


def _squares(a: Tensor) -> Tensor:
    return _dot(a, a)
