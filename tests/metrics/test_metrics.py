"""Metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from steerfm import metrics
from steerfm.metrics import FrechetDistance, KernelDistance, TextureRatio


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Fréchet ---------------------------------------------------------------------------------------------------------
def test_frechet_of_commuting_gaussians():
    mean_a, mean_b = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]]).double()
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.0], [0.5, 3.0, 1.0]]).double()
    rotation = torch.linalg.qr(normal(3, 3)).Q
    cov_a, cov_b = (rotation * std_a**2 @ rotation.T, rotation * std_b**2 @ rotation.T)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert metrics.frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_of_general_gaussians_is_symmetric_and_zero_on_itself():
    a, b = metrics.feature_statistics(normal(50, 6)), metrics.feature_statistics(normal(40, 6, seed=1) * 2 + 1)
    assert metrics.frechet_distance(*a, *b) == pytest.approx(metrics.frechet_distance(*b, *a), rel=1e-10)
    assert metrics.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-10)
    product = torch.linalg.eigvals(a[1] @ b[1]).real.sqrt().sum()  # tr (C_a C_b)^{1/2}, without the symmetric form
    expected = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * product
    assert metrics.frechet_distance(*a, *b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_metric_equals_function_and_merges():
    fake, real = normal(60, 1, 2, 3), normal(50, 1, 2, 3, seed=1) + 1
    reference = metrics.feature_statistics(real.flatten(1))
    whole, halves = FrechetDistance(nn.Flatten(), reference), [FrechetDistance(nn.Flatten(), reference) for _ in "ab"]
    whole.update(fake)
    for half, part in zip(halves, (fake[:13], fake[13:]), strict=True):
        half.update(part)
    halves[0].merge_state(halves[1])
    expected = metrics.frechet_distance(*metrics.feature_statistics(fake.flatten(1)), *reference)
    assert whole.compute().item() == pytest.approx(expected, rel=1e-9)
    assert halves[0].compute().item() == pytest.approx(expected, rel=1e-9)
    collected = FrechetDistance(nn.Flatten())
    collected.update(fake)
    collected.update(real, real=True)
    assert collected.compute().item() == pytest.approx(expected, rel=1e-9)


def test_frechet_metric_refuses_too_few_and_double_references():
    metric = FrechetDistance(nn.Flatten(), metrics.feature_statistics(normal(9, 2)))
    with pytest.raises(ValueError, match="reference statistics were given"):
        metric.update(normal(3, 2), real=True)
    metric.update(normal(1, 2))
    with pytest.raises(ValueError, match="at least 2 fake samples, got 1"):
        metric.compute()
    metric.reset()
    assert metric.fake_count == 0


def test_states_stay_in_float64_and_features_in_evaluation_mode():
    metric = FrechetDistance(nn.Sequential(nn.Flatten(), nn.Dropout(0.5)))
    metric.float().half().train()
    for real in (False, True):
        metric.update(torch.arange(12.0).reshape(3, 4), real=real)
    assert metric.fake_outer.dtype == torch.float64
    assert metric.compute() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_without_a_part_are_those_of_the_rest(offset):
    x = normal(40, 5) @ normal(5, 5, seed=1) + offset
    part = torch.arange(40) % 3 == 0
    found = metrics.split_statistics(*metrics.feature_statistics(x), len(x), x[part])
    for a, b in zip(found, metrics.feature_statistics(x[~part]), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="1 of 40 are left"):
        metrics.split_statistics(*metrics.feature_statistics(x), len(x), x[:39])


# --- kernels ---------------------------------------------------------------------------------------------------------
def test_kernel_distance_is_unbiased():
    def estimate(shift: float, seed: int) -> float:
        metric = KernelDistance(nn.Identity(), normal(40, 3, seed=seed))
        metric.update(normal(30, 3, seed=10_000 + seed) + shift)
        return metric.compute().item()

    same = torch.tensor([estimate(0.0, seed) for seed in range(200)])
    assert abs(same.mean() / same.std() * len(same) ** 0.5) < 3.5
    assert same.min() < 0  # unbiased: not clipped
    moved = torch.tensor([estimate(1.0, seed) for seed in range(50)])
    assert moved.mean() > 5 * same.std()


def test_kernel_distance_in_blocks_and_merged(monkeypatch):
    fake, real = normal(25, 4), normal(17, 4, seed=1) + 0.5

    def build(x: torch.Tensor) -> KernelDistance:
        metric = KernelDistance(nn.Identity(), real)
        metric.update(x)
        return metric

    k = [((x @ y.T / 4 + 1) ** 3) for x, y in ((fake, fake), (real, real), (fake, real))]
    off = [(m.sum() - m.diagonal().sum()) / (len(m) * (len(m) - 1)) for m in k[:2]]
    expected = (off[0] + off[1] - 2 * k[2].mean()).item()
    assert build(fake).compute().item() == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    half = build(fake[:9])
    half.merge_state(build(fake[9:]))
    assert half.compute().item() == pytest.approx(expected)


def test_kernel_distance_collects_real_pictures_and_needs_two():
    metric = KernelDistance(nn.Flatten())
    metric.update(normal(5, 1, 2, 2))
    with pytest.raises(ValueError, match="at least 2 samples on either side, got 5 and 0"):
        metric.compute()
    metric.update(normal(5, 1, 2, 2, seed=1), real=True)
    assert math.isfinite(metric.compute())


def test_mmd_closed_form_weights_and_blocks(monkeypatch):
    # N(0,1) against N(m,1) under one Gaussian kernel: 2 c (1 - exp(-m^2 / (2 (h^2 + 2)))), c = h / sqrt(h^2 + 2)
    h, m = 1.5, 1.0
    expected = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    estimates = torch.tensor([metrics.mmd(normal(80, 1, seed=s), normal(60, 1, seed=500 + s) + m, [h]) for s in range(100)])
    assert abs((estimates.mean() - expected) / estimates.std() * 10) < 3.5
    a, b = normal(30, 2), normal(20, 2, seed=1)
    weights = torch.rand(20, generator=torch.Generator().manual_seed(2))
    value = metrics.mmd(a, b, weights_b=weights)
    monkeypatch.setattr(metrics, "BLOCK", 8)
    assert metrics.mmd(a, b, weights_b=weights * 3) == pytest.approx(value)
    assert metrics.mmd(a, b, weights_b=torch.ones(20)) == pytest.approx(metrics.mmd(a, b))


def test_mmd_refuses_bad_weights():
    with pytest.raises(ValueError, match="weights must be 4 finite numbers"):
        metrics.mmd(normal(4, 1), normal(4, 1), weights_a=torch.tensor([1.0, -1.0, 1.0, 1.0]))


# --- Wasserstein -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_wasserstein_of_a_shift_is_the_shift(order):
    a = normal(101)
    assert metrics.wasserstein_1d(a, a + 0.7, order=order) == pytest.approx(0.7)


def test_wasserstein_of_unequal_sizes_and_weights():
    a, b = normal(12), normal(8, seed=1)
    expected = metrics.wasserstein_1d(a.repeat(2), b.repeat(3))  # the same laws in equal sizes
    assert expected == pytest.approx((a.repeat(2).sort()[0] - b.repeat(3).sort()[0]).square().mean().sqrt().item())
    assert metrics.wasserstein_1d(a, b) == pytest.approx(expected)
    counts = torch.tensor([1, 2, 3, 1, 0, 4, 1, 2])
    repeated = metrics.wasserstein_1d(a, b.repeat_interleave(counts))
    assert metrics.wasserstein_1d(a, b, weights_b=counts) == pytest.approx(repeated)
    two_points = metrics.wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([0.0]), torch.tensor([0.25, 0.75]))
    assert two_points == pytest.approx(0.75**0.5)


def test_sliced_wasserstein_of_a_shift_is_exact():
    a, v = normal(50, 5), torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    expected = v.norm().item() / 5**0.5
    assert metrics.sliced_wasserstein(a, a[torch.randperm(50)] + v, projections=20) == pytest.approx(expected)
    assert metrics.sliced_wasserstein(a.repeat(3, 1), a + v, projections=5) == pytest.approx(expected)
    assert metrics.sliced_wasserstein(a, a, projections=7) == pytest.approx(0, abs=1e-7)


def test_sliced_wasserstein_of_gaussians():
    a, b = normal(20_000, 2), 3 * normal(20_000, 2, seed=1)
    assert metrics.sliced_wasserstein(a, b, projections=8) == pytest.approx(2.0, rel=0.02)


# --- diversity and coverage ------------------------------------------------------------------------------------------
def test_vendi_counts_different_samples():
    assert metrics.vendi(torch.eye(7)) == pytest.approx(7)
    assert metrics.vendi(torch.ones(7, 3) * torch.arange(1, 8)[:, None]) == pytest.approx(1)
    assert metrics.vendi(torch.eye(3).repeat(4, 1)) == pytest.approx(3)
    x = normal(6, 4)
    assert metrics.vendi(x) == pytest.approx(metrics.vendi(torch.cat([x, x.new_zeros(6, 9)], 1)))


def test_pairwise_diversity(monkeypatch):
    x = normal(9, 3)
    expected = torch.pdist(x).mean().item()
    assert metrics.pairwise_diversity(x) == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK", 4)
    assert metrics.pairwise_diversity(x) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.pairwise_diversity(x[:1])


def test_coverage_and_precision(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 64)
    real = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 20])
    one_mode = normal(300, 2, seed=2)
    assert metrics.coverage(one_mode, real) == pytest.approx(0.5, abs=0.03)
    assert metrics.precision(one_mode, real) > 0.9
    assert metrics.precision(real, one_mode) == pytest.approx(0.5, abs=0.05)  # recall
    assert metrics.precision(one_mode + 100, real) == metrics.coverage(one_mode + 100, real) == 0
    values = [metrics.coverage(normal(100, 2, seed=s), normal(100, 2, seed=50 + s), k=3) for s in range(40)]
    assert sum(values) / 40 == pytest.approx(1 - 2**-3, abs=0.02)
    with pytest.raises(ValueError, match="more than 5 reference samples"):
        metrics.coverage(one_mode, real[:5])


# --- texture ---------------------------------------------------------------------------------------------------------
def test_texture_of_what_has_none():
    """Nothing is above the mean in a constant or a ramp, at the border neither; a constant that is added changes nothing."""
    ramp = torch.arange(7.0).view(7, 1) + 2 * torch.arange(9.0)
    for picture in (torch.full((7, 9), 0.3), ramp):
        assert metrics.texture(picture.expand(2, 3, 7, 9)).tolist() == pytest.approx([0, 0], abs=1e-20)
    x = normal(4, 3, 8, 6)
    assert torch.allclose(metrics.texture(x + 5), metrics.texture(x), rtol=1e-9)
    assert torch.allclose(metrics.texture(-2 * x), 4 * metrics.texture(x), rtol=1e-9)


def test_texture_of_a_checkerboard_and_of_a_point():
    board = (torch.arange(8)[:, None] + torch.arange(6)) % 2 * 2.0 - 1  # each mean is a ninth of its pixel
    assert metrics.texture(board.expand(2, 1, 8, 6)).tolist() == pytest.approx([(8 / 9) ** 2] * 2)
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1  # 8/9 at the point, -1/9 at its 8 neighbours, of 7 x 7 pixels that count
    assert metrics.texture(point).item() == pytest.approx((64 + 8) / 81 / 49)


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_texture_of_white_noise(z_score, variance):
    found = metrics.texture(normal(400, 2, 12, 10) * variance**0.5)
    assert abs(z_score(found, variance * 8 / 9)) < 4


def test_texture_takes_every_picture_by_itself_and_refuses_what_is_too_small():
    x = normal(5, 3, 8, 6)
    assert torch.allclose(metrics.texture(x), torch.cat([metrics.texture(part) for part in x.split(1)]))
    for wrong in (normal(2, 1, 2, 9), normal(3, 8, 8), normal(4, 5)):
        with pytest.raises(ValueError, match="at least 3 x 3"):
            metrics.texture(wrong)


def test_texture_ratio_accumulates_merges_and_refuses():
    fake, real = normal(30, 1, 6, 6), 2 * normal(20, 1, 6, 6, seed=1)
    expected = (metrics.texture(fake).mean() / metrics.texture(real).mean()).item()
    halves = [TextureRatio(metrics.texture(real).mean().item()) for _ in "ab"]
    for half, part in zip(halves, (fake[:7], fake[7:]), strict=True):
        half.update(part)
    halves[0].merge_state(halves[1])
    assert halves[0].compute().item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="a reference was given"):
        halves[0].update(real, real=True)
    collected = TextureRatio()
    collected.float().half()
    collected.update(fake)
    with pytest.raises(ValueError, match="no real ones"):
        collected.compute()
    collected.update(real, real=True)
    assert collected.compute().item() == pytest.approx(expected) and collected.compute().dtype == torch.float64


# --- restoration -----------------------------------------------------------------------------------------------------
def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of two channels (h, w): equation 13 of Wang et al. 2004 in every window, averaged."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    padded, values = [np.pad(x, 5, mode="reflect") for x in (a, b)], []
    for i, j in np.ndindex(*a.shape):
        x, y = (part[i : i + 11, j : j + 11] for part in padded)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, vxy = ((window * p * q).sum() - m for p, q, m in ((x, x, mx * mx), (y, y, my * my), (x, y, mx * my)))
        values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


def test_restoration_matches_loops_for_every_picture_by_itself():
    truth = torch.rand(3, 14, 12, generator=torch.Generator().manual_seed(0))
    noise = torch.tensor([0.3, 0.05]).view(2, 1, 1, 1) * normal(2, 3, 14, 12).float()
    pictures = (truth + noise).clamp(0, 1)
    found = metrics.restoration(pictures, truth)
    for i, picture in enumerate(pictures):
        error = (picture - truth).double().square().mean()
        assert found["psnr"][i].item() == pytest.approx(-10 * error.log10().item(), rel=1e-5)
        channels = [slow_ssim(a, b) for a, b in zip(picture.double().numpy(), truth.double().numpy())]
        assert found["ssim"][i].item() == pytest.approx(sum(channels) / 3, abs=1e-4)
    assert found["psnr"][0] < found["psnr"][1] and found["ssim"][0] < found["ssim"][1]


def test_the_truth_itself_is_restored_perfectly():
    truth = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = metrics.restoration(truth.double()[None], truth)
    assert found["psnr"].tolist() == [math.inf] and found["ssim"].tolist() == pytest.approx([1.0])
    with pytest.raises(ValueError, match="truth has shape"):
        metrics.restoration(truth[None], truth[:, 1:])


# --- rewards ---------------------------------------------------------------------------------------------------------
def test_reward_statistics():
    values = normal(400)
    stats = metrics.reward_statistics(values)
    assert stats["mean"] == pytest.approx(values.mean().item())
    assert stats["standard_error"] == pytest.approx(values.std().item() / 20)
    assert stats["min"] <= stats["q05"] <= stats["median"] <= stats["q95"] <= stats["max"]
    copies = values[:100, None].expand(100, 16)  # copies of one output are no new evidence
    assert metrics.reward_statistics(copies)["standard_error"] == pytest.approx(values[:100].std().item() / 10)
    assert math.isnan(metrics.reward_statistics(torch.ones(1))["standard_error"])


def test_an_interval_covers_the_mean_as_often_as_it_says():
    x = torch.randn(2000, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    found = [metrics.interval(row) for row in x]
    covered = sum(abs(mean - 3) < half for mean, half in found) / len(found)
    assert covered == pytest.approx(0.95, abs=0.02)
    assert metrics.interval([2.5]) == (2.5, 0.0)
