"""Markov chains in the initial noise: samples of the tilt of a map's own law by trial alone, for any reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from steerfm.checks import at_least_one
from steerfm.interpolant import expand_time
from steerfm.sampling import Noise
from steerfm.steering.noise_search import Found, NoiseSearch, evaluate, search_trace
from steerfm.steering.outcome import Outcome, Tick
from steerfm.steering.value import Problem


@dataclass(frozen=True)
class ParallelTempering(NoiseSearch):
    """Parallel tempering of the initial noise (PATHS 2605.30991): chains at several temperatures, which swap their states.

        x' = sqrt(1 - radius_i^2) x + radius_i z    instead of x with probability min(1, exp(beta_i (V(x') - V(x))))
        neighbours i, i + 1 swap with probability   min(1, exp((beta_i - beta_{i+1}) (V(x_{i+1}) - V(x_i))))

    over V = strength r(X_{0,1}(x)). The move preserves N(0, I) (Crank-Nicolson; Cotter et al. 1202.0709, section 5), so that
    the rewards alone decide, and black boxes will do. At beta = 1 the coldest chain samples the tilt of what the map draws
    from noise; the hottest, beta = 0, draws noise anew at every sweep, and what it meets can come down. Even and odd pairs
    take turns (Syed et al. 1905.02939). PATHS starts particles that walk; here the map is the walk. Ours are the ladder
    beta_i = (1 - i / (temperatures - 1))^power, radii radius^beta_i, and that nothing but the coldest chain is returned.

    Costs a sweep: ``temperatures`` x (``hops`` forwards, one decode, one reward call) an output; and one sweep at the start.
    Within a budget: 4 sweeps of warm-up at 64 evaluations, 16 at 256, the rest particles (docs/methods.md).
    Samples: in the limit of many sweeps: the tilt of the map's own law, in as many jumps as ``hops``, for a reward that does
    not compare particles; particles are equally weighted and follow each other, so that neighbours are alike or the same. Too
    few sweeps stay near the noise that they began with. There is no log_z.

    Attributes:
        particles: states of the coldest chain that come out, one after the other.
        iterations: sweeps from each particle to the next.
        temperatures: chains of an output; with one alone, at beta = 1, nothing swaps.
        warmup: sweeps before the first particle's own.
        radius: of the coldest chain's moves, in (0, 1]; 1 forgets the state.
        power: of the ladder, positive; above 1 more of the chains are hot.
    """

    samples: ClassVar[str] = "in the limit of many sweeps"
    paper: ClassVar[str] = "2605.30991"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 16}

    particles: int = 16
    iterations: int = 1
    temperatures: int = 4
    warmup: int = 15
    radius: float = 0.5
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(temperatures=self.temperatures)
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: at least 0 sweeps")
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius={self.radius}: must be in (0, 1]")
        if not self.power > 0:
            raise ValueError(f"power={self.power}: must be positive")

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; steps are sweeps of warm-up."""
        return replace(self, warmup=steps, particles=number)

    def ladder(self) -> list[float]:
        """The inverse temperatures, from 1 down to 0; 1 alone for one chain."""
        last = max(1, self.temperatures - 1)
        return [(1 - i / last) ** self.power for i in range(self.temperatures)]

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`."""
        k, chains, sweeps = self.particles, self.temperatures, self.warmup + self.particles * self.iterations
        output = torch.arange(n, device=problem.strength.device)
        problem, noise = problem.resized(noise, chains)
        drawn: list[Found] = []
        values, looks = [], []
        with torch.inference_mode():
            state = evaluate(problem, noise.start(problem.flow_map), self.hops)
            for i in range(sweeps):
                u = noise.uniform(2 * chains, output.device).to(state.objective).log().unflatten(1, (2, chains))
                state = self._swap(self._move(problem, noise, state, u[:, 0]), u[:, 1], i % 2)
                cold = state.select(output * chains)
                if i >= self.warmup and (i + 1 - self.warmup) % self.iterations == 0:
                    drawn.append(cold)
                ahead = [cold] * (k - len(drawn))  # particles that are still to come are where the chain is
                values.append(torch.stack([found.objective for found in [*drawn, *ahead]], 1))
                if lookaheads:
                    looks.append([*drawn, cold][0].sample)
                tick(i + 1, sweeps)
        return Found.interleave(drawn).outcome(n, search_trace(values, looks))

    def _move(self, problem: Problem, noise: Noise, state: Found, log_u: Tensor) -> Found:
        """Every chain's state after its own move; log_u (n, chains)."""
        n, ladder = len(log_u), self.ladder()
        radius = log_u.new_tensor([self.radius**beta for beta in ladder]).repeat(n)
        z = noise.normal(problem.flow_map.shape, state.x)
        near = expand_time((1 - radius**2).sqrt(), z) * state.x + expand_time(radius, z) * z
        trial = evaluate(problem, near, self.hops)
        gain = log_u.new_tensor(ladder).repeat(n) * (trial.objective - state.objective)
        return state.replaced(trial, log_u.flatten() < gain)

    def _swap(self, state: Found, log_u: Tensor, first: int) -> Found:
        """The states after swaps of the pairs (first, first + 1), (first + 2, first + 3), ...; log_u (n, chains)."""
        n, chains = log_u.shape
        beta, value = log_u.new_tensor(self.ladder()), state.objective.view(n, chains)
        at = torch.arange(chains, device=log_u.device)[first:-1:2]
        swaps = log_u[:, at] < (beta[at] - beta[at + 1]) * (value[:, at + 1] - value[:, at])
        order = torch.arange(n * chains, device=log_u.device).view(n, chains)
        order[:, at], order[:, at + 1] = order[:, at] + swaps.long(), order[:, at + 1] - swaps.long()
        return state.select(order.flatten())
