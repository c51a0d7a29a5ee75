"""The steering engine, its parts, the presets, and what they refuse. Exactness has its own folder."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from kinds import sure
from torch import nn

import steerfm
from steerfm import GaussianMixture
from steerfm.flowmap import FlowMap, NeuralFlowMap, Wrapped
from steerfm.networks import Mlp
from steerfm.rewards import Reward, RewardError
from steerfm.rows import Rows
from steerfm.sampling import Noise
from steerfm.steering import (
    DPS,
    FMRGE,
    FMRGJ,
    LGDMC,
    METHODS,
    TDS,
    BestOfN,
    Denoise,
    EndpointAscent,
    EndpointGradient,
    Endpoints,
    Exponential,
    FeynmanKac,
    Funnel,
    Jarzynski,
    Jump,
    MapGradient,
    Narrow,
    Power,
    Resample,
    Sampler,
    Steering,
    Twisted,
)
from steerfm.steering.guidance import needs_gradient
from steerfm.steering.selection import Selected
from steerfm.steering.value import Problem, View
from steerfm.steering.weights import effective_sample_size, log_mean, log_mean_exp
from steerfm.transitions import Bridge, Diffuse, Renoise, Step
from steerfm.transitions import Jump as JumpTransition

# float32, elementwise, closed form: fast, and its bits do not depend on the batch
GAUSSIAN = GaussianMixture(torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.36, 0.5, 1.2]]))
MAP = GAUSSIAN.flow_map()
MIXTURE = GaussianMixture(
    [[-2.0, 0.0], [1.5, 1.0], [0.0, -2.0]],
    [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.3]], [[0.25, 0.0], [0.0, 0.1]]],
    [0.5, 0.3, 0.2],
)


def reward(x):
    return x[:, 0] - 0.2 * x[:, 1] ** 2


def constant(x):
    return 0.7 + 0.0 * x.sum(1)


class BlackBox(Reward):
    differentiable = False

    def score(self, images, prompts=None, labels=None):
        return images[:, 0].round()


class Pictures(FlowMap):
    """Pictures: the exact map of a standard normal in a small image space."""

    def __init__(self):
        super().__init__((3, 4, 4), class_names=("cat", "dog"))
        self.scale = nn.Buffer(torch.tensor(0.3))
        self.seen = []

    def average_velocity(self, x, s, t, cond):
        self.seen.append(cond)
        s, t = s.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        return self.interpolant.gaussian_velocity(x, s, t, 0.0, float(self.scale))


def same(a, b):
    """Everything about two results but the time they took."""
    for name in ("samples", "rewards", "log_weights"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.log_z is None) == (b.log_z is None)
    assert a.log_z is None or torch.equal(a.log_z, b.log_z)
    for name in ("t", "ess", "resampled", "ancestors", "value", "guidance_ratio"):
        assert torch.equal(getattr(a.trace, name), getattr(b.trace, name)), name


# --- the contract of every method ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name):
    method = METHODS[name]()
    n, k = 3, method.particles
    ticks = []
    result = steerfm.steer(MAP, reward, method, n=n, seeds=5, strength=2.0, progress=lambda *tick: ticks.append(tick))
    steps = len(result.trace.t)
    assert result.samples.shape == (n, k, 3) and result.samples.isfinite().all()
    assert result.rewards.shape == (n, k) and result.rewards.dtype == torch.float32
    assert torch.equal(result.rewards, steerfm.reward(reward)(result.samples.flatten(0, 1)).view(n, k))
    assert result.log_weights.shape == (n, k)
    assert torch.logsumexp(result.log_weights, 1).abs().max() < 1e-9
    assert result.log_z is None or (result.log_z.shape == (n,) and result.log_z.isfinite().all())
    assert result.best().shape == (n, 3)
    assert result.trace.t.shape == (steps,) and result.trace.t[-1] == 1
    assert result.trace.ess.shape == result.trace.resampled.shape == (steps, n)
    for record in (result.trace.ancestors, result.trace.value, result.trace.guidance_ratio):
        assert record.shape == (steps, n, k)
    assert ((result.trace.ess >= 1 / k - 1e-9) & (result.trace.ess <= 1 + 1e-9)).all()
    assert ((result.trace.ancestors >= 0) & (result.trace.ancestors < getattr(method, "first", k))).all()
    assert (result.trace.ancestors[1:] < k).all()
    assert [done for done, _ in ticks] == list(range(1, len(ticks) + 1)) and {all_ for _, all_ in ticks} == {len(ticks)}
    cost = result.cost
    assert cost.forwards >= n * k and cost.reward_calls >= n * k and cost.seconds > 0 and cost.peak_bytes > 0
    same(result, steerfm.steer(MAP, reward, method, n=n, seeds=5, strength=2.0))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_samples(name):
    text = sure(METHODS[name].__doc__)
    assert f"Samples: {METHODS[name].samples}" in " ".join(text.split())
    corrected = isinstance(made := METHODS[name](), Sampler) and made.parts.correction.samples
    assert corrected or METHODS[name].samples.startswith("no") or name in ("tree_search", "parallel_tempering", "waltz")


def test_results_leave_inference_mode():
    result = steerfm.steer(MAP, reward, FeynmanKac(4, 2), n=2, lookaheads=True)
    tensors = [value for owner in (result, result.trace) for value in vars(owner).values() if torch.is_tensor(value)]
    assert len(tensors) > 8 and not any(value.is_inference() or value.requires_grad for value in tensors)


# --- sampling as a special case --------------------------------------------------------------------------------------
@pytest.mark.parametrize("lookahead", [Jump(), Denoise(), Jump(2)])
@pytest.mark.parametrize("guidance", [None, MapGradient(), EndpointGradient(), MapGradient(normalised=True)])
@pytest.mark.parametrize("transition", [JumpTransition(), Renoise(1.0), Renoise(0.4), Diffuse()])
def test_constant_reward_leaves_samples_bit_equal(transition, guidance, lookahead):
    correction = "twisted" if guidance is None or transition.stochastic else "none"
    method = Steering(1, 5, lookahead, guidance, transition=transition, correction=correction)
    result = steerfm.steer(MAP, constant, method, n=7, seeds=11, strength=3.0)
    plain = steerfm.sample(MAP, n=7, steps=5, seeds=11, transition=transition)
    assert torch.equal(result.samples[:, 0], plain)
    assert result.log_z is None or torch.allclose(result.log_z, torch.full((7,), 2.1).double())


@pytest.mark.parametrize("lookahead", [None, Jump(), Denoise()])
def test_first_particle_under_jumps_is_the_plain_sample(lookahead):
    method = Steering(9, 3, lookahead, transition="jump", resampling="systematic")
    result = steerfm.steer(MAP, constant, method, n=4, seeds=2, strength=-2.0)
    assert torch.equal(result.samples[:, 0], steerfm.sample(MAP, n=4, steps=3, seeds=2))
    assert torch.allclose(result.log_weights, torch.full((4, 9), -math.log(9)).double(), atol=1e-12)
    assert torch.allclose(sure(result.log_z), torch.full((4,), -1.4).double())
    assert not result.trace.resampled.any()


@pytest.mark.parametrize("correction", [Twisted(), Jarzynski()])
def test_constant_reward_keeps_weights_uniform(correction):
    guidance = MapGradient(scale=0.5, cap=None)
    method = Steering(6, 4, Jump(), guidance, transition=Diffuse(), correction=correction, threshold=0.999)
    result = steerfm.steer(MAP, constant, method, n=3, strength=[1.0, 5.0, 1e4])
    assert torch.allclose(result.log_weights, torch.full((3, 6), -math.log(6)).double(), atol=1e-9)
    assert torch.allclose(sure(result.log_z), 0.7 * torch.tensor([1.0, 5.0, 1e4]).double())
    assert (result.trace.ess > 1 - 1e-9).all()


# --- independence of how the work is cut -----------------------------------------------------------------------------
CUTS = [
    FeynmanKac(5, 4, threshold=0.9),
    FeynmanKac(5, 4, "denoise", "map", transition=Renoise(0.5), resampling="ssp"),
    FeynmanKac(5, 4, guidance="endpoint", transition="diffuse", resampling="residual"),
    DPS(particles=3, steps=4),
    FMRGE(steps=4),
]


@pytest.mark.parametrize("method", CUTS, ids=lambda method: type(method).__name__)
def test_result_does_not_depend_on_batch_size(method):
    arguments = {"n": 7, "seeds": [3, 9, 4, 1, 0, 2, 100], "strength": torch.linspace(0.5, 3, 7)}
    whole = steerfm.steer(MAP, reward, method, **arguments)
    for batch_size in (1, 3, 7, 50):
        ticks = []
        parts = steerfm.steer(
            MAP, reward, method, **arguments, batch_size=batch_size, progress=lambda *tick, t=ticks: t.append(tick)
        )
        same(whole, parts)
        assert ticks[-1][0] == ticks[-1][1] == len(ticks)
        assert parts.cost.forwards == whole.cost.forwards


@pytest.mark.parametrize("micro_batch", [1, 4, 35, 1000])
@pytest.mark.parametrize("method", CUTS, ids=lambda method: type(method).__name__)
def test_result_does_not_depend_on_micro_batch(method, micro_batch):
    whole = steerfm.steer(MAP, reward, method, n=7, strength=2.0)
    parts = steerfm.steer(MAP, reward, method, n=7, strength=2.0, micro_batch=micro_batch)
    same(whole, parts)
    assert (parts.cost.forwards, parts.cost.backwards) == (whole.cost.forwards, whole.cost.backwards)


@pytest.mark.parametrize("method", CUTS, ids=lambda method: type(method).__name__)
def test_outputs_do_not_depend_on_their_neighbours(method):
    seeds, strengths = [5, 8, 13], [0.0, 1.0, -2.0]
    whole = steerfm.steer(MAP, reward, method, n=3, seeds=seeds, strength=strengths)
    for i in range(3):
        alone = steerfm.steer(MAP, reward, method, n=1, seeds=[seeds[i]], strength=strengths[i])
        assert torch.equal(alone.samples[0], whole.samples[i])
        assert torch.equal(alone.log_weights[0], whole.log_weights[i])
    assert not torch.equal(whole.samples[0], whole.samples[1])


def test_integer_seed_counts_up():
    method = FeynmanKac(4, 3)
    same(steerfm.steer(MAP, reward, method, n=3, seeds=6), steerfm.steer(MAP, reward, method, n=3, seeds=range(6, 9)))


def test_resampling_does_not_change_the_noise():
    """The selection has its own stream: where nothing was resampled yet, the particles are the same."""
    never = steerfm.steer(MAP, reward, FeynmanKac(8, 3, threshold=0.0), n=4, strength=3.0)
    always = steerfm.steer(MAP, reward, FeynmanKac(8, 3, threshold=1.0), n=4, strength=3.0)
    assert torch.equal(never.trace.value[0], always.trace.value[0])
    assert not torch.equal(never.samples, always.samples)
    noise, other = Noise([3], 2), Noise([3], 2)
    noise.uniform(4, torch.device("cpu"))
    assert torch.equal(noise.normal((5,), torch.empty(0)), other.normal((5,), torch.empty(0)))


# --- the ledger ------------------------------------------------------------------------------------------------------
def cost_of(method, n=3, **arguments):
    return steerfm.steer(MAP, reward, method, n=n, **arguments).cost


S, K, N = 5, 4, 3


@pytest.mark.parametrize(
    ("method", "forwards", "backwards", "reward_calls", "reward_backwards"),
    [
        (BestOfN(K, S), S, 0, 1, 0),
        (FeynmanKac(K, S), S, 0, S - 1, 0),  # the look-ahead's jump is the transition's, and the last one the sample
        (FeynmanKac(K, S, "denoise"), 2 * S - 1, 0, S, 0),  # two per step, but no look-ahead at the start
        (FeynmanKac(K, S, Jump(2)), 3 * S - 2, 0, S, 0),
        (FeynmanKac(K, S, transition=Renoise(0.5)), 2 * S - 2, 0, S - 1, 0),  # the last step goes to the look-ahead
        (FeynmanKac(K, S, transition="diffuse"), 2 * S - 1, 0, S, 0),
        (FeynmanKac(K, S, guidance="map"), S, S - 2, S - 1, S - 2),  # the last step is not guided
        (FeynmanKac(K, S, guidance="endpoint"), S, 0, S - 1, S - 2),
        (FeynmanKac(K, S, "denoise", "map"), 2 * S - 1, S - 2, S, S - 2),
        (FMRGJ(K, S, stop=0.5), S + 3, 3, 4, 3),  # nor is the tail, where nobody looks ahead
        (DPS(K, S), S, S, S + 1, S),  # one denoiser for the gradient and the step
        (FMRGJ(K, S), 2 * S - 1, S, S + 1, S),
        (FMRGE(K, S), 2 * S - 1, 0, 3 * S + 1, 3 * S),
        (Funnel(K, S, first=3 * K, guidance=None), S + 2, 0, S + 2, 0),  # the first look is three times as wide
        (Steering(K, S, correction="none", resampling=None), S, 0, 1, 0),  # nobody reads the look-ahead
    ],
)
@pytest.mark.parametrize("cut", [{}, {"batch_size": 2, "micro_batch": 3}])
def test_the_ledger_counts(method, forwards, backwards, reward_calls, reward_backwards, cut):
    cost = cost_of(method, N, **cut)
    particles = N * K
    assert cost.forwards == forwards * particles
    assert cost.backwards == backwards * particles
    assert cost.reward_calls == cost.decodes == reward_calls * particles
    assert cost.reward_backwards == reward_backwards * particles


def test_recording_lookaheads_costs_nothing():
    method = FeynmanKac(K, S)
    assert cost_of(method, lookaheads=True).reward_calls == cost_of(method).reward_calls
    assert cost_of(method, lookaheads=True).forwards == cost_of(method).forwards


def test_a_funnel_narrows_by_its_first_look():
    flow_map = GaussianMixture([[-2.0], [2.0]], [[0.04], [0.04]]).flow_map()
    method = Funnel(4, 3, first=64)
    result = steerfm.steer(flow_map, lambda x: x[:, 0], method, n=8, strength=30.0)
    assert (result.samples > 1).all() and result.trace.resampled[0].all()
    assert (result.trace.origins()[0] == result.trace.ancestors[0]).all() and result.trace.ancestors[0].max() > 4
    assert ((result.trace.unique() >= 1) & (result.trace.unique() <= 4)).all()


def test_a_funnel_without_a_reward_is_plain_sampling():
    result = steerfm.steer(MAP, lambda x: x.new_ones(len(x)), Funnel(transition="jump", guidance=None), n=3, seeds=4)
    assert torch.equal(result.samples[:, 0], steerfm.sample(MAP, n=3, steps=5, seeds=4))
    assert (result.trace.ess > 1 - 1e-12).all() and torch.allclose(sure(result.log_z), torch.ones(3).double())


@pytest.mark.parametrize("budget", [1, 8, 31, 32, 100, 128, 512, 5000])
def test_a_funnel_spends_its_budget(budget):
    method = Funnel.within(budget)
    cost = steerfm.steer(MAP, reward, method, n=2).cost
    assert cost.forwards == cost.evaluations == 2 * budget and cost.backwards == 0
    assert cost.reward_calls == 2 * budget + 1  # on one picture, to find out whether it has a gradient


def test_the_default_follows_a_gradient_where_there_is_one():
    def black_box(x):
        return torch.from_numpy(x.numpy().sum(1))  # numpy refuses tensors that want a gradient

    def detached(x):
        return x.detach().sum(1)

    guided = steerfm.steer(MAP, reward, n=2, strength=2.0)
    assert (guided.trace.guidance_ratio[:-1] > 0).any() and guided.cost.reward_backwards > 0
    for blind in (black_box, detached, BlackBox()):
        result = steerfm.steer(MAP, blind, n=2, strength=2.0)
        assert (result.trace.guidance_ratio == 0).all() and result.cost.reward_backwards == 0
    with pytest.raises(RewardError, match=r"nan|finite"):
        steerfm.steer(MAP, lambda x: x[:, 0] * float("nan"))


def test_a_funnel_keeps_the_resampling_it_was_given():
    for given, then in (
        ("ssp", Resample("ssp")),
        (Resample("residual", 0.9), Resample("residual", 0.9)),
        (None, Resample(threshold=0.0)),
    ):
        method = Funnel(4, first=8, resampling=given)
        assert method.parts.selection == Narrow(4, then) == replace(method, guidance=None).parts.selection
        assert replace(method, particles=8).parts.selection == Narrow(8, then)
    fitted = Funnel(guidance=None, power=0.5, resampling="ssp").within(64)
    assert fitted == replace(Funnel.within(64), guidance=None, power=0.5, resampling=Resample("ssp"))


def test_a_funnel_does_not_widen():
    with pytest.raises(ValueError, match="must be at least particles=16"):
        Funnel(16, first=8)
    with pytest.raises(ValueError, match="budget=0"):
        Funnel.within(0)


# --- results ---------------------------------------------------------------------------------------------------------
def test_compositions_keep_every_component():
    def second(x):
        return x[:, 1]

    both = 1.0 * steerfm.reward(reward) + 0.2 * steerfm.reward(second)
    result = steerfm.steer(MAP, both, FeynmanKac(4, 3), n=5, batch_size=2)
    x = result.samples
    assert torch.equal(result.components["second"], x[..., 1])
    assert torch.allclose(result.components["reward"], x[..., 0] - 0.2 * x[..., 1] ** 2)
    assert torch.allclose(result.rewards, result.components["reward"] + 0.2 * result.components["second"])


def test_best_is_the_highest_reward_of_each_output():
    result = steerfm.steer(MAP, reward, BestOfN(6, 2), n=4)
    for i in range(4):
        assert torch.equal(result.best()[i], result.samples[i, result.rewards[i].argmax()])


def test_resample_draws_by_weight():
    result = steerfm.steer(MAP, reward, BestOfN(2000, 1), n=2, strength=2.0)
    drawn = result.resample(torch.Generator().manual_seed(0))
    assert drawn.shape == result.samples.shape
    weighted = (result.log_weights.exp().unsqueeze(2) * result.samples).sum(1)
    assert torch.allclose(drawn.mean(1).double(), weighted.double(), atol=0.02)
    assert not torch.allclose(result.samples.mean(1).double(), weighted.double(), atol=0.2)
    again = result.resample(torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_images_are_decoded_pictures():
    result = steerfm.steer(Pictures(), lambda pictures: pictures.mean((1, 2, 3)), FeynmanKac(3, 2), n=2)
    assert result.samples.shape == result.images().shape == (2, 3, 3, 4, 4)
    assert torch.equal(result.images(), ((result.samples + 1) / 2).clamp(0, 1))
    assert torch.allclose(result.rewards, result.images().mean((2, 3, 4)))


@pytest.mark.parametrize("method", [FeynmanKac(3, 4), DPS(3, 4)], ids=lambda method: type(method).__name__)
def test_lookaheads_are_recorded(method):
    result = steerfm.steer(MAP, reward, method, n=5, lookaheads=True, batch_size=2)
    looks = sure(result.trace.lookaheads)
    assert looks.shape == (4, 5, 3)
    assert torch.equal(looks[-1], result.samples[:, 0])
    assert (looks.diff(dim=0)[:2] != 0).all()


def test_lookaheads_are_left_out_where_there_are_none():
    assert steerfm.steer(MAP, reward, FeynmanKac(3, 4), n=2).trace.lookaheads is None
    assert steerfm.steer(MAP, reward, BestOfN(3, 4), n=2, lookaheads=True).trace.lookaheads is None


# --- weights and resampling ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recorded(Twisted):
    """Keeps what every step saw."""

    moves: list = field(default_factory=list)

    def increment(self, move):
        self.moves.append(move)
        return super().increment(move)


@dataclass(frozen=True)
class RecordedRenoise(Renoise):
    """Keeps the state before every step."""

    states: list = field(default_factory=list)

    def step(self, flow_map, x, s, t, cond, endpoint=None):
        self.states.append((s, x, endpoint))
        return super().step(flow_map, x, s, t, cond, endpoint)


def gather(values, ancestors):
    """Values (n, k) of the ancestors (n, k)."""
    return values.gather(1, ancestors)


def view(problem, x, t, beta):
    """A look through one jump at a given inverse temperature."""
    return View(problem, Jump(), Noise(range(len(x))), x, t, lambda ends, tilt: torch.full((len(tilt),), beta).to(tilt))


@pytest.mark.parametrize("resampling", ["multinomial", "systematic", "residual", "ssp"])
@pytest.mark.parametrize("guidance", [None, MapGradient()])
def test_copies_carry_their_values_along(guidance, resampling):
    correction, transition = Recorded(), RecordedRenoise()
    method = FeynmanKac(
        8, 5, guidance=guidance, transition=transition, correction=correction, resampling=resampling, threshold=0.9
    )
    n, k, strength = 4, 8, 3.0
    result = steerfm.steer(MAP, reward, method, n=n, strength=strength)
    trace = result.trace
    assert trace.resampled.any() and not trace.resampled.all()
    for i in range(1, 5):
        t, x, endpoint = transition.states[i]
        before = correction.moves[i].before
        assert torch.equal(before.value.view(n, k), gather(trace.value[i - 1], trace.ancestors[i - 1]))
        assert torch.allclose(endpoint, MAP.lookahead(x, t))
        assert torch.allclose(before.value, t * strength * reward(MAP.lookahead(x, t)).double(), atol=1e-5)
        if guidance is not None and i < 4:  # the last step is not guided, so that nobody asks for its direction
            problem = Problem(MAP, steerfm.reward(reward), torch.full((n * k,), strength).double(), Rows(n * k))
            again = guidance.evaluate(view(problem, x, t, t))
            assert torch.allclose(again.direction, before.direction, atol=1e-6)
    for i in range(4):  # where an output was not resampled, every particle is its own ancestor
        stay = trace.ancestors[i][~trace.resampled[i]]
        assert (stay == torch.arange(k)).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_weights_are_those_of_the_recursion(threshold):
    """log-weights, ESS and log Z recomputed from the trace: increments of steps that do not resample are kept."""
    method = FeynmanKac(16, 6, threshold=threshold, correction="twisted")
    result = steerfm.steer(MAP, reward, method, n=5, strength=2.5)
    trace = result.trace
    log_w, log_z, value = torch.zeros(5, 16).double(), torch.zeros(5).double(), torch.zeros(5, 16).double()
    for i in range(6):
        log_w = log_w + trace.value[i] - value
        assert torch.allclose(effective_sample_size(log_w), trace.ess[i])
        value = gather(trace.value[i], trace.ancestors[i])
        chosen = trace.resampled[i].unsqueeze(1)
        assert torch.equal(trace.resampled[i], (trace.ess[i] < threshold) & torch.tensor(i < 4))
        log_z = torch.where(trace.resampled[i], log_z + log_mean(log_w), log_z)
        log_w = torch.where(chosen, 0.0, log_w)
    assert torch.allclose(result.log_weights, log_w - torch.logsumexp(log_w, 1, keepdim=True))
    assert torch.allclose(sure(result.log_z), log_z + log_mean(log_w))


def test_without_resampling_the_weight_is_the_whole_tilt():
    result = steerfm.steer(MAP, reward, FeynmanKac(8, 6, threshold=0.0), n=5, strength=2.5)
    whole = result.log_weights + sure(result.log_z).unsqueeze(1) + math.log(8)
    assert torch.allclose(whole, 2.5 * result.rewards.double(), atol=1e-5)


def test_resampling_keeps_log_z_unbiased():
    """The mean of exp(log_z) is the same with and without resampling, and is the exact one."""
    _, log_z = GAUSSIAN.tilt([1.0, 0.0, 0.0], [0.0, 0.4, 0.0])
    for threshold in (0.0, 0.5, 1.0):
        result = steerfm.steer(MAP, reward, FeynmanKac(16, 4, threshold=threshold), n=600)
        ratio = (sure(result.log_z) - log_z).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(600)


def test_strong_tilts_stay_in_log_space():
    for method in (FeynmanKac(8, 4), FeynmanKac(8, 4, guidance="map"), BestOfN(8, 2)):
        result = steerfm.steer(MAP, reward, method, n=3, strength=1e4)
        for record in (result.samples, result.log_weights, sure(result.log_z), result.trace.ess, result.trace.value):
            assert record.isfinite().all()
        assert torch.allclose(result.log_weights.exp().sum(1), torch.ones(3).double())


def test_a_selection_may_be_any_object():
    class FirstOnly:
        ranks, prunes = False, True

        def select(self, candidates):
            u = candidates.u
            assert candidates.log_w.shape == candidates.tilt.shape == u.shape == (2, 4)
            assert ((u >= 0) & (u < 1)).all() and candidates.t == candidates.step / 3
            return Selected(torch.zeros_like(u).long(), torch.ones(2, dtype=torch.bool))

    result = steerfm.steer(MAP, reward, FeynmanKac(4, 3, resampling=FirstOnly(), transition="jump"), n=2)
    assert result.trace.resampled[:2].all() and not result.trace.resampled[2].any()
    assert torch.equal(result.samples, result.samples[:, :1].expand(2, 4, 3))
    assert result.trace.unique().tolist() == [1, 1]


# --- look-aheads and values ------------------------------------------------------------------------------------------
def test_lookaheads_of_the_exact_map():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Denoise().endpoints(MAP, x, 0.3, None).z[:, 0], GAUSSIAN.denoise(x, 0.3))
    one = Jump().endpoints(MAP, x, 0.3, None).z
    assert one.shape == (6, 1, 3)
    assert torch.allclose(one, Jump(4).endpoints(MAP, x, 0.3, None).z, atol=1e-5)
    assert torch.equal(Jump().endpoints(MAP, x, 1.0, None).z[:, 0], x)


def test_log_mean_exp_weighs_its_values():
    values, log_w = torch.tensor([[0.0, 2.0, 1e4]]), torch.tensor([[0.0, 1.0, -torch.inf]])
    expected = (math.exp(0) + math.exp(1 + 2)) / (1 + math.exp(1))
    assert log_mean_exp(log_w + 77, values).item() == pytest.approx(math.log(expected), rel=1e-5)
    assert log_mean_exp(torch.zeros(1, 2), values[:, :2]).item() == pytest.approx(math.log((1 + math.exp(2)) / 2), rel=1e-5)
    assert log_mean_exp(log_w[:, :1] + 5, values[:, 1:2]).item() == 2.0


def test_value_of_many_endpoints_sees_labels_and_prompts_per_endpoint():
    def named(x, prompts, labels):
        return labels.float() + torch.tensor([float(len(prompt)) for prompt in prompts])

    problem = Problem(MAP, steerfm.reward(named), torch.ones(2).double(), Rows(2, None, torch.tensor([1, 7]), ["", "four"]))
    found = view(problem, torch.zeros(2, 3), 0.5, 1.0).value(Endpoints(torch.zeros(2, 5, 3)))
    assert found.tilt.tolist() == [1.0, 11.0]
    assert found.value.tolist() == pytest.approx([1.0, 11.0])


class Spread:
    """k endpoints around the jump."""

    def __init__(self, k):
        self.offsets = torch.linspace(-1, 1, k).view(1, k, 1)

    def endpoints(self, flow_map, x, t, cond, noise=None):
        z = flow_map.lookahead(x, t, cond).unsqueeze(1)
        return Endpoints(z + (1 - t) * self.offsets)


@pytest.mark.parametrize("guidance", [None, MapGradient(), EndpointGradient(), EndpointAscent()])
def test_a_lookahead_may_have_many_endpoints(guidance):
    correction = "none" if isinstance(guidance, EndpointAscent) else "twisted"
    method = FeynmanKac(4, 3, Spread(7), guidance, correction=correction)
    result = steerfm.steer(MAP, reward, method, n=3)
    assert result.samples.isfinite().all()
    whole = 2 * 4 * 3
    if not isinstance(guidance, EndpointAscent):
        assert result.cost.reward_calls == 7 * whole + 12
    assert result.trace.value.shape == (3, 3, 4)


def test_gradients_agree_with_the_closed_form():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    problem = Problem(MAP, steerfm.reward(lambda x: 2.0 * x[:, 0]), torch.full((5,), 3.0).double(), Rows(5))
    t, beta = 0.6, 0.5
    g1, g0 = math.sqrt(0.36), math.sqrt(t**2 * 0.36 + (1 - t) ** 2)
    through = MapGradient().evaluate(view(problem, x, t, beta))
    assert torch.allclose(sure(through.direction), torch.tensor([6.0 * beta * g1 / g0, 0.0, 0.0]).expand(5, 3), atol=1e-5)
    stopped = EndpointGradient().evaluate(view(problem, x, t, beta))
    assert torch.allclose(sure(stopped.direction), torch.tensor([6.0 * beta, 0.0, 0.0]).expand(5, 3))
    assert torch.allclose(through.value, stopped.value) and sure(through.endpoint).equal(sure(stopped.endpoint))
    assert torch.allclose(through.value, beta * through.tilt)


def test_ascent_moves_the_endpoint_by_its_rate():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    problem = Problem(MAP, steerfm.reward(lambda x: x[:, 0]), torch.ones(5).double(), Rows(5))
    found = EndpointAscent(iterations=4, rate=0.1).evaluate(view(problem, x, 0.5, 1.0))
    length, direction = sure(found.endpoint).norm(dim=1), sure(found.direction)
    assert torch.allclose(direction[:, 0], 0.4 * length, rtol=1e-4)
    assert direction[:, 1:].abs().max() < 1e-6


@pytest.mark.parametrize("tempering", [Power(1.0), Power(3.0), Exponential(10.0)])
def test_temperings_rise_from_zero_to_one(tempering):
    values = [tempering(i / 10) for i in range(11)]
    assert values[0] == 0 and values[-1] == pytest.approx(1)
    assert values == sorted(values)


def test_tempering_may_be_a_power_or_a_function():
    assert FeynmanKac(tempering=2).tempering == Power(2.0)
    half = lambda t: t / 2  # noqa: E731
    result = steerfm.steer(MAP, reward, FeynmanKac(4, 4, tempering=half, threshold=0.0), n=2, strength=2.0)
    whole = result.log_weights + sure(result.log_z).unsqueeze(1) + math.log(4)
    assert torch.allclose(whole, 2 * result.rewards.double(), atol=1e-5)  # beta(1) is one whatever the function says


def test_late_tempering_guides_late():
    method = FeynmanKac(4, 4, guidance="map", tempering=lambda t: max(0.0, 2 * t - 1))
    ratio = steerfm.steer(MAP, reward, method, n=2).trace.guidance_ratio
    assert (ratio[:3] == 0).all() and (ratio[3] == 0).all()  # beta(.75) > 0, but the last step has no noise
    method = FeynmanKac(4, 8, guidance="map", tempering=lambda t: max(0.0, 2 * t - 1))
    ratio = steerfm.steer(MAP, reward, method, n=2).trace.guidance_ratio
    assert (ratio[:5] == 0).all() and (ratio[5:7] > 0).all()


# --- guidance --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cap", [0.1, 1.0])
@pytest.mark.parametrize("guidance", [MapGradient, EndpointGradient])
def test_cap_bounds_the_guidance(guidance, cap):
    for transition in ("renoise", "diffuse"):
        method = FeynmanKac(8, 5, guidance=guidance(cap=cap), transition=transition)
        ratio = steerfm.steer(MAP, reward, method, n=3, strength=1e4).trace.guidance_ratio
        assert ratio.max() <= cap * (1 + 1e-4)
        assert ratio[1:-1].max() == pytest.approx(cap, rel=1e-4)


def test_no_cap_leaves_the_guidance_free():
    method = DPS(steps=4, guidance=MapGradient(cap=None))
    assert steerfm.steer(MAP, reward, method, n=3, strength=100.0).trace.guidance_ratio.max() > 5


def test_normalised_guidance_has_the_length_of_its_scale():
    for strength in (0.01, 100.0):
        method = FMRGJ(steps=4, guidance=MapGradient(scale=0.3, normalised=True))
        ratio = steerfm.steer(MAP, reward, method, n=3, strength=strength).trace.guidance_ratio
        assert torch.allclose(ratio, torch.full_like(ratio, 0.3), rtol=1e-4)


@pytest.mark.parametrize("method", [DPS(steps=6), FMRGJ(steps=6), FMRGE(steps=6)], ids=lambda m: type(m).__name__)
def test_ascent_raises_the_reward_and_does_not_sample_the_target(method):
    linear, n = [0.6, -0.4], 600
    flow_map = MIXTURE.flow_map(steps=8)
    target, _ = MIXTURE.tilt(linear)

    def up(x):
        return x @ torch.tensor(linear).to(x)

    steered = steerfm.steer(flow_map, up, method, n=n, seeds=3)
    plain = steerfm.sample(flow_map, n=n, steps=6, seeds=3)
    gain = steered.rewards[:, 0] - up(plain)
    assert gain.mean() > 4 * gain.std() / math.sqrt(n)
    assert steered.log_z is None and (steered.log_weights == 0).all()
    # not the target: mean and spread of the reward are off by more than the noise
    expected = (target.mean() @ torch.tensor(linear).double()).item()
    a = torch.tensor(linear).double()
    variance = (a @ target.cov() @ a).item()
    r = steered.rewards[:, 0].double()
    z_mean = abs(r.mean() - expected) / (r.std() / math.sqrt(n))
    z_variance = abs(r.var() - variance) / (((r - r.mean()) ** 2).std() / math.sqrt(n))
    print(type(method).__name__, "gain", gain.mean().item(), "z", z_mean.item(), z_variance.item())
    assert max(z_mean, z_variance) > 5


def test_weights_make_the_difference_between_ascent_and_sampling():
    """The same guided chain with and without its correction: only the corrected one has the right mean."""
    target, _ = GAUSSIAN.tilt([2.0, 0.0, 0.0])
    means = {}
    for correction in ("twisted", "none"):
        guidance = MapGradient(scale=3.0, cap=None)
        method = FeynmanKac(64, 4, guidance=guidance, correction=correction, resampling=None)
        result = steerfm.steer(MAP, lambda x: 2.0 * x[:, 0], method, n=200)
        means[correction] = (result.log_weights.exp() * result.samples[..., 0]).sum(1)
    error = {name: abs(mean.mean() - target.mean()[0]).item() for name, mean in means.items()}
    assert error["twisted"] < 0.03 and error["none"] > 0.1


# --- conditions, prompts, labels -------------------------------------------------------------------------------------
def test_conditions_labels_and_prompts_reach_every_particle():
    flow_map, seen = Pictures(), []

    def read(pictures, prompts, labels):
        seen.append((prompts, labels))
        return pictures.mean((1, 2, 3))

    steerfm.steer(flow_map, read, FeynmanKac(2, 2), n=3, cond=["dog", 0, "cat"], prompts=["a", "b", "c"], batch_size=2)
    assert [cond.tolist() for cond in flow_map.seen] == [[1, 1, 0, 0]] * 2 + [[0, 0]] * 2
    assert seen[0][0] == ["a", "a", "b", "b"] and seen[0][1].tolist() == [1, 1, 0, 0]
    assert seen[-1][0] == ["c", "c"] and seen[-1][1].tolist() == [0, 0]


def test_conditions_may_be_dictionaries():
    flow_map = Pictures()
    cond = {"text": torch.arange(3.0).unsqueeze(1), "size": torch.tensor([7, 8, 9])}
    steerfm.steer(flow_map, lambda x: x.mean((1, 2, 3)), BestOfN(2, 1), n=3, cond=cond, micro_batch=4)
    assert [rows["size"].tolist() for rows in flow_map.seen] == [[7, 7, 8, 8], [9, 9]]
    assert flow_map.seen[1]["text"].shape == (2, 1)


# --- transitions -----------------------------------------------------------------------------------------------------
def test_log_prob_is_that_of_the_kernel():
    x, mean = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(Step(mean, 0.3).log_prob(x), expected.double(), atol=1e-3)
    with pytest.raises(ValueError, match="no density"):
        Step(mean, 0.0).log_prob(x)


def test_twisted_weight_of_a_guided_step_is_the_ratio_of_densities():
    correction = Recorded()
    method = FeynmanKac(6, 3, guidance=MapGradient(), correction=correction, transition=Renoise(0.7), resampling=None)
    steerfm.steer(MAP, reward, method, n=2)
    move = correction.moves[1]
    x = move.step.mean + move.shift + move.step.std * move.noise
    ratio = move.step.log_prob(x) - Step(move.step.mean + move.shift, move.step.std).log_prob(x)
    expected = move.after.value - move.before.value + ratio
    assert ratio.abs().max() > 1e-3
    assert torch.allclose(Twisted().increment(move), expected, atol=1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------
FMTT = {"lookahead": "jump", "guidance": MapGradient(scale=0.5, cap=None), "transition": "diffuse"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": 0}, "particle"),
        ({"steps": 0}, "steps"),
        ({"power": 0.0}, "power"),
        ({"lookahead": "telescope"}, "lookahead.*jump"),
        ({"guidance": "compass"}, "guidance.*endpoint"),
        ({"transition": "walk"}, "transition.*renoise"),
        ({"correction": "exact"}, "correction.*twisted"),
        ({"tempering": "hot"}, "tempering.*linear"),
        ({"tempering": -1}, "power"),
        ({"resampling": "best"}, "scheme.*systematic"),
        ({"threshold": 2}, "threshold"),
        ({"guidance": "map", "lookahead": None}, "look-ahead"),
        ({"guidance": "map", "transition": "jump"}, "renoise, diffuse or bridge"),
        ({"guidance": "map", "transition": Renoise(0.0)}, "renoise, diffuse or bridge"),
        ({"guidance": "map", "transition": Diffuse(0.0)}, "renoise, diffuse or bridge"),
        ({"transition": Renoise(endpoint="posterior")}, "lookahead=posterior"),
        ({"transition": Bridge(endpoint="posterior"), "lookahead": "denoise"}, "lookahead=posterior"),
        ({"transition": Bridge(endpoint="posterior"), "lookahead": None}, "lookahead=posterior"),
        ({"correction": "jarzynski", **FMTT, "lookahead": "denoise"}, "lookahead jump.*or correction twisted"),
        ({"correction": "jarzynski", **FMTT, "transition": "renoise"}, "correction twisted"),
        ({"correction": "jarzynski", **FMTT, "transition": "jump"}, "correction twisted"),
        ({"correction": "jarzynski", **FMTT, "guidance": None}, "correction twisted"),
        ({"correction": "jarzynski", **FMTT, "guidance": MapGradient(cap=None)}, "correction twisted"),
        ({"correction": "jarzynski", **FMTT, "guidance": MapGradient(scale=0.5)}, "correction twisted"),
        ({"correction": "jarzynski", **FMTT, "guidance": "ascent"}, "correction twisted"),
        ({"correction": "jarzynski", **FMTT, "guidance": EndpointGradient(0.5, cap=None)}, "correction twisted"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeynmanKac(**arguments)


def test_parts_that_fit_are_taken():
    FeynmanKac(**FMTT, correction="jarzynski")
    FeynmanKac(guidance="map", transition=Diffuse(lambda t: 0.1))
    FeynmanKac(guidance="map", transition="jump", correction="none")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Renoise(1.5), "gamma"),
        (lambda: Diffuse(-1.0), "epsilon"),
        (lambda: Jump(0), "hops"),
        (lambda: Power(0), "power"),
        (lambda: Exponential(0.0), "gamma"),
        (lambda: EndpointAscent(iterations=0), "iterations"),
    ],
)
def test_parts_check_their_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": math.nan}, "strength.*finite"),
        ({"strength": [1.0, math.inf]}, "strength.*finite"),
        ({"strength": [1.0, 2.0, 3.0]}, "strength.*n=2"),
        ({"seeds": [1, 2, 3]}, "3 seeds for n=2"),
        ({"cond": torch.zeros(3)}, "cond.*n=2"),
        ({"cond": ["a", "b", "c"]}, "3 labels for n=2"),
        ({"prompts": ["a"]}, "1 prompts for n=2"),
        ({"n": 0}, "n=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
    ],
)
def test_problems_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        steerfm.steer(MAP, reward, BestOfN(2, 1), **({"n": 2} | arguments))


def test_sample_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size=0"):
        steerfm.sample(MAP, n=2, batch_size=0)


GRADIENT = [name for name in METHODS if needs_gradient(getattr(METHODS[name](), "guidance", None))]


@pytest.mark.parametrize("name", [*GRADIENT, "reno", "d_flow"])
def test_gradient_methods_refuse_a_black_box_and_name_what_works(name):
    with pytest.raises(RewardError, match=r"blackbox.*BestOfN"):
        steerfm.steer(MAP, BlackBox(), METHODS[name]())


def test_gradient_free_methods_take_a_black_box():
    result = steerfm.steer(MAP, BlackBox(), FeynmanKac(4, 2), n=2)
    assert torch.equal(result.rewards, result.samples[..., 0].round())


network = torch.nn.Linear(3, 1)


@pytest.mark.parametrize(
    "blind",
    [lambda x: x[:, 0].detach(), lambda x: torch.ones(len(x)), lambda x: network(x.detach()).squeeze(1)],
    ids=["detached", "constant", "trainable"],
)
@pytest.mark.parametrize("method", [DPS(steps=2), FMRGE(steps=2), FeynmanKac(2, 3, guidance="map")])
def test_a_reward_without_gradient_is_refused(method, blind):
    with pytest.raises(RewardError, match="has no gradient"):
        steerfm.steer(MAP, blind, method)


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(RewardError, match=r"gradient of reward .* not finite"):
        steerfm.steer(MAP, lambda x: (x[:, 0] * 0).sqrt(), DPS(steps=2))


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(RewardError, match="returned nan"):
        steerfm.steer(MAP, lambda x: x[:, 0] * math.nan, FeynmanKac(2, 2))


# --- memory ----------------------------------------------------------------------------------------------------------
class Held:
    """What a graph holds in place of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Bytes that graphs hold for their backward passes, at most, while it is entered."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor.detach())
        self.add(tensor.untyped_storage().nbytes())
        weakref.finalize(held, self.add, -tensor.untyped_storage().nbytes())
        return held

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *of) -> None:
        self.hooks.__exit__(*of)


def wide_map() -> NeuralFlowMap:
    torch.manual_seed(0)
    return NeuralFlowMap(Mlp(2, width=64, depth=2).eval().requires_grad_(False), (2,))


@pytest.mark.parametrize("method", [DPS(), FMRGJ(), LGDMC(), TDS(8)], ids=lambda method: type(method).__name__)
def test_graphs_are_flat_in_steps_and_linear_in_the_micro_batch(method):
    flow_map = wide_map()

    def peak(steps: int, rows: int | None) -> int:
        with Kept() as kept:
            steerfm.steer(flow_map, reward, replace(method, steps=steps), n=64 // method.particles, micro_batch=rows)
        return kept.peak

    assert peak(16, 8) == peak(4, 8)
    of_8, of_16, of_32, whole = (peak(4, rows) for rows in (8, 16, 32, None))  # each with the weights
    assert 0 < of_32 - of_16 == 2 * (of_16 - of_8) and whole - of_32 == 2 * (of_32 - of_16)
    assert of_16 - of_8 > 8 * 64 * 4  # at least one layer of eight rows


@pytest.mark.parametrize("method", [BestOfN(4, 2), DPS(4, 2)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("micro_batch", [None, 16])
@pytest.mark.filterwarnings("ignore:out of memory")  # more than one of them
def test_fewer_rows_where_memory_is_short(method, micro_batch):
    class Small(Wrapped):
        """A device that holds so many rows."""

        rows = 5

        def average_velocity(self, x, s, t, cond):
            if len(x) > self.rows:
                raise torch.OutOfMemoryError("no room")
            return self.flow_map.average_velocity(x, s, t, cond)

    whole = steerfm.steer(wide_map(), reward, method, n=6)
    with pytest.warns(UserWarning, match=r"continuing with micro_batch=(3|4)"):
        small = steerfm.steer(Small(wide_map()), reward, method, n=6, batch_size=4, micro_batch=micro_batch)
    same(whole, small)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="micro_batch=1"):
        Small.rows = 0
        steerfm.steer(Small(wide_map()), reward, method, n=2)


def test_a_bad_sample_is_named_across_parts_of_a_gradient():
    seen = iter(range(100))

    def fails_at_the_third_part(x):
        bad = next(seen) == 2  # rows 4 and 5
        return x.sum(1) * torch.tensor([1.0, float("nan") if bad else 1.0])

    with pytest.raises(RewardError, match="returned nan for sample 5"):
        steerfm.steer(wide_map(), fails_at_the_third_part, DPS(2), n=8, micro_batch=2)
