"""`steerfm rewards NAME --check`: whether a reward keeps the contract."""

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
    """Check a reward on pictures as a model draws them, and say what holds.

    Args:
        name: of the reward, or path/to/file.py:name.
        settings: key=value as for `steerfm steer`: arguments reward.KEY=, and model= for its shape of pictures.

    Raises:
        ConfigError: no name, or a key that a check has no use for. RewardError: what is wrong with the reward, and its mending.
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
    print(f"{reward.name} keeps the contract, on {reward.space if reward.space != MODEL else 'samples'} of shape {shape}:")
    for check in CHECKS:
        print(f"  {(check.__doc__ or '').splitlines()[0]}")
