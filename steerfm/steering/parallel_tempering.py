"""Markov chains in the initial noise: samples of the tilt of the map's own law, for any reward, without gradients."""

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
from steerfm.steering.noise_search import NoiseSearch, Trials, evaluate, search_trace
from steerfm.steering.outcome import Outcome, Tick
from steerfm.steering.value import Problem


@dataclass(frozen=True)
class ParallelTempering(NoiseSearch):
    """Parallel tempering of the initial noise (PATHS 2605.30991): chains at several temperatures, which swap their states.

        x' = sqrt(1 - radius_i^2) x + radius_i z    instead of x with probability min(1, exp(beta_i (V(x') - V(x))))
        neighbours i, i + 1 swap with probability   min(1, exp((beta_i - beta_{i+1}) (V(x_{i+1}) - V(x_i))))

    over V = strength r(X_{0,1}(x)). The move preserves N(0, I) (Crank-Nicolson; Cotter et al. 1202.0709, section 5), so
    only the rewards decide, and black boxes work. The coldest chain, beta = 1, samples the tilt of the map's own law. The
    hottest chain, beta = 0, draws fresh noise at every sweep; its good states can move down to colder chains. Even and odd
    pairs take turns (Syed et al. 1905.02939). In PATHS the chains choose where particles start to walk; here the map replaces
    the walk. Our choices: the ladder beta_i = (1 - i / (temperatures - 1))^power, radii radius^beta_i, only the coldest chain.

    Costs a sweep: ``temperatures`` x (``hops`` forwards, one decode, one reward call) per output; and one sweep at the start.
    Within a budget: 4 sweeps of warm-up at 64 evaluations, 16 at 256, the rest particles (docs/methods.md).
    Samples: in the limit of many sweeps: the tilt of the map's own law, in ``hops`` jumps, for a reward that does
    not compare particles. The particles are equally weighted successive states of a chain, so neighbours are similar or
    equal. With too few sweeps they stay near the initial noise. There is no log_z.

    Attributes:
        particles: successive states of the coldest chain to return.
        iterations: sweeps between one particle and the next.
        temperatures: chains per output; a single chain has beta = 1 and swaps with none.
        warmup: sweeps before those of the first particle.
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
        """The inverse temperatures, from 1 down to 0; [1] for a single chain."""
        last = max(1, self.temperatures - 1)
        return [(1 - i / last) ** self.power for i in range(self.temperatures)]

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`."""
        k, chains, sweeps = self.particles, self.temperatures, self.warmup + self.particles * self.iterations
        output = torch.arange(n, device=problem.strength.device)
        problem, noise = problem.resize(noise, chains)
        states: list[Trials] = []
        values, looks = [], []
        with torch.inference_mode():
            state = evaluate(problem, noise.start(problem.flow_map), self.hops)
            for i in range(sweeps):
                u = noise.uniform(2 * chains, output.device).to(state.objective).log().unflatten(1, (2, chains))
                state = self._swap(self._move(problem, noise, state, u[:, 0]), u[:, 1], i % 2)
                cold = state.select(output * chains)
                if i >= self.warmup and (i + 1 - self.warmup) % self.iterations == 0:
                    states.append(cold)
                ahead = [cold] * (k - len(states))  # later particles: where the chain is now
                values.append(torch.stack([trials.objective for trials in [*states, *ahead]], 1))
                if lookaheads:
                    looks.append([*states, cold][0].sample)
                tick(i + 1, sweeps)
        return Trials.interleave(states).outcome(n, search_trace(values, looks))

    def _move(self, problem: Problem, noise: Noise, state: Trials, log_u: Tensor) -> Trials:
        """The states of all chains after one move each.

        Args:
            log_u: (n, chains) log of uniform numbers.
        """
        n, ladder = len(log_u), self.ladder()
        radius = log_u.new_tensor([self.radius**beta for beta in ladder]).repeat(n)
        z = noise.normal(problem.flow_map.shape, state.x)
        near = expand_time((1 - radius**2).sqrt(), z) * state.x + expand_time(radius, z) * z
        trial = evaluate(problem, near, self.hops)
        gain = log_u.new_tensor(ladder).repeat(n) * (trial.objective - state.objective)
        return state.replace(trial, log_u.flatten() < gain)

    def _swap(self, state: Trials, log_u: Tensor, first: int) -> Trials:
        """The states after swaps of the pairs (first, first + 1), (first + 2, first + 3), ...

        Args:
            log_u: (n, chains) log of uniform numbers.
        """
        n, chains = log_u.shape
        beta, value = log_u.new_tensor(self.ladder()), state.objective.view(n, chains)
        at = torch.arange(chains, device=log_u.device)[first:-1:2]
        swaps = log_u[:, at] < (beta[at] - beta[at + 1]) * (value[:, at + 1] - value[:, at])
        order = torch.arange(n * chains, device=log_u.device).view(n, chains)
        order[:, at], order[:, at + 1] = order[:, at] + swaps.long(), order[:, at + 1] - swaps.long()
        return state.select(order.flatten())
