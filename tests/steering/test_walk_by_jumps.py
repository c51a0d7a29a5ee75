"""The default where one jump of the map shows another picture: drafts by one jump, different ones go on, by jumps, unguided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kinds import sure
from torch import nn

import steerfm
from steerfm import Funnel, GaussianMixture, Reward
from steerfm.held_out import has_weights
from steerfm.metrics import jump_error
from steerfm.rewards import as_reward
from steerfm.steering.resampling import distinct
from steerfm.transitions import Auto, Jump, Renoise

MIXTURE = GaussianMixture([[-2.0], [0.5], [3.0]], [[0.1], [0.4], [0.2]], [0.5, 0.3, 0.2])


class Net(Reward):
    """A network that is a line: r(x) = 1.5 x."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.line.weight, 1.5)

    def score(self, images, prompts=None, labels=None):
        return self.line(images.float()[:, :1])[:, 0]


def flow_map(error: float | None):
    """The mixture's, three steps of an ODE a jump, with the figure of a card."""
    made = MIXTURE.flow_map(steps=3)
    made.card = {} if error is None else {"metrics": {"jump error": error}}
    return made


@pytest.mark.parametrize(
    ("k", "m", "heat"), [(8, 3, 1.0), (24, 8, 3.0), (64, 16, 0.01), (5, 4, 2.0), (9, 8, 50.0), (16, 4, 20.0)]
)
def test_different_particles_are_drawn_without_a_bias(k, m, heat):
    generator = torch.Generator().manual_seed(k)
    w = (heat * torch.randn(1, k, generator=generator, dtype=torch.float64)).softmax(1)
    n = 20_000
    ancestors, log_w = distinct(w.expand(n, k), torch.rand(n, m, generator=generator, dtype=torch.float64))
    assert (ancestors.diff(dim=1) > 0).all() and ancestors.min() >= 0 and ancestors.max() < k
    weights = torch.zeros(n, k, dtype=torch.float64).scatter_add(1, ancestors, log_w.exp() / m)
    likely = w[0] > 1e-3
    z = (weights.mean(0) - w[0]) / (weights.std(0) / n**0.5).clamp_min(1e-9)
    assert z[likely].abs().max() < 4.5
    torch.testing.assert_close(weights.sum(1).mean(), torch.tensor(1.0, dtype=torch.float64), rtol=0.02, atol=0)


def test_it_samples_the_tilt_and_its_log_z_is_right():
    tilted, log_z = MIXTURE.tilt(torch.tensor([1.5], dtype=torch.float64))
    exact = float((tilted.weights * tilted.means[:, 0]).sum())
    result = steerfm.steer(flow_map(1.0), Net(), Funnel(16, 4, first=64), n=600)
    weights = result.log_weights.exp()
    mean = (weights * result.samples[..., 0].double()).sum(1)
    assert abs(float(mean.mean()) - exact) < 4 * float(mean.std()) / 600**0.5 + 0.02  # a ratio's bias, of 16 particles
    ratio = (sure(result.log_z).double() - float(log_z)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 600**0.5


def test_who_walks_by_jumps_and_who_does_not():
    """A map whose card says that one jump is another picture, with a reward that is a network, and nothing else asked for."""
    plain = lambda x: 1.5 * x[:, 0]  # noqa: E731
    few = Funnel(4, 3, first=12)

    def jumps(error, reward, method=few):
        result = steerfm.steer(flow_map(error), reward, method, n=2)
        assert result.cost.forwards == 2 * (12 + 4 * 2)
        return not bool((result.samples[:, :1] == result.samples).all()) and bool((result.trace.guidance_ratio == 0).all())

    assert jumps(0.5, Net())
    assert not jumps(0.2, Net()) and not jumps(None, Net()) and not jumps(0.5, plain)
    assert not jumps(0.5, Net(), Funnel(4, 3, first=12, transition=Renoise()))
    assert isinstance(Funnel().transition, Auto)


@pytest.mark.parametrize("budget", [1, 2, 7, 8, 31, 32, 64, 100, 128, 512])
def test_it_costs_the_same_either_way(budget):
    method = Funnel.within(budget)
    costs = [steerfm.steer(flow_map(error), Net(), method, n=1).cost for error in (0.1, 0.9)]
    assert [cost.forwards for cost in costs] == [budget, budget] and not any(cost.backwards for cost in costs)


def test_drafts_that_go_on_differ():
    """Of copies, jumps would make copies."""
    result = steerfm.steer(flow_map(1.0), Net(), Funnel(8, 3, first=40), n=20, strength=20.0)
    assert all(len(row.unique(dim=0)) == 8 for row in result.samples)
    asked = steerfm.steer(flow_map(None), Net(), Funnel(8, 3, first=40, transition=Jump(), guidance=None), n=20, strength=20.0)
    assert all(len(row.unique(dim=0)) == 8 for row in asked.samples)


def test_a_reward_holds_a_network_or_none():
    net = Net()
    assert has_weights(net) and has_weights(as_reward(lambda x: 2 * net(x))) and has_weights(2 * net)
    assert not has_weights(as_reward(lambda x: x[:, 0])) and not has_weights(steerfm.reward("brightness"))


def test_the_error_of_one_jump_is_none_for_a_true_map_and_large_for_a_poor_one():
    ring = GaussianMixture([[0.0, 3.0], [3.0, 0.0], [-3.0, -2.0]], [[0.1, 0.1]] * 3)
    assert jump_error(ring.flow_map(steps=64), 4) < 0.02
    assert jump_error(ring.flow_map(steps=1), 4) > 0.2
    assert steerfm.load("fashion").jump_error == pytest.approx(0.18, abs=0.03)
    assert sure(steerfm.load("emoji").jump_error) > 1 / 3


@pytest.mark.parametrize("budget", [8, 13, 31])
def test_with_few_calls_and_no_gradient_all_of_them_look(budget):
    """A walk of few particles pays by the gradient alone; the calls are the same."""
    method = Funnel.within(budget)
    blind = steerfm.steer(flow_map(None), lambda x: (1.5 * x[:, 0]).detach(), method, n=3)
    drafts = steerfm.steer(flow_map(None), lambda x: 1.5 * x[:, 0], steerfm.BestOfN(budget, 1), n=3)
    assert blind.cost.forwards == 3 * budget and blind.samples.shape == (3, budget, 1)
    torch.testing.assert_close(blind.samples, drafts.samples)
    sighted = steerfm.steer(flow_map(None), lambda x: 1.5 * x[:, 0], method, n=3)
    assert sighted.cost.forwards == 3 * budget and sighted.samples.shape == (3, method.particles, 1)


@pytest.mark.parametrize("budget", [32, 77, 300])
def test_a_gradient_of_no_network_is_followed_further_for_as_many_calls(budget):
    """In many dimensions; not where the reward is a network, a black box, or the shape is somebody's own."""
    large = GaussianMixture([[-1.0] * 80, [1.0] * 80], [[0.5] * 80] * 2).flow_map(steps=1)
    method, walk = Funnel.within(budget), 8 if budget < 256 else 16

    def particles(reward, method=method, flow_map=large):
        result = steerfm.steer(flow_map, reward, method)
        assert result.cost.forwards == budget
        return result.samples.shape[1]

    assert particles(lambda x: x.mean(1)) == budget // (2 * walk) < method.particles
    assert particles(Net()) == particles(lambda x: x.mean(1).detach()) == method.particles
    assert particles(lambda x: x.mean(1), flow_map=flow_map(None)) == method.particles
    mine = Funnel.within(budget, steps=method.steps)
    assert particles(lambda x: x.mean(1), mine) == mine.particles
    fewer = steerfm.steer(large, lambda x: x.mean(1), replace(method, particles=method.particles - 1))
    assert fewer.samples.shape[1] == method.particles - 1
