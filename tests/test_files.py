"""Files that are whole or not there, and folders of one process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from steerfm import cli, files
from steerfm.checkpoints import write_weights
from steerfm.report.plots import curves_plot
from steerfm.report.run_folder import RunFolder
from steerfm.signals import Stopped, held, raised

WRITERS = {
    "text": lambda path: files.write(path, "new"),
    "tensors": lambda path: files.write_tensors(path, {"x": torch.ones(2)}),
    "weights": lambda path: write_weights({"x": torch.ones(2)}, path, {"kind": "x"}),
    "picture": lambda path: curves_plot({"x": ([0, 1], [1.0, 2.0])}, path),
    "result": lambda path: RunFolder(path.parent, "a: 1").save_tensors(path.stem, {"x": torch.ones(2)}),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name, error):
    path = tmp_path / ("file.png" if name == "picture" else "file.safetensors")
    WRITERS[name](path)
    before = path.read_bytes()
    there = {file.name for file in tmp_path.iterdir()}

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(type(error)):
        WRITERS[name](path)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == there


def test_an_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="x" * 300):
        files.write(tmp_path / ("x" * 300), "text")


HOLD = "import sys, time; from steerfm import files; files.claim(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.mark.slow
def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path):
    (tmp_path / ".result.json.1.tmp").touch()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    try:
        with pytest.raises(ValueError, match="another process"):
            RunFolder(tmp_path, "a: 1")
        RunFolder(tmp_path, "a: 1", shared=True)  # a sweep is shared out
    finally:
        other.kill()
        other.communicate()
    RunFolder(tmp_path, "a: 1")
    RunFolder(tmp_path, "a: 1")  # the same process
    files.release()
    assert not (tmp_path / ".result.json.1.tmp").exists()


def test_a_digest_follows_the_content(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    first = files.digest(file)
    file.write_text("two")
    assert files.digest(file) != first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_the_second_kills(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, raised():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert stopped.value.number == number and signal.getsignal(number) == before
    with held() as pending:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert pending.number == number and signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_import_ends_the_process_at_once(tmp_path, number):
    """Imports make other errors of whatever is raised in them."""
    (tmp_path / "slow.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException:\n    pass\n"
    )
    program = "from steerfm.signals import raised\nwith raised():\n    import slow\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 128 + number and "same command" in done.stderr and done.stderr.count("\n") == 1


STEER = ["steer", "n=2", "method.particles=2", "method.steps=2", "judge=null", "out=run"]


def test_an_edited_reward_is_another_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(images):\n    return images.mean((1, 2, 3))\n")
    assert cli.main([*STEER, "reward=mine.py:mine"]) == 0
    reward.write_text("def mine(images):\n    return -images.mean((1, 2, 3))\n")
    capsys.readouterr()
    assert cli.main([*STEER, "reward=mine.py:mine"]) == 2
    err = capsys.readouterr().err
    assert "mine.py" in err and "edited" in err and err.count("\n") == 1


def test_a_run_that_fails_at_its_start_can_be_corrected(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(images):\n    raise ValueError('oh')\n")
    assert cli.main([*STEER, "reward=mine.py:mine"]) == 2
    reward.write_text("def mine(images):\n    return images.mean((1, 2, 3))\n")
    assert cli.main([*STEER, "reward=mine.py:mine", "strength=2"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_line_that_says_where_the_run_is(capsys, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    reward = tmp_path / "mine.py"
    called = "import os\ndef mine(images):\n    if not os.path.exists('again'):\n        os.kill(os.getpid(), {})\n"
    reward.write_text(called.format(int(number)) + "    return images.mean((1, 2, 3))\n")
    assert cli.main([*STEER, "reward=mine.py:mine"]) == 128 + number
    err = capsys.readouterr().err
    assert "what is done is in run" in err and "same command" in err and err.count("\n") == 1
    (tmp_path / "again").touch()
    assert cli.main([*STEER, "reward=mine.py:mine"]) == 0


@pytest.mark.parametrize("argv", [["sample", "n=2"], STEER])
def test_a_name_that_is_too_long_is_one_line(capsys, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    more = [] if argv[0] == "sample" else ["reward=brightness"]
    assert cli.main([*argv, *more, f"out={'x' * 300}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_a_shared_folder_is_swept_of_what_killed_processes_left(tmp_path):
    """And of nothing else: others may be writing, here or on another machine."""
    code = (
        "import os, signal; from steerfm import files\n"
        f"with files.whole({str(tmp_path / 'a.png')!r}) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.glob(".*.tmp")
    elsewhere = left.with_name(left.name.replace(files.HERE, "another-machine"))
    elsewhere.write_text("half")
    with files.whole(tmp_path / "mine.png") as mine:
        mine.write_text("half")
        RunFolder(tmp_path, "suite: x\n", shared=True)
        assert not left.exists() and elsewhere.exists() and mine.exists()
    assert (tmp_path / "mine.png").read_text() == "half"
