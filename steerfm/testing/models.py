"""The contract of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steerfm.capabilities import can
from steerfm.cost import Ledger
from steerfm.flowmap import FlowMap
from steerfm.randomness import untouched
from steerfm.rows import Condition, expand_rows, repeat_rows, take_rows
from steerfm.testing.contract import after_seed, failing, furthest, moves_global_state, near, pictures, require

N = 4
SMALL = 1e-3
"""Length of the jump for the comparison with the velocity."""


@dataclass
class Probe:
    """A map and its test inputs.

    Attributes:
        flow_map: the map.
        x: (N, *shape) states.
        s: (N,) times, different in every row.
        t: (N,) later times, different in every row.
        cond: one row per state, or None.
    """

    flow_map: FlowMap
    x: Tensor
    s: Tensor
    t: Tensor
    cond: Condition

    @property
    def name(self) -> str:
        return f"model {type(self.flow_map).__name__!r}"

    def u(self, s: Tensor, t: Tensor, rows: slice = slice(None)) -> Tensor:
        """Call the user's `average_velocity` directly."""
        with failing(self.name), torch.no_grad():
            cond = take_rows(self.cond, rows)
            return self.flow_map.average_velocity(self.x[rows], s[rows], t[rows], cond)


def check_model(flow_map: FlowMap, cond: Condition | str | int = None) -> None:
    """Check a flow map against the contract of sampling, steering and tuning.

    Args:
        flow_map: the model, in evaluation mode.
        cond: a condition of one row, a label or a prompt, for a model that needs one; default its first classes, or a prompt.

    Raises:
        ContractError: the first violation and its fix, in one sentence.
    """
    require(isinstance(flow_map, FlowMap), f"a {type(flow_map).__name__} is no model", "derive it from steerfm.FlowMap")
    name = f"model {type(flow_map).__name__!r}"
    shape = getattr(flow_map, "shape", ())
    require(
        shape and all(isinstance(size, int) and size > 0 for size in shape),
        f"{name} has the shape {shape}",
        "call super().__init__(shape), with the shape of one sample such as (3, 32, 32)",
    )
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(row)) for row in range(N)])
    x = x.to(flow_map.device, flow_map.dtype)
    times = torch.tensor([[0.0, 0.3, 0.55, 0.8], [0.4, 0.6, 1.0, 0.95]]).to(x)
    with failing(name), untouched():
        probe = Probe(flow_map, x, times[0], times[1], _condition(flow_map, cond))
    with untouched():
        for check in CHECKS:
            check(probe)


def _condition(flow_map: FlowMap, cond: Condition | str | int) -> Condition:
    if isinstance(cond, str | int):
        return flow_map.condition(cond, N)
    if cond is not None:
        return repeat_rows(cond, N)
    if flow_map.class_names:
        return flow_map.condition([row % len(flow_map.class_names) for row in range(N)], N)
    return None if flow_map.null is None else flow_map.condition("a red heart", N)


def velocities(probe: Probe) -> None:
    """average_velocity returns a finite velocity of the state's shape and dtype, for all times 0 <= s <= t <= 1."""
    zero, one = torch.zeros_like(probe.s), torch.ones_like(probe.s)
    for s, t in ((probe.s, probe.t), (zero, zero), (zero, one), (one, one), (probe.s, probe.s)):
        u, when = probe.u(s, t), f"from s = {s[0]:g} to t = {t[0]:g}"
        require(
            isinstance(u, Tensor) and u.shape == probe.x.shape,
            f"{probe.name} answers states {tuple(probe.x.shape)} with {tuple(u.shape) if isinstance(u, Tensor) else type(u)}",
            "average_velocity returns (b, *shape), one row for each state",
        )
        require(u.dtype == probe.x.dtype, f"{probe.name} answers {probe.x.dtype} with {u.dtype}", "cast back to the dtype of x")
        require(
            torch.isfinite(u).all(), f"{probe.name} is not finite {when}", "do not divide by t - s, or by a time that can be 0"
        )


def rows(probe: Probe) -> None:
    """Every state moves independently, between its own times, with its own condition."""
    whole = probe.u(probe.s, probe.t)
    alone = torch.cat([probe.u(probe.s, probe.t, slice(i, i + 1)) for i in range(N)])
    row = furthest(whole, alone)
    require(
        near(whole, alone, 1e-3),
        f"{probe.name} moves row {row} of {N} otherwise than alone",
        "s and t hold a time for each row, s.view(-1, 1, 1, 1), and no row may read another (batch norm in training mode does)",
    )


def repeats(probe: Probe) -> None:
    """It returns the same values again, for any global random state, and does not change its input."""
    before = probe.x.clone()
    first, other = (after_seed(seed, lambda: probe.u(probe.s, probe.t)) for seed in (0, 1))
    require(
        near(first, other, 1e-6),
        f"{probe.name} gives different jumps for the same state",
        "take it out of training mode, flow_map.eval(), and draw nothing in it",
    )
    changes_state = moves_global_state(lambda: probe.u(probe.s, probe.t))
    require(
        not changes_state,
        f"{probe.name} seeds or draws from a global random state",
        "a flow map is deterministic: draw nothing in it",
    )
    require(
        probe.x.equal(before),
        f"{probe.name} writes into the state that it is given",
        "compute a new tensor, x = x * 2 and not x *= 2",
    )


def identity(probe: Probe) -> None:
    """A jump from a time to the same time does not move the state."""
    with failing(probe.name), torch.no_grad():
        for where in (probe.s, probe.s.clone()):
            end = probe.flow_map.jump(probe.x, probe.s, where, probe.cond)
        floats = probe.flow_map.jump(probe.x, 0.5, 0.5, probe.cond)
    fix = "leave jump to FlowMap, which is x + (t - s) u, and write average_velocity"
    for x in (end, floats):
        require(near(x, probe.x, 1e-5), f"{probe.name} moves in a jump from a time to the same time", fix)


def jumps(probe: Probe) -> None:
    """Times can be numbers or one per row, a short jump follows the velocity, and calls are counted."""
    flow_map, x, cond, t = probe.flow_map, probe.x, probe.cond, 0.4
    with failing(probe.name), torch.no_grad(), Ledger() as ledger:
        by_number = flow_map.jump(x, 0.2, t, cond)
        calls = ledger.cost.forwards
        by_row = flow_map.jump(x, torch.full((N,), 0.2).to(x), torch.full((N,), t).to(x), cond)
        velocity = flow_map.velocity(x, t, cond)
        short = (flow_map.jump(x, t, t + SMALL, cond) - x) / SMALL
    require(
        near(by_number, by_row), f"{probe.name} jumps elsewhere for s = 0.2 than for a tensor of 0.2", "leave jump to FlowMap"
    )
    require(
        calls == N * flow_map.evaluations,
        f"{probe.name} counts {calls} network calls for {N} states",
        "leave jump and velocity to FlowMap, and set evaluations where a call is several",
    )
    off = (short - velocity).norm() / velocity.norm().clamp_min(1e-6)
    require(
        off < 0.1,
        f"{probe.name} has a velocity that is off by {off:.0%} from a jump over {SMALL:g}",
        "average_velocity(x, t, t) is the velocity that short jumps tend to, dx/dt with noise at t = 0 and data at t = 1",
    )


def ends(probe: Probe) -> None:
    """The velocity leads from noise to data: E[x_1 | x_0] hardly depends on x_0, and E[x_0 | x_1] hardly on x_1."""
    flow_map, x = probe.flow_map, probe.x
    if not can(flow_map, "velocity"):
        return
    with failing(probe.name), torch.no_grad():
        u = [flow_map.velocity(x, t, probe.cond) for t in (0.0, 1.0)]
    data, noise = _slope(x + u[0], x), _slope(x - u[1], x)  # 0 if correct, 2 if the sign is wrong
    require(
        not (1.5 < data < 5 and noise > 1.5),
        f"{probe.name} leads from the data to the noise",
        "its sign is the other one: it is dx/dt with noise at t = 0 and data at t = 1, data - noise",
    )
    require(  # the second one alone may be large: at t = 1 the noise is not determined
        abs(data) < 5 and not (data > 0.5 and abs(noise) > 5),
        f"{probe.name} takes {data:.1%} of its noise for data at t = 0, where none of it is",
        "its noise is at the other end, or it predicts something else: check noise_at=, predicts=, path= and span=",
    )


def _slope(answer: Tensor, x: Tensor) -> float:
    """The coefficient of the regression of an answer on x over the rows, (b, *shape)."""
    x, answer = ((value - value.mean(0)).double() for value in (x, answer))
    return float((answer * x).sum() / x.square().sum().clamp_min(1e-12))


def second_time(probe: Probe) -> None:
    """A map with two times uses the second one, or two of its jumps end close to where one does."""
    flow_map, x, cond = probe.flow_map, probe.x, probe.cond
    if not can(flow_map, "two_time"):
        return
    with failing(probe.name), torch.no_grad():
        ignores_t = near(probe.u(probe.s, probe.t), probe.u(probe.s, probe.s), 1e-6)
        if not ignores_t:
            return
        once = flow_map.jump(x, 0.0, 1.0, cond)
        twice = flow_map.jump(flow_map.jump(x, 0.0, 0.5, cond), 0.5, 1.0, cond)
    require(
        (once - twice).norm() < 0.3 * (once - x).norm(),
        f"{probe.name} does not look at the time that it jumps to",
        'it is a velocity: wrap its network in steerfm.VelocityModel, or say capabilities = frozenset({"velocity"})',
    )


def gradients(probe: Probe) -> None:
    """A gradient passes through a look-ahead to the state."""
    x = probe.x.clone().requires_grad_()
    with failing(probe.name), torch.enable_grad():
        end = probe.flow_map.lookahead(x, 0.3, probe.cond)
        direct = end.grad_fn is not None
        (gradient,) = torch.autograd.grad(end.sum(), x) if direct else (torch.zeros_like(x),)
    require(direct, f"{probe.name} cuts the gradient", "compute with torch, without no_grad, detach or numpy")
    require(torch.isfinite(gradient).all(), f"{probe.name} has a gradient of NaN or inf", "add an epsilon to roots and norms")


def decoding(probe: Probe) -> None:
    """decode returns pictures (b, c, h, w) in [0, 1], videos (b, c, f, h, w), or unchanged vectors, and encode inverts it."""
    flow_map, shape = probe.flow_map, probe.flow_map.shape
    with failing(probe.name), torch.no_grad(), Ledger() as ledger:
        decoded = flow_map.decode(probe.x)
    require(
        len(decoded) == N and decoded.ndim in (2, 4, 5),
        f"{probe.name} decodes states {tuple(probe.x.shape)} to {tuple(decoded.shape)}",
        "decode returns pictures (b, c, h, w), videos (b, c, f, h, w) or vectors (b, d)",
    )
    if decoded.ndim > 2:
        require(
            decoded.min() >= -1e-3 and decoded.max() <= 1 + 1e-3,
            f"{probe.name} decodes to pictures in [{decoded.min():.3g}, {decoded.max():.3g}]",
            "decode returns them in [0, 1]: ((z + 1) / 2).clamp(0, 1) where the model's are in [-1, 1]",
        )
    require(
        ledger.cost.decodes == N,
        f"{probe.name} counts {ledger.cost.decodes} decodes for {N} states",
        'begin decode with steerfm.cost.count("decodes", len(z))',
    )
    if tuple(decoded.shape[1:]) == shape:  # no lossy autoencoder
        originals = pictures(N, shape).to(probe.x)
        with failing(probe.name), torch.no_grad():
            back = flow_map.decode(flow_map.encode(originals))
        require(near(back, originals), f"{probe.name} does not decode what it encodes", "write encode as the inverse of decode")


def conditions(probe: Probe) -> None:
    """A model with classes has a null condition of one row, and runs with it."""
    flow_map, null = probe.flow_map, probe.flow_map.null
    if null is None:
        return
    with failing(probe.name), torch.no_grad():
        rows_of = [null] if isinstance(null, Tensor) else list(null.values())
        require(
            all(len(row) == 1 for row in rows_of),
            f"{probe.name} has a null condition of {len(rows_of[0])} rows",
            "null is a condition of one row",
        )
        without = flow_map.jump(probe.x, 0.2, 0.7, expand_rows(null, N, probe.x.device))
    require(
        torch.isfinite(without).all(), f"{probe.name} is not finite under its null condition", "train it with some rows of null"
    )


CHECKS = (velocities, repeats, rows, identity, jumps, gradients, decoding, conditions, ends, second_time)
"""The checks of `check_model`, in this order; see their docstrings."""
