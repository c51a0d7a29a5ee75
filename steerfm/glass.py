"""GLASS (2602.05993): the flow from noise to p(x_1 | x_t = x), from any velocity, without training.

    z_s = alpha_s x_1 + sigma_s e,     x = alpha_t x_1 + sigma_t e'

are two independent states of one x_1, so that E[x_1 | x, z_s] is the denoiser at one joint state (`Interpolant.joint`), and the
velocity of the inner flow follows from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerfm.capabilities import can
from steerfm.flowmap import FlowMap
from steerfm.interpolant import Interpolant, expand_time
from steerfm.rows import Condition, repeat_rows


def inner_velocity(flow_map: FlowMap, z: Tensor, s: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """dz/ds of the inner flow, on the map's own path; one call.

    Args:
        z: (b, *shape) inner states.
        s: (b,) inner times, below 1.
        x: (b, *shape) what is known.
        t: (b,) its time, below 1.
        cond: b rows.
    """
    return flow_map.interpolant.velocity_from_denoised(z, inner_denoised(flow_map, z, s, x, t, cond), expand_time(s, z))


def inner_denoised(flow_map: FlowMap, z: Tensor, s: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """E[x_1 | x, z], with the arguments of `inner_velocity`; one call."""
    path, s, t = flow_map.interpolant, expand_time(s, z), expand_time(t, z)
    sigma_t, sigma_s = path.sigma(t), path.sigma(s)
    both, time = path.joint(x / sigma_t, path.alpha(t) / sigma_t, z / sigma_s, path.alpha(s) / sigma_s)
    return flow_map.denoise(both, time.flatten(), cond)


def posterior(flow_map: FlowMap, x: Tensor, t: float | Tensor, z: Tensor, cond: Condition, steps: int, hops: int = 1) -> Tensor:
    """Draws of p(x_1 | x_t = x): by jumps of a map that has posteriors, else by `draw`.

    Args:
        x: (b, *shape) states.
        t: their time, a float or (b,), below 1.
        z: (b, k, *shape) standard normal noise, k draws a state.
        cond: b rows.
        steps: see `draw`.
        hops: jumps, one call each; 0 for `draw` whatever the map has.

    Returns:
        (b, k, *shape).
    """
    if not hops or not can(flow_map, "posterior"):
        return draw(flow_map, x, t, z, cond, steps)
    k = z.shape[1]
    times = t.repeat_interleave(k) if isinstance(t, Tensor) else t
    states = x.unsqueeze(1).expand_as(z).flatten(0, 1)
    return flow_map.posterior(states, times, z.flatten(0, 1), repeat_rows(cond, k), hops).view_as(z)


def inner_time(path: Interpolant, inner: Interpolant, t: Any, share: float) -> Any:
    """The inner time at which this share of the way from t to 1 lies behind the joint state, of x at t and z.

    Near the data x alone says nearly all, and z adds to it only when the inner time is later still: equal steps of the inner
    time would pass over all that is left to draw.

    Args:
        path: of x.
        inner: of z.
        t: the time of x, a float or a tensor.
        share: in [0, 1].
    """
    if share in (0, 1):
        return t * 0.0 + float(share)
    time = t + (1 - t) * share
    return inner.time_at(((path.alpha(time) / path.sigma(time)) ** 2 - (path.alpha(t) / path.sigma(t)) ** 2) ** 0.5)


def draw(
    flow_map: FlowMap, x: Tensor, t: float | Tensor, z: Tensor, cond: Condition, steps: int, joint: bool = False
) -> Tensor:
    """Draws of p(x_1 | x_t = x) by the midpoint rule, two calls per step; exact as ``steps`` grows.

    The inner path is the linear one. With the denoiser held fixed its ODE is solved exactly.

    Args:
        x: (b, *shape) states.
        t: their time, a float or (b,), below 1.
        z: (b, k, *shape) standard normal noise, k draws a state.
        cond: b rows.
        steps: of the inner ODE, equal in the inner time as published.
        joint: take steps that are equal in the time of the joint state, see `inner_time`: right with few of them near the data,
            where equal steps of the inner time give too narrow draws. Before t = .5 few of them are less exact than those.

    Returns:
        (b, k, *shape).
    """
    path, cond_k = flow_map.interpolant, repeat_rows(cond, z.shape[1])
    at: Any = expand_time(t, x).unsqueeze(1) if isinstance(t, Tensor) else t
    outer, white = path.alpha(at) / path.sigma(at), x.unsqueeze(1) / path.sigma(at)

    def denoised(z: Tensor, s: Any) -> Tensor:
        both, time = path.joint(white, outer, z / (1 - s), s / (1 - s))
        if isinstance(time, Tensor):
            time = time.flatten().repeat_interleave(z.shape[1])
        return flow_map.denoise(both.flatten(0, 1), time, cond_k).view_as(z)

    def time(i: float) -> Any:
        return inner_time(path, Interpolant(), at, i / steps) if joint else i / steps

    for i in range(steps):
        s, middle, end = time(i), time(i + 0.5), time(i + 1)
        half = _blend(denoised(z, s), z, (1 - middle) / (1 - s))  # z - D shrinks like 1 - s
        z = _blend(denoised(half, middle), z, (1 - end) / (1 - s))
    return z


def _blend(a: Tensor, b: Tensor, share: Any) -> Tensor:
    return torch.lerp(a, b, share.to(a) if isinstance(share, Tensor) else share)
