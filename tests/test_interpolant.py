"""The path: every conversion against its inverse, every derivative against finite differences, the Gaussian map in full."""

from __future__ import annotations

import math

import pytest
import torch

from steerfm.interpolant import Interpolant, Trigonometric, expand_time

PATHS = [Interpolant(), Trigonometric()]
TIMES = [0.1, 0.5, 0.93]
paths = pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
times = pytest.mark.parametrize("t", TIMES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- times -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("t", [0.25, 1, torch.tensor(0.25), torch.full((4,), 0.25), torch.full((4, 1), 0.25)])
def test_times_broadcast_against_the_batch(t):
    x = torch.zeros(4, 3, 2, 2, dtype=torch.float64)
    expanded = expand_time(t, x)
    assert expanded.shape == (4, 1, 1, 1)
    assert expanded.dtype == x.dtype
    assert (expanded == float(torch.as_tensor(t).flatten()[0])).all()


def test_times_keep_their_rows():
    t = exact([0.1, 0.2, 0.3])
    assert torch.equal(expand_time(t, torch.zeros(3, 2, dtype=torch.float64)), t[:, None])


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 2), (2, 2)])
def test_another_number_of_times_than_rows_is_refused(shape):
    with pytest.raises(ValueError, match="batch of 4"):
        expand_time(torch.zeros(shape), torch.zeros(4, 2))


# --- the path --------------------------------------------------------------------------------------------------------
@paths
def test_ends(path):
    assert (path.alpha(0.0), path.sigma(0.0)) == pytest.approx((0, 1), abs=1e-15)
    assert (path.alpha(1.0), path.sigma(1.0)) == pytest.approx((1, 0), abs=1e-15)


@paths
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.2, 0.7), (0.4, 0.4000001), (0.9, 0.3)])
def test_slope_is_the_difference_quotient(path, s, t):
    da, ds = path.slope(s, t)
    assert da == pytest.approx((path.alpha(t) - path.alpha(s)) / (t - s), rel=1e-8)
    assert ds == pytest.approx((path.sigma(t) - path.sigma(s)) / (t - s), rel=1e-8)


@paths
@pytest.mark.parametrize("t", [0.0, *TIMES, 1.0])
def test_slope_on_the_diagonal_is_the_derivative(path, t):
    h = 1e-6
    da, ds = path.derivatives(t)
    assert da == pytest.approx((path.alpha(t + h) - path.alpha(t - h)) / (2 * h), abs=1e-9)
    assert ds == pytest.approx((path.sigma(t + h) - path.sigma(t - h)) / (2 * h), abs=1e-9)


@paths
def test_floats_and_tensors_agree(path):
    s, t = exact([0.0, 0.3, 0.6]), exact([1.0, 0.3, 0.8])
    for name, arguments in {"alpha": (t,), "sigma": (t,), "slope": (s, t), "renoise": (t, s)}.items():
        rows = getattr(path, name)(*arguments)
        rows = torch.stack(rows if isinstance(rows, tuple) else (rows,), -1)
        floats = [getattr(path, name)(*(float(a[i]) for a in arguments)) for i in range(3)]
        torch.testing.assert_close(rows, exact(floats).view_as(rows), rtol=1e-14, atol=1e-14)


# --- four descriptions of one network --------------------------------------------------------------------------------
@paths
@times
def test_velocity_denoiser_and_noise_are_equivalent(path, t):
    x, b = normal(5, 3), normal(5, 3, seed=1)
    x1, x0 = path.denoise(x, b, t), path.noise(x, b, t)
    torch.testing.assert_close(path.velocity_from_denoised(x, x1, t), b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.velocity_from_noise(x, x0, t), b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.interpolate(x0, x1, t), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.conditional_velocity(x0, x1, t), b, rtol=1e-12, atol=1e-12)


@paths
@times
def test_velocity_from_the_score(path, t):
    x, b = normal(5, 3), normal(5, 3, seed=1)
    da, _ = path.derivatives(t)
    rebuilt = da / path.alpha(t) * x + path.score_coefficient(t) * path.score(x, b, t)
    torch.testing.assert_close(rebuilt, b, rtol=1e-12, atol=1e-12)


@paths
@times
def test_conditional_velocity_is_the_derivative_of_the_path(path, t):
    x0, x1, h = normal(4, 2), normal(4, 2, seed=1), 1e-6
    numeric = (path.interpolate(x0, x1, t + h) - path.interpolate(x0, x1, t - h)) / (2 * h)
    torch.testing.assert_close(path.conditional_velocity(x0, x1, t), numeric, rtol=1e-8, atol=1e-8)


@paths
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_denoiser_and_noise_are_finite_at_the_ends(path, t):
    x, b = normal(4, 2), normal(4, 2, seed=1)
    end = path.denoise(x, b, t) if t else path.noise(x, b, t)  # at t = 1 the data, at t = 0 the noise itself
    torch.testing.assert_close(end, x, rtol=1e-12, atol=1e-12)
    assert path.denoise(x, b, t).isfinite().all()
    assert path.noise(x, b, t).isfinite().all()


def test_linear_formulas():
    x, b, t = normal(4, 2), normal(4, 2, seed=1), 0.3
    path = Interpolant()
    torch.testing.assert_close(path.denoise(x, b, t), x + 0.7 * b)
    torch.testing.assert_close(path.noise(x, b, t), x - 0.3 * b)
    torch.testing.assert_close(path.score(x, b, t), -(x - 0.3 * b) / 0.7)
    assert path.score_coefficient(t) == pytest.approx(0.7 / 0.3)


# --- the noising kernel ----------------------------------------------------------------------------------------------
@paths
@pytest.mark.parametrize(("r", "t"), [(1.0, 0.4), (0.8, 0.1), (0.5, 0.5), (0.9, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("variance", [0.0, 0.3, 4.0])
def test_renoising_maps_variances_exactly(path, r, t, variance):
    scale, std = path.renoise(r, t)

    def marginal(t: float) -> float:
        return path.alpha(t) ** 2 * variance + path.sigma(t) ** 2

    assert scale * path.alpha(r) == pytest.approx(path.alpha(t), abs=1e-15)  # means
    assert scale**2 * marginal(r) + std**2 == pytest.approx(marginal(t), rel=1e-12, abs=1e-15)


@paths
def test_renoising_in_two_stages_is_renoising_once(path):
    (a, first), (b, second), (c, whole) = path.renoise(0.9, 0.5), path.renoise(0.5, 0.2), path.renoise(0.9, 0.2)
    assert b * a == pytest.approx(c, rel=1e-13)
    assert math.hypot(b * first, second) == pytest.approx(whole, rel=1e-13)


@paths
@pytest.mark.parametrize("t", [0.1, 0.37, 1.0])
def test_renoising_to_the_same_time_is_the_identity(path, t):
    assert path.renoise(t, t) == (1.0, 0.0)


# --- the exact map of one Gaussian -----------------------------------------------------------------------------------
MEAN, STD = exact([0.7, -0.4, 0.0]), exact([0.5, 1.6, 0.05])  # one axis each


def jump(path, x, s, t):
    s, t = expand_time(s, x), expand_time(t, x)
    return x + (t - s) * path.gaussian_velocity(x, s, t, MEAN, STD)


@paths
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.2, 0.9), (0.3, 0.3), (0.8, 0.1)])
def test_gaussian_map_is_affine_between_the_marginals(path, s, t):
    x = normal(6, 3)
    g_s, g_t = (((path.alpha(r) * STD) ** 2 + path.sigma(r) ** 2).sqrt() for r in (s, t))
    expected = path.alpha(t) * MEAN + g_t / g_s * (x - path.alpha(s) * MEAN)
    torch.testing.assert_close(jump(path, x, s, t), expected, rtol=1e-12, atol=1e-13)


@paths
def test_gaussian_map_is_a_semigroup(path):
    x = normal(6, 3)
    torch.testing.assert_close(jump(path, jump(path, x, 0.1, 0.4), 0.4, 1.0), jump(path, x, 0.1, 1.0))
    torch.testing.assert_close(jump(path, jump(path, x, 0.2, 0.9), 0.9, 0.2), x)


@paths
@times
def test_gaussian_velocity_has_the_score_of_the_marginal(path, t):
    x = normal(6, 3)
    at = expand_time(t, x)
    b = path.gaussian_velocity(x, at, at, MEAN, STD)
    score = -(x - path.alpha(t) * MEAN) / ((path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2)
    torch.testing.assert_close(path.score(x, b, t), score, rtol=1e-10, atol=1e-10)


@paths
def test_gaussian_velocity_integrates_to_the_map(path):
    x, steps = normal(6, 3), 400
    y = x.clone()
    for i in range(steps):  # midpoint rule: error of order h^2
        t, h = i / steps, 1 / steps
        at = expand_time(t, y)
        half = y + h / 2 * path.gaussian_velocity(y, at, at, MEAN, STD)
        at = expand_time(t + h / 2, y)
        y = y + h * path.gaussian_velocity(half, at, at, MEAN, STD)
    torch.testing.assert_close(y, jump(path, x, 0.0, 1.0), rtol=0, atol=2e-3)


@paths
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-8, 1e-4])
def test_gaussian_velocity_is_smooth_at_the_diagonal(path, gap):
    x, s = normal(6, 3), expand_time(0.4, normal(6, 3))

    def u(t):
        return path.gaussian_velocity(x, s, t, MEAN, STD)

    value, slope = torch.func.jvp(u, (s + gap,), (torch.ones_like(s),))[:2]
    numeric = (u(s + gap + 1e-5) - u(s + gap - 1e-5)) / 2e-5
    assert (value - u(s)).abs().max() <= 10 * gap + 1e-14
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)
