"""A map with adapted initial noise: the result of training a noise-space adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.capabilities import GENERATOR, can
from steerfm.flowmap import FlowMap, Wrapped
from steerfm.rows import Condition

KEY = "moves_noise"
"""The key of such a map in its JSON; its value is the number of jumps."""


class MovedNoise(Wrapped):
    """X_{0,1}(x_0) = Y(x_0 + f(x_0)): Y is a fixed map, f the difference between an adapter's output for the noise and Y's own.

    It is a generator: there is no state between noise and data. (HyperNoise, Eyring et al. 2508.09968.)

    Args:
        flow_map: Y.
        adapter: the map with the trained network, which is saved.
        jumps: number of jumps of Y.
        of: name of Y for `steerfm.load`, as saved in a file.
    """

    def __init__(self, flow_map: FlowMap, adapter: FlowMap, jumps: int = 1, of: str | Mapping[str, Any] = "") -> None:
        super().__init__(flow_map)
        self.take_after(adapter)
        self.adapter, self.jumps, self.of, self.origin = adapter, jumps, of, adapter.origin
        self.evaluations = flow_map.evaluations * (2 + jumps)
        self.capabilities, self.transition, self.steps = GENERATOR, None, 1

    @property
    def body(self) -> nn.Module:
        return self.adapter.body

    def with_network(self, network: nn.Module) -> MovedNoise:
        other = copy.copy(self)
        other._modules = {**self._modules, "adapter": self.adapter.with_network(network)}
        return other

    def head(self, architecture: Mapping[str, Any] | None = None, origin: str | Mapping[str, Any] = "") -> dict[str, Any]:
        if not (origin := origin or self.of):
            raise ValueError("the base model is missing: give origin=, the model that this one was fine-tuned from")
        return self.adapter.head(architecture, origin) | {KEY: self.jumps}

    def grid(self, steps: int) -> list[float]:
        return FlowMap.grid(self, steps)

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        y = x + answer(self.adapter, x, cond) - answer(self.flow_map, x, cond)
        for begin, end in pairwise(self.flow_map.grid(self.jumps)):
            now, then = torch.full_like(s, begin), torch.full_like(s, end)
            y = y + (end - begin) * self.flow_map.average_velocity(y, now, then, cond)
        return y - x


def answer(flow_map: FlowMap, x0: Tensor, cond: Condition) -> Tensor:
    """The network's output for noise (b, *shape): its velocity, or without one that of the jump to the data."""
    start = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    if can(flow_map, "velocity"):
        return flow_map.instantaneous_velocity(x0, start, cond)
    return flow_map.average_velocity(x0, start, torch.ones_like(start), cond)
