"""The value of ``strength="auto"``, from the spread of the reward and a target effective sample size."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from steerfm.flowmap import FlowMap
from steerfm.randomness import derive
from steerfm.rewards import Reward
from steerfm.rows import Rows
from steerfm.steering.value import Problem, deviation, plain_rewards
from steerfm.steering.weights import effective_sample_size

SPREADS = 2.0
"""Increase of a reward that is normal under the model, in standard deviations."""
PLAIN, KINDS = 64, 16
"""Plain samples for the spread, and most conditions among them: four samples of each show the spread within an output."""


def automatic(flow_map: FlowMap, reward: Reward, rows: Rows, word: str) -> float:
    """The value of "auto", one for all outputs.

    Args:
        flow_map: the model.
        reward: the reward.
        rows: of the outputs.
        word: "auto".

    Raises:
        ValueError: another word, or the reward does not vary.
    """
    if word != "auto":
        raise ValueError(f"strength={word!r}: give a number, one per output, or 'auto'")
    kinds = rows.kinds()
    turns = torch.arange(PLAIN) % min(int(kinds.max()) + 1, KINDS)
    first = torch.stack([(kinds == turn).nonzero()[0, 0] for turn in turns])
    some = replace(rows[first], groups=turns.to(flow_map.device))
    problem = Problem(flow_map, reward, torch.ones(PLAIN, device=flow_map.device), some)
    values = plain_rewards(problem, [derive(0, "strength", 0, i) for i in range(PLAIN)])
    if not deviation(values):
        raise ValueError(
            f"strength='auto': reward {reward.name!r} is {values[0].item():.4g} for all {PLAIN} plain samples: give a number"
        )
    return SPREADS * one_spread(within_groups(values.cpu(), turns))


def one_spread(rewards: Tensor) -> float:
    """The strength at which importance weights exp(strength r) have an effective sample size of 1/e, for rewards (b,).

    It is at most 1 / their standard deviation. For normal rewards both are equal. With a heavy tail the strength is smaller;
    with few distinct rewards the effective sample size never gets that low.
    """
    low, high = 0.0, 1 / deviation(rewards)
    if _ess(rewards, high) < 1 / math.e:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if _ess(rewards, middle) > 1 / math.e else (low, middle)
    return high


def _ess(rewards: Tensor, strength: float) -> float:
    return effective_sample_size((strength * rewards).unsqueeze(0)).item()


def within_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Values (b,) minus the mean of their group, rescaled to an unbiased variance.

    A tilt acts within an output, so differences between prompts are not part of the spread. If values do not vary within
    groups, they are returned unchanged.
    """
    members = groups.bincount()
    means = torch.zeros(len(members), dtype=values.dtype).index_add(0, groups, values) / members
    apart = (values - means[groups]) * (members / (members - 1).clamp_min(1)).sqrt()[groups]
    return apart if deviation(apart + means[0]) else values
