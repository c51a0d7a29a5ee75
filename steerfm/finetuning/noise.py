"""A noise-space adapter: the generator stays the same, only its initial noise changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm.capabilities import can, needs
from steerfm.finetuning.base import Law, Terms, Update
from steerfm.flowmap import FlowMap
from steerfm.models.moved_noise import MovedNoise
from steerfm.rows import Condition
from steerfm.sampling import Noise


@dataclass(frozen=True)
class HyperNoise:
    """HyperNoise (Eyring et al. 2508.09968, equation 9): x_0 + f(x_0) through the frozen map, with penalty mean f^2 / 2.

    f is the trained network's velocity at t = 0 minus that of the base, so it starts at zero from a pretrained network. The
    penalty omits the log-determinant of the exact divergence between noises, so it over-tilts: use a larger control.

    The trained network alone is not the tuned map; `whole` returns that map, which can be sampled, steered and saved.

    Args:
        jumps: number of jumps of the frozen map.
    """

    jumps: int = 1

    differentiates, tilts, group, law_is_map, law_is_velocity = True, False, 1, False, False

    def __post_init__(self) -> None:
        if self.jumps < 1:
            raise ValueError(f"jumps={self.jumps}: must be at least 1")

    def loss(self, update: Update) -> Terms:
        x0, cond = update.normal(), update.problem.cond
        shift = self.shift(update.tuned, update.reference, x0, cond)
        r = update.problem.score(self._generate(update.reference, x0 + shift, cond)).total
        control = shift.square().mean() / 2
        return {"loss": -r.mean() / update.scale + update.control * control, "reward": r.mean(), "control_cost": control}

    def shift(self, tuned: FlowMap, reference: FlowMap, x0: Tensor, cond: Condition) -> Tensor:
        """f(x_0), shape of x_0."""
        with torch.no_grad():
            base = self._field(reference, x0, cond)
        return self._field(tuned, x0, cond) - base

    def _field(self, flow_map: FlowMap, x0: Tensor, cond: Condition) -> Tensor:
        """The network's output for the noise: its velocity, or without one that of the jump."""
        return flow_map.velocity(x0, 0.0, cond) if can(flow_map, "velocity") else flow_map.jump(x0, 0.0, 1.0, cond) - x0

    def _generate(self, reference: FlowMap, x: Tensor, cond: Condition) -> Tensor:
        times = reference.grid(self.jumps)
        for s, t in zip(times, times[1:]):
            x = reference.jump(x, s, t, cond)
        return x

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`. The generator is one jump, or several jumps, which may be Euler steps."""
        if can(flow_map, "generator" if self.jumps == 1 else "velocity"):
            return ""
        if can(flow_map, "velocity"):
            return "with jumps=1 " + needs("generator", f"take jumps={max(flow_map.steps, 8)}, Euler steps")
        return f"with jumps={self.jumps} " + needs("two_time", "take jumps=1")

    def whole(self, tuned: FlowMap, reference: FlowMap, of: str | Mapping[str, Any] = "") -> MovedNoise:
        """The tuned model as a map.

        Args:
            tuned: the map with the trained network.
            reference: the frozen base.
            of: name of the base, as in `steerfm.load`.
        """
        return MovedNoise(reference, tuned, self.jumps, of)

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        def law(noise: Noise, cond: Condition) -> Tensor:
            x0 = noise.start(tuned)
            return self._generate(reference, x0 + self.shift(tuned, reference, x0, cond), cond)

        return law
