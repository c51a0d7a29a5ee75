"""Settings of a method that nobody named, on models that the default one does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from steerfm import cli

MAPS = """
import torch
import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, VELOCITY

class Map(steerfm.FlowMap):
    def __init__(self):
        super().__init__((1, 4, 4))
        self.shift = torch.nn.Parameter(torch.tensor(0.5))

    def average_velocity(self, x, s, t, cond):
        return self.shift - 0.1 * x

def make(kind="velocity"):
    flow_map = Map()
    flow_map.capabilities = {"velocity": VELOCITY, "endpoint": ENDPOINT, "generator": GENERATOR}[kind]
    flow_map.steps = {"velocity": 4, "endpoint": 2, "generator": 1}[kind]
    return flow_map
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MAPS)


def written(tmp_path, command: str, *words: str) -> dict[str, Any]:
    assert cli.main([command, "model=mine.py:make", "reward=brightness", "judge=null", "out=run", *words]) == 0
    return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]


@pytest.mark.parametrize(("kind", "name"), [("velocity", "feynman_kac"), ("endpoint", "funnel"), ("generator", "best_of_n")])
def test_a_setting_of_steering_goes_to_the_method_that_fits(kind, name, tmp_path):
    method = written(tmp_path, "steer", f"model.kind={kind}", "n=1", "method.particles=3")
    assert method["name"] == name and method["particles"] == 3


def test_a_setting_of_tuning_goes_to_the_method_that_fits(tmp_path):
    method = written(
        tmp_path, "finetune", "method.jumps=3", "optimizer.steps=1", "batch_size=2", "watch.n=2", "watch.base=8",
        "trainer.accelerator=cpu",
    )  # fmt: skip
    assert method == {"name": "draft_k", "jumps": 3}


def test_a_setting_that_the_method_that_fits_does_not_know_is_refused(tmp_path, capsys):
    words = ["steer", "model=mine.py:make", "reward=brightness", "judge=null", "n=1", "method.wide=2", "out=run"]
    assert cli.main(words) == 2
    assert "wide" in capsys.readouterr().err
    words[5] = "method.lookahead=jump"  # it is the setting that does not fit
    assert cli.main(words) == 2
    assert "needs jumps to the data: take lookahead=denoise" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
