"""Speed: the overhead of steering and fine-tuning over their network and reward calls, and how the cost grows.

    steerfm bench speed                                  # overheads: three minutes on two idle cores
    steerfm bench speed --scan                           # particles, steps, micro-batch, picture size: ten minutes
    steerfm bench speed --check benchmarks/results/speed.json    # fails if a ratio is more than 10% above the committed one

An overhead is the wall time of the library relative to that of a bare loop with the same calls and rows. Both run alternately
in one process; the median and the quartiles of the ratios of consecutive times are reported. Ratios carry over between
machines, seconds do not. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import steerfm
from steerfm.checkpoints import build_network
from steerfm.finetuning import Direct, FineTuning
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.sampling import time_grid
from steerfm.steering.steer import CPU_ROWS
from steerfm.training import fit

TOLERANCE = 1.10
ARCHITECTURE = {"name": "unet", "channels": 1, "widths": [48, 96], "blocks": 1}


class Bare:
    """Only the network and reward calls of each method, with the same rows.

    Args:
        flow_map: the map whose network is called.
        reward: a classifier reward.
        n: number of rows.
    """

    def __init__(self, flow_map: FlowMap, reward: Any, n: int) -> None:
        self.flow_map, self.classifier, self.target, self.n = flow_map, reward.network, reward.target, n

    def noise(self) -> Tensor:
        return torch.randn(self.n, *self.flow_map.shape, device=self.flow_map.device)

    def u(self, x: Tensor, s: float, t: float, flow_map: FlowMap | None = None) -> Tensor:
        times = torch.full((len(x),), s, device=x.device), torch.full((len(x),), t, device=x.device)
        parts = zip(*(rows.split(CPU_ROWS if x.device.type == "cpu" else len(x)) for rows in (x, *times)))
        parts_ = [(flow_map or self.flow_map).average_velocity(x, s, t, None) for x, s, t in parts]
        return parts_[0] if len(parts_) == 1 else torch.cat(parts_)

    def r(self, x: Tensor) -> Tensor:
        return self.classifier(((x + 1) / 2).clamp(0, 1)).log_softmax(1)[:, self.target]

    @torch.inference_mode()
    def best_of_n(self, steps: int) -> Tensor:
        x = self.noise()
        for s, t in _pairs(steps):
            x = x + (t - s) * self.u(x, s, t)
        return x[self.r(x).argmax()]

    @torch.inference_mode()
    def particles(self, steps: int) -> Tensor:
        x = self.noise()
        for s, t in _pairs(steps):
            z = x + (1 - s) * self.u(x, s, 1.0)
            if s > 0:
                self.r(z)
            x = t * z + (1 - t) * self.noise() if t < 1 else z
        return self.r(x)

    def guidance(self, steps: int) -> Tensor:
        x = self.noise()
        for s, t in _pairs(steps):
            state = x.requires_grad_()
            (direction,) = torch.autograd.grad(self.r(state + (1 - s) * self.u(state, s, s)).sum(), state)
            with torch.no_grad():
                x = x.detach() + (t - s) * self.u(x.detach(), s, t) + 0.01 * direction
        with torch.no_grad():
            return self.r(x)


def _pairs(steps: int) -> Iterator[tuple[float, float]]:
    return zip(time_grid(steps), time_grid(steps)[1:])


def alternate(bare: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time two functions alternately, after two warm-up pairs; return their seconds, and median and quartiles of the ratios."""
    pairs = []
    for repeat in range(repeats + 2):
        first, second = (bare, ours) if repeat % 2 else (ours, bare)
        times = [_seconds(first), _seconds(second)]
        pairs.append(times if repeat % 2 else times[::-1])
    return ratios(pairs[2:])


def ratios(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Summarise pairs of seconds (bare, library): medians of both, and median and quartiles of the ratios."""
    values = sorted(b / a for a, b in pairs)
    return {
        "bare": statistics.median(a for a, _ in pairs), "seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(values), "low": values[len(values) // 4], "high": values[3 * len(values) // 4],
    }  # fmt: skip


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def update(flow_map: NeuralFlowMap, reward: steerfm.Reward, n: int, repeats: int) -> dict[str, float]:
    """Time a fine-tuning update in Lightning's loop against the same update by hand.

    It has two jumps, the frozen one recomputed in the backward pass as in `Direct`, the base's jump for the control cost,
    clipping, optimiser and averaged weights.
    """
    bare = Bare(flow_map, reward, n)
    network = copy.deepcopy(flow_map.network).requires_grad_(True).train()
    average_network, tuned_map = copy.deepcopy(network), flow_map.with_network(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    average = get_ema_multi_avg_fn(0.95)

    def by_hand() -> None:
        x = bare.noise()
        displacement = 0.5 * bare.u(x, 0.0, 0.5, tuned_map)
        with torch.no_grad():
            control = 0.5 * bare.u(x, 0.0, 0.5)
        middle = x + displacement
        end = middle + checkpoint(lambda x: 0.5 * bare.u(x, 0.5, 1.0), middle, use_reentrant=False)
        (-bare.r(end).mean() + (displacement - control).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            average(list(average_network.parameters()), list(network.parameters()), 0)

    pairs: list[tuple[float, float]] = []

    class Between(L.Callback):
        """Makes one update by hand after each of Lightning's."""

        start = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            ours = time.perf_counter() - self.start
            pairs.append((_seconds(by_hand), ours))
            self.start = time.perf_counter()

    module = FineTuning(flow_map, reward, Direct(), batch_size=n, scale=1.0, steps=repeats + 2)
    with tempfile.TemporaryDirectory() as folder:
        fit(module, module.data(), Path(folder), save_every=10_000, validate_every=0, progress=False, callbacks=[Between()])
    return ratios(pairs[2:])


def overheads(n: int, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure the overheads of best-of-n, particles, guidance and a fine-tuning update."""
    flow_map, reward = steerfm.load("fashion", _device()), steerfm.reward("classifier", target="Bag").to(_device())
    bare = Bare(flow_map, reward, n)

    def steering(method: steerfm.steering.Method, outputs: int) -> Callable[[], Any]:
        return lambda: steerfm.steer(flow_map, reward, method, n=outputs, seeds=0, strength=5.0)

    contests = {
        "best_of_n": (lambda: bare.best_of_n(steps), steering(steerfm.BestOfN(particles=n, steps=steps), 1)),
        "feynman_kac": (lambda: bare.particles(steps), steering(steerfm.FeynmanKac(particles=n, steps=steps), 1)),
        "dps": (lambda: bare.guidance(steps), steering(steerfm.DPS(steps=steps), n)),
    }
    result = {name: alternate(*contest, repeats) for name, contest in contests.items()}
    return result | {"fine-tuning update": update(flow_map, reward, n, repeats)}  # type: ignore[arg-type]


def scan(repeats: int = 3) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds for each size, {name: [(size, seconds), ...]}, medians of ``repeats``; prints each table."""
    flow_map, reward = steerfm.load("fashion", _device()), steerfm.reward("classifier", target="Bag").to(_device())

    def seconds(n: int = 1, particles: int = 64, steps: int = 4, micro: int | None = None, flow_map: Any = flow_map,
                reward: Any = reward) -> float:  # fmt: skip
        method = steerfm.FeynmanKac(particles=particles, steps=steps)
        run = [_seconds(lambda: steerfm.steer(flow_map, reward, method, n, micro_batch=micro)) for _ in range(repeats + 1)]
        return statistics.median(run[1:])

    def of_side(side: int) -> float:
        torch.manual_seed(0)
        large = NeuralFlowMap(build_network(ARCHITECTURE).eval(), (1, side, side)).to(_device())
        return seconds(flow_map=large.requires_grad_(False), reward=steerfm.reward("brightness"))

    sweeps: dict[str, tuple[Callable[[int], float], Sequence[int]]] = {
        "side of the picture": (of_side, (16, 32, 64)),
        "outputs": (lambda n: seconds(n=n, particles=16), (1, 4, 16, 64)),
        "steps": (lambda k: seconds(steps=k), (1, 2, 4, 8, 16)),
        "particles": (lambda k: seconds(particles=k), (1, 4, 16, 64, 256, 1024, 4096)),
        "micro-batch": (lambda k: seconds(particles=1024, micro=k), (16, 64, 256, 1024)),
    }
    result: dict[str, list[tuple[float, float]]] = {}
    for name, (run, sizes) in sweeps.items():
        result[name] = []
        table = Table(name, "seconds", "each")
        for size in sizes:
            result[name].append((size, run(size)))
            table.add_row(f"{size:g}", f"{result[name][-1][1]:.3f}", f"{result[name][-1][1] / size:.4f}")
        Console().print(table)
    return result


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--scan", action="store_true", help="measure how the cost grows, instead of overheads")
    either.add_argument("--check", type=Path, metavar="FILE", help="compare the ratios with those of an earlier run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON line there")
    options = parser.parse_args(argv)
    facts = {"benchmark": "speed", "threads": torch.get_num_threads(), "torch": torch.__version__, "device": _device()}
    rows: dict[str, dict[str, float]] = {}
    if options.scan:
        result = facts | {"scan": scan()}
    else:
        rows = overheads(options.particles, options.steps, options.repeats)
        result = facts | {"particles": options.particles, "steps": options.steps, "overheads": rows}
        table = Table("method", "bare, s", "steerfm, s", "ratio", "quartiles", title=f"{options.particles} rows")
        for name, row in rows.items():
            numbers = (f"{row[key]:.3f}" for key in ("bare", "seconds", "ratio"))
            table.add_row(name, *numbers, f"{row['low']:.3f} to {row['high']:.3f}")
        Console().print(table)
    print(line := json.dumps(result))
    if options.out:
        options.out.write_text(line + "\n")
    if options.check:
        earlier = json.loads(options.check.read_text())["overheads"]
        worse = [name for name, row in rows.items() if row["low"] > TOLERANCE * max(1.0, earlier[name]["ratio"])]
        for name in worse:
            print(f"{name}: {rows[name]['ratio']:.2f}, it was {earlier[name]['ratio']:.2f}", file=sys.stderr)
        if worse:
            raise SystemExit(1)
        print("no overhead is more than 10% above the committed one")


if __name__ == "__main__":
    main()
