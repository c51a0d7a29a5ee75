"""Draws of posteriors are measured against many calls of the velocity."""

import torch

from steerfm import GaussianMixture, NeuralFlowMap
from steerfm.metrics import posterior_errors
from steerfm.networks import Mlp


class Joint(NeuralFlowMap):
    """An exact plain map of a Gaussian, whose draws are exact or as wide again as they should be."""

    wide = 1.0

    def posterior_velocity(self, z, s, e, x, t, cond):
        exact = super().posterior_velocity(z, s, e, x, t, cond)
        return exact + (self.wide - 1) * (z + exact - GaussianMixture([[0.5] * 4], [[1.69] * 4]).posterior(x, t).mean().float())


def test_exact_draws_are_at_the_floor_and_wrong_ones_are_not():
    torch.manual_seed(0)
    flow_map = Joint(Mlp(4, posterior=True), (4,), mean=0.5, std=1.3)
    rows = posterior_errors(flow_map, n=6, draws=200)
    assert set(rows) == {
        "fine draws again", "1 call", "2 calls", "GLASS, 2 calls", "GLASS, 4 calls", "GLASS, 8 calls", "jump, 1 call"
    }  # fmt: skip
    for t in (0.2, 0.4, 0.6):
        floor = rows["fine draws again"][t]
        assert rows["1 call"][t] < 1.3 * floor and rows["jump, 1 call"][t] > 3 * floor
    flow_map.wide = 2.0
    assert posterior_errors(flow_map, n=6, draws=200)["1 call"][0.4] > 2 * rows["1 call"][0.4]
