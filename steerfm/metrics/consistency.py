"""Consistency errors of flow maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.flowmap import FlowMap
from steerfm.randomness import stream
from steerfm.rows import Condition, move_condition, repeat_rows, take_rows

CONDITIONS = 16
"""Most conditions for `jump_error`."""


@dataclass
class _Points:
    """Random times s <= m <= t, states x at s on the paths of a map, and the results of one direct jump to t."""

    s: Tensor
    m: Tensor
    t: Tensor
    x: Tensor
    direct: Tensor
    cond: Condition


def _points(flow_map: FlowMap, n: int, cond: Condition, seed: int) -> _Points:
    generator = stream(seed, "consistency")
    times = torch.rand(3, n, generator=generator).sort(0).values
    s, m, t = (time.to(flow_map.device) for time in times)
    cond = move_condition(cond, flow_map.device)
    x0 = torch.randn(n, *flow_map.shape, generator=generator).to(flow_map.device)
    x = flow_map.jump(x0, 0.0, s, cond)
    return _Points(s, m, t, x, flow_map.jump(x, s, t, cond), cond)


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _semigroup(flow_map: FlowMap, p: _Points) -> float:
    return _root_mean_square(flow_map.jump(flow_map.jump(p.x, p.s, p.m, p.cond), p.m, p.t, p.cond) - p.direct)


def semigroup_error(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0) -> float:
    """Root mean square per entry of X_{m,t}(X_{s,m}(x)) - X_{s,t}(x), over n random times, with x on the path of the map.

    Args:
        flow_map: the map.
        n: number of states.
        cond: n rows, or None.
        seed: of times and noise.
    """
    with torch.no_grad():
        return _semigroup(flow_map, _points(flow_map, n, cond, seed))


def jump_error(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0, each: int = 8, hops: int = 4) -> float:
    """Mean distance between the endpoints of one jump and of ``hops`` jumps from the same noise, divided by the mean distance
    between samples of one condition; 0 for an exact map.

    Below about a third, one jump shows the final picture; above, it shows a different one.

    Args:
        flow_map: the map.
        n: number of conditions; only the first 16 are used.
        cond: n rows, or None.
        seed: of the noise.
        each: noises per condition, at least 2.
        hops: equal jumps to compare with.
    """
    n, cond = min(n, CONDITIONS), take_rows(cond, slice(0, CONDITIONS))
    with torch.no_grad():
        x = torch.randn(n * each, *flow_map.shape, generator=stream(seed, "jump error")).to(flow_map.device)
        cond = repeat_rows(move_condition(cond, flow_map.device), each)
        one, many = (flow_map.lookahead(x, 0.0, cond, hops=count).view(n, each, -1) for count in (1, hops))
        apart = torch.cdist(many, many).sum() / (n * each * (each - 1))
        return ((one - many).norm(dim=2).mean() / apart).item()


def consistency_errors(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0) -> dict[str, float]:
    """Consistency errors by name: `jump_error`, `semigroup_error`, and, on the points of the latter,

    diagonal: root mean square per entry of d/dt X_{s,t}(x) - v(X_{s,t}(x), t).
    """
    with torch.no_grad():
        p = _points(flow_map, n, cond, seed)
        _, tangent = torch.func.jvp(lambda t: flow_map.jump(p.x, p.s, t, p.cond), (p.t,), (torch.ones_like(p.t),))[:2]
        diagonal = tangent - flow_map.velocity(p.direct, p.t, p.cond)
        errors = {"semigroup error": _semigroup(flow_map, p), "diagonal error": _root_mean_square(diagonal)}
    return {**errors, "jump error": jump_error(flow_map, n, cond, seed)}
