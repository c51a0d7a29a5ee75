"""The cost of an update by the reward gradient: jumps of a flow map against Euler steps of the same network.

    steerfm bench backprop                 # five minutes on two cores
    steerfm bench backprop --reach -.5     # also the time to reach that held-out reward: eight minutes

The variants are timed alternately in one process; memory is the peak that an update adds, in a process of its own. Both are
shown relative to one jump. Prints a table, then one JSON line.

``--reach``: tune from no class to the class Bag, and judge 256 samples of the variant after every update. Only the updates are
timed. Each variant uses the learning rate that reached the goal first with the first seed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import steerfm
from steerfm.finetuning import Direct, DRaFT, FineTuning, Tasks, Update
from steerfm.finetuning.base import draw
from steerfm.flowmap import NeuralFlowMap
from steerfm.randomness import derive, stream
from steerfm.sampling import Noise

VARIANTS = {
    "1 jump": Direct(jumps=1),
    "2 jumps, first trained (default)": Direct(),
    "2 jumps, first trained, checkpoints": Direct(checkpoint=True),
    "2 jumps": DRaFT(jumps=2),
    "4 jumps": DRaFT(jumps=4),
    "4 jumps, checkpoints": DRaFT(jumps=4, checkpoint=True),
    "16 Euler steps": DRaFT(jumps=16),
    "16 Euler steps, checkpoints": DRaFT(jumps=16, checkpoint=True),
}
RACE = ("1 jump", "2 jumps, first trained (default)", "4 jumps", "16 Euler steps")
RATES = (3e-3, 1e-3, 3e-4)


class Updates:
    """Complete updates of one variant: rollout, reward, backward pass, optimiser. A call makes one, and returns its seconds."""

    def __init__(self, name: str, batch: int, rate: float = 1e-3, seed: int = 0, control: float = 1.0) -> None:
        flow_map = steerfm.load("fashion")
        assert isinstance(flow_map, NeuralFlowMap)
        if "Euler" in name:
            flow_map.average_velocity = _euler(flow_map)  # type: ignore[method-assign]
        self.module = FineTuning(
            flow_map, steerfm.reward("classifier", target="Bag"), VARIANTS[name], batch_size=batch, control=control, scale=1.0,
            lr=rate, warmup=1, decay=0.0,
        )  # fmt: skip
        if "Euler" in name:
            self.module.maps[0].average_velocity = _euler(self.module.maps[0])
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.judge = steerfm.reward("judge", target="Bag")
        self.batch, self.step, self.seed = batch, 0, seed

    def __call__(self) -> float:
        start = time.perf_counter()
        tuned, reference = self.module.maps
        tasks = Tasks()[torch.zeros(self.batch).long()]
        noise = Noise([derive(self.seed, "training", self.step, row) for row in range(self.batch)])
        update = Update(
            self.step, 100, tuned, tuned, reference, self.module.rewards[0], tasks, Tasks(), noise,
            stream(self.seed, "update", self.step), self.module.control, 1.0,
        )  # fmt: skip
        loss = self.module.method.loss(update)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return time.perf_counter() - start

    def held_out(self, n: int = 256) -> float:
        """Return the mean of the judge over n samples of this variant, from seeds that are not used in training."""
        tuned, reference = self.module.maps
        law, tasks = self.module.method.law(tuned, reference), Tasks()[torch.zeros(n).long()]
        samples = draw(law, tasks, tuned, list(range(n)))
        with torch.no_grad():
            return tasks.problem(tuned, self.judge).score(samples).total.mean().item()


def _euler(flow_map):
    """Replace u(x, s, t) by the velocity u(x, s, s): a jump becomes an Euler step of the same cost."""
    average = type(flow_map).average_velocity
    return lambda x, s, t, cond: average(flow_map, x, s, s, cond)


def peak_bytes(name: str, batch: int) -> int:
    """Return the peak memory that an update adds to its process, in bytes (Linux with glibc)."""
    updates = Updates(name, 1)
    updates()  # with one sample: allocates permanent memory, such as the optimiser's state
    updates.batch = batch
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    updates()
    return _status("VmHWM") - before


def peak(name: str, batch: int) -> int:
    """Return `peak_bytes`, measured in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _status(key: str) -> int:
    """Return an entry of /proc/self/status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def climb(name: str, target: float, rate: float, seed: int, limit: float) -> dict[str, float]:
    """Return the updates, and their seconds, to reach ``target`` by the judge; infinite if ``limit`` seconds are not enough."""
    updates, seconds = Updates(name, 8, rate, seed), 0.0
    while seconds < limit:
        seconds += updates()
        if updates.held_out() >= target:
            return {"rate": rate, "updates": updates.step, "seconds": seconds}
    return {"rate": rate, "updates": math.inf, "seconds": math.inf}


def race(name: str, target: float, seeds: int, limit: float) -> dict[str, float]:
    """Return medians over the seeds, and the range of the seconds, at the rate that was fastest with the first seed."""
    best = {"rate": RATES[0], "updates": math.inf, "seconds": math.inf}
    for rate in RATES:  # stop a rate that is slower than the best so far
        best = min(best, climb(name, target, rate, 0, min(limit, best["seconds"])), key=lambda run: run["seconds"])
    runs = [best, *(climb(name, target, best["rate"], seed, limit) for seed in range(1, seeds))]
    seconds = [run["seconds"] for run in runs]
    return {key: statistics.median(run[key] for run in runs) for key in best} | {"least": min(seconds), "most": max(seconds)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench backprop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--reach", type=float, metavar="JUDGE", help="also time to this held-out reward; the base has -4.3")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of --reach")
    parser.add_argument("--limit", type=float, default=30, help="seconds of updates after which a run of --reach gives up")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        print(peak_bytes(options.memory_of, options.batch))
        return
    variants = {name: Updates(name, options.batch) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(options.repeats + 1):
        for name, updates in variants.items():
            seconds = updates()
            if repeat:  # the first warms up
                times[name].append(seconds)
    memory = {name: peak(name, options.batch) for name in VARIANTS}
    table = Table("variant", "seconds", "ratio", "MiB", "ratio", title=f"one update of {options.batch} samples")
    rows = {}
    for name in VARIANTS:
        ratio = statistics.median(t / one for t, one in zip(times[name], times["1 jump"]))
        rows[name] = {"seconds": statistics.median(times[name]), "time": ratio, "memory": memory[name] / memory["1 jump"]}
        table.add_row(
            name, f"{rows[name]['seconds']:.3f}", f"{ratio:.2f}", f"{memory[name] / 2**20:.0f}", f"{rows[name]['memory']:.2f}"
        )
    Console().print(table)
    race_rows = {}
    if options.reach is not None:
        title = f"updates of 8 samples until the judge is at {options.reach}: medians of {options.seeds} seeds"
        table = Table("variant", "rate", "updates", "seconds", "from", "to", "MiB", title=title)
        for name in RACE:
            race_rows[name] = race(name, options.reach, options.seeds, options.limit) | {"MiB": peak(name, 8) / 2**20}
            table.add_row(name, *(f"{value:.3g}" for value in race_rows[name].values()))
        Console().print(table)
    default, euler = rows["2 jumps, first trained (default)"], rows["16 Euler steps"]
    print(json.dumps({
        "benchmark": "backprop", "batch": options.batch, "rows": rows,
        "default over 16 Euler steps": {key: round(default[key] / euler[key], 4) for key in ("time", "memory")},
        "reach": race_rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
