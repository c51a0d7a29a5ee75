"""Draws of a posterior map on a ring of eight modes, beside GLASS at several numbers of calls and exact draws.

    steerfm bench posterior                  # 4,000 updates, 24 states a time: two minutes on one core
    steerfm bench posterior --loss posterior # by the loss of Diamond Maps
    steerfm bench posterior --steps 200 --states 2 --draws 200
    steerfm bench posterior --model FILE --classifier fashion-classifier    # a map of your own: see below

A network of 4 x 128 learns the draws from the exact velocity (`steerfm.training.objectives.PosteriorTrajectory`). Prints the
sliced W2 distance to exact draws of p(x_1 | x_t), the mean over states; "floor" is that of two sets of exact draws. Then
how far chains of `waltz` by these draws are from a tilt of the ring after 40 sweeps, and one JSON line.

With --model nothing is trained: draws of that map are compared with those of its own velocity in 64 calls, as
`steerfm evaluate` does with fewer (20 states, 256 draws: 20 minutes of one core for each time, of a map of clothes).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.swa_utils import AveragedModel

import steerfm
from steerfm import glass
from steerfm.cli.console import progress
from steerfm.metrics import posterior_errors, sliced_wasserstein
from steerfm.networks import Mlp
from steerfm.sampling import Noise
from steerfm.steering import ExactPosterior, Posterior, Waltz
from steerfm.training.objectives import Posterior as PosteriorLoss
from steerfm.training.objectives import PosteriorTrajectory, Triangle
from steerfm.zoo import load_classifier

Draw = Callable[[torch.Tensor, float, int], torch.Tensor]
"""A state (1, 2), its time and its number to draws (n, 2)."""
TIMES = (0.1, 0.2, 0.3, 0.4, 0.6)
ANGLES = torch.arange(8) * math.pi / 4
RING = steerfm.GaussianMixture(4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.full((8, 2), 0.09))


LOSSES = {
    "posterior_trajectory": partial(PosteriorTrajectory, steps=16, uses=16, diagonal=0.1, keep=32768),
    "posterior": PosteriorLoss,
}


def train(steps: int, loss: str, batch: int = 512, seed: int = 0) -> steerfm.NeuralFlowMap:
    """Return a map that has learnt the draws, with averaged weights."""
    torch.manual_seed(seed)
    network, generator = Mlp(2, 128, 4, posterior=True), torch.Generator().manual_seed(seed)
    flow_map = steerfm.NeuralFlowMap(network, (2,), std=RING.cov()[0, 0].sqrt().item())
    objective = LOSSES[loss](Triangle(0.3, 0.2), teacher=RING.flow_map())
    optimizer = torch.optim.RAdam(network.parameters(), 1e-3, betas=(0.9, 0.99))
    average = AveragedModel(network, avg_fn=lambda old, new, n: old.lerp(new, 1 - min(0.999, (1 + float(n)) / (10 + float(n)))))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (steps - step) / (0.3 * steps))
        optimizer.zero_grad()
        objective(flow_map, RING.sample(batch, generator), None, generator).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
    return flow_map.with_network(average.module.eval())


def measure(flow_map: steerfm.FlowMap, states: int, draws: int) -> dict[str, list[float]]:
    """Return the distances at `TIMES`, by what draws."""
    exact, teacher = ExactPosterior(RING, draws), RING.flow_map()

    def endpoints(lookahead: Posterior | ExactPosterior, source: steerfm.FlowMap, seed: int) -> Draw:
        return lambda x, t, state: lookahead.endpoints(source, x, t, None, Noise([10 * state + seed])).z[0]

    def joint(steps: int) -> Draw:
        return lambda x, t, state: glass.draw(
            teacher, x, t, Noise([10 * state + 3]).normal((draws, 2), x), None, steps, joint=True
        )[0]

    ways = {
        "floor": endpoints(exact, teacher, 2),
        "1 call": endpoints(Posterior(k=draws), flow_map, 3),
        "2 calls": endpoints(Posterior(k=draws, hops=2), flow_map, 3),
        **{f"GLASS, {2 * steps} calls": endpoints(Posterior(steps=steps, k=draws), teacher, 3) for steps in (1, 2, 4)},
        **{f"GLASS, {2 * steps} calls, joint steps": joint(steps) for steps in (1, 2, 4)},
    }
    generator, out = torch.Generator().manual_seed(5), {name: [] for name in ways}
    for t in TIMES:
        errors = dict.fromkeys(ways, 0.0)
        for state in range(states):
            x = t * RING.sample(1, generator) + (1 - t) * torch.randn(1, 2, generator=generator)
            reference = endpoints(exact, teacher, 1)(x, t, state)
            for name, way in ways.items():
                errors[name] += sliced_wasserstein(way(x, t, state), reference, 64) / states
        for name, error in errors.items():
            out[name].append(error)
    return out


def measure_chains(flow_map: steerfm.FlowMap, chains: int, seeds: Sequence[int] = range(4)) -> dict[str, float]:
    """Return the sliced W2 of the ends of chains of `Waltz` to the tilt of the ring, by what draws; the mean over seeds."""
    slope, curvature = torch.tensor([1.0, 0.4]), 0.2
    tilt = RING.tilt(slope, curvature)[0]

    def reward(x: torch.Tensor) -> torch.Tensor:
        return x @ slope.to(x) - curvature / 2 * x.square().sum(1)

    exact = RING.flow_map()
    ways = {
        "exact draws": (exact, ExactPosterior(RING)),
        "1 call": (flow_map, Posterior()),
        "2 calls": (flow_map, Posterior(hops=2)),
        **{f"GLASS, {2 * steps} calls": (exact, Posterior(steps=steps)) for steps in (2, 4)},
    }
    out = {"floor": 0.0, "no reward": 0.0} | dict.fromkeys(ways, 0.0)
    for seed in seeds:
        target, again, plain = (
            law.sample(chains, torch.Generator().manual_seed(3 * seed + i)) for i, law in enumerate((tilt, tilt, RING))
        )
        ends = {"floor": again, "no reward": plain}
        for name, (source, lookahead) in ways.items():
            method = Waltz(1, warmup=39, lookahead=lookahead)
            result = steerfm.steer(source, reward, method, n=chains, seeds=chains * seed, batch_size=chains)
            ends[name] = result.samples[:, 0]
        for name, x in ends.items():
            out[name] += sliced_wasserstein(x, target, 64) / len(seeds)
    return out


def print_errors(options: argparse.Namespace) -> None:
    """Print the errors of the draws of a model, a table for each time as soon as it is measured, and one JSON line."""
    flow_map = steerfm.load(options.model)
    classify = load_classifier(options.classifier)[0] if options.classifier else None
    states, draws = options.states or 20, options.draws or 256
    fields: dict[str, dict[str, dict[float, float]]] = {}
    for t in options.times:
        errors = posterior_errors(
            flow_map, states, draws=draws, fine=options.fine, classify=classify, times=(t,), progress=progress
        )
        measured = {name: rows for name, rows in asdict(errors).items() if rows}
        table = Table("draws", *measured, title=f"t = {t:g}, {states} states of {draws} draws")
        for name in errors.distance:
            table.add_row(name, *(f"{rows[name][t]:.3f}" for rows in measured.values()))
            for field, rows in measured.items():
                fields.setdefault(field, {}).setdefault(name, {}).update(rows[name])
        Console().print(table)
    print(json.dumps({"benchmark": "posterior", "model": options.model, "times": options.times, **fields}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench posterior", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="updates")
    parser.add_argument(
        "--loss", choices=LOSSES, default="posterior_trajectory", help="objective that trains the map of the ring"
    )
    parser.add_argument("--states", type=int, default=None, help="states at each time (default 24, of a model 20)")
    parser.add_argument("--draws", type=int, default=None, help="draws of each state (default 2000, of a model 256)")
    parser.add_argument("--model", default=None, help="a map with posteriors, in place of the ring")
    parser.add_argument("--classifier", default=None, help="of its pictures, for values and frequencies of classes")
    parser.add_argument("--fine", type=int, default=32, help="steps of the reference of a model, two calls each")
    parser.add_argument("--times", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.6], help="of the states of a model")
    options = parser.parse_args(argv)
    if options.model:
        return print_errors(options)
    options.states, options.draws = options.states or 24, options.draws or 2000
    flow_map = train(options.steps, options.loss)
    with torch.no_grad():
        rows = measure(flow_map, options.states, options.draws)
    table = Table("draws", *(f"t = {t:g}" for t in TIMES), title="sliced W2 to exact draws of p(x_1 | x_t)")
    for name, errors in rows.items():
        table.add_row(name, *(f"{error:.3f}" for error in errors))
    Console().print(table)
    chains = measure_chains(flow_map, options.draws)
    table = Table("draws", "distance", title="sliced W2 of 40 sweeps of waltz to the tilt")
    for name, error in chains.items():
        table.add_row(name, f"{error:.3f}")
    Console().print(table)
    print(json.dumps({"benchmark": "posterior", "times": TIMES, "rows": rows, "waltz": chains}))


if __name__ == "__main__":
    main()
