"""What a reward-gradient update costs: jumps of a flow map against Euler steps of the same network.

    steerfm bench backprop                 # five minutes on two cores
    steerfm bench backprop --reach -.5     # and how long each takes to that held-out judgement: eight minutes

Times alternate between the variants in one process; memory is the peak that an update adds to a process of its own. Both are
given beside those of one jump, with and without checkpoints. Prints a table, then one JSON line.

``--reach``: from no class to the class Bag, 256 samples, as the variant itself draws them, judged after every update. The clock
counts updates only. Each variant has the learning rate that got it there first with the first seed.
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
    """Whole updates of one variant: rollout, reward, backward pass, optimiser."""

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
        started = time.perf_counter()
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
        return time.perf_counter() - started

    def held_out(self, n: int = 256) -> float:
        """Mean of the judge over n samples, drawn as this variant draws them, from seeds that it never trains on."""
        tuned, reference = self.module.maps
        law, tasks = self.module.method.law(tuned, reference), Tasks()[torch.zeros(n).long()]
        samples = draw(law, tasks, tuned, list(range(n)))
        with torch.no_grad():
            return tasks.problem(tuned, self.judge).score(samples).total.mean().item()


def _euler(flow_map):
    """u(x, s, t) replaced by the velocity u(x, s, s): a jump becomes an Euler step of the same cost."""
    average = type(flow_map).average_velocity
    return lambda x, s, t, cond: average(flow_map, x, s, s, cond)


def peak_bytes(name: str, batch: int) -> int:
    """What an update adds to the memory of its process at its peak (Linux with glibc)."""
    updates = Updates(name, 1)
    updates()  # of one sample: allocates what stays, such as the optimiser's state
    updates.batch = batch
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    updates()
    return _status("VmHWM") - before


def peak(name: str, batch: int) -> int:
    """`peak_bytes` of a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def climb(name: str, target: float, rate: float, seed: int, limit: float) -> dict[str, float]:
    """Updates, and their seconds, until the judge says ``target``; infinite where ``limit`` seconds do not get there."""
    updates, seconds = Updates(name, 8, rate, seed), 0.0
    while seconds < limit:
        seconds += updates()
        if updates.held_out() >= target:
            return {"rate": rate, "updates": updates.step, "seconds": seconds}
    return {"rate": rate, "updates": math.inf, "seconds": math.inf}


def race(name: str, target: float, seeds: int, limit: float) -> dict[str, float]:
    """Medians over the seeds, and the range of the seconds, at the rate that was quickest with the first seed."""
    best = {"rate": RATES[0], "updates": math.inf, "seconds": math.inf}
    for rate in RATES:  # one that is slower than another was is stopped there
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
    parser.add_argument("--reach", type=float, metavar="JUDGE", help="time to this judgement too; the base is at -4.3")
    parser.add_argument("--seeds", type=int, default=3, help="of --reach")
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
    raced = {}
    if options.reach is not None:
        title = f"updates of 8 samples until the judge says {options.reach}: medians of {options.seeds} seeds"
        table = Table("variant", "rate", "updates", "seconds", "from", "to", "MiB", title=title)
        for name in RACE:
            raced[name] = race(name, options.reach, options.seeds, options.limit) | {"MiB": peak(name, 8) / 2**20}
            table.add_row(name, *(f"{value:.3g}" for value in raced[name].values()))
        Console().print(table)
    default, euler = rows["2 jumps, first trained (default)"], rows["16 Euler steps"]
    print(json.dumps({
        "benchmark": "backprop", "batch": options.batch, "rows": rows,
        "default over 16 Euler steps": {key: round(default[key] / euler[key], 4) for key in ("time", "memory")},
        "reach": raced,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
