"""Sweeps by many processes: each cell once, nothing lost by a kill, tables once, and the numbers of one process."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steerfm import cli
from steerfm.cli import bench, workers
from steerfm.cli.bench import Problem, sweep
from steerfm.cli.config import BenchConfig
from steerfm.cli.loading import load
from steerfm.files import Claims

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks here")
SUITE = """
problems:
  bright: {reward: {name: brightness}, judge: {name: symmetry}}
  small: {reward: {name: compressibility}, judge: null, strength: 3}
methods: {best_of_n: {steps: 1}, feynman_kac: {}, uphill: {name: fmrg_j, steps: 1}}
budgets: [8]
n: 2
"""  # compressibility has no gradient: the cells of uphill are empty there
TIMES = {"seconds"}


@pytest.fixture
def suite(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text(SUITE)
    return str(file)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    """As workers have; a fork of a process whose threads have worked must not use them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forked(call: Callable[[], Any]) -> int:
    """The process that makes a call; its exit code is what the call returns."""
    if child := os.fork():
        return child
    code = 99
    try:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        code = call() or 0
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "cells.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def summary(folder: Path) -> list[dict[str, Any]]:
    lines = json.loads((folder / "summary.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def until(done: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (what := done()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return what


# --- claims ----------------------------------------------------------------------------------------------------------
def free(folder: Path, names: list[str]) -> list[bool]:
    """Which pieces another process could have."""

    def look() -> int:
        with Claims(folder) as claims:
            bits = 0
            for number, name in enumerate(names):
                with claims.of(name) as mine:
                    bits |= mine << number
        return bits

    bits = ended(forked(look))
    return [bool(bits >> number & 1) for number in range(len(names))]


def test_a_piece_is_one_processs_until_it_is_done(tmp_path: Path):
    folder, names = tmp_path / "new", ["a", "b", "cells/0123"]
    with Claims(folder) as claims:
        for mine in names:
            with claims.of(mine) as got:
                assert got and free(folder, names) == [name != mine for name in names]
            assert free(folder, names) == [True] * 3
        with pytest.raises(ZeroDivisionError), claims.of("a"):
            raise ZeroDivisionError
        assert free(folder, names) == [True] * 3
        with claims.of("a"), claims.of("b"):
            assert free(folder, names) == [False, False, True]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_process_claimed_is_free(tmp_path: Path, sign: signal.Signals):
    def hold() -> None:
        with Claims(tmp_path) as claims, claims.of("a"):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = forked(hold)
    until((tmp_path / "held").exists)
    with Claims(tmp_path) as claims:
        with claims.of("a") as mine:
            assert not mine
        began = time.monotonic()
        other = forked(lambda: time.sleep(0.3) or os.kill(child, sign))
        with claims.of("a", wait=True) as mine:
            assert mine and time.monotonic() - began > 0.25
    assert ended(child) != 0 == ended(other)


def test_work_is_shared_out_and_each_piece_made_once(tmp_path: Path):
    """Five processes, pieces of random lengths; one is killed in a piece, which another makes."""
    names = [f"piece {number}" for number in range(40)]
    log = tmp_path / "log"

    def at_it(seed: int) -> None:
        chance = random.Random(seed)

        def make(number: int) -> None:
            if (tmp_path / names[number]).exists():
                return
            if seed == 0 and len(log.read_text().splitlines()) >= 3:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(chance.uniform(0, 0.01))
            with log.open("a") as file:
                file.write(f"{seed} {number}\n")
            (tmp_path / names[number]).touch()

        told: list[tuple[int, int]] = []
        workers.share_out(tmp_path, names, make, lambda *of: told.append(of))
        assert told[-1] == (40, 40) and all(0 <= done <= 40 for done, _ in told)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert all((tmp_path / name).exists() for name in names)  # nobody leaves before all is made

    log.touch()
    children = [forked(lambda seed=seed: at_it(seed)) for seed in range(5)]
    assert [ended(child) for child in children] == [-signal.SIGKILL, 0, 0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(number) for _, number in lines) == list(range(40))
    assert len({seed for seed, _ in lines}) >= 3


# --- sweeps ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """What all processes measured and wrote so far."""
    measure, write = Problem.measure, bench._write

    def log(name: str, line: str) -> None:
        with (tmp_path / name).open("a") as file:
            file.write(f"{line}\n")

    def slow(self: Problem, method: Any, seed: int) -> dict[str, torch.Tensor]:
        cell = measure(self, method, seed)
        time.sleep(0.03)
        log("measured", f"{self.name} {type(method).__name__} {seed}")
        return cell

    monkeypatch.setattr(Problem, "measure", slow)
    monkeypatch.setattr(bench, "_write", lambda *of: log("written", str(os.getpid())) or write(*of))
    return lambda name: (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []


@pytest.mark.slow
def test_commands_on_one_folder_share_the_cells_and_one_writes(suite: str, tmp_path: Path, counted: Callable[[str], list[str]]):
    assert cli.main(["bench", suite, f"out={tmp_path / 'alone'}"]) == 0
    once = sorted(counted("measured"))
    assert len(once) == len(set(once)) == (4 + 3) * 4
    (tmp_path / "measured").unlink()
    (tmp_path / "written").unlink()
    out = tmp_path / "shared"
    children = [forked(lambda: cli.main(["bench", suite, f"out={out}"])) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert sorted(counted("measured")) == once and len(counted("written")) == 1
    assert rows(out) == rows(tmp_path / "alone") and summary(out) == summary(tmp_path / "alone")
    assert cli.main(["bench", suite, f"out={out}", "difference=[feynman_kac,best_of_n]"]) == 0  # other tables of the same cells
    assert sorted(counted("measured")) == once and len(counted("written")) == 2


@pytest.mark.slow
def test_killed_commands_lose_and_repeat_no_cell(suite: str, tmp_path: Path, counted: Callable[[str], list[str]]):
    """Four at once, six random kills, each dead one's command given again."""
    assert cli.main(["bench", suite, f"out={tmp_path / 'alone'}"]) == 0
    whole, chance, out = sorted(counted("measured")), random.Random(0), tmp_path / "killed"
    (tmp_path / "measured").unlink()

    def start() -> int:
        return forked(lambda: cli.main(["bench", suite, f"out={out}", "seeds=4"]))

    children, kills = [start() for _ in range(4)], 0
    while kills < 6:
        time.sleep(chance.uniform(0, 0.3))
        hit = chance.randrange(4)
        os.kill(children[hit], signal.SIGKILL)
        kills += ended(children[hit]) == -signal.SIGKILL
        children[hit] = start()
    assert [ended(child) for child in children] == [0] * 4
    assert set(counted("measured")) == set(whole)
    assert rows(out) == rows(tmp_path / "alone") and summary(out) == summary(tmp_path / "alone")
    assert not list(out.rglob("*.tmp"))


def test_a_command_waits_for_a_cell_that_another_measures(suite: str, tmp_path: Path, counted: Callable[[str], list[str]]):
    """The one that is stopped in a cell holds it; when it dies, the other one measures it."""
    run = ["bench", suite, f"out={tmp_path / 'out'}", "only=[best_of_n]"]
    first = forked(lambda: cli.main(run))
    until(lambda: len(counted("measured")) > 2)
    os.kill(first, signal.SIGSTOP)
    second = forked(lambda: cli.main(run))
    until(lambda: len(counted("measured")) >= 15)
    time.sleep(0.5)
    assert os.waitpid(second, os.WNOHANG) == (0, 0) and not counted("written")
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL and ended(second) == 0
    assert len(set(counted("measured"))) == 16 and counted("written") == [str(second)]


@pytest.mark.slow
def test_workers_of_one_command_give_the_numbers_of_one(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also from Python; and one that is killed is replaced."""
    assert cli.main(["bench", suite, f"out={tmp_path / 'alone'}"]) == 0
    start, started = workers._start, []

    def mortal(*of: Any) -> workers.Worker:
        started.append(start(*of))
        if len(started) < 2:
            started[0].process.kill()
        return started[-1]

    monkeypatch.setattr(workers, "_start", mortal)
    sweep(load(BenchConfig, suite, ["workers=2", f"out={tmp_path / 'python'}"]), "small")
    assert len(started) == 3 and rows(tmp_path / "python") == rows(tmp_path / "alone")
    assert summary(tmp_path / "python") == summary(tmp_path / "alone")


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_command(suite: str, tmp_path: Path, sign: signal.Signals):
    run = [sys.executable, "-m", "steerfm", "bench", suite, "--workers=2", f"out={tmp_path / 'out'}", "seeds=40"]
    command = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(list((tmp_path / "out").glob("cells/*.safetensors"))) > 2)
    mine = children_of(command.pid)
    assert len(mine) == 2
    command.send_signal(sign)
    said = command.communicate(timeout=30)[1]
    assert command.returncode == (-sign if sign == signal.SIGKILL else 128 + sign)
    assert (sign == signal.SIGKILL) or said.strip().splitlines() == ["stopped; the same command continues where it was"]
    until(lambda: not any(Path(f"/proc/{worker}/cmdline").exists() for worker in mine), 20)
    assert not (tmp_path / "out" / "cells.csv").exists()


FAULTY = """
import torch
def faulty(images):
    if len(images) > 1:
        raise ValueError("this reward has had enough")
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
def test_the_error_of_a_worker_is_that_of_the_command(suite: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "own.py").write_text(FAULTY)
    own = f"problems.own={{reward: '{tmp_path / 'own.py'}:faulty', judge: null}}"
    assert cli.main(["bench", suite, "--workers", "2", f"out={tmp_path / 'out'}", own]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and "this reward has had enough" in said[0]


def test_a_cell_that_kills_every_worker_ends_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(workers, "CHILD", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(workers, "DEATHS", 5)
    monkeypatch.setattr(workers, "POLL", 0.01)
    with pytest.raises(ChildProcessError, match=r"^6 workers were killed .SIGKILL. and no cell was finished"):
        workers.run_workers([("m:f", None)] * 2, lambda: 3, 9, lambda *_: None)


def test_a_worker_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch):
    start, began = workers._start, []

    def started(call: tuple[str, Any], many: int, box: Path) -> workers.Worker:
        monkeypatch.setattr(workers, "CHILD", call[0])
        began.append(start(call, many, box))
        return began[-1]

    monkeypatch.setattr(workers, "_start", started)
    calls = [("import time; time.sleep(60)", None), ("import sys; sys.exit('the one line')", None)]
    with pytest.raises(ChildProcessError, match=r"^the one line$"):
        workers.run_workers(calls, lambda: 0, 9, lambda *_: None)
    assert [worker.process.poll() for worker in began] == [-signal.SIGTERM, 1]


# --- threads, devices, refusals ---------------------------------------------------------------------------------------
def test_workers_share_the_cores_unless_somebody_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert workers.threads(4) == 1  # it is set
    for unset in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", unset)
        assert [workers.threads(many) for many in (2, 4, 5, 12, 100)] == [6, 3, 2, 1, 1]
    assert workers.threads(1) == torch.get_num_threads()


def test_workers_take_turns_at_the_gpus(monkeypatch: pytest.MonkeyPatch):
    assert workers.device_of("auto", 3) == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [workers.device_of("auto", number) for number in range(6)] == [f"cuda:{number % 4}" for number in range(6)]
    assert workers.device_of("cuda", 2) == "cuda:2"
    assert [workers.device_of(device, 2) for device in ("cpu", "cuda:1", "mps")] == ["cpu", "cuda:1", "mps"]
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert workers.local_number() == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert workers.device_of("auto", 3) == "auto"


@pytest.mark.parametrize("told", [["workers=0"], ["workers=-1"], ["--workers", "0"], ["--workers=two"], ["workers=1.5"]])
def test_a_number_of_workers_is_at_least_one(suite: str, tmp_path: Path, told: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", suite, f"out={tmp_path / 'out'}", *told]) == 2
    assert "workers=" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "told", [{"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, {"RANK": "0", "WORLD_SIZE": "2"},
             {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}],
)  # fmt: skip
def test_one_of_several_processes_does_not_start_anew(
    suite: str, tmp_path: Path, told: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["bench", suite, f"out={tmp_path / 'out'}", "force=true"]) == 2
    assert f"force=true {next(iter(told))}=" in capsys.readouterr().err and not (tmp_path / "out").exists()
