"""Sizes: every method spends a budget of network evaluations in its best shape, from the class, an object, and a suite."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import steerfm
from steerfm import GaussianMixture
from steerfm.flowmap import Guided
from steerfm.steering.noise_search import NoiseSearch
from steerfm.steering.size import Sized, plain_evaluations, steps_within

MAP = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], [[0.2, 0.2], [0.2, 0.2]]).flow_map(steps=1)
COARSE = {"fmtt": 0.93, "mfm_g": 0.8, "waltz": 0.88}
"""Methods of which no whole number of steps and particles comes nearer to these budgets."""


def reward(x: torch.Tensor) -> torch.Tensor:
    return -(x - 1).square().sum(1)


def sized(name: str, budget: int) -> Any:
    method: Any = steerfm.method(name)
    return method.within(budget)


def spent(method: Any, flow_map: Any = MAP) -> float:
    return steerfm.steer(flow_map, reward, method, cond=None).cost.evaluations


@pytest.mark.parametrize("budget", [64, 256])
@pytest.mark.parametrize("name", steerfm.methods())
def test_every_method_spends_its_budget_and_no_more(name, budget):
    method = sized(name, budget)
    assert COARSE.get(name, 0.95) * budget <= spent(method) <= budget
    assert spent(method) == plain_evaluations(method)


@pytest.mark.parametrize("budget", [100, 333])
@pytest.mark.parametrize("name", ["best_of_n", "funnel", "svdd", "fmrg_j", "rbf", "reno", "zero_order", "tree_search", "das"])
def test_odd_budgets_are_spent_too(name, budget):
    assert 0.94 * budget <= spent(sized(name, budget)) <= budget


@pytest.mark.parametrize("name", steerfm.methods())
def test_a_size_changes_the_size_only(name):
    """All other settings are those that were given, and the class is sized as its defaults are."""
    method: Any = steerfm.method(name)
    sizes = {"particles", "steps", "first", "calls", "iterations", "candidates", "budget", "warmup", "lookahead", "step"}
    given: Any = replace(method, gamma=0.5) if hasattr(method, "gamma") else method
    given = replace(given, power=0.7, stop=0.8) if hasattr(method, "stop") else given
    made = given.within(128)
    same = [each.name for each in fields(given) if each.init and each.name not in sizes]
    assert all(getattr(made, each) == getattr(given, each) for each in same)
    assert type(method).within(128) == method.within(128)


def test_more_is_bought_by_more():
    for name in steerfm.methods():
        method: Any = steerfm.method(name)
        costs = [spent(method.within(budget)) for budget in (64, 128, 256)]
        assert costs == sorted(costs) and costs[2] > 2 * costs[0], name


@pytest.mark.parametrize("name", ["best_of_n", "funnel", "feynman_kac", "dps", "fmrg_j", "reno"])
def test_what_a_call_costs_is_that_of_the_map(name):
    """Guidance without a classifier calls the network twice."""
    guided = Guided(_Classes(), 2.0)

    def evaluations(method: Any) -> float:
        return steerfm.steer(guided, reward, method, cond="a").cost.evaluations

    method: Any = steerfm.method(name)
    fitted = method.within(128, evaluations)
    assert 0.9 * 128 <= evaluations(fitted) <= 128 < evaluations(method.within(128))


class _Classes(steerfm.FlowMap):
    """A map of two classes that draws towards zero, in form only."""

    def __init__(self) -> None:
        super().__init__((2,), class_names=("a", "b"))

    def average_velocity(self, x: Any, s: Any, t: Any, cond: Any) -> torch.Tensor:
        return -x


@pytest.mark.parametrize("name", ["best_of_n", "feynman_kac", "reno", "rbf", "funnel", "svdd"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_may_be_asked_for(name, steps):
    method: Any = steerfm.method(name)
    made: Any = method.within(256, steps=steps)
    assert (made.iterations if isinstance(made, NoiseSearch) else made.steps) == steps
    assert spent(made) <= 256


def test_steps_that_are_too_dear_are_halved():
    assert steerfm.BestOfN.within(4, steps=16).steps == 4 and steerfm.DPS.within(24, steps=64).steps == 8


def test_what_cannot_be_so_cheap_says_so():
    with pytest.raises(ValueError, match="budget=4: DiamondSMC needs more network evaluations per output than that"):
        steerfm.DiamondSMC.within(4)
    with pytest.raises(ValueError, match="budget=0: at least one is needed"):
        steerfm.BestOfN().within(0)


def test_shapes_are_lines_between_logarithms():
    shape = {64: 4, 256: 8}
    assert steps_within(shape, 64) == pytest.approx(4) and steps_within(shape, 256) == pytest.approx(8)
    assert steps_within(shape, 128) == pytest.approx(4 * 2**0.5) and steps_within(shape, 1024) == pytest.approx(16)
    assert steps_within(shape, 16) == pytest.approx(2) and steps_within(shape, 1) == 1
    assert steps_within({64: 4, 256: 4}, 16) == pytest.approx(2) and steps_within({64: 4, 256: 4}, 1024) == pytest.approx(4)


def test_sizes_are_of_every_preset():
    assert all(issubclass(kind, Sized) for kind in steerfm.steering.METHODS.values())


def test_warm_up_gradients_are_for_the_one_that_goes_on():
    """A warm-up of one step: all look with a gradient at t = 0 and jump; at t_1 all look, and the best alone has a gradient."""
    k, steps = 6, 4
    cost = steerfm.steer(MAP, reward, steerfm.FMRGJ(particles=k, steps=steps, warmup=1), cond=None).cost
    assert cost.backwards == k + (steps - 1)
    assert cost.forwards == 2 * k + k + 2 * (steps - 1) - 1


@pytest.mark.parametrize("stop", [0.3, 0.5])
def test_a_warm_up_that_ends_unguided_looks_once(stop):
    """Four steps, and the one that goes on is chosen at t = 0.5, from where on nothing is guided."""
    k, steps = 4, 4
    cost = steerfm.steer(MAP, reward, steerfm.FMRGJ(particles=k, steps=steps, warmup=2, stop=stop), cond=None).cost
    assert cost.backwards == 2 * k
    assert cost.forwards == 2 * 2 * k + k + 2  # two guided steps of all, a look, and two jumps of one


@pytest.mark.parametrize("name", steerfm.methods())
def test_what_help_says_of_a_shape_is_the_shape(name):
    kind: Any = type(steerfm.method(name))
    words = " ".join((kind.__doc__ or "").split())
    if "Within a budget:" not in words:
        return
    said = words.split("Within a budget:")[1].split("(docs")[0]
    told = {
        int(at): int(steps)
        for steps, at in re.findall(r"(\d+)(?: \w+)? at (\d+)", said.replace("one iteration", "1 iteration"))
    }
    shape = {8: 4} if name == "funnel" else kind.shape
    assert told.items() <= shape.items() and (told or len(set(shape.values())) == 1 or name == "random_search")


@pytest.mark.parametrize("budget", [8, 40, 90])
def test_budget_forcing_spends_what_is_left_at_the_last_time(budget):
    method = steerfm.method("rbf", budget=budget, steps=8, particles=2)
    assert spent(method) == 2 * budget
