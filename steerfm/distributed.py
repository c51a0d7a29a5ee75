"""Steering on many processes, started by Lightning Fabric: on this machine, or by torchrun or SLURM on many.

>>> def run():                                       # in a file: every process imports it
...     return steerfm.steer("fashion", "brightness", "funnel", n=8, label="Bag")
>>> result = steerfm.distributed.launch(run, devices=8)

Inside, `steerfm.steer` and `steerfm.sample` divide the rows of their network, decoder and reward calls between the processes.
Every process gets the whole result, the same to the bit for any number of processes (`steerfm.spread`). All processes must make
the same calls. Only the `first` one writes files and prints; work of a single process belongs under `alone`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from steerfm.processes import Group, Lost, active, alone, first, join, of_first
from steerfm.signals import Stopped, raised

__all__ = ["active", "alone", "check", "first", "launch", "of_first", "outside", "rank", "size"]
Result = TypeVar("Result")
PATIENCE = timedelta(days=1)
"""Longest wait for another process, which may write a report or call a slow judge."""
EXIT_CODE = 3
"""Exit code of a process that has saved its error for the launcher."""

for _package in ("fabric", "pytorch"):  # hide a banner of four lines
    logging.getLogger(f"lightning.{_package}.utilities.rank_zero").addFilter(lambda line: "backend=" not in line.getMessage())
logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # `launch` reports how processes end


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def torch_group() -> Group | None:
    """The processes that torch has connected, from any launcher; None if there are none. All processes must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    words = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size(), words)


def launch(
    function: Callable[..., Result],
    *args: Any,
    devices: int | str | Sequence[int] = "auto",
    num_nodes: int | None = None,
    accelerator: str = "auto",
    **kwargs: Any,
) -> Result:
    """Call a function in several processes, which share their calls of maps and rewards.

    Args:
        function: called with ``args`` and ``kwargs`` in each process. New processes receive all three by pickle: use a function
            from a file, not from a notebook, and small arguments; load models inside.
        args: positional arguments of the function.
        devices: processes on this machine, one device each: a number, -1 for all GPUs, or a list of GPUs; "auto" for the
            number that torchrun or SLURM started, else one.
        num_nodes: number of machines; default the number that torchrun or SLURM started, else one.
        accelerator: "cpu", "cuda", or "auto" for CUDA if available.
        kwargs: keyword arguments of the function.

    Returns:
        The result of the function in the first process; under torchrun or SLURM that of each process in itself.

    Raises:
        ValueError: devices are missing; several machines without a launcher; or the function cannot be pickled.
        ChildProcessError: a process ended early, which ends all of them.
        Exception: the function failed in a process.
    """
    if not callable(function):
        raise ValueError(f"launch({function!r}): give a function, and its arguments after it")
    if active() is not None:
        raise ValueError("launch: this process is already one of several; call steerfm.steer directly")
    kind, here, nodes = check(devices, num_nodes, accelerator)
    launcher = outside()
    if launcher is None and here in (1, [0]) and nodes == 1:
        return function(*args, **kwargs)
    strategy = DDPStrategy(start_method="spawn" if launcher is None else "popen", timeout=PATIENCE)
    if launcher is not None:
        fabric = _fabric(kind, here, nodes, strategy)
        fabric.launch()
        try:
            with _sharing():
                return function(*args, **kwargs)
        except Lost as error:
            raise ChildProcessError(str(error)) from None
    call = _sendable(function, args, kwargs)
    with tempfile.TemporaryDirectory(prefix="steerfm-") as name:
        box = Path(name)
        (box / "call").write_bytes(call)
        _start(_fabric(kind, here, nodes, strategy), box, (len(here) if isinstance(here, list) else here) * nodes)
        return pickle.loads((box / "result").read_bytes())


def check(
    devices: int | str | Sequence[int] = "auto", num_nodes: int | None = None, accelerator: str = "auto"
) -> tuple[str, int | list[int], int]:
    """Check the arguments of `launch`.

    Returns:
        "cpu" or "cuda"; the number of processes on this machine, or its GPUs; the number of machines.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    kind = _accelerator(accelerator)
    return kind, *_counts(devices, num_nodes, kind, outside())


def outside() -> tuple[int, int] | None:
    """(processes on this machine, machines) from torchrun or SLURM; None without a launcher."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env and "LOCAL_WORLD_SIZE" in env:
        here = int(env["LOCAL_WORLD_SIZE"])
        return here, int(env["WORLD_SIZE"]) // here
    if (
        int(env.get("SLURM_NTASKS", 1)) > 1
        and "SLURM_PROCID" in env
        and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    ):
        nodes = int(env.get("SLURM_NNODES", 1))
        return int(env["SLURM_NTASKS"]) // nodes, nodes
    return None


def _accelerator(name: str) -> str:
    if name not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"accelerator={name!r}: give auto, cpu or cuda")
    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name in ("cuda", "gpu"):
        raise ValueError(f"accelerator={name}: this machine has no CUDA device: use cpu, or leave it out")
    return "cpu"


def _counts(
    devices: int | str | Sequence[int], num_nodes: int | None, kind: str, launcher: tuple[int, int] | None
) -> tuple[int | list[int], int]:
    """The number of processes on this machine, or its devices, and the number of machines.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    nodes = (launcher[1] if launcher else 1) if num_nodes is None else num_nodes
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"num_nodes={nodes!r}: give a number of machines, at least 1")
    here = _devices(devices, kind, launcher)
    count = len(here) if isinstance(here, list) else here
    if launcher and (count, nodes) != launcher:
        raise ValueError(
            f"devices={devices} on num_nodes={nodes}, but {launcher[0]} processes on each of {launcher[1]} machines are "
            "running: leave both out, or start as many"
        )
    if kind == "cuda" and (most := max(here) + 1 if isinstance(here, list) else here) > torch.cuda.device_count():
        raise ValueError(f"devices={devices}: this machine has {torch.cuda.device_count()} CUDA devices, not {most}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
    if nodes > 1 and not launcher and missing:
        raise ValueError(
            f"num_nodes={nodes}: no launcher started the other machines ({', '.join(missing)} not set): use torchrun "
            f"--nnodes={nodes} --nproc-per-node=DEVICES, or srun"
        )
    return here, nodes


def _devices(devices: Any, kind: str, launcher: tuple[int, int] | None) -> int | list[int]:
    fix = "give a number of processes, at least 1, or a list of GPUs, [0, 1]"
    if isinstance(devices, str):
        text = devices.strip()
        try:
            devices = text if text == "auto" else [int(part) for part in text.split(",")] if "," in text else int(text)
        except ValueError:
            raise ValueError(f"devices={devices!r}: {fix}") from None
    if devices == "auto":
        return launcher[0] if launcher else 1
    if isinstance(devices, list | tuple | range) and devices and all(type(n) is int and n >= 0 for n in devices):
        if kind == "cpu":
            raise ValueError(f"devices={list(devices)}: a CPU has no numbers: give devices={len(devices)}")
        if len(set(devices)) < len(devices):
            raise ValueError(f"devices={list(devices)}: a GPU occurs twice")
        return list(devices)
    if devices == -1 and type(devices) is int:
        if kind == "cpu":
            raise ValueError("devices=-1: on a CPU give the number of processes, such as devices=2")
        return torch.cuda.device_count()
    if type(devices) is not int or devices < 1:
        raise ValueError(f"devices={devices!r}: {fix}")
    return devices


def _fabric(kind: str, here: int | list[int], nodes: int, strategy: DDPStrategy) -> Fabric:
    try:
        return Fabric(accelerator=kind, devices=here, num_nodes=nodes, strategy=strategy)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"devices={here}, num_nodes={nodes}: {str(error).strip().splitlines()[0]}") from error


def _sendable(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Pickle a call.

    Raises:
        ValueError: it cannot be pickled; the message names the fix.
    """
    name = getattr(function, "__qualname__", repr(function))
    fix = "write it with def at the top of a .py file and pass what it needs as arguments"
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError("launch: the new processes import this file: put the call under if __name__ == '__main__':")
    main = sys.modules["__main__"]
    nowhere = not getattr(main, "__file__", None) and getattr(main, "__spec__", None) is None
    if isinstance(function, FunctionType) and function.__module__ == "__main__" and nowhere:
        raise ValueError(f"launch({name}): other processes cannot import a function of a notebook or a shell: {fix}")
    try:
        return pickle.dumps((function, args, kwargs))
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"launch({name}): it or an argument cannot be sent to another process ({line}): {fix}") from error


# --- new processes ---------------------------------------------------------------------------------------------------
def _start(fabric: Fabric, box: Path, many: int) -> None:
    """Run the call in a folder in new processes, and wait for them.

    Raises:
        ChildProcessError: a process ended without an error message.
        Exception: the error of the first process that failed.
    """
    before, port = set(multiprocessing.active_children()), os.environ.get("MASTER_PORT")
    try:
        fabric.launch(partial(_work, box=box))
    except (ProcessExitedException, ProcessRaisedException) as error:
        _end(before)
        raise _cause(error, box, many) from None
    except Stopped as error:
        if error.number == signal.SIGINT:  # Ctrl-C reaches all; a second signal would interrupt their last step
            for process in set(multiprocessing.active_children()) - before:
                process.join(5)
        raise
    finally:
        _end(before)
        if port is None:
            os.environ.pop("MASTER_PORT", None)  # it was chosen for this launch


def _cause(error: ProcessExitedException | ProcessRaisedException, box: Path, many: int) -> BaseException:
    """The reason why all processes ended: the first error message, else the process that ended without one."""
    errors = {file.suffix[1:]: pickle.loads(file.read_bytes()) for file in sorted(box.glob("error.*"))}
    for cause in errors.values():
        if not isinstance(cause, Lost | Stopped):
            return cause
    number, how = error.error_index, "ended"
    if isinstance(error, ProcessExitedException):
        name, code = getattr(error, "signal_name", None), error.exit_code
        how = f"was killed ({name})" if name else f"ended with exit code {code}"
        if isinstance(errors.get(str(number)), Stopped):
            how = "was stopped"
        elif str(number) in errors:  # it only noticed that another one ended
            others = [other for other in range(many) if str(other) not in errors and not (box / f"done.{other}").is_file()]
            number, how = (others or [number])[0], "ended"
    if not (box / f"begun.{number}").is_file():
        how += " before it began: is the call of launch under if __name__ == '__main__':?"
    return ChildProcessError(f"process {number} of {many} {how}, which ends all of them")


def _end(before: set[Any]) -> None:
    """End the processes that this launch started and that still run."""
    mine = [process for process in multiprocessing.active_children() if process not in before]
    for process in mine:
        process.terminate()
    for process in mine:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _work(fabric: Fabric, box: Path) -> None:
    """The work of each process: make the call, then save its result or its error."""
    number = fabric.global_rank
    (box / f"begun.{number}").touch()
    try:
        with raised(), _sharing():
            function, args, kwargs = pickle.loads((box / "call").read_bytes())
            result = function(*args, **kwargs)
            if fabric.local_rank == 0:
                (box / "part").write_bytes(pickle.dumps(result))
                (box / "part").rename(box / "result")
        (box / f"done.{number}").touch()
    except BaseException as error:
        (box / f"part.{number}").write_bytes(_pickle(error))
        (box / f"part.{number}").rename(box / f"error.{number}")
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(error, Lost):  # this process must end after the other one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with suppress(KeyboardInterrupt):
                multiprocessing.Event().wait(2)
        os._exit(EXIT_CODE)


def _pickle(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


@contextmanager
def _sharing() -> Iterator[None]:
    """A context in which the processes of torch's default group share their calls; only the first one warns."""
    group = torch_group()
    assert group is not None
    with warnings.catch_warnings():
        if group.rank:
            warnings.simplefilter("ignore")
        join(group)
        try:
            yield
            group.exchange("done")  # the first process serves the others, so it waits for them
        finally:
            join(None)
            if sys.exc_info()[0] is None or not isinstance(sys.exc_info()[1], Lost):
                dist.destroy_process_group()
