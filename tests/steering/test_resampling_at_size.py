"""Resampling of many particles, of many outputs at once and of hard weights, against its definitions one output at a time."""

import math

import numpy as np
import pytest
import torch

from steerfm.steering.resampling import SCHEMES
from steerfm.steering.selection import Resample

SIZES = [8, 100, 1_000, 10_000]


def stream(seed):
    return torch.Generator().manual_seed(seed)


def hard_log_weights(k, seed=0):
    """Log-weights (9, k), float64, each row hard in its own way."""
    draws = torch.randn(k, generator=stream(seed), dtype=torch.float64)
    rows = torch.zeros(9, k, dtype=torch.float64)
    rows[0, 1:] = -math.inf  # one particle has all, at either end or within
    rows[1, :-1] = -math.inf
    rows[2, torch.arange(k) != k // 2] = -math.inf
    rows[3, 1:] = math.log(1e-300)  # nothing against the first, and yet not zero
    rows[4] = draws * 50
    rows[5, ::2] = -math.inf  # every second is weightless
    rows[6, k // 2 :] = -math.inf  # a weightless half at the end
    rows[7] = torch.linspace(-700, 0, k, dtype=torch.float64)
    rows[8] = draws - 1e5
    return rows


def children(ancestors, k):
    return torch.stack([torch.bincount(row, minlength=k) for row in ancestors])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hard_weights_have_as_many_children_as_the_scheme_promises(scheme, k, seed):
    log_w = hard_log_weights(k, seed)
    w = log_w.softmax(1)
    ancestors = Resample(scheme).draw(log_w, torch.rand(len(w), k, generator=stream(seed)))
    assert ancestors.shape == w.shape and ancestors.dtype == torch.long
    assert (w.gather(1, ancestors) > 0).all()
    got, expected = children(ancestors, k), k * w
    assert (got.sum(1) == k).all()
    assert (got[[0, 1, 2, 3], [0, k - 1, k // 2, 0]] == k).all()
    slack = 1e-9 * k
    if scheme != "multinomial":
        assert (got[5, 1::2] - 2).abs().max() < 2 if scheme == "stratified" else got[5, 1::2].min() >= 1
    if scheme in ("residual", "systematic", "ssp"):
        assert (got >= (expected - slack).floor()).all()
    if scheme in ("systematic", "ssp"):
        assert (got <= (expected + slack).ceil()).all()
    if scheme == "stratified":
        assert ((got - expected).abs() < 2 + slack).all()


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_ancestors_are_the_inverse_of_the_cumulative_weights(scheme, k):
    w = hard_log_weights(k)[[3, 4, 6, 7, 8]].softmax(1)
    for m in (1, k // 3, k, 2 * k):
        u = torch.rand(len(w), m, generator=stream(m), dtype=torch.float64)
        points = {
            "multinomial": u,
            "stratified": (torch.arange(m) + u) / m,
            "systematic": (torch.arange(m) + u[:, :1]) / m,
        }[scheme]
        got = SCHEMES[scheme](w, u)
        for row in range(len(w)):
            edges = np.cumsum(w[row].numpy())
            assert got[row].tolist() == np.searchsorted(edges / edges[-1], points[row].numpy(), "right").tolist(), (row, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_outputs_are_resampled_as_each_alone(scheme, dtype):
    for n, k in ((300, 20), (64, 300), (9, 10_000)):
        log_w = torch.cat([hard_log_weights(k, seed) for seed in range(-(-n // 9))])[:n]
        w, u = log_w.to(dtype).softmax(1), torch.rand(n, k, generator=stream(n)).to(dtype)
        got = SCHEMES[scheme](w, u)
        for row in range(0, n, 7):
            assert torch.equal(got[row : row + 1], SCHEMES[scheme](w[row : row + 1], u[row : row + 1]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_particles_have_the_children_that_they_are_worth(scheme):
    """Children of each hundredth of the particles over all outputs, by their z-scores, where a bound of the variance holds."""
    n, k = 200, 5000
    w = torch.randn(k, generator=stream(2), dtype=torch.float64).mul(2).softmax(0)
    u = torch.rand(n, k, generator=stream(3), dtype=torch.float64)
    got = children(SCHEMES[scheme](w.expand(n, k), u), k).double().view(n, 100, -1).sum(2)
    share = w.view(100, -1).sum(1)
    z = (got.mean(0) - k * share) / (k * share * (1 - share) / n).sqrt()  # none varies more than independent draws
    assert z.abs().max() < 4.5
    if scheme == "multinomial":
        assert 60 < z.square().sum() < 160  # chi-square of 99


def test_independent_draws_are_in_no_order():
    """Neighbours of `multinomial` are independent: a child's rank says nothing of the next one's."""
    k = 4000
    w = torch.full((2, k), 1 / k, dtype=torch.float64)
    ancestors = SCHEMES["multinomial"](w, torch.rand(2, k, generator=stream(4), dtype=torch.float64)).double()
    for row in ancestors:
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 4 / math.sqrt(k)
