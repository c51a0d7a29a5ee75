"""Pareto k-hat against laws whose tail is known, and what a run says that its strength did."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import steerfm
from steerfm import cli
from steerfm.steering.diagnosis import Diagnosis, generalised_pareto, pareto_k, tail


def stream(seed):
    return torch.Generator().manual_seed(seed)


def gpd(k, n, m, sigma=1.0, seed=0):
    """Samples (n, m) of the generalised Pareto law, by its quantiles."""
    u = torch.rand(n, m, generator=stream(seed), dtype=torch.float64)
    return -sigma * torch.log1p(-u) if k == 0 else sigma * torch.expm1(-k * torch.log1p(-u)) / k


@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("k", [-0.4, 0.0, 0.2, 0.5, 0.7, 1.0, 2.0])
def test_the_shape_of_a_generalised_pareto_law_is_found(k, sigma):
    n, m = 60, 1000
    shape, scale = generalised_pareto(gpd(k, n, m, sigma, seed=1))
    error = (1 + k) / math.sqrt(m)  # of the maximum of the likelihood (Smith 1987), for k above -1/2
    assert abs(shape.mean() - k) < 5 * error / math.sqrt(n) + 0.01
    assert abs(shape.std() / error - 1) < 0.5
    assert abs(scale.mean() / sigma - 1) < 0.05


def test_the_fit_is_near_that_of_maximum_likelihood():
    x = gpd(0.4, 5, 400, 2.0, seed=2)
    shape, scale = generalised_pareto(x)
    for row, k, sigma in zip(x, shape, scale):
        theirs, _, width = stats.genpareto.fit(row.numpy(), floc=0)
        assert abs(k - theirs) < 0.03 and abs(sigma / width - 1) < 0.05


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("alpha", [0.8, 1.0, 2.0, 5.0])
def test_weights_of_a_pareto_law_have_its_index(alpha, scale):
    """P(w > x) = x^-alpha has k = 1 / alpha, whatever the weights sum to."""
    k = 20_000
    u = torch.rand(30, k, generator=stream(3), dtype=torch.float64)
    log_w = -torch.log(u) / alpha + math.log(scale)
    m = tail(k)
    expected = (m / alpha + 5) / (m + 10)
    assert abs(pareto_k(log_w).mean() - expected) < 4 * (1 + 1 / alpha) / math.sqrt(m * 30) + 0.02
    assert torch.allclose(pareto_k(log_w), pareto_k(log_w - 1234.5), atol=1e-6)


def test_importance_weights_of_a_normal_law_have_a_known_tail():
    """Proposal N(0, s^2) for N(0, 1): the ratio's tail index is 1 - s^2, so k = 1 - s^2 where s < 1."""
    for s in (0.5, 0.7):
        x = torch.randn(40, 50_000, generator=stream(4), dtype=torch.float64) * s
        log_w = -x.square() / 2 + x.square() / (2 * s**2)
        assert abs(pareto_k(log_w).mean() - (1 - s**2)) < 0.1


def test_where_it_cannot_be_told_it_is_nan():
    assert pareto_k(torch.randn(3, 24)).isnan().all() and pareto_k(torch.randn(3, 25)).isfinite().all()
    assert pareto_k(torch.zeros(2, 400)).isnan().all()
    assert pareto_k(torch.randn(0, 100)).shape == (0,)


@pytest.mark.parametrize("k", [25, 100, 1000])
def test_hard_weights_are_heavy_or_unknown_and_never_an_error(k):
    log_w = torch.zeros(5, k, dtype=torch.float64)
    log_w[0, 1:] = -math.inf  # one has all
    log_w[1] = torch.linspace(-700, 0, k)
    log_w[2, 3:] = -math.inf
    log_w[3] = torch.randn(k, generator=stream(5)) * 100
    log_w[4, : k // 2] = -math.inf
    khat = pareto_k(log_w)
    assert khat.shape == (5,) and not khat.isinf().any()
    assert (khat[[0, 1, 2, 3]] > 0.7).all() and khat[4].isnan()


def test_rows_are_independent_of_each_other_and_of_the_order():
    log_w = torch.randn(6, 300, generator=stream(6), dtype=torch.float64)
    whole = pareto_k(log_w)
    assert torch.allclose(torch.cat([pareto_k(row[None]) for row in log_w]), whole)
    assert torch.equal(pareto_k(log_w[:, torch.randperm(300, generator=stream(7))]), whole)


# --- runs ------------------------------------------------------------------------------------------------------------
MIXTURE = steerfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], [[0.2, 0.2]] * 2)


def first(x):
    return x[:, 0]


def words(method, strength, n=4):
    return steerfm.steer(MIXTURE.flow_map(steps=2), first, method, n, strength=strength).diagnosis.in_words()


@pytest.mark.parametrize(
    "method", [steerfm.BestOfN(particles=64, steps=2), steerfm.FeynmanKac(particles=64, steps=4), steerfm.Funnel(particles=64)]
)
def test_a_strength_is_too_small_right_or_too_large(method):
    gradient_free = not isinstance(method, steerfm.Funnel)  # the funnel follows a gradient where there is one
    for strength, said in ((0.0, "too small"), (0.01, "too small"), (1.0, "has an effect"), (1e5, "too large")):
        told = words(method, strength)["the strength"]
        if strength == 1.0 or gradient_free or strength > 1:
            assert told.startswith(said), (strength, told)


def test_a_guided_run_of_even_weights_is_not_called_too_small():
    """Exact guidance leaves weights even: what it did is in the samples."""
    told = words(steerfm.TDS(particles=32, steps=8), 0.02)
    assert not told.get("the strength", "").startswith("too small")


def test_a_search_weighs_nothing():
    told = words(steerfm.method("svdd", particles=8, steps=3), 3.0)
    assert "the strength" not in told and "Pareto k-hat" not in told


def test_few_particles_have_no_tail_and_one_has_nothing_to_say():
    assert "Pareto k-hat" not in words(steerfm.BestOfN(particles=16, steps=1), 1.0)
    assert set(words(steerfm.BestOfN(particles=1, steps=1), 1.0)) == {"ESS"}


def test_heavy_weights_are_told_from_light_ones():
    """Rewards of exponential law and strength s give weights of a Pareto law: k = s."""

    def reward(x):
        return -torch.log(torch.special.ndtr(x[:, 0].double()).clamp(1e-12, 1 - 1e-12)).float()

    normal = steerfm.GaussianMixture([[0.0]], [[1.0]]).flow_map(steps=1)
    for strength, heavy in ((0.3, False), (1.5, True)):
        run = steerfm.steer(normal, reward, steerfm.BestOfN(particles=4000, steps=1), n=3, strength=strength)
        told = run.diagnosis.in_words()["Pareto k-hat"]
        assert ("do not trust the weighted particles" in told) == heavy, told
        assert abs(run.diagnosis.heavy.mean() - strength) < 0.25


def test_the_diagnosis_of_parts_is_that_of_the_whole():
    run = steerfm.steer(MIXTURE.flow_map(steps=2), first, steerfm.FeynmanKac(particles=32, steps=3), 5, strength=2.0)
    whole, parts = run.diagnosis, Diagnosis.cat([run[:2].diagnosis, run[2:].diagnosis])
    for name, value in vars(whole).items():
        assert torch.allclose(value.double(), vars(parts)[name].double(), equal_nan=True), name
    assert whole.in_words() == parts.in_words()


@pytest.mark.parametrize(("strength", "said"), [(0, "too small"), (100_000, "too large")])
def test_terminal_page_json_and_repr_say_the_same(tmp_path, monkeypatch, capsys, strength, said):
    monkeypatch.chdir(tmp_path)
    few = [
        "method=best_of_n",
        "method.particles=32",
        "method.steps=1",
        "n=3",
        "batch_size=2",
        "judge=null",
        f"strength={strength}",
    ]
    assert cli.main(["steer", "reward=brightness", *few, "out=run"]) == 0
    result = steerfm.SteeringResult.load("run")
    told = result.diagnosis.in_words()
    shown, page = capsys.readouterr().out, html.unescape(Path("run/report.html").read_text())
    assert told["the strength"].startswith(said)
    for name, sentence in told.items():
        assert f"{name}: {sentence}\n" in shown and f"<dt>{name}</dt><dd>{sentence}</dd>" in page and sentence in repr(result)
    kept = json.loads(Path("run/result.json").read_text())["pareto_k"]
    heavy = result.diagnosis.heavy
    assert kept is None if heavy.isnan().all() else np.isclose(kept, heavy[heavy.isfinite()].mean().item())
