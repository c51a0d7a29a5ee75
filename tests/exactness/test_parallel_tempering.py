"""Parallel tempering of the noise: an exact law at every sweep, and the tilt at the end, against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from kinds import check_outputs_are_independent, sure

import steerfm
from steerfm import GaussianMixture
from steerfm.steering import ParallelTempering

A, B = 1.2, 0.3
MIXTURE = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
CUTS = (-0.7, 1.5)
FUNCTIONS = (
    lambda x: x,
    lambda x: (x < CUTS[0]).double(),
    lambda x: (x > CUTS[1]).double(),
)


def reward(x):
    return A * x[:, 0] - B / 2 * x[:, 0] ** 2


def exact(strength):
    target, _ = MIXTURE.tilt([A], B, strength=strength)
    x = target.sample(1_000_000, torch.Generator().manual_seed(3))[:, 0]
    return torch.stack([f(x).double().mean() for f in FUNCTIONS])


def values(x):
    """The mean of each function over the particles x (n, k), (functions, n)."""
    return torch.stack([f(x.double()).mean(1) for f in FUNCTIONS])


# --- the law ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chains", [1, 2, 3, 4])
@pytest.mark.parametrize("sweeps", [1, 4])
@pytest.mark.parametrize("strength", [0.7, -0.5])
def test_moves_and_swaps_keep_the_law_of_the_ladder(chains, sweeps, strength):
    """Starts weighted by exp(sum_i beta_i V_i) are draws of the ladder's law, and so is what any number of sweeps makes of
    them: the weighted mean of f over the coldest chain is that of the target, exactly."""
    n, seen = 3000, []

    def spy(x):
        seen.append(reward(x))
        return seen[-1]

    method = ParallelTempering(1, sweeps, temperatures=chains, warmup=0, radius=0.7)
    x = steerfm.steer(MIXTURE.flow_map(steps=1), spy, method, n=n, strength=strength).samples[:, :, 0]
    ladder = torch.tensor(method.ladder(), dtype=torch.float64)
    assert ladder[0] == 1 and (ladder.diff() < 0).all() and (chains == 1 or ladder[-1] == 0)
    w = (strength * (seen[0].double().view(n, chains) * ladder)).sum(1).exp()
    found, expected = values(x), exact(strength)
    for f, mean in zip(found, expected, strict=True):
        residual = w * (f - mean)  # of mean zero
        assert abs(residual.mean() / (residual.std() / math.sqrt(n))) < 4


@pytest.mark.parametrize("hops", [1, 2])
def test_many_sweeps_sample_the_tilt(hops):
    method = ParallelTempering(60, 2, temperatures=4, warmup=40, radius=0.5, hops=hops)
    result = steerfm.steer(MIXTURE.flow_map(steps=1), reward, method, n=150)
    assert result.log_z is None and result.log_weights.unique().numel() == 1
    found, expected = values(result.samples[..., 0]), exact(1.0)
    scores = (found.mean(1) - expected) / (found.std(1) / math.sqrt(found.shape[1]))
    assert scores.abs().max() < 4, scores


def test_few_sweeps_do_not():
    method = ParallelTempering(1, 1, temperatures=1, warmup=0, radius=0.1)
    found = values(steerfm.steer(MIXTURE.flow_map(steps=1), reward, method, n=400).samples[..., 0])
    scores = (found.mean(1) - exact(1.0)) / (found.std(1) / 20)
    assert scores.abs().max() > 4


def test_a_black_box_in_many_dimensions():
    """The tilt of N(0, I) by a step function: how often it is above, and that nothing else has moved."""
    d, n = 12, 100
    flow_map = GaussianMixture(torch.zeros(1, d), torch.ones(1, d)).flow_map(steps=1)

    class Above(steerfm.Reward):
        differentiable = False

        def score(self, images, prompts=None, labels=None):
            return (images.sum(1) / d**0.5 > 1).float()

    method = ParallelTempering(80, 1, temperatures=3, warmup=40, radius=0.6)
    x = steerfm.steer(flow_map, Above(), method, n=n, strength=3.0).samples.double()
    above = 0.15865525 * math.exp(3.0)
    share = (x.sum(2) / d**0.5 > 1).double().mean(1)
    assert abs((share.mean() - above / (above + 1 - 0.15865525)) / (share.std() / n**0.5)) < 4
    across = (x[..., 0] - x[..., 1]).square().mean(1)  # a direction that the reward does not see
    assert abs((across.mean() - 2) / (across.std() / n**0.5)) < 4


def test_swaps_cross_what_small_moves_do_not():
    """Two narrow modes far apart, the better one rare: small moves alone stay where they began."""
    map_ = GaussianMixture([[-4.0], [4.0]], [[0.02], [0.02]], [0.9, 0.1]).flow_map(steps=1)

    def far(x):
        return 2 * torch.tanh(x[:, 0])  # the tilted mass of the right mode is .1 e^4 / (.1 e^4 + .9) = .858

    share = {}
    for chains in (1, 4):
        method = ParallelTempering(40, 1, temperatures=chains, warmup=40, radius=0.05)
        share[chains] = (steerfm.steer(map_, far, method, n=60).samples > 0).double().mean((1, 2))
    assert share[1].mean() < 0.4 and abs(share[4].mean() - 0.858) < 0.08


# --- the contract ----------------------------------------------------------------------------------------------------
def test_a_constant_reward_leaves_the_law_of_the_map():
    """Every move is taken, every swap too."""
    n, flow_map = 500, GaussianMixture([[0.3]], [[0.5]]).flow_map(steps=1)
    method = ParallelTempering(2, 3, temperatures=3, warmup=2)
    x = steerfm.steer(flow_map, lambda x: 0.7 + 0.0 * x[:, 0], method, n=n, strength=5.0).samples.double()
    assert (x[:, 0] != x[:, 1]).all()
    for j in (0, 1):
        assert abs((x[:, j].mean() - 0.3) / (0.5 / n) ** 0.5) < 4
        assert abs(x[:, j].var() / 0.5 - 1) < 4 * (2 / n) ** 0.5


def test_cost_and_trace():
    method = ParallelTempering(3, 2, hops=2, temperatures=4, warmup=5)
    ticks = []
    result = steerfm.steer(
        MIXTURE.flow_map(steps=1), reward, method, n=2, strength=2.0, lookaheads=True, progress=lambda *t: ticks.append(t)
    )
    sweeps = 5 + 3 * 2
    assert ticks == [(i + 1, sweeps) for i in range(sweeps)]
    assert result.cost.forwards == 2 * 4 * 2 * (1 + sweeps) and result.cost.backwards == 0
    assert result.cost.reward_calls == result.cost.decodes == 2 * 4 * (1 + sweeps)
    trace = result.trace
    assert trace.value.shape == (sweeps, 2, 3)
    torch.testing.assert_close(trace.value[-1], 2.0 * result.rewards.double())
    assert torch.equal(sure(trace.lookaheads)[-1], result.samples[:, 0])
    # the first particle is the chain after two sweeps of its own, and stays; the second is still on its way
    assert (trace.value[6:, :, 0] == trace.value[6, :, 0]).all() and (trace.value[:7, :, 0] == trace.value[:7, :, 1]).all()


def test_the_coldest_chain_begins_with_the_plain_sample():
    seen = []

    def spy(x):
        seen.append(x.clone())
        return reward(x)

    flow_map = MIXTURE.flow_map(steps=1)
    steerfm.steer(flow_map, spy, ParallelTempering(2, temperatures=3, warmup=0), n=2, seeds=[5, 9])
    assert torch.equal(seen[0][::3], steerfm.sample(flow_map, 2, steps=1, seeds=[5, 9]))


def test_outputs_are_independent():
    method = ParallelTempering(4, 1, temperatures=3, warmup=2)
    check_outputs_are_independent(MIXTURE.flow_map(steps=1), reward, method, torch.tensor([0.5, 2.0, 1.0, 3.0]), rows=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperatures": 0}, "temperatures=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"radius": 1.2}, "radius=1.2"),
        ({"power": 0.0}, "power=0.0"),
        ({"iterations": 0}, "iterations=0"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        replace(ParallelTempering(), **given)
