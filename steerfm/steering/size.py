"""The size of a method: the shape in which a budget of network evaluations is spent best.

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
"""Share of a budget that a shape spends, where whole steps and particles allow it."""


class Within:
    """``within`` of a method, or of its class: then the class's defaults are sized."""

    def __get__(self, method: Any, owner: Any) -> Callable[..., Any]:
        made = owner() if method is None else method

        def within(budget: int, evaluations: Evaluations | None = None, steps: int | None = None) -> Any:
            """This method in the shape that spends a budget best; its other settings stay.

            Args:
                budget: network evaluations an output, a backward pass counted as two; at least 95% are spent, where whole
                    steps and particles allow it.
                evaluations: what one output of a method costs, where it is not what a plain flow map costs.
                steps: so many, or half of them and so on where that is too dear, in place of those of its shape.

            Raises:
                ValueError: it cannot be that cheap.
            """
            at_least_one(budget=budget)
            return made.fit(budget, evaluations or plain_evaluations, steps)

        return within


class Sized:
    """What fits itself into a budget: as many steps as its shape says, and what the rest buys beside them.

    Attributes:
        shape: steps by budget, the best that were measured (docs/methods.md); between and beyond them by their logarithms.
    """

    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 6}
    within = Within()

    def sized(self: M, steps: int, number: int) -> M:
        """This method with so many steps, and a number of particles, or of what else fills a budget."""
        raise NotImplementedError

    def least(self, steps: int) -> int:
        """The smallest number that makes sense with so many steps."""
        return 1

    def fit(self: M, budget: int, evaluations: Evaluations, steps: int | None) -> M:
        """See `Within`. Tried are the steps of the shape first, then those around them, down to one."""
        if steps is not None:
            tried = [steps >> i for i in range(steps.bit_length())]
            sizes = (_filled(self, each, budget, evaluations) for each in tried)
            best = next(filter(None, sizes), None)
        else:
            best = self._best(budget, evaluations)
        if best is None:
            raise ValueError(f"budget={budget}: {type(self).__name__} needs more network evaluations an output than that")
        return self.sized(best.steps, best.number)

    def _best(self, budget: int, evaluations: Evaluations) -> _Size | None:
        want, best = steps_within(self.shape, budget), None
        near = sorted(range(1, min(budget, 2 * math.ceil(want)) + 1), key=lambda steps: abs(math.log(steps / want)))
        for steps in near:
            if best is not None and (best.spent >= ENOUGH * budget or steps < want / 2):
                break
            trial = _filled(self, steps, budget, evaluations)
            if trial is not None and (best is None or trial.spent > best.spent):
                best = trial
        return best


@dataclass
class _Size:
    """What goes into `Sized.sized`, and the network evaluations that it comes to."""

    steps: int
    number: int
    spent: float


def _filled(method: Any, steps: int, budget: int, evaluations: Evaluations) -> _Size | None:
    """The largest number that the budget buys for so many steps, from what two small ones cost; None where it buys none."""
    low = method.least(steps)
    try:
        first, second = (evaluations(method.sized(steps, number)) for number in (low, low + 1))
    except ValueError:  # settings for which this size has no room
        return None
    if first > budget:
        return None
    more = int((budget - first) / (second - first)) if second > first else 0
    return _Size(steps, low + more, first + more * (second - first))


def steps_within(shape: Mapping[int, float], budget: int) -> float:
    """The steps that a shape gives a budget: straight lines between the logarithms, and on beyond the ends, at least 1."""
    known = sorted(shape.items())
    if len(known) == 1:
        return max(1.0, known[0][1])
    i = next((i for i, (at, _) in enumerate(known[1:-1]) if budget <= at), len(known) - 2)
    (a, low), (b, high) = known[i], known[i + 1]
    slope = math.log(high / low) / math.log(b / a)
    if budget < known[0][0]:
        slope = max(slope, 0.5)  # little can be spent on steps
    return max(1.0, low * (budget / a) ** slope)


# --- what a method costs on a map that costs nothing -----------------------------------------------------------------
class _Plain(FlowMap):
    """A map that draws towards zero, in one dimension: what a method calls on it is counted, what it draws is not used."""

    def __init__(self) -> None:
        super().__init__((1,))

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return -x

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return -x


def plain_evaluations(method: Any) -> float:
    """Network evaluations of one output of a method on a plain flow map, by trying it on a small one."""
    k = method.particles
    problem = Problem(_Plain(), as_reward(_first), torch.ones(k), Rows(k))
    with Ledger() as ledger:
        method.run(problem, Noise([0], k), 1, False, lambda done, steps: None)
    return ledger.cost.evaluations


def _first(x: Tensor) -> Tensor:
    return x[:, 0]
