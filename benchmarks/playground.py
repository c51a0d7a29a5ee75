"""Runs of the playground one after the other: the time from the form to the picture, and the memory of the process.

    python benchmarks/playground.py --runs 50

The first run is that of a page which was just opened: the imports are done, as `steerfm play` does them before it serves.
"""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from steerfm.cli.config import PlayConfig
from steerfm.cli.console import console
from steerfm.cli.pages import comparison, plot, summary
from steerfm.cli.playground import Playground, Result


def resident() -> float:
    """MiB that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=50, help="runs after the first")
    runs = options.parse_args().runs
    console.quiet = True
    root = Path(tempfile.mkdtemp())
    play = Playground(PlayConfig(), root)
    play.warm()
    small = replace(play.initial(), method="feynman_kac", settings="particles=4 steps=4", n=2)
    for number in range(runs + 1):
        form = small if number else play.initial()
        begin, busy = time.perf_counter(), time.process_time()
        for event in play.steer(play.task(replace(form, seed=number)), threading.Event()):
            if isinstance(event, Result):
                texts = summary(event), comparison(event), plot(event.folder / "trace.png"), event.archive
                assert all(texts)
        gc.collect()
        seconds, processor = time.perf_counter() - begin, time.process_time() - busy
        if number < 2 or number % 10 == 0:
            print(f"run {number:3}: {seconds:5.1f} s, {processor:4.1f} s of one core, {resident():5.0f} MiB", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
