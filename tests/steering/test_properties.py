"""What holds for any weights and any configuration: hypothesis draws them, always the same ones (``derandomize``)."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import steerfm
from steerfm import transitions
from steerfm.steering import Denoise, FeynmanKac, Jump, Resample, SteeringResult, Uncorrected
from steerfm.steering.resampling import SCHEMES
from steerfm.steering.selection import Candidates
from steerfm.transitions import Diffuse, Renoise

FLOOR_OR_CEIL = ("systematic", "ssp")
AT_LEAST_FLOOR = (*FLOOR_OR_CEIL, "residual")
DTYPES = (torch.float32, torch.float64)


def drawn(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


# --- resampling schemes ----------------------------------------------------------------------------------------------
SHAPES = {
    "equal": torch.zeros_like,
    "one-hot": lambda z: torch.where(z == z.max(), 0.0, -torch.inf),
    "gaps": lambda z: torch.where((z > 0) | (z == z.max()), z, -torch.inf),
    "tail": lambda z: torch.where(z == z.max(), 0.0, math.log(1e-38)),  # a subnormal number in float32
    "spread": lambda z: 3 * z,
    "nearly one": lambda z: torch.where(z == z.max(), 0.0, -16.0),  # 1 - w is a few roundings in float32
}
"""Log-weights from normal numbers (k,)."""


def weights(shape, k, seed, dtype, total=1.0):
    """Weights (k,) that sum to ``total`` up to rounding."""
    z = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return total * SHAPES[shape](z).to(dtype).softmax(0)


def uniforms(n, k, seed, dtype):
    """(n, k); the first three rows are at the ends and in the middle of [0, 1)."""
    u = torch.rand(n, k, generator=torch.Generator().manual_seed(seed))
    for row, value in zip(u, (0.0, 1 - 2**-24, 0.5)):
        row.fill_(value)
    return u.to(dtype)


def offspring(ancestors):
    """Number of children of every particle, (n, k) -> (n, k) in float64."""
    ones = torch.ones(ancestors.shape, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, ancestors, ones)


def check_ancestors(scheme, w, ancestors, total=1.0):
    """Indices in range, no particle without weight, and as many children as the scheme promises."""
    k = w.shape[1]
    assert ancestors.shape == w.shape and ancestors.dtype == torch.long
    assert ancestors.min() >= 0 and ancestors.max() < k
    assert (w.gather(1, ancestors) > 0).all()
    if scheme in AT_LEAST_FLOOR:
        children, expected = offspring(ancestors), k * w.double() / w.double().sum(1, keepdim=True)
        slack = k * (2 * torch.finfo(w.dtype).eps + abs(total - 1))
        assert (children >= (expected - slack).floor()).all()
        if scheme in FLOOR_OR_CEIL:
            assert (children <= (expected + slack).ceil()).all()


@drawn(200)
@given(
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 1 + 1e-6, 1 - 1e-6]),
)
def test_ancestors_are_valid(scheme, shape, k, seed, dtype, total):
    w = weights(shape, k, seed, dtype, total).expand(8, k).contiguous()
    check_ancestors(scheme, w, SCHEMES[scheme](w, uniforms(8, k, seed, dtype)), total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ancestors_of_4096_particles_are_valid(scheme, dtype):
    k, total = 4096, 1 + 1e-6
    rows = [weights(shape, k, 0, dtype, scale) for shape, scale in product(SHAPES, (1.0, total, 2 - total))]
    w = torch.stack([row for row in rows for _ in range(4)])
    u = uniforms(4, k, 0, dtype).repeat(len(rows), 1)
    check_ancestors(scheme, w, SCHEMES[scheme](w, u), total)


@drawn(60)
@given(
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from(sorted(SHAPES)),
    st.integers(2, 12),
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
)
def test_schemes_are_unbiased(scheme, shape, k, seed, dtype):
    """Children over many outputs against n k w, by a z-test with the exact variance, or a bound of it."""
    n, w = 20_000, weights(shape, k, seed, dtype)
    u = torch.rand(n, k, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    children = offspring(SCHEMES[scheme](w.expand(n, k).contiguous(), u))
    expected = k * w.double()
    fraction = expected - expected.floor()
    variance = fraction * (1 - fraction) if scheme in FLOOR_OR_CEIL else expected * (1 - w.double()).clamp_min(0)
    error = (children.sum(0) - n * expected).abs()
    # rare children are Poisson, not normal: the 9 makes 5 standard deviations a bound for any rate
    assert (error <= 5 * (n * variance).sqrt() + 9).all(), error / (n * variance).sqrt()


@drawn(50)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 20), st.floats(0.01, 1), st.integers(0, 2**31))
def test_an_output_without_weight_is_left_alone(scheme, k, threshold, seed):
    """All log-weights of the first output are -inf: no resampling of it, and no effect on the second."""
    log_w = torch.stack([torch.full((k,), -torch.inf, dtype=torch.float64), weights("one-hot", k, seed, torch.float64).log()])
    u = torch.rand(2, k, generator=torch.Generator().manual_seed(seed))
    both, alone = (
        Resample(scheme, threshold).select(Candidates(log_w[rows], log_w[rows], u[rows], step=1, t=0.5))
        for rows in (slice(0, 2), slice(1, 2))
    )
    assert not both.resampled[0] and both.ancestors[0].tolist() == list(range(k))
    assert both.resampled[1] == alone.resampled[0] and both.ancestors[1].equal(alone.ancestors[0])


# --- the engine ------------------------------------------------------------------------------------------------------
MAPS = [
    steerfm.GaussianMixture([[-1.5], [1.0]], [[0.2], [0.4]], [0.6, 0.4]).flow_map(),
    steerfm.GaussianMixture([[0.5, -0.5]], [[[0.5, 0.2], [0.2, 0.3]]]).flow_map(),
]
TRANSITIONS = [transitions.Jump(), transitions.Jump(2), Renoise(1.0), Renoise(0.4), Diffuse(), Diffuse(0.0)]


def walk(**parts) -> FeynmanKac:
    """The method; settings that would do nothing beside the others, which are refused, stay as they are."""
    idle = ["threshold"] if parts["resampling"] is None else []
    if not parts["transition"].stochastic:
        idle += ["resampling", "threshold"]
    if parts["lookahead"] is None or isinstance(parts["correction"], Uncorrected):
        idle += ["tempering"]
    return FeynmanKac(**{name: part for name, part in parts.items() if name not in idle})


methods = st.builds(
    walk,
    particles=st.integers(1, 6),
    steps=st.integers(1, 4),
    lookahead=st.sampled_from([None, Denoise(), Jump(), Jump(2)]),
    transition=st.sampled_from(TRANSITIONS),
    tempering=st.sampled_from(["linear", "exponential", "none", 2.0]),
    correction=st.sampled_from(["twisted", Uncorrected()]),
    resampling=st.sampled_from([None, *SCHEMES]),
    threshold=st.sampled_from([0.0, 0.5, 0.9]),
    power=st.sampled_from([1.0, 1.5]),
)
maps, outputs, seeds = st.sampled_from(MAPS), st.integers(1, 5), st.integers(0, 2**31)


def reward(x):
    return 1.5 * x[:, 0] - 0.5 * x[:, -1] ** 2


def assert_equal(a: SteeringResult, b: SteeringResult, order: slice | torch.Tensor = slice(None)) -> None:
    """Two results bit for bit, up to the order of the outputs."""
    for name in ("samples", "rewards", "log_weights", "log_z"):
        left, right = getattr(a, name), getattr(b, name)
        assert left[order].equal(right) if left is not None and right is not None else left is right, name
    for field in fields(a.trace):
        left, right = getattr(a.trace, field.name), getattr(b.trace, field.name)
        if field.name != "t" and left is not None:
            assert left[:, order].equal(right), f"trace.{field.name}"


def strengths(n, seed):
    return 4 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@drawn(60)
@given(maps, methods, outputs, seeds)
def test_permuted_outputs_give_permuted_results(flow_map, method, n, seed):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    strength, own = strengths(n, seed), [seed + 7 * i for i in range(n)]
    plain = steerfm.steer(flow_map, reward, method, n, own, strength)
    permuted = steerfm.steer(flow_map, reward, method, n, [own[i] for i in order], strength[order])
    assert_equal(plain, permuted, order)


@pytest.mark.slow
@drawn(60)
@given(maps, methods, outputs, seeds, st.integers(1, 6), st.integers(1, 6))
def test_batches_change_nothing(flow_map, method, n, seed, batch_size, micro_batch):
    whole = steerfm.steer(flow_map, reward, method, n, seed, strengths(n, seed))
    parts = steerfm.steer(flow_map, reward, method, n, seed, strengths(n, seed), batch_size=batch_size, micro_batch=micro_batch)
    assert_equal(whole, parts)
    for name in ("forwards", "reward_calls", "decodes"):
        assert getattr(whole.cost, name) == getattr(parts.cost, name), name


@drawn(60)
@given(maps, methods, outputs, seeds)
def test_without_strength_the_first_particle_is_the_plain_sample(flow_map, method, n, seed):
    """The noise of several particles interleaves: after a step with noise, only a single particle is the plain sample."""
    result = steerfm.steer(flow_map, reward, method, n, seed, 0.0)
    assert not result.trace.resampled.any()
    assert (result.log_weights + math.log(method.particles)).abs().max() < 1e-12
    assert result.log_z is None or result.log_z.abs().max() < 1e-12
    if method.particles == 1 or not method.transition.stochastic:
        plain = steerfm.sample(flow_map, n, method.steps, seed, transition=method.transition, power=method.power)
        assert result.samples[:, 0].equal(plain)


@drawn(60)
@given(maps, methods, outputs, seeds)
def test_weights_are_normalised_and_the_trace_is_consistent(flow_map, method, n, seed):
    result = steerfm.steer(flow_map, reward, method, n, seed, strengths(n, seed))
    k, steps = method.particles, method.steps
    assert torch.logsumexp(result.log_weights, 1).abs().max() < 1e-10
    assert result.samples.shape == (n, k, *flow_map.shape) and result.samples.isfinite().all()
    assert result.rewards.equal(reward(result.samples.flatten(0, 1)).float().view(n, k))
    ess, ancestors = result.trace.ess, result.trace.ancestors
    assert ess.shape == (steps, n) and (ess > (1 - 1e-9) / k).all() and (ess < 1 + 1e-9).all()
    assert ancestors.min() >= 0 and ancestors.max() < k
    kept = ~result.trace.resampled
    assert (ancestors[kept] == torch.arange(k)).all()
