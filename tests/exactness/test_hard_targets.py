"""Estimates on targets that are concentrated: few modes of many are rewarded, and steps forget which one a particle was in.

All targets are known: Gaussian mixtures tilted by a'x - x'Bx/2. Where exp(log_z) is said to be unbiased its mean over the
outputs is compared with Z, and the weighted mean reward with the tilt's. `steerfm bench exact --claims` does so for all
methods, at two budgets and more outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import sure

import steerfm
from steerfm import GaussianMixture
from steerfm.steering import (
    DAS,
    FMTT,
    TDS,
    BestChild,
    BestOfN,
    DiamondSMC,
    ExactPosterior,
    FeynmanKac,
    FKSteering,
    Funnel,
    Marginal,
    Narrow,
    Renoise,
    Resample,
    Steering,
    TopK,
    TreeSearch,
    Window,
)
from steerfm.steering.selection import Selected

pytestmark = pytest.mark.slow

LIMIT = 4.0
AT = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
GRID = GaussianMixture(torch.cartesian_prod(AT, AT), torch.full((9, 2), 0.3).double())
PHI = torch.arange(8, dtype=torch.float64) * math.pi / 4 + math.pi / 8
RING = GaussianMixture(4 * torch.stack([PHI.cos(), PHI.sin()], 1), torch.full((8, 2), 0.01).double())
DEEP = GaussianMixture(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).double(), torch.full((3, 16), 0.2))
CASES = {
    "grid": (GRID, [0.0, 0.0], [0.02, 2.0]),
    "other way": (GRID, [0.0, 0.0], [2.0, 0.02]),
    "ring": (RING, [1.5, 0.0], [0.0, 0.0]),
    "sharp": (GRID, [2.0, 3.0], [1.0, 2.0]),
    "deep": (DEEP, [1.0] + [0.0] * 15, [0.25] * 16),
}


def scores(name, method, n=200, strength=1.0):
    """z-scores of the mean of Z / Z exact, and of the weighted mean reward; and log of that mean."""
    mixture, a, b = CASES[name]
    a, B = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64).diag()

    def reward(x):
        return x @ a.to(x) - ((x @ B.to(x)) * x).sum(1) / 2

    target, log_z = mixture.tilt(strength * a, strength * B)
    mean, cov = target.mean(), target.cov()
    exact = a @ mean - (B * (cov + mean.outer(mean))).sum() / 2
    result = steerfm.steer(mixture.flow_map(steps=6), reward, method, n=n, strength=strength, batch_size=50)
    share = (sure(result.log_z).double() - log_z).exp()
    found = (result.log_weights.exp() * result.rewards).sum(1).double()
    return tuple(float((x.mean() - at) / (x.std() / math.sqrt(n))) for x, at in ((share, 1.0), (found, exact)))


@pytest.mark.parametrize("name", CASES)
def test_the_default_is_right_where_its_first_step_forgets(name):
    z = scores(name, Funnel.within(512))
    print(name, z)
    assert abs(z[0]) < LIMIT and abs(z[1]) < LIMIT


@pytest.mark.parametrize("guidance", [None, "endpoint"])
def test_marginal_weights_have_the_law_of_twisted_ones(guidance):
    """Any number of particles, any threshold: exp(log_z) is unbiased, by the path as a whole."""
    method = FeynmanKac(particles=24, steps=4, tempering="none", correction="marginal", guidance=guidance, threshold=0.9)
    z = scores("grid", method, 300)
    assert abs(z[0]) < LIMIT


def test_marginal_is_steadier_than_twisted():
    def spread(correction):
        method = FeynmanKac(particles=64, correction=correction)
        result = steerfm.steer(GRID.flow_map(steps=6), lambda x: -(x[:, 0] ** 2) / 100 - x[:, 1] ** 2, method, n=40)
        return sure(result.log_z).std()

    assert spread("marginal") < 0.6 * spread("twisted")


def test_one_particle_has_no_other_parents():
    mixture = GRID
    runs = [
        steerfm.steer(mixture.flow_map(), lambda x: x[:, 0], FeynmanKac(particles=1, steps=4, correction=correction), n=5)
        for correction in ("twisted", "marginal")
    ]
    assert torch.equal(runs[0].samples, runs[1].samples)
    torch.testing.assert_close(runs[0].log_z, runs[1].log_z)


def test_marginal_asks_the_network_for_nothing_more():
    costs = [
        steerfm.steer(GRID.flow_map(), lambda x: x[:, 0], Funnel(correction=correction), n=2).cost
        for correction in ("twisted", "marginal")
    ]
    assert costs[0].forwards == costs[1].forwards == 2 * Funnel().first + 2 * Funnel().particles * (Funnel().steps - 1)


@pytest.mark.parametrize("parts", [{"transition": "diffuse"}, {"transition": "bridge"}, {"lookahead": "denoise"}])
def test_where_other_parents_would_cost_calls_marginal_is_twisted(parts):
    runs = [
        steerfm.steer(GRID.flow_map(), lambda x: x[:, 0], FeynmanKac(8, 4, correction=correction, **parts), n=3)
        for correction in ("twisted", "marginal")
    ]
    assert torch.equal(runs[0].log_weights, runs[1].log_weights) and runs[0].cost.forwards == runs[1].cost.forwards


# --- log Z only where it is honest -----------------------------------------------------------------------------------
class Mine:
    """A selection that says nothing of itself."""

    ranks = prunes = False

    def select(self, candidates):
        return Selected.none(candidates.log_w)


@pytest.mark.parametrize(
    ("selection", "honest"),
    [
        (None, True),
        ("ssp", True),
        (Resample("residual"), True),
        (Window(Resample("multinomial"), 2), True),
        (Narrow(4), True),
        (Narrow(4, Window(Resample())), True),
        (TopK(2), False),
        (TopK(2, prune=True), False),
        (BestChild(2), False),
        (BestChild(2, soft=True), False),
        (Window(TopK(2)), False),
        (Window(Window(BestChild(2)), 2), False),
        (Narrow(4, TopK(2)), False),
        (Mine(), False),
    ],
)
def test_only_an_unbiased_selection_gives_log_z(selection, honest):
    method = Steering(particles=8, steps=4, resampling=selection)
    result = steerfm.steer(GRID.flow_map(), lambda x: x[:, 0], method, n=2)
    assert (result.log_z is not None) == honest


@pytest.mark.parametrize(
    ("method", "honest"),
    [
        (FMTT(4, 4), False),
        (TreeSearch(8, 3), False),
        (TreeSearch(8, 1), True),
        (TreeSearch(8, 1, greedy=True), False),
        (FKSteering(), False),
        (TDS(), False),
        (DAS(), True),
        (DiamondSMC(), False),
        (DiamondSMC(lookahead=ExactPosterior(GRID)), True),
        (TDS(tempering="linear"), True),
        (FeynmanKac(8, 4, tempering="none"), True),
        (FeynmanKac(8, 4, lookahead="renoise", tempering="none"), False),
        (FeynmanKac(8, 4, lookahead="denoise", tempering="none", resampling=None), True),
    ],
)
def test_a_method_that_is_biased_gives_no_log_z(method, honest):
    result = steerfm.steer(GRID.flow_map(), lambda x: x[:, 0], method, n=2)
    assert (result.log_z is not None) == honest


@pytest.mark.parametrize("name", ["grid", "deep"])
@pytest.mark.parametrize(
    "method", [BestOfN(particles=256, steps=1), FeynmanKac(particles=32, correction="marginal")], ids=["best_of_n", "marginal"]
)
def test_other_estimates_are_right_there_too(method, name):
    z = scores(name, method)
    print(name, z)
    assert abs(z[0]) < LIMIT and abs(z[1]) < LIMIT


def test_the_first_look_gives_log_z_only_by_a_jump():
    def log_z(method: Callable[..., Any] = Funnel, **parts):
        return steerfm.steer(GRID.flow_map(), lambda x: x[:, 0], method(**parts), n=2).log_z

    first = sure(log_z())
    assert first.equal(sure(log_z(steps=2))) and first.equal(sure(log_z(guidance=None, resampling="ssp")))
    assert log_z(lookahead="denoise") is None and log_z(lookahead=Renoise(k=2)) is None
    assert log_z(resampling=TopK(2)) is None and log_z(correction="none") is None
    assert first.equal(sure(log_z(FeynmanKac, particles=64, steps=5, tempering="none")))
    assert log_z(tempering="linear") is not None  # nothing is chosen at t = 0: the path's own weights


def test_the_default_returns_no_copies():
    """The last step has no noise, so a selection before it would only make copies."""
    for method in (Funnel(), Funnel(particles=8, first=8, steps=1), Funnel(steps=3, resampling=Resample(threshold=1.0))):
        result = steerfm.steer(GRID.flow_map(), lambda x: 3 * x[:, 0], method, n=4)
        for x in result.samples:
            assert len(x.unique(dim=0)) == len(x)


def test_below_eight_calls_the_default_is_best_of_n():
    for budget in range(1, 8):
        few, plain = Funnel.within(budget), BestOfN(particles=budget, steps=1)
        runs = [steerfm.steer(GRID.flow_map(), lambda x: x[:, 0], method, n=4) for method in (few, plain)]
        torch.testing.assert_close(runs[0].log_z, runs[1].log_z)
        torch.testing.assert_close(runs[0].log_weights, runs[1].log_weights)


def test_a_marginal_weight_forgets_the_path():
    with pytest.raises(ValueError, match="difference"):
        Marginal("max")
