"""Markov chains in the initial noise: samples of the tilt of the map's own law, for any reward, without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerfm.interpolant import expand_time
from steerfm.sampling import Noise
from steerfm.steering.chains import Chains
from steerfm.steering.noise_search import Trials, evaluate
from steerfm.steering.value import Problem


@dataclass(frozen=True)
class ParallelTempering(Chains):
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
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius={self.radius}: must be in (0, 1]")

    def _trial(self, problem: Problem, noise: Noise, state: Trials, sweep: int) -> Trials:
        ladder = self.ladder()
        radius = state.objective.new_tensor([self.radius**beta for beta in ladder]).repeat(len(state.x) // len(ladder))
        z = noise.normal(problem.flow_map.shape, state.x)
        near = expand_time((1 - radius**2).sqrt(), z) * state.x + expand_time(radius, z) * z
        return evaluate(problem, near, self.hops)
