"""Fréchet and kernel distance and texture, accumulated over batches and ranks as `torchmetrics.Metric`.

The formulas are in `steerfm.metrics.functional`. This is a separate module, since torchmetrics takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from steerfm.metrics.functional import cubic, discrepancy, float64, frechet_distance, texture


class _FeatureMetric(Metric):
    """Base class: features in evaluation mode without gradients, and float64 states, which are never on mps."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features

    @torch.no_grad()
    def _extract(self, pictures: Tensor) -> Tensor:
        """Features (n, d) of pictures (n, ...), in float64, on the device of the states."""
        if isinstance(self.features, nn.Module):
            self.features.eval()  # even if a parent module is in training mode
        device = self.device if self.device.type != "mps" else torch.device("cpu")
        features = float64(self.features(pictures))
        return features.reshape(len(features), -1).to(device)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        to_mps = fn(torch.zeros(1, device=self.device)).device.type == "mps"  # mps has no float64
        return super()._apply(fn, list(self._defaults) if to_mps else exclude_state)


class FrechetDistance(_FeatureMetric):
    """Fréchet distance of features, accumulated over batches and ranks; see `frechet_distance`.

    The states are the sums of features (d,) and of their outer products (d, d), in float64: the result does not
    depend on batches, ranks or their order, up to rounding. Under DDP every rank needs at least one batch.

    >>> metric = FrechetDistance(classifier.features, reference=(mean, cov))
    >>> metric.update(pictures)
    >>> metric.compute()

    Args:
        features: pictures -> features (n, d); a module is used in evaluation mode.
        reference: mean (d,) and covariance (d, d) of real data (`feature_statistics`); None to collect them with
            ``update(pictures, real=True)``.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], reference: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(features)
        self.reference = None if reference is None else tuple(float64(part).cpu() for part in reference)
        for side in ("fake", "real"):
            for name in ("sum", "outer", "count"):  # scalars broadcast to the features' size at the first update
                self.add_state(f"{side}_{name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pictures: Tensor, real: bool = False) -> None:
        """Add pictures (n, ...) to the generated samples, or to the real ones.

        Raises:
            ValueError: real pictures although reference statistics were given.
        """
        if real and self.reference is not None:
            raise ValueError("reference statistics were given: build the metric without them to collect real pictures")
        x = self._extract(pictures)
        side = "real" if real else "fake"
        for name, value in (("sum", x.sum(0)), ("outer", x.T @ x), ("count", len(x))):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: fewer than two samples on either side.
        """
        fake = self._statistics("fake")
        real = self._statistics("real") if self.reference is None else self.reference
        return torch.tensor(frechet_distance(*fake, *(part.to(fake[0].device) for part in real)), dtype=torch.float64)

    def _statistics(self, side: str) -> tuple[Tensor, Tensor]:
        total, outer, count = (getattr(self, f"{side}_{name}") for name in ("sum", "outer", "count"))
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 {side} samples, got {int(count)}")
        mean = total / count
        return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


class KernelDistance(_FeatureMetric):
    """Kernel distance: unbiased MMD^2 of features under the kernel (x.y / d + 1)^3.

    Binkowski et al. 1801.01401 (KID). Unbiased at any sample size, so it may be negative; uses all pairs, not subsets.

    Args:
        features: pictures -> features (n, d); a module is used in evaluation mode.
        reference: features (m, d) of real data; None to collect them with ``update(pictures, real=True)``.
    """

    fake: list[Tensor]
    real: list[Tensor]

    def __init__(self, features: Callable[[Tensor], Tensor], reference: Tensor | None = None) -> None:
        super().__init__(features)
        self.reference = None if reference is None else float64(reference).cpu()
        self.add_state("fake", [], dist_reduce_fx="cat")
        self.add_state("real", [], dist_reduce_fx="cat")

    def update(self, pictures: Tensor, real: bool = False) -> None:
        """Add pictures (n, ...) to the generated samples, or to the real ones.

        Raises:
            ValueError: real pictures although reference features were given.
        """
        if real and self.reference is not None:
            raise ValueError("reference features were given: build the metric without them to collect real pictures")
        (self.real if real else self.fake).append(self._extract(pictures))

    def compute(self) -> Tensor:
        """The squared distance, a float64 scalar.

        Raises:
            ValueError: fewer than two samples on either side.
        """
        fake = dim_zero_cat(self.fake) if len(self.fake) else torch.zeros(0, 1)
        real = self.reference if self.reference is not None else dim_zero_cat(self.real) if len(self.real) else fake[:0]
        return torch.tensor(discrepancy(fake, real.to(fake.device), cubic), dtype=torch.float64)


class TextureRatio(_FeatureMetric):
    """Mean `texture` of samples over that of real pictures, accumulated over batches and ranks; 1 for the data.

    Args:
        reference: mean texture of real data; None to collect it with ``update(pictures, real=True)``.
    """

    higher_is_better = None

    def __init__(self, reference: float | None = None) -> None:
        super().__init__(texture)
        self.reference = reference
        for side in ("fake", "real"):
            for name in ("sum", "count"):
                self.add_state(f"{side}_{name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pictures: Tensor, real: bool = False) -> None:
        """Add pictures (n, c, h, w), at least 3 x 3, to the generated samples, or to the real ones.

        Raises:
            ValueError: real pictures although a reference was given, or another shape.
        """
        if real and self.reference is not None:
            raise ValueError("a reference was given: build the metric without it to collect real pictures")
        energy = self._extract(pictures)
        side = "real" if real else "fake"
        for name, value in (("sum", energy.sum()), ("count", len(energy))):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Tensor:
        """The ratio, a float64 scalar; not finite if the data have no texture.

        Raises:
            ValueError: no pictures on one side.
        """
        return self._mean("fake") / (self._mean("real") if self.reference is None else self.reference)

    def _mean(self, side: str) -> Tensor:
        total, count = (getattr(self, f"{side}_{name}") for name in ("sum", "count"))
        if not count:
            raise ValueError(f"a ratio of textures needs at least one picture on either side, got no {side} ones")
        return total / count
