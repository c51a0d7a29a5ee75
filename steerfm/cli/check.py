"""`steerfm rewards NAME --check`: check that a reward meets the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from steerfm import rewards, testing, zoo
from steerfm.cli.config import SteerConfig
from steerfm.cli.loading import load
from steerfm.scores import MODEL
from steerfm.testing.rewards import CHECKS, N
from steerfm.values import ConfigError

KEYS = ("reward.", "model=")


def check_reward(name: str | None, settings: Sequence[str]) -> None:
    """Check a reward on pictures of a model's shape, and print the checks that it passes.

    Args:
        name: name of the reward, or path/to/file.py:name.
        settings: key=value as for `steerfm steer`: arguments reward.KEY=, and model= for the shape of the pictures.

    Raises:
        ConfigError: the name is missing, or a key is not one of a check.
        RewardError: the reward breaks the contract. The message says how to fix it.
    """
    if name is None:
        raise ConfigError("name the reward to check: steerfm rewards NAME --check")
    for setting in settings:
        if not setting.startswith(KEYS):
            raise ConfigError(f"{setting}: a check takes reward.KEY=value, the reward's arguments, and model=NAME")
    config = load(SteerConfig, None, [f"reward={name}", *settings])
    flow_map = zoo.load(config.model)
    reward = rewards.build(config.reward)
    shape = flow_map.shape
    if reward.space != MODEL:
        shape = tuple(flow_map.decode(torch.zeros(1, *shape, dtype=flow_map.dtype)).shape[1:])
    labels = torch.arange(N) % max(1, len(flow_map.class_names))
    try:
        testing.check_reward(reward, shape, labels=labels)
    except testing.ContractError as error:
        raise rewards.RewardError(str(error)) from error
    print = Console(soft_wrap=True, markup=False, highlight=False).print
    print(f"{reward.name} meets the contract, on {reward.space if reward.space != MODEL else 'samples'} of shape {shape}:")
    for check in CHECKS:
        print(f"  {(check.__doc__ or '').splitlines()[0]}")
