"""Our engine against the package `particles`, which knows nothing of flow maps, on the same Feynman-Kac model."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import steerfm

pytestmark = pytest.mark.slow

pytest.importorskip("particles", reason="the package of the bench extra")
BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "smc.py"))
PARTICLES, STEPS, OUTPUTS = 200, 6, 100
MIXTURE = steerfm.GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
GAUSSIAN = steerfm.GaussianMixture([[0.5]], [[0.36]])
A, B = 1.2, 0.3


def reward(x):
    return A * x - B / 2 * x**2


@pytest.mark.parametrize("mixture", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_both_estimate_the_same_log_z_and_mean(mixture):
    flow_map = mixture.flow_map()

    def lookahead(x, t):
        return flow_map.lookahead(torch.from_numpy(x).unsqueeze(1), t).squeeze(1).numpy()

    size = (PARTICLES, STEPS, OUTPUTS)
    estimates = [
        np.stack(BENCHMARK["ours"](flow_map, lambda x: reward(x[:, 0]), *size, 0)),
        np.stack(BENCHMARK["theirs"](lookahead, reward, *size, 0)),
    ]
    means, errors = [x.mean(1) for x in estimates], [x.std(1, ddof=1) / math.sqrt(OUTPUTS) for x in estimates]
    z = (means[0] - means[1]) / np.hypot(*errors)
    print(f"log Z and mean: ours {means[0]}, theirs {means[1]}, z {z}")
    assert np.abs(z).max() < 4
    # the logarithm of an unbiased estimate and a self-normalised mean are biased by order 1 / particles: alike in both
    target, log_z = mixture.tilt([A], B)
    assert np.abs(np.array(means) - [float(log_z), float(target.mean())]).max() < 0.05


def test_the_numpy_map_of_the_benchmark_is_the_flow_map():
    flow_map = steerfm.GaussianMixture([[BENCHMARK["MEAN"]]], [[BENCHMARK["VARIANCE"]]]).flow_map()
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    for t in (0.0, 0.4, 0.99):
        expected = flow_map.lookahead(x.unsqueeze(1), t).squeeze(1)
        np.testing.assert_allclose(BENCHMARK["gaussian_lookahead"](x.numpy(), t), expected.numpy(), atol=1e-12)
