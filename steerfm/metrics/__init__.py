"""Metrics: distances, diversity, coverage, texture, restoration, statistics of rewards, consistency of maps.

Functions are in `functional` and `consistency`; `FrechetDistance`, `KernelDistance` and `TextureRatio` (of `accumulators`)
accumulate over batches and ranks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from steerfm.metrics.consistency import consistency_errors, jump_error, semigroup_error
from steerfm.metrics.functional import (
    BLOCK,
    Difference,
    bootstrap,
    coverage,
    cubic,
    discrepancy,
    feature_statistics,
    float64,
    frechet_distance,
    interval,
    mmd,
    paired_difference,
    pairwise_diversity,
    precision,
    restoration,
    reward_statistics,
    sample_distance,
    sliced_wasserstein,
    split_statistics,
    texture,
    vendi,
    wasserstein_1d,
)
from steerfm.metrics.posterior import PosteriorErrors, posterior_errors

if TYPE_CHECKING:
    from steerfm.metrics.accumulators import FrechetDistance, KernelDistance, TextureRatio

__all__ = [
    "BLOCK", "Difference", "FrechetDistance", "KernelDistance", "PosteriorErrors", "TextureRatio", "bootstrap",
    "consistency_errors", "coverage", "cubic", "discrepancy", "feature_statistics", "float64", "frechet_distance", "interval",
    "jump_error", "mmd", "paired_difference", "pairwise_diversity", "posterior_errors", "precision", "restoration",
    "reward_statistics", "sample_distance", "semigroup_error", "sliced_wasserstein", "split_statistics", "texture", "vendi",
    "wasserstein_1d",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The accumulated distances, on first use: torchmetrics takes as long to import as torch and all the rest."""
    if name in ("FrechetDistance", "KernelDistance", "TextureRatio"):
        return getattr(import_module("steerfm.metrics.accumulators"), name)
    raise AttributeError(f"module 'steerfm.metrics' has no attribute {name!r}")
