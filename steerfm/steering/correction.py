"""Corrections: the log-weights that decide whether a run is sampling, or only a search or an ascent.

The log-weights determine the target of the weighted particles. The base kernel is N(mean, std^2 I), the guided proposal
N(mean + shift, std^2 I): x' = mean + shift + std z.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfm.processes import alone
from steerfm.sampling import Noise
from steerfm.steering import lookahead
from steerfm.steering.guidance import Guidance, MapGradient, Tilting
from steerfm.steering.selection import Selection
from steerfm.steering.tempering import Adaptive, Tempering
from steerfm.steering.value import Evaluation, View
from steerfm.steering.weights import wide
from steerfm.transitions import Diffuse, Jump, Step, Transition


@dataclass(frozen=True)
class Parts:
    """The parts of a method. A correction checks whether they fit together."""

    lookahead: lookahead.Lookahead | None
    guidance: Guidance | None
    tempering: Tempering
    transition: Transition
    correction: Correction
    selection: Selection | None


@dataclass
class Move:
    """One step of all particles, as a correction sees it: before and after it, the kernel, the shift and the noise."""

    before: Evaluation
    after: Evaluation
    step: Step
    shift: Tensor | None
    noise: Tensor | None
    duration: float
    family: Family | None = None


@dataclass
class Family:
    """All possible parents of the particles of a step: the particles before the selection, survivors or not.

    Attributes:
        x: (n, k, d) the particles after the step.
        mean: (n, m, d) means of the base kernels, one from each of the m parents.
        proposal: (n, m, d) means of the guided kernels.
        log_base: (n, m) log-weights of the parents without the twist, with logsumexp = log of their mean weight.
        log_odds: (n, m) log of the probability that a particle is the child of each parent.
        log_w: (n, k) log-weights of the particles after the selection, plus what it moved into log Z.
    """

    x: Tensor
    mean: Tensor
    proposal: Tensor
    log_base: Tensor
    log_odds: Tensor
    log_w: Tensor

    def log_ratio(self, std: float) -> Tensor:
        """log of sum_j base_j N(x; mean_j) / sum_j odds_j N(x; proposal_j), (n, k)."""
        out = []
        for x, mean, proposal, base, odds in zip(self.x, self.mean, self.proposal, self.log_base, self.log_odds):
            near, away = (
                torch.cdist(x, at).square().div_(-2 * std**2).add_(log_p).logsumexp(1)  # in place: k * m numbers each
                for at, log_p in ((mean, base), (proposal, odds))
            )
            out.append(near - away)
        return torch.stack(out)


class Correction(Protocol):
    """Any object with these members is a correction.

    Attributes:
        samples: whether the weighted particles sample the tilted target.
        looks_untempered: whether it needs the look-ahead even where the value is tempered to zero, as at t = 0.
        differentiates: whether it takes gradients; if so, the run cannot use inference mode.
    """

    @property
    def samples(self) -> bool: ...

    looks_untempered: bool

    @property
    def differentiates(self) -> bool: ...

    def check(self, parts: Parts) -> None:
        """Raise a ValueError with the reason if the other parts do not fit."""
        ...

    def remember(self, parts: Parts, before: Evaluation | None, after: Evaluation, view: View) -> Evaluation:
        """The evaluation ``after`` a step (or at the start), with the correction's ``memory`` of the path."""
        ...

    def start(self, evaluation: Evaluation) -> Tensor:
        """Log-weights at t = 0, (b,)."""
        ...

    def increment(self, move: Move) -> Tensor:
        """The change of the log-weights in one step, (b,)."""
        ...

    def guides(self, step: Step) -> bool:
        """Whether a step with this kernel may be guided."""
        ...


# --- twisted ---------------------------------------------------------------------------------------------------------
Potential = Callable[[Evaluation | None, Evaluation], Evaluation]


def difference(before: Evaluation | None, after: Evaluation) -> Evaluation:
    """The twist is V itself: only its last value counts."""
    return after


def maximum(before: Evaluation | None, after: Evaluation) -> Evaluation:
    """Every step multiplies the weight by exp of the highest V so far."""
    if before is None:
        return replace(after, memory=after.value)
    assert before.memory is not None
    highest = torch.maximum(before.memory, after.value)
    return replace(after, memory=highest, value=before.value + highest)


def total(before: Evaluation | None, after: Evaluation) -> Evaluation:
    """Every step multiplies the weight by exp of the sum of all V so far."""
    if before is None:
        return replace(after, memory=after.value)
    assert before.memory is not None
    together = before.memory + after.value
    return replace(after, memory=together, value=before.value + together)


POTENTIALS: dict[str, Potential] = {"difference": difference, "max": maximum, "sum": total}
"""The potentials of FK steering (2501.06848, section 3.2), by name."""


@dataclass(frozen=True)
class Twisted:
    """log w += U_{i+1} - U_i + log base(x'|x) - log proposal(x'|x); the last U is strength * r(x_1) itself.

    U is a function of the path so far, by default the value V of its last point. Twisted diffusion sampling (Wu et al.
    2306.17775, equation 8); with the other potentials FK steering (2501.06848). Samples the tilt of the base chain's own law
    for any look-ahead and any map, however poor. The sum telescopes, so exp(log Z) is unbiased.

    Args:
        potential: a key of `POTENTIALS`.
    """

    potential: str = "difference"
    samples = True
    looks_untempered = differentiates = False

    def __post_init__(self) -> None:
        if self.potential not in POTENTIALS:
            raise ValueError(f"unknown potential {self.potential!r}; potentials: {', '.join(POTENTIALS)}")

    def check(self, parts: Parts) -> None:
        transition = parts.transition
        if parts.guidance is not None and not transition.stochastic:
            raise ValueError(
                "a twisted correction needs the density of a guided step: use transition renoise, diffuse or bridge, or no "
                "guidance, or correction none (ascent, not sampling)"
            )
        if isinstance(parts.guidance, Tilting):
            raise ValueError(
                "a twisted correction has no weight for tilted noise: use correction none, or guidance map or endpoint"
            )
        if self.potential != "difference" and isinstance(parts.tempering, Adaptive):
            raise ValueError("adaptive tempering chooses the value of the next step: it needs potential difference")

    def remember(self, parts: Parts, before: Evaluation | None, after: Evaluation, view: View) -> Evaluation:
        return POTENTIALS[self.potential](before, after)

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
class Marginal(Twisted):
    """As `Twisted`, but the weight of a particle takes all its possible parents into account, not only the actual one.

        log w = U + log sum_j (w_j exp(-U_j)) base(x'|x_j) - log sum_j odds_j proposal(x'|x_j)

    over the particles j before the selection (the marginal particle filter; Klaas, de Freitas & Doucet, UAI 2005). A
    particle that the selection removed still counts, as long as the children of the others reach the places where its own
    would have been. So a step that forgets the past does no harm. In many dimensions the children of different parents are
    far apart, and the weight is that of `Twisted`.

    This needs the kernels of all parents without further network calls: transition `Renoise` (gamma = 1) with look-ahead
    `Jump`, or `Bridge` with `Denoise`. Otherwise, and at steps without noise, it is `Twisted`. Costs k m distances a step.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.potential != "difference":
            raise ValueError(f"potential={self.potential!r}: a marginal weight forgets the path, use difference")

    def increment(self, move: Move) -> Tensor:
        if move.family is None:
            return super().increment(move)
        gain = move.family.log_ratio(move.step.std) - move.family.log_w
        return move.after.value + gain.flatten()


# --- Jarzynski -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Jarzynski:
    """Weights of the guided diffusion dx = (b + eps s + (eps + chi) grad V) dt + sqrt(2 eps) dW (FMTT, 2511.22688).

        simple    log w += (beta_{i+1} - beta_i) strength r(X_{t_i,1}(x_i))                      (proposition 1)
        general   log w += h { d/dt V + b . grad V + chi [laplacian V + grad V . (s + grad V)] }

    The simple weight equals the general one where chi = 0 and d/dt X_{t,1} + b . grad X_{t,1} = 0. That holds only for the
    look-ahead of a true flow map. Both have an error of order 1 / steps that more particles do not remove.

    Args:
        general: use the general weight, for any look-ahead and any extra ascent. Costs the gradient in time, and with chi a
            second derivative.
        probes: Rademacher probes of the laplacian (Hutchinson 1989); exact in one dimension.
    """

    general: bool = False
    probes: int = 1
    samples = True
    looks_untempered = True

    @property
    def differentiates(self) -> bool:
        return self.general

    def check(self, parts: Parts) -> None:
        guidance, transition = parts.guidance, parts.transition
        drift = (
            isinstance(transition, Diffuse)
            and type(guidance) is MapGradient
            and guidance.scale == 0.5
            and guidance.cap is None
            and not guidance.normalised
        )
        if not drift and not (guidance is None and (isinstance(transition, Jump) or transition == Diffuse(0.0))):
            raise ValueError(
                "a Jarzynski weight holds only for transition jump without guidance, or for transition diffuse with guidance "
                "MapGradient(scale=0.5, cap=None), which is FMTT's drift: use correction twisted for anything else"
            )
        if isinstance(parts.tempering, Adaptive):
            raise ValueError("a Jarzynski weight needs the tempering as a function of time: adaptive needs correction twisted")
        if self.general:
            return
        if not isinstance(parts.lookahead, lookahead.Jump):
            raise ValueError(
                "the simple Jarzynski weight holds only for a flow-map look-ahead: use lookahead jump, correction "
                "Jarzynski(general=True), or correction twisted"
            )
        if isinstance(guidance, MapGradient) and guidance.ascent is not None:
            raise ValueError(
                "the simple Jarzynski weight does not account for an extra ascent, which would bias the result: use "
                "correction Jarzynski(general=True), or no ascent"
            )

    def remember(self, parts: Parts, before: Evaluation | None, after: Evaluation, view: View) -> Evaluation:
        """Stores the rate of the general weight, d log w / dt at this state."""
        return replace(after, memory=self._rate(parts, view)) if self.general else after

    def _rate(self, parts: Parts, view: View) -> Tensor:
        flow_map, cond, guidance = view.problem.flow_map, view.problem.cond, parts.guidance
        chi = guidance.ascent(view.t) if isinstance(guidance, MapGradient) and guidance.ascent is not None else 0.0
        b = flow_map.velocity(view.x, view.t, cond)
        with torch.enable_grad(), alone() if chi else nullcontext():  # second derivatives are not spread over devices
            x = view.x.detach().requires_grad_()
            t = torch.full((len(x),), view.t, dtype=x.dtype, device=x.device, requires_grad=True)
            tempering: Callable[[Any], Any] = parts.tempering  # here of a tensor, for its derivative
            beta = torch.as_tensor(tempering(t))
            at: Any = t
            here = replace(view, t=at, beta=lambda ends, tilt: beta.to(tilt).expand(len(tilt)))
            value = here.value(here.endpoints(x)).value.sum()
            gradient, rate = torch.autograd.grad(value, (x, t), create_graph=bool(chi), allow_unused=True)
            assert gradient is not None
            laplacian = self._laplacian(gradient, x, view.noise) if chi else 0.0
        gradient = gradient.detach()
        out = _dot(b, gradient) + (0.0 if rate is None else rate.detach())
        if chi:
            score = flow_map.interpolant.score(view.x, b, view.t)
            out = out + chi * (laplacian + _dot(gradient, score + gradient))
        return out.to(wide(out.device))

    def _laplacian(self, gradient: Tensor, x: Tensor, noise: Noise) -> Tensor:
        out = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for _ in range(self.probes):
            probe = noise.normal(x.shape[1:], x).sign()
            out = out + _dot(torch.autograd.grad((gradient * probe).sum(), x, retain_graph=True)[0], probe)
        return out / self.probes

    def start(self, evaluation: Evaluation) -> Tensor:
        return torch.zeros_like(evaluation.value)

    def increment(self, move: Move) -> Tensor:
        if self.general:
            assert move.before.memory is not None
            return move.duration * move.before.memory
        return (move.after.beta - move.before.beta) * move.before.tilt

    def guides(self, step: Step) -> bool:
        return step.std > 0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


# --- none ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Uncorrected:
    """No weights: the particles are the result of an ascent or a search, not a sample of the tilted target."""

    samples = False
    looks_untempered = differentiates = False

    def check(self, parts: Parts) -> None:
        if isinstance(parts.tempering, Adaptive):
            raise ValueError("adaptive tempering follows the weights: it needs correction twisted")

    def remember(self, parts: Parts, before: Evaluation | None, after: Evaluation, view: View) -> Evaluation:
        return after

    def start(self, evaluation: Evaluation) -> Tensor:
        return torch.zeros_like(evaluation.value)

    def increment(self, move: Move) -> Tensor:
        return torch.zeros_like(move.before.value)

    def guides(self, step: Step) -> bool:
        return True


CORRECTIONS: dict[str, Correction] = {
    "twisted": Twisted(),
    "marginal": Marginal(),
    "jarzynski": Jarzynski(),
    "none": Uncorrected(),
}
"""Corrections by their names in configurations."""
