"""Feature spaces for the comparison of samples with data: of shipped networks, files, or user code.

space = load_space("fashion-classifier")     # a classifier, an open_clip model, an image-text head; or FILE.py:NAME
space.features(pictures), space.reference    # (b, d), and statistics of the data's features
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfm import encoders, registry, zoo
from steerfm.flowmap import FlowMap
from steerfm.metrics.functional import (
    cubic,
    discrepancy,
    feature_statistics,
    frechet_distance,
    split_statistics,
)  # fmt: skip
from steerfm.randomness import stream

Features = Callable[[Tensor], Tensor]


@dataclass
class Reference:
    """Statistics of the data in a space.

    Attributes:
        mean: (d,) mean of the data's features.
        cov: (d, d) their covariance.
        count: number of pictures behind them.
        rows: (m, d) features of some of the data, in random order.
        texture: mean texture of the data, see `steerfm.metrics.texture`, or None.
        apart: Fréchet distance between two large parts of the data, or None.
    """

    mean: Tensor
    cov: Tensor
    count: int
    rows: Tensor
    texture: float | None = None
    apart: float | None = None

    @classmethod
    def of(cls, features: Tensor, texture: float | None = None) -> Reference:
        """The statistics of all the data's features (m, d)."""
        order = torch.randperm(len(features), generator=stream(0, "real pictures"))
        reference = cls(*feature_statistics(features), len(features), features[order], texture)
        reference.apart = reference.floor(len(features))["frechet"]
        return reference

    @classmethod
    def from_file(cls, name: str) -> Reference | None:
        """The statistics in the file next to a classifier; None if there is no file."""
        if not zoo.statistics_file(name).is_file():
            return None
        s = zoo.statistics(name)
        mean, cov = s["test_mean"], s["test_cov"]
        apart = frechet_distance(s["train_mean"], s["train_cov"], mean, cov)
        return cls(mean, cov, int(s["test_count"]), s["test_rows"], float(s["test_texture"]), apart)

    def floor(self, n: int) -> dict[str, float]:
        """The distances of real data to themselves. Fréchet: ``n`` rows (at most all rows, or half the data) against all other
        data. Kernel: one half of the rows against the other half, since an unbiased distance does not depend on numbers."""
        part, half = self.rows[: min(n, self.count // 2)], len(self.rows) // 2
        rest = split_statistics(self.mean, self.cov, self.count, part)
        return {
            "n": len(part),
            "frechet": frechet_distance(*feature_statistics(part), *rest),
            "kernel": discrepancy(self.rows[:half].double(), self.rows[half:].double(), cubic),
        }


@dataclass
class Space:
    """A network's features.

    Attributes:
        name: of the network.
        features: pictures to (b, d).
        reference: statistics of the data, or None.
        logits: features (b, d) to logits (b, classes), for a classifier.
        class_names: of the logits.
        image: features (b, d) to embeddings (b, e) of length 1, for an image-text network.
        text: prompts to embeddings (n, e).
        shape: (c, h, w) of its pictures; None for any with 1 or 3 channels.
    """

    name: str
    features: Features
    reference: Reference | None = None
    logits: Features | None = None
    class_names: tuple[str, ...] = ()
    image: Features | None = None
    text: Callable[[Sequence[str]], Tensor] | None = None
    shape: tuple[int, ...] | None = None

    def fits(self, flow_map: FlowMap) -> bool:
        """Whether the network fits a map: pictures of the same shape, and the same classes, or none."""
        shape = flow_map.shape
        takes = len(shape) == 3 and shape[0] in (1, 3) if self.shape is None else shape == self.shape
        return takes and (not self.class_names or flow_map.class_names in ((), self.class_names))

    def classes(self, pictures: Tensor) -> Tensor:
        """The most likely class of each picture, (b,)."""
        if self.logits is None:
            raise ValueError(f"{self.name} has no classes")
        return self.logits(self.features(pictures)).argmax(1)


SIDE = 32
"""Resolution, in pixels per side, for comparisons without a network."""


def pixels() -> Space:
    """The samples themselves as features; pictures and videos wider than `SIDE` are averaged to that size."""
    return Space("samples", _small)


def _small(x: Tensor) -> Tensor:
    """Pictures (b, c, h, w), videos (b, c, f, h, w) or vectors to (b, d)."""
    if x.ndim < 4 or max(x.shape[-2:]) <= SIDE:
        return x.flatten(1)
    h, w = (min(side, SIDE) for side in x.shape[-2:])
    return nn.functional.adaptive_avg_pool2d(x.flatten(1, -3), (h, w)).flatten(1)


FEATURES = registry.Kind("features", callable, "a function of pictures", "steerfm models")


def load_space(name: str, device: torch.device | str = "cpu") -> Space:
    """The space of a network.

    Args:
        name: a shipped network or a path to one of your own: a classifier, an open_clip model, an image-text head; or
            FILE.py:NAME of a function of pictures (b, c, h, w) in [0, 1] to features (b, d).

    Raises:
        ValueError: there is no such network.
        FileNotFoundError: a file is missing.
        ImportError: a package is missing; the message names it.
    """
    if registry.is_code(name):
        return Space(name, registry.build(name, FEATURES))
    file = zoo.find(name).with_suffix(".json")
    kind = json.loads(file.read_text()).get("kind") if file.is_file() else None
    if kind not in _KINDS:
        raise ValueError(f"features {name!r}: {file} is no {' nor '.join(_KINDS)}")
    return _KINDS[kind](name, device)


def _classifier(name: str, device: torch.device | str) -> Space:
    classifier = zoo.load_classifier(name)
    network: Any = classifier[0].to(device)
    return Space(name, network.features, Reference.from_file(name), network.head, classifier[1], shape=classifier[2])


def image_tower(name: str, device: torch.device | str = "cpu") -> Space:
    """The space of an open_clip model: a shipped name, or a folder."""
    clip = encoders.open_clip(name, device=device)
    return Space(name, clip.encode_image, image=nn.Identity(), text=clip.encode_text)


def _head(name: str, device: torch.device | str) -> Space:
    head = zoo.load_image_text_head(name).to(device)
    return Space(name, head.features, image=head.encode_image, text=head.encode_text)


_KINDS = {"classifier": _classifier, "open_clip": image_tower, "image_text_head": _head}
