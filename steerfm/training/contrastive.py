"""Training of image-text models: contrastive, and made robust against small changes of the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerfm.training.module import Trained


class ContrastiveTraining(Trained):
    """Train an image-text model (open_clip's) contrastively: CLIP's loss (Radford et al. 2103.00020, figure 3) with all
    pictures of one concept in a batch as each other's positives, in equal shares.

    Args:
        network: with ``encode_image(x, normalize)``, ``encode_text(tokens, normalize)`` and ``logit_scale``.
        tokenizer: captions to what ``encode_text`` takes.
        prepare: pictures (b, c, h, w) in [0, 1] to what the network takes.
        slow: names of the parts with pretrained weights; they learn at ``slow_rate`` times the rate.
        noise: largest standard deviation of Gaussian noise added to the training pictures, drawn for each.
        options: arguments of `Trained`.
    """

    network: Any

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Callable[[list[str]], Any],
        prepare: Callable[[Tensor], Tensor],
        slow: tuple[str, ...] = (),
        slow_rate: float = 0.2,
        noise: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.tokenizer, self.prepare, self.slow, self.slow_rate, self.noise = tokenizer, prepare, slow, slow_rate, noise
        self._held_out: list[tuple[Tensor, Tensor, Tensor]] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[name.startswith(self.slow) if self.slow else False].append(parameter)
        return [{"params": groups[slow], "lr": self.lr * (self.slow_rate if slow else 1.0)} for slow in groups if groups[slow]]

    def training_step(self, batch: tuple[Tensor, list[str], Tensor], batch_index: int) -> Tensor:
        pictures, captions, concepts = batch
        pictures = self._noisy(pictures)
        image, text = self._embed(self.network, pictures, captions)
        logits = self.network.logit_scale.exp().clamp_max(100) * image @ text.T
        same = (concepts[:, None] == concepts[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _noisy(self, pictures: Tensor) -> Tensor:
        if not self.noise:
            return pictures
        level = self.noise * torch.rand(len(pictures), 1, 1, 1, generator=self.generator)
        noise = torch.randn(pictures.shape, generator=self.generator)
        return (pictures + (level * noise).to(pictures)).clamp(0, 1)

    def _embed(self, network: Any, pictures: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions)
        tokens = tokens.to(pictures.device) if isinstance(tokens, Tensor) else tokens
        return network.encode_image(self.prepare(pictures), normalize=True), network.encode_text(tokens, normalize=True)

    def validation_step(self, batch: tuple[Tensor, list[str], Tensor], batch_index: int) -> None:
        pictures, captions, concepts = batch
        self._held_out.append((*self._embed(self.ema.eval(), pictures, captions), concepts))

    def on_validation_epoch_end(self) -> None:
        """Recall at 1, 5 and 10 among the held-out concepts, one style at a time, both ways."""
        image, text, concept = (torch.cat(part) for part in zip(*self._held_out))
        self._held_out.clear()
        starts = (concept.diff() < 0).nonzero().flatten().add(1).tolist()
        found: dict[str, list[float]] = {}
        for begin, end in zip([0, *starts], [*starts, len(concept)]):
            cosine = image[begin:end] @ text[begin:end].T
            for way, table in {"image to text": cosine, "text to image": cosine.T}.items():
                rank = (table > table.diagonal()[:, None]).sum(1)
                for k in (1, 5, 10):
                    found.setdefault(f"{way} R@{k}", []).append((rank < k).float().mean().item())
        for name, values in found.items():
            self.log(f"val/{name}", sum(values) / len(values), prog_bar="R@5" in name)


class RobustTraining(ContrastiveTraining):
    """Train the image tower to give, under the worst small change of each picture, the embedding that a teacher gives to the
    picture itself: |phi(x + delta) - phi_teacher(x)|^2 (FARE, Schlarmann et al. 2402.12336, equation 4, in L2). A reward made
    of it has a gradient that is harder to hack. The text tower stays as it is.

    Args:
        network: its image tower starts with ``visual``.
        teacher: pictures (b, c, h, w) in [0, 1] to embeddings (b, d) of length 1, on the CPU.
        radius: largest L2 length of a change, drawn for each picture; it is found by one step from a random start (Wong et al.
            2001.03994).
        samples: pictures (n, c, h, w) to mix in, half of each batch, such as a generative model's own; None for none.
        options: arguments of `ContrastiveTraining`.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Callable[[list[str]], Any],
        prepare: Callable[[Tensor], Tensor],
        teacher: Callable[[Tensor], Tensor],
        radius: float,
        samples: Tensor | None = None,
        **options: Any,
    ) -> None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("visual"))
        super().__init__(network, tokenizer, prepare, **options)
        self.teacher, self.radius, self.samples = teacher, radius, samples

    def training_step(self, batch: tuple[Tensor, list[str], Tensor], batch_index: int) -> Tensor:
        pictures = batch[0]
        if self.samples is not None:
            half = len(pictures) // 2
            rows = torch.randint(len(self.samples), (half,), generator=self.generator)
            pictures = torch.cat([pictures[half:], self.samples[rows].to(pictures)])
        goal = self.teacher(pictures.cpu()).to(pictures)
        loss = self._distance(self._worst(self._noisy(pictures), goal), goal).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _distance(self, pictures: Tensor, goal: Tensor) -> Tensor:
        image = self.network.encode_image(self.prepare(pictures), normalize=True)
        return (image - goal).square().sum(1)

    def _worst(self, pictures: Tensor, goal: Tensor) -> Tensor:
        """Pictures moved to where the embedding is farther off, each by no more than a length drawn for it."""
        radius = self.radius * torch.rand(len(pictures), 1, 1, 1, generator=self.generator).to(pictures)
        start = torch.randn(pictures.shape, generator=self.generator).to(pictures)
        change = (start * radius / _length(start)).requires_grad_()
        (slope,) = torch.autograd.grad(self._distance((pictures + change).clamp(0, 1), goal).sum(), change)
        change = change.detach() + 1.25 * radius * slope / _length(slope)
        return (pictures + change * (radius / _length(change)).clamp_max(1)).clamp(0, 1)


def _length(pictures: Tensor) -> Tensor:
    """L2 (b, 1, 1, 1)."""
    return pictures.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
