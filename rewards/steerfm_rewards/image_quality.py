"""BRISQUE: how natural a picture looks, without a reference, from statistics of its local contrast."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from steerfm.rewards import Prompts, Reward
from steerfm.zoo import find, models
from steerfm_rewards.checks import check_pictures

SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))
"""Offsets of the neighbours whose products are used: right, below, and both diagonals."""


class ImageQuality(Reward):
    """Minus the BRISQUE score: high for natural contrast; low for noise, blur and blocks (Mittal, Moorthy & Bovik 2012).

    Unit: BRISQUE points, 0 is a clean photograph and -100 a ruined one. Gradient: yes; the shape parameters of the
    distributions are interpolated, not searched, so they have a gradient too. Any channels. Made for photographs of 128 pixels
    or more; on smaller or drawn pictures only differences are meaningful.

    >>> steerfm.reward("image_quality")
    """

    name, unit, range = "image_quality", "minus BRISQUE points", (-float("inf"), float("inf"))
    support: Tensor
    coefficient: Tensor
    low: Tensor
    high: Tensor
    kernel: Tensor
    shapes: Tensor
    ratios: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in load_file(find("brisque")).items():
            self.register_buffer(name, value.float())
        facts = models()["brisque"]
        self.gamma, self.rho = facts["gamma"], facts["rho"]
        taps = torch.exp(-((torch.arange(7) - 3.0) ** 2) / (2 * (7 / 6) ** 2))
        self.register_buffer("kernel", (taps / taps.sum()).outer(taps / taps.sum()).view(1, 1, 7, 7))
        shapes = torch.linspace(0.2, 10, 2000, dtype=torch.float64)
        # E|x|^2 / E x^2 of a generalised Gaussian rises with its shape
        ratios = (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()
        self.register_buffer("shapes", shapes.float())
        self.register_buffer("ratios", ratios.float())

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) -> (b,)."""
        check_pictures(self.name, images)
        if self.kernel.device != images.device:
            self.to(images.device)
        x = images.to(self.kernel.dtype) * 255
        weights = x.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
        grey = (x * weights).sum(1, keepdim=True) if x.shape[1] == 3 else x.mean(1, keepdim=True)
        half = (max(1, grey.shape[-2] // 2), max(1, grey.shape[-1] // 2))
        smaller = F.interpolate(grey, half, mode="bicubic", antialias=True, align_corners=False)
        features = torch.cat([self._statistics(grey), self._statistics(smaller)], 1)
        features = 2 * (features - self.low) / (self.high - self.low) - 1
        distance = (features[:, None] - self.support[None]).square().sum(2)
        return -((-self.gamma * distance).exp() @ self.coefficient - self.rho)

    def _statistics(self, grey: Tensor) -> Tensor:
        """18 features of one scale: (b, 1, h, w) in 0..255 to (b, 18)."""
        mean = F.conv2d(grey, self.kernel, padding=3)
        variance = (F.conv2d(grey.square(), self.kernel, padding=3) - mean.square()).abs()
        contrast = (grey - mean) / ((variance + 1e-4).sqrt() + 1)  # the 1e-4 keeps the gradient of flat patches finite
        square = contrast.square().mean((1, 2, 3))
        features = [self._shape(contrast.abs().mean((1, 2, 3)).square() / (square + 1e-6)), square]
        for shift in SHIFTS:
            product = contrast * contrast.roll(shift, (-2, -1))
            below = _side(product, product < 0)
            above = _side(product, product > 0)
            skew = below / above
            ratio = product.abs().mean((1, 2, 3)).square() / (product.square().mean((1, 2, 3)) + 1e-6)
            shape = self._shape(ratio * (skew**3 + 1) * (skew + 1) / (skew.square() + 1).square())
            mean_of = (above - below) * (
                torch.lgamma(2 / shape) - (torch.lgamma(1 / shape) + torch.lgamma(3 / shape)) / 2
            ).exp()  # fmt: skip
            features += [shape, mean_of, below.square(), above.square()]
        return torch.stack(features, 1)

    def _shape(self, ratio: Tensor) -> Tensor:
        """Shape of the generalised Gaussian with this ratio, by linear interpolation in the table."""
        ratio = ratio.clamp(self.ratios[0], self.ratios[-1])
        right = torch.searchsorted(self.ratios, ratio.detach()).clamp(1, len(self.ratios) - 1)
        low, high = self.ratios[right - 1], self.ratios[right]
        return torch.lerp(self.shapes[right - 1], self.shapes[right], (ratio - low) / (high - low))


def _side(product: Tensor, where: Tensor) -> Tensor:
    """Root mean square of the products on one side of zero, (b,)."""
    count = where.sum((1, 2, 3)).clamp_min(1)
    return (((product * where).square().sum((1, 2, 3)) / count) + 1e-6).sqrt()
