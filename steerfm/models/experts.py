"""Models with two networks, one for early and one for late times, such as Wan 2.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.flowmap import FlowMap, Guided
from steerfm.interpolant import expand_time
from steerfm.models.families import LinearMap


class Experts(nn.Module):
    """Two networks as one: the first for times above a boundary, in their own time, which falls; the second below.

    Args:
        networks: by their names in the pipeline, the early one first; their weights get these names as prefixes.
        boundary: in their own time.
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float) -> None:
        super().__init__()
        self.boundary, (self.early, self.late) = boundary, networks
        for name, network in networks.items():
            self.add_module(name, network)

    def is_early(self, timestep: Tensor) -> Tensor:
        """Which rows belong to the first network, (b,), at times (b, ...)."""
        return timestep.flatten(1)[:, 0] >= self.boundary if timestep.ndim > 1 else timestep >= self.boundary

    def forward(self, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        """Call the networks, each with its own rows."""
        arguments = {"timestep": timestep, **arguments}
        early = self.is_early(timestep)
        if early.all() or not early.any():
            return self.get_submodule(self.early if early.all() else self.late)(**arguments)
        rows, outputs = [early.nonzero().flatten(), (~early).nonzero().flatten()], []
        for name, which in zip((self.early, self.late), rows):
            own = {key: value[which] if _has_rows(value, len(early)) else value for key, value in arguments.items()}
            outputs.append(self.get_submodule(name)(**own)[0])
        return (torch.cat(outputs)[torch.cat(rows).argsort()],)


def _has_rows(value: Any, b: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == b


class GuidedExperts(Guided):
    """Classifier-free guidance with one scale for the early network and another for the late one.

    Args:
        flow_map: a map of `Experts`, or a wrapper of one.
        of: the map of `Experts` itself.
        scale: for the early network.
        late: for the late network.
    """

    def __init__(self, flow_map: FlowMap, of: LinearMap, scale: float, late: float) -> None:
        super().__init__(flow_map, scale)
        self.late, self._offset, self._slope = late, of.offset, of.slope

    def _facts(self) -> list[str]:
        return [f"late {self.late:g}", *super()._facts()]

    def scale_at(self, x: Tensor, s: Tensor) -> Tensor:
        assert isinstance(self.body, Experts)
        early = self.body.is_early(self._offset + self._slope * s)
        return expand_time(torch.where(early, self.scale, self.late).to(x), x)
