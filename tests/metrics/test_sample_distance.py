"""The Fréchet distance of few samples of many features, and what stands for features where no network looks at pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerfm import metrics
from steerfm.metrics.spaces import pixels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m", "d"), [(9, 7, 40), (7, 9, 40), (2, 30, 31), (60, 50, 4), (30, 5, 30), (5, 5, 6)])
def test_it_is_the_distance_of_both_gaussians(n, m, d):
    a, b = normal(n, d) * 1.7 + 0.3, normal(m, d, seed=1)
    expected = metrics.frechet_distance(*metrics.feature_statistics(a), *metrics.feature_statistics(b))
    assert metrics.sample_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.sample_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert metrics.sample_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.sample_distance(a, a + 0.5) == pytest.approx(0.25 * d, rel=1e-6)


def test_a_million_features_need_no_square_of_them():
    a, b = torch.rand(6, 1_000_000), torch.rand(9, 1_000_000)
    assert 0 < metrics.sample_distance(a, b) < 1e6


@pytest.mark.parametrize("rows", [(1, 5), (5, 1)])
def test_one_row_is_no_sample(rows):
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        metrics.sample_distance(*(normal(n, 8) for n in rows))


@pytest.mark.parametrize(
    ("shape", "d"),
    [((2,), 2), ((1, 28, 28), 784), ((3, 32, 32), 3072), ((3, 64, 64), 3072), ((3, 48, 20), 1920), ((3, 5, 64, 128), 15360)],
)
def test_large_pictures_are_looked_at_in_means(shape, d):
    x = torch.rand(2, *shape)
    seen = pixels().features(x)
    assert seen.shape == (2, d)
    torch.testing.assert_close(seen.mean(1), x.flatten(1).mean(1), atol=2e-2, rtol=0)
    if x[0].numel() == d:
        assert torch.equal(seen, x.flatten(1))
