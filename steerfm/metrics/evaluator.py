"""What the samples of a model are measured with: the features, the judge and the data that its card names.

    "card": {
        "data": "fashion",                                       # whose pictures and prompts are known, where it is installed;
                                                                 # {"name": "folder", "root": "pictures/", ...} for one's own
        "features": ["fashion-classifier", "fashion-judge"],     # see `load_space`; distances are in all, the first counts
        "judge": {"name": "judge", "model": "fashion-judge"},    # a held-out reward, as configurations write it
        "watch": "fashion-classifier"                            # of the features: what tuning is watched in; the first
    }

A card without them has those of the shipped model of the same data, where its shape and its classes are that model's. Of other
models nothing is known: they are measured by their samples alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from steerfm import files, registry, rewards, zoo
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.metrics.functional import texture
from steerfm.metrics.spaces import Reference, Space, image_tower, load_space, pixels
from steerfm.rewards import Reward

FEWEST = 10
"""Pictures of the data, at least, that distances are measured to."""
KEYS = ("data", "features", "judge", "watch")
"""The keys of a card that say what a model is measured with."""


@runtime_checkable
class Pictured(Protocol):
    """What a data set says of itself to the evaluator."""

    def reference(self) -> Tensor:
        """Pictures (m, c, h, w) in [0, 1] that samples are held against."""
        ...

    def prompts(self, held_out: bool) -> list[str]:
        """What a model may be asked for: captions of what it was trained on, or of what it was not."""
        ...

    def folder(self) -> Path:
        """Where features may be kept."""
        ...


@runtime_checkable
class Specified(Pictured, Protocol):
    """A data set that a name alone does not tell: a folder of one's own pictures."""

    def spec(self) -> dict[str, Any]:
        """{"name": NAME, argument: value}, by which `steerfm.zoo.pictured` makes it again."""
        ...

    def digest(self) -> str:
        """Of all that is trained on: a training that goes on goes on with the same."""
        ...


@runtime_checkable
class OfClass(Protocol):
    """A reward of one class of pictures of one shape, such as a classifier's; target None is the class of each label."""

    target: int | None
    class_names: tuple[str, ...]
    shape: tuple[int, ...]


Progress = Callable[[str, int], AbstractContextManager[Callable[[int, int], Any]]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int, int], Any]]:
    """No progress bar."""
    yield lambda done, total: None


class Evaluator:
    """What a model is measured with. Nothing is loaded before it is needed.

    Args:
        flow_map: the model.
        device: of the features' networks; default that of the model.
        progress: (what, total) to a context that gives tick(done, total).

    Attributes:
        gaps: what the card names and cannot be had here, and why: a line each, once the spaces are loaded.
    """

    def __init__(self, flow_map: FlowMap, device: torch.device | str | None = None, progress: Progress = silent) -> None:
        self.flow_map, self.device, self.progress = flow_map, device or flow_map.device, progress
        self.card: Mapping[str, Any] = card(flow_map)
        self.gaps: list[str] = []
        self._loaded: dict[str, Space | None] = {}

    # --- features --------------------------------------------------------------------------------------------------
    @cached_property
    def spaces(self) -> dict[str, Space]:
        """By name, in the order of the card: those that are installed and know what the model draws."""
        named = ((name, self._space(name)) for name in self.card.get("features", ()))
        return {name: space for name, space in named if space is not None}

    @property
    def first(self) -> Space:
        """The space that counts; the samples themselves where there is none."""
        return next(filter(None, map(self._space, self.card.get("features", ()))), pixels())

    @property
    def watch(self) -> Space:
        """The space that tuning is watched in; for a map of words that has none, the image tower beside its text tower."""
        named = self.card.get("watch")
        if named and (space := self._space(named)):
            return space
        text = self.flow_map.text if isinstance(self.flow_map, NeuralFlowMap) else None
        if not self.card.get("features") and text is not None and text.has_image_tower:
            tower = image_tower(text.model, self.device)
            return tower if tower.fits(self.flow_map) else pixels()
        return self.first

    @property
    def judged(self) -> Space | None:
        """The space of the judge's own network, where it is one of the features."""
        judge = self.card.get("judge")
        return self.spaces.get(str(judge.get("model"))) if isinstance(judge, Mapping) else None

    def reference(self, space: Space) -> Reference | None:
        """What is known of the data in a space: what ships beside its network, or what the data's own pictures say.

        Raises:
            FileNotFoundError: the data are not prepared, or not where the card says.
        """
        if space.reference is None and space.name in self.card.get("features", ()) and self.pictures is not None:
            if len(self.pictures) < FEWEST:
                self.gaps.append(
                    f"no distances by {space.name}: the data hold out {len(self.pictures)} pictures, {FEWEST} are needed"
                )
            else:
                features = self._features(space, self.pictures)
                space.reference = Reference.of(features, float(texture(self.pictures).mean()))
        return space.reference

    @cached_property
    def pictures(self) -> Tensor | None:
        """The data's own, (m, c, h, w) in [0, 1], where the model draws such ones.

        Raises:
            FileNotFoundError: as `reference`.
        """
        if self.data is None:
            return None
        try:
            pictures = self.data.reference()
        except FileNotFoundError as error:
            if not isinstance(self.data, Specified):
                raise
            raise FileNotFoundError(
                f"{error}; the model was trained on it: run where it is, or mend data in its JSON"
            ) from None
        return pictures if pictures.shape[1:] == self.flow_map.shape else None

    def _space(self, name: str) -> Space | None:
        if name not in self._loaded:
            try:
                space = load_space(name, self.device)
                self._loaded[name] = space if space.fits(self.flow_map) else None
                if self._loaded[name] is None:
                    self.gaps.append(f"nothing by {name}: it knows other pictures or classes than this model draws")
            except ImportError as error:
                self._loaded[name] = None
                self.gaps.append(f"nothing by {name}: {error}")
        return self._loaded[name]

    def _features(self, space: Space, pictures: Tensor) -> Tensor:
        """Of the data's pictures, kept beside them."""
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
        """The data set that the card names, where it is installed and has pictures and prompts to show."""
        return zoo.pictured(self.card.get("data"))

    # --- the judge -------------------------------------------------------------------------------------------------
    def judge(self, reward: Reward | None, labels: bool, prompts: bool) -> Reward | None:
        """The held-out reward of what is asked for; None where the card's judge cannot tell, or cannot be had here.

        Args:
            reward: that is optimised: a judge of classes judges the class that it is for.
            labels, prompts: whether classes and whether words are asked for.
        """
        spec = self.card.get("judge")
        if spec is None or not _installed(spec):
            return None
        made = rewards.build(spec)
        if any(importlib.util.find_spec(package) is None for package in made.packages):
            return None
        if isinstance(made, OfClass):
            if made.class_names != self.flow_map.class_names or tuple(made.shape) != self.flow_map.shape:
                return None
            if isinstance(reward, OfClass) and reward.target is not None and reward.class_names == made.class_names:
                return rewards.build({**_mapping(spec), "target": made.class_names[reward.target]})
        given = {"labels": labels, "prompts": prompts and not labels}
        return made if all(given.get(need, False) for need in made.needs) else None


def card(flow_map: FlowMap) -> Mapping[str, Any]:
    """The card that says what a model is measured with: its own, or the shipped model's of the same data."""
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
    """A name for the features of a network: of a file of one's own, also what it holds, since that changes."""
    file = Path(name.rpartition(":")[0] if registry.is_code(name) else zoo.find(name))
    own = name not in zoo.models() and file.is_file()
    return f"{Path(name).stem}-{files.digest(file)[:16]}" if own else Path(name).stem


def _mapping(spec: Any) -> dict[str, Any]:
    name, arguments = registry.split_spec(spec, "judge")
    return {"name": name, **arguments}


def _installed(spec: Any) -> bool:
    name, _ = registry.split_spec(spec, "judge")
    return registry.is_code(name) or name in rewards.available()
