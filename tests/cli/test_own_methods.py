"""Methods of one's own in a sweep: of the protocol alone, and with parts that take particles in groups."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from steerfm import cli
from steerfm.cli.bench import within_budget
from steerfm.closed_form import GaussianMixture
from steerfm.steering import SVDD, BestChild, Steering, Window, steer

OWN = '''
from dataclasses import dataclass, field

import steerfm
from steerfm.steering import BestChild, Steering


class Plain:
    """No dataclass: the protocol alone."""

    def __init__(self, particles=4):
        self.particles = particles

    def check(self, reward):
        pass

    def run(self, problem, noise, n, lookaheads, tick):
        return steerfm.BestOfN(particles=self.particles, steps=1).run(problem, noise, n, lookaheads, tick)


class Fitted(Plain):
    """It fits itself into a budget."""

    def within(self, budget):
        return Fitted(budget)


@dataclass(frozen=True)
class Brood(Steering):
    """Each parent's best of three children goes on. Samples: no. It is a search."""

    resampling: object = field(default_factory=lambda: BestChild(3))
    correction: object = "none"
'''
SUITE = """
problems:
  bag: {{reward: {{name: classifier, target: Bag}}}}
methods:
  plain: {{name: "{0}:Plain"}}
  fitted: {{name: "{0}:Fitted"}}
  brood: {{name: "{0}:Brood", steps: 2}}
budgets: [16]
seeds: 4
n: 2
"""


def first(x):
    return x[:, 0]


def evaluations(method):
    return steer(GaussianMixture([[-1.0, 0.0]], [[0.2, 0.2]]).flow_map(steps=2), first, method).cost.evaluations


@dataclass(frozen=True)
class Grouped(Steering):
    """No field ``children``: its part has one."""

    resampling: Any = field(default_factory=lambda: BestChild(3))
    correction: Any = "none"


@pytest.mark.parametrize("budget", [8, 13, 64, 100])
@pytest.mark.parametrize("children", [2, 3, 5])
def test_parts_that_take_groups_get_whole_groups(children, budget):
    part = BestChild(children)
    for method in (Grouped(resampling=part), Grouped(resampling=Window(part)), Steering(resampling=part, correction="none")):
        for steps in (None, 2, 4):
            sized = within_budget(method, evaluations, budget, steps)
            assert sized.particles % children == 0 and 0.5 * budget < evaluations(sized) <= budget
            if steps == 2 and budget > 8 * children:
                assert sized.steps == 2


def test_svdd_is_sized_by_its_parents():
    sized = within_budget(SVDD(particles=5, children=5), evaluations, 64)
    assert sized.particles % 5 == 0 and 0.8 * 64 < evaluations(sized) <= 64


@pytest.mark.slow
def test_methods_of_ones_own_join_a_sweep_and_are_compared_by_pairs(tmp_path):
    own, suite = tmp_path / "own.py", tmp_path / "small.yaml"
    own.write_text(OWN)
    suite.write_text(SUITE.format(own))
    run = ["bench", str(suite), f"out={tmp_path / 'run'}"]
    for pair, judge in ((("plain", "brood"), []), (("fitted", "plain"), ["problems.bag.judge=null"])):
        assert cli.main([*run, f"difference=[{','.join(pair)}]", *judge]) == 0
        whole = json.loads((tmp_path / "run" / "summary.json").read_text())
        rows = {row["method"]: row for row in whole["rows"]}
        assert set(rows) == {"unsteered, 4 jumps", "best_of_n", "plain", "fitted", "brood"}
        assert (rows["plain"]["evaluations"], rows["fitted"]["evaluations"]) == (4, 16)
        assert 8 < rows["brood"]["evaluations"] <= 16
        (apart,) = whole["differences"]
        counts = "reward" if judge else "held_out"
        assert apart["of"] == list(pair) and apart["pairs"] == 8
        assert apart["mean"] == pytest.approx(rows[pair[0]][counts] - rows[pair[1]][counts], abs=1e-5)
        assert apart["half"] > 0
