"""Markov chains whose moves preserve the map's own law, so that the rewards alone decide: for any reward, by trial alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from steerfm.checks import at_least_one
from steerfm.sampling import Noise
from steerfm.steering.noise_search import NoiseSearch, Trials, evaluate, search_trace
from steerfm.steering.outcome import Outcome, Tick
from steerfm.steering.value import Problem


@dataclass(frozen=True)
class Chains(NoiseSearch):
    """The common loop: some chains per output, at several temperatures, which move and then swap their states.

        a trial x' of chain i replaces x  with probability min(1, exp(beta_i (V(x') - V(x))))
        neighbours i, i + 1 swap          with probability min(1, exp((beta_i - beta_{i+1}) (V(x_{i+1}) - V(x_i))))

    over V = strength r, where the move by itself, x to x', is reversible for the law that the map draws from. At beta = 1 the
    coldest chain samples the tilt of that law; the hottest, beta = 0, draws from the law itself. Even and odd pairs take turns
    (Syed et al. 1905.02939). A method writes `_trial`, the move.

    Attributes:
        particles: states of the coldest chain that come out, one after the other.
        iterations: sweeps from each particle to the next.
        temperatures: chains per output; with one alone, at beta = 1, nothing swaps.
        warmup: sweeps before the first particle's own.
        power: of the ladder beta_i = (1 - i / (temperatures - 1))^power, positive; above 1 more of the chains are hot.
    """

    samples: ClassVar[str] = "in the limit of many sweeps"

    particles: int = 16
    iterations: int = 1
    temperatures: int = 4
    warmup: int = 15
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(temperatures=self.temperatures)
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: at least 0 sweeps")
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
        values, looks, accepted = [], [], []
        with torch.inference_mode():
            state = evaluate(problem, noise.start(problem.flow_map), self.hops)
            for i in range(sweeps):
                u = noise.uniform(2 * chains, output.device).to(state.objective).log().unflatten(1, (2, chains))
                trial = self._trial(problem, noise, state, i)
                gain = u.new_tensor(self.ladder()).repeat(n) * (trial.objective - state.objective)
                moves = u[:, 0].flatten() < gain
                state = self._swap(state.replace(trial, moves), u[:, 1], i % 2)
                cold = state.select(output * chains)
                accepted.append(moves[output * chains])
                if i >= self.warmup and (i + 1 - self.warmup) % self.iterations == 0:
                    states.append(cold)
                ahead = [cold] * (k - len(states))  # later particles: where the chain is now
                values.append(torch.stack([trials.objective for trials in [*states, *ahead]], 1))
                if lookaheads:
                    looks.append([*states, cold][0].sample)
                tick(i + 1, sweeps)
        trace = replace(search_trace(values, looks), accepted=torch.stack(accepted))
        return Trials.interleave(states).outcome(n, trace)

    def _trial(self, problem: Problem, noise: Noise, state: Trials, sweep: int) -> Trials:
        """Where the chains, a row each, may move in a sweep."""
        raise NotImplementedError

    def _swap(self, state: Trials, log_u: Tensor, first: int) -> Trials:
        """The states after swaps of the pairs (first, first + 1), (first + 2, first + 3), ...; log_u (n, chains)."""
        n, chains = log_u.shape
        beta, value = log_u.new_tensor(self.ladder()), state.objective.view(n, chains)
        at = torch.arange(chains, device=log_u.device)[first:-1:2]
        swaps = log_u[:, at] < (beta[at] - beta[at + 1]) * (value[:, at + 1] - value[:, at])
        order = torch.arange(n * chains, device=log_u.device).view(n, chains)
        order[:, at], order[:, at + 1] = order[:, at] + swaps.long(), order[:, at + 1] - swaps.long()
        return state.select(order.flatten())
