"""Kill runs at random moments, continue them, and compare their folders with that of an undisturbed run.

    steerfm bench kills                            30 kills of train and finetune, 20 of steer, bench and evaluate
    steerfm bench kills train --kills 100 --seed 1
    steerfm bench kills workers                    20 kills of the four workers of one sweep, and of four commands on one folder

Each trial is a tiny run in a folder of its own. It gets SIGKILL, SIGTERM and SIGINT in turn, at a random moment of its
duration. It is restarted with the same command, hit again in every second trial, and then runs to its end. All tensors,
numbers, metrics and pictures are compared bit for bit, except times. Exit codes must be 128 + the signal's number (minus the
number for SIGKILL), and 0 at the end. Runs are forks of this process, which has imported everything, so no kill hits an import.

`workers` is one sweep that four processes measure, started by `--workers 4` or by four commands on one folder. At random
moments one of them is killed by SIGKILL, and restarted by the command that started it, or by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from steerfm import cli, training
from steerfm.cli import bench, evaluate, finetune, sample, steer, train  # noqa: F401  for the forks

COMMANDS: dict[str, tuple[int, list[str]]] = {
    "train": (
        30,
        [
            "train", "name=tiny", "network={name: unet, channels: 1, widths: [8], attention: false}",
            "data.root=../data", "data.batch_size=16", "data.augment=2", "objective.start=0", "objective.keep=48",
            "objective.uses=4", "objective.shares={lagrangian: 0.25, trajectory: 0.25}", "optimizer.steps=24",
            "trainer.log_every=1", "trainer.save_every=4", "trainer.validate_every=6", "trainer.sample_every=8",
        ],
    ),
    "finetune": (
        30,
        [
            "finetune", "reward=classifier", "reward.target=Bag", "batch_size=4", "watch.n=8", "watch.report=12",
            "watch.every=2", "optimizer.steps=6", "trainer.save_every=2", "trainer.log_every=1", "distil.steps=4",
            "distil.samples=8", "distil.batch_size=8",
        ],
    ),
    "steer": (
        20,
        [
            "steer", "reward=brightness", "judge=null", "n=16", "batch_size=2", "method=feynman_kac", "method.particles=4",
            "method.steps=4",
        ],
    ),
    "bench": (20, ["bench", "../suite.yaml", "seeds=4"]),
    "evaluate": (20, ["evaluate", "n=64", "steps=[1,2]", "euler=4", "batch_size=16"]),
}  # fmt: skip
"""Default number of kills, and the command; ``out=run`` is appended."""
SUITE = """
problems: {bright: {reward: {name: brightness}, judge: {name: symmetry}}}
methods: {best_of_n: {steps: 1}, feynman_kac: {}}
budgets: [8]
n: 2
"""
KINDS = [*COMMANDS, "workers"]
WORKERS = 4
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = {"seconds", "peak_bytes", "train/seconds", "commit"}
"""Keys that may differ between runs: times, and the commit of the library."""


# --- runs ------------------------------------------------------------------------------------------------------------
def start(command: list[str], folder: Path) -> int:
    """Fork a run in ``folder``; return its process id once the run has started."""
    folder.mkdir(exist_ok=True)
    ready, write = os.pipe()
    if child := os.fork():
        os.close(write)
        os.read(ready, 1)
        os.close(ready)
        return child
    code = 99
    try:
        os.close(ready)
        os.chdir(folder)
        with open("log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        # until the command line installs its own handler
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        os.write(write, b"1")
        code = cli.main([*command, "out=run"])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Wait for a child, and return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trial(command: list[str], folder: Path, number: int, seconds: float, draw: random.Random) -> list[str]:
    """Hit a run once or twice, then let it end; return a list of faults."""
    wrong = []
    for hit in range(1 + number % 2):
        sign = SIGNALS[(number + hit) % len(SIGNALS)]
        child = start(command, folder)
        time.sleep(draw.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, sign)
        code = wait(child)
        right = -sign if sign == signal.SIGKILL else 128 + sign
        if code not in (right, 0):
            wrong.append(f"{sign.name} gave exit code {code}")
        if code == right and sign != signal.SIGKILL and "same command" not in (folder / "log.txt").read_text():
            wrong.append(f"{sign.name} left no line")
    if code := wait(start(command, folder)):
        wrong.append(f"continued, it gave exit code {code}")
    return wrong


def commands_killed(command: list[str], folder: Path, kills: int, seconds: float, draw: random.Random) -> list[str]:
    """Start one command `WORKERS` times at once, and again for each that is killed; return a list of faults."""
    children = [start(command, folder) for _ in range(WORKERS)]
    for _ in range(kills):
        time.sleep(draw.uniform(0, seconds))
        hit = draw.randrange(WORKERS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[hit], signal.SIGKILL)
        wait(children[hit])
        children[hit] = start(command, folder)
    return [f"a command gave exit code {code}" for code in map(wait, children) if code]


def workers_killed(command: list[str], folder: Path, kills: int, seconds: float, draw: random.Random) -> list[str]:
    """Start one command with `WORKERS` workers, and kill some of them; return a list of faults."""
    command_ = start([*command, f"workers={WORKERS}"], folder)
    hits = 0
    while hits < kills and os.waitpid(command_, os.WNOHANG) == (0, 0):
        time.sleep(draw.uniform(0, seconds))
        workers = Path(f"/proc/{command_}/task/{command_}/children").read_text().split()
        if len(workers) == WORKERS:
            os.kill(int(draw.choice(workers)), signal.SIGKILL)
            hits += 1
    if hits < kills:
        return [f"it ended after {hits} kills"]
    code = wait(command_)
    return [f"it gave exit code {code}"] if code else []


def check_workers(folder: Path, kills: int, seed: int) -> list[str]:
    """Compare sweeps of several processes with a sweep of one; return a list of faults."""
    command = ["bench", "../suite.yaml", f"seeds={max(8, 3 * kills)}", "batch_size=1"]
    began = time.monotonic()
    if code := wait(start(command, folder / "workers-whole")):
        return [f"  exit code {code}"]
    seconds, whole = time.monotonic() - began, contents(folder / "workers-whole" / "run")
    faults = []
    for name, kill in (("commands", commands_killed), ("workers", workers_killed)):
        at = folder / f"workers-{name}"
        wrong = kill(command, at, kills, seconds / kills, random.Random(f"{seed} {name}"))
        after = contents(at / "run")
        for run in (whole, after):
            run.get("summary.json", {}).pop("command", None)  # it contains the number of workers
        wrong += differences(whole, after)
        cells = len(list((at / "run" / "cells").glob("*.safetensors")))
        print(
            f"workers: {kills} kills of {WORKERS} {name}, {cells} cells, {'different' if wrong else 'as if contents alone'}",
            flush=True,
        )
        faults += [f"  {name}: {'; '.join(wrong)}"] if wrong else []
    return faults


# --- run folders -----------------------------------------------------------------------------------------------------
def contents(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder by file, without times."""
    out: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("tensorboard") or "checkpoints/" in name or path.name in (".lock", ".claims"):
            continue
        reader = READERS.get(path.suffix)
        if path.suffix == ".png":
            if not path.name.startswith("curves"):  # these include times
                out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif reader is not None:
            out[name] = reader(path)
        elif path.suffix not in (".html", ".md") and "tfevents" not in name:
            out[name] = "there"
    return out


def _tensors(path: Path) -> dict[str, Any]:
    tensors = {name: value for name, value in load_file(path).items() if name not in TIMES}
    if "facts" in tensors:  # of a cell: the last one is its seconds
        tensors["facts"] = tensors["facts"][:-1]
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [_timeless(row) for row in csv.DictReader(file)]


def _lines(path: Path) -> Any:
    """Return the lines in order. A continued training may repeat steps: take the last line of each."""
    lines = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return _timeless(training.history(path.parent)) if lines and next(iter(lines[0])) == "step" else lines


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _tensors,
    ".json": lambda path: _timeless(json.loads(path.read_text())),
    ".jsonl": _lines,
    ".csv": _rows,
    ".yaml": Path.read_text,
}


def differences(whole: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return a line for each file that is missing, left over or different."""
    missing = [f"{name} is missing" for name in whole if name not in other]
    more = [f"{name} is left over" for name in other if name not in whole]
    return missing + more + [f"{name} differs" for name in whole if name in other and whole[name] != other[name]]


# --- the command line ------------------------------------------------------------------------------------------------
def prepare(folder: Path) -> None:
    """Write training data of 28 x 28 pixels, and a suite."""
    (folder / "data").mkdir()
    random_ = np.random.default_rng(0)
    for prefix, n in (("train", 256), ("t10k", 32)):
        for kind, values in (
            ("images-idx3", random_.integers(0, 256, (n, 28, 28))),
            ("labels-idx1", np.arange(n) % 10),
        ):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(head + values.astype(np.uint8).tobytes())
            (folder / "data" / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
    (folder / "suite.yaml").write_text(SUITE)


def main(arguments: list[str] | None = None) -> None:
    """Run the trials and print a line for each command; the exit code is 1 if any trial failed."""
    parser = argparse.ArgumentParser(prog="steerfm bench kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commands", nargs="*", metavar="command", help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--kills", type=int, help="trials of each command")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--keep", help="folder to keep the runs in; by default they are deleted")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.commands if name not in KINDS]:
        parser.error(f"unknown command {unknown[0]}: one of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    failures = 0
    with contextlib.ExitStack() as stack:
        folder = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        for name in options.commands or KINDS:
            if name == "workers":
                faults = check_workers(folder, options.kills or 20, options.seed)
                print("\n".join(faults), end="\n" if faults else "", flush=True)
                failures += len(faults)
                continue
            kills, command = COMMANDS[name]
            kills = options.kills or kills
            began = time.monotonic()
            if code := wait(start(command, folder / f"{name}-whole")):
                print(f"{name}: exit code {code}\n{(folder / f'{name}-whole' / 'log.txt').read_text()}")
                failures += 1
                continue
            seconds, whole = time.monotonic() - began, contents(folder / f"{name}-whole" / "run")
            draw, faults = random.Random(f"{options.seed} {name}"), []
            for number in range(kills):
                at = folder / f"{name}-{number:03d}"
                wrong = trial(command, at, number, seconds, draw)
                if not wrong or not wrong[-1].startswith("continued"):
                    wrong += differences(whole, contents(at / "run"))
                if wrong:
                    faults.append(f"  trial {number}: {'; '.join(wrong)}")
            hits = kills + kills // 2
            print(f"{name}: {kills} runs, {hits} signals, {kills - len(faults)} of {kills} as if left alone", flush=True)
            print("\n".join(faults), end="\n" if faults else "", flush=True)
            failures += len(faults)
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
