"""Time grids, per-output noise, and plain sampling.

>>> x = steerfm.sample(flow_map, n=64, steps=4, seeds=0)                     # deterministic jumps
>>> x = steerfm.sample(flow_map, n=64, steps=8, transition=Renoise(gamma=1.0))

Every output has its own `torch.Generator` on the CPU, so a sample does not depend on its batch, micro-batch or rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm import zoo
from steerfm.capabilities import Choosy, in_words
from steerfm.checks import whole_numbers
from steerfm.flowmap import FlowMap, Guided, by_label
from steerfm.interpolant import time_grid
from steerfm.randomness import derive, stream
from steerfm.rows import Condition, cuts, map_condition, take_rows, with_negative
from steerfm.spread import shared_out
from steerfm.transitions import Transition, usual


# --- time grids ------------------------------------------------------------------------------------------------------
def grid_of(flow_map: FlowMap, steps: int, power: float = 1.0) -> list[float]:
    """The grid of a map, with its times to a power; a power above 1 means small steps near the noise."""
    time_grid(steps, power)  # raises on bad values
    return [t**power for t in flow_map.grid(steps)]


# --- noise -----------------------------------------------------------------------------------------------------------
class Noise:
    """Noise for ``n`` outputs of ``k`` particles, from one CPU generator per output.

    The first particle is drawn before the others, so with a deterministic transition it is the plain sample of its seed.
    Selection and stochastic look-aheads have separate streams, so they do not change the noise of the path.

    Args:
        seeds: one integer per output, of any size; see `randomness.stream`.
        k: particles per output.
    """

    def __init__(self, seeds: Sequence[int], k: int = 1) -> None:
        self.k, self.seeds = k, [int(seed) for seed in seeds]

    @cached_property
    def generators(self) -> list[torch.Generator]:  # lazy: many runs do not use all streams
        return [stream(seed) for seed in self.seeds]

    @cached_property
    def selection(self) -> list[torch.Generator]:
        return [stream(seed, "selection") for seed in self.seeds]

    def other(self, purpose: str = "look-ahead") -> Noise:
        """An unrelated stream for the same outputs."""
        return Noise([derive(seed, purpose) for seed in self.seeds], self.k)

    def of(self, k: int) -> Noise:
        """The same streams, continued with ``k`` particles per output."""
        out = copy(self)
        out.k = k
        return out

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal (n * k, *shape), drawn in float32, on the device and in the dtype of ``like``."""
        out = torch.empty(len(self.seeds), self.k, *shape, dtype=torch.float32)  # not torch's default dtype
        for rows, generator in zip(out, self.generators):
            torch.randn(shape, generator=generator, out=rows[0])
            if self.k > 1:
                torch.randn((self.k - 1, *shape), generator=generator, out=rows[1:])
        return out.flatten(0, 1).to(like)

    def start(self, flow_map: FlowMap) -> Tensor:
        """Standard normal states (n * k, *shape) of a map, in its dtype and on its device: x_0."""
        return self.normal(flow_map.shape, torch.empty(0, dtype=flow_map.state_dtype, device=flow_map.device))

    def uniform(self, columns: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), (n, columns), for selection."""
        out = torch.stack([torch.rand(columns, generator=generator, dtype=torch.float32) for generator in self.selection])
        return out.to(device)


def seed_list(seeds: int | Sequence[int], n: int) -> list[int]:
    """The seeds of n outputs: ``s`` means s, s + 1, ..., s + n - 1; a sequence must have one seed per output.

    Raises:
        ValueError: the numbers of seeds and outputs differ, or a seed is not a whole number.
    """
    whole_numbers(n=n)
    if n < 1:
        raise ValueError(f"n={n}: at least one output is needed")
    numbers: Any = None if isinstance(seeds, bool) else seeds
    with suppress(TypeError):  # a sequence
        numbers = range(first := index(numbers), first + n)
    try:
        out = [index(seed) for seed in numbers]
    except TypeError:
        raise ValueError(f"seeds={seeds!r}: give one integer, or one seed per output") from None
    if len(out) != n:
        raise ValueError(f"{len(out)} seeds for n={n} outputs: give one integer, or one seed per output")
    return out


# --- plain sampling --------------------------------------------------------------------------------------------------
def sample(
    flow_map: FlowMap | str | Path,
    n: int = 1,
    steps: int | None = None,
    seeds: int | Sequence[int] = 0,
    cond: Condition | str | int | Sequence[str | int] = None,
    transition: Transition | None = None,
    batch_size: int | None = None,
    power: float = 1.0,
    *,
    label: str | int | Sequence[str | int] | None = None,
    negative: Condition | str | int | Sequence[str | int] = None,
) -> Tensor:
    """Draw unsteered samples.

    Args:
        flow_map: the map, or its name; see `steerfm.load`.
        n: number of samples.
        steps: transitions from t = 0 to t = 1, on the map's own grid; default `FlowMap.steps`.
        seeds: an integer s for s, s + 1, ..., or one seed per sample.
        cond: one row per sample; a class name, index or prompt for all samples or for each; or None.
        transition: default the map's own: `Jump()`, or `Renoise()` for a map that only jumps to the data.
        batch_size: rows per network call; default all. It does not change the result.
        power: of the time grid.
        label: in place of ``cond``: the class, by name or index, of all samples or of each.
        negative: as ``cond``; the condition that classifier-free guidance leads away from; default none.

    Returns:
        (n, *shape) in model space; `FlowMap.decode` turns it into pictures.

    Raises:
        ValueError: an argument is invalid; the message names the fix.
    """
    flow_map = zoo.load(flow_map)
    move = usual(flow_map) if transition is None else transition
    all_seeds, times = seed_list(seeds, n), grid_of(flow_map, flow_map.steps if steps is None else steps, power)
    check_fit(flow_map, move, times)
    cond = add_negative(flow_map, as_condition(flow_map, by_label(flow_map, label, cond), n), negative, n)
    size = n if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    parts, flow_map = [], shared_out(flow_map)
    with torch.inference_mode():
        for rows in cuts(n, size):
            parts.append(walk(flow_map, Noise(all_seeds[rows]), times, take_rows(cond, rows), move))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).clone()


def as_condition(flow_map: FlowMap, cond: Condition | str | int | Sequence[str | int], n: int) -> Condition:
    """Check a condition and move it to the map's device. Tensors need one row per output; a class name or index is repeated.

    Raises:
        ValueError: the numbers of rows and outputs differ, or a class is unknown.
    """
    if cond is None or isinstance(cond, str | int | Sequence):
        return flow_map.condition(cond, n)

    null = flow_map.null if flow_map.class_names and isinstance(cond, Tensor) else None

    def check(rows: Tensor) -> Tensor:
        if rows.ndim == 0 or len(rows) != n:
            raise ValueError(f"cond has shape {tuple(rows.shape)} for n={n} outputs: give one row per output")
        if isinstance(null, Tensor) and not rows.is_floating_point() and rows.shape[1:] == null.shape[1:]:
            last = int(null.max())
            if bool(((rows < 0) | (rows > last)).any()):
                raise ValueError(f"cond={rows.tolist()}: classes are 0 to {last - 1}, and {last} means none")
        return rows.to(flow_map.device)

    return map_condition(check, cond)


def add_negative(
    flow_map: FlowMap, cond: Condition, negative: Condition | str | int | Sequence[str | int], n: int
) -> Condition:
    """Add a negative condition, if there is one, to the condition of n rows: one for all rows, or one for each.

    Raises:
        ValueError: the map is not guided, or there is no positive condition.
    """
    if negative is None:
        return cond
    if not isinstance(flow_map, Guided):
        raise ValueError("negative= needs classifier-free guidance: steerfm.Guided(flow_map, scale), or guidance=SCALE")
    return with_negative(cond, as_condition(flow_map, negative, n))


def check_fit(flow_map: FlowMap, transition: Transition, times: Sequence[float]) -> None:
    """Check that a transition fits a map; the map's own transition always does.

    Raises:
        ValueError: it does not; the message names what the map lacks and what to use instead.
    """
    if transition == flow_map.transition or not isinstance(transition, Choosy):
        return
    if why := transition.lacks(flow_map, times):
        raise ValueError(f"this model has only {in_words(flow_map)}, and transition={transition} {why}")


def walk(flow_map: FlowMap, noise: Noise, times: Sequence[float], cond: Condition, transition: Transition) -> Tensor:
    """Run a chain of transitions for every row of the noise, from x_0 to the last time; returns (n * k, *shape)."""
    x = noise.start(flow_map)
    for s, t in zip(times, times[1:]):
        step = transition.step(flow_map, x, s, t, cond)
        x = step.sample(noise.normal(flow_map.shape, x) if step.std else None)
    return x
