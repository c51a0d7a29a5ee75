"""Resampling schemes of steerfm and of the package `particles` (Chopin & Papaspiliopoulos 2020): distributions and times.

    pip install -e ".[bench]"; steerfm bench resampling        # two minutes, one thread

Distribution: the variance that resampling adds to a weighted average, k Var of the children's mean of x, and its z-score.
Time: medians in microseconds, with both sides in turn on the same weights, exp of normal numbers, which change each time.
steerfm resamples all outputs in one call; `particles` runs a compiled loop over the particles of one output, called once per
output. `particles` draws its uniform numbers inside, a few nanoseconds per particle; steerfm gets them, drawn from the seeds of
each output. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from particles import resampling as theirs  # pyright: ignore[reportMissingImports]  # in the extra bench
from rich.console import Console
from rich.table import Table

from steerfm.steering.resampling import SCHEMES

INPUTS = 8
"""Number of inputs to alternate, because a processor learns the branches of a repeated search."""


def law(scheme: str, draws: int = 4000, k: int = 100) -> dict[str, float]:
    """Return k Var of the children's mean of x with weights exp(x), for both sides, and the z-score of their difference."""
    x = np.random.default_rng(0).standard_normal(k)
    w = np.exp(x) / np.exp(x).sum()
    u = torch.rand(draws, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    children = SCHEMES[scheme](torch.from_numpy(w).expand(draws, k), u)
    np.random.seed(1)  # the package draws from numpy's global state and takes no generator
    means = {
        "steerfm": x[children.numpy()].mean(1),
        "particles": np.array([x[theirs.resampling(scheme, w)].mean() for _ in range(draws)]),
    }
    squares = {side: k * (values - w @ x) ** 2 for side, values in means.items()}
    a, b = squares.values()
    z = float((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / draws))
    return {f"{side} variance": float(values.mean()) for side, values in squares.items()} | {"z": z}


def seconds(call: Callable[[], object]) -> float:
    """Time a call in processor seconds of this thread, which other programs do not affect."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def times(scheme: str, k: int, n: int, budget: float) -> dict[str, float]:
    """Return the median microseconds of both sides to resample ``n`` outputs of ``k`` particles, measured alternately.

    Args:
        scheme: name of the resampling scheme.
        k: number of particles.
        n: number of outputs.
        budget: seconds of the measurement.
    """
    stream = torch.Generator().manual_seed(k + n)
    inputs = []
    for _ in range(INPUTS):
        w = torch.randn(n, k, generator=stream, dtype=torch.float64).softmax(1)
        inputs.append((w, torch.rand(n, k, generator=stream, dtype=torch.float64), list(w.numpy())))
    microseconds: dict[str, list[float]] = {"steerfm": [], "particles": []}
    start = time.perf_counter()
    for turn, (w, u, rows) in enumerate(itertools.cycle(inputs)):
        sides = {
            "steerfm": lambda w=w, u=u: SCHEMES[scheme](w, u),
            "particles": lambda rows=rows: [theirs.resampling(scheme, row) for row in rows],
        }
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            microseconds[side].append(1e6 * seconds(sides[side]))
        if turn > 2 * INPUTS and time.perf_counter() - start > budget:
            break
    return {side: statistics.median(values[1:]) for side, values in microseconds.items()}  # the first call compiles


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench resampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 100, 1000, 10_000])
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each measurement")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = list(itertools.product(options.particles, options.outputs))
    laws = {scheme: law(scheme) for scheme in SCHEMES}
    results = {
        scheme: {f"{k} x {n}": times(scheme, k, n, options.seconds) for k, n in sizes} for scheme in SCHEMES
    }  # fmt: skip

    console = Console(width=130)
    table = Table("", *next(iter(laws.values())), title="what resampling adds to the variance of an average")
    for scheme, row in laws.items():
        table.add_row(scheme, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    table = Table("particles x outputs", *SCHEMES, title="microseconds, ours / theirs; one thread")
    for size in next(iter(results.values())):
        pairs = [results[scheme][size].values() for scheme in SCHEMES]
        table.add_row(size, *(" / ".join(f"{value:,.0f}" for value in pair) for pair in pairs))
    console.print(table)
    print(json.dumps({"benchmark": "resampling", "laws": laws, "microseconds": results, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
