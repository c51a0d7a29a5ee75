"""Training of classifiers of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerfm.training.module import Trained


class ClassifierTraining(Trained):
    """Train a classifier of pictures: cross entropy with label smoothing; `ema` is the network to ship.

    Args:
        network: pictures (b, c, h, w) in [0, 1] -> logits (b, classes).
        smoothing: label smoothing, in [0, 1).
        noise: standard deviation of Gaussian noise added to the training pictures.
        options: arguments of `Trained`.
    """

    def __init__(self, network: nn.Module, smoothing: float = 0.1, noise: float = 0.0, **options: Any) -> None:
        super().__init__(network, **options)
        self.smoothing, self.noise = smoothing, noise

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        pictures, labels = batch
        if self.noise:
            pictures = pictures + self.noise * torch.randn(pictures.shape, generator=self.generator).to(pictures)
        loss = F.cross_entropy(self.network(pictures), labels, label_smoothing=self.smoothing)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        pictures, labels = batch
        network = self.ema.eval()
        right = (network(pictures).argmax(1) == labels).float().mean()
        self.log("val/accuracy", right, prog_bar=True, batch_size=len(labels), sync_dist=True)
