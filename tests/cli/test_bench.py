"""`steerfm bench`: equal cost, nothing lost or repeated by a kill, and the numbers of a summary by hand."""

from __future__ import annotations

import csv
import json
import random
import runpy
from pathlib import Path

import pytest
import torch

from steerfm import cli
from steerfm.cli.bench import BASE, Cells, Column, Problem, Yardstick, summary, within_budget
from steerfm.cli.config import SteerConfig
from steerfm.cli.outputs import Outputs
from steerfm.closed_form import GaussianMixture
from steerfm.steering import METHODS, steer

ROOT = Path(__file__).parents[2]
OWN = '''
from dataclasses import dataclass
from steerfm.steering import BestOfN

@dataclass(frozen=True)
class Mine(BestOfN):
    """Best-of-n by another name."""
'''
SUITE = """
problems:
  bag: {reward: {name: classifier, target: Bag}}
methods:
  best_of_n: {steps: 1}
  feynman_kac: {steps: 2}
budgets: [4]
seeds: 5
n: 1
"""


@pytest.fixture
def suite(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SUITE)
    return file


def rows(folder):
    """Cells without their times."""
    with (folder / "cells.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_sweep_killed_twenty_times_loses_and_repeats_no_cell(suite, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = ["bench", str(suite), "seeds=20", "budgets=[4]", "only=[best_of_n]"]
    assert cli.main([*run, f"out={whole}"]) == 0
    measure, done, chance = Problem.measure, [], random.Random(0)

    def mortal(self, method, seed):
        if kills and chance.random() < 0.6:
            kills.pop()
            raise KeyboardInterrupt
        cell = measure(self, method, seed)
        done.append((method, seed))
        return cell

    kills = [0] * 20
    monkeypatch.setattr(Problem, "measure", mortal)
    codes = [cli.main([*run, f"out={killed}"])]
    while codes[-1]:
        codes.append(cli.main([*run, f"out={killed}"]))
    assert codes == [130] * 20 + [0]
    assert len(done) == len(set(done)) == 40
    assert rows(killed) == rows(whole)
    assert (killed / "report.html").is_file() and len(list(killed.glob("*.png"))) == 2


@pytest.mark.slow
def test_shares_of_a_sweep_make_the_whole(suite, tmp_path, capsys):
    run = ["bench", str(suite)]
    assert cli.main([*run, f"out={tmp_path / 'whole'}"]) == 0
    for share in ("1/3", "3/3"):
        assert cli.main([*run, f"out={tmp_path / 'parts'}", f"share={share}"]) == 0
        assert "left to other shares" in capsys.readouterr().out and not (tmp_path / "parts" / "cells.csv").exists()
    assert cli.main([*run, f"out={tmp_path / 'parts'}", "share=2/3"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_ones_own_method_joins_a_finished_sweep_in_one_word(suite, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert cli.main(["bench", str(suite), f"out={out}"]) == 0
    own = tmp_path / "mine.py"
    own.write_text(OWN)
    measured, measure = [], Problem.measure
    monkeypatch.setattr(Problem, "measure", lambda self, *of: measured.append(of) or measure(self, *of))
    assert cli.main(["bench", str(suite), f"out={out}", f"methods.mine={{name: '{own}:Mine', steps: 1}}"]) == 0
    assert len(measured) == 5  # its own seeds, nothing else
    held = {row["method"]: row for row in json.loads((out / "summary.json").read_text())["rows"]}
    assert held["mine"]["held_out"] == held["best_of_n"]["held_out"] and held["mine"]["over_best_of_n"] == 0
    own.write_text(OWN + "    steps: int = 2\n")
    assert cli.main(["bench", str(suite), f"out={out}", f"methods.mine={{name: '{own}:Mine', steps: 1}}"]) == 0
    assert len(measured) == 10  # an edited file is another method


MEDDLING = """
import random

import torch


def {name}(images):
    value = images.flatten(1).mean(1)
    if {meddles}:
        images.zero_()
        torch.manual_seed(1)
        random.seed(1)
        torch.set_default_dtype(torch.float64)
    return value.float()
"""


@pytest.mark.slow
def test_rewards_and_judges_are_lent_what_a_sweep_gives_them(tmp_path):
    """The same cells, whatever a reward or a judge does to its arguments and to the process."""
    cells = []
    for meddles in (False, True):
        for name in ("asked", "held_out"):
            (tmp_path / f"{name}.py").write_text(MEDDLING.format(name=name, meddles=meddles))
        file = tmp_path / f"meddles_{meddles}.yaml"
        parts = ", ".join(f'{key}: "{tmp_path}/{name}.py:{name}"' for key, name in (("reward", "asked"), ("judge", "held_out")))
        file.write_text(SUITE.replace("{reward: {name: classifier, target: Bag}}", f"{{{parts}}}"))
        assert cli.main(["bench", str(file), f"out={tmp_path / str(meddles)}"]) == 0
        cells.append(rows(tmp_path / str(meddles)))
    assert cells[0] == cells[1] and torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_best_of_n_is_there_whatever_a_suite_calls_its_own(suite, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(OWN)
    suite.write_text(SUITE.replace("  best_of_n: {steps: 1}\n  feynman_kac: {steps: 2}", f"  mine: {{name: '{own}:Mine'}}"))
    assert cli.main(["bench", str(suite), f"out={tmp_path / 'out'}"]) == 0
    assert {row["method"] for row in rows(tmp_path / "out")} == {BASE, "best_of_n", "mine"}
    suite.write_text(SUITE.replace("best_of_n: {steps: 1}", "fifty: {name: best_of_n, steps: 1}"))
    assert cli.main(["bench", str(suite), f"out={tmp_path / 'named'}"]) == 0
    assert {row["method"] for row in rows(tmp_path / "named")} == {BASE, "fifty", "feynman_kac"}
    of = {row["method"]: row for row in json.loads((tmp_path / "named" / "summary.json").read_text())["rows"]}
    assert "over_best_of_n" in of["feynman_kac"] and "over_best_of_n" not in of["fifty"]


@pytest.mark.slow
def test_a_method_that_cannot_follow_a_black_box_is_left_out(suite, tmp_path):
    asked = "problems.small={reward: {name: compressibility}, judge: {name: brightness}, label: Bag}"
    assert cli.main(["bench", str(suite), f"out={tmp_path / 'out'}", asked, "methods.dps={steps: 1}"]) == 0
    methods = {
        problem: {row["method"] for row in rows(tmp_path / "out") if row["problem"] == problem} for problem in ("bag", "small")
    }
    assert methods["small"] == methods["bag"] - {"dps"} == {BASE, "best_of_n", "feynman_kac"} != methods["bag"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("seeds=3", "at least 4"),
        ("problems.bag.judge={name: classifier, target: Dress}", "judge=classifier: it shares weights with the reward"),
        ("problems.bag.rewards=classifier", "did you mean 'reward'"),
        ("methods.funel={}", "did you mean 'funnel'"),
        ("methods.mine=nowhere.py:Mine", "no such method file"),
        ("only=[feynman]", "did you mean 'feynman_kac'"),
        ("share=4/3", "2/4"),
        ("budget=[3]", "did you mean 'budgets'"),
        ("budgets=[]", "needs problems and budgets"),
    ],
)
def test_what_cannot_be_compared_is_refused(suite, tmp_path, capsys, wrong, said):
    assert cli.main(["bench", str(suite), f"out={tmp_path / 'out'}", wrong]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["funnel", "best_of_n", "feynman_kac", "fmrg_e", "das", "dps", "svdd", "d_flow"])
@pytest.mark.parametrize("budget", [8, 64])
def test_no_method_gets_more_than_the_budget(name, budget):
    flow_map = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], [[0.2, 0.2], [0.2, 0.2]]).flow_map(steps=2)

    def reward(x):
        return -x.square().sum(1)

    method = within_budget(METHODS[name](), lambda m: steer(flow_map, reward, m).cost.evaluations, budget)
    assert method is None or steer(flow_map, reward, method).cost.evaluations <= budget
    assert method is not None or budget == 8


@pytest.mark.parametrize(("name", "least"), [("multi_round", 4), ("svdd", 4), ("feynman_kac", 4), ("best_of_n", 1), ("dps", 1)])
def test_what_selects_has_particles_to_select_from(name, least):
    flow_map = GaussianMixture([[-1.0, 0.0]], [[0.2, 0.2]]).flow_map(steps=2)
    method = within_budget(METHODS[name](), lambda m: steer(flow_map, lambda x: x[:, 0], m).cost.evaluations, 8)
    assert method.particles >= least and (least > 1 or name == "best_of_n" or method.particles < 4)


def cell(held, evaluations):
    return {
        "held_out": torch.tensor(held), "reward": torch.tensor(held) + 1, "features": torch.tensor(held)[:, None],
        "facts": torch.tensor([evaluations, evaluations, 0.0, 0.0, 0.1], dtype=torch.float64),
    }  # fmt: skip


def test_a_summary_by_hand():
    want = Outputs(2, names=("a", "b"))
    flow_map, none = GaussianMixture([[0.0]], [[1.0]]).flow_map(), None
    problem = Problem("p", SteerConfig(), flow_map, Yardstick(lambda x: x, None), none, None, want)  # type: ignore[arg-type]
    cells: Cells = {
        Column(problem, 0, BASE): [cell([0.0, 1.0], 4)] * 4,
        Column(problem, 8, "best_of_n"): [cell([1.0, 2.0], 8), cell([1.0, 4.0], 8)] * 2,
        Column(problem, 8, "better"): [cell([2.0, 4.0], 8), cell([3.0, 5.0], 8)] * 2,
        Column(problem, 16, "better"): [cell([2.0, 4.0], 16)] * 4,
    }
    base, best_of_n, better, dear = summary(cells)
    assert (base["held_out"], base["low"], base["high"], base["diversity"]) == (0.5, 0.5, 0.5, 0.0)
    assert best_of_n["held_out"] == 2.0 and 1.5 <= best_of_n["low"] < 2.0 < best_of_n["high"] <= 2.5
    assert "over_best_of_n" not in best_of_n and best_of_n["over_unsteered"] == 1.5
    assert better["over_best_of_n"] == 1.5 and better["over_unsteered"] == 3.0
    assert "over_best_of_n" not in dear and dear["over_unsteered"] == 2.5  # no best-of-n at its budget
    assert [row["rank"] for row in (base, best_of_n, better, dear)] == [1, 2, 1, 1]
    assert [row["pareto"] for row in (base, best_of_n, better, dear)] == [True, False, True, False]
    # the same prompt: a is 2, 3, 2, 3 and b is 4, 5, 4, 5: four of six pairs are one apart
    assert better["diversity"] == pytest.approx(4 / 6)


def test_the_shipped_suites_can_be_read(capsys):
    for name in ("quick", "fashion", "emoji", "lookahead"):
        assert cli.main(["bench", name, "--help"]) == 0
    assert cli.main(["bench"]) == 0 and "quick" in capsys.readouterr().out
    assert cli.main(["bench", "quik"]) == 2
    assert "did you mean 'quick'" in capsys.readouterr().err


# --- pages -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page():
    return runpy.run_path(str(ROOT / "benchmarks" / "page.py"))


def test_the_pages_say_what_the_results_say(page):
    for name in page["PAGES"]:
        text = (ROOT / name).read_text()
        assert page["render"](text) == text, f"{name} is not what benchmarks/results says: run 'steerfm bench page'"


def test_misses_by_hand(page, tmp_path, monkeypatch):
    """Two problems, two methods; `b` cannot be so cheap in the second problem at the lower budget."""
    held = {("p", 8, "a"): 1.0, ("p", 8, "b"): 0.5, ("p", 32, "a"): 2.0, ("p", 32, "b"): 4.0, ("q", 8, "a"): 0.0}
    held |= {("q", 32, "a"): 1.0, ("q", 32, "b"): 0.0, ("p", 0, "unsteered, 4 jumps"): 9.0}
    rows = [dict(model="m", strength=1, problem=p, budget=b, method=m, held_out=v) for (p, b, m), v in held.items()]
    (tmp_path / "mine.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setitem(page["misses"].__globals__, "RESULTS", tmp_path)
    text = page["render"]("x\n<!-- table: misses; mine -->\nold\n<!-- end -->\ny")
    assert text.split("\n")[4:6] == ["| `a` | 0.00 | 1.00 |", "| `b` |  | 0.50 |"]
    assert text.startswith("x\n<!-- table: misses; mine -->\n|") and text.endswith("|\n<!-- end -->\ny")
