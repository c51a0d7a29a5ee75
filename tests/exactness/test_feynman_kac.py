"""Particle methods against closed forms: the tilt of a Gaussian mixture and its log Z are known exactly.

A self-normalised average has a bias of order 1 / k, so the z-scores are those of the unnormalised estimators

    exp(log_z) sum_j w_j f(x_j),      whose mean is Z E_q f exactly, for any number of particles,

over independent outputs of few particles; the bias has its own test. f = 1 is Z itself.
"""

import math
from dataclasses import replace

import pytest
import torch
from kinds import sure

import steerfm
from steerfm import FlowMap, GaussianMixture
from steerfm.rows import Rows
from steerfm.sampling import Noise
from steerfm.steering import (
    BestOfN,
    Denoise,
    EndpointGradient,
    Endpoints,
    FeynmanKac,
    Jarzynski,
    Jump,
    MapGradient,
    Steering,
)
from steerfm.steering.tempering import untempered
from steerfm.steering.value import Problem, View
from steerfm.transitions import Diffuse, Renoise, Step

pytestmark = pytest.mark.slow

LIMIT = 4.0
STRONG = MapGradient(scale=4.0), EndpointGradient(scale=4.0)  # so that a wrong correction is seen: z = 5 to 9 without it

# the 1-D case: three modes, r = 1.2 x - .15 x^2, log Z = .756
A, B = 1.2, 0.3
MIXTURE = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
MAP = MIXTURE.flow_map()
TARGET, LOG_Z = MIXTURE.tilt([A], B)
CUTS = (-0.7, 1.5)  # between the modes

# the 2-D case: three correlated modes; no closed-form map, so Runge-Kutta on the exact velocity
A2, B2 = (0.8, -0.5), (0.2, 0.3)
MIXTURE2 = GaussianMixture(
    [[-2.0, 0.0], [1.5, 1.0], [0.0, -2.0]],
    [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.3]], [[0.25, 0.0], [0.0, 0.1]]],
    [0.5, 0.3, 0.2],
)
MAP2 = MIXTURE2.flow_map(steps=12)
TARGET2, LOG_Z2 = MIXTURE2.tilt(A2, torch.diag(torch.tensor(B2)))

# one Gaussian, r = 1.2 x - .25 x^2: the target's mean is .790
A1, B1 = 1.2, 0.5
GAUSSIAN = GaussianMixture([[0.5]], [[0.36]])
TARGET1, LOG_Z1 = GAUSSIAN.tilt([A1], B1)


def reward(x):
    return A * x[:, 0] - B / 2 * x[:, 0] ** 2


def reward1(x):
    return A1 * x[:, 0] - B1 / 2 * x[:, 0] ** 2


def reward2(x):
    return x @ torch.tensor(A2).to(x) - 0.5 * x**2 @ torch.tensor(B2).to(x)


def cdf(mixture, axis, cut):
    """P(x_axis < cut)."""
    std = mixture.covs[:, axis] if mixture.covs.ndim == 2 else mixture.covs[:, axis, axis]
    return (mixture.weights * torch.special.ndtr((cut - mixture.means[:, axis]) / std.sqrt())).sum().item()


def estimates(result, *functions):
    """exp(log_z) sum_j w_j f(x_j) for f = 1 and every function: (1 + len(functions), n)."""
    w = (result.log_z.unsqueeze(1) + result.log_weights).exp()
    return torch.stack([w.sum(1), *((w * f(result.samples)).sum(1) for f in functions)])


def z_scores(values, expected):
    """Of the mean over outputs: values (m, n), expected (m,)."""
    error = values.std(1) / math.sqrt(values.shape[1])
    return (values.mean(1) - torch.as_tensor(expected, dtype=values.dtype)) / error


def one_dimensional(result):
    """z-scores of Z, the mean and the three mode masses."""
    low, high = (cdf(TARGET, 0, cut) for cut in CUTS)
    values = estimates(
        result,
        lambda x: x[..., 0],
        lambda x: (x[..., 0] < CUTS[0]).double(),
        lambda x: ((x[..., 0] >= CUTS[0]) & (x[..., 0] < CUTS[1])).double(),
        lambda x: (x[..., 0] >= CUTS[1]).double(),
    )
    expected = torch.tensor([1.0, TARGET.mean().item(), low, high - low, 1 - high]) * LOG_Z.exp()
    return z_scores(values, expected)


def check(name, scores):
    print(f"{name:60s}", " ".join(f"{score:+.2f}" for score in scores))
    assert scores.abs().max() < LIMIT, (name, scores)


def test_the_case_is_the_one_in_the_notes():
    assert pytest.approx(0.756, abs=5e-4) == LOG_Z.item()
    assert TARGET1.mean().item() == pytest.approx(0.790, abs=5e-4)


# --- twisted weights -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [None, *STRONG], ids=["free", "map", "endpoint"])
@pytest.mark.parametrize("lookahead", [Jump(), Denoise()], ids=["jump", "denoise"])
def test_feynman_kac_samples_the_tilt_in_one_dimension(lookahead, guidance, gamma):
    method = FeynmanKac(particles=16, steps=4, lookahead=lookahead, guidance=guidance, transition=Renoise(gamma))
    result = steerfm.steer(MAP, reward, method, n=200, seeds=1000)
    assert result.trace.resampled.any()
    check(f"1-D {lookahead} {type(guidance).__name__} gamma={gamma}", one_dimensional(result))


@pytest.mark.parametrize(
    "changes",
    [
        {"tempering": "none"},
        {"tempering": "exponential"},
        {"tempering": lambda t: max(0.0, 2 * t - 1), "guidance": "map"},
        {"guidance": MapGradient(cap=None)},
        {"guidance": MapGradient(scale=0.3, normalised=True)},
        {"resampling": "multinomial", "threshold": 1.0},
        {"resampling": "residual"},
        {"resampling": "ssp", "threshold": 0.9},
        {"resampling": None},
        {"threshold": 0.0},
        {"lookahead": Jump(2)},
        {"transition": "jump"},
        {"power": 1.5},
        {"particles": 3},
    ],
    ids=lambda changes: "-".join(f"{key}" for key in changes),
)
def test_every_setting_of_feynman_kac_keeps_the_target(changes):
    method = FeynmanKac(**{"particles": 16, "steps": 4} | changes)
    result = steerfm.steer(MAP, reward, method, n=128, seeds=5000)
    check(f"1-D {changes}", one_dimensional(result))


def test_strength_per_output_tilts_each_output():
    strengths = torch.tensor([0.5, 1.0, -1.0]).repeat_interleave(64)
    result = steerfm.steer(MAP, reward, FeynmanKac(particles=12, steps=3), n=192, seeds=7, strength=strengths)
    for i, strength in enumerate((0.5, 1.0, -1.0)):
        target, log_z = MIXTURE.tilt([A], B, strength)
        rows = slice(64 * i, 64 * i + 64)
        values = estimates(result, lambda x: x[..., 0])[:, rows]
        check(f"1-D strength={strength}", z_scores(values, torch.tensor([1.0, target.mean().item()]) * log_z.exp()))


@pytest.mark.parametrize("guidance", [None, STRONG[1]], ids=["free", "endpoint"])
@pytest.mark.parametrize("lookahead", [Jump(), Denoise()], ids=["jump", "denoise"])
def test_feynman_kac_samples_the_tilt_in_two_dimensions(lookahead, guidance):
    method = FeynmanKac(particles=16, steps=3, lookahead=lookahead, guidance=guidance, threshold=0.95)
    result = steerfm.steer(MAP2, reward2, method, n=100, seeds=0)
    assert result.trace.resampled.any()
    cuts = ((0, 0.3), (0, -1.0), (1, -1.0))
    values = estimates(
        result,
        lambda x: x[..., 0],
        lambda x: x[..., 1],
        *(lambda x, a=axis, c=cut: (x[..., a] < c).double() for axis, cut in cuts),
    )
    expected = torch.tensor([1.0, *TARGET2.mean().tolist(), *(cdf(TARGET2, axis, cut) for axis, cut in cuts)])
    check(f"2-D {lookahead} {type(guidance).__name__}", z_scores(values, expected * LOG_Z2.exp()))


def test_map_gradient_samples_the_tilt_in_two_dimensions():
    method = FeynmanKac(particles=8, steps=3, guidance=STRONG[0], threshold=0.95)
    result = steerfm.steer(MIXTURE2.flow_map(steps=8), reward2, method, n=100, seeds=300)
    values = estimates(result, lambda x: x[..., 0], lambda x: x[..., 1])
    expected = torch.tensor([1.0, *TARGET2.mean().tolist()]) * LOG_Z2.exp()
    check("2-D Jump() MapGradient", z_scores(values, expected))


@pytest.mark.parametrize("guidance", [None, *STRONG], ids=["free", "map", "endpoint"])
@pytest.mark.parametrize("lookahead", [Jump(), Denoise()], ids=["jump", "denoise"])
def test_diffuse_samples_the_tilt_of_its_own_chain(lookahead, guidance):
    """Euler-Maruyama on one Gaussian is a linear chain: its law at t = 1 is a Gaussian that a recursion gives."""
    steps, epsilon = 6, lambda t: 1 - t
    mean, variance = 0.0, 1.0
    for i in range(steps):
        s, h = i / steps, 1 / steps
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        step = Diffuse(epsilon).step(GAUSSIAN.flow_map(), x, s, (i + 1) / steps, None)
        shift, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        mean, variance = slope * mean + shift, slope**2 * variance + step.std**2
        assert step.std == pytest.approx(math.sqrt(2 * epsilon(s) * h) if i + 1 < steps else 0.0)
    target, log_z = GaussianMixture([[mean]], [[variance]]).tilt([A1], B1)
    method = FeynmanKac(
        particles=16, steps=steps, lookahead=lookahead, guidance=guidance, transition=Diffuse(epsilon), threshold=0.9
    )
    result = steerfm.steer(GAUSSIAN.flow_map(), reward1, method, n=600, seeds=0)
    values = estimates(result, lambda x: x[..., 0], lambda x: x[..., 0] ** 2)
    second = (target.cov() + target.mean() ** 2).item()
    expected = torch.tensor([1.0, target.mean().item(), second], dtype=torch.float64) * log_z.exp()
    check(f"Gaussian Diffuse {lookahead} {type(guidance).__name__}", z_scores(values, expected))


class VelocityOnly(FlowMap):
    """The mixture's exact velocity, for methods that never jump: the exact map's quantiles are dear."""

    def __init__(self):
        super().__init__((1,))
        self.mixture = MIXTURE

    def average_velocity(self, x, s, t, cond):
        assert torch.equal(s, t)
        return self.mixture.velocity(x, s)


@pytest.mark.parametrize("guidance", [None, *STRONG], ids=["free", "map", "endpoint"])
def test_diffuse_agrees_with_importance_weights_of_its_own_chain(guidance):
    """On a mixture the chain's law has no closed form: the same chain, weighted at the end only, is the reference."""
    functions = (
        lambda x: x[..., 0],
        lambda x: (x[..., 0] < CUTS[0]).double(),
        lambda x: (x[..., 0] > CUTS[1]).double(),
    )
    plain = BestOfN(particles=64, steps=8, transition=Diffuse())
    reference = estimates(steerfm.steer(VelocityOnly(), reward, plain, n=500, seeds=10_000), *functions)
    method = FeynmanKac(particles=16, steps=8, lookahead="denoise", guidance=guidance, transition=Diffuse())
    values = estimates(steerfm.steer(VelocityOnly(), reward, method, n=500, seeds=0), *functions)
    error = (values.var(1) / values.shape[1] + reference.var(1) / reference.shape[1]).sqrt()
    check(f"1-D Diffuse Denoise {type(guidance).__name__}", (values.mean(1) - reference.mean(1)) / error)


def test_self_normalised_error_falls_with_particles():
    """The bias falls as 1 / k and the standard deviation as k^-1/2."""
    strength = 3.0
    target, _ = GAUSSIAN.tilt([A1], B1, strength)
    bias, error, spread = {}, {}, {}  # times k, k and k^1/2: what should not depend on k
    for k, n in ((8, 4000), (32, 4000), (128, 1000)):
        method = FeynmanKac(particles=k, steps=3, threshold=0.9)
        result = steerfm.steer(GAUSSIAN.flow_map(), reward1, method, n=n, seeds=0, strength=strength)
        assert result.trace.resampled.double().mean() > 0.1
        mean = (result.log_weights.exp() * result.samples[..., 0]).sum(1)
        bias[k] = k * (mean.mean() - target.mean()[0]).item()
        error[k] = k * (mean.std() / math.sqrt(n)).item()
        spread[k] = math.sqrt(k) * mean.std().item()
    print("bias * k", bias, "error * k", error, "sd * sqrt(k)", spread)
    assert abs(bias[8]) > 10 * error[8] and abs(bias[32]) > 5 * error[32]  # seen clearly
    for k in (32, 128):
        assert abs(bias[k] - bias[8]) < LIMIT * math.hypot(error[k], error[8])
        assert spread[k] == pytest.approx(spread[8], rel=0.15)


# --- the exact value -------------------------------------------------------------------------------------------------
class Reverse:
    """p(x_t | x_s) of one Gaussian N(m, v) under the noising process: the transition for which V_t is the exact twist."""

    stochastic = True

    def step(self, flow_map, x, s, t, cond, endpoint=None):
        m, v = 0.5, 0.36
        c_s, c_t = s**2 * v + (1 - s) ** 2, t**2 * v + (1 - t) ** 2
        gain = (s / t) * c_t / c_s  # x_s = (s / t) x_t + noise
        return Step(t * m + gain * (x - s * m), math.sqrt(c_t - gain * (s / t) * c_t))


SLOPE = 0.8  # of a linear reward, whose exact value is linear in x too


class ExactValue:
    """One endpoint whose reward a z is the exact value of a linear reward: a E[x_1 | x_t] + a^2 Var[x_1 | x_t] / 2."""

    def endpoints(self, flow_map, x, t, cond, noise=None):
        posterior = GAUSSIAN.posterior(x, t)
        return Endpoints(posterior.means + SLOPE / 2 * posterior.covs)


class Optimal:
    """Shift by std^2 grad V_t: what makes the proposal the exact conditional of the tilted chain."""

    differentiates = False

    def evaluate(self, view):
        return replace(view.look(), direction=torch.ones_like(view.x))

    def shift(self, flow_map, evaluation, x, mean, s, t, std):
        return std**2 * SLOPE * t * 0.36 / (t**2 * 0.36 + (1 - t) ** 2) * evaluation.direction


class PosteriorSamples:
    """k exact samples of p(x_1 | x_t), with deliberately shifted constants in the log-weights."""

    kind = ""

    def __init__(self, k, seed=0):
        self.k, self.generator = k, torch.Generator().manual_seed(seed)

    def endpoints(self, flow_map, x, t, cond, noise=None):
        z = GAUSSIAN.posterior(x, t).sample(self.generator, self.k)
        return Endpoints(z, torch.full(z.shape[:2], 3.0, dtype=torch.float64) + x.detach())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_value_twist_has_an_effective_sample_size_of_one(steps):
    target, log_z = GAUSSIAN.tilt([SLOPE])
    method = FeynmanKac(256, steps, ExactValue(), Optimal(), untempered, Reverse())
    result = steerfm.steer(GAUSSIAN.flow_map(), lambda x: SLOPE * x[:, 0], method, n=8)
    assert (result.trace.ess > 1 - 1e-9).all()
    assert torch.allclose(sure(result.log_z), log_z.expand(8), atol=1e-5)
    x = result.samples.flatten()
    assert abs(x.mean() - target.mean()) < LIMIT * x.std() / math.sqrt(len(x))
    assert x.var().item() == pytest.approx(target.cov().item(), rel=0.15)


def test_gradient_of_the_exact_value_brings_the_effective_sample_size_to_one_with_steps():
    """A step follows the gradient at its start, grad V_s: the optimal shift in the limit of small steps."""
    loss = {}
    for steps in (4, 8, 32):
        guidance = MapGradient(cap=None)
        method = FeynmanKac(64, steps, ExactValue(), guidance, untempered, Reverse(), threshold=0.0)
        result = steerfm.steer(GAUSSIAN.flow_map(), lambda x: SLOPE * x[:, 0], method, n=16)
        loss[steps] = 1 - result.trace.ess[-1].mean().item()
    print("1 - ESS", loss)
    assert loss[32] < loss[8] / 3 < loss[4] / 5
    assert loss[32] < 0.02


def test_many_posterior_endpoints_approach_the_exact_value():
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).unsqueeze(1)
    problem = Problem(GAUSSIAN.flow_map(), steerfm.reward(lambda x: SLOPE * x[:, 0]), torch.full((64,), 2.0).double(), Rows(64))
    half = View(problem, PosteriorSamples(4096), Noise(range(64)), x, 0.4, lambda ends, tilt: torch.full((64,), 0.5).double())
    estimate = half.look().value
    exact = GAUSSIAN.value(x, 0.4, linear=[SLOPE])
    assert (estimate - exact).abs().max() < 0.05
    assert abs((estimate - exact).mean()) < 0.005


def test_many_posterior_endpoints_bring_the_effective_sample_size_near_one():
    _, log_z = GAUSSIAN.tilt([SLOPE])
    lowest = {}
    for k in (1, 256):
        method = FeynmanKac(32, 4, PosteriorSamples(k), Optimal(), untempered, Reverse(), threshold=0.0)
        result = steerfm.steer(GAUSSIAN.flow_map(), lambda x: SLOPE * x[:, 0], method, n=60)
        lowest[k] = result.trace.ess.mean(1).min().item()
        check(f"Gaussian {k} posterior endpoints", z_scores(estimates(result), [log_z.exp().item()]))
    print("ESS", lowest)
    assert lowest[256] > 0.98 and lowest[1] < 0.9


# --- Jarzynski -------------------------------------------------------------------------------------------------------
def fmtt(steps, particles=128, **changes):
    parts = {
        "lookahead": Jump(),
        "guidance": MapGradient(scale=0.5, cap=None),
        "transition": Diffuse(lambda t: 1 - t),
        "correction": Jarzynski(),
        "resampling": None,
    }
    return Steering(particles=particles, steps=steps, **parts | changes)


def test_jarzynski_approaches_the_tilt_as_steps_grow():
    error = {}
    for steps in (8, 64):
        result = steerfm.steer(GAUSSIAN.flow_map(), reward1, fmtt(steps), n=64)
        total, first, second = estimates(result, lambda x: x[..., 0], lambda x: x[..., 0] ** 2)
        noise = (first - TARGET1.mean() * total).std() / 8 / total.mean()
        mean = (first.mean() / total.mean()).item()
        error[steps] = (
            abs(mean - TARGET1.mean().item()),
            abs((second.mean() / total.mean()).item() - mean**2 - TARGET1.cov().item()),
            abs(math.log(total.mean()) - LOG_Z1.item()),
        )
    print("FMTT error of mean, variance, log Z:", error, "noise", noise.item())
    assert all(late < early for late, early in zip(error[64], error[8]))
    assert error[64][0] < 0.02 + 4 * noise
    assert error[64][1] < 0.05 and error[64][2] < 0.02


def test_jarzynski_on_a_mixture_approaches_the_tilt():
    error = {}
    for steps in (6, 24):
        result = steerfm.steer(MAP, reward, fmtt(steps, particles=16, resampling="ssp"), n=24, seeds=50)
        total, first = estimates(result, lambda x: x[..., 0])
        error[steps] = abs((first.mean() / total.mean()).item() - TARGET.mean().item())
    print("FMTT error of the mean on the mixture:", error)
    assert error[24] < error[6] and error[24] < 0.1


@pytest.mark.parametrize("tempering", ["linear", "exponential", lambda t: max(0.0, 2 * t - 1)])
def test_jarzynski_under_jumps_is_importance_weighting(tempering):
    method = fmtt(4, particles=8, guidance=None, transition="jump", tempering=tempering)
    result = steerfm.steer(MAP, reward, method, n=6)
    plain = steerfm.steer(MAP, reward, BestOfN(particles=8, steps=4), n=6)
    assert torch.equal(result.samples, plain.samples)
    assert torch.allclose(result.log_weights, plain.log_weights, atol=1e-5)
    assert torch.allclose(sure(result.log_z), sure(plain.log_z), atol=1e-5)


def test_best_of_n_estimates_log_z():
    result = steerfm.steer(MAP, reward, BestOfN(particles=64, steps=1), n=200, seeds=0)
    check("1-D BestOfN", one_dimensional(result))
