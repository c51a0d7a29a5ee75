"""Models that cannot make every jump, and models with arguments, on the command line."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from steerfm import cli

MINE = """
import torch
import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, VELOCITY

class Map(steerfm.FlowMap):
    def average_velocity(self, x, s, t, cond):
        return self.shift - 0.1 * x

def make(kind="velocity", shift=0.5, side=4):
    flow_map = Map((1, side, side))
    flow_map.shift = shift
    flow_map.capabilities = {"velocity": VELOCITY, "endpoint": ENDPOINT, "generator": GENERATOR}[kind]
    flow_map.steps = {"velocity": 6, "endpoint": 2, "generator": 1}[kind]
    return flow_map
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)


STEER = ["steer", "model=mine.py:make", "reward=brightness", "judge=null", "n=1", "out=run"]


@pytest.mark.parametrize(("kind", "name"), [("velocity", "feynman_kac"), ("endpoint", "funnel"), ("generator", "best_of_n")])
def test_a_method_that_fits_is_taken_and_written_down(kind, name, tmp_path, capsys):
    assert cli.main([*STEER, f"model.kind={kind}"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["method"]["name"] == name
    assert config["model"] == {"name": "mine.py:make", "kind": kind}
    assert ("since the model has only" in capsys.readouterr().out) == (name != "funnel")
    assert cli.main(["steer", "--config", "run/config.yaml", "out=again"]) == 0  # it loads back to an equal run
    first, again = (load_file(tmp_path / run / "samples.safetensors") for run in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("kind", "method"), [("velocity", "multi_round"), ("endpoint", "dps"), ("generator", "svdd")])
def test_a_method_that_would_be_wrong_is_refused_before_there_is_a_folder(kind, method, tmp_path, capsys):
    assert cli.main([*STEER, f"model.kind={kind}", f"method={method}"]) == 2
    error = capsys.readouterr().err
    assert "does not fit this model" in error and "take" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "steps"), [("velocity", 6), ("endpoint", 2), ("generator", 1)])
def test_samples_take_as_many_steps_as_the_model_does(kind, steps, capsys):
    assert cli.main(["sample", "model=mine.py:make", f"model.kind={kind}", "n=2", "out=run"]) == 0
    assert f"{2 * steps} network evaluations" in " ".join(capsys.readouterr().out.split())


def test_samples_of_a_generator_in_several_steps_are_refused(capsys):
    assert cli.main(["sample", "model=mine.py:make", "model.kind=generator", "n=2", "steps=3", "out=run"]) == 2
    assert "take steps=1" in capsys.readouterr().err


def test_arguments_of_a_model_are_checked_and_told_apart(tmp_path, capsys):
    assert cli.main(["sample", "model=mine.py:make", "model.shift=2", "n=2", "out=run"]) == 0
    assert cli.main(["sample", "model=mine.py:make", "model.shift=3", "n=2", "out=run"]) == 2  # another run
    assert "shift" in capsys.readouterr().err
    assert cli.main(["sample", "model=mine.py:make", "model.shfit=2", "n=2", "out=other"]) == 2
    assert "did you mean 'shift'" in capsys.readouterr().err
    assert cli.main(["sample", "model=fashion", "model.shift=2", "n=2", "out=other"]) == 2
    assert "shift" in capsys.readouterr().err
    (tmp_path / "it.yaml").write_text("model: {name: mine.py:make, side: 6}\nn: 2\nout: wide\n")
    assert cli.main(["sample", "--config", "it.yaml", "model.shift=1"]) == 0
    assert yaml.safe_load((tmp_path / "wide" / "config.yaml").read_text())["model"] == {
        "name": "mine.py:make", "side": 6, "shift": 1,
    }  # fmt: skip
