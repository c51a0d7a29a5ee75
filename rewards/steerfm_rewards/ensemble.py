"""Rewards made of other rewards: a pessimistic ensemble, and one scale for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.rewards import Prompts, Reward, RewardError, build


def _values(
    members: Iterable[Any], images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None
) -> list[Tensor]:
    """The checked values of members, counted with the reward around them and not again; all those elsewhere at once."""
    waits = [member.begin(images, prompts, labels, groups) for member in members]
    return [wait().total for wait in waits]


class Ensemble(Reward):
    """Mean of several rewards less k of their standard deviations: high only where they agree, which is hard to hack.

    Unit: that of the members, which should share one (normalise them). Gradient: yes, where every member has one.
    (Coste et al. 2310.02743, section 3, uncertainty-weighted.)

    Args:
        members: at least two rewards, names, or {name: ..., its arguments, weight: ...}.
        k: standard deviations taken off, at least 0.

    >>> steerfm.reward("ensemble", members=[{"name": "classifier", "target": "Bag"}, {"name": "judge", "target": "Bag"}], k=1.0)
    """

    name, unit, range = "ensemble", "as its members", (-float("inf"), float("inf"))

    def __init__(self, members: Sequence[Any], k: float = 1.0) -> None:
        super().__init__()
        built = [build(member) for member in members]
        if len(built) < 2 or k < 0:
            raise RewardError(f"reward 'ensemble' has {len(built)} members and k={k}: give two or more, and k of at least 0")
        self.members, self.k = nn.ModuleList(built), float(k)
        self.take_facts(built)

    def score(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """images (b, c, h, w), and the group of each (b,) where a member compares pictures -> (b,)."""
        values = torch.stack(_values(self.members, images, prompts, labels, groups))
        deviation = (values.var(0, correction=0) + 1e-12).sqrt()  # finite gradient where all agree
        return values.mean(0) - self.k * deviation


class Normalised(Reward):
    """Another reward in standard units: (r - mean) / std, so that weights of a sum mean the same for every term.

    Unit: standard deviations of the reward over the base's samples, or over whatever mean and std were measured on.
    Gradient: as the reward.

    Args:
        reward: a reward, a name, or {name: ..., its arguments, weight: ...}.
        mean, std: of the reward; ``result.json`` of a run of best_of_n has them, and `Normalised.on` measures them.

    >>> steerfm.reward("normalised", reward={"name": "sharpness"}, mean=-3.1, std=0.4)
    """

    name, unit, range = "normalised", "standard deviations", (-float("inf"), float("inf"))

    def __init__(self, reward: Any, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        if not std > 0:
            raise RewardError(f"reward 'normalised' has std={std}: must be above 0")
        self.member, self.mean, self.std = build(reward), float(mean), float(std)
        self.name = f"normalised {self.member.name}"
        self.take_facts([self.member])

    @classmethod
    def on(cls, reward: Any, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Normalised:
        """Normalised by what the reward says of these pictures (b, c, h, w)."""
        made = build(reward)
        with torch.no_grad():
            values = made(images, prompts, labels)
        return cls(made, values.mean().item(), max(values.std().item(), 1e-6))

    def score(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """images (b, c, h, w), and the group of each (b,) where the reward compares pictures -> (b,)."""
        return (_values([self.member], images, prompts, labels, groups)[0] - self.mean) / self.std
