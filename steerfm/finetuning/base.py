"""What every fine-tuning method shares: its tasks, the frozen reference, what it sees of an update, what it is refused for.

    loss = -mean r(x_1) / scale + control * penalty      # a method says how x_1 comes about and what is penalised

``scale`` is the reward's spread under the reference, so that one ``control`` (lambda) means the same for every reward: methods
that tilt aim at q proportional to p(x) exp(r(x) / (control * scale)). Random numbers belong to a row of the global batch and to
a step, never to a process: a continued run draws on, and two processes draw what one would.
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
"""How samples are drawn: noise of b rows and their condition to (b, *shape)."""


# --- what is asked for -----------------------------------------------------------------------------------------------
class Tasks(Rows):
    """What the model is asked for, one row each; one row where there is no condition."""

    def score(self, flow_map: FlowMap, reward: Reward, x: Tensor) -> Tensor:
        """Rewards (n,) of samples (n, *shape), one of each row, 256 at a time; all at once where the reward compares them."""
        rows = torch.arange(self.n).split(self.n if reward.groupwise else 256)
        return torch.cat([self[some].problem(flow_map, reward).score(x[some.to(x.device)]).total for some in rows])

    def problem(self, flow_map: FlowMap, reward: Reward) -> Problem:
        """The reward of these rows, for samples of the map; strength 1."""
        rows = replace(self, groups=self.alike()) if reward.groupwise else self
        device = flow_map.device
        return Problem(flow_map, reward, torch.ones(self.n, device=device), rows.to(device))

    def alike(self) -> Tensor:
        """(n,): rows that are asked for the same share a number."""
        labels = [None] * self.n if self.labels is None else self.labels.tolist()
        numbers: dict[Any, int] = {}
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in zip(labels, self.prompts or [None] * self.n)])


# --- one update ------------------------------------------------------------------------------------------------------
@dataclass
class Update:
    """What a method sees of one update.

    Attributes:
        step, steps: of the run.
        tuned: the map that is trained.
        averaged: with the averaged weights.
        reference: the frozen base.
        reward: what is optimised.
        tasks: of these b rows.
        all_tasks: what rows are drawn from.
        noise: b streams, one a row, from seeds that no person gives.
        generator: of what all rows share.
        control: lambda.
        scale: spread of the reward under the reference.
        memory: tensors that the method keeps from one update to the next, the same in all processes; they are part of a
            checkpoint.
        own: likewise, but with a row for each of these b rows.
        seed: of the run.

    Where several processes tune, the global batch has B rows, of which each has b.
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
        """How many tune."""
        group = active()
        return 1 if group is None else group.size

    @property
    def size(self) -> int:
        """B, the rows of the global batch."""
        return len(self.noise.seeds) * self.processes

    def part(self, n: int) -> slice:
        """Which of n rows are those of this process; all processes have some where n is a multiple of their number."""
        return part(n, active())

    def all_rows(self, x: Tensor) -> Tensor:
        """The rows (B, ...) of the global batch, from those (b, ...) of each process; without a gradient."""
        x = x.detach()
        return x if active() is None else torch.cat([told.to(x.device) for told in tell(x.cpu())])

    def common(self, purpose: str) -> torch.Generator:
        """A stream of this update, the same in all processes: for draws of all B rows."""
        return stream(derive(self.seed, "training", self.step), purpose)

    def as_one(self) -> AbstractContextManager[None]:
        """Inside, all processes make the same calls, whose rows maps made by `shared_out` share; they are counted once."""
        return nullcontext() if first() else aside(Ledger())

    @property
    def problem(self) -> Problem:
        return self.tasks.problem(self.tuned, self.reward)

    @property
    def strength(self) -> float:
        """Of the tilt that this control stands for."""
        return 1 / (self.control * self.scale)

    def normal(self) -> Tensor:
        """Standard normal (b, *shape)."""
        return self.noise.start(self.tuned)

    def uniform(self) -> float:
        """Uniform on [0, 1), the same for all rows and processes."""
        return torch.rand((), generator=self.generator).item()


def part(n: int, group: Group | None) -> slice:
    """Which of n rows are those of this process."""
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    return slice(rank * n // size, (rank + 1) * n // size)


Terms = dict[str, Tensor]
"""Scalars to log; ``loss`` is the one that is minimised. Each is a mean over rows, or the same in all processes."""


class Method(Protocol):
    """A way to fine-tune; any object with these members is one.

    Attributes:
        differentiates: whether it follows the gradient of the reward.
        tilts: whether it aims at the tilted law, so that control = 0 has no meaning.
        group: rows of a batch that share a task.
        law_is_map: whether the trained network is itself the flow map of what was learnt; if not, it is distilled.
        law_is_velocity: whether its velocity is that of what was learnt, so that only its jumps have to be distilled.

    One that uses its samples for several updates is also `Reusing`, one that does not fit every map `Choosy`.
    """

    differentiates: bool
    tilts: bool
    group: int
    law_is_map: bool
    law_is_velocity: bool

    def loss(self, update: Update) -> Terms:
        """Scalars of one update of b rows: ``loss`` is minimised, all are logged. A broken reward raises `RewardError`."""
        ...

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        """How samples of what was learnt are drawn."""
        ...


@runtime_checkable
class Reusing(Protocol):
    """A method that uses its samples for ``reuse`` updates: these get the same tasks and noise."""

    @property
    def reuse(self) -> int: ...


def chain(steps: int | None = None, transition: Transition | None = None) -> Callable[[FlowMap], Law]:
    """The law of a map sampled in ``steps`` transitions on its own grid; by default as many, and such, as are usual for it."""

    def of(flow_map: FlowMap) -> Law:
        times = flow_map.grid(flow_map.steps if steps is None else steps)
        move: Transition = transition or usual(flow_map)
        return lambda noise, cond: walk(flow_map, noise, times, cond, move)

    return of


def ode(flow_map: FlowMap, steps: int) -> Law:
    """The law of a map's velocity: its ODE by the midpoint rule, two calls a step."""
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
    """Standard deviation of the reward over ``n`` samples of the map, tasks in turn.

    Raises:
        NothingToLearnError: the reward is constant there.
    """
    rows = tasks[torch.arange(n) % tasks.n]
    values = plain_rewards(rows.problem(shared_out(flow_map), reward), [derive(seed, "scale", 0, i) for i in range(n)])
    if not (std := deviation(values)):
        raise NothingToLearnError(
            f"reward {reward.name!r} is {values[0].item():.4g} for all of {n} samples: there is nothing to learn"
        )
    return std


def by_velocity(flow_map: FlowMap) -> str:
    """What a map lacks for a method that trains its velocity, and what to take in place of it."""
    if can(flow_map, "velocity"):
        return ""
    return needs("velocity", "take draft_k, or policy with transition=renoise" if can(flow_map, "endpoint") else ONE_JUMP)


ONE_JUMP = "take noise, or direct with jumps=1 and trained=null"
"""What fits a generator."""


def check(method: Method, reward: Reward, control: float, flow_map: FlowMap | None = None) -> None:
    """Refuse what cannot work, before anything is run; see `FineTuning` for the errors."""
    if flow_map is not None:
        check_method(method, flow_map)
    if not (math.isfinite(control) and control >= 0):
        raise ValueError(f"control={control}: must be finite and at least 0 (it is lambda: larger stays nearer to the base)")
    if control == 0 and method.tilts:
        raise ValueError("control=0 asks for an infinite tilt: give a positive one")
    if method.differentiates and not reward.differentiable:
        raise RewardError(
            f"reward {reward.name!r} is a black box and {type(method).__name__} follows its gradient: use weighted or policy"
        )


def check_weights(flow_map: FlowMap) -> None:
    """Refuse a map without weights.

    Raises:
        ValueError: it has none.
    """
    if not any(True for _ in flow_map.body.parameters()):
        raise ValueError(
            f"a {type(flow_map).__name__} without parameters cannot be fine-tuned: make its network a torch.nn.Module"
        )


def ask_for_a_gradient(one: Problem) -> None:
    """Refuse a reward without a gradient before the first update: a plain function does not say it of itself.

    Raises:
        RewardError: it has none; or what is wrong with it.
    """
    if one.has_gradient():
        return
    with torch.no_grad():
        one.score(one.probe())  # a reward that fails says so itself
    raise RewardError(
        f"reward {one.reward.name!r} has no gradient: use weighted or policy, which follow none, and say differentiable = False"
    )
