"""Tuning on the forward process, for any reward: own samples are rated, noised as in training, and fitted or shunned.

A sampler draws x_1 and keeps no chain, so any will do; the reward is asked once a sample, without its gradient. A in [-1, 1]
is the rating of x_1 among the samples of its task, v the conditional velocity at a state x_t = alpha_t x_1 + sigma_t x_0. The
methods differ in their steps, but come to rest at the same velocity b, that of a law q with

    control (b - b_ref)(x, t) = Cov_q(A, v | x_t = x)

To first order in 1 / control this is the tilt by the rating, p(x) exp(A / control). It is exact for Gaussian data and a linear
reward whose ratings are not cut off; in general it is not, and A is relative to q itself. Without control nothing stops the
ascent, and q narrows to the best samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.capabilities import can, needs
from steerfm.checks import at_least_one, whole_numbers
from steerfm.finetuning.base import Law, Terms, Update, by_velocity, chain, ode
from steerfm.finetuning.policy import advantages
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.registry import Readable
from steerfm.rows import Condition, join_conditions, take_rows
from steerfm.training.objectives import mean_square


@dataclass(frozen=True)
class Rated(metaclass=Readable):
    """Samples of the averaged map with their ratings, and the noise that is put on them: the part that all methods here share.

    Args:
        group: samples per task to compare with each other, at least 2.
        reuse: updates per set of samples, each with new noise and times.
        range: advantage, in standard deviations, above which a sample is rated 1, and below minus which -1; above 0.
        within: divide by the standard deviation within the group, in place of that of the batch.
    """

    group: int = 16
    reuse: int = 4
    range: float = 2.0
    within: bool = False

    differentiates, tilts, law_is_velocity = False, False, True

    def __post_init__(self) -> None:
        at_least_one(reuse=self.reuse)
        whole_numbers(group=self.group)
        if self.group < 2 or not 0 < self.range < math.inf:
            raise ValueError(f"group={self.group}, range={self.range}: group must be at least 2, range positive and finite")

    def samples(self, update: Update, law: Law) -> tuple[Tensor, Tensor]:
        """Samples x_1 (b, *shape) of a law and their ratings A (b,) in [-1, 1], drawn once for ``reuse`` updates."""
        if update.step % self.reuse == 0:
            with torch.no_grad():
                x1 = law(update.noise, update.problem.cond)
                r = update.all_rows(update.problem.score(x1).total)
            rating = (advantages(r, self.group, self.within) / self.range).clamp(-1, 1)
            update.own |= {"x1": x1, "rating": rating[update.part(len(r))]}
            update.memory |= {"reward": r.mean()}
        x1, rating = (update.own[name].to(update.tuned.device) for name in ("x1", "rating"))
        return x1, rating.to(x1)

    def terms(self, update: Update, fit: Tensor, control: Tensor) -> Terms:
        """The loss of a fit and of the mean squared distance from the reference, with what a run logs beside it."""
        return {"loss": fit + update.control * control, "reward": update.memory["reward"], "control_cost": control}

    def draws(self, update: Update, times: int = 1) -> tuple[Tensor, Tensor]:
        """Uniform times (times, b) and noise x_0 (b, *shape) of this update, independent of those of the samples."""
        noise = update.noise.other(f"fit {update.step % self.reuse}")
        x0 = noise.start(update.tuned)
        return noise.uniform(times, x0.device).t().to(x0), x0


def contrast(change: Tensor, old: Tensor, v: Tensor, rating: Tensor, beta: float) -> Tensor:
    """The loss of DiffusionNFT (2509.16117, theorem 3.2), (b,): good samples attract v_+, bad ones v_-.

        (o |v_+ - v|^2 + (1 - o) |v_- - v|^2) / beta,    v_+- = v_old +- beta change,    o = (1 + rating) / 2

    Where v_old = E[v | x] its minimum is change = Cov(rating, v | x) / beta = (2 / beta) E[o | x] (v_good - v_old), with v_good
    the velocity of the law of good samples, reweighted by o.

    Args:
        change: (b, *shape) v_theta - v_old.
        old: (b, *shape) v_old.
        v: (b, *shape) conditional velocities.
        rating: (b,) in [-1, 1].
        beta: above 0.
    """
    good, step = (1 + rating) / 2, beta * change
    return (good * mean_square(old + step - v) + (1 - good) * mean_square(old - step - v)) / beta


# --- jumps -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Forward(Rated):
    """Tuning on the forward process (MeanFlowNFT, 2607.15273), of the jumps themselves: nothing is distilled afterwards.

    With u the average velocity of a map from s to t, and b its velocity,

        V = u - (t - s) du/ds,    du/ds = (d/ds + b . grad) u

    is the velocity at s that a jump implies; it is b for all t where the map is consistent. `contrast` compares V in place of
    the velocity, with ``control`` |V_theta - V_ref|^2; no gradient passes through du/ds, a central difference. So the map that
    belongs to the velocity at rest is at rest with it.

    The release has one du/ds for all maps (``shared``): the averaged map's, with v in place of b. That is cheaper, but a round
    then changes a jump by what is due at its start, in place of the mean over it.

    Args:
        group: samples per task to compare with each other, at least 2.
        reuse: updates per set of samples, each with new noise and times.
        range: advantage, in standard deviations, above which a sample is rated 1, and below minus which -1; above 0.
        within: divide by the standard deviation within the group, in place of that of the batch.
        jumps: of a sample.
        beta: the change of the velocity that makes v_+ of v_old, above 0; smaller values take larger steps.
        diagonal: share of pairs with s = t, which tune the velocity.
        terminal: share of pairs with t = 1; the others are uniform on s < t.
        step: half the width of the difference, in time.
        shared: take one derivative for all maps, as the release does.
    """

    jumps: int = 4
    beta: float = 1.0
    diagonal: float = 0.5
    terminal: float = 0.25
    step: float = 0.005
    shared: bool = False

    law_is_map = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(jumps=self.jumps)
        if not (1e-6 <= self.beta < math.inf and 0 < self.step < 0.5):
            raise ValueError(f"beta={self.beta}, step={self.step}: beta must be finite and at least 1e-6, step in (0, 0.5)")
        if not (self.diagonal >= 0 and self.terminal >= 0 and self.diagonal + self.terminal <= 1):
            raise ValueError(f"diagonal={self.diagonal}, terminal={self.terminal}: from 0 on, and at most 1 together")

    def loss(self, update: Update) -> Terms:
        x1, rating = self.samples(update, self.law(update.averaged, update.reference))
        s, t, x0 = self.pairs(update)
        path, s_ = update.tuned.interpolant, expand_time(s, x1)
        at = Pairs(path.interpolate(x0, x1, s_), s, t, update.problem.cond)
        v = path.conditional_velocity(x0, x1, s_)
        with torch.no_grad():
            lags = [at.lag(update.averaged, self.step, v if self.shared else None)]
            lags += 2 * lags if self.shared else [at.lag(each, self.step) for each in (update.tuned, update.reference)]
            old, reference = at.average(update.averaged) - lags[0], at.average(update.reference) - lags[2]
        velocity = at.average(update.tuned) - lags[1]
        fit = contrast(velocity - old, old, v, rating, self.beta).mean()
        return self.terms(update, fit, mean_square(velocity - reference).mean())

    def pairs(self, update: Update) -> tuple[Tensor, Tensor, Tensor]:
        """Times s <= t (b,) and noise x_0 (b, *shape). Kinds of pairs alternate within a group, from a random place on."""
        times, x0 = self.draws(update, 2)
        s, t = times.sort(0).values
        place = (torch.arange(len(s), device=s.device) + self.group * update.uniform()) % self.group / self.group
        t = torch.where(place < self.diagonal + self.terminal, 1.0, t)
        return s, torch.where(place < self.diagonal, s, t), x0

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return chain(self.jumps)(tuned)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`: it tunes jumps between any two times."""
        if can(flow_map, "two_time"):
            return ""
        return by_velocity(flow_map) or needs("two_time", "take nft, which tunes a velocity")


@dataclass(frozen=True)
class Pairs:
    """Where jumps begin and end.

    Attributes:
        x: (b, *shape) states at s.
        s: (b,) times.
        t: (b,) times, not below s.
        cond: b rows.
    """

    x: Tensor
    s: Tensor
    t: Tensor
    cond: Condition

    def average(self, flow_map: FlowMap) -> Tensor:
        """u(x, s, t) of a map, (b, *shape)."""
        return flow_map.average(self.x, self.s, self.t, self.cond)

    def lag(self, flow_map: FlowMap, step: float, along: Tensor | None = None) -> Tensor:
        """(t - s) du/ds of a map, by differences within [0, t]; no calls are made where s = t.

        Args:
            flow_map: the map.
            step: half the width of the difference.
            along: (b, *shape) dx/ds; default the map's own velocity.

        Returns:
            (b, *shape).
        """
        lag, off = torch.zeros_like(self.x), (self.t > self.s).nonzero().flatten()
        if not len(off):
            return lag
        x, s, t, cond = self.x[off], self.s[off], self.t[off], take_rows(self.cond, off)
        slope = flow_map.average(x, s, s, cond) if along is None else along[off]
        ends = ((s - step).clamp_min(0), torch.minimum(s + step, t))
        beside = torch.cat([x + expand_time(end - s, x) * slope for end in ends])
        both = None if cond is None else join_conditions(cond, cond)
        before, after = flow_map.average(beside, torch.cat(ends), torch.cat([t, t]), both).chunk(2)
        lag[off] = expand_time((t - s) / (ends[1] - ends[0]).clamp_min(1e-9), x) * (after - before)
        return lag


@dataclass(frozen=True)
class MeanFlowNFT(Forward):
    """MeanFlowNFT with the settings of its release (2607.15273): one derivative for all maps, and a wide range.

    The release divides errors in the data by their own size, which moves the point of rest; here they are squares of
    velocities.
    """

    range: float = 5.0
    beta: float = 0.1
    shared: bool = True


# --- velocities ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RatedVelocity(Rated):
    """What the methods that tune a velocity share.

    Args:
        ode: steps of the ODE for samples, two calls each.
    """

    ode: int = 6

    law_is_map = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(ode=self.ode)

    def loss(self, update: Update) -> Terms:
        x1, rating = self.samples(update, ode(update.averaged, self.ode))
        path, cond = update.tuned.interpolant, update.problem.cond
        (t,), x0 = self.draws(update)
        t_ = expand_time(t, x1)
        x = path.interpolate(x0, x1, t_)
        velocity = update.tuned.velocity(x, t, cond)
        with torch.no_grad():
            old, reference = (flow_map.velocity(x, t, cond) for flow_map in (update.averaged, update.reference))
        fit = self.fit(velocity, old, path.conditional_velocity(x0, x1, t_), rating)
        return self.terms(update, fit, mean_square(velocity - reference).mean())

    def fit(self, velocity: Tensor, old: Tensor, v: Tensor, rating: Tensor) -> Tensor:
        """What a method minimises beside the distance from the reference, a number.

        Args:
            velocity: (b, *shape) of the tuned map, at noised samples.
            old: (b, *shape) of the averaged map.
            v: (b, *shape) conditional velocities.
            rating: (b,) in [-1, 1].
        """
        raise NotImplementedError

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return ode(tuned, 4 * self.ode)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`."""
        return by_velocity(flow_map)


@dataclass(frozen=True)
class NFT(RatedVelocity):
    """DiffusionNFT (Zheng et al. 2509.16117, algorithm 1): a regression on the forward process, for any reward.

        o |v_+ - v|^2 + (1 - o) |v_- - v|^2 + control |v_theta - v_ref|^2,    v_+- = v_old +- beta (v_theta - v_old)

    v is the conditional velocity at a sample of the averaged map, o in [0, 1] rates that sample; the first two terms are over
    beta, see `contrast`. Good samples attract, bad ones repel. This trains a velocity; the jumps are distilled from it.

    The release divides errors in the data by their own size, which moves the point of rest, and has a range of 5.

    Args:
        group: samples per task to compare with each other, at least 2.
        reuse: updates per set of samples, each with new noise and times.
        range: advantage, in standard deviations, above which a sample is rated 1, and below minus which -1; above 0.
        within: divide by the standard deviation within the group, in place of that of the batch.
        ode: steps of the ODE for samples, two calls each.
        beta: the change of the velocity that makes v_+ of v_old, above 0; smaller values take larger steps.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-6 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta}: must be finite and at least 1e-6")

    def fit(self, velocity: Tensor, old: Tensor, v: Tensor, rating: Tensor) -> Tensor:
        return contrast(velocity - old, old, v, rating, self.beta).mean()


@dataclass(frozen=True)
class AWM(RatedVelocity):
    """Advantage-weighted matching (Xue et al. 2509.25050): flow matching to own samples, weighted by advantages.

        A |v_theta - v|^2 + trust |v_theta - v_old|^2 + control |v_theta - v_ref|^2

    The first term is a policy gradient, with a sample's error in place of its log-likelihood. Without control the minimum is
    the velocity of the law of the samples, reweighted by trust + A: a density if trust is at least 1. This trains a velocity;
    the jumps are distilled from it.

    The release takes a root of the first error, which moves the point of rest, and has a range of 5.

    Args:
        group: samples per task to compare with each other, at least 2.
        reuse: updates per set of samples, each with new noise and times.
        range: advantage, in standard deviations, above which a sample is rated 1, and below minus which -1; above 0.
        within: divide by the standard deviation within the group, in place of that of the batch.
        ode: steps of the ODE for samples, two calls each.
        trust: weight of the distance from the averaged map, at least 0; below 1 the loss may have no minimum.
    """

    trust: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trust < math.inf:
            raise ValueError(f"trust={self.trust}: must be finite and at least 0")

    def fit(self, velocity: Tensor, old: Tensor, v: Tensor, rating: Tensor) -> Tensor:
        return (rating * mean_square(velocity - v)).mean() + self.trust * mean_square(velocity - old).mean()
