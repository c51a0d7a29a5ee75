"""How right a map's draws of p(x_1 | x_t) are, beside those of its own velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerfm import glass
from steerfm.flowmap import FlowMap
from steerfm.metrics.functional import sliced_wasserstein
from steerfm.metrics.progress import Progress, silent
from steerfm.randomness import stream
from steerfm.rows import Condition, move_condition, take_rows

TIMES = (0.2, 0.4, 0.6)
"""At which draws are compared."""
Row = dict[float, float]
"""A mean over states, by time."""


@dataclass(frozen=True)
class PosteriorErrors:
    """Errors of draws by what draws them ("1 call", "GLASS, 4 calls", ...) and by time; see `posterior_errors`.

    Attributes:
        distance: sliced Wasserstein distance to the reference.
        value: mean of |V - V of the reference|, V = log mean p(class) of k draws, for the class of the state's own picture.
            Jump and denoiser have one picture. Empty without a classifier.
        frequency: root mean square, over states and classes, of the difference of the frequencies of a class in standard
            errors: 1 where draws are right. Classes that are nearly never or nearly always drawn are left out, and a time is
            NaN where that leaves none. Empty without a classifier.
    """

    distance: dict[str, Row] = field(default_factory=dict)
    value: dict[str, Row] = field(default_factory=dict)
    frequency: dict[str, Row] = field(default_factory=dict)


def posterior_errors(
    flow_map: FlowMap,
    n: int = 8,
    cond: Condition = None,
    seed: int = 0,
    draws: int = 48,
    fine: int = 12,
    classify: Callable[[Tensor], Tensor] | None = None,
    k: int = 4,
    times: Sequence[float] = TIMES,
    progress: Progress = silent,
) -> PosteriorErrors:
    """Compare draws with those of GLASS in many steps, at noised samples of the map.

    The first row, "fine draws again", is a second set of those: what right draws come to. With few draws a set that is too
    narrow, or a single picture, may have a smaller distance; values and frequencies tell them apart.

    Args:
        flow_map: with the capability posterior.
        n: states.
        cond: at least n rows, or None.
        seed: of all noise.
        draws: of each state, at least 2.
        fine: steps of the reference, two calls each.
        classify: pictures (b, c, h, w) in [0, 1] to logits (b, classes), for values and frequencies.
        k: draws of a value.
        times: at which states are, in (0, 1).
        progress: shows a bar of the states of all times; default none.
    """
    generator, like = stream(seed, "posterior"), torch.empty(0, device=flow_map.device, dtype=flow_map.state_dtype)
    cond = take_rows(move_condition(cond, flow_map.device), slice(0, n))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, *flow_map.shape, generator=generator).to(like)

    def log_p(x: Tensor) -> Tensor:
        assert classify is not None
        return classify(flow_map.decode(x)).log_softmax(1).double()

    ways = _ways(flow_map, fine)
    out = PosteriorErrors(*({name: {} for name in ways} for _ in range(3 if classify else 1)))
    with torch.inference_mode(), progress("draws of posteriors", n * len(times)) as tick:
        x1 = flow_map.lookahead(normal(n), 0.0, cond, hops=flow_map.steps)
        own = log_p(x1).argmax(1) if classify else None
        for place, t in enumerate(times):
            x = flow_map.interpolant.interpolate(normal(n), x1, t)
            errors: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in ways}
            for i in range(n):  # state by state: all draws of all states are many rows
                at, c = x[i : i + 1], take_rows(cond, slice(i, i + 1))
                reference, z = glass.draw(flow_map, at, t, normal(1, draws), c, fine, joint=True)[0], normal(1, draws)
                truth = log_p(reference) if classify else None
                for name, way in ways.items():
                    x_1 = way(at, t, z, c)[0]
                    value, square = 0.0, torch.empty(0)
                    if truth is not None and own is not None:
                        p = log_p(x_1)
                        value = _value_error(p[:, own[i]], truth[:, own[i]], min(k, draws))
                        square = _squares(p.argmax(1), truth.argmax(1), p.shape[1])
                    errors[name].append((sliced_wasserstein(x_1.flatten(1), reference.flatten(1)), value, square))
                tick(place * n + i + 1, n * len(times))
            for name, rows in errors.items():
                distances, values, squares = zip(*rows)
                out.distance[name][t] = sum(distances) / n
                if classify is not None:
                    out.value[name][t] = sum(values) / n
                    out.frequency[name][t] = torch.cat(squares).mean().sqrt().item()
    return out


def _ways(flow_map: FlowMap, fine: int) -> dict[str, Callable[[Tensor, float, Tensor, Condition], Tensor]]:
    """What draws, by name: (1, *shape) states, their time, (1, k, *shape) noise and a condition to (1, k, *shape)."""
    return {
        "fine draws again": lambda x, t, z, c: glass.draw(flow_map, x, t, z, c, fine, joint=True),
        "1 call": lambda x, t, z, c: glass.posterior(flow_map, x, t, z, c, fine),
        "2 calls": lambda x, t, z, c: glass.posterior(flow_map, x, t, z, c, fine, hops=2),
        **{f"GLASS, {2 * s} calls": lambda x, t, z, c, s=s: glass.draw(flow_map, x, t, z, c, s) for s in (1, 2, 4)},
        **{
            f"GLASS, {2 * s} calls, joint steps": lambda x, t, z, c, s=s: glass.draw(flow_map, x, t, z, c, s, joint=True)
            for s in (1, 2, 4)
        },
        "jump, 1 call": lambda x, t, z, c: flow_map.lookahead(x, t, c).unsqueeze(1).expand_as(z),
        "denoiser, 1 call": lambda x, t, z, c: flow_map.denoise(x, t, c).unsqueeze(1).expand_as(z),
    }


def _value_error(log_p: Tensor, truth: Tensor, k: int) -> float:
    """Mean over groups of k draws of |log mean p - log mean p of the reference|."""
    groups = log_p[: len(log_p) // k * k].view(-1, k)
    return (_log_mean(groups) - _log_mean(truth[None])).abs().mean().item()


def _log_mean(log_p: Tensor) -> Tensor:
    return log_p.exp().mean(1).log()


def _squares(drawn: Tensor, truth: Tensor, classes: int, least: float = 3.0) -> Tensor:
    """Squared differences of frequencies in standard errors, of the classes that both ways are expected ``least`` times."""
    counts = [torch.bincount(labels, minlength=classes).double() for labels in (drawn, truth)]
    pooled = (counts[0] + counts[1]) / (len(drawn) + len(truth))
    variance = pooled * (1 - pooled) * (1 / len(drawn) + 1 / len(truth))
    difference = counts[0] / len(drawn) - counts[1] / len(truth)
    often = torch.minimum(pooled, 1 - pooled) * min(len(drawn), len(truth)) >= least
    return difference[often].square() / variance[often]
