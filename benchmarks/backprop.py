"""What a reward-gradient update costs: jumps of a flow map against Euler steps of the same network.

    steerfm bench backprop                    # five minutes on two cores

Times alternate between the variants in one process; memory is the peak that an update adds to a process of its own. Both are
given beside those of one jump, with and without checkpoints. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
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


class Updates:
    """Whole updates of one variant: rollout, reward, backward pass, optimiser."""

    def __init__(self, name: str, batch: int, control: float = 1.0) -> None:
        flow_map = steerfm.load("fashion")
        if "Euler" in name:
            flow_map.average_velocity = _euler(flow_map)  # type: ignore[method-assign]
        self.module = FineTuning(
            flow_map, steerfm.reward("classifier", target="Bag"), VARIANTS[name], batch_size=batch, control=control, scale=1.0
        )
        if "Euler" in name:
            self.module.maps[0].average_velocity = _euler(self.module.maps[0])
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.batch, self.step = batch, 0

    def __call__(self) -> float:
        started = time.perf_counter()
        tuned, reference = self.module.maps
        tasks = Tasks().take(torch.zeros(self.batch).long())
        update = Update(
            self.step, 100, tuned, tuned, reference, self.module.judged[0], tasks, Tasks(), Noise(range(self.batch)),
            torch.Generator().manual_seed(self.step), self.module.control, 1.0,
        )  # fmt: skip
        loss = self.module.method.loss(update)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return time.perf_counter() - started


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


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench backprop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
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
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name, "--batch", str(options.batch)]
        memory[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    table = Table("variant", "seconds", "ratio", "MiB", "ratio", title=f"one update of {options.batch} samples")
    rows = {}
    for name in VARIANTS:
        ratio = statistics.median(t / one for t, one in zip(times[name], times["1 jump"]))
        rows[name] = {"seconds": statistics.median(times[name]), "time": ratio, "memory": memory[name] / memory["1 jump"]}
        table.add_row(
            name, f"{rows[name]['seconds']:.3f}", f"{ratio:.2f}", f"{memory[name] / 2**20:.0f}", f"{rows[name]['memory']:.2f}"
        )
    Console().print(table)
    default, euler = rows["2 jumps, first trained (default)"], rows["16 Euler steps"]
    print(json.dumps({
        "benchmark": "backprop", "batch": options.batch, "rows": rows,
        "default over 16 Euler steps": {key: round(default[key] / euler[key], 4) for key in ("time", "memory")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
