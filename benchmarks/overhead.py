"""Overhead of steering: wall time of `steer` over the bare loop of the same network and reward calls.

    python benchmarks/overhead.py            # FeynmanKac, 64 particles, 8 steps, look-ahead by jump, the classifier
    python benchmarks/overhead.py --particles 4096 --steps 2 --repeats 5

Both run in one process, alternating, and the median of the ratios of neighbours is reported: expect at most 1.05.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

import steerfm
from steerfm.sampling import time_grid
from steerfm.steering.run import CPU_ROWS


def bare(flow_map: steerfm.FlowMap, classifier: torch.nn.Module, target: int, particles: int, steps: int) -> float:
    """The calls that the method cannot do without, in as many rows, and nothing else; the last look-ahead is the sample."""
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    with torch.inference_mode():
        x = torch.randn(particles, *flow_map.shape, generator=generator)
        for s, t in zip(time_grid(steps), time_grid(steps)[1:]):
            s_, t_ = torch.full((particles,), s), torch.full((particles,), 1.0)
            parts = zip(*(rows.split(CPU_ROWS) for rows in (x, s_, t_)))
            u = torch.cat([flow_map.average_velocity(*part, None) for part in parts])
            z = x + (1 - s) * u
            if s > 0:
                classifier(((z + 1) / 2).clamp(0, 1)).log_softmax(1)[:, target]
            x = t * z + (1 - t) * torch.randn(z.shape, generator=generator) if t < 1 else z
    return time.perf_counter() - started


def steered(flow_map: steerfm.FlowMap, reward: steerfm.Reward, particles: int, steps: int) -> float:
    """Seconds of `steer` with the same calls."""
    method = steerfm.FeynmanKac(particles=particles, steps=steps)
    started = time.perf_counter()
    steerfm.steer(flow_map, reward, method, n=1, seeds=0, strength=5.0)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    flow_map = steerfm.load("fashion")
    reward = steerfm.reward("classifier", target="Bag")
    network, target = reward.network, reward.target  # type: ignore[attr-defined]
    pairs = []
    for repeat in range(options.repeats + 2):
        order = [
            lambda: bare(flow_map, network, target, options.particles, options.steps),
            lambda: steered(flow_map, reward, options.particles, options.steps),
        ]
        if repeat % 2:
            order.reverse()
        times = [run() for run in order]
        pairs.append(tuple(reversed(times)) if repeat % 2 else tuple(times))
    pairs = pairs[2:]  # the first two warm up
    ratios = [b / a for a, b in pairs]
    result = {
        "benchmark": "overhead",
        "particles": options.particles,
        "steps": options.steps,
        "bare_seconds": statistics.median(a for a, _ in pairs),
        "steer_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [sorted(ratios)[len(ratios) // 4], sorted(ratios)[3 * len(ratios) // 4]],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    table = Table("bare loop, s", "steer, s", "ratio (median)", "quartiles")
    low, high = result["ratio_quartiles"]
    table.add_row(*(f"{result[key]:.3f}" for key in ("bare_seconds", "steer_seconds", "ratio")), f"{low:.3f} to {high:.3f}")
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
