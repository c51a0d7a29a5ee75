"""The contract of a steering method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerfm.closed_form import GaussianMixture
from steerfm.flowmap import FlowMap
from steerfm.randomness import untouched
from steerfm.rewards import Reward
from steerfm.steering import Method, SteeringResult, steer
from steerfm.steering.outcome import Fits
from steerfm.testing.contract import ContractError, after_seed, failing, moves_global_state, near, require

N = 3
BUDGETS = (4, 32, 128)


class Slope(Reward):
    """The mean of a sample: a reward with a gradient, for pictures and for vectors."""

    unit = "sum"

    def score(self, images: Tensor, prompts: Any = None, labels: Tensor | None = None) -> Tensor:
        return images.flatten(1).mean(1)


class BlackBox(Slope):
    """The same reward without a gradient."""

    differentiable = False

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Any = None, labels: Tensor | None = None) -> Tensor:
        return super().score(images)


def two_modes() -> FlowMap:
    """The exact map of two Gaussians in the plane."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [[0.1, 0.1], [0.2, 0.1]])
    return mixture.flow_map(steps=8)  # to 1e-4, in an eighth of the time


@dataclass
class Probe:
    """A method and its test problem.

    Attributes:
        method: the method.
        flow_map: the map.
        cond: a condition for all outputs, or None.
        result: of N outputs, with the seeds 0 ... N - 1.
    """

    method: Method
    flow_map: FlowMap
    cond: Any
    result: SteeringResult = field(init=False)

    @property
    def name(self) -> str:
        return f"method {type(self.method).__name__!r}"

    def run(
        self, method: Method | None = None, reward: Reward | None = None, n: int = N, seeds: Any = 0, **options: Any
    ) -> Any:
        with failing(self.name):
            return steer(self.flow_map, reward or Slope(), method or self.method, n, seeds, cond=self.cond, **options)


def check_method(method: Method, flow_map: FlowMap | None = None, cond: Any = None) -> None:
    """Check a steering method against the contract of `steerfm.steer` and of the bench.

    Args:
        method: an object with the `Method` protocol; the check makes a dozen short runs.
        flow_map: the map of the runs; default an exact map of two Gaussians in the plane.
        cond: a label or prompt for a model that needs one.

    Raises:
        ContractError: the first violation and its fix, in one sentence.
    """
    require(not isinstance(method, type), f"{method} is a class", "check an object of it, with the arguments that it needs")
    probe = Probe(method, flow_map or two_modes(), cond)
    with untouched():
        for check in CHECKS:
            check(probe)


def protocol(probe: Probe) -> None:
    """It has particles, check and run, and accepts a reward with a gradient."""
    for part in ("particles", "check", "run"):
        require(
            hasattr(probe.method, part), f"{probe.name} has no {part}", "see steerfm.steering.Method: particles, check, run"
        )
    k = probe.method.particles
    require(
        isinstance(k, int) and not isinstance(k, bool) and k > 0,
        f"{probe.name} has particles = {k!r}",
        "particles is the number per output, a whole number of at least 1",
    )
    with failing(probe.name):
        probe.method.check(Slope())


def outcome(probe: Probe) -> None:
    """It returns all outputs, with the rewards of their samples and normalised weights."""
    probe.result = result = probe.run()
    shape, fix = (
        probe.flow_map.shape,
        f"run returns an Outcome of samples (n, k, *shape), here ({N}, k, *{probe.flow_map.shape})",
    )
    n, k = result.samples.shape[:2]
    require(n == N, f"{probe.name} returns {n} outputs instead of {N}", fix)
    require(
        tuple(result.samples.shape[2:]) == shape and k > 0, f"{probe.name} returns samples {tuple(result.samples.shape)}", fix
    )
    for name in ("rewards", "log_weights"):
        value = getattr(result, name)
        require(
            value.shape == (N, k),
            f"{probe.name} returns {name} {tuple(value.shape)} for samples {tuple(result.samples.shape)}",
            f"{name} has a number for each particle, (n, k)",
        )
    require(
        torch.isfinite(result.samples).all(), f"{probe.name} returns samples of NaN or inf", "lower the guidance, or cap it"
    )
    images = result.images().flatten(0, 1)
    require(
        near(result.rewards.flatten(), Slope()(images.detach()), 1e-3),
        f"{probe.name} returns rewards that are not those of its samples",
        "score the samples that are returned, problem.score(x).total, in their order",
    )
    total = result.log_weights.double().logsumexp(1)
    require(
        not result.log_weights.isnan().any() and near(total, torch.zeros_like(total), 1e-3),
        f"{probe.name} returns log-weights whose exponentials sum to {total[0].exp():.4g} for an output",
        "steerfm.steering.weights.normalise makes them sum to 1",
    )
    require(
        result.log_z is None or result.log_z.shape == (N,),
        f"{probe.name} returns log_z {tuple(getattr(result.log_z, 'shape', ()))}",
        "log_z has a number for each output, (n,), or is None",
    )


def seeds(probe: Probe) -> None:
    """Each output depends on its seed only, not on the global random state or on other outputs."""
    first, noise = probe.result, "draw from the noise that run is given, and its streams noise.other(purpose)"
    again, other = (after_seed(7, lambda seed=seed: probe.run(seeds=seed)) for seed in (0, 1000))
    require(near(first.samples, again.samples, 1e-6), f"{probe.name} draws other samples for the same seeds", noise)
    require(not near(first.samples, other.samples, 1e-6), f"{probe.name} draws the same samples for other seeds", noise)
    require(not moves_global_state(probe.run), f"{probe.name} seeds or draws from a global random state", noise)
    alone = probe.run(n=1, seeds=[1])
    same = near(first.samples[1:2], alone.samples, 1e-4) and near(first.log_weights[1:2].exp(), alone.log_weights.exp(), 1e-3)
    require(
        same,
        f"{probe.name} gives an output among {N} otherwise than alone",
        "keep outputs separate: select and average within the particles of one output",
    )
    parts = probe.run(batch_size=2)
    require(
        near(first.samples, parts.samples, 1e-4),
        f"{probe.name} gives other samples with batch_size = 2",
        "use the n argument of run, and keep no state on self",
    )


def progress(probe: Probe) -> None:
    """It reports its progress up to the end."""
    ticks: list[tuple[int, int]] = []
    probe.run(n=1, progress=lambda done, steps: ticks.append((done, steps)))
    fix = "call tick(steps done, total steps) after every step"
    require(ticks, f"{probe.name} never reports its progress", fix)
    done = [i for i, _ in ticks]
    require(
        done == sorted(done) and ticks[-1][0] == ticks[-1][1],
        f"{probe.name} ends at step {ticks[-1][0]} of {ticks[-1][1]}",
        fix,
    )


def black_boxes(probe: Probe) -> None:
    """It works with a black box, or refuses one in check."""
    try:
        probe.method.check(BlackBox())
    except ValueError:
        return
    try:
        probe.run(reward=BlackBox())
    except ContractError as error:
        raise ContractError(
            f"{probe.name} accepts a reward without a gradient and then fails ({error}): "
            "raise a ValueError in check, or work without a gradient"
        ) from error


def budget(probe: Probe) -> None:
    """A method with ``within`` keeps to the budget of network evaluations."""
    if not isinstance(probe.method, Fits):
        return
    fit = probe.method.within
    sizes = {}
    for most in BUDGETS:
        try:
            sizes[most] = fit(most)
        except ValueError:  # too small a budget
            continue
    require(
        sizes,
        f"{probe.name} refuses budgets of {', '.join(map(str, BUDGETS))}",
        "within(budget) returns the method in that size",
    )
    for most, method in sizes.items():
        if method is not None:
            cost = probe.run(method).cost.evaluations / N
            require(
                cost <= most,
                f"{probe.name} within {most} spends {cost:g} network evaluations per output",
                "count a backward pass as two, and round steps and particles down",
            )


CHECKS = (protocol, outcome, seeds, progress, black_boxes, budget)
"""The checks of `check_method`, in this order; see their docstrings."""
