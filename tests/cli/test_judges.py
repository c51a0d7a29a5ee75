"""A judge that is the reward is taken for held out by no command; without a judge the reward itself counts, and they say so."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

import steerfm
from steerfm import cli, zoo
from steerfm.finetuning import Tasks, chain
from steerfm.finetuning.evaluation import Panel
from steerfm.rewards import RewardError, as_reward

SUITE = """
problems:
  bag: {reward: {name: classifier, target: Bag}}
methods:
  best_of_n: {steps: 1}
  feynman_kac: {steps: 2}
budgets: [4]
seeds: 4
n: 2
"""
COMMANDS = {
    "steer": ["steer", "label=Bag", "n=2", "method=best_of_n", "method.particles=2", "method.steps=1"],
    "finetune": [
        "finetune", "label=Bag", "optimizer.steps=1", "optimizer.warmup=1", "batch_size=2", "watch.n=4", "watch.base=8",
    ],
}  # fmt: skip
OWN = """
from functools import cache

import steerfm


def bright(images, power=1.0):
    return images.mean((1, 2, 3)) ** power


class Mine(steerfm.Reward):
    '''A network of somebody else's, by another way.'''

    def __init__(self, target):
        super().__init__()
        self.held = [steerfm.reward("classifier", target=target)]

    def score(self, images, prompts=None, labels=None):
        return 2 * self.held[0](images)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    file = zoo.find("fashion-classifier")
    for path in (file, file.with_suffix(".json")):
        shutil.copy(path, tmp_path / f"copy{path.suffix}")
    return tmp_path


CLASSIFIER = "reward={name: classifier, target: Bag}"
SAME = [
    (CLASSIFIER, "judge={name: classifier, target: Bag}", "judge=classifier: it shares weights with the reward"),
    (CLASSIFIER, "judge={name: judge, target: Bag, model: copy.safetensors}", "shares weights"),
    (CLASSIFIER, "judge={name: own.py:Mine, target: Dress}", "shares weights"),
    ("reward={name: own.py:Mine, target: Bag}", "judge=[{name: judge}, {name: classifier, weight: 0.1}]", "shares weights"),
    (
        "reward=[{name: classifier, target: Bag}, brightness]",
        "judge=brightness",
        "judge=brightness: it is a part of the reward",
    ),
    ("reward=brightness", "judge={name: brightness, weight: 2}", "is the reward itself"),
    ("reward=own.py:bright", "judge=own.py:bright", "judge=bright: it is the reward itself"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("reward", "judge", "said"), SAME, ids=[str(i) for i in range(len(SAME))])
def test_a_judge_that_is_the_reward_is_refused_before_anything_is_done(own, capsys, command, reward, judge, said):
    assert cli.main([*COMMANDS[command], reward, judge, "out=run"]) == 2
    err = capsys.readouterr().err
    assert said in err and "judge=null" in err and not (own / "run").exists()


@pytest.mark.parametrize(("reward", "judge", "said"), SAME, ids=[str(i) for i in range(len(SAME))])
def test_a_suite_with_such_a_judge_is_refused(own, capsys, reward, judge, said):
    suite = own / "small.yaml"
    suite.write_text(SUITE)
    told = [f"problems.bag.{part}" for part in (reward, judge)]
    assert cli.main(["bench", str(suite), "problems.bag.label=Bag", *told, "out=run"]) == 2
    assert said in capsys.readouterr().err and not (own / "run").exists()


def test_a_term_that_is_asked_for_may_be_in_both_beside_a_judge(own, capsys):
    both = ["reward=[{name: classifier, target: Bag}, brightness]", "judge=[{name: judge, target: Bag}, brightness]"]
    assert cli.main([*COMMANDS["steer"], *both, "out=run"]) == 0
    other = ["reward={name: own.py:bright}", "judge={name: own.py:bright, power: 2.0}"]
    assert cli.main([*COMMANDS["steer"], *other, "out=other"]) == 0


def test_the_judge_of_the_card_is_not_taken_where_it_is_the_reward(own, capsys):
    assert cli.main([*COMMANDS["steer"], "reward={name: judge, target: Bag}", "out=run"]) == 0
    out = capsys.readouterr().out
    assert "no held-out reward: 'judge'" in out and "shares weights" in out and "held out: judge" not in out
    assert json.loads((own / "run" / "result.json").read_text())["held_out"] is None
    assert "held out" not in (own / "run" / "report.html").read_text()


def test_a_panel_in_python_refuses_it_too():
    fashion, bag = steerfm.load("fashion"), steerfm.reward("classifier", target="Bag")
    tasks = Tasks.of(None)
    for judge in (bag, steerfm.reward("classifier", target="Dress"), 2.0 * bag + steerfm.reward("sharpness")):
        with pytest.raises(RewardError, match=r"^judge=.*judge=null"):
            Panel(fashion, bag, judge, tasks, tasks, lambda x: x.flatten(1))


@pytest.mark.slow
def test_tuning_without_a_judge_calls_nothing_held_out(own, capsys):
    short = ["watch.report=4", "distil.steps=0", "trainer.log_every=1"]
    command = [*COMMANDS["finetune"], "reward=brightness", "judge=null", *short, "out=run"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    page = (own / "run" / "report.html").read_text()
    assert "reward, over base" in page and "held out" not in page.replace("no held-out", "") and "held out" not in out
    assert "held-out reward" not in page.replace("no held-out reward", "")
    readings = json.loads((own / "run" / "result.json").read_text())["readings"]
    assert all("held_out" not in reading and "reward" in reading and "over_base" in reading for reading in readings.values())


@pytest.mark.slow
def test_evaluate_says_what_a_tuned_model_was_tuned_on(own, capsys):
    tuned = own / "tuned.safetensors"
    fashion = steerfm.load("fashion")
    recipe = {"reward": [{"name": "classifier", "target": "Bag"}, "sharpness"]}
    assert isinstance(fashion, steerfm.NeuralFlowMap)
    fashion.save(tuned, card={**fashion.card, "recipe": recipe})
    assert cli.main(["evaluate", f"model={tuned}", "n=4", "steps=[1]", "euler=2", "posteriors=0", "out=run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "fashion-classifier is not held out: the model was tuned on" in out and "fashion-judge is not" not in out
    assert any("not held out" in gap for gap in json.loads((own / "run" / "result.json").read_text())["gaps"])


# --- suites without a judge ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A suite of two problems, one without a judge, with a difference."""
    out = tmp_path_factory.mktemp("alone")
    (out / "own.py").write_text(OWN)
    (out / "method.py").write_text(
        "from dataclasses import dataclass\nimport steerfm\n\n\n@dataclass(frozen=True)\nclass Mine(steerfm.BestOfN):\n"
        "    '''Best-of-n by another name.'''\n\n    steps: int = 2\n"
    )
    suite = out / "small.yaml"
    suite.write_text(SUITE.replace("  bag:", f"  bright: {{reward: '{out}/own.py:bright', judge: null}}\n  bag:"))
    mine = f"methods.mine={{name: '{out}/method.py:Mine'}}"
    assert cli.main(["bench", str(suite), mine, "difference=[mine,feynman_kac]", f"out={out / 'run'}"]) == 0
    return out / "run"


@pytest.mark.slow
def test_without_a_judge_the_reward_counts_with_its_interval(alone):
    rows = [row for row in json.loads((alone / "summary.json").read_text())["rows"] if row["problem"] == "bright"]
    assert len(rows) == 4 and all("held_out" not in row for row in rows)
    for row in rows:
        assert row["low"] <= row["reward"] <= row["high"] and row["low"] < row["high"]
    best = max((row for row in rows if row["budget"]), key=lambda row: row["reward"])
    assert best["rank"] == 1 and any("over_unsteered" in row and row["over_unsteered_half"] >= 0 for row in rows)
    page = (alone / "report.html").read_text()
    assert "nothing is held out" in page and "bright, fashion, strength 10: reward against cost" in page
    with (alone / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert all((cell["held_out"] == "") == (cell["problem"] == "bright") and cell["reward"] for cell in cells)


@pytest.mark.slow
def test_two_methods_differ_by_pairs_on_what_counts(alone):
    whole = json.loads((alone / "summary.json").read_text())
    apart = {of["problem"].split(",")[0]: of for of in whole["differences"]}
    assert set(apart) == {"bright", "bag"} and all(of["of"] == ["mine", "feynman_kac"] for of in apart.values())
    rows = {(row["problem"], row["method"]): row for row in whole["rows"]}
    for problem, counts in (("bright", "reward"), ("bag", "held_out")):
        expected = rows[problem, "mine"][counts] - rows[problem, "feynman_kac"][counts]
        assert apart[problem]["mean"] == pytest.approx(expected, abs=1e-5)


def test_a_panel_without_a_judge_reads_the_reward():
    mixture = steerfm.GaussianMixture([[0.0, 1.0]], [[0.2, 0.2]]).flow_map(steps=2)
    tasks = Tasks.of(None)[torch.zeros(6, dtype=torch.long)]
    panel = Panel(mixture, as_reward(lambda x: x[:, 0]), None, tasks, tasks, lambda x: x)

    reading = panel.measure(chain()(mixture))
    assert reading.held_out is None and "held_out" not in reading.numbers() and reading.counts == reading.reward
    assert panel.counts == "reward"
