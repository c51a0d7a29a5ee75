"""Seeds and strengths as one value or a list, on the command line and in yaml as in Python; and what strength=auto costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import steerfm
from steerfm import cli
from steerfm.cli import loading
from steerfm.cli.config import SampleConfig, SteerConfig
from steerfm.cost import Ledger
from steerfm.report.run_folder import RunFolder
from steerfm.values import read_yaml, write_yaml

pytestmark = pytest.mark.slow
FEW = ["reward=brightness", "judge=null", "method.particles=4", "method.first=4", "method.steps=2"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def samples(folder: str) -> torch.Tensor:
    return load_file(Path(folder) / "samples.safetensors")["samples"]


def refusal(capsys, *argv: str) -> str:
    assert cli.main([*argv, "out=refused"]) == 2
    assert not Path("refused").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_list_is_one_for_each_output_as_in_python():
    assert cli.main(["steer", *FEW, "n=3", "seeds=[3,7,11]", "strength=[1,2,-500]", "out=a"]) == 0
    there = steerfm.steer("fashion", "brightness", steerfm.Funnel(4, 2, first=4), n=3, seeds=[3, 7, 11], strength=[1, 2, -500])
    here = steerfm.SteeringResult.load("a")
    assert here.strength.tolist() == [1, 2, -500]
    torch.testing.assert_close(here.samples, there.samples, rtol=1e-4, atol=1e-4)
    found = json.loads(Path("a/result.json").read_text())
    assert found["strength"] == [1, 2, -500]
    assert "<dd>1, 2, -500</dd>" in Path("a/report.html").read_text()
    torch.testing.assert_close(found["reward_best"], here.rewards.gather(1, here.best_index()[:, None]).mean().item())


def test_sample_takes_a_list_of_seeds():
    for seeds in ("[5,4,9]", "4"):
        assert cli.main(["sample", "n=3", f"seeds={seeds}", "steps=2", f"out={seeds}"]) == 0
    listed, counted = samples("[5,4,9]"), samples("4")
    torch.testing.assert_close(listed, steerfm.sample("fashion", 3, 2, [5, 4, 9]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(listed[:2], counted[[1, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schema", [SampleConfig, SteerConfig])
def test_lists_are_read_in_the_same_words_everywhere(schema, tmp_path):
    asked: dict[str, tuple[Any, ...]] = {"seeds": ([3, 7, 2**64 - 1], [8], 5)}
    if schema is SteerConfig:
        asked["strength"] = ([1.0, -2.5, 1e3], [0.5], 2.0, "auto")
    for key, values in asked.items():
        for value in values:
            file = tmp_path / "mine.yaml"
            file.write_text(write_yaml({key: value}))
            written = str(value).replace(" ", "")
            read = [
                loading.load(schema, None, [f"{key}={written}"]),
                loading.load(schema, str(file)),
                loading.load(schema, {key: value}),
            ]
            assert read[0] == read[1] == read[2] and getattr(read[0], key) == value
            assert loading.make(schema, read_yaml_text(loading.dump(read[0]), tmp_path)) == read[0]


def read_yaml_text(text: str, folder: Path) -> dict:
    (folder / "again.yaml").write_text(text)
    return read_yaml(folder / "again.yaml")


def test_every_prompt_has_the_same_seeds_and_strengths(capsys):
    prompts = ["prompt=[a cat,a dog]", "n=2"]
    assert cli.main(["sample", "seeds=[9,4]", *prompts, "steps=1", "out=a"]) == 0
    x = samples("a")
    assert len(x) == 4 and torch.equal(x[:2], x[2:])
    assert cli.main(["steer", *FEW, "seeds=[9,4]", "strength=[1,7]", *prompts, "out=b"]) == 0
    assert steerfm.SteeringResult.load("b").strength.tolist() == [1, 7, 1, 7]
    assert cli.main(["steer", *FEW, "strength=[1,7,3,2]", *prompts, "out=c"]) == 0
    assert steerfm.SteeringResult.load("c").strength.tolist() == [1, 7, 3, 2]
    assert "3 strengths for n=2 outputs of each of 2 prompts" in refusal(capsys, "steer", *FEW, "strength=[1,7,3]", *prompts)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("strength=[1,2]", "2 strengths for n=3 outputs: give one number, or one per output"),
        ("strength=[1,2,3,4]", "4 strengths for n=3 outputs: give one number, or one per output"),
        ("seeds=[1,2]", "2 seeds for n=3 outputs: give one number, or one per output"),
        ("strength=[1,auto,2]", "strength[1]=auto: give a number"),
        ("strength=much", "strength=much: give a number, or auto, or a list of numbers"),
        ("strength=null", "strength=null: give a number, or auto, or a list of numbers"),
        ("strength=true", "strength=true: give a number, or auto, or a list of numbers"),
        ("strength=inf", "must be finite"),
        ("strength=[1,.nan,2]", "must be finite"),
        ("strength=[]", "name at least one"),
        ("seeds=[1,2.5,3]", "seeds[1]=2.5: give a whole number"),
        ("seeds=1.5", "seeds=1.5: give a whole number, or a list of numbers"),
        ("seeds=auto", "seeds=auto: give a whole number, or a list of numbers"),
        ("seeds=[1,-2,3]", "seeds=-2: must be at least 0"),
        ("seeds=[]", "name at least one"),
    ],
)
def test_what_does_not_fit_is_refused_before_there_is_a_folder(capsys, asked, words):
    assert words in refusal(capsys, "steer", *FEW, "n=3", asked)
    if asked.startswith("seeds"):
        assert words in refusal(capsys, "sample", "n=3", asked)


class KillError(Exception):
    """What ends a run in the middle."""


def killed_after(parts: int, monkeypatch, *argv: str) -> None:
    """Run a command, which ends after so many parts as if by a kill."""
    log = RunFolder.log

    def logged(self: RunFolder, **numbers) -> None:
        if len(self.parts()) == parts:
            raise KillError
        log(self, **numbers)

    with monkeypatch.context() as patch, pytest.raises(KillError):
        patch.setattr(RunFolder, "log", logged)
        cli.main(list(argv))


@pytest.mark.parametrize("strength", ["[1,2,5,0]", "auto"])
def test_a_killed_run_goes_on_to_the_same_bits(monkeypatch, capsys, strength):
    argv = ["steer", *FEW, "n=4", "batch_size=1", "seeds=[3,7,11,2]", f"strength={strength}"]
    assert cli.main([*argv, "out=whole"]) == 0
    killed_after(2, monkeypatch, *argv, "out=killed")
    first, asked = [Path(f"killed/parts/part-{i:05d}.safetensors").stat().st_mtime_ns for i in range(2)], capsys.readouterr()
    assert cli.main([*argv[:-1], "strength=[1,2,5,1]", "out=killed"]) == 2
    assert "differs in: strength" in capsys.readouterr().err and asked.err == ""
    assert [Path(f"killed/parts/part-{i:05d}.safetensors").stat().st_mtime_ns for i in range(2)] == first
    assert cli.main([*argv, "out=killed"]) == 0
    whole, killed = (load_file(Path(name) / "samples.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(whole[name].equal(killed[name]) for name in whole)
    assert cli.main([*argv, "out=killed", "force=true"]) == 0
    assert samples("killed").equal(whole["samples"])


def spent(*argv: str) -> tuple[int, int]:
    """(network calls, reward calls) of a command."""
    with Ledger() as ledger:
        assert cli.main(list(argv)) == 0
    return ledger.cost.forwards, ledger.cost.reward_calls


def test_auto_is_worked_out_once(monkeypatch):
    """Its 64 plain samples of four jumps are drawn for the first part of a run, and for no other part or command."""
    argv = ["steer", *FEW, "n=3", "batch_size=1"]
    forwards, calls = spent(*argv, "strength=auto", "out=whole")
    number = steerfm.SteeringResult.load("whole").strength
    assert (number == number[0]).all() and json.loads(Path("whole/result.json").read_text())["strength"] == pytest.approx(
        number[0].item()
    )
    plain = spent(*argv, f"strength={number[0].item()!r}", "out=plain")
    assert (forwards, calls) == (plain[0] + 256, plain[1] + 64)
    assert spent(*argv, "strength=auto", "out=whole") == (0, 0)  # finished

    killed_after(1, monkeypatch, *argv, "strength=auto", "out=killed")
    rest, _ = spent(*argv, "strength=auto", "out=killed")
    assert rest == plain[0] // 3 * 2

    killed = RunFolder.save_result
    monkeypatch.setattr(RunFolder, "save_result", lambda self, result: (_ for _ in ()).throw(KillError))
    with pytest.raises(KillError):
        cli.main([*argv, "strength=auto", "out=last"])
    monkeypatch.setattr(RunFolder, "save_result", killed)
    assert spent(*argv, "strength=auto", "out=last")[0] == 0  # all its parts were there
    assert samples("last").equal(samples("whole")) and samples("killed").equal(samples("whole"))


def test_a_torn_first_part_still_costs_no_new_strength(monkeypatch):
    argv = ["steer", *FEW, "n=3", "batch_size=1", "strength=auto", "out=a"]
    killed_after(2, monkeypatch, *argv)
    Path("a/parts/part-00000.safetensors").write_bytes(b"torn")
    one = steerfm.steer("fashion", "brightness", steerfm.Funnel(4, 2, first=4), strength=1.0).cost.forwards
    assert spent(*argv)[0] == 2 * (one + 2)  # of the two that are missing, each beside a plain sample in as many steps


def test_a_problem_of_a_suite_works_it_out_once_and_at_no_methods_cost(monkeypatch):
    from steerfm.cli import bench

    seen, draw = [], bench.automatic
    monkeypatch.setattr(bench, "automatic", lambda *given: seen.append(draw(*given)) or seen[-1])
    suite = {
        "problems": {
            name: {"reward": "brightness", "judge": "symmetry", "strength": strength}
            for name, strength in {"auto": "auto", "list": [1, 30]}.items()
        },
        "methods": {"funnel": None}, "budgets": [16], "seeds": 4, "n": 2, "out": "run",
    }  # fmt: skip
    Path("mine.yaml").write_text(write_yaml(suite))
    assert cli.main(["bench", "mine.yaml"]) == 0
    assert len(seen) == 1
    rows = json.loads(Path("run/summary.json").read_text())["rows"]
    assert all(row["evaluations"] <= 16 for row in rows)
    assert {json.dumps(row["strength"]) for row in rows} == {'"auto"', "[1.0, 30.0]"}
    assert cli.main(["bench", "mine.yaml"]) == 0 and len(seen) == 1
    Path("mine.yaml").write_text(write_yaml(suite | {"n": 3}))
    assert cli.main(["bench", "mine.yaml", "out=other"]) == 2 and not Path("other").exists()


def test_the_help_says_so(capsys):
    for command in ("steer", "sample"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        told = capsys.readouterr().out
        assert "whole number or list of whole numbers" in told and "one for each output" in told
