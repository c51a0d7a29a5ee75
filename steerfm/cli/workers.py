"""Several processes that measure the cells of one folder. Each takes cells that no other has claimed; a dead process loses its
claim.

The processes share nothing but the folder, so commands on several machines share the work like the workers of one command.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerfm.cli.console import console
from steerfm.files import Claims
from steerfm.signals import Stopped, raised

POLL = 0.2
"""Seconds between checks of the other processes."""
DEATHS = 25
"""Workers that may be killed in a row without a finished cell; after that the cell itself is the likely cause."""
LAUNCHERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
    ("RANK", "WORLD_SIZE"),
)
"""Environment variables that SLURM and torchrun set in their processes: number of the process, and of processes."""


def share_out(folder: Path, names: Sequence[str], make: Callable[[int], None], tick: Callable[[int, int], None]) -> None:
    """Do all tasks of a folder, together with any other processes; returns when all are done.

    Args:
        folder: folder of the lock file.
        names: names of the tasks.
        make: does task i, unless its result exists.
        tick: called with the number of finished tasks, and of all tasks.
    """
    remaining = list(range(len(names)))
    with Claims(folder) as claims:
        while remaining:
            others = []
            for count, number in enumerate(remaining, len(names) - len(remaining) + 1):
                with claims.of(names[number]) as mine:
                    if mine:
                        make(number)
                    else:
                        others.append(number)
                tick(count - len(others), len(names))
            if len(others) == len(remaining):
                time.sleep(POLL)
            remaining = others


def launcher() -> str:
    """Return the environment variable that shows that a launcher started several processes; empty if none did."""
    return next((name for name, many in LAUNCHERS if name in os.environ and int(os.environ.get(many, "1")) > 1), "")


def device_of(device: str, number: int) -> str:
    """Return the device of worker ``number`` of a machine. With several GPUs and no choice, workers take them in turn."""
    many = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    return f"cuda:{number % many}" if many > 1 else device


def local_number() -> int:
    """Return the number of this process on its machine, from its launcher."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def threads(workers: int) -> int:
    """Return the threads per worker: $OMP_NUM_THREADS, or an equal share of the machine's cores."""
    if workers == 1:
        return torch.get_num_threads()
    setting = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(setting) if setting.isdigit() and int(setting) else max(1, cores // workers)


# --- the process that starts them --------------------------------------------------------------------------------------
@dataclass
class Worker:
    """A worker process.

    Attributes:
        process: the process.
        log: file of its standard error.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def error(self) -> str:
        """Return the last line of its standard error."""
        return self.log.read_text(errors="replace").strip().rpartition("\n")[2]


def run_workers(
    calls: Sequence[tuple[str, Any]], count_done: Callable[[], int], total: int, tick: Callable[[int, int], None]
) -> None:
    """Run workers until all have finished. A killed worker is replaced, and all of them end with this process.

    Args:
        calls: "module:function" and its argument, for each worker.
        count_done: returns the number of finished tasks.
        total: number of tasks.
        tick: called with both numbers.

    Raises:
        ChildProcessError: a worker failed, with its message; or workers were killed again and again.
    """
    deaths, before = 0, -1
    with tempfile.TemporaryDirectory(prefix="steerfm-") as box, _workers() as workers:
        workers.update({number: _start(call, len(calls), Path(box)) for number, call in enumerate(calls)})
        while workers:
            time.sleep(POLL)
            if (count := count_done()) > before:
                deaths, before = 0, count
            tick(count, total)
            for number, worker in list(workers.items()):
                code = worker.process.poll()
                if code is None:
                    continue
                del workers[number]
                if 0 < code < 128:
                    raise ChildProcessError(worker.error() or f"a worker ended with exit code {code}")
                if code:
                    deaths += 1
                    how = _signal(code)
                    if deaths > DEATHS:
                        raise ChildProcessError(
                            f"{deaths} workers were killed ({how}) and no cell was finished: is there enough memory?"
                        )
                    console.print(f"a worker was killed ({how}): starting another")
                    workers[number] = _start(calls[number], len(calls), Path(box))


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return f"exit code {code}"


CHILD = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from steerfm.cli.workers import child; child()"


def _start(call: tuple[str, Any], workers: int, box: Path) -> Worker:
    """Start a worker: not by fork, which breaks CUDA and threads, and in its own session, so that Ctrl-C does not reach it."""
    many = {"OMP_NUM_THREADS": str(threads(workers))}
    number, name = tempfile.mkstemp(dir=box)
    with os.fdopen(number, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
            env=os.environ | many, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # it may have been killed already
        pipe.write(pickle.dumps(sys.path) + pickle.dumps((os.getpid(), *call)))
    return Worker(process, Path(name))


@contextmanager
def _workers() -> Iterator[dict[int, Worker]]:
    """Yield the dictionary of workers; stop those that remain at the end."""
    workers: dict[int, Worker] = {}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


# --- a worker ----------------------------------------------------------------------------------------------------------
def child() -> None:
    """Entry point of a worker: run the call that is pickled on its standard input."""
    parent, name, argument = pickle.load(sys.stdin.buffer)
    console.quiet = True
    module, _, function = name.partition(":")
    from importlib import import_module

    def check() -> None:
        if os.getppid() != parent:
            raise Stopped(signal.SIGTERM)

    try:
        with raised():
            getattr(import_module(module), function)(argument, check)
    except Stopped as stop:
        sys.exit(128 + stop.number)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
