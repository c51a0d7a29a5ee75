"""Log-weights, effective sample size and the resampling schemes."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerfm.steering.resampling import SCHEMES
from steerfm.steering.selection import BestChild, Candidates, Resample, TopK, Window
from steerfm.steering.weights import effective_sample_size, log_mean, normalise, wide

WEIGHTS = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.0, 0.17, 0.13], dtype=torch.float64)
SORTED = ["stratified", "systematic", "ssp"]
SPREAD_BELOW_ONE = ["systematic", "ssp"]  # every particle has floor(k w) or ceil(k w) children


def uniforms(n, k, seed=0, dtype=torch.float64):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offspring(ancestors):
    """(n, k) ancestors -> (n, k) number of children of every particle."""
    k = ancestors.shape[1]
    return torch.nn.functional.one_hot(ancestors, k).sum(1)


# --- log-weights -----------------------------------------------------------------------------------------------------
def test_normalise_sums_to_one_and_keeps_ratios():
    log_w = torch.tensor([[1e4, 1e4 + math.log(3.0), -1e4], [-2e5, -2e5, -2e5]], dtype=torch.float64)
    out = normalise(log_w)
    assert torch.logsumexp(out, 1).abs().max() < 1e-9
    assert torch.allclose(out.exp(), torch.tensor([[0.25, 0.75, 0.0], [1 / 3] * 3], dtype=torch.float64))


def test_log_mean_is_the_log_of_the_mean_weight():
    w = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    assert torch.allclose(log_mean(w.log()), w.mean(1).log())
    assert torch.allclose(log_mean(w.log() + 5e3), w.mean(1).log() + 5e3)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_effective_sample_size_is_its_formula(offset):
    w = uniforms(5, 9) + 1e-3
    expected = w.sum(1) ** 2 / (9 * (w**2).sum(1))
    assert torch.allclose(effective_sample_size(w.log() + offset), expected, rtol=1e-8)


def test_effective_sample_size_at_its_ends():
    k = 8
    even = torch.zeros(1, k, dtype=torch.float64)
    single = torch.full((1, k), -torch.inf, dtype=torch.float64)
    single[0, 3] = 0.0
    assert effective_sample_size(even).item() == pytest.approx(1.0)
    assert effective_sample_size(single).item() == pytest.approx(1 / k)


def test_weightless_particles_make_no_nan():
    log_w = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0]], dtype=torch.float64)
    for value in (log_mean(log_w), effective_sample_size(log_w), normalise(log_w).exp()):
        assert value.isfinite().all()
    for scheme in SCHEMES:
        ancestors = Resample(scheme).draw(log_w, uniforms(1, 4))
        assert set(ancestors.flatten().tolist()) <= {1, 3}


def test_wide_is_float64_where_there_is_float64():
    assert wide(torch.device("cpu")) == torch.float64
    assert wide(torch.device("mps")) == torch.float32


# --- schemes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_is_unbiased(scheme):
    n, k = 20_000, len(WEIGHTS)
    children = offspring(SCHEMES[scheme](WEIGHTS.expand(n, k).contiguous(), uniforms(n, k))).double()
    mean, error = children.mean(0), children.std(0) / math.sqrt(n)
    z = (mean - k * WEIGHTS).abs() / error.clamp_min(1e-9)
    assert z[WEIGHTS > 0].max() < 4
    assert (children.sum(1) == k).all()


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual", "ssp"])
def test_scheme_varies_less_than_multinomial(scheme):
    n, k = 4000, len(WEIGHTS)
    w, u = WEIGHTS.expand(n, k).contiguous(), uniforms(n, k)
    variance = [offspring(SCHEMES[name](w, u)).double().var(0).sum() for name in (scheme, "multinomial")]
    assert variance[0] < 0.7 * variance[1]


def variances(scheme, w):
    """Variances (k,) of the numbers of children, in closed form; of stratified draws from the odds of each stratum."""
    k = len(w)
    rest = k * w - (k * w).floor()
    if scheme == "multinomial":
        return k * w * (1 - w)
    if scheme == "residual":
        return rest * (1 - rest / rest.sum())
    if scheme in SPREAD_BELOW_ONE:
        return rest * (1 - rest)
    edges = torch.cat([w.new_zeros(1), w.cumsum(0)])
    strata = torch.arange(k, dtype=w.dtype)
    shares = (torch.minimum(edges[1:, None] * k, strata + 1) - torch.maximum(edges[:-1, None] * k, strata)).clamp_min(0)
    return (shares * (1 - shares)).sum(1)


@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_children_have_the_mean_and_variance_of_theory(scheme, k):
    """Over 40,000 outputs, one particle at a time, and for a function of them: its variance is at most multinomial's."""
    n, generator = 40_000, torch.Generator().manual_seed(k)
    w = torch.randn(k, generator=generator, dtype=torch.float64).mul(1.5).softmax(0)
    f = torch.randn(k, generator=generator, dtype=torch.float64)
    children = offspring(SCHEMES[scheme](w.expand(n, k).contiguous(), uniforms(n, k, 1))).double()
    away = children - k * w
    theory = variances(scheme, w)
    assert (away.mean(0).abs() <= 4.5 * (theory / n).sqrt() + 1e-9).all()
    square = away.square()
    error = (square.var(0) / n).sqrt()
    assert ((square.mean(0) - theory).abs() <= 4.5 * error + 30 / n).all(), (square.mean(0), theory)
    spread = (away @ f).square()
    bound = k * ((w * f**2).sum() - (w * f).sum() ** 2)
    z = (spread.mean() - bound) / (spread.std() / math.sqrt(n))
    assert abs(z) < 4 if scheme == "multinomial" else z < 4 or k == 2
    if scheme == "residual":  # the law of its rest is known, so its variance is too
        rest = k * w - (k * w).floor()
        p = rest / rest.sum()
        exact = rest.sum() * ((p * f**2).sum() - (p * f).sum() ** 2)
        assert abs(spread.mean() - exact) < 4 * spread.std() / math.sqrt(n)


def test_the_rest_of_residual_is_independent_draws():
    """All fractions are 1/2, so two draws among four: the same one is drawn twice with odds 1/16, and never by systematic."""
    n, k = 40_000, 4
    w = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64) / k
    children = offspring(SCHEMES["residual"](w.expand(n, k).contiguous(), uniforms(n, k, 3)))
    both = (children[:, 1] == 2).double().mean()
    assert abs(both - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / n)


def test_ssp_is_its_loop():
    """Against the process written out particle by particle, for one output."""

    def loop(w, u):
        k = len(w)
        copies = [math.floor(k * x) for x in w]
        rest = [k * x - c for x, c in zip(w, copies)]
        i = 0
        for j in range(1, k):
            p, q = rest[i], rest[j]
            if p + q < 1:  # one drops to 0
                stays = u[j] * (p + q) < p
                rest[i], rest[j] = (p + q, 0.0) if stays else (0.0, p + q)
            else:  # one rises to 1
                stays = u[j] * (2 - p - q) < 1 - p
                rest[i], rest[j] = (p + q - 1, 1.0) if stays else (1.0, p + q - 1)
            i = i if stays else j
        return [c + round(r) for c, r in zip(copies, rest)]

    n, k = 300, 12
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64).mul(1.5).softmax(1)
    u = uniforms(n, k, 6)
    children = offspring(SCHEMES["ssp"](w, u))
    same = sum(children[i].tolist() == loop(w[i].tolist(), u[i].tolist()) for i in range(n))
    assert same >= 0.9 * n  # the last meeting sums to 1 up to rounding, which decides who of the two is asked


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_take_ten_thousand_particles_in_an_instant(scheme):
    w, u = torch.full((1, 10_000), 1e-4, dtype=torch.float64), uniforms(1, 10_000)
    started = time.perf_counter()
    SCHEMES[scheme](w, u)
    assert time.perf_counter() - started < 0.1  # a loop over particles takes half a second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_offspring_numbers_are_bounded(scheme, dtype):
    n, k = 200, 33
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=dtype).mul(1.5).softmax(1)
    ancestors = SCHEMES[scheme](w, uniforms(n, k, dtype=dtype))
    assert ancestors.shape == (n, k) and not ancestors.is_floating_point()
    children, expected = offspring(ancestors), k * w
    slack = 1e-4 if dtype == torch.float32 else 1e-9
    if scheme in SORTED:
        assert (ancestors.diff(dim=1) >= 0).all()
    if scheme in SPREAD_BELOW_ONE:
        assert (children >= (expected - slack).floor()).all() and (children <= (expected + slack).ceil()).all()
    if scheme == "residual":
        assert (children >= (expected - slack).floor()).all()
    if scheme == "stratified":
        assert ((children - expected).abs() < 2 + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_weights_are_never_chosen(scheme, u, dtype):
    k = 4096  # large enough for (k - 1 + u) / k to round to 1 in float32
    w = torch.zeros(3, k, dtype=dtype)
    w[0, 1:-1] = torch.rand(k - 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    w[1, 5::7], w[1, -50:] = 1.0, 0.0
    w[2, 1000] = 1.0
    w = w / w.sum(1, keepdim=True)
    ancestors = SCHEMES[scheme](w, torch.full_like(w, u))
    assert (w.gather(1, ancestors) > 0).all()
    assert (ancestors[2] == 1000).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", [*SORTED, "residual"])
def test_equal_weights_keep_every_particle(scheme, dtype):
    for k in (1, 2, 3, 7, 10, 49, 1000):
        w = torch.zeros(4, k, dtype=dtype).softmax(1)
        ancestors = SCHEMES[scheme](w, uniforms(4, k, dtype=dtype).clamp(1e-3, 1 - 1e-3))
        assert (ancestors == torch.arange(k)).all(), k


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_particle_is_its_own_ancestor(scheme):
    assert (SCHEMES[scheme](torch.ones(5, 1), uniforms(5, 1).float()) == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_particles_follow_the_weights(scheme):
    k = 5000
    w = torch.randn(1, k, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(1)
    children = offspring_large(SCHEMES[scheme](w, uniforms(1, k)), k)
    assert children.sum() == k
    halves = (children[: k // 2].sum() / k - w[0, : k // 2].sum()).abs()
    assert halves < (0.03 if scheme == "multinomial" else 0.01)


def offspring_large(ancestors, k):
    return torch.bincount(ancestors.flatten(), minlength=k).double()


finite = st.floats(-1e4, 1e4)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(finite, st.just(-math.inf), st.just(0.0)), min_size=1, max_size=24),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(sorted(SCHEMES)),
)
def test_any_weights_give_valid_ancestors(values, u, dtype, scheme):
    if max(values) == -math.inf:
        values = [*values, 0.0]
    log_w = torch.tensor([values], dtype=dtype)
    k = log_w.shape[1]
    u = torch.full((1, k), u, dtype=torch.float64).to(dtype).clamp_max(1 - 2**-24)
    w = log_w.softmax(1)
    ancestors = SCHEMES[scheme](w, u)
    assert ancestors.shape == (1, k)
    assert ancestors.min() >= 0 and ancestors.max() < k
    assert offspring(ancestors).sum() == k
    assert (w.gather(1, ancestors) > 0).all()
    if scheme in SPREAD_BELOW_ONE:
        assert ((offspring(ancestors) - k * w).abs() < 1 + k * 1e-5).all()


# --- selection -------------------------------------------------------------------------------------------------------
def candidates(log_w, tilt=None, step=1, t=0.5):
    return Candidates(log_w, log_w if tilt is None else tilt, uniforms(*log_w.shape), step, t)


def test_only_outputs_of_low_ess_are_resampled():
    log_w = torch.zeros(2, 6, dtype=torch.float64)
    log_w[1, 2] = 10.0
    selected = Resample("systematic", 0.5).select(candidates(log_w))
    assert selected.resampled.tolist() == [False, True]
    assert selected.ancestors[0].tolist() == list(range(6))
    assert (selected.ancestors[1] == 2).all()


def test_threshold_zero_never_resamples():
    log_w = torch.tensor([[0.0, -1e4, -1e4]], dtype=torch.float64)
    assert not Resample("ssp", 0.0).select(candidates(log_w)).resampled.any()


def test_a_scheme_may_be_a_function():
    resample = Resample(lambda w, u: w.argmax(1, keepdim=True).expand_as(w), 1.0)
    assert (resample.select(candidates(WEIGHTS.log()[None])).ancestors == 1).all()


@pytest.mark.parametrize("threshold", [2, -0.1, math.nan])
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        Resample("ssp", threshold)


def test_unknown_scheme_names_the_schemes():
    with pytest.raises(ValueError, match="residual"):
        Resample("best")


TILT = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0, 5.0], [1.0, 0.0, 0.5, 0.0, 0.0, 0.1]], dtype=torch.float64)


def test_top_k_copies_the_best_equally_often():
    selected = TopK(2).select(candidates(torch.zeros_like(TILT), TILT))
    assert selected.ancestors.tolist() == [[5, 1] * 3, [0, 2] * 3]
    assert selected.resampled.all()


def test_top_k_may_prune_and_never_keeps_more_than_there_are():
    assert TopK(2, prune=True).select(candidates(torch.zeros_like(TILT), TILT)).ancestors.tolist() == [[5, 1], [0, 2]]
    assert TopK(99, prune=True).select(candidates(torch.zeros_like(TILT), TILT)).ancestors.shape == (2, 6)


def test_best_child_wins_in_its_own_group():
    selected = BestChild(3).select(candidates(torch.zeros_like(TILT), TILT))
    assert selected.ancestors.tolist() == [[1, 1, 1, 5, 5, 5], [0, 0, 0, 5, 5, 5]]
    with pytest.raises(ValueError, match="groups of 4"):
        BestChild(4).select(candidates(torch.zeros_like(TILT), TILT))


def test_a_soft_child_is_drawn_with_the_odds_of_its_reward():
    tilt = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64).expand(20_000, 3)
    u = uniforms(20_000, 3, seed=1)
    drawn = BestChild(3, soft=True).select(Candidates(torch.zeros_like(tilt), tilt, u, 1, 0.5)).ancestors
    assert (drawn == drawn[:, :1]).all()
    share = torch.bincount(drawn[:, 0], minlength=3) / len(drawn)
    odds = tilt[0].softmax(0)
    assert ((share - odds).abs() < 4 * (odds * (1 - odds) / len(drawn)).sqrt()).all()


def test_a_window_selects_now_and_then():
    window = Window(TopK(1), every=2, start=0.4, stop=0.8)
    picked = [
        bool(window.select(candidates(torch.zeros_like(TILT), TILT, step, step / 10)).resampled.all()) for step in range(1, 10)
    ]
    assert picked == [False, False, False, True, False, True, False, True, False]
