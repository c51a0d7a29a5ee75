"""What the processes of the tests beside this file do: functions that they can import."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steerfm
from steerfm import distributed, processes
from steerfm.flowmap import Wrapped
from steerfm.networks import Mlp
from steerfm.randomness import global_stream
from steerfm.spread import shared_out
from steerfm.steering import Jarzynski, MapGradient, Steering
from steerfm.steering.lookahead import residual
from steerfm.steering.value import Problem

SHIRT = {"name": "classifier", "target": "Shirt"}
PLAIN = {"strength": 8.0, "label": "Bag", "seeds": 3}


def numbers(result: steerfm.SteeringResult) -> dict[str, Tensor]:
    """All that a result says, but for time and memory."""
    out = {"samples": result.samples, "rewards": result.rewards, "log_weights": result.log_weights, "strength": result.strength}
    out |= {f"component {name}": value for name, value in result.components.items()}
    out |= {f"trace {name}": value for name, value in vars(result.trace).items() if isinstance(value, Tensor)}
    return out | {"cost": torch.tensor(list(result.cost.counts().values()))}


def grey(images: Tensor) -> Tensor:
    """A plain function as a reward, with a gradient."""
    return images.mean((1, 2, 3))


class Seen(steerfm.Reward):
    """Notes how many pictures it was shown, and whether it saw whole groups."""

    differentiable = False

    def __init__(self, groupwise: bool = False, one_process: bool = False) -> None:
        super().__init__()
        self.groupwise, self.one_process, self.rows = groupwise, one_process, []

    def score(self, images: Tensor, prompts: Any = None, labels: Any = None, groups: Any = None) -> Tensor:
        self.rows.append(len(images))
        return images.flatten(1).std(1)


def broken(images: Tensor) -> Tensor:
    """NaN for the brightest picture of the run below."""
    value = images.mean((1, 2, 3))
    return value.masked_fill(value > 0.35, float("nan"))


class Narrow(Wrapped):
    """A map that has no memory for more than twelve rows."""

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Any) -> Tensor:
        if len(x) > 12:
            raise torch.OutOfMemoryError("too many")
        return super().average_velocity(x, s, t, cond)


def run(*args: Any, flow_map: Any = "fashion", **kwargs: Any) -> dict[str, Tensor]:
    return numbers(steerfm.steer(flow_map, *args, **PLAIN | kwargs))


def plane() -> steerfm.FlowMap:
    """A map of points whose network does something, the same in all processes."""
    with global_stream(0, "plane"):
        network = Mlp(2, width=16, depth=2)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return steerfm.NeuralFlowMap(network, (2,)).eval().requires_grad_(False)


def steered() -> dict[str, dict[str, Tensor]]:
    """Runs of many kinds: their sizes are such that rows are uneven, or fewer than processes."""
    mixture = steerfm.GaussianMixture(means=torch.eye(3), covs=torch.full((3, 3), 0.2), weights=torch.ones(3) / 3)
    guidance, diffuse = MapGradient(0.5, cap=None, ascent=lambda t: 0.1), steerfm.Diffuse(lambda t: 1 - t)
    general = Steering(4, 3, "jump", guidance, "linear", diffuse, Jarzynski(general=True), None)
    both = [SHIRT, {"name": "diversity", "weight": 3.0}, {"name": "brightness", "one_process": True}]
    runs: dict[str, Callable[[], dict[str, Tensor]]] = {
        "particles": lambda: run(SHIRT, steerfm.FeynmanKac(particles=37, steps=2), n=1),
        "guided": lambda: run(SHIRT, steerfm.FMRGJ(steps=2), n=3),
        "guided, many": lambda: run(grey, steerfm.FMRGJ(steps=2, particles=18), n=2),
        "funnel": lambda: run(SHIRT, "funnel", n=1),
        "one row": lambda: run("brightness", steerfm.FMRGJ(steps=2), n=1),
        "branching": lambda: run(SHIRT, steerfm.SVDD(particles=4, steps=2), n=2),
        "tree": lambda: run("brightness", {"name": "tree_search", "particles": 8, "steps": 2, "width": 4}, n=1),
        "reno": lambda: run("brightness", {"name": "reno", "iterations": 3}, n=3),
        "micro-batch": lambda: run(SHIRT, steerfm.FMRGJ(steps=2), n=7, micro_batch=2),
        "micro-batch, particles": lambda: run(
            SHIRT, steerfm.FeynmanKac(particles=7, steps=2), n=2, micro_batch=3, batch_size=1
        ),
        "terms": lambda: run(both, steerfm.FeynmanKac(particles=17, steps=2), n=2),
        "terms, guided": lambda: run(both, steerfm.FMRGJ(steps=2), n=5, micro_batch=2),
        "auto": lambda: run("brightness", steerfm.BestOfN(particles=20), n=2, strength="auto"),
        "halved": lambda: run(
            "brightness", steerfm.FMRGJ(particles=20, steps=2), n=1, flow_map=Narrow(steerfm.load("fashion"))
        ),
        "vectors": lambda: numbers(
            steerfm.steer(mixture.flow_map(), lambda x: x.sum(1), steerfm.FeynmanKac(particles=40, steps=3), n=2)
        ),
        "second derivative": lambda: numbers(steerfm.steer(plane(), lambda x: x.sum(1), general, n=5, micro_batch=3)),
        "stopped by the first": lambda: run(
            "brightness", steerfm.FeynmanKac(particles=4, steps=3), callback=lambda state: distributed.rank() == 0, n=2
        ),
    }
    return {name: call() for name, call in runs.items()}


def plain_calls() -> dict[str, Tensor]:
    """Samples, and a gradient through a call of the map and of the reward."""
    fm, rw = steerfm.load("fashion"), steerfm.rewards.build(SHIRT)
    x = torch.randn(35, *fm.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cond = torch.arange(35) % 10
    shared = shared_out(fm)
    z = shared.lookahead(x, 0.4, cond, hops=2)
    problem = Problem(shared, rw, torch.ones(35), steerfm.rows.Rows(35, cond, cond))
    total = problem.score(z).total
    (gradient,) = torch.autograd.grad(total.sum(), x)
    three = x.detach()[:3]
    return {
        "samples": steerfm.sample(fm, 33, 2, seeds=5, cond="Bag"),
        "total": total.detach(),
        "gradient": gradient,
        "pictures": shared.decode(z.detach()),
        "residual": residual(shared, three, 0.5, cond[:3]),
    }


def seen() -> dict[str, list[Any]]:
    """How many pictures rewards saw in each of the processes, call by call."""
    method, out = steerfm.BestOfN(particles=20, steps=1), {}
    for name, reward in {
        "any": Seen(),
        "groupwise": Seen(groupwise=True),
        "one": Seen(one_process=True),
        "sum": 1.0 * Seen(one_process=True) + 1.0 * steerfm.reward("brightness"),
    }.items():
        run(reward, method, n=2, micro_batch=None if name != "groupwise" else 8)
        counter = reward.terms[0][1] if name == "sum" else reward  # type: ignore[union-attr]
        group = processes.active()
        out[name] = group.exchange(counter.rows) if group else [counter.rows]
    return out


def wrong() -> dict[str, str]:
    """What goes wrong in one process is said in all."""
    out = {}
    try:
        run(broken, steerfm.BestOfN(particles=40, steps=1), n=1)
    except Exception as error:
        out["reward"] = f"{type(error).__name__}: {error}"
    group, fm = processes.active(), shared_out(steerfm.load("fashion"))
    if group is not None:
        x = torch.zeros(2, *fm.shape)
        try:
            fm.decode(x) if group.rank == 0 else fm.jump(x, 0.0, 1.0)
        except RuntimeError as error:
            out["apart"] = str(error)
        try:
            processes.of_first(lambda: 1 / 0)
        except ZeroDivisionError as error:
            out["of first"] = str(error)
    return out


def everything(x: Tensor, *, scale: float) -> dict[str, Any]:
    """All of it, and whether all processes have the same."""
    out: dict[str, Any] = {
        "given": x * scale,
        "steered": steered(),
        "calls": plain_calls(),
        "seen": seen(),
        "wrong": wrong(),
        "rank": distributed.rank(),
    }
    if (group := processes.active()) is not None:
        bits = {name: _digest(values) for name, values in (out["steered"] | {"calls": out["calls"]}).items()}
        out["same"] = [other == bits for other in group.exchange(bits)]
    return out


def _digest(values: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in values.values())).hexdigest()


def fails_in(rank: int) -> None:
    if distributed.rank() == rank:
        raise KeyError("only here")
    shared_out(steerfm.load("fashion")).decode(torch.zeros(4, 1, 28, 28))
