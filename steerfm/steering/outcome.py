"""The interface of a method, and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from steerfm.rewards import Reward
from steerfm.sampling import Noise
from steerfm.steering.value import Problem

Tick = Callable[[int, int], None]
"""Called with (steps done, total steps)."""
SHOWN = 18
"""Most steps in the text of a trace, up to a slack of two; of longer traces it shows the first and the last nine."""


@dataclass
class Trace:
    """The course of a run, per step i = 0 ... steps - 1 (the state after the step).

    If a selection reduced the number of particles, the missing ones are NaN, with ancestor -1. If a callback ended batches at
    different times, ``t`` has all these times. At a time at which an output took no step, its numbers are NaN, its particles
    are their own ancestors, and its look-ahead is that of the step before.

    Attributes:
        t: (steps,) time.
        ess: (steps, n) effective sample size as a share of the particles, before selection.
        resampled: (steps, n) whether the output was resampled.
        ancestors: (steps, n, k) index of each particle's parent; at the first step, among the particles that looked ahead at
            t = 0.
        value: (steps, n, k) tempered value; at the last step strength * reward.
        guidance_ratio: (steps, n, k) length of the shift divided by that of the step's displacement; 0 without guidance.
        gradient_norm: (steps, n, k) length of the guidance's direction before the step. A heavy tail over the particles is a
            sign that the look-ahead is discontinuous at basin borders. None if the method has no gradient.
        beta: (steps, n) inverse temperature of the value; None if the method has none.
        accepted: (steps, n) whether the chain of the results accepted its trial; None if the method has no chains.
        lookaheads: (steps, n, *shape) the first particle's look-ahead, at the last step the sample itself; None unless
            requested, or if the method does not look ahead.
    """

    t: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    value: Tensor
    guidance_ratio: Tensor
    gradient_norm: Tensor | None = None
    beta: Tensor | None = None
    accepted: Tensor | None = None
    lookaheads: Tensor | None = None

    def origins(self) -> Tensor:
        """(steps, n, k) index of the initial particle from which each one descends."""
        out = [self.ancestors[0]]
        for ancestors in self.ancestors[1:]:
            out.append(out[-1].gather(1, ancestors.clamp_min(0)).masked_fill(ancestors < 0, -1))
        return torch.stack(out)

    def unique(self) -> Tensor:
        """(n,) number of initial particles with descendants at the end."""
        last = self.origins()[-1].sort(1).values
        return ((last.diff(dim=1) > 0) & (last[:, :-1] >= 0)).sum(1) + 1

    def __repr__(self) -> str:
        """One line per step, with means or medians over outputs and particles; of many steps the first and the last."""
        steps, n, k = self.value.shape
        guided = bool(self.guidance_ratio.nan_to_num().any())
        names = ["step", "    t", "mean ESS", "resampled", "median value", *["guidance/step"] * guided]
        lines = ["  ".join(names)]
        for i in range(steps):
            value, ratio = self.value[i].nanmedian().item(), self.guidance_ratio[i].nanmedian().item()
            share, count = f"{self.ess[i].nanmean().item():.0%}", f"{int(self.resampled[i].sum())}/{n}"
            cells = [str(i), f"{self.t[i].item():.3g}", share, count, f"{value:.4g}", *[f"{ratio:.2g}"] * guided]
            lines.append("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, names)))
        if steps > SHOWN + 2:
            lines[1 + SHOWN // 2 : -(SHOWN // 2)] = [f"   ... {steps - SHOWN // 2 * 2} more"]
        size = f"{steps} step{'s' * (steps != 1)}, {n} output{'s' * (n != 1)} of {k} particle{'s' * (k != 1)}"
        return "\n".join([f"Trace: {size}", *lines])


@dataclass
class Outcome:
    """The output of a method for one batch.

    Attributes:
        samples: (n, k, *shape) the particles at t = 1, in model space.
        rewards: (n, k) their rewards.
        components: raw value of every term of the reward, (n, k) each, by name.
        log_weights: (n, k) with logsumexp = 0 over the particles of each output.
        log_z: (n,) estimate of log Z; None if there is none.
        trace: the course of the run.
    """

    samples: Tensor
    rewards: Tensor
    components: dict[str, Tensor]
    log_weights: Tensor
    log_z: Tensor | None
    trace: Trace


class Method(Protocol):
    """Turns a problem and noise into weighted particles; `Steering` is a method built from parts."""

    @property
    def particles(self) -> int: ...

    def check(self, reward: Reward) -> None:
        """Raise a ValueError that names the fix if the method cannot work with this reward."""
        ...

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """Run ``n`` outputs of ``particles`` particles each.

        Args:
            problem: with one row for each particle.
            noise: random streams of the outputs.
            n: number of outputs.
            lookaheads: whether the trace keeps the look-ahead pictures.
            tick: called after each step.
        """
        ...


@runtime_checkable
class Fits(Protocol):
    """A method that can fit itself into a budget of network evaluations."""

    @property
    def within(self) -> Callable[..., Any]:
        """The method in its best shape for a budget of evaluations per output: ``within(budget)``.

        Raises:
            ValueError: the budget is too small for the method.
        """
        ...


class Fitting(Method, Fits, Protocol):
    """A method with ``within``. All methods of steerfm have it; one of yours, by FILE.py:NAME, may not."""


class Preset(Method, Protocol):
    """A method with a name in configurations.

    Attributes:
        samples: whether the weighted particles sample the tilted target: "yes", "no", or a condition.
        paper: arXiv number, or another reference; "" for none.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # it is a dataclass
    samples: ClassVar[str]
    paper: ClassVar[str]
