"""Draws of posteriors are measured against many calls of the velocity."""

import math
from contextlib import contextmanager

import pytest
import torch

from steerfm import GaussianMixture, NeuralFlowMap
from steerfm.metrics import posterior_errors
from steerfm.metrics.posterior import _value_error
from steerfm.networks import Mlp


class Joint(NeuralFlowMap):
    """An exact plain map of a Gaussian, whose draws are exact or as wide again as they should be."""

    wide = 1.0

    def posterior_velocity(self, z, s, e, x, t, cond):
        exact = super().posterior_velocity(z, s, e, x, t, cond)
        return exact + (self.wide - 1) * (z + exact - GaussianMixture([[0.5] * 4], [[1.69] * 4]).posterior(x, t).mean().float())


def joint() -> Joint:
    torch.manual_seed(0)
    return Joint(Mlp(4, posterior=True), (4,), mean=0.5, std=1.3)


def test_exact_draws_are_at_the_floor_and_wrong_ones_are_not():
    flow_map = joint()
    done = []

    @contextmanager
    def bar(what, total):
        yield lambda *count: done.append(count)

    errors = posterior_errors(flow_map, n=6, draws=200, progress=bar)
    rows = errors.distance
    assert done == [(i, 18) for i in range(1, 19)]
    assert set(rows) == {
        "fine draws again", "1 call", "2 calls", "GLASS, 2 calls", "GLASS, 4 calls", "GLASS, 8 calls", "jump, 1 call",
        "denoiser, 1 call", *(f"GLASS, {calls} calls, joint steps" for calls in (2, 4, 8)),
    }  # fmt: skip
    assert errors.value == errors.frequency == {}
    for t in (0.2, 0.4, 0.6):
        floor = rows["fine draws again"][t]
        assert rows["1 call"][t] < 1.3 * floor and rows["jump, 1 call"][t] > 3 * floor
    flow_map.wide = 2.0
    assert posterior_errors(flow_map, n=6, draws=200).distance["1 call"][0.4] > 2 * rows["1 call"][0.4]


def test_values_and_frequencies_tell_right_draws_from_wrong_ones():
    """Classes are the signs of the first two entries: that of a state is drawn as often as the exact posterior has it."""

    def signs(x):
        up = torch.stack([x[:, 0] > 0.5, x[:, 1] > 0.5], 1).long() @ torch.tensor([2, 1])
        return 4.0 * torch.nn.functional.one_hot(up, 4).float()

    flow_map = joint()
    right = posterior_errors(flow_map, n=12, draws=256, fine=6, classify=signs, times=(0.2, 0.4))
    flow_map.wide = 3.0
    wrong = posterior_errors(flow_map, n=12, draws=256, fine=6, classify=signs, times=(0.2, 0.4))
    for t in (0.2, 0.4):
        assert 0.6 < right.frequency["fine draws again"][t] < 1.5 and 0.6 < right.frequency["1 call"][t] < 1.5
        assert wrong.frequency["1 call"][t] > 2 and right.frequency["denoiser, 1 call"][t] > 4
        assert right.value["1 call"][t] == pytest.approx(right.value["fine draws again"][t], rel=0.25)
        assert right.value["1 call"][t] < right.value["jump, 1 call"][t]


def test_the_value_of_few_draws():
    log_p = torch.tensor([0.1, 0.3, 0.2, 0.2]).double().log()
    assert _value_error(log_p, log_p, 4) == pytest.approx(0.0, abs=1e-6)
    assert _value_error(log_p, log_p, 2) == pytest.approx(0.0, abs=1e-6)  # both pairs have the mean of all
    assert _value_error(log_p, log_p, 1) == pytest.approx(sum(abs(math.log(p / 0.2)) for p in (0.1, 0.3, 0.2, 0.2)) / 4)
