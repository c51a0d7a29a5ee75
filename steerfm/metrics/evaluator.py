"""The metrics of a model: features, judge and data set, from its card.

    "card": {
        "data": "fashion",                                       # an installed data set, for its pictures and prompts;
                                                                 # your own: {"name": "folder", "root": "pictures/", ...}
        "features": ["fashion-classifier", "fashion-judge"],     # see `load_space`; the first one counts
        "judge": {"name": "judge", "model": "fashion-judge"},    # a held-out reward, as in configurations
        "watch": "fashion-classifier"                            # features to watch tuning in; default the first
    }

A card without these keys takes those of the shipped model of the same data, if shape and classes are equal. For other models
only the samples themselves are measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from steerfm import files, registry, rewards, zoo
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.metrics.functional import texture
from steerfm.metrics.progress import Progress, silent
from steerfm.metrics.spaces import Reference, Space, image_tower, load_space, pixels
from steerfm.rewards import Reward

FEWEST = 10
"""Fewest pictures of the data for distances."""
KEYS = ("data", "features", "judge", "watch")
"""The keys of a card that define the metrics."""


@runtime_checkable
class Pictured(Protocol):
    """The interface of a data set for the evaluator."""

    def reference(self) -> Tensor:
        """Pictures (m, c, h, w) in [0, 1] for comparison with samples."""
        ...

    def prompts(self, held_out: bool) -> list[str]:
        """Prompts: captions of training data, or of held-out data."""
        ...

    def folder(self) -> Path:
        """A folder for cached features."""
        ...


@runtime_checkable
class Specified(Pictured, Protocol):
    """A data set that needs more than a name, such as a folder of pictures."""

    def spec(self) -> dict[str, Any]:
        """{"name": NAME, argument: value}, from which `steerfm.zoo.pictured` rebuilds it."""
        ...

    def digest(self) -> str:
        """A digest of all training data, so that a resumed training can check that they are the same."""
        ...


@runtime_checkable
class OfClass(Protocol):
    """A reward for a class of pictures, such as that of a classifier; with target None, the class of each label."""

    target: int | None
    class_names: tuple[str, ...]
    shape: tuple[int, ...]


class Evaluator:
    """The metrics of a model. Everything loads on first use.

    Args:
        flow_map: the model.
        device: of the feature networks; default that of the model.
        progress: shows a bar; default none.

    Attributes:
        gaps: entries of the card that are not available here, with the reason, one line each; complete once the spaces are
            loaded.
    """

    def __init__(self, flow_map: FlowMap, device: torch.device | str | None = None, progress: Progress = silent) -> None:
        self.flow_map, self.device, self.progress = flow_map, device or flow_map.device, progress
        self.card: Mapping[str, Any] = card(flow_map)
        self.gaps: list[str] = []
        self._spaces: dict[str, Space | None] = {}

    # --- features --------------------------------------------------------------------------------------------------
    @cached_property
    def spaces(self) -> dict[str, Space]:
        """The feature spaces by name, in the order of the card: those that are installed and fit the model."""
        spaces = ((name, self._space(name)) for name in self.card.get("features", ()))
        return {name: space for name, space in spaces if space is not None}

    @property
    def first(self) -> Space:
        """The space that counts; that of the samples themselves if there is no other."""
        return next(filter(None, map(self._space, self.card.get("features", ()))), pixels())

    @property
    def watch(self) -> Space:
        """The space for watching tuning; for a text-conditional map without one, the image tower of its text encoder."""
        name = self.card.get("watch")
        if name and (space := self._space(name)):
            return space
        text = self.flow_map.text if isinstance(self.flow_map, NeuralFlowMap) else None
        if not self.card.get("features") and text is not None and text.has_image_tower:
            tower = image_tower(text.model, self.device)
            return tower if tower.fits(self.flow_map) else pixels()
        return self.first

    @property
    def judged(self) -> Space | None:
        """The space of the judge's own network, if it is one of the features."""
        judge = self.card.get("judge")
        return self.spaces.get(str(judge.get("model"))) if isinstance(judge, Mapping) else None

    def reference(self, space: Space) -> Reference | None:
        """Statistics of the data in a space: shipped with its network, or computed from the data's pictures.

        Raises:
            FileNotFoundError: the data are not prepared, or not at the place in the card.
        """
        if space.reference is None and space.name in self.card.get("features", ()) and self.pictures is not None:
            if len(self.pictures) < FEWEST:
                self.gaps.append(
                    f"no distances by {space.name}: the data have {len(self.pictures)} held-out pictures, {FEWEST} are needed"
                )
            else:
                features = self._features(space, self.pictures)
                space.reference = Reference.of(features, float(texture(self.pictures).mean()))
        return space.reference

    @cached_property
    def pictures(self) -> Tensor | None:
        """Pictures of the data, (m, c, h, w) in [0, 1], if they have the shape of the model's samples.

        Raises:
            FileNotFoundError: as in `reference`.
        """
        if self.data is None:
            return None
        try:
            pictures = self.data.reference()
        except FileNotFoundError as error:
            if not isinstance(self.data, Specified):
                raise
            raise FileNotFoundError(
                f"{error}; the model was trained on it: run where it exists, or correct data in its JSON"
            ) from None
        return pictures if pictures.shape[1:] == self.flow_map.shape else None

    def _space(self, name: str) -> Space | None:
        if name not in self._spaces:
            try:
                space = load_space(name, self.device)
                self._spaces[name] = space if space.fits(self.flow_map) else None
                if self._spaces[name] is None:
                    self.gaps.append(f"no metrics by {name}: it is for other pictures or classes than those of this model")
            except ImportError as error:
                self._spaces[name] = None
                self.gaps.append(f"no metrics by {name}: {error}")
        return self._spaces[name]

    def _features(self, space: Space, pictures: Tensor) -> Tensor:
        """Features of the data's pictures, cached next to them."""
        assert self.data is not None
        file = self.data.folder() / f"features-{_version(space.name)}-{len(pictures)}.safetensors"
        if not file.is_file():
            parts = []
            with torch.inference_mode(), self.progress("features of the data", len(pictures)) as tick:
                for part in pictures.split(256):
                    parts.append(space.features(part.to(self.device)).cpu())
                    tick(sum(map(len, parts)), len(pictures))
            files.write_tensors(file, {"features": torch.cat(parts).clone()})
        return load_file(file)["features"]

    @cached_property
    def data(self) -> Pictured | None:
        """The data set in the card, if it is installed and has pictures and prompts."""
        return zoo.pictured(self.card.get("data"))

    # --- the judge -------------------------------------------------------------------------------------------------
    def judge(self, reward: Reward | None, labels: bool, prompts: bool) -> Reward | None:
        """The held-out reward; None if the card's judge does not apply or is not installed.

        Args:
            reward: the reward to optimise; a judge of classes takes its target class.
            labels: whether outputs have classes.
            prompts: whether outputs have prompts.
        """
        spec = self.card.get("judge")
        if spec is None or not _is_installed(spec):
            return None
        out = rewards.build(spec)
        if any(importlib.util.find_spec(package) is None for package in out.packages):
            return None
        if isinstance(out, OfClass):
            if out.class_names != self.flow_map.class_names or tuple(out.shape) != self.flow_map.shape:
                return None
            if isinstance(reward, OfClass) and reward.target is not None and reward.class_names == out.class_names:
                return rewards.build({**_mapping(spec), "target": out.class_names[reward.target]})
        requests = {"labels": labels, "prompts": prompts and not labels}
        return out if all(requests.get(need, False) for need in out.needs) else None


def card(flow_map: FlowMap) -> Mapping[str, Any]:
    """The card with the metrics of a model: its own, or that of the shipped model of the same data."""
    own = flow_map.card
    if own.get("features") or own.get("judge") or not own.get("data"):
        return own
    for head in zoo.models().values():
        shipped = head.get("card", {})
        same = head["kind"] == "flow_map" and shipped.get("data") == own["data"]
        if same and tuple(head["shape"]) == flow_map.shape and flow_map.class_names in ((), tuple(head["class_names"])):
            return {**shipped, **own}
    return own


def _version(name: str) -> str:
    """A name for the cached features of a network; for a user's file it includes a digest, since the file can change."""
    file = Path(name.rpartition(":")[0] if registry.is_code(name) else zoo.find(name))
    own = name not in zoo.models() and file.is_file()
    return f"{Path(name).stem}-{files.digest(file)[:16]}" if own else Path(name).stem


def _mapping(spec: Any) -> dict[str, Any]:
    name, arguments = registry.split_spec(spec, "judge")
    return {"name": name, **arguments}


def _is_installed(spec: Any) -> bool:
    name, _ = registry.split_spec(spec, "judge")
    return registry.is_code(name) or name in rewards.available()
