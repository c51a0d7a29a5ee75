"""Where the particles are: at the beginning (`Begin`), and after each step (`State`)."""

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
    """Where the particles begin, and the times that they visit; by default noise at t = 0, and the method's own grid.

    Attributes:
        x: (n, *shape), or (n, k, *shape) for each particle; None for noise.
        t: time of x.
        noised: x is data, and particles begin at alpha_t x + sigma_t noise.
        times: ascending, from t to 1.
    """

    x: Tensor | None = None
    t: float = 0.0
    noised: bool = False
    times: tuple[float, ...] | None = None

    def __getitem__(self, rows: slice) -> Begin:
        """That of some outputs."""
        return self if self.x is None else replace(self, x=self.x[rows])

    def states(self, problem: Problem, noise: Noise) -> Tensor:
        """(n k, *shape) the particles at t."""
        flow_map, n, k = problem.flow_map, len(noise.seeds), noise.k
        if self.x is None:
            return noise.start(flow_map)
        x = self.x.to(flow_map.device, flow_map.state_dtype)
        x = x.unsqueeze(1) if x.ndim == len(flow_map.shape) + 1 else x
        if x.shape[1] not in (1, k):
            raise ValueError(f"{x.shape[1]} particles to begin with, where the method begins with {k}: give (n, *shape) or {k}")
        x = x.expand(n, k, *flow_map.shape).flatten(0, 1)
        if not self.noised:
            return x.clone()
        return flow_map.interpolant.interpolate(noise.start(flow_map), x, self.t)

    def grid(self, times: list[float]) -> list[float]:
        """The times to visit, where a method by itself visits ``times``."""
        if self.times is not None:
            return list(self.times)
        return times if self.t == 0 else [self.t + (1 - self.t) * t for t in times]


@dataclass
class Parents:
    """The particles before a selection, and who of them went on; without ``selected`` all did."""

    x: Tensor
    now: Evaluation
    problem: Problem
    log_w: Tensor
    selected: Selected | None = None


@dataclass
class State:
    """All particles of all outputs of a batch, after a step and the selection that follows it.

    Attributes:
        problem: what is steered, a row for each particle.
        noise: the streams of the path.
        looks: those of look-aheads that draw.
        times: that are visited; ``done`` steps are taken.
        x: (n k, *shape) the particles, in model space.
        now: what is known about them.
        log_w: (n, k) log-weights.
        log_z: (n,) what resampling has moved out of them.
        first: (n, k) strength * reward of the look-aheads at the start; zeros where nobody looked.
        parents: the particles before the last selection.
        selected: who went on.
        info: what the last step did, a row of the `Trace`.
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
        """(n, k, c, h, w) the particles as they are, as pictures (vectors stay as they are)."""
        return self._pictures(self.x)

    def lookahead_images(self) -> Tensor:
        """(n, k, c, h, w) pictures of where the particles are going; one network call each where the method did not look."""
        z = self.now.endpoint
        return self._pictures(self.problem.flow_map.lookahead(self.x, self.t, self.problem.cond) if z is None else z)

    def _pictures(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.flow_map.decode(z).unflatten(0, self.log_w.shape)


Callback = Callable[[State], Any]
"""Sees the state after each step; what is true ends the run: a jump takes the particles to t = 1."""
