"""``force=true`` starts a run anew in a folder that holds another and deletes what that wrote, nothing else; the command that a
report shows can be pasted."""

from __future__ import annotations

import html
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from kinds import sure
from safetensors.torch import load_file

import steerfm
from steerfm import cli, files, shipped
from steerfm.report.run_folder import RunFolder
from steerfm.values import read_yaml

FOREIGN = (
    "notes.txt", "mine.safetensors", "mine.png", "samples/mine.png", "parts/mine.safetensors", "checkpoints/mine.txt",
    "x/config.yaml", "x/metrics.jsonl",
)  # fmt: skip


@pytest.fixture(autouse=True)
def released():
    yield
    files.release()


def put_foreign(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def foreign_is_there(folder: Path) -> bool:
    return all((folder / name).read_text() == name for name in FOREIGN)


def other_files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {*FOREIGN, ".lock", files.LIST}


def fill(run: RunFolder) -> None:
    run.log(step=1)
    run.save_part(3, {"x": torch.ones(1)})
    run.save_tensors("samples", {"x": torch.ones(1)})
    files.write(run.path / "deep" / "er" / "a\nname.txt", "x")
    run.save_result({})


# --- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [False, True])
def test_another_run_is_deleted_and_nothing_else(tmp_path, shared):
    put_foreign(tmp_path)
    fill(RunFolder(tmp_path, "a: 1\n", inputs={"reward a.py": "1"}, shared=shared))
    with pytest.raises(ValueError, match=r"choose another out= or delete it, or start anew with force=true"):
        RunFolder(tmp_path, "a: 2\n", shared=shared)
    run = RunFolder(tmp_path, "a: 2\n", inputs={"reward b.py": "2"}, shared=shared, force=True)
    assert other_files(tmp_path) == {"config.yaml", "inputs.json"} and foreign_is_there(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n" and run.history() == [] and not (tmp_path / "deep").exists()
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"reward b.py": "2"}
    fill(run)
    RunFolder(tmp_path, "a: 3\n", shared=shared, force=True)  # and once more, for the list began anew
    assert other_files(tmp_path) == {"config.yaml"} and foreign_is_there(tmp_path)


def test_a_run_of_another_command_is_another_run(tmp_path):
    fill(RunFolder(tmp_path, "a: 1\n"))
    RunFolder(tmp_path, "b: 1\nc: 2\n", force=True)
    assert other_files(tmp_path) == {"config.yaml"}


def test_the_same_run_goes_on_unless_it_is_finished(tmp_path):
    run = RunFolder(tmp_path, "a: 1\nout: x\nforce: false\n", inputs={"reward a.py": "1"})
    run.save_part(0, {"x": torch.ones(1)})
    run = RunFolder(tmp_path, "a: 1\nout: y\n", inputs={"reward a.py": "1"}, force=True)
    assert run.parts() == [0]
    run.save_result({})
    assert RunFolder(tmp_path, "a: 1\n", inputs={"reward a.py": "1"}).load_result() == {}
    run = RunFolder(tmp_path, "a: 1\n", inputs={"reward a.py": "1"}, force=True)
    assert run.load_result() is None and run.parts() == []
    run.save_part(0, {"x": torch.ones(1)})
    assert RunFolder(tmp_path, "a: 1\n", inputs={"reward a.py": "2"}, force=True).parts() == []  # edited since


def test_a_configuration_that_is_no_runs_stays(tmp_path):
    (tmp_path / "config.yaml").write_text("something: else\n")
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="another configuration") as caught:
        RunFolder(tmp_path, "a: 1\n", force=True)
    assert "force" not in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == "something: else\n" and (tmp_path / "result.json").is_file()


def test_nothing_outside_the_folder_is_deleted(tmp_path):
    """A list that somebody else wrote, and folders that are links."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    for name in ("a.txt", "b.txt"):
        (outside / name).touch()
    fill(RunFolder(run, "a: 1\n"))
    (run / "link").symlink_to(outside)
    with (run / files.LIST).open("a") as file:
        file.write(f'"../outside/a.txt"\n{json.dumps(str(outside / "a.txt"))}\n"link/b.txt"\n"."\n17\n"cut')
    RunFolder(run, "a: 2\n", force=True)
    assert {path.name for path in outside.iterdir()} == {"a.txt", "b.txt"}
    assert other_files(run) <= {"config.yaml", "link/a.txt", "link/b.txt"}


def test_a_folder_from_before_there_were_lists(tmp_path):
    fill(RunFolder(tmp_path, "a: 1\n"))
    files.release()
    (tmp_path / files.LIST).unlink()
    run = RunFolder(tmp_path, "a: 2\n", force=True)
    assert run.load_result() is None and run.parts() == [] and run.history() == []


# --- commands --------------------------------------------------------------------------------------------------------
STEER = [
    "steer", "reward=brightness", "judge=null", "n=3", "batch_size=2", "method=best_of_n", "method.particles=2",
    "method.steps=1", "out=run",
]  # fmt: skip
COMMANDS = {
    "steer": (STEER, "strength=3", "seeds=4"),
    "sample": (["sample", "n=2", "steps=1", "out=run"], "n=3", "seeds=4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_start_anew(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    command, other, third = COMMANDS[name]
    assert cli.main([*command, other]) == 0
    put_foreign(tmp_path / "run")
    assert cli.main([*command, third]) == 2
    assert "force=true" in capsys.readouterr().err
    assert cli.main([*command, third, "force=true"]) == 0 and foreign_is_there(tmp_path / "run")
    assert cli.main([*command, third, "out=plain"]) == 0
    assert other_files(Path("run")) == other_files(Path("plain"))
    for file in other_files(Path("run")):
        if file.endswith(".safetensors"):
            a, b = load_file(f"run/{file}"), load_file(f"plain/{file}")
            assert all(a[key].equal(b[key]) for key in b)
    told = read_yaml(Path("run/config.yaml"))
    assert (
        told["force"] is False and cli.main([command[0], "--config", "run/config.yaml"]) == 0
    )  # which goes on, or is finished
    assert foreign_is_there(tmp_path / "run")


@pytest.mark.parametrize("command", [["evaluate", "n=30"], ["finetune", "reward=brightness"]])
def test_every_command_names_the_way(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    fill(RunFolder("run", "a: 1\n"))
    assert cli.main([*command, "out=run"]) == 2 and "start anew with force=true" in capsys.readouterr().err


def test_a_finished_run_says_how_to_run_again(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(STEER) == 0
    before = Path("run/result.json").stat().st_mtime_ns
    assert cli.main(STEER) == 0 and "force=true" in capsys.readouterr().out
    assert Path("run/result.json").stat().st_mtime_ns == before
    assert cli.main([*STEER, "force=true"]) == 0 and Path("run/result.json").stat().st_mtime_ns > before


@pytest.mark.slow
def test_train_starts_anew(capsys, tmp_path, monkeypatch):
    kills = runpy.run_path(str(Path(shipped.folder("benchmarks")) / "kills.py"))
    kills["prepare"](tmp_path)
    (tmp_path / "at").mkdir()
    monkeypatch.chdir(tmp_path / "at")
    short = ["optimizer.steps=2", "objective.shares={lagrangian: 0.25}", "trainer.sample_every=0"]
    command = [*kills["COMMANDS"]["train"][1], *short, "out=run"]
    assert cli.main(command) == 0
    put_foreign(Path("run"))
    before = load_file("run/tiny.safetensors")
    wider = [*command, "network.widths=[16]"]
    assert cli.main(wider) == 2 and "force=true" in capsys.readouterr().err
    assert cli.main([*wider, "name=other", "force=true"]) == 0 and foreign_is_there(Path("run"))
    assert not Path("run/tiny.safetensors").exists() and Path("run/other.safetensors").is_file()
    assert cli.main([*command, "force=true"]) == 0 and foreign_is_there(Path("run"))
    after = load_file("run/tiny.safetensors")
    assert all(after[name].equal(before[name]) for name in before) and not Path("run/other.safetensors").exists()


@pytest.mark.slow
def test_bench_starts_anew(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("suite.yaml").write_text(
        "problems: {bright: {reward: brightness, judge: symmetry}}\nmethods: {best_of_n: {steps: 1}}\nbudgets: [2]\nn: 2\n"
    )
    command = ["bench", "suite.yaml", "seeds=4", "out=run"]
    assert cli.main(command) == 0
    put_foreign(Path("run"))
    cells = {path: path.stat().st_mtime_ns for path in Path("run/cells").iterdir()}
    assert cli.main(command) == 0 and all(path.stat().st_mtime_ns == time for path, time in cells.items())
    assert cli.main([*command, "force=true", "share=1/2"]) == 2 and "share" in capsys.readouterr().err
    assert all(path.is_file() for path in cells)
    assert cli.main([*command, "force=true"]) == 0 and foreign_is_there(Path("run"))
    assert all(path.stat().st_mtime_ns > time for path, time in cells.items())  # the same names: force makes no other cell


# --- the command in the report ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ['a dog\'s "bone", $HOME & <b>', "two  spaces; rm -rf *", "back\\slash `x` #1", "naïve ü"])
def test_the_command_in_the_report_can_be_pasted(tmp_path, monkeypatch, prompt):
    monkeypatch.chdir(tmp_path)
    argv = [*STEER[:-1], "out=a run", f"prompt={prompt}"]
    assert cli.main(argv) == 0
    page = Path("a run/report.html").read_text()
    shown = html.unescape(sure(re.search(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)).group(1))
    assert shlex.split(shown) == ["steerfm", *argv]
    assert shlex.split(json.loads(Path("a run/result.json").read_text())["command"]) == ["steerfm", *argv]


# --- rewards ---------------------------------------------------------------------------------------------------------
def test_a_reward_prints_in_a_line():
    bag, black_box = steerfm.reward("classifier", target="Bag"), steerfm.reward("compressibility")
    for rw in (bag, black_box, 2 * bag - black_box, steerfm.reward(lambda images, prompts: images.mean((1, 2, 3)))):
        assert rw.name in repr(rw) and "\n" not in repr(rw) and len(repr(rw)) < 120
        assert ("black box" in repr(rw)) == (not rw.differentiable)
    assert "needs prompts" in repr(rw)
