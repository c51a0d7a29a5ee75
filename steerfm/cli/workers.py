"""Several processes that measure the cells of one folder: each takes what nobody else claims, and a dead one's cell is free.

They know nothing of each other but the folder: commands on several machines share the work as those do that one command starts.
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
"""Seconds between looks at what others do."""
DEATHS = 25
"""Workers that may die with no cell finished in between; then a cell is what kills them."""
LAUNCHERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
    ("RANK", "WORLD_SIZE"),
)
"""What SLURM and torchrun tell each of the processes that they start: its number, and how many there are."""


def share_out(folder: Path, names: Sequence[str], make: Callable[[int], None], tick: Callable[[int, int], None]) -> None:
    """Make all pieces of work of a folder, each by one of the processes that are at it; returns when all are made.

    Args:
        folder: of the lock file.
        names: of the pieces.
        make: makes piece i, unless it is there.
        tick: called with how many are made, and how many there are.
    """
    left = list(range(len(names)))
    with Claims(folder) as claims:
        while left:
            others = []
            for done, number in enumerate(left, len(names) - len(left) + 1):
                with claims.of(names[number]) as mine:
                    if mine:
                        make(number)
                    else:
                        others.append(number)
                tick(done - len(others), len(names))
            if len(others) == len(left):
                time.sleep(POLL)
            left = others


def launched() -> str:
    """The launcher's variable that says that this process is one of several; empty where it is not."""
    return next((name for name, many in LAUNCHERS if name in os.environ and int(os.environ.get(many, "1")) > 1), "")


def device_of(device: str, number: int) -> str:
    """The device of worker ``number`` of a machine: where there are several GPUs and nobody says which, they take turns."""
    many = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    return f"cuda:{number % many}" if many > 1 else device


def local_number() -> int:
    """The number of this process on its machine, by its launcher."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def threads(workers: int) -> int:
    """Threads of each of some workers of this machine: $OMP_NUM_THREADS, else its cores shared out."""
    if workers == 1:
        return torch.get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(told) if told.isdigit() and int(told) else max(1, cores // workers)


# --- the process that starts them --------------------------------------------------------------------------------------
@dataclass
class Worker:
    """A process that measures. ``said`` is the file of its standard error."""

    process: subprocess.Popen[bytes]
    said: Path

    def error(self) -> str:
        """Its last line."""
        return self.said.read_text(errors="replace").strip().rpartition("\n")[2]


def run_workers(
    calls: Sequence[tuple[str, Any]], done: Callable[[], int], total: int, tick: Callable[[int, int], None]
) -> None:
    """Run workers until all of them end; one that was killed is replaced, and all end with this process.

    Args:
        calls: "module:function" and its argument, of each.
        done: how many pieces of work there are by now, of ``total``.
        tick: called with both.

    Raises:
        ChildProcessError: one failed, in its words; or one after the other was killed.
    """
    deaths, before = 0, -1
    with tempfile.TemporaryDirectory(prefix="steerfm-") as box, _ended_with_this() as workers:
        workers.update({number: _start(call, len(calls), Path(box)) for number, call in enumerate(calls)})
        while workers:
            time.sleep(POLL)
            if (made := done()) > before:
                deaths, before = 0, made
            tick(made, total)
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
                            f"{deaths} workers were killed ({how}) and no cell was finished: is there memory?"
                        )
                    console.print(f"a worker was killed ({how}): another takes its place")
                    workers[number] = _start(calls[number], len(calls), Path(box))


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return f"exit code {code}"


CHILD = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from steerfm.cli.workers import child; child()"


def _start(call: tuple[str, Any], workers: int, box: Path) -> Worker:
    """A new process: no fork, which CUDA and threads do not survive; in a session of its own, which Ctrl-C does not reach."""
    many = {"OMP_NUM_THREADS": str(threads(workers))}
    number, name = tempfile.mkstemp(dir=box)
    with os.fdopen(number, "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said,
            env=os.environ | many, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # it may be killed by now
        pipe.write(pickle.dumps(sys.path) + pickle.dumps((os.getpid(), *call)))
    return Worker(process, Path(name))


@contextmanager
def _ended_with_this() -> Iterator[dict[int, Worker]]:
    """The workers; at the end those that are still there are stopped."""
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
    """What a worker does: the call that stands on its standard input."""
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
