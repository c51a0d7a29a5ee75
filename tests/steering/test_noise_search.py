"""Methods that search the initial noise, against closed forms of one Gaussian: x_1 = m + sqrt(v) x_0."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from kinds import a, sure

import steerfm
from steerfm import GaussianMixture
from steerfm.rewards import Reward, RewardError
from steerfm.steering.noise_search import Curvature, DFlow, RandomSearch, ReNO, ZeroOrderSearch

D = 5
MEAN, VARIANCE = torch.linspace(-1.0, 1.0, D), torch.linspace(0.2, 1.5, D)
MAP = GaussianMixture(MEAN[None], VARIANCE[None]).flow_map()
SLOPE = torch.tensor([1.0, -0.5, 0.3, 0.0, 0.8])
PEAK, BEND = torch.linspace(1.0, -1.0, D), torch.logspace(0, 2, D)  # a badly conditioned hill

ASCENTS = [ReNO(iterations=6, rate=0.1, step=0.3), DFlow(iterations=6, hops=2)]
TRIALS = [ZeroOrderSearch(iterations=6, candidates=3), RandomSearch(iterations=6, candidates=3)]
ALL = [*ASCENTS, *TRIALS]


def name(method):
    return type(method).__name__


def linear(x):
    return x @ SLOPE


def hill(x):
    return -0.5 * (BEND * (x - PEAK) ** 2).sum(1)


def wave(x):
    return torch.sin(3 * x[:, 0]) + 0.3 * x[:, 1] - 0.1 * x[:, 2] ** 2


class BlackBox(Reward):
    differentiable = False

    def score(self, images, prompts=None, labels=None):
        return (4 * images[:, 0]).round()


def optimum(strength, prior):
    """Argmax over x_0 of strength a'x_1 - prior (|x_0|^2/2 - (d - 1) log |x_0|), as x_1: along w = strength sqrt(v) a, at the
    radius with |w| = prior (radius - (d - 1) / radius)."""
    w = strength * VARIANCE.sqrt() * SLOPE
    pull = w.norm() / prior
    radius = (pull + (pull**2 + 4 * (D - 1)).sqrt()) / 2
    return MEAN + VARIANCE.sqrt() * radius * w / w.norm()


# --- the optimum -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strength, prior", [(1.0, 1.0), (4.0, 1.0), (0.3, 0.5), (-2.0, 1.0)])
@pytest.mark.parametrize(
    "method", [ReNO(iterations=120, rate=0.2, step=0.5, hops=2), DFlow(iterations=30, step=1.0), DFlow(iterations=30, hops=1)]
)
def test_ascents_find_the_optimum_under_the_prior(method, strength, prior):
    result = steerfm.steer(MAP, linear, replace(method, prior=prior), n=4, strength=strength)
    torch.testing.assert_close(result.samples[:, 0], optimum(strength, prior).expand(4, D), atol=5e-3, rtol=0)
    assert torch.equal(result.rewards[:, 0], linear(result.samples[:, 0]))


def test_lbfgs_climbs_a_badly_conditioned_hill():
    """To rounding, where steepest ascent at its largest stable rate is still on the way."""
    n = 8
    dflow = steerfm.steer(MAP, hill, DFlow(iterations=40, prior=0, step=1.0), n=n)
    assert dflow.rewards.max() <= 0 and dflow.rewards.min() > -1e-7
    steepest = ReNO(iterations=40, prior=0, rate=1 / float((BEND * VARIANCE).max()), momentum=1e-6, step=1.0)
    assert steerfm.steer(MAP, hill, steepest, n=n).rewards.max() < -1e-4


def test_curvature_is_that_of_a_quadratic():
    """Fed with d exact moves along the axes, the direction is the Newton step, whatever the first scale; rows differ."""
    bend = torch.tensor([[1.0, 10.0, 100.0], [2.0, 0.5, 7.0]], dtype=torch.float64)
    curvature = Curvature(memory=3)
    for axis in torch.eye(3, dtype=torch.float64):
        curvature.learn(axis.expand(2, 3), bend * axis)
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(curvature.direction(gradient), gradient / bend)
    forgetful = Curvature(memory=1)
    for axis in torch.eye(3, dtype=torch.float64):
        forgetful.learn(axis.expand(2, 3), bend * axis)
    assert (forgetful.direction(gradient) - gradient / bend).abs().max() > 0.1
    forgetful.learn(torch.ones(2, 3, dtype=torch.float64), -torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(forgetful.direction(gradient)[0], gradient[0] * 0.01)  # a convex row keeps only its last scale


def test_steps_are_clipped_row_by_row():
    """One output with a huge gradient moves as far as the clip allows and does not slow the others down."""
    method = ReNO(iterations=1, rate=0.1, step=0.05, momentum=1e-9, prior=0)
    both = steerfm.steer(MAP, linear, method, n=2, seeds=[3, 4], strength=[1e6, 0.01])
    moved = (both.samples[:, 0] - steerfm.sample(MAP, 2, steps=1, seeds=[3, 4])) / VARIANCE.sqrt()
    w = VARIANCE.sqrt() * SLOPE
    torch.testing.assert_close(moved[0], 0.05 * D**0.5 * w / w.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[1], 0.1 * 0.01 * w, atol=1e-5, rtol=0)


def test_the_prior_counts_for_what_is_best():
    """At strength 0 only the prior is left: the result lies on its shell of radius sqrt(d - 1)."""
    result = steerfm.steer(MAP, linear, DFlow(prior=1.0), n=6, strength=0.0)
    radius = ((result.samples[:, 0] - MEAN) / VARIANCE.sqrt()).norm(dim=1)
    torch.testing.assert_close(radius, torch.full((6,), math.sqrt(D - 1)), atol=1e-3, rtol=0)


# --- by trial --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", TRIALS, ids=name)
def test_trials_never_lose_and_do_gain(method):
    result = steerfm.steer(MAP, wave, method, n=8, strength=2.0)
    value = result.trace.value
    assert (value[1:] >= value[:-1]).all() and (value[-1] > value[0]).any()
    start = wave(steerfm.sample(MAP, 8, steps=1))
    assert (result.rewards[:, 0] >= start).all() and (result.rewards[:, 0] > start).sum() >= 6
    down = steerfm.steer(MAP, wave, method, n=8, strength=-2.0)
    assert (down.rewards[:, 0] <= start).all() and (down.rewards[:, 0] < start).sum() >= 6


def test_random_search_is_best_of_all_candidates():
    seen = []

    def spy(x):
        seen.append(wave(x))
        return seen[-1]

    method = RandomSearch(particles=2, iterations=5, candidates=3)
    result = steerfm.steer(MAP, spy, method, n=2)
    by_chain = torch.cat([seen[0].view(4, 1), *(part.view(4, 3) for part in seen[1:])], 1)
    assert by_chain.shape[1] == 1 + 5 * 3 and by_chain.unique().numel() == by_chain.numel()
    assert torch.equal(result.rewards.flatten(), by_chain.amax(1))
    # fresh draws: the best of 16 standard normals, E = 1.766
    map_ = GaussianMixture([[0.0]], [[1.0]]).flow_map()
    best = steerfm.steer(map_, lambda x: x[:, 0], method, n=400).rewards
    assert abs(float(best.mean()) - 1.7660) < 4 * float(best.std()) / 800**0.5


def test_neighbours_stay_on_the_shell_and_near_the_pivot():
    seen, d, radius = [], 400, 0.3
    map_ = GaussianMixture(torch.zeros(1, d), torch.ones(1, d)).flow_map()  # X_{0,1} is the identity

    def spy(x):
        seen.append(x)
        return torch.zeros(len(x))  # the pivot never moves

    steerfm.steer(map_, spy, ZeroOrderSearch(iterations=3, candidates=16, radius=radius), n=4)
    pivot = seen[0].view(4, 1, d)
    neighbours = torch.stack([part.view(4, 16, d) for part in seen[1:]], 1).flatten(1, 2)
    cosine = torch.cosine_similarity(pivot, neighbours, dim=-1)
    torch.testing.assert_close(cosine.mean(), torch.tensor((1 - radius**2) ** 0.5), atol=5e-3, rtol=0)
    expected = (1 - radius**2) * pivot.square().mean() + radius**2
    torch.testing.assert_close(neighbours.square().mean(), expected, atol=1e-2, rtol=0)


# --- the contract ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ALL, ids=name)
def test_outputs_are_independent(method):
    """Permuted, in batches, in micro-batches: the same bits; particles of one output differ."""
    method = replace(method, particles=3)
    strength = torch.tensor([0.5, 2.0, 1.0, 3.0])
    run = partial(steerfm.steer, MAP, wave, method, n=4, seeds=[4, 5, 6, 7], strength=strength)
    result = run()
    order = torch.tensor([2, 0, 3, 1])
    turned = run(seeds=[6, 4, 7, 5], strength=strength[order])
    for other, rows in (
        (turned, order),
        (run(batch_size=3), slice(None)),
        (run(micro_batch=2), slice(None)),
    ):
        torch.testing.assert_close(other.samples, result.samples[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.trace.value, result.trace.value[:, rows], atol=1e-5, rtol=1e-5)
    assert (result.samples[:, 0] - result.samples[:, 1]).abs().amax(1).min() > 1e-4
    torch.testing.assert_close(result.log_weights, torch.full((4, 3), -math.log(3)).double())
    assert result.log_z is None and not result.samples.requires_grad and not result.rewards.requires_grad


@pytest.mark.parametrize("method", ALL, ids=name)
def test_trace_and_ticks(method):
    ticks = []
    result = steerfm.steer(MAP, wave, method, n=2, strength=2.0, lookaheads=True, progress=lambda *tick: ticks.append(tick))
    trace, steps = result.trace, method.iterations
    assert ticks == [(i + 1, steps) for i in range(steps)]
    torch.testing.assert_close(trace.t, torch.arange(1, steps + 1) / steps)
    assert torch.equal(trace.value[-1].float(), 2.0 * result.rewards)
    assert torch.equal(sure(trace.lookaheads)[-1], result.samples[:, 0])
    assert (trace.ess == 1).all() and not trace.resampled.any() and trace.ancestors.shape == (steps, 2, 1)


@pytest.mark.parametrize("method", ALL, ids=name)
def test_costs_are_as_documented(method):
    n, k, hops, steps = 2, 3, 3, method.iterations
    cost = steerfm.steer(MAP, wave, replace(method, particles=k, hops=hops), n=n).cost
    looks = 1 + steps * getattr(method, "candidates", 1)
    climbs = steps if method in ASCENTS else 0
    assert cost.forwards == n * k * hops * looks and cost.reward_calls == cost.decodes == n * k * looks
    assert cost.backwards == n * k * hops * climbs and cost.reward_backwards == n * k * climbs


@pytest.mark.parametrize("method", ASCENTS, ids=name)
def test_ascents_refuse_black_boxes(method):
    with pytest.raises(RewardError, match=r"black box.*use ZeroOrderSearch, RandomSearch or BestOfN"):
        steerfm.steer(MAP, BlackBox(), method)
    with pytest.raises(RewardError, match=r"no gradient.*use ZeroOrderSearch"):
        steerfm.steer(MAP, lambda x: x[:, 0].detach(), method)
    with pytest.raises(RewardError, match=r"not finite.*use ZeroOrderSearch"):
        steerfm.steer(MAP, lambda x: (x[:, 0] - x[:, 0].detach()).abs().sqrt(), method)


@pytest.mark.parametrize("method", TRIALS, ids=name)
def test_trials_take_black_boxes(method):
    result = steerfm.steer(MAP, BlackBox(), method, n=16)
    assert result.rewards.mean() > (4 * steerfm.sample(MAP, 16, steps=1)[:, 0]).round().mean() + 0.75


def test_conditions_labels_and_prompts_follow_their_candidates():
    seen = []

    class Conditional(steerfm.FlowMap):
        def __init__(self):
            super().__init__((2,), class_names=("a", "b", "c"))
            self.register_buffer("one", torch.ones(()))

        def average_velocity(self, x, s, t, cond):
            return 10.0 * a(torch.Tensor, cond).view(-1, 1).to(x).expand_as(x)

    class Reads(Reward):
        needs = frozenset({"labels", "prompts"})

        def score(self, images, prompts=None, labels=None):
            seen.append((images.detach(), list(sure(prompts)), labels))
            return images.sum(1)

    for method in (ZeroOrderSearch(particles=2, iterations=2, candidates=3), ReNO(particles=2, iterations=2)):
        seen.clear()
        steerfm.steer(Conditional(), Reads(), method, n=3, cond=torch.tensor([0, 1, 2]), prompts=["0", "1", "2"])
        assert len(seen) == 3
        for images, prompts, labels in seen:
            assert prompts == [str(int(label)) for label in labels]
            assert (images - 10 * labels.view(-1, 1)).abs().max() < 6 and labels.bincount().unique().numel() == 1


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ReNO(particles=0), "particles=0"),
        (lambda: DFlow(iterations=0), "iterations=0"),
        (lambda: DFlow(hops=0), "hops=0"),
        (lambda: DFlow(memory=0), "memory=0"),
        (lambda: ReNO(prior=-1.0), "prior=-1.0"),
        (lambda: ReNO(rate=0.0), "rate=0.0"),
        (lambda: ReNO(momentum=1.0), "momentum=1.0"),
        (lambda: DFlow(step=0.0), "step=0.0"),
        (lambda: ZeroOrderSearch(candidates=0), "candidates=0"),
        (lambda: ZeroOrderSearch(radius=0.0), "radius=0.0"),
        (lambda: ZeroOrderSearch(radius=1.5), "radius=1.5"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", ALL, ids=name)
def test_docstrings_say_what_is_sampled(method):
    assert "Samples: no" in sure(type(method).__doc__)
