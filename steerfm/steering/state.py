"""The particles at the beginning (`Begin`) and after each step (`State`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steerfm.sampling import Noise
from steerfm.steering.selection import Selected
from steerfm.steering.value import Evaluation, Problem
from steerfm.steering.weights import effective_sample_size, normalise


@dataclass(frozen=True, eq=False)
class Begin:
    """The initial particles and the times to visit; by default noise at t = 0 and the method's own grid.

    Attributes:
        x: (n, *shape), or (n, k, *shape) for each particle; None for noise.
        t: time of x.
        noised: whether x is data, to be noised to alpha_t x + sigma_t noise.
        times: ascending, from t to 1.
    """

    x: Tensor | None = None
    t: float = 0.0
    noised: bool = False
    times: tuple[float, ...] | None = None

    def __getitem__(self, rows: slice) -> Begin:
        """The beginning of some of the outputs."""
        return self if self.x is None else replace(self, x=self.x[rows])

    def states(self, problem: Problem, noise: Noise) -> Tensor:
        """The particles at t, (n k, *shape).

        Raises:
            ValueError: ``x`` has another number of particles than the method.
        """
        flow_map, n, k = problem.flow_map, len(noise.seeds), noise.k
        if self.x is None:
            return noise.start(flow_map)
        x = self.x.to(flow_map.device, flow_map.state_dtype)
        x = x.unsqueeze(1) if x.ndim == len(flow_map.shape) + 1 else x
        if x.shape[1] not in (1, k):
            raise ValueError(
                f"{x.shape[1]} particles per output in x0, but the method has {k}: give {k}, or one for all as (n, *shape)"
            )
        x = x.expand(n, k, *flow_map.shape).flatten(0, 1)
        if not self.noised:
            return x.clone()
        return flow_map.interpolant.interpolate(noise.start(flow_map), x, self.t)

    def grid(self, times: list[float]) -> list[float]:
        """The times to visit.

        Args:
            times: the method's own times, from 0 to 1.
        """
        if self.times is not None:
            return list(self.times)
        return times if self.t == 0 else [self.t + (1 - self.t) * t for t in times]


@dataclass
class Parents:
    """The particles before a selection, and the selection; without ``selected`` all of them continued."""

    x: Tensor
    now: Evaluation
    problem: Problem
    log_w: Tensor
    selected: Selected | None = None


@dataclass
class State:
    """All particles of all outputs of a batch, after a step and the selection that follows it.

    Attributes:
        problem: the problem, with one row for each particle.
        noise: random streams of the path.
        looks: random streams of look-aheads that draw.
        times: all times to visit.
        done: number of steps so far.
        x: (n k, *shape) the particles, in model space.
        now: their evaluation.
        log_w: (n, k) log-weights.
        log_z: (n,) log of the weight that resampling has removed from them.
        first: (n, k) strength * reward of the look-aheads at the start; zeros if there were none.
        parents: the particles before the last selection.
        selected: the last selection.
        info: records of the last step, a row of the `Trace`.
    """

    problem: Problem
    noise: Noise
    looks: Noise
    times: list[float]
    done: int
    x: Tensor
    now: Evaluation
    log_w: Tensor
    log_z: Tensor
    first: Tensor
    parents: Parents
    selected: Selected
    info: dict[str, Tensor] = field(default_factory=dict)

    @property
    def t(self) -> float:
        """The time of the particles."""
        return self.times[self.done]

    @property
    def finished(self) -> bool:
        return self.done == len(self.times) - 1

    @property
    def ess(self) -> Tensor:
        """(n,) effective sample size as a share of the particles, before the selection."""
        return self.info["ess"] if self.info else effective_sample_size(self.log_w)

    @property
    def log_weights(self) -> Tensor:
        """(n, k) with logsumexp = 0 over the particles of each output."""
        return normalise(self.log_w)

    def images(self) -> Tensor:
        """(n, k, c, h, w) the particles at their present time, decoded (vectors stay as they are)."""
        return self._pictures(self.x)

    def lookahead_images(self) -> Tensor:
        """(n, k, c, h, w) pictures of the look-aheads; one network call per particle if the method did not look ahead."""
        z = self.now.endpoint
        return self._pictures(self.problem.flow_map.lookahead(self.x, self.t, self.problem.cond) if z is None else z)

    def _pictures(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.flow_map.decode(z).unflatten(0, self.log_w.shape)


Callback = Callable[[State], Any]
"""Called with the state after each step; a true return value ends the run: a jump takes the particles to t = 1."""
