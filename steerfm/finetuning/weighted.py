"""Reward-weighted refitting for any reward, and the distillation of a method's result into one flow map.

Both fit a flow map to samples: flow matching for the velocity, trajectories of the map's own velocity for its jumps. So all
pairs of times (s, t) learn the new law, not only those that a method visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm.capabilities import can
from steerfm.cost import count, count_backward
from steerfm.finetuning.base import Law, Terms, Update, by_velocity, chain, draw
from steerfm.flowmap import FlowMap
from steerfm.randomness import derive
from steerfm.registry import TakesNames, objects
from steerfm.rows import Condition, map_condition, move_condition, take_rows
from steerfm.spread import shared_out
from steerfm.steering.weights import effective_sample_size, largest, normalise
from steerfm.training.objectives import ALL, FlowMatching, Trajectory, Triangle, mean_square


@dataclass(frozen=True)
class Refit:
    """Fits a flow map to samples x_1: flow matching on most rows, `Trajectory` on the rest.

    Args:
        trajectory: share of the rows that fit jumps, in [0, 1]; the others fit the velocity. For a map without jumps between
            two times all rows fit the velocity.
        anchor: alpha: adds alpha |v - v_ref|^2 on the rows that fit the velocity.
        ode: steps of the trajectories.
    """

    trajectory: float = 0.5
    anchor: float = 0.0
    ode: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.trajectory <= 1:
            raise ValueError(f"trajectory={self.trajectory}: must be in [0, 1]")

    def loss(self, update: Update, x1: Tensor, cond: Condition, teacher: FlowMap | None = None) -> Terms:
        """The terms of a fit; each process fits some rows of both kinds.

        Args:
            update: the update.
            x1: (B, *shape) samples of the global batch, in model space.
            cond: their conditions.
            teacher: a map whose velocity the trajectories follow; default the map itself.
        """
        n, generator = len(x1), update.common("fit")
        jumps = round(self.trajectory * n) if can(update.tuned, "two_time") else 0
        trajectory = Trajectory(Triangle(terminal=0.3, full=0.2), steps=self.ode, teacher=teacher)
        velocity = Anchored(update.reference, self.anchor) if self.anchor else FlowMatching()
        terms: Terms = {}
        total, calls = x1.new_zeros(()), 0
        for name, objective, of in (("jumps", trajectory, slice(0, jumps)), ("velocity", velocity, slice(jumps, n))):
            if not (many := of.stop - of.start):
                continue
            rows, weight = update.part(many), update.processes
            if rows.start == rows.stop:  # every process makes every call
                rows, weight = slice(0, 1), 0
            losses = weight * objective(update.tuned, x1[of], take_rows(cond, of), generator, rows).sum()
            terms[name], total, calls = losses / many, total + losses / n, calls + rows.stop - rows.start
        count("forwards", calls)  # the fits call the network, not the map
        count_backward("backwards", calls, total)
        return {"loss": total, **terms}


@dataclass(frozen=True)
class Anchored:
    """Flow matching plus alpha |v - v_ref|^2: a bound on the Wasserstein distance from the reference (2502.06061)."""

    reference: FlowMap
    alpha: float

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator, rows: slice = ALL) -> Tensor:
        x, t, target = (value[rows] for value in FlowMatching().regression(flow_map, x1, cond, generator))
        cond = take_rows(cond, rows)
        u = flow_map.average_velocity(x, t, t, cond)
        with torch.no_grad():
            reference = self.reference.velocity(x, t, cond)
        return mean_square(u - target) + self.alpha * mean_square(u - reference)


@dataclass(frozen=True)
class Weighted(metaclass=TakesNames):
    """Rounds of reward-weighted refitting, for any reward: sample, weight by exp(increment * r), fit, repeat.

    The increments add up to the strength 1 / (control * scale). A round takes a smaller one if the weights would degenerate.
    As rounds, samples and updates grow, this samples q proportional to p(x) exp(strength r(x)). Weights are normalised within
    a task.

    Args:
        rounds: number of rounds; the updates are divided equally between them.
        samples: total number of new samples per round.
        ess: smallest effective sample size of a round's weights, as a share of the samples, in (0, 1].
        jumps: number of jumps of a sample.
        refit: settings of the fit.
        online: tilt by the whole strength in every round, as online methods do. Without an anchor it collapses.
    """

    rounds: int = 4
    samples: int = 2048
    ess: float = 0.5
    jumps: int = 4
    refit: Refit = Refit()
    online: bool = False

    differentiates, tilts, group, law_is_map, law_is_velocity = False, True, 1, True, True

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with objects in place of names."""
        return objects(cls, arguments, {"refit": {}})

    def __post_init__(self) -> None:
        if min(self.rounds, self.samples, self.jumps) < 1:
            raise ValueError("rounds, samples and jumps must be at least 1")
        if not 0 < self.ess <= 1:
            raise ValueError(f"ess={self.ess}: must be in (0, 1]")

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return chain(self.jumps)(tuned)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`: it fits velocities, and jumps if the map has two times."""
        return by_velocity(flow_map)

    def loss(self, update: Update) -> Terms:
        number = min(self.rounds - 1, update.step * self.rounds // update.steps)
        if int(update.memory.get("round", torch.tensor(-1))) != number:
            self._sample(update, number)
        log_w = update.memory["log_w"]
        tasks, k = log_w.shape
        choice = update.common("choice")
        which = torch.randint(tasks, (update.size,), generator=choice)
        upto = log_w.double().exp().cumsum(1)  # task i in [i, i + 1], so that one search serves all
        upto = (upto / upto[:, -1:] + torch.arange(tasks)[:, None]).flatten()
        rows = torch.searchsorted(upto, which + torch.rand(update.size, generator=choice, dtype=upto.dtype), right=True)
        terms = self.refit.loss(update, *_rows(update, which, rows.clamp_max(tasks * k - 1)))
        return terms | {name: update.memory[name].to(update.tuned.device) for name in ("reward", "strength", "ess")}

    def _sample(self, update: Update, number: int) -> None:
        """Draw the samples of a round and compute their weights."""
        tasks, memory = update.all_tasks, update.memory
        k = max(2, self.samples // tasks.n)
        averaged, reference = shared_out(update.averaged), shared_out(update.reference)
        x1 = _pool(update, self.law(averaged, reference), number, k)
        with torch.no_grad(), update.as_one():
            r = tasks.repeat(k).score(averaged, update.reward, x1).double().cpu().view(tasks.n, k)
        strength = 0.0 if self.online or not number else float(memory["strength"])
        target = update.strength * (1 if self.online else (number + 1) / self.rounds) - strength
        step = largest_step(r, target, self.ess)
        log_w = normalise(step * r)
        values = {"strength": strength + step, "ess": effective_sample_size(log_w).mean().item(), "reward": r.mean().item()}
        memory |= {name: torch.tensor(value) for name, value in values.items()}
        memory |= {"round": torch.tensor(number), "log_w": log_w, "pool": x1.cpu()}


def largest_step(r: Tensor, target: float, ess: float) -> float:
    """The largest step up to ``target`` at which the weights exp(step r) keep a mean effective sample size of ``ess``.

    Args:
        r: (n, k) rewards.
        target: upper bound of the step.
        ess: as a share of the samples, in (0, 1].
    """
    share = largest(lambda step: effective_sample_size(step * target * r).mean() >= ess, r.new_zeros(()), r.new_ones(()), 50)
    return share.item() * target


@dataclass(frozen=True)
class ORWCFM(Weighted):
    """ORW-CFM-W2 (Fan et al. 2502.06061, algorithm 1): online reward weighting with a Wasserstein bound (alpha = 1)."""

    rounds: int = 20
    refit: Refit = Refit(anchor=1.0)
    ess: float = 0.05
    online: bool = True
    tilts = False  # the result depends on alpha


@dataclass(frozen=True)
class Distil:
    """Fits a plain flow map to samples of a tuned model.

    Args:
        source: the sampler of the tuned model.
        samples: number of samples in a pool.
        pools: number of pools; the updates are divided equally between them.
        refit: settings of the fit.
        teacher: a map whose frozen velocity all rows follow, in place of a fit to samples.
    """

    source: Law
    samples: int = 1024
    pools: int = 4
    refit: Refit = Refit()
    teacher: FlowMap | None = None

    differentiates, tilts, group, law_is_map, law_is_velocity = False, False, 1, True, True

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return chain(4)(tuned)

    def loss(self, update: Update) -> Terms:
        if self.teacher is not None:
            blank = torch.empty(update.size, *update.tuned.shape, device=update.tuned.device)
            return Refit(1.0, ode=16).loss(update, blank, map_condition(update.all_rows, update.problem.cond), self.teacher)
        tasks, memory, number = update.all_tasks, update.memory, update.step * self.pools // update.steps
        k = max(1, self.samples // tasks.n)
        if int(memory.get("round", torch.tensor(-1))) != number:
            memory |= {"round": torch.tensor(number), "pool": _pool(update, self.source, number, k).cpu()}
        choice = update.common("choice")
        which, rows = (torch.randint(m, (update.size,), generator=choice) for m in (tasks.n, k))
        return self.refit.loss(update, *_rows(update, which, which * k + rows))


def _pool(update: Update, law: Law, number: int, k: int) -> Tensor:
    """Samples (n * k, *shape) of a round, ``k`` for each of the n tasks; all processes draw them together."""
    tasks, seeds = update.all_tasks, [derive(update.seed, "pool", number, i) for i in range(update.all_tasks.n)]
    with update.as_one():
        return draw(law, tasks, update.reference, seeds, k)


def _rows(update: Update, which: Tensor, rows: Tensor) -> tuple[Tensor, Condition]:
    """Rows of the pool and the conditions of their tasks, on the device of the network."""
    device = update.tuned.device
    return update.memory["pool"][rows].to(device), move_condition(update.all_tasks[which].cond, device)
