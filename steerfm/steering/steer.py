"""Run a method on a problem: `steer`; `steer_batches`, a batch of outputs at a time; and `steps`, one step at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm import registry, rewards, zoo
from steerfm.capabilities import can, check_method
from steerfm.checks import whole_numbers
from steerfm.cost import Cost, Ledger
from steerfm.flowmap import FlowMap, by_label
from steerfm.processes import first, of_first
from steerfm.randomness import untouched
from steerfm.rewards import Reward
from steerfm.rows import Condition, Rows, cuts, labels_of
from steerfm.sampling import Noise, add_negative, as_condition, seed_list
from steerfm.spread import place, shared_out, spread
from steerfm.steering.names import METHOD
from steerfm.steering.outcome import Method, Outcome, Tick
from steerfm.steering.result import SteeringResult
from steerfm.steering.sampler import Sampler
from steerfm.steering.state import Begin, Callback, State
from steerfm.steering.strength import automatic
from steerfm.steering.value import Problem
from steerfm.steering.weights import wide

CPU_ROWS = 128


def steer(
    flow_map: FlowMap | str | Path,
    reward: Reward | Callable[..., Tensor] | str | Mapping[str, Any] | Sequence[Any],
    method: Method | str | Mapping[str, Any] | None = None,
    n: int = 1,
    seeds: int | Sequence[int] = 0,
    strength: float | Sequence[float] | Tensor | str = 1.0,
    cond: Condition | str | int | Sequence[str | int] = None,
    *,
    label: str | int | Sequence[str | int] | None = None,
    negative: Condition | str | int | Sequence[str | int] = None,
    prompts: str | Sequence[str] | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    lookaheads: bool = False,
    progress: Tick | None = None,
    x0: Tensor | None = None,
    start: tuple[Tensor, float] | None = None,
    times: Sequence[float] | None = None,
    callback: Callback | None = None,
) -> SteeringResult:
    """Steer samples of a flow map towards a reward: q(x) proportional to p_1(x) exp(strength * r(x)).

    >>> steerfm.steer("fashion", "brightness", "funnel", n=2, label="Bag")

    The map, the reward and the method can be objects or names, as in configurations.

    Args:
        flow_map: the model, or its name; see `steerfm.load`.
        reward: a Reward, a composition, or a plain function of pictures (b, c, h, w) in [0, 1] (vectors for toy maps). Or a
            name, {name: NAME, weight: ..., its arguments}, or a list of such terms; see `rewards.build`.
        method: a preset such as `FeynmanKac(particles=16, steps=8)`, or a `Steering` of your own parts. Or a name, or {name:
            NAME, its arguments}; see `steerfm.method`. Default: `usual_method`. For a flow map that is `Funnel()`, which takes
            any reward and costs 128 network evaluations per output; `Funnel.within(512)` for more.
        n: number of outputs; each has its own particles.
        seeds: an integer s for s, s + 1, ..., or one seed per output.
        strength: of the tilt, finite; one number, or one per output. "auto": twice the strength at which the importance
            weights of plain samples have an effective sample size of 1/e. It raises a reward that is normal under the model by
            two standard deviations (`steerfm.steering.strength`). It needs 64 samples in four jumps, which are not part of the
            cost.
        cond: one row per output, or a class name, index or prompt for all outputs or for each.
        label: in place of ``cond``: the class, by name or index, of all outputs or of each.
        negative: as ``cond``; the condition that classifier-free guidance (`Guided`) leads away from; default none.
        prompts: for rewards that read them; default the prompts in ``cond``.
        labels: (n,) for rewards that read them; default the labels in ``cond``.
        batch_size: outputs at a time; does not change the result.
        micro_batch: rows per network call; does not change the result. Default: all, but 128 pictures on a CPU, as many
            as its caches hold (4,096 rows at once take 1.5 times as long). It is halved when memory runs out.
        lookaheads: keep the first particle's look-ahead pictures in the trace.
        progress: called with (steps done, total steps).
        x0: (n, *shape) initial noise in place of that of the seeds, or (n, k, *shape), one for each particle.
        start: (pictures, t): pictures in [0, 1], (n, c, h, w) or one for all (vectors for toy maps), and a time in [0, 1).
            Particles begin at alpha_t picture + sigma_t noise; the later the time, the more of the picture stays.
        times: ascending, from 0 (or the time of ``start``) to 1, in place of the method's own grid.
        callback: called with the `State` after each step; if it returns a true value, one jump ends the run.

    Returns:
        A `SteeringResult` with all particles, their log-weights, the trace and the cost.

    Raises:
        ValueError: the input is invalid; the message names the fix.
        RewardError: the reward is invalid, or fails.
    """
    results = steer_batches(
        flow_map, reward, method, n, seeds, strength, cond, label=label, negative=negative, prompts=prompts, labels=labels,
        batch_size=batch_size, micro_batch=micro_batch, lookaheads=lookaheads, progress=progress, x0=x0, start=start,
        times=times, callback=callback,
    )  # fmt: skip
    return SteeringResult.cat(list(results))


def steer_batches(
    flow_map: FlowMap | str | Path,
    reward: Reward | Callable[..., Tensor] | str | Mapping[str, Any] | Sequence[Any],
    method: Method | str | Mapping[str, Any] | None = None,
    n: int = 1,
    seeds: int | Sequence[int] = 0,
    strength: float | Sequence[float] | Tensor | str = 1.0,
    cond: Condition | str | int | Sequence[str | int] = None,
    *,
    label: str | int | Sequence[str | int] | None = None,
    negative: Condition | str | int | Sequence[str | int] = None,
    prompts: str | Sequence[str] | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    lookaheads: bool = False,
    progress: Tick | None = None,
    x0: Tensor | None = None,
    start: tuple[Tensor, float] | None = None,
    times: Sequence[float] | None = None,
    callback: Callback | None = None,
    skip: Container[int] = (),
) -> Iterator[SteeringResult]:
    """As `steer`, but yields the outputs a batch at a time, each with its own cost. Memory does not grow with ``n``:
    ``for part in steer_batches(...): part.save(...)``. Invalid input raises before the first batch.

    Args:
        skip: numbers of the batches to leave out; read again before each batch. For the other arguments see `steer`.

    Yields:
        A `SteeringResult` of ``batch_size`` outputs; the last one may have fewer.
    """
    job = _Job.of(
        flow_map, reward, method, n, seeds, strength, cond, label, negative, prompts, labels, batch_size, micro_batch, x0,
        start, times,
        needs_states=callback is not None,
    )  # fmt: skip
    watch = None if callback is None else _guard(callback)

    def batch(index: int, rows: slice) -> SteeringResult:
        def tick(done: int, steps: int) -> None:
            if progress is not None and first():
                with untouched():
                    progress(index * steps + done, len(job.batches) * steps)

        def run(problem: Problem) -> Outcome:
            noise, many = job.noise(rows), rows.stop - rows.start
            if watch is None and job.begin is None:
                return job.method.run(problem, noise, many, lookaheads, tick)
            assert isinstance(job.method, Sampler)
            return job.method.run(problem, noise, many, lookaheads, tick, None if job.begin is None else job.begin[rows], watch)

        with Ledger() as ledger:
            outcome, job.micro_batch = _run_in_memory(run, job.problem(rows), job.micro_batch, job.exact)
        return job.result(outcome, rows, ledger.cost)

    return (batch(index, rows) for index, rows in enumerate(job.batches) if index not in skip)


def steps(
    flow_map: FlowMap | str | Path,
    reward: Reward | Callable[..., Tensor] | str | Mapping[str, Any] | Sequence[Any],
    method: Method | str | Mapping[str, Any] | None = None,
    n: int = 1,
    seeds: int | Sequence[int] = 0,
    strength: float | Sequence[float] | Tensor | str = 1.0,
    cond: Condition | str | int | Sequence[str | int] = None,
    *,
    label: str | int | Sequence[str | int] | None = None,
    negative: Condition | str | int | Sequence[str | int] = None,
    prompts: str | Sequence[str] | None = None,
    labels: Tensor | None = None,
    micro_batch: int | None = None,
    x0: Tensor | None = None,
    start: tuple[Tensor, float] | None = None,
    times: Sequence[float] | None = None,
) -> Iterator[State]:
    """Steer step by step: yield the `State` of all outputs after each step. The arguments are those of `steer`.

    >>> for state in steerfm.steps(flow_map, reward, FeynmanKac(particles=16, steps=8), n=4):
    ...     print(state.t, state.ess, state.lookahead_images().shape)
    """
    job = _Job.of(
        flow_map, reward, method, n, seeds, strength, cond, label, negative, prompts, labels, None, micro_batch, x0, start,
        times, True,
    )  # fmt: skip
    (rows,) = job.batches
    problem = replace(job.problem(rows), flow_map=spread(job.flow_map, job.micro_batch, job.exact))
    assert isinstance(job.method, Sampler)
    return job.method.steps_of(problem, job.noise(rows), job.begin)


def _guard(callback: Callback) -> Callback:
    """Wrap a callback: it cannot change the random state, and its result in the first process counts in all processes."""

    def call(state: State) -> Any:
        with untouched():
            stop = bool(callback(state))
        return of_first(lambda: stop)

    return call


@dataclass
class _Job:
    """The checked arguments of `steer`: one row per output, divided into batches."""

    flow_map: FlowMap
    reward: Reward
    method: Method
    seeds: list[int]
    strength: Tensor
    rows: Rows
    begin: Begin | None
    batches: list[slice]
    micro_batch: int | None
    exact: bool

    @classmethod
    def of(
        cls,
        flow_map: Any,
        reward: Any,
        method: Any,
        n: int,
        seeds: Any,
        strength: Any,
        cond: Any,
        label: Any,
        negative: Any,
        prompts: Any,
        labels: Tensor | None,
        batch_size: int | None,
        micro_batch: int | None,
        x0: Tensor | None,
        start: tuple[Tensor, float] | None,
        times: Sequence[float] | None,
        needs_states: bool,
    ) -> _Job:
        """See `steer`."""
        rw = rewards.build(reward)
        flow_map = zoo.load(flow_map)
        method = usual_method(flow_map) if method is None else registry.build(method, METHOD)
        method.check(rw)
        all_seeds = seed_list(seeds, n)
        begin = _begin(flow_map, n, x0, start, times)
        if (needs_states or begin is not None) and not isinstance(method, Sampler):
            raise ValueError(
                f"{type(method).__name__} does not walk from noise to data: x0, start, times, callback and steps need a "
                "method that does, such as FeynmanKac or Funnel"
            )
        check_method(method, flow_map, None if begin is None else begin.times)
        rows = _rows(flow_map, n, by_label(flow_map, label, cond), prompts, labels)
        rows = replace(rows, cond=add_negative(flow_map, rows.cond, negative, n))
        place(rw, flow_map.device)
        k = method.particles
        whole_numbers(particles=k)
        tilt = _strengths(shared_out(flow_map), rw, rows, strength)
        size = n if batch_size is None else batch_size
        micro_batch = flow_map.micro_batch if micro_batch is None else micro_batch
        whole_numbers(batch_size=size, micro_batch=1 if micro_batch is None else micro_batch)
        if size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        batches = cuts(n, size)
        exact = micro_batch is not None
        if not exact and flow_map.device.type == "cpu" and len(flow_map.shape) == 3 and size * k > CPU_ROWS:
            micro_batch = CPU_ROWS
        return cls(flow_map, rw, method, all_seeds, tilt, rows, begin, batches, micro_batch, exact)

    def noise(self, rows: slice) -> Noise:
        return Noise(self.seeds[rows], self.method.particles)

    def result(self, outcome: Outcome, rows: slice, cost: Cost) -> SteeringResult:
        """The result of some outputs, outside inference mode."""
        out = SteeringResult(**vars(outcome), cost=cost, strength=self.strength[rows].clone(), flow_map=self.flow_map)
        out.micro_batch = self.micro_batch
        return SteeringResult.cat([out])  # outside inference mode

    def problem(self, rows: slice) -> Problem:
        """The problem of some outputs, one row for each particle."""
        k, outputs = self.method.particles, self.rows[rows]
        outputs = replace(outputs, groups=torch.arange(outputs.n, device=self.flow_map.device))
        return Problem(self.flow_map, self.reward, self.strength[rows].repeat_interleave(k), outputs.repeat(k))


def usual_method(flow_map: FlowMap) -> Method:
    """The default method for a map, chosen by its capabilities.

    `Funnel` for a map that jumps to the data; `FeynmanKac` with denoiser and midpoint steps for a velocity; best-of-n of single
    jumps for a generator.
    """
    return registry.build(usual(flow_map), METHOD)


def usual(flow_map: FlowMap) -> dict[str, Any]:
    """The name and arguments of `usual_method`, as in configurations."""
    return dict(USUAL[next(name for name in USUAL if can(flow_map, name))])


USUAL: dict[str, dict[str, Any]] = {
    "endpoint": {"name": "funnel"},
    "velocity": {"name": "feynman_kac", "particles": 32, "lookahead": "denoise", "transition": "midpoint"},
    "generator": {"name": "best_of_n", "particles": 128, "steps": 1},
}
"""Default methods by capability; the first capability of the map counts."""


def _strengths(flow_map: FlowMap, reward: Reward, rows: Rows, strength: Any) -> Tensor:
    """A strength for each output (n,).

    Raises:
        ValueError: the number of strengths differs from the number of outputs, or one is not finite.
    """
    if isinstance(strength, str):
        strength = automatic(flow_map, reward, rows, strength)
    tilt = torch.as_tensor(strength, dtype=wide(flow_map.device), device=flow_map.device)
    if tilt.ndim > 1 or (tilt.ndim == 1 and len(tilt) != rows.n):
        raise ValueError(f"strength has shape {tuple(tilt.shape)} for n={rows.n} outputs: give one number, or one per output")
    if not bool(torch.isfinite(tilt).all()):
        raise ValueError(f"strength={strength}: must be finite")
    return tilt.expand(rows.n)


def _rows(flow_map: FlowMap, n: int, cond: Any, prompts: str | Sequence[str] | None, labels: Tensor | None) -> Rows:
    """One row for each output.

    Raises:
        ValueError: the number of rows differs from the number of outputs, or a class is unknown.
    """
    if prompts is None and isinstance(flow_map.null, Mapping) and isinstance(cond, str | list | tuple):
        prompts = [cond] if isinstance(cond, str) else [str(text) for text in cond]  # a reward may read the prompts of the map
        prompts = prompts * n if len(prompts) == 1 else prompts
    texts = [prompts] * n if isinstance(prompts, str) else prompts
    if texts is not None and len(texts) != n:
        raise ValueError(f"{len(texts)} prompts for n={n} outputs: give one prompt, or one per output")
    rows = as_condition(flow_map, cond, n)
    return Rows(n, rows, labels_of(rows) if labels is None else labels, None if texts is None else list(texts))


def _begin(
    flow_map: FlowMap, n: int, x0: Tensor | None, start: tuple[Tensor, float] | None, times: Sequence[float] | None
) -> Begin | None:
    """Where the particles begin; None for noise from the seeds and the method's own times.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    if x0 is None and start is None and times is None:
        return None
    if x0 is not None and start is not None:
        raise ValueError("x0 and start: give only one of them, the initial noise or the pictures")
    t, x = 0.0, None
    if start is not None:
        try:
            pictures, t = start
            t = float(t)
        except (TypeError, ValueError):
            raise ValueError("start: give (pictures, t)") from None
        if not 0 <= t < 1:
            raise ValueError(f"start=(pictures, {t:g}): a time in [0, 1)")
        x = flow_map.encode(_states("start", pictures, flow_map, n, per_particle=False))
    elif x0 is not None:
        x = _states("x0", x0, flow_map, n, per_particle=True)
    grid = None if times is None else tuple(float(time) for time in times)
    if grid is not None and not (
        len(grid) > 1 and grid[0] == t and grid[-1] == 1 and all(a < b for a, b in zip(grid, grid[1:]))
    ):
        raise ValueError(f"times={list(grid)}: ascending times from {t:g} to 1")
    return Begin(x, t, start is not None, grid)


def _states(name: str, x: Tensor, flow_map: FlowMap, n: int, per_particle: bool) -> Tensor:
    """Check x and return it as (n, *shape) or (n, k, *shape).

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    x, shape = torch.as_tensor(x), tuple(flow_map.shape)
    if tuple(x.shape) == shape or tuple(x.shape) == (1, *shape):
        x = x.reshape(1, *shape).expand(n, *shape)
    fits = x.shape[:1] == (n,) and (tuple(x.shape[1:]) == shape or (per_particle and tuple(x.shape[2:]) == shape))
    if not fits:
        more = f", or (n, particles, {', '.join(map(str, shape))})" if per_particle else ", or one for all"
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} for n={n} outputs: give ({', '.join(map(str, (n, *shape)))}){more}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} is not finite")
    return x


def _run_in_memory(
    run: Callable[[Problem], Outcome], problem: Problem, rows: int | None, exact: bool
) -> tuple[Outcome, int | None]:
    """Run the batch; each time memory runs out, halve the rows per network call and start the batch again from its seeds.

    Returns:
        The outcome, and the rows per network call that fitted.
    """
    while True:
        try:
            return run(replace(problem, flow_map=spread(problem.flow_map, rows, exact))), rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            total = len(problem.strength)
            rows, exact = max(1, min(rows or total, total) // 2), True
        warnings.warn(f"out of memory: continuing with micro_batch={rows}", stacklevel=3)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
