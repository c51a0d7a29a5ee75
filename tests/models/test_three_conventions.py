"""The mixture of the README as three people would have trained it: the default samples the tilt of each, and log Z is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import steerfm

GM = steerfm.GaussianMixture(means=[[-2.0], [0.5], [2.5]], covs=[[0.16], [0.09], [0.25]], weights=[0.5, 0.3, 0.2])
TARGET, LOG_Z = GM.tilt(linear=[1.2], quadratic=[[0.3]])
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)


def reward(x: Tensor) -> Tensor:
    return 1.2 * x[:, 0] - 0.15 * x[:, 0] ** 2


def denoised(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[data | a data + b noise = z], by the mixture's own denoiser on the linear path."""
    total = (a + b).double()
    return GM.flow_map().denoise(z.double() / total.unsqueeze(1), a.double() / total).to(z)


def flow_matching(x: Tensor, t: Tensor, cond: object) -> Tensor:
    """Data at t = 0, noise at t = 1."""
    return -GM.velocity(x.double(), 1 - t.double()).to(x)


def noise_prediction(z: Tensor, index: Tensor, cond: object) -> Tensor:
    low = index.double().floor().clamp(0, 998).long()
    share = index.double() - low
    log_alpha = torch.lerp(ALPHAS.log()[low], ALPHAS.log()[low + 1], share)  # of whole indices what it was trained on
    a, b = (log_alpha / 2).exp(), (1 - log_alpha.exp()).sqrt()
    return ((z.double() - a.unsqueeze(1) * denoised(z, a, b).double()) / b.unsqueeze(1)).to(z)


def edm(z: Tensor, sigma: Tensor, cond: object) -> Tensor:
    return denoised(z, torch.ones_like(sigma), sigma)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flow_map",
    [
        steerfm.VelocityModel(flow_matching, (1,)),
        steerfm.VelocityModel(noise_prediction, (1,), predicts="noise", path="vp", alphas_cumprod=ALPHAS),
        steerfm.VelocityModel(edm, (1,), predicts="data", path="ve"),
    ],
    ids=["noise at t = 1", "noise, variance preserving", "EDM"],
)
@pytest.mark.parametrize("seeds", [0, 1000])
def test_the_default_method_samples_the_tilt(flow_map, seeds):
    result = steerfm.steer(flow_map, reward, n=50, seeds=seeds)
    mean = (result.log_weights.exp() * result.samples[..., 0]).sum(1)
    right = float(TARGET.weights @ TARGET.means[:, 0])
    print(f"E x = {mean.mean():.3f} +- {mean.std() / 50**0.5:.3f} ({right:.3f})")
    assert abs(mean.mean() - right) < 3 * mean.std() / 50**0.5
    assert result.log_z is not None
    ratio = (result.log_z - LOG_Z).exp()
    print(f"Z / Z exact = {ratio.mean():.3f} +- {ratio.std() / 50**0.5:.3f}")
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 50**0.5
