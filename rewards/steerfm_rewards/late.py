"""Rewards with heavy networks: loaded on the first call, once a process, and moved to where the pictures are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from steerfm.rewards import Reward, RewardError


class LateReward(Reward):
    """A reward whose network is not one of its own submodules: all rewards of a process that name it share it."""

    def load(self) -> nn.Module:
        """The hook that authors write: the network, from a cache after the first call.

        Raises:
            ImportError, ValueError, FileNotFoundError: it cannot be had; the message says what to install or to put where.
        """
        raise NotImplementedError(f"reward {self.name!r} does not define load()")

    def network(self, device: torch.device | str = "cpu") -> Any:
        """The network, on a device.

        Raises:
            RewardError: it cannot be had.
        """
        with torch.inference_mode(False):  # the first call may be of a run without gradients, the next one of a run with them
            try:
                network = self.load()
            except (ImportError, ValueError, FileNotFoundError) as error:
                raise RewardError(f"reward {self.name!r}: {error}") from None
            if next(network.parameters()).device != torch.device(device):
                network.to(device)
        return network

    def offload(self) -> None:
        """Move the network to the CPU, to free an accelerator between calls; the next call moves it back."""
        self.network("cpu")
