"""`GaussianMixture` against references that share no formula with it: quadrature, ODE solvers, finite differences.

In one dimension everything is compared with integrals over the endpoint x_1 on a fine grid: by Bayes' rule
p(x_1 | x_t = x) ∝ p_1(x_1) N(x; alpha_t x_1, sigma_t^2), which needs nothing but the definition of the path.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp, trapezoid
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

from steerfm.closed_form import GaussianMixture
from steerfm.cost import Ledger
from steerfm.interpolant import Interpolant, Trigonometric

WEIGHTS, MEANS, VARIANCES = np.array([0.5, 0.3, 0.2]), np.array([-2.0, 0.5, 2.5]), np.array([0.16, 0.09, 0.25])
A, B = 1.2, 0.3  # the reward 1.2 x - 0.15 x^2
PATHS = [Interpolant(), Trigonometric()]
GRID = np.linspace(-10, 10, 10_001)  # the trapezoid rule is exact to rounding once it resolves every Gaussian
X = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(1)


def exact(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def line(path: Interpolant | None = None, full: bool = False, dtype: torch.dtype = torch.float64) -> GaussianMixture:
    """The 1-D case of the notes."""
    covs = VARIANCES[:, None, None] if full else VARIANCES[:, None]
    return GaussianMixture(torch.tensor(MEANS[:, None], dtype=dtype), covs, WEIGHTS, path)


def plane(path: Interpolant | None = None) -> GaussianMixture:
    """Three components with full covariances in 2-D."""
    means = [[-1.5, 0.0], [1.0, 1.2], [0.5, -1.5]]
    covs = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.12], [-0.12, 0.4]], [[0.25, 0.0], [0.0, 0.25]]]
    return GaussianMixture(means, covs, [0.5, 0.3, 0.2], path)


def log_prior(z: np.ndarray) -> np.ndarray:
    return np.asarray(logsumexp(np.log(WEIGHTS) + norm.logpdf(z[..., None], MEANS, VARIANCES**0.5), axis=-1))


def posterior_average(functions, x: float, t: float, path: Interpolant) -> np.ndarray:
    """E[f(x_1) | x_t = x] for each f, and log p_t(x), by quadrature."""
    a, sigma = path.alpha(t), path.sigma(t)
    log_joint = log_prior(GRID) + norm.logpdf(x, a * GRID, sigma)
    shift = log_joint.max()
    joint = np.exp(log_joint - shift)
    averages = [trapezoid(joint * f(GRID), GRID) / trapezoid(joint, GRID) for f in functions]
    return np.array([*averages, shift + np.log(trapezoid(joint, GRID))])


def solve(gm: GaussianMixture, x: torch.Tensor, s: float, t: float) -> torch.Tensor:
    """X_{s,t} of each row by an eighth-order adaptive solver."""

    def slope(r: float, y: np.ndarray) -> np.ndarray:
        return gm.velocity(torch.from_numpy(y).view_as(x), r).numpy().ravel()

    solution = solve_ivp(slope, (s, t), x.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-11)
    return torch.from_numpy(solution.y[:, -1]).view_as(x)


def transport(gm: GaussianMixture, x: torch.Tensor, s: float, t: float) -> torch.Tensor:
    """F_t^-1(F_s(x)) in 1-D by bisection, with as many digits as the gaps and the nearer tail as the far ends need."""
    rows = list(zip(gm.weights.tolist(), gm.means[:, 0].tolist(), gm.variances[:, 0].tolist()))

    def tail(y, r: float, side: int):
        r = mpmath.mpf(r)
        return sum(w * mpmath.erfc(side * (y - r * m) / mpmath.sqrt(2 * (r**2 * v + (1 - r) ** 2))) for w, m, v in rows)

    def root(x: float) -> float:
        side = 1 if x > 0 else -1
        level, low, high = tail(mpmath.mpf(x), s, side), mpmath.mpf(-side * 30), mpmath.mpf(side * 30)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, t, side) > level else (low, middle)
        return float(low)

    with mpmath.workdps(60):
        return exact([[root(value)] for value in x[:, 0].tolist()])


def close(actual: torch.Tensor, expected, atol: float = 1e-8, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=rtol)


# --- marginals, velocity, posterior, value: quadrature -------------------------------------------------------------
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
@pytest.mark.parametrize("t", [0.05, 0.4, 0.8, 0.99])
def test_the_path_agrees_with_quadrature_over_the_endpoint(path, t, full):
    gm = line(path, full)
    da, ds = path.derivatives(t)
    reward = lambda z: A * z - B * z**2 / 2  # noqa: E731
    functions = [lambda z: z, lambda z: z**2, lambda z: np.exp(2 * reward(z))]
    first, second, tilted, log_p = np.array([posterior_average(functions, x, t, path) for x in X[:, 0].tolist()]).T
    noise = (X[:, 0].numpy() - path.alpha(t) * first) / path.sigma(t)
    posterior = gm.posterior(X, t)
    close(gm.log_prob(X, t), log_p)
    close(gm.denoise(X, t)[:, 0], first)
    close(gm.velocity(X, t)[:, 0], da * first + ds * noise, atol=1e-7)
    close(gm.score(X, t)[:, 0], -noise / path.sigma(t), atol=1e-6)
    close(posterior.mean()[:, 0], first)
    close(posterior.cov()[:, 0, 0], second - first**2)
    close(gm.value(X, t, [A], [[B]], strength=2.0), np.log(tilted))
    close(gm.value(X, t, [A], B, strength=2.0), np.log(tilted))


@pytest.mark.parametrize("make", [line, plane])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_score_is_the_gradient_of_the_log_density(make, t):
    gm = make()
    x = gm.sample(6, torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(gm.log_prob(x, t).sum(), x)
    close(gm.score(x, t), gradient, atol=1e-11)


def test_marginal_and_posterior_densities_in_the_plane():
    gm, t = plane(), 0.6
    x = exact([[0.3, -0.4], [1.0, 1.0]])
    densities = sum(
        w * multivariate_normal(t * m, t**2 * S + (1 - t) ** 2 * np.eye(2)).pdf(x.numpy())
        for w, m, S in zip(gm.weights.numpy(), gm.means.numpy(), gm.covs.numpy())
    )
    close(gm.log_prob(x, t), np.log(densities), atol=1e-12)
    close(gm.marginal(t).log_prob(x), np.log(densities), atol=1e-12)
    # Bayes: log p(z | x) = log p(z) + log N(x; t z, (1 - t)^2) - log p_t(x)
    z = gm.sample(5, torch.Generator().manual_seed(0))
    kernel = norm.logpdf(x.numpy()[:, None], t * z.numpy(), 1 - t).sum(-1)
    bayes = gm.log_prob(z)[None] + torch.from_numpy(kernel) - gm.log_prob(x, t)[:, None]
    close(gm.posterior(x, t).log_prob(z.expand(2, 5, 2)), bayes, atol=1e-11)
    close(gm.posterior(x, t).log_prob(z[:2]), bayes.diagonal(), atol=1e-11)


def test_at_the_ends_of_time():
    gm = plane()
    x = gm.sample(5, torch.Generator().manual_seed(0))
    close(gm.velocity(x, 0.0), gm.mean() - x, atol=1e-12)  # x_1 is independent of x_0
    close(gm.denoise(x, 0.0), gm.mean().expand(5, 2), atol=1e-12)
    close(gm.denoise(x, 1.0), x, atol=1e-12)
    close(gm.velocity(x, 1.0), x, atol=1e-12)  # the noise is independent of x_1 and has mean zero
    close(gm.velocity(x, 1.0), gm.velocity(x, 1 - 1e-9), atol=1e-7)
    close(gm.posterior(x, 1.0).sample(None, 2), x[:, None].expand(5, 2, 2), atol=1e-12)
    a, b = [0.5, -1.0], [[0.6, 0.2], [0.2, 0.4]]
    reward = x @ exact(a) - (x @ exact(b) * x).sum(-1) / 2
    close(gm.value(x, 1.0, a, b, 3.0), 3 * reward, atol=1e-11)
    close(gm.value(x, 0.0, a, b, 3.0), gm.tilt(a, b, 3.0)[1].expand(5), atol=1e-12)
    close(gm.value_gradient(x, 0.0, a, b, 3.0), torch.zeros(5, 2), atol=1e-12)
    gradient = 3 * (exact(a) - x @ exact(b))
    close(gm.value_gradient(x, 1.0, a, b, 3.0), gradient, atol=1e-10)
    with pytest.raises(ValueError, match="point mass"):
        gm.posterior(x, 1.0).log_prob(x)


def test_one_time_per_row_is_the_same_as_one_call_per_time():
    gm, times = plane(), exact([0.0, 0.3, 1.0])
    x = gm.sample(3, torch.Generator().manual_seed(0))
    for function in (gm.velocity, gm.score, gm.denoise, gm.log_prob, gm.value_gradient):
        rows = torch.cat([function(x[i : i + 1], t) for i, t in enumerate(times.tolist())])
        close(function(x, times), rows, atol=1e-13)


# --- the tilt --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_tilt_agrees_with_quadrature(full):
    log_q = log_prior(GRID) + 2 * (A * GRID - B * GRID**2 / 2)
    log_z = np.log(trapezoid(np.exp(log_q), GRID))
    target, actual = line(full=full).tilt([A], [B], strength=2.0)
    assert actual.shape == ()
    close(actual, log_z)
    close(target.log_prob(X), np.interp(X[:, 0].numpy(), GRID, log_q - log_z), atol=1e-6)
    assert math.isclose(line().tilt([A], [B])[1].item(), 0.756, abs_tol=5e-4)  # the value in the notes


@pytest.mark.parametrize("quadratic", [None, 0.5, [0.5, -0.3], [[0.6, 0.3], [0.3, -0.2]]])
@pytest.mark.parametrize("linear", [None, [0.7, -1.1]])
def test_tilt_in_the_plane_multiplies_the_density(linear, quadratic):
    a, b = exact(linear or [0.0, 0.0]), exact(quadratic or 0.0)
    b = b if b.ndim == 2 else b * torch.eye(2, dtype=torch.float64)
    full, diagonal = plane(), GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], [[0.3, 0.2], [0.1, 0.5]])
    for gm in (full, diagonal):
        target, log_z = gm.tilt(linear, quadratic, strength=1.5)
        z = gm.sample(6, torch.Generator().manual_seed(0))
        reward = z @ a - (z @ b * z).sum(-1) / 2
        close(target.log_prob(z), gm.log_prob(z) + 1.5 * reward - log_z, atol=1e-11)


def test_a_strong_tilt_does_not_underflow():
    target, log_z = line().tilt([1.0], strength=400.0)
    components = np.log(WEIGHTS) + 400 * MEANS + 400**2 * VARIANCES / 2
    close(log_z, logsumexp(components), atol=1e-9, rtol=1e-12)
    close(target.log_weights, components - np.asarray(logsumexp(components)), rtol=1e-12)
    assert target.tilt([1.0], strength=-400.0)[0].weights.numpy() == pytest.approx(WEIGHTS, abs=1e-9)


@pytest.mark.parametrize("make", [line, plane])
def test_value_gradient_agrees_with_finite_differences(make):
    gm, t = make(), exact([0.1, 0.5, 0.9])
    x = gm.sample(3, torch.Generator().manual_seed(0))
    a, step = [1.2, -0.4][: x.shape[1]], 1e-5
    for i, e in enumerate(torch.eye(x.shape[1], dtype=torch.float64)):
        difference = gm.value(x + step * e, t, a, 0.3, 2.0) - gm.value(x - step * e, t, a, 0.3, 2.0)
        close(gm.value_gradient(x, t, a, 0.3, 2.0)[:, i], difference / (2 * step), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("make", [line, plane])
def test_tilted_velocity_is_the_velocity_plus_kappa_times_the_value_gradient(make):
    gm, t = make(), 0.4
    x = gm.sample(4, torch.Generator().manual_seed(0))
    a = [1.2, -0.4][: x.shape[1]]
    steered = gm.velocity(x, t) + gm.interpolant.score_coefficient(t) * gm.value_gradient(x, t, a, 0.3)
    close(gm.tilt(a, 0.3)[0].velocity(x, t), steered, atol=1e-11)


# --- flow maps -------------------------------------------------------------------------------------------------------
def gaussian(path: Interpolant | None = None) -> GaussianMixture:
    return GaussianMixture([[1.0, -0.5]], [[[0.5, 0.3], [0.3, 0.4]]], interpolant=path)


def diagonal_gaussian(path: Interpolant | None = None) -> GaussianMixture:
    return GaussianMixture([[1.0, -0.5]], [[0.5, 0.04]], interpolant=path)


CASES = [line, plane, gaussian, diagonal_gaussian]


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.2, 0.7), (0.9, 1.0), (0.6, 0.1)])
def test_flow_map_agrees_with_an_adaptive_solver(make, path, s, t):
    gm = make(path)
    x = gm.marginal(s).sample(8, torch.Generator().manual_seed(0))
    close(gm.flow_map().jump(x, s, t), solve(gm, x, s, t), atol=1e-8)


@pytest.mark.parametrize("make", CASES)
def test_on_the_diagonal_the_map_is_the_identity_and_its_slope_the_velocity(make):
    gm, fm = make(), make().flow_map()
    times, ends = exact([0.0, 0.3, 1.0, 0.6, 0.5]), exact([0.0, 0.3, 1.0, 0.7, 0.5 + 1e-6])  # two rows do move
    x = gm.sample(5, torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(fm.jump(x, times, ends)[:3], x[:3])
    u = fm.average_velocity(x, times, ends, None)
    close(u[:3], gm.velocity(x, times)[:3], atol=1e-12)
    close(u[4], gm.velocity(x + 5e-7 * u, times + 5e-7)[4], atol=1e-10)
    close(fm.velocity(x, times), gm.velocity(x, times), atol=1e-12)
    (gradient,) = torch.autograd.grad(u.sum(), x)
    (expected,) = torch.autograd.grad(gm.velocity(x, times).sum(), x)
    assert gradient.isfinite().all()
    close(gradient[:3], expected[:3], atol=1e-11)


@pytest.mark.parametrize("gap", [1e-9, 0.99e-4, 1.01e-4])  # on both sides of where the line's map changes its formula
def test_small_jumps_on_the_line(gap):
    gm, s = line(), torch.full((7,), 0.5, dtype=torch.float64)
    u = gm.flow_map().average_velocity(X, s, s + gap, None)
    middle = gm.velocity(X + gap / 2 * gm.velocity(X, 0.5), 0.5 + gap / 2)  # correct to gap^2
    close(u, middle, atol=1e-6 if gap > 1e-5 else 1e-11)
    close(X + gap * u, solve(gm, X, 0.5, 0.5 + gap), atol=1e-13)


@pytest.mark.parametrize("make", CASES)
def test_semigroup_and_push_forward(make):
    gm, fm = make(), make().flow_map()
    x = gm.marginal(0.1).sample(16, torch.Generator().manual_seed(0))
    middle, end = fm.jump(x, 0.1, 0.55), fm.jump(x, 0.1, 1.0)
    close(fm.jump(middle, 0.55, 1.0), end, atol=1e-8)
    close(fm.jump(middle, 0.55, 0.1), x, atol=1e-8)
    jacobian = torch.func.jacrev(lambda x: fm.jump(x, 0.1, 1.0).sum(0))(x).transpose(0, 1)  # rows do not interact
    volume = torch.linalg.slogdet(jacobian).logabsdet
    close(gm.log_prob(end), gm.log_prob(x, 0.1) - volume, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("make", CASES)
def test_derivatives_of_the_map(make):
    gm, fm = make(), make().flow_map(steps=24)
    stop = 0.5 if make is plane else 1.0  # forward mode through many Runge-Kutta steps is slow
    s, t = stop * exact([0.0, 0.3, 0.7, 0.4]), stop * exact([0.9, 1.0, 0.8, 0.4])
    x, step = gm.marginal(0.3).sample(4, torch.Generator().manual_seed(0)), 1e-5
    direction = torch.ones_like(x)
    tangent = torch.func.jvp(lambda x: fm.jump(x, s, t), (x,), (direction,))[1]
    backward = torch.func.vjp(lambda x: fm.jump(x, s, t), x)[1](direction)[0]
    difference = (fm.jump(x + step * direction, s, t) - fm.jump(x - step * direction, s, t)) / (2 * step)
    close(tangent, difference, atol=1e-7, rtol=1e-7)
    close((backward * direction).sum(-1), (tangent * direction).sum(-1), atol=1e-10)
    # Lagrangian: d_t X = b(X, t). Eulerian: d_s X = - grad X b(x, s).
    X_t, d_t = torch.func.jvp(lambda t: fm.jump(x, s, t), (t,), (torch.ones_like(t),))[:2]
    close(d_t, gm.velocity(X_t, t), atol=1e-7)
    d_s = torch.func.jvp(lambda s: fm.jump(x, s, t), (s,), (torch.ones_like(s),))[1]
    transported = torch.func.jvp(lambda x: fm.jump(x, s, t), (x,), (gm.velocity(x, s),))[1]
    close(d_s, -transported, atol=1e-7)


def test_second_derivatives_of_the_line_map():
    fm, x, step = line().flow_map(), X.clone().requires_grad_(), 1e-5

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(fm.jump(x, 0.3, 1.0).sum(), x, create_graph=True)[0]

    (second,) = torch.autograd.grad(slope(x).sum(), x)
    close(second, ((slope(x + step) - slope(x - step)) / (2 * step)).detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (1.0, 0.0), (0.5, 1.0)])
def test_the_line_map_in_the_tails(s, t):
    gm = line()
    x = exact([[-12.0], [12.0], [-6.0], [6.0]]).requires_grad_()
    y = gm.flow_map().jump(x, s, t)
    close(y, transport(gm, x.detach(), s, t), atol=1e-12, rtol=1e-12)
    (jacobian,) = torch.autograd.grad(y.sum(), x)
    close(jacobian[:, 0].log(), gm.log_prob(x, s) - gm.log_prob(y, t), atol=1e-8)


def test_the_line_map_in_a_gap_between_modes():
    gm = GaussianMixture([[-4.0], [4.0]], [[0.09], [0.09]], [0.3, 0.7])  # p_1(0) is about 1e-39
    x = exact([[-1.0], [-0.2], [0.0], [0.3], [1.0]])
    close(gm.flow_map().jump(x, 0.95, 1.0), transport(gm, x, 0.95, 1.0), atol=1e-11)
    close(gm.flow_map().jump(x, 1.0, 0.0), transport(gm, x, 1.0, 0.0), atol=1e-12)
    symmetric = GaussianMixture([[-4.0], [4.0]], [[1e-4], [1e-4]]).flow_map()
    x = exact([[0.0]]).requires_grad_()  # on the border of the basins the slope is infinite
    y = symmetric.lookahead(x, 0.0)
    assert y.abs() <= 4 and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


# --- the object ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", CASES)
def test_float32(make):
    gm = make().to(torch.float32)
    fm, x = gm.flow_map(), gm.sample(16, torch.Generator().manual_seed(0)) * 2
    s, t = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)).sort(0).values
    reference = make().flow_map().jump(x.double(), s.double(), t.double())
    assert fm.dtype == fm.jump(x, s, t).dtype == torch.float32
    close(fm.jump(x, s, t), reference, atol=2e-4, rtol=1e-4)
    close(gm.value(x, 1.0, [0.5] * x.shape[1]), 0.5 * x.sum(-1), atol=1e-5)
    far = gm.flow_map().jump(x * 50, 0.0, 1.0)
    assert far.isfinite().all() and gm.velocity(x * 50, 0.5).isfinite().all()


@pytest.mark.parametrize("make", CASES)
def test_samples_have_the_moments(make):
    gm, n = make(), 100_000
    x = gm.sample(n, torch.Generator().manual_seed(0))
    assert x.shape == (n, gm.means.shape[1])
    assert torch.equal(x, gm.sample(n, torch.Generator().manual_seed(0)))
    sem = gm.cov().diagonal().sqrt() / n**0.5
    assert ((x.mean(0) - gm.mean()).abs() < 4 * sem).all()
    assert torch.allclose(x.T.cov().view_as(gm.cov()), gm.cov(), atol=0.03)
    posterior = gm.posterior(x[:2], 0.5)
    z = posterior.sample(torch.Generator().manual_seed(0), n)
    assert z.shape == (2, n, x.shape[1])
    sem = posterior.cov().diagonal(dim1=1, dim2=2).sqrt() / n**0.5
    assert ((z.mean(1) - posterior.mean()).abs() < 4 * sem).all()


def test_the_map_is_a_copy_with_buffers_and_a_ledger():
    gm = line()
    fm = gm.flow_map().to(torch.float32)
    assert gm.means.dtype == torch.float64 and fm.dtype == torch.float32 and fm.device.type == "cpu"
    assert fm.shape == (1,) and torch.equal(fm.decode(X), X)
    with Ledger() as ledger:
        fm.lookahead(X.float(), 0.2, hops=2)
    assert ledger.cost.forwards == 2 * len(X)


def test_arguments_of_any_kind():
    assert GaussianMixture([[0]], [[1]]).means.dtype == torch.float64
    assert GaussianMixture(np.zeros((2, 1), np.float32), np.ones((2, 1)), (1, 3)).weights.tolist() == [0.25, 0.75]
    assert GaussianMixture(torch.zeros(1, 1), [[1.0]]).covs.dtype == torch.float32
    square = GaussianMixture([[0.0, 1.0], [2.0, 3.0]], [[1.0, 2.0], [3.0, 4.0]])  # k = d: variances, by ndim
    assert square.cov().shape == (2, 2) and square.axes is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, 1.0], [[1.0]]), r"means has shape \(2,\).*\[\[m_1\], \[m_2\]\]"),
        (([[0.0]], [1.0]), r"covs has shape \(1,\), expected variances \(1, 1\) or covariances \(1, 1, 1\)"),
        (([[0.0]], [[1.0]], [0.5, 0.5]), r"weights has shape \(2,\), expected \(1,\)"),
        (([[0.0], [1.0]], [[1.0], [1.0]], [1.5, -0.5]), "must not be negative"),
        (([[0.0]], [[1.0]], [0.0]), "all zero"),
        (([[math.nan]], [[1.0]]), "means holds NaN"),
        (([[0.0]], [[-1.0]]), "not positive definite.*positive diagonal"),
        (([[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "not positive definite"),
        (([[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "not symmetric"),
    ],
)
def test_errors_of_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_errors_of_the_methods():
    gm = plane()
    x = torch.zeros(3, 2, dtype=torch.float64)
    for call, message in [
        (lambda: gm.velocity(x[0], 0.5), r"x has shape \(2,\), expected \(b, 2\)"),
        (lambda: gm.velocity(x, torch.zeros(2)), "one time per row"),
        (lambda: gm.tilt([1.0]), r"linear has shape \(1,\), expected \(2,\)"),
        (lambda: gm.tilt(quadratic=torch.zeros(3)), r"quadratic has shape \(3,\)"),
        (lambda: gm.tilt(quadratic=[[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (lambda: gm.tilt(quadratic=-10.0), "not normalisable"),
        (lambda: line().tilt(quadratic=-4.0), "not normalisable"),  # the widest component has variance 1/4
        (lambda: gm.tilt([1.0, 1.0], strength=torch.ones(3)), "expected one number"),
        (lambda: gm.flow_map(steps=0), "at least one step"),
        (lambda: gm.flow_map().jump(x, 0.0, 1.0, cond=torch.zeros(3)), "unconditional"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
