"""Time the same steering run on one and on several processes, one thread each; the samples must be bit-identical.

python benchmarks/processes.py --processes 2 --repeats 5
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch

import steerfm
from steerfm import distributed


def measure(repeats: int, particles: int, guided: bool) -> tuple[float, float, torch.Tensor]:
    """Return wall seconds of the fastest repeat after a warm-up, processor seconds of the busiest process, and the samples."""
    torch.set_num_threads(1)
    flow_map, reward = steerfm.load("emoji"), steerfm.reward("clip", prompt="a red heart")
    method = steerfm.FMRGJ(particles, 4) if guided else steerfm.FeynmanKac(particles, 4)
    seconds, busy, samples = [], [], torch.empty(0)
    for _ in range(repeats + 1):
        begin, work = time.perf_counter(), time.process_time()
        samples = steerfm.steer(flow_map, reward, method, n=1, cond="a red heart", strength=20.0).samples
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - work)
    group = distributed.active()
    busiest = max(group.exchange(min(busy[1:]))) if group else min(busy[1:])
    return min(seconds[1:]), busiest, samples


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="repeats; the fastest one counts")
    parser.add_argument("--particles", type=int, default=64)
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"emoji, clip, {options.particles} particles, 4 steps, one thread per process; the fastest of {options.repeats}")
    for guided in (False, True):
        name = "guided (fmrg_j)" if guided else "particles (feynman_kac)"
        alone, work, expected = measure(options.repeats, options.particles, guided)
        many, share, samples = distributed.launch(
            measure, options.repeats, options.particles, guided, devices=options.processes
        )
        same = "the same bits" if torch.equal(expected, samples) else "other bits"
        print(f"{name}: {alone:.2f} s by one, {many:.2f} s by {options.processes} ({many / alone:.2f}); of the processor")
        print(f"  {work:.2f} s and {share:.2f} s in the busiest process ({share / work:.2f}); {same}", flush=True)


if __name__ == "__main__":
    main()
