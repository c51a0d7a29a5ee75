"""Corrections: what makes a run of the engine sampling, search or ascent.

The log-weights of a correction say what the particles are a weighted sample of. With base kernel N(mean, std^2 I) and
guided proposal N(mean + shift, std^2 I), x' = mean + shift + std z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from steerfm.sampling import Diffuse, Jump, Step
from steerfm.steering import lookahead
from steerfm.steering.value import Evaluation, MapGradient
from steerfm.steering.weights import wide

if TYPE_CHECKING:
    from steerfm.steering.engine import Steering


@dataclass
class Move:
    """One step of all particles, as a correction sees it: before and after it, the kernel, the shift and the noise."""

    before: Evaluation
    after: Evaluation
    step: Step
    shift: Tensor | None
    noise: Tensor | None
    beta_before: float
    beta_after: float


class Correction(Protocol):
    """Any object with these members is a correction.

    Attributes:
        samples: whether the weighted particles sample the tilted target.
        looks_untempered: whether the look-ahead is needed even where its value is tempered to zero, as at t = 0.
    """

    @property
    def samples(self) -> bool: ...

    looks_untempered: bool

    def check(self, steering: Steering) -> None:
        """Raise a ValueError that says why, if the other parts do not fit."""
        ...

    def start(self, evaluation: Evaluation) -> Tensor:
        """Log-weights at t = 0, (b,)."""
        ...

    def increment(self, move: Move) -> Tensor:
        """What one step adds to the log-weights, (b,)."""
        ...

    def guides(self, step: Step) -> bool:
        """Whether a step with this kernel may be guided."""
        ...


@dataclass(frozen=True)
class Twisted:
    """log w += V_{i+1}(x') - V_i(x) + log base(x'|x) - log proposal(x'|x); the last V is strength * r(x_1) itself.

    Twisted diffusion sampling (Wu et al. 2306.17775, equation 8). Samples the tilt of the base chain's own law for any
    look-ahead, however poor the map; the sum telescopes, so exp(log Z) is unbiased.
    """

    samples = True
    looks_untempered = False

    def check(self, steering: Steering) -> None:
        transition = steering.transition
        assert not isinstance(transition, str)
        if steering.guidance is not None and not transition.stochastic:
            raise ValueError(
                "a twisted correction needs the density of a guided step: use transition renoise or diffuse, or no guidance, "
                "or correction none (ascent, not sampling)"
            )

    def start(self, evaluation: Evaluation) -> Tensor:
        return evaluation.value.clone()

    def increment(self, move: Move) -> Tensor:
        change = move.after.value - move.before.value
        if move.shift is None or move.noise is None:
            return change
        shift = (move.shift / move.step.std).flatten(1)
        log_ratio = -(0.5 * shift.square() + shift * move.noise.flatten(1)).sum(1, dtype=wide(shift.device))
        return change + log_ratio

    def guides(self, step: Step) -> bool:
        return step.std > 0


@dataclass(frozen=True)
class Jarzynski:
    """log w += (beta_{i+1} - beta_i) strength r(X_{t_i,1}(x_i)), the simple weight of FMTT (2511.22688, proposition 1).

    Valid only for a true flow map's own look-ahead, where d/dt X_{t,1} + b . grad X_{t,1} = 0, with FMTT's drift and no
    further ascent; time steps leave an error of order 1 / steps that more particles do not remove.
    """

    samples = True
    looks_untempered = True

    def check(self, steering: Steering) -> None:
        if not isinstance(steering.lookahead, lookahead.Jump):
            raise ValueError(
                "the simple Jarzynski weight holds only for a flow-map look-ahead: use lookahead jump or correction twisted"
            )
        guidance, transition = steering.guidance, steering.transition
        plain = guidance is None and isinstance(transition, Jump)
        fmtt = (
            isinstance(transition, Diffuse)
            and type(guidance) is MapGradient
            and guidance.scale == 0.5
            and guidance.cap is None
            and not guidance.normalised
        )
        if not plain and not fmtt:
            raise ValueError(
                "the simple Jarzynski weight holds only for transition jump without guidance, or for transition diffuse with "
                "guidance MapGradient(scale=0.5, cap=None), which is FMTT's drift: use correction twisted for anything else"
            )

    def start(self, evaluation: Evaluation) -> Tensor:
        return torch.zeros_like(evaluation.value)

    def increment(self, move: Move) -> Tensor:
        return (move.beta_after - move.beta_before) * move.before.tilt

    def guides(self, step: Step) -> bool:
        return step.std > 0


@dataclass(frozen=True)
class Uncorrected:
    """No weights: the particles are the result of an ascent or a search, not a sample of the tilted target."""

    samples = False
    looks_untempered = False

    def check(self, steering: Steering) -> None:
        pass

    def start(self, evaluation: Evaluation) -> Tensor:
        return torch.zeros_like(evaluation.value)

    def increment(self, move: Move) -> Tensor:
        return torch.zeros_like(move.before.value)

    def guides(self, step: Step) -> bool:
        return True


CORRECTIONS: dict[str, Correction] = {"twisted": Twisted(), "jarzynski": Jarzynski(), "none": Uncorrected()}
"""Corrections by the name that configurations use."""
