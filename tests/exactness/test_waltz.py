"""Noise, draw, accept: an exact law at every sweep, the tilt at the end, and what a jump in place of the draws does to it."""

import math
from dataclasses import replace

import pytest
import torch
from kinds import check_outputs_are_independent, sure

import steerfm
from steerfm import GaussianMixture
from steerfm.steering import ExactPosterior, Jump, Posterior, Smooth, Waltz

MIXTURE = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
RING = GaussianMixture([[3 * math.cos(a), 3 * math.sin(a)] for a in torch.arange(8) * math.pi / 4], [[0.09, 0.09]] * 8)

# name: mixture, a and B of the reward, strength, times, sweeps
TARGETS = {
    "mild": (MIXTURE, [1.2], 0.3, 1.0, (0.3, 0.5), 16),
    "concentrated": (MIXTURE, [3.0], 4.0, 2.0, (0.2, 0.4, 0.6, 0.8), 40),
    "ring": (RING, [1.0, 0.4], 0.2, 1.0, (0.1, 0.2, 0.4), 40),
}


def quadratic(a, b):
    a = torch.tensor(a, dtype=torch.float64)

    class Quadratic(steerfm.Reward):
        differentiable = False

        def score(self, images, prompts=None, labels=None):
            return images.double() @ a - b / 2 * images.double().square().sum(1)

    return Quadratic()


def run(name, n, seeds=0, lookahead=None, **fields):
    mixture, a, b, strength, times, sweeps = TARGETS[name]
    method = Waltz(1, times=times, warmup=sweeps - 1, lookahead=lookahead or ExactPosterior(mixture))
    return steerfm.steer(
        mixture.flow_map(steps=8), quadratic(a, b), replace(method, **fields), n=n, seeds=seeds, strength=strength, batch_size=n
    )


def exact(name):
    mixture, a, b, strength, *_ = TARGETS[name]
    return mixture.tilt(a, b, strength=strength)[0]


def distance(x, y):
    """W1 along each axis, the largest."""
    return (x.double().sort(0).values - y.double().sort(0).values).abs().mean(0).max().item()


# --- the law ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TARGETS)
def test_the_tilt_within_forty_sweeps(name):
    """W1 to the exact tilt is that of two samples of it, within half."""
    n, target = 2000, exact(name)
    draws = [target.sample(n, torch.Generator().manual_seed(seed)) for seed in range(9)]
    floor = sum(distance(draws[0], other) for other in draws[1:]) / 8
    x = run(name, n).samples[:, 0]
    found = sum(distance(x, other) for other in draws) / 9
    assert found < 1.5 * floor, (found, floor)


@pytest.mark.parametrize("name", TARGETS)
def test_means_and_modes_over_fifty_seeds(name):
    """z-scores of the mean and of each mode's mass, over 50 runs of 30 chains."""
    mixture = TARGETS[name][0]
    target, many = exact(name), 50
    reference = target.sample(400_000, torch.Generator().manual_seed(3))

    def modes(x):
        return torch.nn.functional.one_hot(torch.cdist(x.double(), mixture.means).argmin(1), len(mixture.means)).double()

    x = run(name, 30 * many).samples[:, 0].double()
    for f in (lambda x: x.double(), modes):
        runs, expected = f(x).unflatten(0, (many, 30)).mean(1), f(reference).mean(0)
        seen = expected > 0.01 if f is modes else torch.ones_like(expected, dtype=torch.bool)
        z = (runs.mean(0) - expected) / (runs.std(0) / math.sqrt(many))
        assert z[seen].abs().max() < 4, z


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("strength", [0.7, -0.5])
def test_a_sweep_keeps_the_law_of_the_ladder(chains, strength):
    """Starts weighted by exp(sum_i beta_i V_i) are draws of the ladder's law, and so is what a sweep makes of them."""
    n, starts = 4000, []

    def reward(x):
        starts.append(1.2 * x[:, 0] - 0.15 * x[:, 0] ** 2)
        return starts[-1]

    method = Waltz(1, temperatures=chains, warmup=1, times=(0.4, 0.7), lookahead=ExactPosterior(MIXTURE))
    x = steerfm.steer(MIXTURE.flow_map(), reward, method, n=n, strength=strength, batch_size=n).samples[:, 0, 0].double()
    weights = (strength * (starts[0].double().view(n, chains) * torch.tensor(method.ladder()))).sum(1).exp()
    target = MIXTURE.tilt([1.2], 0.3, strength=strength)[0].sample(1_000_000, torch.Generator().manual_seed(3))[:, 0]
    for f in (lambda x: x, lambda x: (x < -0.7).double(), lambda x: (x > 1.5).double()):
        residual = weights * (f(x) - f(target).mean())
        assert abs(residual.mean() / (residual.std() / math.sqrt(n))) < 4


def test_a_jump_in_place_of_the_draws_is_biased():
    """A jump keeps the law where there is no reward, but is not reversible: here its mean square comes out too large."""
    near, n = GaussianMixture([[-1.0], [1.0]], [[0.09], [0.09]]), 6000
    target, scores = near.tilt([2.0])[0], {}
    for lookahead in (ExactPosterior(near), Jump()):
        method = Waltz(1, times=(0.3,), warmup=24, lookahead=lookahead)
        squares = steerfm.steer(near.flow_map(), quadratic([2.0], 0.0), method, n=n, batch_size=n).samples.double().square()
        expected = target.cov()[0, 0] + target.mean()[0] ** 2
        scores[type(lookahead).__name__] = ((squares.mean() - expected) / (squares.std() / n**0.5)).item()
    assert abs(scores["ExactPosterior"]) < 4 and scores["Jump"] > 4, scores


def test_glass_draws_are_as_good_as_their_steps():
    draws = exact("mild").sample(2000, torch.Generator().manual_seed(0))
    coarse, fine = (distance(run("mild", 2000, lookahead=Posterior(steps=s)).samples[:, 0], draws) for s in (1, 6))
    assert fine < coarse / 2


def test_hot_chains_bring_modes_apart_together():
    """Two modes that a cold chain does not travel between, of equal mass, from one start."""
    far = GaussianMixture([[-6.0], [6.0]], [[0.04], [0.04]], [0.9, 0.1])
    a = math.log(9) / 12  # the tilt has both alike
    cold = Waltz(1, times=(0.8,), warmup=39, lookahead=ExactPosterior(far))
    hot = Waltz(1, times=(0.8, 0.05), warmup=39, temperatures=3, lookahead=ExactPosterior(far))
    shares = []
    for method in (cold, hot):
        x = steerfm.steer(far.flow_map(), quadratic([a], 0.0), method, n=1000, batch_size=1000).samples
        shares.append((x > 0).double().mean().item())
    assert abs(shares[0] - 0.1) < 0.05 and abs(shares[1] - 0.5) < 0.07, shares


# --- what is counted and recorded ------------------------------------------------------------------------------------
def test_cost_and_acceptance():
    result = steerfm.steer(
        MIXTURE.flow_map(), quadratic([1.2], 0.3), Waltz(3, 2, temperatures=2, warmup=4, lookahead=ExactPosterior(MIXTURE)), n=5
    )
    sweeps, accepted = 4 + 3 * 2, sure(result.trace.accepted)
    assert result.cost.reward_calls == 5 * 2 * (sweeps + 1) and result.samples.shape == (5, 3, 1)
    assert accepted.shape == (sweeps, 5) and accepted.dtype == torch.bool and 0 < accepted.double().mean() < 1
    assert not result.trace.resampled.any()


def test_strength_zero_accepts_all_and_keeps_the_prior():
    x = run("mild", 2000, lookahead=ExactPosterior(MIXTURE), warmup=9)
    free = steerfm.steer(
        MIXTURE.flow_map(), quadratic([1.2], 0.3), Waltz(1, warmup=9, lookahead=ExactPosterior(MIXTURE)), n=2000, strength=0.0
    )
    prior = MIXTURE.sample(2000, torch.Generator().manual_seed(1))
    assert sure(free.trace.accepted).all() and not sure(x.trace.accepted).all()
    assert distance(free.samples[:, 0], prior) < 0.1


def test_outputs_are_independent():
    strength = torch.tensor([0.5, 1.0, 2.0, -0.3])
    method = Waltz(2, 1, temperatures=2, warmup=3, lookahead=ExactPosterior(MIXTURE))
    check_outputs_are_independent(MIXTURE.flow_map(), quadratic([1.2], 0.3), method, strength, rows=3)


@pytest.mark.parametrize("fields", [{"times": ()}, {"times": (0.0, 0.5)}, {"times": (0.5, 1.0)}])
def test_times_are_inside(fields):
    with pytest.raises(ValueError, match="times="):
        Waltz(**fields)


def test_a_move_is_one_draw():
    for several in (Posterior(k=2), Smooth(k=4)):
        with pytest.raises(ValueError, match="a move is one draw; take lookahead=posterior"):
            Waltz(lookahead=several)
