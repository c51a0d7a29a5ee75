"""Look-aheads and the guidances built on them against the exact posterior and value of Gaussian mixtures."""

import math

import pytest
import torch
from kinds import sure

import steerfm
from steerfm import GaussianMixture
from steerfm.cost import Ledger
from steerfm.flowmap import Wrapped
from steerfm.interpolant import Trigonometric
from steerfm.rows import Rows
from steerfm.sampling import Noise
from steerfm.steering import (
    DiamondSMC,
    ExactPosterior,
    FreeGradient,
    Jump,
    MapGradient,
    Posterior,
    Renoise,
    Rollout,
    Smooth,
    Steering,
    residual,
)
from steerfm.steering.tempering import untempered
from steerfm.steering.value import Evaluation, Problem, View
from steerfm.transitions import Bridge, Diffuse
from steerfm.transitions import Renoise as Noised

pytestmark = pytest.mark.slow

LIMIT = 4.0
A, B = 1.2, 0.3
WIDE = GaussianMixture([[0.5]], [[0.64]])
MIXTURE = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
CURVED = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2], Trigonometric())
PLANE = GaussianMixture(
    [[-2.0, 0.0], [1.5, 1.0], [0.0, -2.0]],
    [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.3]], [[0.25, 0.0], [0.0, 0.1]]],
    [0.5, 0.3, 0.2],
)


def reward(x):
    return A * x[:, 0] - B / 2 * x[:, 0] ** 2


def view(lookahead, x, t, seed=0):
    problem = Problem(MIXTURE.flow_map(), steerfm.reward(reward), torch.ones(len(x)).double(), Rows(len(x)))
    noise = Noise(range(seed, seed + len(x)))
    return View(problem, lookahead, noise, x, t, lambda ends, tilt: torch.ones(len(tilt)).to(tilt))


# --- endpoints -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lookahead", [Posterior(steps=24, k=4000), "exact"])
@pytest.mark.parametrize("mixture", [MIXTURE, CURVED, PLANE], ids=["line", "trigonometric", "plane"])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_posterior_samples_are_those_of_the_exact_posterior(lookahead, mixture, t):
    """z-scores of the mean, the second moments and a tail probability, at several x."""
    d = mixture.means.shape[1]
    x = torch.tensor([[-1.5] * d, [0.3] * d, [1.4] * d], dtype=torch.float64)
    lookahead = ExactPosterior(mixture, 4000) if lookahead == "exact" else lookahead
    z = lookahead.endpoints(mixture.flow_map(steps=8), x, t, None, Noise(range(3))).z
    posterior = mixture.posterior(x, t)
    exact = posterior.sample(torch.Generator().manual_seed(0), 200_000)
    for f in (lambda z: z, lambda z: z**2, lambda z: z.prod(-1, keepdim=True), lambda z: (z[..., :1] > 0.2).double()):
        got, want = f(z), f(exact)
        error = (got.var(1) / z.shape[1] + want.var(1) / exact.shape[1]).sqrt().clamp_min(1e-3)
        assert ((got.mean(1) - want.mean(1)) / error).abs().max() < LIMIT


def test_a_smooth_lookahead_is_the_denoiser_with_the_noise_of_x():
    x = torch.tensor([[0.4]], dtype=torch.float64)
    z = Smooth(20_000, scale=0.5).endpoints(MIXTURE.flow_map(), x, 0.6, None, Noise([0])).z[0, :, 0]
    assert abs(z.mean() - MIXTURE.denoise(x, 0.6)) < LIMIT * z.std() / math.sqrt(len(z))
    assert z.std().item() == pytest.approx(0.5 * 0.4, rel=0.03)


@pytest.mark.parametrize(("t", "snr_factor"), [(0.2, 5.0), (0.4, 5.0), (0.6, 5.0), (0.6, 1.5), (0.8, 5.0)])
def test_renoised_endpoints_approach_the_exact_value(t, snr_factor):
    """With the exact reference the estimate converges at the Monte Carlo rate; the trapezoid costs little."""
    x = torch.full((32, 1), 0.3, dtype=torch.float64)
    exact = MIXTURE.value(x[:1], t, [A], B).item()
    error = {}
    for k in (16, 1024):
        found = view(Renoise(snr_factor, k, reference=MIXTURE.log_prob), x, t).look().value
        error[k] = (found - exact).square().mean().sqrt().item()
    print(f"t {t} snr {snr_factor} exact {exact:.3f} root mean square error", error)
    assert error[1024] < 0.1 and error[1024] < error[16] / 2
    trapezoid = view(Renoise(snr_factor, 256), x, t).look().value
    assert abs(trapezoid.mean().item() - exact) < 0.2


def test_dropping_a_term_of_the_weight_is_a_bias():
    x = torch.full((64, 1), 0.3, dtype=torch.float64)
    exact = MIXTURE.value(x[:1], 0.6, [A], B).item()
    found = view(Renoise(5.0, 1024, terms=()), x, 0.6).look().value
    assert (found.mean().item() - exact) / (found.std().item() / 8) > LIMIT
    with pytest.raises(ValueError, match="unknown terms"):
        Renoise(terms=("prior",))


def test_a_rollout_nears_the_jump_as_one_over_its_steps():
    x = torch.linspace(-3, 3, 9, dtype=torch.float64).unsqueeze(1)
    flow_map = MIXTURE.flow_map()
    exact = flow_map.lookahead(x, 0.3, None)
    with Ledger() as ledger:
        errors = [(Rollout(steps).endpoints(flow_map, x, 0.3, None).z[:, 0] - exact).abs().max().item() for steps in (50, 100)]
    assert ledger.cost.forwards == 9 * 150
    assert errors[1] < 0.05 and errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def test_lookaheads_that_draw_need_noise():
    with pytest.raises(ValueError, match="noise="):
        Posterior().endpoints(MIXTURE.flow_map(), torch.zeros(1, 1), 0.5, None)


# --- transitions -----------------------------------------------------------------------------------------------------
BY_DRAWS = [Bridge(endpoint="posterior"), Noised(endpoint="posterior")]


@pytest.mark.parametrize("transition", BY_DRAWS, ids=["bridge", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_posterior_samples_keep_the_law_in_any_number_of_steps(transition, steps):
    method = Steering(4, steps, ExactPosterior(MIXTURE), transition=transition, correction="none", resampling=None)
    x = steerfm.steer(MIXTURE.flow_map(), reward, method, n=2000).samples.flatten()
    for f in (lambda x: x, lambda x: x**2, lambda x: (x < -0.7).double(), lambda x: (x > 1.5).double()):
        exact = f(MIXTURE.sample(400_000, torch.Generator().manual_seed(1)).flatten())
        error = math.sqrt(f(x).var() / len(x) + exact.var() / len(exact))
        assert abs(f(x).mean() - exact.mean()) < LIMIT * error


@pytest.mark.parametrize("transition", BY_DRAWS, ids=["bridge", "renoise"])
def test_a_transition_by_draws_makes_none_of_its_own(transition):
    with pytest.raises(ValueError, match="lookahead=posterior"):
        transition.step(MIXTURE.flow_map(), torch.zeros(3, 1), 0.2, 0.5, None)


def test_many_ancestral_steps_keep_the_law():
    method = Steering(1, 200, None, transition="bridge", correction="none", resampling=None)
    x = steerfm.steer(MIXTURE.flow_map(), reward, method, n=4000).samples.flatten()
    assert x.mean().item() == pytest.approx(MIXTURE.mean().item(), abs=0.15)
    assert x.std().item() == pytest.approx(MIXTURE.cov().sqrt().item(), rel=0.05)


# --- gradients -------------------------------------------------------------------------------------------------------
def test_the_free_gradient_approaches_the_exact_one():
    """(alpha/sigma^2) (tilted mean - mean) over exact posterior samples is grad V."""
    t, x = 0.5, torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).unsqueeze(1)
    exact = MIXTURE.value_gradient(x, t, [A], B)
    found = sure(FreeGradient().evaluate(view(ExactPosterior(MIXTURE, 100_000), x, t)).direction) * t / (1 - t) ** 2
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_gradient_through_posterior_samples_approaches_the_exact_one():
    t, x = 0.5, torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).unsqueeze(1)
    exact = MIXTURE.value_gradient(x, t, [A], B)
    found = sure(MapGradient().evaluate(view(Posterior(32, 4000), x, t)).direction)
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("lookahead", ["denoise", ExactPosterior(WIDE), Posterior(steps=6)], ids=["denoise", "exact", "glass"])
def test_damped_guidance_by_one_endpoint_samples_the_tilt_of_a_gaussian(lookahead):
    """A strong concave reward: without the damping samples are too near to its peak, and too narrow by far."""
    target = WIDE.tilt([12.0], 6.0)[0]

    def concave(x):
        return (12 * x - 3 * x.square()).sum(1)

    def ends(tempering, steps):
        method = Steering(
            1, steps, lookahead, MapGradient(cap=None, largest=1e4), tempering=tempering, transition=Diffuse(0.0),
            correction="none", resampling=None,
        )  # fmt: skip
        return steerfm.steer(WIDE.flow_map(), concave, method, n=3000, batch_size=3000).samples.flatten()

    mean, std = target.mean().item(), target.cov().sqrt().item()
    damped, plain = ends({"name": "damping", "curvature": 6.0, "std": 0.8}, 120), ends("none", 40)
    assert abs(damped.mean() - mean) < LIMIT * std / 3000**0.5 + 0.005 and damped.std().item() == pytest.approx(std, rel=0.06)
    assert plain.mean() > mean + std and plain.std() < 0.5 * std


def test_damping_is_refused_off_the_linear_path():
    method = Steering(1, 4, "denoise", MapGradient(), tempering="damping", correction="none", resampling=None)
    with pytest.raises(ValueError, match="its tempering Damping holds on the linear path alone: take tempering=none"):
        steerfm.steer(CURVED.flow_map(), reward, method)


def test_the_residual_tells_a_flow_map_from_another_function():
    class Bent(Wrapped):
        def average_velocity(self, x, s, t, cond):
            u = super().average_velocity(x, s, t, cond)
            return u if s is t else u + 0.3 * expand(t - s, x)

    def expand(gap, x):
        return gap.view(-1, 1)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    true = MIXTURE.flow_map()
    assert residual(true, x, 0.4).max() < 1e-6
    assert residual(Bent(true), x, 0.4).min() > 0.01


# --- known figures: notes on methods, sections 7 and 11 ----------------------------------------------------------------
QUANTILES = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
TARGET, LOG_Z = MIXTURE.tilt([A], B)


def exact_quantiles(mixture):
    """By bisection on the distribution function."""
    low, high = torch.full_like(QUANTILES, -8.0), torch.full_like(QUANTILES, 8.0)
    for _ in range(60):
        middle = (low + high) / 2
        cdf = (mixture.weights * torch.special.ndtr((middle.unsqueeze(1) - mixture.means.T) / mixture.covs.T.sqrt())).sum(1)
        low, high = torch.where(cdf < QUANTILES, middle, low), torch.where(cdf < QUANTILES, high, middle)
    return low


def wasserstein(samples, log_weights=None):
    """W1 to the target by quantiles at 4,000 points."""
    x, order = samples.flatten().sort()
    w = torch.full_like(x, 1 / len(x)) if log_weights is None else (log_weights.exp() / len(log_weights)).flatten()[order]
    index = torch.searchsorted(w.cumsum(0), QUANTILES).clamp_max(len(x) - 1)
    return (x[index] - exact_quantiles(TARGET)).abs().mean().item()


def test_the_prior_is_far_from_the_target():
    assert wasserstein(MIXTURE.sample(40_000, torch.Generator().manual_seed(0))) == pytest.approx(2.37, abs=0.05)


class ExactGradient(MapGradient):
    """grad V of the mixture in closed form: what guidance would be with the truth."""

    def evaluate(self, view):
        zero = torch.zeros(len(view.x), dtype=torch.float64)
        return Evaluation(zero, zero, zero, view.x, MIXTURE.value_gradient(view.x, view.t, [A], B))


def guided(guidance, lookahead, steps, particles, seed=0):
    method = Steering(particles, steps, lookahead, guidance, untempered, Diffuse(0.0), correction="none", resampling=None)
    return wasserstein(steerfm.steer(MIXTURE.flow_map(), reward, method, seeds=[seed]).samples)


def test_guidance_by_the_exact_value_reaches_the_target():
    error = guided(ExactGradient(cap=None, largest=1e4), Jump(), 200, 20_000)
    print("W1 of exact-V guidance", error)
    assert error < 0.03


def test_guidance_by_posterior_samples_improves_with_their_number():
    """MFM-G: about .63, .35, .04 for 1, 4, 16 posterior samples."""
    error = {k: guided(MapGradient(cap=None, largest=1e4), Posterior(steps=6, k=k), 60, 1000) for k in (1, 4, 16)}
    print("W1 of MFM-G", error)
    assert error[16] < 0.15 < error[4] < error[1] < 1.2


@pytest.mark.parametrize("seed", [0, 77_000])
def test_draws_tell_more_early(seed):
    """256 draws in all, most of them early, and 300 even ones: .26 and .33."""
    looks = {"even": Posterior(steps=6, k=5), "early": Posterior(steps=6, k=4, early=2)}
    draws = {name: sum(look.number(i / 60) for i in range(60)) for name, look in looks.items()}
    error = {name: guided(MapGradient(cap=None, largest=1e4), look, 60, 1000, seed) for name, look in looks.items()}
    print("W1 of MFM-G", error, "draws", draws)
    assert draws["early"] < draws["even"] and error["early"] < 0.85 * error["even"]


def test_weights_correct_the_bias_of_few_posterior_samples():
    """One draw each: the gradient by itself is off by about .58, particles with weights by .11 (1,000 particles)."""
    alone = guided(MapGradient(cap=None, largest=1e4), Posterior(steps=6, k=1), 30, 1000)
    result = steerfm.steer(MIXTURE.flow_map(), reward, DiamondSMC(1000, 6, lookahead=Posterior(steps=6)))
    weighed = wasserstein(result.samples, result.log_weights.log_softmax(1))
    print("W1 alone", alone, "with weights", weighed)
    assert weighed < 0.25 and alone > 0.45
