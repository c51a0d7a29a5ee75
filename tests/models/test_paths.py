"""The paths of others against their own definitions: states that are made of known data and known noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steerfm.models import paths
from steerfm.models.paths import Ends, Linear, Path, VarianceExploding, VariancePreserving, Weights


def alphas_cumprod(steps: int = 1000) -> Tensor:
    """Stable Diffusion's: betas whose roots are even steps."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2).cumprod(0)


PATHS: dict[str, Path] = {
    "linear": Linear(),
    "linear, noise at 1": Linear(1.0),
    "vp": VariancePreserving(alphas_cumprod()),
    "vp, terminal SNR 0": VariancePreserving(torch.cat([alphas_cumprod()[:-1], torch.zeros(1)])),
    "ve": VarianceExploding(),
}


@pytest.fixture
def ends() -> Ends:
    generator = torch.Generator().manual_seed(0)
    return Ends(*torch.randn(2, 64, 3, dtype=torch.float64, generator=generator))


def times(path: Path, n: int = 64) -> Tensor:
    """Of every part of the path, (n, 1), its ends among them."""
    return torch.linspace(path.first, path.last, n, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("name", PATHS)
def test_a_state_of_any_path_is_one_of_the_linear_path(name, ends):
    path = PATHS[name]
    t = times(path).clamp(1e-4, 1 - 1e-4)
    a, b = path.weights(t)
    z = a * ends.data + b * ends.noise
    torch.testing.assert_close(paths.time_of(a, b), t)
    torch.testing.assert_close(paths.to_linear(z, a, b), t * ends.data + (1 - t) * ends.noise)
    torch.testing.assert_close(paths.from_linear(paths.to_linear(z, a, b), a, b), z)
    assert paths.time_of(3.0, 1.0) == 0.75


@pytest.mark.parametrize("name", PATHS)
def test_each_prediction_says_both_ends(name, ends):
    path = PATHS[name]
    t = times(path).clamp(0.002, 0.998)
    at, slope = path.weights(t), path.slope(t)
    a, b = at
    z = a * ends.data + b * ends.noise
    answers = {
        "noise": paths.ends_of_noise(z, ends.noise, at),
        "data": paths.ends_of_data(z, ends.data, at),
        "v": paths.ends_of_v(z, a * ends.noise - b * ends.data, at),
        "velocity": paths.ends_of_velocity(z, slope.data * ends.data + slope.noise * ends.noise, at, slope),
    }
    x = paths.to_linear(z, a, b)
    for told in answers.values():
        torch.testing.assert_close(told.data, ends.data)
        torch.testing.assert_close(told.noise, ends.noise)
        torch.testing.assert_close(paths.velocity(x, t, told, path.first, path.last), ends.data - ends.noise)


@pytest.mark.parametrize("name", ["vp", "ve", "linear", "linear, noise at 1"])
def test_the_slope_is_that_of_the_weights_by_the_networks_own_time(name):
    """By central differences of the weights as functions of that time."""
    path = PATHS[name]
    t = torch.linspace(max(path.first, 0.02) + 0.01, min(path.last, 0.98) - 0.01, 41, dtype=torch.float64)
    if name == "vp":  # within an index: at a knot there are two slopes
        own = path.own_time(t).floor() + 0.5
        t = _at_index(own)
    h = 1e-6
    low, high = path.weights(t - h), path.weights(t + h)
    own = _exact_index if name == "vp" else path.own_time
    step = own(t + h) - own(t - h)
    for value, one, other in zip(path.slope(t), low, high):
        torch.testing.assert_close(torch.as_tensor(value).expand(41).double(), (other - one) / step, rtol=1e-5, atol=1e-8)


def _log_ratio() -> Any:
    square = alphas_cumprod()
    return ((square / (1 - square)).log() / 2).numpy()


def _at_index(index: Tensor) -> Tensor:
    """Our time of a fractional index, log(a / b) being linear between two: by numpy."""
    import numpy as np

    return torch.sigmoid(torch.as_tensor(np.interp(index.numpy(), np.arange(1000), _log_ratio())))


def _exact_index(t: Tensor) -> Tensor:
    import numpy as np

    return torch.as_tensor(np.interp(torch.logit(t).numpy(), _log_ratio()[::-1].copy(), np.arange(999, -1, -1)))


def test_the_index_of_a_time_and_the_time_of_an_index():
    path = PATHS["vp"]
    whole = torch.arange(1000, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):  # whole numbers to the bit: networks look them up in tables
        assert path.own_time(_at_index(whole).to(dtype)).equal(whole.to(dtype))
    between = torch.tensor([0.25, 17.5, 499.9, 998.75], dtype=torch.float64)
    torch.testing.assert_close(path.own_time(_at_index(between)), between)
    square = path.weights(_at_index(whole)).data ** 2
    torch.testing.assert_close(square, alphas_cumprod())
    assert path.first == pytest.approx(0.0640, abs=5e-4)  # the least SNR of Stable Diffusion


@pytest.mark.parametrize("name", PATHS)
def test_our_time_and_the_networks_lead_back_to_each_other(name):
    path = PATHS[name]
    t = times(path, 33).clamp(2e-4, 1 - 1e-3).flatten()
    for ours, own in zip(t.tolist(), path.own_time(t).tolist()):
        assert path.time_at(own) == pytest.approx(ours, rel=1e-3 if "vp" in name else 1e-9)  # an index is rounded
    for none in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="time"):
            path.time_at(none)
    if name != "ve":
        with pytest.raises(ValueError, match="time"):
            path.time_at(1000)


def test_sigma_of_a_time():
    path = VarianceExploding(0.01, 50)
    assert path.first == pytest.approx(1 / 51) and path.last == pytest.approx(1 / 1.01)
    sigma = torch.tensor([0.01, 0.3, 1.0, 7.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(path.own_time(1 / (1 + sigma)), sigma)


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (0.06, 0.97), (0.3, 0.9)])
def test_the_velocity_is_finite_without_a_gap_and_keeps_the_state(first, last, ends):
    """Outside what a network knows, t data + (1 - t) noise = x goes on: each end of u is x less the other one."""
    x, t = ends.data + 2 * ends.noise, torch.linspace(0, 1, 64, dtype=torch.float64).unsqueeze(1).requires_grad_()
    u = paths.velocity(x, t, ends, first, last)
    assert u.isfinite().all()
    (slope,) = torch.autograd.grad(u.sum(), t) if first > 0 else (torch.zeros(()),)
    assert slope.isfinite().all()
    u, t = u.detach(), t.detach()
    before, after = (t < first).squeeze(), (t > last).squeeze()
    torch.testing.assert_close((x + (1 - t) * u)[before], ends.data[before])  # the denoiser is what the network says
    torch.testing.assert_close((x - t * u)[after], ends.noise[after])
    for edge, inside in ((first, min(first, 1)), (last, last)):
        at = torch.full_like(t, inside)
        x_at = at * ends.data + (1 - at) * ends.noise
        for side in (-1e-9, 1e-9):
            near = (at + side).clamp(0, 1)
            torch.testing.assert_close(
                paths.velocity(x_at, near, ends, first, last), ends.data - ends.noise, rtol=1e-6, atol=1e-6, msg=str(edge)
            )


def test_a_step_is_that_of_ddim_and_of_euler_in_sigma(ends):
    """From index 700 to 400, and from sigma 5 to 2: with the coefficients of the papers."""
    u = ends.data - ends.noise
    a, b = PATHS["vp"].weights(_at_index(torch.tensor([700.0, 400.0], dtype=torch.float64)))
    t = paths.time_of(a, b)
    z = a[0] * ends.data + b[0] * ends.noise
    x = paths.to_linear(z, a[0], b[0]) + (t[1] - t[0]) * u
    ddim = a[1] * (z - b[0] * ends.noise) / a[0] + b[1] * ends.noise
    torch.testing.assert_close(paths.from_linear(x, a[1], b[1]), ddim)
    z = ends.data + 5 * ends.noise
    x = paths.to_linear(z, 1.0, 5.0) + (paths.time_of(1.0, 2.0) - paths.time_of(1.0, 5.0)) * u
    torch.testing.assert_close(paths.from_linear(x, 1.0, 2.0), z + (2 - 5) * (z - ends.data) / 5)


def test_edm_scalings_give_a_network_input_and_a_target_of_variance_one():
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(2, 200_000, dtype=torch.float64, generator=generator)
    data = data * 0.7
    for sigma in (0.05, 0.7, 20.0):
        scalings = paths.edm_scalings(torch.tensor(sigma, dtype=torch.float64), 0.7)
        z = data + sigma * noise
        target = (data - scalings.skip * z) / scalings.output
        assert (scalings.input * z).std().item() == pytest.approx(1, abs=0.01)
        assert target.std().item() == pytest.approx(1, abs=0.01)
        assert float(scalings.noise) == pytest.approx(math.log(sigma) / 4)


@pytest.mark.parametrize(
    ("alphas", "words"),
    [
        (alphas_cumprod().flip(0), "flip"),
        (torch.linspace(-1, 1, 10).flip(0), r"\[0, 1\]"),
        (torch.tensor([0.9, float("nan"), 0.1]), r"\[0, 1\]"),
        (torch.tensor([0.9, 0.5, 0.5]), "fall"),
        (alphas_cumprod().unsqueeze(0), "shape"),
        (torch.tensor(0.5), "shape"),
        (torch.tensor([0.5]), "shape"),
        ("scaled_linear", "numbers"),
        (torch.tensor([0.9, 1e-20, 0.0]), "more than one"),
    ],
)
def test_what_is_no_alphas_cumprod_is_one_line(alphas, words):
    with pytest.raises(ValueError, match=words) as caught:
        VariancePreserving(alphas)
    assert "\n" not in str(caught.value)


def test_alphas_cumprod_may_be_a_list_or_an_array_or_half_precise():
    for alphas in (alphas_cumprod().tolist(), alphas_cumprod().numpy(), alphas_cumprod().float()):
        assert VariancePreserving(alphas).first == pytest.approx(PATHS["vp"].first, rel=1e-6)


@pytest.mark.parametrize("noise_at", [0.5, 1000, -1, True, float("nan"), "1"])
def test_noise_is_at_0_or_at_1(noise_at):
    with pytest.raises(ValueError, match=r"noise_at=.*0 or at 1"):
        Linear(noise_at)


@pytest.mark.parametrize("sigmas", [(0, 80), (80, 0.002), (1, 1), (0.1, math.inf), (-1, 3), (math.nan, 3)])
def test_sigmas_are_in_order(sigmas):
    with pytest.raises(ValueError, match="sigmas from"):
        VarianceExploding(*sigmas)


def test_weights_are_named():
    at = VarianceExploding().weights(torch.tensor([0.5]))
    assert isinstance(at, Weights) and at.data.item() == 1 and at.noise.item() == 1
