"""Running a method on a problem: `steer`, `steer_batches`, which yields a batch of outputs at a time, and `steps`, which shows
each step."""

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
from steerfm.sampling import Noise, as_condition, leading_away, seed_list
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

    A map, a reward and a method may be given by name, as in configurations.

    Args:
        flow_map: the model, or its name, as `steerfm.load` takes it.
        reward: a Reward, a composition, or a plain function of pictures (b, c, h, w) in [0, 1] (vectors for toy maps); or its
            name, {name: NAME, weight: ..., its arguments}, or a list of such terms, as `rewards.build` takes it.
        method: a preset such as `FeynmanKac(particles=16, steps=8)`, or a `Steering` of your own parts; or its name, or {name:
            NAME, its arguments}, as `steerfm.method` takes it; default that of `usual_method`: `Funnel()` for a flow map, which
            takes any reward and costs 128 network calls an output; `Funnel.within(512)` for more.
        n: outputs; each has its own particles.
        seeds: an integer s for s, s + 1, ..., or one seed per output.
        strength: of the tilt, finite; one number, or one per output. "auto": twice that at which the importance weights of
            plain samples have an effective sample size of 1/e, so that a reward which is normal under the model is raised by
            two standard deviations (`steerfm.steering.strength`); from 64 samples in four jumps, drawn beforehand, not in the
            cost.
        cond: one row per output, or a class name, index or prompt for all or for each.
        label: in place of ``cond``: the class, by name or index, of all or of each.
        negative: as ``cond``; what classifier-free guidance (`Guided`) leads away from, in place of nothing.
        prompts: for rewards that read them; default what ``cond`` asks for, in words.
        labels: (n,) for rewards that read them; default those that ``cond`` asks for.
        batch_size: outputs at a time; the result does not depend on it.
        micro_batch: rows per network call; the result does not depend on it. Default: all, but 128 pictures on a CPU, whose
            caches do not hold more (4,096 rows at once take 1.5 times as long); where memory does not hold them, half as many.
        lookaheads: keep the first particle's look-ahead pictures in the trace.
        progress: called with (steps done, steps in all).
        x0: (n, *shape) noise to begin with in place of that of the seeds, or (n, k, *shape) for each particle.
        start: pictures in [0, 1], (n, c, h, w) or one for all (vectors for toy maps), and a time t in [0, 1): particles begin
            at alpha_t picture + sigma_t noise; the later the time, the more of the picture stays.
        times: ascending, from 0 (or the time of ``start``) to 1, in place of the method's own grid.
        callback: called with the `State` after each step; where it returns something true, one jump ends the run.

    Returns:
        A `SteeringResult` with all particles, their log-weights, the trace and the cost.

    Raises:
        ValueError: naming what is wrong and the fix (`RewardError` where it is the reward).
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
    """As `steer`, but the outputs come a batch at a time, each with its own cost, so that many of them need no more memory than
    few: ``for part in steer_batches(...): part.save(...)``. What is wrong is said before the first batch.

    Args:
        skip: numbers of the batches to leave out, looked up when each one's turn comes. The others: see `steer`.

    Yields:
        A `SteeringResult` of ``batch_size`` outputs, the last one of those that are left over.
    """
    job = _Job.of(
        flow_map, reward, method, n, seeds, strength, cond, label, negative, prompts, labels, batch_size, micro_batch, x0,
        start, times,
        needs_states=callback is not None,
    )  # fmt: skip
    watch = None if callback is None else _lent(callback)

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
            outcome, job.micro_batch = _fitting(run, job.problem(rows), job.micro_batch, job.exact)
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
    """Steer step by step: the `State` after each step, of all outputs at once. The arguments are those of `steer`.

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


def _lent(callback: Callback) -> Callback:
    """The callback, which leaves the process as it was; what it says in the first of several processes counts in all."""

    def call(state: State) -> Any:
        with untouched():
            stop = bool(callback(state))
        return of_first(lambda: stop)

    return call


@dataclass
class _Job:
    """What `steer` is asked for, checked: a row for each output, cut in batches."""

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
        rows = replace(rows, cond=leading_away(flow_map, rows.cond, negative, n))
        place(rw, flow_map.device)
        k = method.particles
        whole_numbers(particles=k)
        tilt = _strengths(shared_out(flow_map), rw, rows, strength)
        size = n if batch_size is None else batch_size
        micro_batch = flow_map.micro_batch if micro_batch is None else micro_batch
        whole_numbers(batch_size=size, micro_batch=1 if micro_batch is None else micro_batch)
        if size < 1:
            raise ValueError(f"batch_size={batch_size}: at least one output at a time")
        batches = cuts(n, size)
        exact = micro_batch is not None
        if not exact and flow_map.device.type == "cpu" and len(flow_map.shape) == 3 and size * k > CPU_ROWS:
            micro_batch = CPU_ROWS
        return cls(flow_map, rw, method, all_seeds, tilt, rows, begin, batches, micro_batch, exact)

    def noise(self, rows: slice) -> Noise:
        return Noise(self.seeds[rows], self.method.particles)

    def result(self, outcome: Outcome, rows: slice, cost: Cost) -> SteeringResult:
        """That of some outputs, out of inference mode."""
        made = SteeringResult(**vars(outcome), cost=cost, strength=self.strength[rows].clone(), flow_map=self.flow_map)
        made.micro_batch = self.micro_batch
        return SteeringResult.cat([made])

    def problem(self, rows: slice) -> Problem:
        """That of some outputs, a row for each particle."""
        k, outputs = self.method.particles, self.rows[rows]
        outputs = replace(outputs, groups=torch.arange(outputs.n, device=self.flow_map.device))
        return Problem(self.flow_map, self.reward, self.strength[rows].repeat_interleave(k), outputs.repeat(k))


def usual_method(flow_map: FlowMap) -> Method:
    """The method that a map is steered by where nobody names one, by what the map can do.

    `Funnel` where it jumps to the data; `FeynmanKac` by denoiser and midpoint steps for a velocity; best-of-n, each one jump,
    for a generator.
    """
    return registry.build(usual(flow_map), METHOD)


def usual(flow_map: FlowMap) -> dict[str, Any]:
    """The name and the arguments of `usual_method`, as configurations have them."""
    return dict(USUAL[next(name for name in USUAL if can(flow_map, name))])


USUAL: dict[str, dict[str, Any]] = {
    "endpoint": {"name": "funnel"},
    "velocity": {"name": "feynman_kac", "particles": 32, "lookahead": "denoise", "transition": "midpoint"},
    "generator": {"name": "best_of_n", "particles": 128, "steps": 1},
}
"""The usual method by the first of these that a map can do."""


def _strengths(flow_map: FlowMap, reward: Reward, rows: Rows, strength: Any) -> Tensor:
    """A strength for each output (n,).

    Raises:
        ValueError: another number of them than outputs, or one that is not finite.
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
    """A row for each output.

    Raises:
        ValueError: another number of rows than outputs, or an unknown class.
    """
    if prompts is None and isinstance(flow_map.null, Mapping) and isinstance(cond, str | list | tuple):
        prompts = [cond] if isinstance(cond, str) else [str(text) for text in cond]  # a reward may read what a map is asked
        prompts = prompts * n if len(prompts) == 1 else prompts
    texts = [prompts] * n if isinstance(prompts, str) else prompts
    if texts is not None and len(texts) != n:
        raise ValueError(f"{len(texts)} prompts for n={n} outputs: give one prompt, or one per output")
    rows = as_condition(flow_map, cond, n)
    return Rows(n, rows, labels_of(rows) if labels is None else labels, None if texts is None else list(texts))


def _begin(
    flow_map: FlowMap, n: int, x0: Tensor | None, start: tuple[Tensor, float] | None, times: Sequence[float] | None
) -> Begin | None:
    """Where the particles begin; None for noise of the seeds and the method's own times.

    Raises:
        ValueError: naming the argument.
    """
    if x0 is None and start is None and times is None:
        return None
    if x0 is not None and start is not None:
        raise ValueError("x0 and start: give one, the noise or the pictures to begin with")
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
    """(n, *shape), or (n, k, *shape), checked."""
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


def _fitting(run: Callable[[Problem], Outcome], problem: Problem, rows: int | None, exact: bool) -> tuple[Outcome, int | None]:
    """The outcome, and the rows per network call that fitted in memory: half as many each time that they do not, from the start
    of the batch, whose seeds give the same again."""
    while True:
        try:
            return run(replace(problem, flow_map=spread(problem.flow_map, rows, exact))), rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            asked = len(problem.strength)
            rows, exact = max(1, min(rows or asked, asked) // 2), True
        warnings.warn(f"out of memory: going on with micro_batch={rows}", stacklevel=3)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
