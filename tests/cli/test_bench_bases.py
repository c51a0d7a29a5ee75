"""Plain samples of a sweep are those that the model takes by itself, and the tables say of what kind its steps are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steerfm import cli
from steerfm.values import write_yaml

MAPS = """
import torch
import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, TWO_TIME, VELOCITY

class Map(steerfm.FlowMap):
    def __init__(self, capabilities, steps):
        super().__init__((1, 4, 4))
        self.capabilities, self.steps = capabilities, steps

    def average_velocity(self, x, s, t, cond):
        return 0.5 - 0.1 * x

def velocity(): return Map(VELOCITY, 12)
def endpoint(): return Map(ENDPOINT, 2)
def generator(): return Map(GENERATOR, 1)
def jumps(): return Map(TWO_TIME, 4)
"""
WORDS = {
    "velocity": "unsteered, 12 steps", "endpoint": "unsteered, 2 jumps", "generator": "unsteered, 1 jump",
    "jumps": "unsteered, 4 jumps",
}  # fmt: skip


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Writes a suite of models of these kinds."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MAPS)

    def suite(*kinds: str) -> str:
        told = {
            "models": [f"mine.py:{kind}" for kind in kinds], "problems": {"bright": {"reward": "brightness", "judge": None}},
            "methods": {"best_of_n": {}}, "strengths": [10], "budgets": [12], "seeds": 4, "n": 2, "out": "run",
        }  # fmt: skip
        Path("suite.yaml").write_text(write_yaml(told))
        return "suite.yaml"

    return suite


def rows() -> list[dict]:
    return json.loads(Path("run/summary.json").read_text())["rows"]


def test_plain_samples_by_what_a_model_can(suite, capsys):
    assert cli.main(["bench", suite(*WORDS)]) == 0
    base = {row["model"]: row for row in rows() if row["budget"] == 0}
    assert {model.removeprefix("mine-"): row["method"] for model, row in base.items()} == WORDS
    assert {model.removeprefix("mine-"): row["evaluations"] for model, row in base.items()} == {
        "velocity": 12, "endpoint": 2, "generator": 1, "jumps": 4,
    }  # fmt: skip
    assert all("over_unsteered" in row for row in rows() if row["budget"])
    page = Path("run/report.html").read_text()
    assert all(words in page for words in WORDS.values())
    ranks = json.loads(Path("run/summary.json").read_text())["ranks"]
    assert set(ranks) == {"best_of_n"}


def test_a_difference_to_plain_samples_is_asked_for_in_these_words(suite, capsys):
    words = WORDS["velocity"]
    assert cli.main(["bench", suite("velocity"), f'difference=[best_of_n,"{words}"]']) == 0
    assert f"best_of_n over {words}" in capsys.readouterr().out
    (told,) = json.loads(Path("run/summary.json").read_text())["differences"]
    row = next(row for row in rows() if row["budget"])
    assert told["mean"] == pytest.approx(row["over_unsteered"], abs=1e-6)
    assert cli.main(["bench", "suite.yaml", 'difference=[best_of_n,"unsteered, 4 jumps"]']) == 2
    assert f"did you mean '{words}'" in capsys.readouterr().err
