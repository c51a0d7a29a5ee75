"""Every preset that claims to sample the tilt does; those that do not claim it are seen not to."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from kinds import sure
from weighed import weighed

import steerfm
from steerfm import GaussianMixture
from steerfm.steering import (
    DAS,
    FMTT,
    METHODS,
    TDS,
    Adaptive,
    BestOfN,
    DiamondSMC,
    EndpointGradient,
    ExactPosterior,
    FeynmanKac,
    FKSteering,
    Funnel,
    Jarzynski,
    MapGradient,
    Steering,
)
from steerfm.transitions import Diffuse, Renoise

pytestmark = pytest.mark.slow

LIMIT = 4.0
A, B = 1.2, 0.3
MIXTURE = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
TARGET, LOG_Z = MIXTURE.tilt([A], B)
GAUSSIAN = GaussianMixture([[0.5]], [[0.36]])
CUTS = (-0.7, 1.5)


def reward(x):
    return A * x[:, 0] - B / 2 * x[:, 0] ** 2


FUNCTIONS = (
    torch.ones_like,
    lambda x: x,
    lambda x: (x < CUTS[0]).double(),
    lambda x: (x > CUTS[1]).double(),
)


def estimates(result):
    """exp(log_z) sum_j w_j f(x_j), whose mean is Z E_q f for any number of particles: (len(FUNCTIONS), n)."""
    w = (result.log_z.unsqueeze(1) + result.log_weights).exp()
    return torch.stack([(w * f(result.samples[..., 0])).sum(1) for f in FUNCTIONS])


@cache
def exact():
    x = TARGET.sample(2_000_000, torch.Generator().manual_seed(3))[:, 0]
    return torch.stack([f(x).mean() for f in FUNCTIONS]) * LOG_Z.exp()


def check(name: str, values: torch.Tensor, expected: torch.Tensor, variance: torch.Tensor | float = 0.0) -> None:
    scores = (values.mean(1) - expected) / (values.var(1) / values.shape[1] + variance).sqrt()
    print(f"{name:40s}", " ".join(f"{score:+.2f}" for score in scores))
    assert scores.abs().max() < LIMIT, scores


@pytest.mark.parametrize(
    ("method", "strength"),
    [
        (FKSteering(16, 8), 1.0),
        (FKSteering(16, 8, potential="max"), 1.0),
        (FKSteering(16, 8, potential="sum"), 0.1),  # the sums make it 36 times stronger on the way: else no particle is left
        (TDS(16, 8), 1.0),
        (DAS(16, 8, tempering="exponential"), 1.0),
    ],
    ids=["difference", "max", "sum", "tds", "das"],
)
def test_denoiser_presets_sample_the_tilt_of_their_own_chain(method, strength):
    """The ancestral chain is right only in the limit of many steps: compare with importance sampling of the same chain."""
    plain = BestOfN(64, 8, transition="bridge")
    reference = estimates(steerfm.steer(MIXTURE.flow_map(), reward, plain, n=1500, seeds=50_000, strength=strength))
    values = estimates(steerfm.steer(MIXTURE.flow_map(), reward, weighed(method), n=1500, strength=strength))
    check(type(method).__name__, values, reference.mean(1), reference.var(1) / reference.shape[1])


@pytest.mark.parametrize("transition", ["bridge", "renoise"])
def test_diamond_particles_sample_the_exact_tilt_in_few_steps(transition):
    method = DiamondSMC(16, 3, lookahead=ExactPosterior(MIXTURE), transition={"name": transition, "endpoint": "posterior"})
    check(f"diamond {transition}", estimates(steerfm.steer(MIXTURE.flow_map(), reward, method, n=1500)), exact())


@pytest.mark.parametrize(
    "guidance", [None, EndpointGradient(scale=4.0), MapGradient(scale=4.0)], ids=["free", "endpoint", "map"]
)
@pytest.mark.parametrize(("first", "steps"), [(64, 4), (12, 2), (8, 1)])
def test_a_funnel_samples_the_exact_tilt(guidance, first, steps):
    """Narrowing draws particles by their weights: unbiased, whatever is left."""
    method = Funnel(8, steps, first=first, guidance=guidance)
    check(f"funnel {first} {steps}", estimates(steerfm.steer(MIXTURE.flow_map(), reward, method, n=400)), exact())


@pytest.mark.parametrize("guidance", [None, "map"])
def test_adaptive_tempering_samples_the_tilt(guidance):
    """Its log Z is biased by order 1 / k, so with many particles."""
    method = FeynmanKac(512, 8, tempering=Adaptive(0.8), guidance=guidance, transition=Renoise(1.0))
    result = steerfm.steer(MIXTURE.flow_map(), reward, method, n=100)
    check(f"adaptive {guidance}", estimates(result), exact())
    beta = sure(result.trace.beta)
    assert (beta.diff(dim=0) >= 0).all() and (beta[-1] == 1).all() and (beta >= 0).all()
    previous = torch.ones(100, dtype=torch.float64)
    for i in range(7):
        assert ((result.trace.ess[i] >= 0.8 * previous - 1e-6) | (beta[i] <= beta[i - 1] if i else beta[i] == 0)).all()
        previous = torch.where(result.trace.resampled[i], 1.0, result.trace.ess[i])


# --- Jarzynski: notes on methods, sections 1 and 7 --------------------------------------------------------------------
def tilted_mean(method, n=40):
    result = steerfm.steer(GAUSSIAN.flow_map(), lambda x: 1.2 * x[:, 0] - 0.25 * x[:, 0] ** 2, method, n=n)
    means = (result.log_weights.exp() * result.samples[..., 0]).sum(1)
    return means.mean().item(), means.std().item() / math.sqrt(n)


def fmtt(steps, ascent=None, correction: Any = "jarzynski", lookahead="jump", particles=500):
    guidance = MapGradient(0.5, cap=None, ascent=ascent)
    transition = Diffuse(lambda t: 1 - t)
    return Steering(particles, steps, lookahead, guidance, "linear", transition, correction, None)


def chi(t):
    return 1.05 * (1 - t) / (t + 0.05)


def test_extra_ascent_is_a_bias_that_the_general_weight_cures():
    """.932 without the laplacian, .790 with it, as without any ascent."""
    want = 0.790
    plain = tilted_mean(fmtt(100))
    cured = tilted_mean(fmtt(100, chi, Jarzynski(general=True)))
    print("mean of the target .790: simple", plain, "extra ascent, general weight", cured)
    assert abs(plain[0] - want) < 0.01 + LIMIT * plain[1]
    assert abs(cured[0] - want) < 0.01 + LIMIT * cured[1]

    class Careless(Jarzynski):
        def check(self, parts):
            pass

    biased = tilted_mean(fmtt(100, chi, Careless()))
    print("extra ascent, simple weight", biased)
    assert biased[0] > want + 0.08
    with pytest.raises(ValueError, match="does not account for an extra ascent"):
        fmtt(10, chi)


def test_the_general_weight_holds_for_a_denoiser_where_the_simple_one_does_not():
    def error(method):
        result = steerfm.steer(MIXTURE.flow_map(), reward, method, n=8)
        x, w = result.samples[..., 0], result.log_weights.exp()
        return abs((w * (x > CUTS[1])).sum(1).mean().item() - (exact()[3] / LOG_Z.exp()).item())

    class Careless(Jarzynski):
        def check(self, parts):
            pass

    simple = error(fmtt(100, None, "jarzynski", particles=1000))
    denoised = error(fmtt(100, None, Careless(), "denoise", particles=1000))
    general = error(fmtt(100, None, Jarzynski(general=True), "denoise", particles=1000))
    print("error of the right mode's mass: map, simple", simple, "denoiser, simple", denoised, "denoiser, general", general)
    assert simple < 0.05 and general < 0.05 < denoised


def test_fmtt_converges_with_steps():
    def error(steps):
        result = steerfm.steer(MIXTURE.flow_map(), reward, weighed(FMTT(200, steps)), n=50)
        return (estimates(result).mean(1)[0] - LOG_Z.exp()).abs().item()

    assert error(64) < max(0.1, 0.6 * error(8))


# --- what does not sample ------------------------------------------------------------------------------------------------
SEARCHES = [name for name, method in METHODS.items() if "Samples: no" in sure(method.__doc__)]


@pytest.mark.parametrize("name", SEARCHES)
def test_what_does_not_claim_to_sample_is_seen_not_to(name):
    method = METHODS[name]()
    result = steerfm.steer(MIXTURE.flow_map(), reward, method, n=400)
    assert result.log_z is None
    x = result.best()[:, 0]
    expected = exact() / LOG_Z.exp()
    found = torch.stack([f(x).double().mean() for f in FUNCTIONS[1:]])
    spread = torch.stack([f(x).double().std() for f in FUNCTIONS[1:]]).clamp_min(0.05) / math.sqrt(len(x))
    assert ((found - expected[1:]) / spread).abs().max() > LIMIT


def test_every_preset_says_what_it_samples():
    for name, method in METHODS.items():
        assert "Samples:" in sure(method.__doc__), name
