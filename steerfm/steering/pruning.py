"""Methods that start many seeds and finish few: only the best by look-ahead continue, without copies or weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from steerfm.checks import whole_numbers
from steerfm.sampling import Noise
from steerfm.steering.correction import Parts, Uncorrected
from steerfm.steering.lookahead import Jump, Lookahead
from steerfm.steering.outcome import Outcome
from steerfm.steering.sampler import Sampler
from steerfm.steering.selection import Prune
from steerfm.steering.state import Begin, State
from steerfm.steering.tempering import Tempering, untempered
from steerfm.steering.value import Problem
from steerfm.transitions import Jump as JumpTransition
from steerfm.transitions import Transition

OF_PARTICLES = ("value", "guidance_ratio", "gradient_norm")
"""Records of a step with a value for each particle."""


@dataclass(frozen=True)
class SeedPruning(Sampler):
    """Progressive seed pruning (PSP, Guimaraes & Perona 2607.21591): many seeds start; fixed steps keep the best.

    ``first`` seeds start and ``particles`` of them finish; each pruning reduces their number by the same factor. The paper
    starts 8 seeds, keeps 4 after a quarter of the steps and 2 after half, by the reward of the denoiser:
    ``SeedPruning(2, 64, first=8, at=(0.25, 0.5), lookahead="denoise", transition={"name": "bridge", "eta": 0.0})``. A jump
    looks further ahead, so here the first pruning comes before the first step.

    Parts: look-ahead jump, only at the prunings, no tempering, transition jump (a seed has one path, so a look stays valid),
    correction none, the best seeds of each output at every pruning.
    Samples: no. It is a search.
    Within a budget: 4 steps at 64 evaluations, 8 at 256, the rest particles, with the same number of seeds per
    particle (docs/methods.md).

    Attributes:
        particles: seeds that finish.
        steps: transitions from t = 0 to t = 1.
        first: seeds that start.
        at: shares of the steps, in [0, 1), after which seeds are pruned.
    """

    paper: ClassVar[str] = "2607.21591"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 8}

    particles: int = 2
    steps: int = 4
    first: int = 32
    at: Sequence[float] = (0.0, 0.5)
    lookahead: Lookahead | None = field(default_factory=Jump)
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=JumpTransition)

    def __post_init__(self) -> None:
        whole_numbers(first=self.first, particles=self.particles)
        if self.first < self.particles:
            raise ValueError(f"first={self.first}: must be at least particles={self.particles}")
        if not self.at or not all(0 <= at < 1 for at in self.at) or list(self.at) != sorted(self.at):
            raise ValueError(f"at={list(self.at)}: ascending shares of the steps, in [0, 1)")
        super().__post_init__()

    @cached_property
    def parts(self) -> Parts:
        rounds, ratio = len(self.at), self.particles / self.first
        keep = [max(self.particles, round(self.first * ratio ** ((i + 1) / rounds))) for i in range(rounds)]
        at = [min(round(share * self.steps), self.steps - 1) for share in self.at]
        return self.mix(Uncorrected(), Prune(at, keep))

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of particles that finish; the ratio of ``first`` to it stays."""
        return replace(self, steps=steps, particles=number, first=number * self.first // self.particles)

    def least(self, steps: int) -> int:
        """One is enough, since more seeds start."""
        return 1

    def start(self, problem: Problem, noise: Noise, begin: Begin | None = None) -> State:
        return super().start(*problem.resize(noise, self.first), begin)

    def step(self, state: State) -> State:
        """As in `Sampler`; the records are those of the survivors."""
        state = super().step(state)
        on = state.selected.ancestors
        state.info |= {name: state.info[name].gather(1, on) for name in OF_PARTICLES}
        return state

    def _outcome(self, state: State, records: list[dict[str, Tensor]]) -> Outcome:
        """As in `Sampler`; the trace is that of the paths that finish."""
        n, k = state.log_w.shape
        end = at = torch.arange(k, device=state.log_w.device).expand(n, k)
        for i, record in reversed(list(enumerate(records))):
            record |= {name: record[name].gather(1, at) for name in OF_PARTICLES}
            at = record["ancestors"].gather(1, at)
            record["ancestors"] = end if i else at
        return super()._outcome(state, records)


@dataclass(frozen=True)
class Drafts(SeedPruning):
    """Drafts, then full sampling (Flash-BoN, Rawal et al. 2607.04461): one jump per draft; the best seeds get all steps.

    Flash-BoN drafts with cached and skipped layers, selects by a tournament of a vision-language model and resumes the best
    from an intermediate state. Here a draft is one jump, the reward selects, and the best start again from the same noise.

    Parts: look-ahead jump, at t = 0 only, no tempering, transition jump, correction none, the best drafts survive. To draft
        with
    a cheaper map, give a look-ahead of your own that calls it in ``endpoints`` (CONTRIBUTING.md).
    Costs: first + particles * steps network evaluations per output.
    Samples: no. It is a search.
    Within a budget: 4 steps, a quarter of the evaluations for them, the rest drafts (docs/methods.md).
    """

    paper: ClassVar[str] = "2607.04461"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 4}

    particles: int = 4
    steps: int = 4
    first: int = 48
    at: Sequence[float] = (0.0,)
