"""The size of a method: the steps and particles that make the best use of a budget of network evaluations.

>>> Funnel.within(256)                                   # the class's defaults in that size
>>> FMRGJ(stop=0.8).within(64)                           # a method of your own settings
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from steerfm.checks import at_least_one
from steerfm.cost import Ledger
from steerfm.flowmap import FlowMap
from steerfm.rewards import as_reward
from steerfm.rows import Condition, Rows
from steerfm.sampling import Noise
from steerfm.steering.value import Problem

M = TypeVar("M", bound="Sized")
Evaluations = Callable[[Any], float]
"""Network evaluations of one output of a method, a backward pass counted as two."""
ENOUGH = 0.95
"""Share of the budget that a shape should use, as far as whole steps and particles allow."""


class Within:
    """The method ``within``; called on a class, it sizes the class's defaults."""

    def __get__(self, method: Any, owner: Any) -> Callable[..., Any]:
        instance = owner() if method is None else method

        def within(budget: int, evaluations: Evaluations | None = None, steps: int | None = None) -> Any:
            """This method in the best shape for a budget; its other settings stay.

            Args:
                budget: network evaluations per output; a backward pass counts as two. At least 95% are used, as far as whole
                    steps and particles allow.
                evaluations: returns the cost of one output of a method; default its cost on a plain flow map.
                steps: number of steps, in place of those of the shape; halved while they are too expensive.

            Raises:
                ValueError: the budget is too small for the method.
            """
            at_least_one(budget=budget)
            return instance.fit(budget, evaluations or plain_evaluations, steps)

        return within


class Sized:
    """A method that can fit itself into a budget: its ``shape`` gives the steps, and particles use up the rest.

    Attributes:
        shape: best measured number of steps by budget (docs/methods.md); interpolated and extrapolated in logarithms.
    """

    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 6}
    within = Within()

    def sized(self: M, steps: int, number: int) -> M:
        """This method with these steps, and this number of particles, or of what else fills the budget."""
        raise NotImplementedError

    def least(self, steps: int) -> int:
        """The smallest number that makes sense with these steps."""
        return 1

    def fit(self: M, budget: int, evaluations: Evaluations, steps: int | None) -> M:
        """See `Within`. Tries the steps of the shape first, then the numbers around them, down to one."""
        if steps is not None:
            candidates = [steps >> i for i in range(steps.bit_length())]
            sizes = (_fill(self, each, budget, evaluations) for each in candidates)
            best = next(filter(None, sizes), None)
        else:
            best = self._best(budget, evaluations)
        if best is None:
            raise ValueError(f"budget={budget}: {type(self).__name__} needs more network evaluations per output than that")
        return self.sized(best.steps, best.number)

    def _best(self, budget: int, evaluations: Evaluations) -> _Size | None:
        target, best = steps_within(self.shape, budget), None
        near = sorted(range(1, min(budget, 2 * math.ceil(target)) + 1), key=lambda steps: abs(math.log(steps / target)))
        for steps in near:
            if best is not None and (best.cost >= ENOUGH * budget or steps < target / 2):
                break
            trial = _fill(self, steps, budget, evaluations)
            if trial is not None and (best is None or trial.cost > best.cost):
                best = trial
        return best


@dataclass
class _Size:
    """The arguments of `Sized.sized`, and the cost in network evaluations."""

    steps: int
    number: int
    cost: float


def _fill(method: Any, steps: int, budget: int, evaluations: Evaluations) -> _Size | None:
    """The largest number that the budget allows with these steps, from the costs of two small ones; None if it allows none."""
    low = method.least(steps)
    try:
        first, second = (evaluations(method.sized(steps, number)) for number in (low, low + 1))
    except ValueError:  # the settings do not allow this size
        return None
    if first > budget:
        return None
    more = int((budget - first) / (second - first)) if second > first else 0
    return _Size(steps, low + more, first + more * (second - first))


def steps_within(shape: Mapping[int, float], budget: int) -> float:
    """The steps for a budget, at least 1: linear interpolation of the shape in logarithms, extrapolated beyond its ends."""
    points = sorted(shape.items())
    if len(points) == 1:
        return max(1.0, points[0][1])
    i = next((i for i, (at, _) in enumerate(points[1:-1]) if budget <= at), len(points) - 2)
    (a, low), (b, high) = points[i], points[i + 1]
    slope = math.log(high / low) / math.log(b / a)
    if budget < points[0][0]:
        slope = max(slope, 0.5)  # a small budget leaves few steps
    return max(1.0, low * (budget / a) ** slope)


# --- the cost of a method on a trivial map ---------------------------------------------------------------------------
class _Plain(FlowMap):
    """A map towards zero, in one dimension: only the number of its calls matters."""

    def __init__(self) -> None:
        super().__init__((1,))

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return -x

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return -x


def plain_evaluations(method: Any) -> float:
    """Network evaluations of one output of a method on a plain flow map, measured on a trivial one."""
    k = method.particles
    problem = Problem(_Plain(), as_reward(_first), torch.ones(k), Rows(k))
    with Ledger() as ledger:
        method.run(problem, Noise([0], k), 1, False, lambda done, steps: None)
    return ledger.cost.evaluations


def _first(x: Tensor) -> Tensor:
    return x[:, 0]
