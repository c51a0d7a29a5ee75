"""How right a map's draws of p(x_1 | x_t) are, beside those of its own velocity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steerfm import glass
from steerfm.flowmap import FlowMap
from steerfm.metrics.functional import sliced_wasserstein
from steerfm.randomness import stream
from steerfm.rows import Condition, move_condition, take_rows

TIMES = (0.2, 0.4, 0.6)
"""At which draws are compared."""


def posterior_errors(
    flow_map: FlowMap, n: int = 8, cond: Condition = None, seed: int = 0, draws: int = 48, fine: int = 12
) -> dict[str, dict[float, float]]:
    """Sliced Wasserstein distances of draws to those of GLASS in many steps, by what draws them and by time; means over states.

    The states are noised samples of the map. The first row, two sets of the fine draws, is the floor.

    Args:
        flow_map: with the capability posterior.
        n: states.
        cond: at least n rows, or None.
        seed: of all noise.
        draws: of each state, at least 2.
        fine: steps of the reference, two calls each.
    """
    generator, like = stream(seed, "posterior"), torch.empty(0, device=flow_map.device, dtype=flow_map.state_dtype)
    cond = take_rows(move_condition(cond, flow_map.device), slice(0, n))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, *flow_map.shape, generator=generator).to(like)

    ways: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
        "fine draws again": lambda x, t, z: glass.draw(flow_map, x, t, z, cond, fine),
        "1 call": lambda x, t, z: glass.posterior(flow_map, x, t, z, cond, fine),
        "2 calls": lambda x, t, z: glass.posterior(flow_map, x, t, z, cond, fine, hops=2),
        **{f"GLASS, {2 * s} calls": lambda x, t, z, s=s: glass.draw(flow_map, x, t, z, cond, s) for s in (1, 2, 4)},
        "jump, 1 call": lambda x, t, z: flow_map.lookahead(x, t, cond).unsqueeze(1).expand_as(z),
    }
    out: dict[str, dict[float, float]] = {name: {} for name in ways}
    with torch.no_grad():
        x1 = flow_map.lookahead(normal(n), 0.0, cond, hops=flow_map.steps)
        for t in TIMES:
            x = flow_map.interpolant.interpolate(normal(n), x1, t)
            reference = glass.draw(flow_map, x, t, normal(n, draws), cond, fine).flatten(2)
            z = normal(n, draws)
            for name, way in ways.items():
                samples = way(x, t, z).flatten(2)
                out[name][t] = sum(sliced_wasserstein(a, b) for a, b in zip(samples, reference, strict=True)) / n
    return out
