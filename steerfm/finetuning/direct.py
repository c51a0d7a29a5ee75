"""Backpropagation of the reward through a few jumps, and published methods as settings of it.

    x_{i+1} = X_{t_i, t_{i+1}}(x_i),   maximise  r(x_K) / scale - control/2 sum_i h_i mean |u(x_i) - u_ref(x_i)|^2

The mean is over entries, so that one control works for every picture size; it bounds a transport distance, not a divergence.

The choice of the trained jump decides whether the reward gets hacked. Training the last jump adds the reward's gradient to the
picture, an adversarial change. Training the first jump, with the gradient passing through a frozen last jump, keeps pictures
on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from steerfm.capabilities import can, needs
from steerfm.finetuning.base import Law, Terms, Update
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time, time_grid
from steerfm.rows import Condition
from steerfm.sampling import Noise
from steerfm.transitions import Step, usual


@dataclass(frozen=True)
class Direct:
    """Direct reward backpropagation through one to a few jumps; the default trains the first of two and freezes the last.

    Args:
        jumps: K, from t = 0 to t = 1.
        trained: indices of the jumps to train, -1 for the last; None for all. The other jumps use the reference, and the
            gradient passes through them.
        truncate: most jumps, from the last one back, that get a gradient; [low, high] to draw their number in each update;
            None for all. Earlier jumps use the trained map without a gradient.
        jitter: interior times are (i + jitter U(-1, 1)) / K, drawn in each update; in [0, .5).
        power: of the times, as in `time_grid`; below 1 they are later.
        mix: a: the input of the network is a x + (1 - a) sg(x); 1 differentiates through the path, 0 trains each jump
            separately.
        averages: number of renoised copies of the sample, each denoised by the last jump, to average over; 0 for none.
        ceiling: rewards are capped here, in the reward's own units.
        checkpoint: recompute trained jumps in the backward pass, as frozen jumps always are: less memory, one more forward.
    """

    jumps: int = 2
    trained: tuple[int, ...] | None = (0,)
    truncate: int | tuple[int, int] | None = None
    jitter: float = 0.4
    power: float = 1.0
    mix: float = 1.0
    averages: int = 0
    ceiling: float | None = None
    checkpoint: bool = False

    differentiates, tilts, group, law_is_map, law_is_velocity = True, False, 1, False, False

    def __post_init__(self) -> None:
        if self.jumps < 1:
            raise ValueError(f"jumps={self.jumps}: must be at least 1")
        if not 0 <= self.jitter < 0.5:
            raise ValueError(f"jitter={self.jitter}: must be in [0, 0.5), so that times stay in order")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix}: must be in [0, 1]")
        if not self.power > 0:
            raise ValueError(f"power={self.power}: must be positive")
        if self.averages < 0:
            raise ValueError(f"averages={self.averages}: must be at least 0")
        for i in self.trained or ():
            if not -self.jumps <= i < self.jumps:
                raise ValueError(f"trained={list(self.trained or ())}: there is no jump {i}, jumps={self.jumps}")
        low, high = self._truncation()
        if not 1 <= low <= high:
            raise ValueError(f"truncate={self.truncate}: at least one jump, and low <= high")
        if self.jumps - high > max(self._trained_jumps()):
            raise ValueError(
                f"truncate={self.truncate} leaves no gradient for the trained jumps {sorted(self._trained_jumps())}"
            )

    def loss(self, update: Update) -> Terms:
        tuned, reference, cond = update.tuned, update.reference, update.problem.cond
        grid = tuned.grid(self.jumps)
        times, x = self.times([2 * update.uniform() - 1 for _ in range(self.jumps - 1)], grid), update.normal()
        low, high = self._truncation()
        active = self.jumps - (low + int(update.uniform() * (high - low + 1)))  # the first jump with a gradient
        control = x.new_zeros(len(x))
        for i, (s, t) in enumerate(pairwise(times)):
            if i < active:
                with torch.no_grad():
                    step = usual(tuned).step(tuned, x, s, t, cond)
                x = step.mean
            elif i not in self._trained_jumps():
                step = self._step(reference, x, s, t, cond, again=True)
                x = step.mean
            else:
                start, into = x, torch.lerp(x.detach(), x, self.mix) if self.mix < 1 else x
                step = self._step(tuned, into, s, t, cond)
                change = step.mean - into  # h u(x)
                x = start + change
                if update.control:
                    with torch.no_grad():
                        change_ref = usual(reference).step(reference, start.detach(), s, t, cond).mean - start.detach()
                    control = control + (change - change_ref).square().flatten(1).mean(1) / (2 * (t - s))
            x = Step(x, step.std).sample(update.normal() if step.std else None)
        if self.averages:
            return self._over_copies(update, x.detach(), times[-2], control)
        return self._terms(update, update.problem.score(x).total, control)

    def _over_copies(self, update: Update, x1: Tensor, s: float, control: Tensor) -> Terms:
        """DRaFT-LV: the reward of several noisy copies of the same sample, each denoised by the last jump."""
        n, b, path = self.averages, len(x1), update.tuned.interpolant
        noise = torch.cat([update.normal() for _ in range(n)])
        rows = torch.arange(b).repeat(n)
        problem = update.tasks[rows].problem(update.tuned, update.reward)
        again = path.interpolate(noise, x1[rows.to(x1.device)], expand_time(s, noise))
        back = self._step(update.tuned, again, s, 1.0, problem.cond)
        return self._terms(update, problem.score(back.mean).total, control)

    def _terms(self, update: Update, r: Tensor, control: Tensor) -> Terms:
        capped = r if self.ceiling is None else r.clamp(max=self.ceiling)
        loss = -capped.mean() / update.scale + update.control * control.mean()
        return {"loss": loss, "reward": r.mean(), "control_cost": control.mean()}

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        times = self.times([0.0] * (self.jumps - 1), tuned.grid(self.jumps))
        maps = [
            tuned if i in self._trained_jumps() or i < self.jumps - self._truncation()[0] else reference
            for i in range(self.jumps)
        ]

        def law(noise: Noise, cond: Condition) -> Tensor:
            x = noise.start(tuned)
            for flow_map, (s, t) in zip(maps, pairwise(times)):
                step = usual(flow_map).step(flow_map, x, s, t, cond)
                x = step.sample(noise.normal(flow_map.shape, x) if step.std else None)
            return x

        return law

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`: if all jumps are trained, any map will do."""
        if not can(flow_map, "endpoint") and not can(flow_map, "velocity") and self.jumps > 1:
            return needs("endpoint", "take jumps=1 and trained=null")
        if can(flow_map, "two_time") or len(self._trained_jumps()) == self.jumps:
            return ""
        return "frozen and trained jumps are merged by a distillation, which " + needs(
            "two_time", f"take trained=null, or draft_k, with jumps={flow_map.steps}"
        )

    def times(self, shifts: list[float], grid: list[float]) -> list[float]:
        """0 = t_0 < ... < t_K = 1.

        Args:
            shifts: in [-1, 1], of the interior times.
            grid: of the map; the times are interpolated on it.
        """
        inner = [((i + 1 + self.jitter * shift) / self.jumps) ** self.power for i, shift in enumerate(shifts)]
        return [0.0, *(between(grid, u) for u in inner), 1.0]

    def _step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, again: bool = False) -> Step:
        """The usual step of a map; with ``again`` it is recomputed in the backward pass, as ``checkpoint`` does for all."""
        move = usual(flow_map)
        if not (again or self.checkpoint):
            return move.step(flow_map, x, s, t, cond)
        std = 0.0

        def mean(x: Tensor) -> Tensor:
            nonlocal std
            step = move.step(flow_map, x, s, t, cond)
            std = step.std
            return step.mean

        end = checkpointed(mean, x, use_reentrant=False)
        assert isinstance(end, Tensor)
        return Step(end, std)

    def _trained_jumps(self) -> set[int]:
        return set(range(self.jumps)) if self.trained is None else {i % self.jumps for i in self.trained}

    def _truncation(self) -> tuple[int, int]:
        if self.truncate is None:
            return self.jumps, self.jumps
        low, high = (self.truncate, self.truncate) if isinstance(self.truncate, int) else self.truncate
        return min(low, self.jumps), min(high, self.jumps)


def between(grid: list[float], u: float) -> float:
    """The time at position u in [0, 1] of a grid, by linear interpolation; u itself if the steps of the grid are equal."""
    if grid == time_grid(len(grid) - 1):
        return u
    i = min(int(u * (len(grid) - 1)), len(grid) - 2)
    return grid[i] + (u * (len(grid) - 1) - i) * (grid[i + 1] - grid[i])


@dataclass(frozen=True)
class DRaFT(Direct):
    """DRaFT (Clark et al. 2309.17400, section 4): all steps are trained, with a gradient through every step."""

    jumps: int = 4
    trained: tuple[int, ...] | None = None
    jitter: float = 0.0


@dataclass(frozen=True)
class DRaFTK(DRaFT):
    """DRaFT-K (2309.17400, section 4.1): the gradient goes through the last K = ``truncate`` steps only; 1 in the paper."""

    truncate: int | tuple[int, int] | None = 1


@dataclass(frozen=True)
class DRaFTLV(DRaFTK):
    """DRaFT-LV (2309.17400, section 4.1): DRaFT-1, averaged over renoised copies of the sample; 2 in the paper."""

    averages: int = 2


@dataclass(frozen=True)
class AlignProp(DRaFT):
    """AlignProp (Prabhudesai et al. 2310.03739, section 4): truncated backpropagation with a random number of steps."""

    truncate: int | tuple[int, int] | None = (1, 4)


@dataclass(frozen=True)
class ReFL(Direct):
    """ReFL (Xu et al. 2304.05977, algorithm 1): stop at a late random time, look ahead with a gradient, and train that jump.

    Rewards are capped at ``ceiling``; 2 in the paper, in the units of its reward.
    """

    trained: tuple[int, ...] | None = (-1,)
    truncate: int | tuple[int, int] | None = 1
    power: float = 0.3


@dataclass(frozen=True)
class DRTune(Direct):
    """DRTune (Wu et al. 2405.00760, algorithm 1): no gradient into the network's input; every step gets its own."""

    jumps: int = 4
    trained: tuple[int, ...] | None = None
    jitter: float = 0.0
    mix: float = 0.0
