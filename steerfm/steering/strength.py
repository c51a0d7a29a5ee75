"""The strength that ``strength="auto"`` stands for: in spreads of the reward, aimed at an effective sample size."""

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
"""How far a reward that is normal under the model is raised, in standard deviations."""
PLAIN, KINDS = 64, 16
"""Plain samples that tell the spread, and of how many conditions at most: four of each show how far one output's vary."""


def automatic(flow_map: FlowMap, reward: Reward, rows: Rows, word: str) -> float:
    """The strength that "auto" stands for, one for all outputs.

    Args:
        rows: of the outputs.
        word: "auto".

    Raises:
        ValueError: another word, or a reward that does not vary.
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
            f"strength='auto': reward {reward.name!r} is {values[0].item():.4g} for all of {PLAIN} plain samples: give a number"
        )
    return SPREADS * one_spread(within_groups(values.cpu(), turns))


def one_spread(rewards: Tensor) -> float:
    """The strength whose importance weights exp(strength r) have an effective sample size of 1/e among rewards (b,), and at
    most 1 / their standard deviation. For normal rewards the two are the same; a heavy tail takes less, and the weights of a
    reward of few values never fall so low."""
    low, high = 0.0, 1 / deviation(rewards)
    if _ess(rewards, high) < 1 / math.e:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if _ess(rewards, middle) > 1 / math.e else (low, middle)
    return high


def _ess(rewards: Tensor, strength: float) -> float:
    return effective_sample_size((strength * rewards).unsqueeze(0)).item()


def within_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Values (b,) less the mean of their group, scaled so that their variance is that of one: a tilt acts within an output,
    and what sets prompts apart is no spread of it. As they are where they do not vary within."""
    members = groups.bincount()
    means = torch.zeros(len(members), dtype=values.dtype).index_add(0, groups, values) / members
    apart = (values - means[groups]) * (members / (members - 1).clamp_min(1)).sqrt()[groups]
    return apart if deviation(apart + means[0]) else values
