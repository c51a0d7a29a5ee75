"""`steerfm evaluate` and `finetune` of models that cannot make every jump: what is measured, and what it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import steerfm
from steerfm import cli
from steerfm.finetuning import Tasks
from steerfm.finetuning.evaluation import control_cost

MAPS = """
import torch
import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, TWO_TIME, VELOCITY

class Map(steerfm.FlowMap):
    def __init__(self):
        super().__init__((1, 8, 8))
        self.shift = torch.nn.Parameter(torch.tensor(0.5))

    def average_velocity(self, x, s, t, cond):
        able = steerfm.capabilities.closed(self.capabilities)
        if "velocity" not in able:
            assert bool((t == 1).all()), "a jump to a time before the data"
            assert "endpoint" in able or bool((s == 0).all()), "a jump from a time after the noise"
        elif "two_time" not in able:
            assert self.free or bool((t - s).max() <= 0.5), "a long jump"
        return self.shift - 0.1 * x

def make(kind="velocity", steps=0):
    flow_map = Map()
    flow_map.capabilities = {"velocity": VELOCITY, "endpoint": ENDPOINT, "generator": GENERATOR, "two_time": TWO_TIME}[kind]
    flow_map.steps = steps or {"velocity": 6, "endpoint": 2, "generator": 1, "two_time": 4}[kind]
    flow_map.free = True
    return flow_map

def careful():
    flow_map = make()
    flow_map.free = False
    return flow_map
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MAPS)


def evaluated(*words: str) -> dict[str, Any]:
    assert cli.main(["evaluate", "n=8", "euler=5", "out=run", *words]) == 0
    return json.loads(Path("run/result.json").read_text())


@pytest.mark.parametrize(("kind", "names"), [
    ("two_time", ["1 jump", "2 jumps", "4 jumps", "8 jumps", "5 Euler steps"]),
    ("velocity", ["1 step", "2 steps", "4 steps", "8 steps", "5 Euler steps"]),
    ("endpoint", ["1 jump", "2 jumps", "4 jumps", "8 jumps"]),
    ("generator", ["1 jump"]),
])  # fmt: skip
def test_what_a_model_can_do_is_measured(kind, names, capsys):
    found = evaluated("model=mine.py:make", f"model.kind={kind}")
    assert list(found["samplers"]) == names
    has = kind in ("two_time", "velocity")
    assert all(("to_euler" in row) == has for row in found["samplers"].values())
    assert ("semigroup error" in found) == ("diagonal error" in found) == (kind == "two_time")
    page, shown = Path("run/report.html").read_text(), capsys.readouterr().out
    for text in (page, shown):
        assert ("semigroup" in text) == (kind == "two_time")
        assert ("Euler" in text) == has
        assert kind != "velocity" or "jump" not in text.replace("jumps.png", "")
    assert Path("run/jumps.png").is_file() == (kind != "generator")
    if kind != "generator":
        with Image.open("run/jumps.png") as drawn:
            assert drawn.width > 100


def test_a_velocity_is_asked_for_no_jump_beyond_its_steps():
    """Its errors of consistency would ask for jumps between any two times."""
    evaluated("model=mine.py:careful", "steps=[2,4]")


@pytest.mark.parametrize("steps", ["[4,2]", "[3]", "[1,2]"])
def test_steps_in_any_order(steps):
    wanted = [f"{n} jumps" if n > 1 else "1 jump" for n in sorted(json.loads(steps))]
    assert sorted(evaluated("model=mine.py:make", "model.kind=endpoint", f"steps={steps}")["samplers"]) == wanted


def test_a_generator_in_several_steps_is_refused_before_there_is_a_folder(capsys):
    assert cli.main(["evaluate", "model=mine.py:make", "model.kind=generator", "n=8", "steps=[2,4]", "out=run"]) == 2
    assert "steps=[1]" in capsys.readouterr().err and not Path("run").exists()


@pytest.mark.parametrize(("kind", "steps", "name"), [
    ("velocity", 3, "3 steps"), ("velocity", 1, "1 step"), ("endpoint", 2, "2 jumps"), ("generator", 1, "1 jump"),
])  # fmt: skip
def test_readings_of_a_tuning_are_named_by_what_the_model_does(kind, steps, name, capsys):
    words = ["finetune", "model=mine.py:make", f"model.kind={kind}", f"model.steps={steps}", "reward=brightness", "judge=null"]
    more = ["optimizer.steps=2", "batch_size=2", "watch.n=4", "watch.base=8", "trainer.accelerator=cpu", "out=run"]
    assert cli.main([*words, *more]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert {f"base, {name}", f"base, {name}, best of 16", f"tuned, {name}"} <= result["readings"].keys()
    page = Path("run/report.html").read_text()
    assert f"tuned (draft_k), {name}" in page or f"tuned (direct), {name}" in page
    if kind == "velocity":
        texts = page.split("<table")[1:]
        assert all(" jump" not in text.split("</table")[0] for text in texts)


@pytest.mark.parametrize(
    ("kind", "steps"), [("two_time", 4), ("velocity", 3), ("endpoint", 1), ("endpoint", 3), ("generator", 1)]
)
def test_the_control_cost_is_half_the_square_of_the_shift(kind, steps):
    """u differs by one number everywhere, so the cost is its square / 2, whatever the map can do and in however many steps."""
    base, tuned = (steerfm.load("mine.py:make", kind=kind, steps=steps) for _ in "ab")
    tuned.shift.data += 0.3  # type: ignore[operator]
    assert control_cost(tuned, base, Tasks.of(None)[torch.zeros(3, dtype=torch.long)]) == pytest.approx(0.045, rel=1e-4)
