"""Rewards built from other rewards: a pessimistic ensemble, and a reward in standard units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.rewards import Prompts, Reward, RewardError, build


def _values(
    members: Iterable[Any], images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None
) -> list[Tensor]:
    """Return the checked values of the members. Remote members are queried at the same time, and calls are counted once."""
    waits = [member.begin(images, prompts, labels, groups) for member in members]
    return [wait().total for wait in waits]


class Ensemble(Reward):
    """Mean of several rewards minus k standard deviations: high only where they agree, which is hard to hack.

    Unit: that of the members, which should all have the same one (normalise them). Gradient: yes, if every member has one.
    (Coste et al. 2310.02743, section 3, uncertainty-weighted.)

    Args:
        members: two or more rewards, as objects, names, or {name: ..., arguments, weight: ...}.
        k: number of standard deviations to subtract, at least 0.

    >>> steerfm.reward("ensemble", members=[{"name": "classifier", "target": "Bag"}, {"name": "judge", "target": "Bag"}], k=1.0)
    """

    name, unit, range = "ensemble", "as its members", (-float("inf"), float("inf"))

    def __init__(self, members: Sequence[Any], k: float = 1.0) -> None:
        super().__init__()
        rewards = [build(member) for member in members]
        if len(rewards) < 2 or k < 0:
            raise RewardError(f"reward 'ensemble' has {len(rewards)} members and k={k}: give two or more, and k of at least 0")
        self.members, self.k = nn.ModuleList(rewards), float(k)
        self.take_facts(rewards)

    def score(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """images (b, c, h, w), and the group of each (b,) if a member compares pictures -> (b,)."""
        values = torch.stack(_values(self.members, images, prompts, labels, groups))
        deviation = (values.var(0, correction=0) + 1e-12).sqrt()  # finite gradient if all agree
        return values.mean(0) - self.k * deviation


class Normalised(Reward):
    """Another reward in standard units, (r - mean) / std, so that weights in a sum mean the same for every term.

    Unit: standard deviations of the reward over the samples on which mean and std were measured. Gradient: as the reward.

    Args:
        reward: a reward, a name, or {name: ..., arguments, weight: ...}.
        mean: mean of the reward over samples of the base. `Normalised.on` measures it.
        std: standard deviation of the reward over the same samples, above 0.

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
        """Normalise a reward by its mean and standard deviation on these pictures (b, c, h, w)."""
        member = build(reward)
        with torch.no_grad():
            values = member(images, prompts, labels)
        return cls(member, values.mean().item(), max(values.std().item(), 1e-6))

    def score(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """images (b, c, h, w), and the group of each (b,) if the reward compares pictures -> (b,)."""
        return (_values([self.member], images, prompts, labels, groups)[0] - self.mean) / self.std
