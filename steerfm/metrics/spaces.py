"""Spaces of features, in which samples are held against data: of shipped networks, of files and of code of one's own.

space = load_space("fashion-classifier")     # a classifier, an open_clip model, an image-text head; or FILE.py:NAME
space.features(pictures), space.reference    # (b, d), and what is known of the data's features
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
    """What is known of the data in a space.

    Attributes:
        mean, cov: (d,) and (d, d) of the data's features.
        count: of the data that they are of.
        rows: (m, d) of some of the data, in random order.
        texture: mean of the data's, see `steerfm.metrics.texture`, or None.
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
        """Of all the data's features (m, d)."""
        order = torch.randperm(len(features), generator=stream(0, "real pictures"))
        known = cls(*feature_statistics(features), len(features), features[order], texture)
        known.apart = known.floor(len(features))["frechet"]
        return known

    @classmethod
    def shipped(cls, name: str) -> Reference | None:
        """What the file of statistics beside a classifier holds; None where there is none."""
        if not zoo.statistics_file(name).is_file():
            return None
        s = zoo.statistics(name)
        mean, cov = s["test_mean"], s["test_cov"]
        apart = frechet_distance(s["train_mean"], s["train_cov"], mean, cov)
        return cls(mean, cov, int(s["test_count"]), s["test_rows"], float(s["test_texture"]), apart)

    def floor(self, n: int) -> dict[str, float]:
        """What data would get: ``n`` of them (or as many as there are rows, or half of the data) against all the others, and
        one half of the rows against the other half; an unbiased distance needs no equal numbers."""
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
        reference: what is known of the data, or None.
        logits: features (b, d) to logits (b, classes), of a network that knows classes.
        class_names: of these.
        image: features (b, d) to embeddings (b, e) of length 1, of a network that knows words.
        text: prompts to (n, e).
        shape: (c, h, w) of the pictures that it takes; None for any of 1 or 3 channels.
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
        """Whether its network knows what a map draws: pictures of its shape, and no other classes than its own."""
        shape = flow_map.shape
        takes = len(shape) == 3 and shape[0] in (1, 3) if self.shape is None else shape == self.shape
        return takes and (not self.class_names or flow_map.class_names in ((), self.class_names))

    def classes(self, pictures: Tensor) -> Tensor:
        """The most likely class of each picture, (b,)."""
        if self.logits is None:
            raise ValueError(f"{self.name} knows no classes")
        return self.logits(self.features(pictures)).argmax(1)


SIDE = 32
"""Pixels of a side that are told apart where no network looks at pictures."""


def pixels() -> Space:
    """The samples themselves, of which no network knows anything; of pictures and videos wider than `SIDE` means of pixels."""
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
        ValueError, FileNotFoundError: there is none. ImportError: naming the package that it needs.
    """
    if registry.is_code(name):
        return Space(name, registry.build(name, FEATURES))
    file = zoo.find(name).with_suffix(".json")
    kind = json.loads(file.read_text()).get("kind") if file.is_file() else None
    if kind not in _KINDS:
        raise ValueError(f"features {name!r}: {file} is no {' nor '.join(_KINDS)}")
    return _KINDS[kind](name, device)


def _classifier(name: str, device: torch.device | str) -> Space:
    made = zoo.load_classifier(name)
    network: Any = made[0].to(device)
    return Space(name, network.features, Reference.shipped(name), network.head, made[1], shape=made[2])


def image_tower(name: str, device: torch.device | str = "cpu") -> Space:
    """That of an open_clip model: a shipped name, or a folder."""
    clip = encoders.open_clip(name, device=device)
    return Space(name, clip.encode_image, image=nn.Identity(), text=clip.encode_text)


def _head(name: str, device: torch.device | str) -> Space:
    head = zoo.load_image_text_head(name).to(device)
    return Space(name, head.features, image=head.encode_image, text=head.encode_text)


_KINDS = {"classifier": _classifier, "open_clip": image_tower, "image_text_head": _head}
