"""Tuning by draws of posteriors: the velocity of the tilted law, by a regression that one draw a state leaves unbiased."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm import glass
from steerfm.checks import at_least_one
from steerfm.finetuning.base import Law, Terms, Update, by_velocity, chain, ode
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.steering.weights import wide
from steerfm.training.objectives import mean_square


@dataclass(frozen=True)
class Posterior:
    """Tuning of meta flow maps (Potaptchik et al. 2601.14430), with the constant at which it is exact.

    At states x_t on the path of samples of the base, with a draw z ~ p(x_1 | x_t) and R = exp(strength r(z)),

        |b(x_t) - sg[b_ref - (R - 1)(b - b_ref) + kappa_t grad_x R]|^2,   kappa_t = (1 - t)/t on the linear path

    is stationary in the mean where b = b_ref + kappa_t grad log E[R | x_t], the velocity of the tilted law: no logarithm is
    taken of a mean of few draws. R is divided by a running level, which moves no stationary point. No chain is kept and no
    state of the tuned model is needed. This trains a velocity; the jumps are distilled from it afterwards.

    Args:
        draws: of each state; their mean is taken.
        jumps: of a sample of the base, whose noised states are looked at.
        steps: of GLASS, which draws where the map itself draws no posteriors. Few steps bias the result: on a mixture with a
            strong tilt a bias was seen without the gradient at 12, and not at 48.
        last: largest time of a state, below 1.
        decay: of the level an update, in [0, 1).
        ode: steps of the ODE that samples the result.
    """

    draws: int = 1
    jumps: int = 4
    steps: int = 4
    last: float = 0.98
    decay: float = 0.9
    ode: int = 32

    differentiates, tilts, group, law_is_map, law_is_velocity = True, True, 1, False, True

    def __post_init__(self) -> None:
        at_least_one(draws=self.draws, jumps=self.jumps, steps=self.steps, ode=self.ode)
        if not 0 < self.last < 1:
            raise ValueError(f"last={self.last}: must be in (0, 1)")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must be in [0, 1)")

    def loss(self, update: Update) -> Terms:
        reference, cond, path = update.reference, update.problem.cond, update.reference.interpolant
        with torch.no_grad():
            x1 = chain(self.jumps)(reference)(update.noise, cond)
            t = self.last * update.noise.uniform(1, x1.device).flatten().to(x1)
            t_ = expand_time(t, x1)
            x = path.interpolate(update.normal(), x1, t_)
            base = reference.velocity(x, t, cond)
            z = update.noise.normal((self.draws, *reference.shape), x)
        pull, weight, r = self._pull(update, x, t, z, path.denoise(x, base, t_))
        change = update.tuned.velocity(x, t, cond) - base
        slope = (expand_time(weight, x) * change - pull).detach()
        target = change.detach() - slope  # half the gradient of the square is the slope, in whose mean R stands alone
        return {"loss": mean_square(change - target).mean(), "reward": r.mean(), "weight": weight.mean()}

    def _pull(self, update: Update, x: Tensor, t: Tensor, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean over draws of kappa grad R (b, *shape) and of R (b,), and the rewards (b * draws,).

        Args:
            mean: (b, *shape) E[x_1 | x_t = x] of the base.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            _, weights, r = self._weigh(update, x, t, z)
            (slope,) = torch.autograd.grad(weights.mean(1).sum(), x)
        kappa = update.reference.interpolant.score_coefficient(expand_time(t, x).clamp_min(1e-4))
        return kappa * slope, weights.detach().mean(1).to(x), r.detach()

    def _weigh(self, update: Update, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The draws (b, draws, *shape), R of each (b, draws), and the rewards (b * draws,)."""
        problem = update.problem
        ends = glass.posterior(update.reference, x, t, z, problem.cond, self.steps)
        r = problem.score(ends.flatten(0, 1), self.draws).total
        tilt = update.strength * r.to(wide(r.device))
        return ends, (tilt - self._level(update, tilt)).exp().view(len(x), -1), r

    def _level(self, update: Update, tilt: Tensor) -> float:
        """The running logarithm of the mean of exp(tilt), of the updates before this one."""
        now = update.all_rows(tilt)
        now = (now.logsumexp(0) - math.log(len(now))).cpu()
        level = update.memory.get("level", now)
        parts = torch.stack([level + math.log(self.decay), now + math.log1p(-self.decay)]) if self.decay else now[None]
        update.memory["level"] = parts.logsumexp(0)
        return float(level)

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return ode(tuned, self.ode)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `steerfm.capabilities.Choosy`."""
        return by_velocity(flow_map)


@dataclass(frozen=True)
class PosteriorFree(Posterior):
    """`Posterior` without the gradient of the reward, for black boxes, with the same stationary point.

    kappa_t grad E[R | x] is the covariance of R and x_1 given x, over 1 - t on the linear path. So kappa_t grad_x R becomes
    (R - c)(z - D) / (1 - t) with D = E[x_1 | x_t] of the base. Here c is the mean R of the other draws of the state (with one
    draw, of the other states), which is of no effect in the mean. The identity is ours; its variance is larger than that of
    the gradient.
    """

    draws: int = 4

    differentiates = False

    def _pull(self, update: Update, x: Tensor, t: Tensor, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            ends, weights, r = self._weigh(update, x, t, z)
            among = weights if self.draws > 1 else weights.view(1, -1)
            others = ((among.sum(1, keepdim=True) - among) / max(1, among.shape[1] - 1)).view_as(weights)
            path, t_ = update.reference.interpolant, expand_time(t, x)
            da, ds = path.derivatives(t_)
            away = (da - path.alpha(t_) * ds / path.sigma(t_)).unsqueeze(1) * (ends - mean.unsqueeze(1))  # of the velocity
            share = (weights - others).to(x)
            return (share.view(*share.shape, *[1] * (x.ndim - 1)) * away).mean(1), weights.mean(1).to(x), r
