"""How far a map is from being a flow map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.flowmap import FlowMap
from steerfm.randomness import stream
from steerfm.rows import Condition, move_condition, repeat_rows, take_rows

CONDITIONS = 16
"""Of how many, at most, `jump_error` is taken."""


@dataclass
class _Points:
    """Random triples of times s <= m <= t, states x at s on the paths of a map, and where one jump to t takes them."""

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
    """Root mean square per entry of X_{m,t}(X_{s,m}(x)) - X_{s,t}(x), over n random times, x on the path of the map.

    Args:
        cond: n rows, or None.
    """
    with torch.no_grad():
        return _semigroup(flow_map, _points(flow_map, n, cond, seed))


def jump_error(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0, each: int = 8, hops: int = 4) -> float:
    """How far one jump from noise ends from where ``hops`` jumps do, as a share of how far samples of one condition lie
    apart; 0 for a true map.

    Below a third or so one jump shows what is going to come out; where it is more, what it shows is another picture.

    Args:
        n: conditions, of which the first 16 are taken.
        cond: n rows, or None.
        each: noises of each of them, at least 2.
    """
    n, cond = min(n, CONDITIONS), take_rows(cond, slice(0, CONDITIONS))
    with torch.no_grad():
        x = torch.randn(n * each, *flow_map.shape, generator=stream(seed, "jump error")).to(flow_map.device)
        cond = repeat_rows(move_condition(cond, flow_map.device), each)
        one, many = (flow_map.lookahead(x, 0.0, cond, hops=count).view(n, each, -1) for count in (1, hops))
        apart = torch.cdist(many, many).sum() / (n * each * (each - 1))
        return ((one - many).norm(dim=2).mean() / apart).item()


def consistency_errors(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0) -> dict[str, float]:
    """How far a map is from being a flow map: `jump_error`, `semigroup_error`, and on the points of that, per entry as it

    diagonal: |d/dt X_{s,t}(x) - v(X_{s,t}(x), t)|.
    """
    with torch.no_grad():
        p = _points(flow_map, n, cond, seed)
        _, tangent = torch.func.jvp(lambda t: flow_map.jump(p.x, p.s, t, p.cond), (p.t,), (torch.ones_like(p.t),))[:2]
        diagonal = tangent - flow_map.velocity(p.direct, p.t, p.cond)
        errors = {"semigroup error": _semigroup(flow_map, p), "diagonal error": _root_mean_square(diagonal)}
    return {**errors, "jump error": jump_error(flow_map, n, cond, seed)}
