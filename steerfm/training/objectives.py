"""Objectives for training flow maps: small callables that return one loss per sample.

    loss = objective(flow_map, x1, cond, generator)          # (b, *shape) data -> (b,) losses

Each draws its own noise x_0 and times; time sampling is an argument. With I_s = alpha_s x_1 + sigma_s x_0 and sg(.) the
stop-gradient, teachers are the current weights (an EMA teacher brought nothing in our toy runs, and Boffi et al. use none).
The three self-distillation losses are the three characterisations of a flow map of Boffi et al. 2505.18825.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steerfm.flowmap import FlowMap
from steerfm.glass import inner_denoised, inner_time, inner_velocity
from steerfm.interpolant import Interpolant, expand_time
from steerfm.rows import Condition, expand_rows, is_null, join_conditions, take_rows

Times = Callable[[int, torch.Generator], Tensor]
TimePairs = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
Objective = Callable[[FlowMap, Tensor, Condition, torch.Generator], Tensor]
ALL = slice(None)


# --- time sampling ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LogitNormal:
    """Times for the diagonal: logit-normal(mean, std) mixed with a share of uniform times (Esser et al. 2403.03206)."""

    mean: float = 0.0
    std: float = 1.2
    uniform: float = 0.2

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        t = torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator))
        flat = torch.rand(n, generator=generator) < self.uniform
        return torch.where(flat, torch.rand(n, generator=generator), t)


@dataclass(frozen=True)
class Triangle:
    """Pairs s <= t uniform on the triangle; a share ends at t = 1 (the look-aheads) and a share is (0, 1).

    Args:
        terminal: share of pairs with t = 1, s as in the others.
        full: share of pairs (0, 1).
        gap: largest t - s of the remaining pairs; below 1 for a curriculum of short jumps first.
    """

    terminal: float = 0.2
    full: float = 0.1
    gap: float = 1.0

    def __post_init__(self) -> None:
        if not (self.terminal >= 0 and self.full >= 0 and self.terminal + self.full <= 1 + 1e-9):
            raise ValueError(f"terminal={self.terminal}, full={self.full}: shares from 0 on, at most 1 together")

    def __call__(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, t = torch.rand(2, n, generator=generator).sort(0).values
        s = torch.maximum(s, t - self.gap)
        which = torch.rand(n, generator=generator)
        t = torch.where(which < self.terminal + self.full, torch.ones_like(t), t)
        s = torch.where(which < self.full, torch.zeros_like(s), s)
        return s, t


# --- the diagonal ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FlowMatching:
    """|u(I_t, t, t) - (alpha'_t x_1 + sigma'_t x_0)|^2 (Lipman et al. 2210.02747, equation 23).

    With ``guidance`` w the target of labelled rows is w (alpha'_t x_1 + sigma'_t x_0) + (1 - w) sg u(I_t, t, t, null): the
    velocity becomes the classifier-free guided one, in one call and for jumps of any length (2505.13447, equation 19).

    Args:
        times: time sampling.
        guidance: w; 1 is plain flow matching.
        null: the condition of one row that stands for none; needed for guidance.
    """

    times: Times = field(default_factory=LogitNormal)
    guidance: float = 1.0
    null: Condition = None

    def __post_init__(self) -> None:
        if self.guidance != 1 and self.null is None:
            raise ValueError(f"guidance={self.guidance} needs a null condition: the velocity without a class")

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator, rows: slice = ALL) -> Tensor:
        """Losses of the given rows: draws are those of all."""
        x, t, target = (value[rows] for value in self.regression(flow_map, x1, cond, generator))
        return mean_square(flow_map.average_velocity(x, t, t, take_rows(cond, rows)) - target)

    def regression(
        self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What u is fitted to: states I_t (b, *shape), times (b,) and targets (b, *shape)."""
        t = self.times(len(x1), generator).to(x1)
        x0 = _noise(x1, generator)
        t_ = expand_time(t, x1)
        target = flow_map.interpolant.conditional_velocity(x0, x1, t_)
        x = flow_map.interpolant.interpolate(x0, x1, t_)
        if self.guidance != 1:
            null = expand_rows(self.null, len(x), x.device)
            with torch.no_grad():
                guided = torch.lerp(flow_map.average_velocity(x, t, t, null), target, self.guidance)
            target = torch.where(expand_time(is_null(cond, self.null), x).bool(), target, guided)
        return x, t, target


# --- off the diagonal ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lagrangian:
    """|d/dt X_{s,t}(I_s) - sg v(X_{s,t}(I_s), t)|^2 with the exact derivative by forward-mode AD (2505.18825, LSD).

    The gradient flows through the tangent, which is worth its cost: on toys it is the best objective at every jump count.
    """

    pairs: TimePairs = field(default_factory=Triangle)

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator) -> Tensor:
        s, t, x_s, _ = _start(self.pairs, flow_map, x1, generator)
        u, du = torch.func.jvp(lambda t: flow_map.average_velocity(x_s, s, t, cond), (t,), (torch.ones_like(t),))[:2]
        gap = expand_time(t - s, x1)
        with torch.no_grad():
            v = flow_map.average_velocity(x_s + gap * u, t, t, cond)
        return mean_square(u + gap * du - v)


@dataclass(frozen=True)
class Progressive:
    """|u(I_s, s, t) - sg[g u(I_s, s, m) + (1 - g) u(X_{s,m}, m, t)]|^2, m = s + g (t - s) (2505.18825, PSD).

    The semigroup property X_{m,t} o X_{s,m} = X_{s,t}, divided by (t - s)^2. No derivative of the network is needed.

    Args:
        midpoint: g = 1/2 (shortcut models, 2410.12557) instead of g ~ U(0, 1).
    """

    pairs: TimePairs = field(default_factory=Triangle)
    midpoint: bool = False

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator) -> Tensor:
        s, t, x_s, _ = _start(self.pairs, flow_map, x1, generator)
        g = torch.rand(len(x1), generator=generator).to(x1)
        g = torch.full_like(g, 0.5) if self.midpoint else g
        m = s + g * (t - s)
        with torch.no_grad():
            first = flow_map.average_velocity(x_s, s, m, cond)
            second = flow_map.average_velocity(x_s + expand_time(m - s, x1) * first, m, t, cond)
            target = torch.lerp(second, first, expand_time(g, x1))
        return mean_square(flow_map.average_velocity(x_s, s, t, cond) - target)


@dataclass(frozen=True)
class Eulerian:
    """|u - sg[v(I_s, s) + (t - s) D_s u]|^2, D_s = d/ds + v . grad, v the map's own velocity (2505.18825, ESD).

    Needs a derivative in x as well as in time; the least stable of the three.
    """

    pairs: TimePairs = field(default_factory=Triangle)

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator) -> Tensor:
        s, t, x_s, _ = _start(self.pairs, flow_map, x1, generator)
        with torch.no_grad():
            v = flow_map.average_velocity(x_s, s, s, cond)
        return _eulerian_residual(flow_map, x_s, s, t, cond, v)


@dataclass(frozen=True)
class MeanFlow:
    """The Eulerian loss with the conditional velocity of the pair in place of the map's own (2505.13447, equation 11)."""

    pairs: TimePairs = field(default_factory=Triangle)

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator) -> Tensor:
        s, t, x_s, x0 = _start(self.pairs, flow_map, x1, generator)
        v = flow_map.interpolant.conditional_velocity(x0, x1, expand_time(s, x1))
        return _eulerian_residual(flow_map, x_s, s, t, cond, v)


@dataclass
class Paths:
    """Trajectories of an ODE from noise.

    Attributes:
        states: (steps + 1, m, *shape).
        times: (steps + 1, m).
        velocities: (steps, m, *shape).
        cond: m rows.
        given: (1, m, *shape) states x_t of posteriors, for their inner paths; else None.
        given_times: (1, m) their times.
    """

    states: Tensor
    velocities: Tensor
    times: Tensor
    cond: Condition
    given: Tensor | None = None
    given_times: Tensor | None = None

    def join(self, other: Paths, last: int) -> Paths:
        """Those of both, but no more than the ``last``."""

        def both(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b], 1)[:, -last:]

        cond = None if self.cond is None else join_conditions(self.cond, other.cond)
        states, velocities = both(self.states, other.states), both(self.velocities, other.velocities)
        joined = Paths(states, velocities, both(self.times, other.times), take_rows(cond, slice(-last, None)))
        if self.given is not None and other.given is not None:
            joined.given = both(self.given, other.given)
        if self.given_times is not None and other.given_times is not None:
            joined.given_times = both(self.given_times, other.given_times)
        return joined


@dataclass
class Pool:
    """The trajectories that a `Trajectory` keeps, and how often it was called."""

    paths: Paths | None = None
    calls: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for a checkpoint."""
        return {"calls": self.calls, "paths": None if self.paths is None else dict(vars(self.paths))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
        self.paths = None if state["paths"] is None else Paths(**state["paths"])


@dataclass(frozen=True)
class Trajectory:
    """|u(x_s, s, t) - (x_t - x_s)/(t - s)|^2 on trajectories, from noise, of the ODE of a velocity; where s = t, the velocity.

    The definition of a flow map as a regression: targets have no noise, and with a frozen teacher they do not drift, so few
    steps go far once the velocity is good (ReFlow's pairs, 2209.03003, at all times). Midpoint rule; the interior times are
    drawn anew each time.

    Args:
        pairs: their shares of pairs with t = 1 and of (0, 1) are used, not their times.
        steps: of the ODE; two calls each, without a gradient.
        uses: pairs taken from each trajectory, in the mean.
        diagonal: share of the other pairs with s = t.
        teacher: whose velocity; default the map's own.
        keep: trajectories to draw pairs from, of this call and earlier ones; every ``uses``-th call follows one for each row
            then, so that a batch has as many conditions as rows. 0: those of this call only, ``uses`` rows for each. A
            checkpoint holds them.

    Raises:
        ValueError: uses below 1, keep below 0.
    """

    pairs: Triangle = field(default_factory=Triangle)
    steps: int = 8
    uses: int = 8
    diagonal: float = 0.3
    teacher: FlowMap | None = None
    keep: int = 0
    pool: Pool = field(default_factory=Pool, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.uses < 1 or self.keep < 0:
            raise ValueError(f"uses={self.uses}, keep={self.keep}: a trajectory is used once or more, and 0 or more are kept")

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator, rows: slice = ALL) -> Tensor:
        """Losses of the given rows, for which as many trajectories as they need are followed: draws are those of all."""
        b, n = len(x1), self.steps
        paths, of = self._paths(flow_map, x1, cond, generator, rows)
        u, v, which, diagonal = torch.rand(4, b, generator=generator)[:, rows]
        last = torch.where(which < self.pairs.terminal + self.pairs.full, n, 1 + (u * n).long().clamp_max(n - 1))
        first = torch.where(which < self.pairs.full, 0, (v * last).long().minimum(last - 1))
        on = (last < n) & (diagonal < self.diagonal)
        first = torch.where(on, (v * n).long().clamp_max(n - 1), first)
        last = torch.where(on, first, last)
        of, first, last = of.to(x1.device), first.to(x1.device), last.to(x1.device)
        s, t, x_s, x_t = paths.times[first, of], paths.times[last, of], paths.states[first, of], paths.states[last, of]
        gap = expand_time(t - s, x_s)
        velocity = paths.velocities[first, of]
        target = torch.where(gap > 0, (x_t - x_s) / gap.where(gap > 0, 1.0), velocity)
        return mean_square(self._velocity(flow_map, x_s, s, t, paths, of) - target)

    def _velocity(self, flow_map: FlowMap, x: Tensor, s: Tensor, t: Tensor, paths: Paths, of: Tensor) -> Tensor:
        return flow_map.average_velocity(x, s, t, take_rows(paths.cond, of))

    def _paths(
        self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator, rows: slice
    ) -> tuple[Paths, Tensor]:
        """Trajectories, and which of them each of the rows takes its pair from."""
        b, pool, teacher = len(x1), self.pool, self.teacher or flow_map
        if not self.keep:
            of = torch.arange(b)[rows] // self.uses
            first = torch.arange(int(of[0]), int(of[-1]) + 1, device=x1.device) * self.uses
            paths = self._integrate(teacher, _noise(x1, generator)[first], x1[first], take_rows(cond, first), generator)
            return paths, of - of[0]
        if pool.paths is None or pool.calls % self.uses == 0:
            new = self._integrate(teacher, _noise(x1, generator), x1, cond, generator)
            pool.paths = new if pool.paths is None else pool.paths.join(new, self.keep)
        pool.calls += 1
        return pool.paths, torch.randint(pool.paths.times.shape[1], (b,), generator=generator)[rows]

    def _integrate(self, teacher: FlowMap, x: Tensor, x1: Tensor, cond: Condition, generator: torch.Generator) -> Paths:
        """Follow a path from each row of noise ``x``; ``x1`` are data, as many."""
        times = self._times(generator).to(x)[:, None].expand(-1, len(x))
        states, velocities = [x], []
        with torch.no_grad():
            for s, t in pairwise(times):
                velocities.append(teacher.velocity(x, s, cond))
                gap = expand_time(t - s, x)
                x = x + gap * teacher.velocity(x + gap / 2 * velocities[-1], (s + t) / 2, cond)
                states.append(x)
        return Paths(torch.stack(states), torch.stack(velocities), times, cond)

    def _times(self, generator: torch.Generator) -> Tensor:
        """The interior ones are a grid with a random shift, so that no time is without states; (steps + 1,)."""
        n, shift = self.steps, torch.rand((), generator=generator)
        return torch.cat([torch.zeros(1), (torch.arange(n - 1) + shift) / max(n - 1, 1), torch.ones(1)])


# --- posteriors ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Posterior:
    """The inner flow of the posteriors p(x_1 | x_t = x), for a map with that capability (Diamond Maps, 2602.05993).

    The states x at t and z at s are noised versions of one x_1. With the field w of GLASS, which follows from a velocity
    (`steerfm.glass`), a share of the rows is on the diagonal and the others are the Lagrangian loss; no ODE is followed:

        |u(z, s, s | x, t) - w(z, s | x, t)|^2,        |d/de Z_{s,e}(z | x, t) - sg w(Z_{s,e}, e | x, t)|^2

    Args:
        pairs: their shares of pairs (s, e) with e = 1 and of (0, 1).
        diagonal: share of the rows on the diagonal.
        teacher: whose velocity; default the map's own.
        last: largest t, s and e: w is infinite at 1.
    """

    pairs: Triangle = field(default_factory=Triangle)
    diagonal: float = 0.75
    teacher: FlowMap | None = None
    last: float = 0.99

    def __call__(self, flow_map: FlowMap, x1: Tensor, cond: Condition, generator: torch.Generator) -> Tensor:
        path, teacher = flow_map.interpolant, self.teacher or flow_map
        t = self.last * torch.rand(len(x1), generator=generator).to(x1)
        s, e = (self.last * time.to(x1) for time in self.pairs(len(x1), generator))
        x, z = (path.interpolate(_noise(x1, generator), x1, expand_time(time, x1)) for time in (t, s))
        on = slice(0, round(self.diagonal * len(x1)))
        off = slice(on.stop, len(x1))
        with torch.no_grad():
            w = inner_velocity(teacher, z[on], s[on], x[on], t[on], take_rows(cond, on))
        u = flow_map.posterior_velocity(z[on], s[on], s[on], x[on], t[on], take_rows(cond, on))
        return torch.cat(
            [
                mean_square(u - w),
                self._lagrangian(flow_map, teacher, z[off], s[off], e[off], x[off], t[off], take_rows(cond, off)),
            ]
        )

    def _lagrangian(
        self, flow_map: FlowMap, teacher: FlowMap, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition
    ) -> Tensor:
        if not len(z):
            return z.new_zeros(0)
        u, du = torch.func.jvp(lambda e: flow_map.posterior_velocity(z, s, e, x, t, cond), (e,), (torch.ones_like(e),))[:2]
        gap = expand_time(e - s, z)
        with torch.no_grad():
            w = inner_velocity(teacher, z + gap * u, e, x, t, cond)
        return mean_square(u + gap * du - w)


@dataclass(frozen=True)
class PosteriorTrajectory(Trajectory):
    """As `Trajectory`, on the inner paths of GLASS, from noise to draws of p(x_1 | x_t): targets without noise for long jumps.

    Steps are even in the time of the joint state (`steerfm.glass.inner_time`), so that a few of them do near the data, too.

    Args:
        last: largest time of a state x_t; states are noised data.
    """

    last: float = 0.98

    def _velocity(self, flow_map: FlowMap, x: Tensor, s: Tensor, t: Tensor, paths: Paths, of: Tensor) -> Tensor:
        assert paths.given is not None and paths.given_times is not None
        given, times = paths.given[0, of], paths.given_times[0, of]
        return flow_map.posterior_velocity(x, s, t, given, times, take_rows(paths.cond, of))

    def _integrate(self, teacher: FlowMap, x: Tensor, x1: Tensor, cond: Condition, generator: torch.Generator) -> Paths:
        path, t = teacher.interpolant, self.last * torch.rand(len(x), generator=generator).to(x)
        given = path.interpolate(_noise(x1, generator), x1, expand_time(t, x1))
        shares = self._times(generator).tolist()
        middles = [inner_time(path, path, t, (a + b) / 2) for a, b in pairwise(shares)]
        times = torch.stack([inner_time(path, path, t, share) for share in shares])
        states, velocities = [x], []
        with torch.no_grad():
            for s, middle, e in zip(times, middles, times[1:]):
                x_1 = inner_denoised(teacher, x, s, given, t, cond)
                velocities.append(path.velocity_from_denoised(x, x_1, expand_time(s, x)))
                x_1 = inner_denoised(teacher, _towards(path, x, x_1, s, middle), middle, given, t, cond)
                x = _towards(path, x, x_1, s, e)
                states.append(x)
        return Paths(torch.stack(states), torch.stack(velocities), times, cond, given[None], t[None])


def _towards(path: Interpolant, x: Tensor, x_1: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Where x at s comes to at t on the path that ends in x_1."""
    s, t = expand_time(s, x), expand_time(t, x)
    return path.alpha(t) * x_1 + path.sigma(t) / path.sigma(s) * (x - path.alpha(s) * x_1)


DRAWS = (Posterior, PosteriorTrajectory)
"""Objectives of posteriors."""
OFF_DIAGONAL: dict[str, type] = {
    "trajectory": Trajectory,
    "posterior": Posterior,
    "posterior_trajectory": PosteriorTrajectory,
    "lagrangian": Lagrangian,
    "progressive": Progressive,
    "eulerian": Eulerian,
    "meanflow": MeanFlow,
}


# --- shared pieces ---------------------------------------------------------------------------------------------------
def _noise(x1: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x1.shape, generator=generator).to(x1)


def _start(
    pairs: TimePairs, flow_map: FlowMap, x1: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, t, I_s, x_0) of a batch."""
    s, t = (time.to(x1) for time in pairs(len(x1), generator))
    x0 = _noise(x1, generator)
    return s, t, flow_map.interpolant.interpolate(x0, x1, expand_time(s, x1)), x0


def _eulerian_residual(flow_map: FlowMap, x: Tensor, s: Tensor, t: Tensor, cond: Condition, v: Tensor) -> Tensor:
    """|u - sg[v + (t - s) D_s u]|^2; nothing is differentiated through the tangent, so it is taken without a graph."""
    u = flow_map.average_velocity(x, s, t, cond)
    with torch.no_grad():
        _, du = torch.func.jvp(lambda x, s: flow_map.average_velocity(x, s, t, cond), (x, s), (v, torch.ones_like(s)))[:2]
    return mean_square(u - (v + expand_time(t - s, x) * du))


def mean_square(residual: Tensor) -> Tensor:
    """Mean over entries of the squares, (b, *shape) -> (b,)."""
    return residual.square().flatten(1).mean(1)
