"""The common parts of fine-tuning methods: tasks, the input of an update, the method protocol, and checks.

    loss = -mean r(x_1) / scale + control * penalty      # a method defines the sampling of x_1 and the penalty

``scale`` is the reward's spread under the reference, so that a value of ``control`` (lambda) means the same for every reward.
Methods that tilt aim at q proportional to p(x) exp(r(x) / (control * scale)). Random numbers depend on the row of the global
batch and on the step, never on the process. So a resumed run, or a run with more processes, draws the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steerfm.capabilities import can, check_method, needs
from steerfm.cost import Ledger, aside
from steerfm.flowmap import FlowMap
from steerfm.processes import Group, active, first, tell
from steerfm.randomness import derive, stream
from steerfm.rewards import Reward, RewardError
from steerfm.rows import Condition, Rows, move_condition
from steerfm.sampling import Noise, walk
from steerfm.spread import shared_out
from steerfm.steering.value import Problem, deviation, plain_rewards
from steerfm.transitions import Transition, usual

Law = Callable[[Noise, Condition], Tensor]
"""A sampler: the noise of b rows and their condition to samples (b, *shape)."""


# --- tasks -----------------------------------------------------------------------------------------------------------
class Tasks(Rows):
    """Conditions, prompts and labels to train on, one per row; a single row without a condition."""

    def score(self, flow_map: FlowMap, reward: Reward, x: Tensor) -> Tensor:
        """Rewards (n,) of samples (n, *shape), one per row: 256 at a time, or all at once for a group-wise reward."""
        rows = torch.arange(self.n).split(self.n if reward.groupwise else 256)
        return torch.cat([self[some].problem(flow_map, reward).score(x[some.to(x.device)]).total for some in rows])

    def problem(self, flow_map: FlowMap, reward: Reward) -> Problem:
        """The problem of these rows, with strength 1."""
        rows = replace(self, groups=self.alike()) if reward.groupwise else self
        device = flow_map.device
        return Problem(flow_map, reward, torch.ones(self.n, device=device), rows.to(device))

    def alike(self) -> Tensor:
        """(n,) group numbers: rows with the same label and prompt share one."""
        labels = [None] * self.n if self.labels is None else self.labels.tolist()
        numbers: dict[Any, int] = {}
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in zip(labels, self.prompts or [None] * self.n)])


# --- one update ------------------------------------------------------------------------------------------------------
@dataclass
class Update:
    """The input of a method for one update.

    Attributes:
        step: number of this update.
        steps: updates of the run.
        tuned: the map to train.
        averaged: the same map with the averaged weights.
        reference: the frozen base.
        reward: the reward to optimise.
        tasks: of these b rows.
        all_tasks: all tasks of the run.
        noise: b streams, one per row, with seeds that users cannot give.
        generator: for random numbers that all rows share.
        control: lambda.
        scale: spread of the reward under the reference.
        memory: tensors that the method passes from one update to the next, equal in all processes; part of checkpoints.
        own: likewise, but with one row for each of these b rows.
        seed: of the run.

    With several processes, the global batch has B rows, and each process has b of them.
    """

    step: int
    steps: int
    tuned: FlowMap
    averaged: FlowMap
    reference: FlowMap
    reward: Reward
    tasks: Tasks
    all_tasks: Tasks
    noise: Noise
    generator: torch.Generator
    control: float
    scale: float
    memory: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    own: dict[str, Tensor] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Number of processes."""
        group = active()
        return 1 if group is None else group.size

    @property
    def size(self) -> int:
        """B, the rows of the global batch."""
        return len(self.noise.seeds) * self.processes

    def part(self, n: int) -> slice:
        """The rows of this process among n; they are divided equally if n is a multiple of the number of processes."""
        return part(n, active())

    def all_rows(self, x: Tensor) -> Tensor:
        """Gather the rows (B, ...) of the global batch from the rows (b, ...) of each process; without a gradient."""
        x = x.detach()
        return x if active() is None else torch.cat([rows.to(x.device) for rows in tell(x.cpu())])

    def common(self, purpose: str) -> torch.Generator:
        """A generator of this update, equal in all processes: for draws of all B rows."""
        return stream(derive(self.seed, "training", self.step), purpose)

    def as_one(self) -> AbstractContextManager[None]:
        """A context for calls that all processes make together: maps from `shared_out` divide the rows; costs count once."""
        return nullcontext() if first() else aside(Ledger())

    @property
    def problem(self) -> Problem:
        return self.tasks.problem(self.tuned, self.reward)

    @property
    def strength(self) -> float:
        """Strength of the tilt that corresponds to this control."""
        return 1 / (self.control * self.scale)

    def normal(self) -> Tensor:
        """Standard normal (b, *shape)."""
        return self.noise.start(self.tuned)

    def uniform(self) -> float:
        """A uniform number in [0, 1), the same for all rows and processes."""
        return torch.rand((), generator=self.generator).item()


def part(n: int, group: Group | None) -> slice:
    """The rows of this process among n."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    return slice(rank * n // size, (rank + 1) * n // size)


Terms = dict[str, Tensor]
"""Scalars to log; ``loss`` is minimised. Each is a mean over rows, or equal in all processes."""


class Method(Protocol):
    """A fine-tuning method: any object with these members.

    Attributes:
        differentiates: whether it follows the gradient of the reward.
        tilts: whether its target is the tilted law, so that control = 0 has no meaning.
        group: rows of a batch that share a task.
        law_is_map: whether the trained network is itself the tuned flow map; if not, the result is distilled.
        law_is_velocity: whether the network's velocity is that of the result, so that only the jumps need distillation.

    A method that uses its samples for several updates is also `Reusing`; one that does not fit every map is `Choosy`.
    """

    differentiates: bool
    tilts: bool
    group: int
    law_is_map: bool
    law_is_velocity: bool

    def loss(self, update: Update) -> Terms:
        """Scalars of one update of b rows. ``loss`` is minimised, all are logged.

        Raises:
            RewardError: the reward fails.
        """
        ...

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        """The sampler of the tuned model."""
        ...


@runtime_checkable
class Reusing(Protocol):
    """A method that uses its samples for ``reuse`` updates, which get the same tasks and noise."""

    @property
    def reuse(self) -> int: ...


def chain(steps: int | None = None, transition: Transition | None = None) -> Callable[[FlowMap], Law]:
    """The law of a map in ``steps`` transitions on its own grid; by default the map's usual number and kind."""

    def of(flow_map: FlowMap) -> Law:
        times = flow_map.grid(flow_map.steps if steps is None else steps)
        move: Transition = transition or usual(flow_map)
        return lambda noise, cond: walk(flow_map, noise, times, cond, move)

    return of


def ode(flow_map: FlowMap, steps: int) -> Law:
    """The law of a map's velocity: its ODE by the midpoint rule, two calls per step."""
    times = flow_map.grid(steps)

    def law(noise: Noise, cond: Condition) -> Tensor:
        x = noise.start(flow_map)
        for s, t in zip(times, times[1:]):
            middle = x + (t - s) / 2 * flow_map.velocity(x, s, cond)
            x = x + (t - s) * flow_map.velocity(middle, (s + t) / 2, cond)
        return x

    return law


def draw(law: Law, tasks: Tasks, flow_map: FlowMap, seeds: list[int], k: int = 1, rows: int = 256) -> Tensor:
    """Samples (n * k, *shape) of a law, ``k`` for each task, without a gradient and in batches of about ``rows``."""
    size, parts = max(1, rows // k), []
    with torch.no_grad():
        for begin in range(0, tasks.n, size):
            part = torch.arange(begin, min(begin + size, tasks.n))
            cond = move_condition(tasks[part.repeat_interleave(k)].cond, flow_map.device)
            parts.append(law(Noise(seeds[begin : begin + size], k), cond))
    return torch.cat(parts)


class NothingToLearnError(RewardError):
    """A reward that is the same for all samples."""

    exit_code = 1


def spread(flow_map: FlowMap, reward: Reward, tasks: Tasks, n: int = 256, seed: int = 0) -> float:
    """Standard deviation of the reward over ``n`` samples of the map, cycling through the tasks.

    Raises:
        NothingToLearnError: the reward is constant there.
    """
    rows = tasks[torch.arange(n) % tasks.n]
    values = plain_rewards(rows.problem(shared_out(flow_map), reward), [derive(seed, "scale", 0, i) for i in range(n)])
    if not (std := deviation(values)):
        raise NothingToLearnError(
            f"reward {reward.name!r} is {values[0].item():.4g} for all {n} samples: there is nothing to learn"
        )
    return std


def by_velocity(flow_map: FlowMap) -> str:
    """What the map lacks for a method that trains its velocity, and what to use instead; "" if it lacks nothing."""
    if can(flow_map, "velocity"):
        return ""
    return needs("velocity", "take draft_k, or policy with transition=renoise" if can(flow_map, "endpoint") else ONE_JUMP)


ONE_JUMP = "take noise, or direct with jumps=1 and trained=null"
"""Advice for a generator."""


def check(method: Method, reward: Reward, control: float, flow_map: FlowMap | None = None) -> None:
    """Check the arguments before the run; see `FineTuning` for the errors."""
    if flow_map is not None:
        check_method(method, flow_map)
    if not (math.isfinite(control) and control >= 0):
        raise ValueError(
            f"control={control}: must be finite and at least 0 (it is lambda: larger values stay closer to the base)"
        )
    if control == 0 and method.tilts:
        raise ValueError("control=0 means an infinite tilt: give a positive number")
    if method.differentiates and not reward.differentiable:
        raise RewardError(
            f"reward {reward.name!r} is a black box and {type(method).__name__} follows its gradient: use weighted or policy"
        )


def check_weights(flow_map: FlowMap) -> None:
    """Check that a map has weights.

    Raises:
        ValueError: it has none.
    """
    if not any(True for _ in flow_map.body.parameters()):
        raise ValueError(
            f"a {type(flow_map).__name__} without parameters cannot be fine-tuned: make its network a torch.nn.Module"
        )


def ask_for_a_gradient(one: Problem) -> None:
    """Check before the first update that the reward has a gradient, since a plain function does not declare it.

    Raises:
        RewardError: it has none, or it fails.
    """
    if one.has_gradient():
        return
    with torch.no_grad():
        one.score(one.probe())  # a broken reward raises its own error
    raise RewardError(
        f"reward {one.reward.name!r} has no gradient: use weighted or policy, which need none, and set differentiable = False"
    )
