"""What a method is, and what it returns."""

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
"""Called with (steps done, steps in all)."""
SHOWN = 18
"""Steps that a trace prints; of more than twenty the first and the last nine."""


@dataclass
class Trace:
    """What happened, per step i = 0 ... steps - 1 (the state after the step).

    Where a selection left fewer particles than there were at first, the missing ones are NaN, their ancestors -1. Where
    a callback ended batches at different times, ``t`` has all times; at one at which an output took no step, its numbers are
    NaN, its particles their own ancestors, and its look-ahead is that of the step before.

    Attributes:
        t: (steps,) time.
        ess: (steps, n) effective sample size as a share of the particles, before selection.
        resampled: (steps, n) whether the output was resampled.
        ancestors: (steps, n, k) whose copy each particle is; at the first step, of the particles that looked ahead at t = 0.
        value: (steps, n, k) tempered value; at the last step strength * reward.
        guidance_ratio: (steps, n, k) length of the shift over that of the step's displacement; 0 without guidance.
        gradient_norm: (steps, n, k) length of the guidance's direction before the step; its tail over the particles says
            whether the look-ahead tears at basin borders. Empty where the method has none.
        beta: (steps, n) inverse temperature of the value. Empty where the method has none.
        lookaheads: (steps, n, *shape) the first particle's look-ahead, at the last step the sample itself, where asked for
            and looked at; else None.
    """

    t: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    value: Tensor
    guidance_ratio: Tensor
    gradient_norm: Tensor | None = None
    beta: Tensor | None = None
    lookaheads: Tensor | None = None

    def origins(self) -> Tensor:
        """(steps, n, k) which of the first particles each one descends from."""
        out = [self.ancestors[0]]
        for ancestors in self.ancestors[1:]:
            out.append(out[-1].gather(1, ancestors.clamp_min(0)).masked_fill(ancestors < 0, -1))
        return torch.stack(out)

    def unique(self) -> Tensor:
        """(n,) how many of the first particles have descendants at the end."""
        last = self.origins()[-1].sort(1).values
        return ((last.diff(dim=1) > 0) & (last[:, :-1] >= 0)).sum(1) + 1

    def __repr__(self) -> str:
        """A line a step, the mean or median over outputs and particles; of many steps the first and the last."""
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
        counted = f"{steps} step{'s' * (steps != 1)}, {n} output{'s' * (n != 1)} of {k} particle{'s' * (k != 1)}"
        return "\n".join([f"Trace: {counted}", *lines])


@dataclass
class Outcome:
    """What a method returns for the outputs of one batch: particles (n, k, *shape), log-weights and log Z increments."""

    samples: Tensor
    rewards: Tensor
    components: dict[str, Tensor]
    log_weights: Tensor
    log_z: Tensor | None
    trace: Trace


class Method(Protocol):
    """Anything that turns a problem and noise into weighted particles; `Steering` is the one by parts."""

    @property
    def particles(self) -> int: ...

    def check(self, reward: Reward) -> None:
        """Raise a ValueError that names the fix, if the method cannot work with this reward."""
        ...

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """Run ``n`` outputs of ``particles`` particles."""
        ...


@runtime_checkable
class Fits(Protocol):
    """A method that fits itself into a budget of network evaluations."""

    @property
    def within(self) -> Callable[..., Any]:
        """The method in its best shape for so many evaluations an output: ``within(budget)``.

        Raises:
            ValueError: it cannot be that cheap.
        """
        ...


class Fitting(Method, Fits, Protocol):
    """A method that can do both, as all of steerfm's own can; one of yours, by FILE.py:NAME, where it has ``within``."""


class Preset(Method, Protocol):
    """A method with a name of its own.

    Attributes:
        samples: whether the weighted particles are a sample of the tilted target: "yes", "no", or when.
        paper: number on arXiv, or the place; "" where there is none.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # it is a dataclass
    samples: ClassVar[str]
    paper: ClassVar[str]
