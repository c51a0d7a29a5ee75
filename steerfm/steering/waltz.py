"""Noise, draw, accept: a Markov chain over data that samples the tilt for any reward, by draws of the map's posteriors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from steerfm.capabilities import needs
from steerfm.flowmap import FlowMap
from steerfm.registry import TakesNames, brief, objects
from steerfm.rows import take_rows
from steerfm.sampling import Noise
from steerfm.steering.chains import Chains
from steerfm.steering.lookahead import LOOKAHEADS, Choosy, Lookahead, Posterior
from steerfm.steering.noise_search import Trials
from steerfm.steering.value import Problem, Shared


@dataclass(frozen=True, repr=False)
class Waltz(Chains, metaclass=TakesNames):
    """Noise the sample, draw anew what it may have been, accept by the reward (diffusion waltz, 2602.09424).

        x_t = alpha_t x + sigma_t e,   x' ~ p(x_1 | x_t)    instead of x with probability min(1, exp(V(x') - V(x)))

    over V = strength r. The pair of moves is reversible for p_1 whatever t is, so that the rewards alone decide, and black
    boxes will do. Small t draws far away and is seldom accepted, large t stays near; ``times`` take turns. Without a small one
    a chain stays in the class in which it begins. Temperatures as in `ParallelTempering`: swaps bring a chain to other modes.

    The chain is as right as its draws: a map that draws posteriors costs one call, GLASS two a step. A jump is biased.

    Costs a sweep: ``temperatures`` x (one draw, one decode, one reward call) per output; and one sweep at the start.
    Within a budget: 4 sweeps of warm-up at 64 evaluations, 16 at 256, the rest particles (docs/posterior.md).
    Samples: in the limit of many sweeps: the tilt of the map's law, for a reward that does not compare particles. Particles are
    equally weighted and follow each other, so that neighbours are alike or the same. There is no log_z.

    Attributes:
        particles: states of the coldest chain that come out, one after the other.
        iterations: sweeps from each particle to the next.
        hops: equal jumps from noise to the first state.
        temperatures: chains per output; with one alone, at beta = 1, nothing swaps.
        warmup: sweeps before the first particle's own.
        power: of the ladder of temperatures, positive; above 1 more of the chains are hot.
        times: t of each sweep, in turns; all in (0, 1).
        lookahead: draws of the posterior, one a row.
    """

    paper: ClassVar[str] = "2602.09424"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 16}

    particles: int = 16
    iterations: int = 1
    temperatures: int = 1
    warmup: int = 47
    power: float = 2.0
    times: Sequence[float] = (0.1, 0.5, 0.8)
    lookahead: Lookahead = field(default_factory=Posterior)

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with objects in place of names."""
        return objects(cls, arguments, {"lookahead": LOOKAHEADS})

    def __repr__(self) -> str:
        """The particles, the sweeps of warm-up, and all settings that differ from the defaults."""
        return brief(self, ("particles", "warmup"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.times, Sequence):
            raise ValueError(f"times={self.times}: a list of times, such as [0.1, 0.5, 0.8]")
        if not self.times or not all(0 < t < 1 for t in self.times):
            raise ValueError(f"times={list(self.times)}: one or more, all above 0 and below 1")
        if getattr(self.lookahead, "k", 1) != 1 or getattr(self.lookahead, "early", 0):  # the first of several would be taken
            raise ValueError(f"lookahead={self.lookahead!r}: a move is one draw; take lookahead=posterior with k=1 and early=0")

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `steerfm.capabilities.Choosy`: both the first state and the draws."""
        why = super().lacks(flow_map, times)
        blind = isinstance(self.lookahead, Choosy) and self.lookahead.blind(flow_map, [*self.times, 1.0])
        return why or (needs("velocity", "take parallel_tempering") if blind else "")

    def _trial(self, problem: Problem, noise: Noise, state: Trials, sweep: int) -> Trials:
        t, flow_map, shared = self.times[sweep % len(self.times)], problem.flow_map, Shared(noise)
        x_t = flow_map.interpolant.interpolate(noise.normal(flow_map.shape, state.x), state.sample, t)

        def make(rows: slice) -> Tensor:
            cond = take_rows(problem.cond, rows)
            return self.lookahead.endpoints(flow_map, x_t[rows], t, cond, shared.part(rows)).z[:, 0]

        sample, scores = problem.generate(make)
        return Trials(sample, sample, problem.tilt(scores.total), scores.total, scores.components)
