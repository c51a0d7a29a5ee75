"""Methods that search the initial noise: the best x_0 for the generator X_{0,1}, by gradient or by trial.

    objective(x_0) = strength * r(X_{0,1}(x_0)) - prior * penalty(x_0)

With a flow map the whole generator is one call, or a few. It can be tried often, or differentiated as a whole. Every output
has ``particles`` independent chains, and each chain returns its best candidate. The results are those of a search: uniform
weights and no log Z. The candidates of all chains and outputs are evaluated as one batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from steerfm.capabilities import can, needs
from steerfm.checks import at_least_one
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.registry import Readable
from steerfm.rewards import Reward, RewardError
from steerfm.rows import repeat_rows, take_rows
from steerfm.sampling import Noise
from steerfm.steering.guidance import gradient_of
from steerfm.steering.outcome import Outcome, Tick, Trace
from steerfm.steering.size import Sized
from steerfm.steering.value import Problem
from steerfm.steering.weights import wide


# --- candidates ------------------------------------------------------------------------------------------------------
@dataclass
class Trials:
    """One candidate per row.

    Attributes:
        x: (b, *shape) the searched variable: the initial noise, or a state on the path.
        sample: (b, *shape) its endpoint.
        objective: (b,) the number that is compared, in the wide dtype.
        reward: (b,) reward of the sample.
        components: raw value of every term, (b,) each, by name.
    """

    x: Tensor
    sample: Tensor
    objective: Tensor
    reward: Tensor
    components: dict[str, Tensor]

    def select(self, rows: Tensor) -> Trials:
        """These rows only."""
        components = {name: value[rows] for name, value in self.components.items()}
        return Trials(self.x[rows], self.sample[rows], self.objective[rows], self.reward[rows], components)

    @classmethod
    def interleave(cls, parts: Sequence[Trials]) -> Trials:
        """The first row of each part, then the second of each, and so on."""

        def rows(of: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(of), 1).flatten(0, 1)

        return cls(
            x=rows([part.x for part in parts]),
            sample=rows([part.sample for part in parts]),
            objective=rows([part.objective for part in parts]),
            reward=rows([part.reward for part in parts]),
            components={name: rows([part.components[name] for part in parts]) for name in parts[0].components},
        )

    def replace(self, other: Trials, rows: Tensor) -> Trials:
        """``other`` where ``rows`` (b,) is true, else this one."""
        wide_rows = expand_time(rows, self.x).bool()
        return Trials(
            torch.where(wide_rows, other.x, self.x),
            torch.where(wide_rows, other.sample, self.sample),
            torch.where(rows, other.objective, self.objective),
            torch.where(rows, other.reward, self.reward),
            {name: torch.where(rows, other.components[name], value) for name, value in self.components.items()},
        )

    def better(self, other: Trials) -> Trials:
        """In every row the candidate of higher objective; in a tie, this one."""
        return self.replace(other, other.objective > self.objective)

    def outcome(self, n: int, trace: Trace) -> Outcome:
        """The rows as equally weighted particles of ``n`` outputs."""
        k = len(self.reward) // n
        return Outcome(
            samples=self.sample.unflatten(0, (n, k)),
            rewards=self.reward.view(n, k),
            components={name: value.view(n, k) for name, value in self.components.items()},
            log_weights=self.objective.new_full((n, k), -math.log(k)),
            log_z=None,
            trace=trace,
        )


def evaluate(problem: Problem, x: Tensor, hops: int, k: int = 1) -> Trials:
    """The endpoints and rewards of ``k`` noises for every row, in ``hops`` equal jumps.

    Args:
        x: (b * k, *shape) the noises.
    """

    def make(rows: slice) -> Tensor:
        noises = x[rows.start * k : rows.stop * k]
        return problem.flow_map.lookahead(noises, 0.0, repeat_rows(take_rows(problem.cond, rows), k), hops)

    sample, scores = problem.generate(make)
    return Trials(x, sample, problem.tilt(scores.total), scores.total, scores.components)


def search_trace(values: Sequence[Tensor], looks: Sequence[Tensor]) -> Trace:
    """The trace of a method without weights, resampling or guidance.

    Args:
        values: (n, k) for every iteration: strength * reward of the best so far.
        looks: (n, *shape) for every iteration: the first particle's best sample so far; empty if they are not recorded.
    """
    value = torch.stack(list(values))
    iterations, n, k = value.shape
    return Trace(
        t=torch.arange(1, iterations + 1) / iterations,
        ess=value.new_ones(iterations, n),
        resampled=torch.zeros(iterations, n, dtype=torch.bool, device=value.device),
        ancestors=torch.arange(k, device=value.device).expand(iterations, n, k),
        value=value,
        guidance_ratio=torch.zeros_like(value),
        lookaheads=torch.stack(list(looks)) if looks else None,
    )


# --- the common loop -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NoiseSearch(Sized, metaclass=Readable):
    """The common loop. A method implements `_walk`, which yields candidates at the start and after every iteration.

    Attributes:
        particles: independent chains per output.
        iterations: rounds of the search; every chain starts from the plain sample.
        hops: equal jumps from noise to data.
    """

    samples: ClassVar[str] = "no"
    paper: ClassVar[str] = ""

    particles: int = 1
    iterations: int = 50
    hops: int = 1

    def __post_init__(self) -> None:
        at_least_one(particles=self.particles, iterations=self.iterations, hops=self.hops)

    def check(self, reward: Reward) -> None:
        """Accepts any reward."""

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; steps are iterations."""
        return replace(self, iterations=steps, particles=number)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`. The generator is one jump, or several jumps, which may be Euler steps."""
        if can(flow_map, "generator" if self.hops == 1 else "velocity"):
            return ""
        if can(flow_map, "velocity"):
            return "with hops=1 " + needs("generator", "take hops=8 or more, which are Euler steps")
        return f"with hops={self.hops} " + needs("two_time", "take hops=1")

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`."""
        flow_map, values, looks = problem.flow_map, [], []
        x = noise.start(flow_map)
        with torch.no_grad():
            walk = self._walk(problem, noise, x)
            best = next(walk)
            for i, trials in enumerate(walk, 1):
                best = best.better(trials)
                values.append((problem.strength * best.reward).view(n, -1))
                if lookaheads:
                    looks.append(best.sample.unflatten(0, (n, -1))[:, 0])
                tick(i, self.iterations)
        return best.outcome(n, search_trace(values, looks))

    def _walk(self, problem: Problem, noise: Noise, x: Tensor) -> Iterator[Trials]:
        raise NotImplementedError

    def _look(self, problem: Problem, x: Tensor, k: int = 1) -> Trials:
        return evaluate(problem, x, self.hops, k)


# --- by trial --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ZeroOrderSearch(NoiseSearch):
    """Hill climbing in the noise by trial: the best neighbour becomes the pivot if it beats it (Ma et al. 2501.09732).

        neighbour = sqrt(1 - radius^2) pivot + radius z,      z ~ N(0, I)

    This mix preserves the variance: if the pivot is a draw of N(0, I), so is its neighbour. All candidates stay on the shell
    on which the map was trained; a sum pivot + radius z would leave it. Black-box rewards work. The reward of the pivot
    never falls (for a positive strength; for a negative one it never rises).

    Costs an iteration: ``candidates`` x (``hops`` forwards, one decode, one reward call) per particle; and one at the start.
    Within a budget: one iteration at 64 evaluations, 3 at 256, the rest particles (docs/methods.md).
    Samples: no. It is a search: selection by trial follows the reward anywhere.

    Attributes:
        candidates: neighbours of each pivot an iteration.
        radius: size of a move, in (0, 1]; 1 forgets the pivot.
    """

    paper: ClassVar[str] = "2501.09732"
    shape: ClassVar[Mapping[int, float]] = {64: 1, 256: 3}

    iterations: int = 16
    candidates: int = 4
    radius: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(candidates=self.candidates)
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius={self.radius}: must be in (0, 1]")

    def _walk(self, problem: Problem, noise: Noise, x: Tensor) -> Iterator[Trials]:
        first = torch.arange(len(x), device=x.device) * self.candidates
        yield (pivot := self._look(problem, x))
        for _ in range(self.iterations):
            z = noise.normal((self.candidates, *problem.flow_map.shape), x)
            neighbours = math.sqrt(1 - self.radius**2) * pivot.x.unsqueeze(1) + self.radius * z
            trials = self._look(problem, neighbours.flatten(0, 1), self.candidates)
            winner = trials.objective.view(-1, self.candidates).argmax(1)
            pivot = pivot.better(trials.select(first + winner))
            yield pivot


@dataclass(frozen=True)
class RandomSearch(ZeroOrderSearch):
    """Rounds of fresh candidates (Ma et al. 2501.09732): best-of-n with n = 1 + iterations * candidates.

    It is `ZeroOrderSearch` at radius 1, with the same costs and rewards. Within a budget: as many candidates as it buys.
    Samples: no. It is a search: the best of many candidates follows the reward, not the target.
    """

    radius: float = field(default=1.0, init=False)

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of candidates."""
        return replace(self, iterations=steps, candidates=number)


# --- by gradient -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NoiseAscent(NoiseSearch):
    """Common parts of the gradient methods: the prior, and a limit on the length of a step.

    The penalty |x|^2/2 - (d - 1) log |x| is minus the log-density of the norm of x_0 ~ N(0, I), up to a constant. It keeps x_0
    at the radius sqrt(d - 1) and leaves its direction free.

    Attributes:
        prior: weight of the penalty; 1 is its weight by Bayes' rule.
        step: longest gradient step, as a share of sqrt(d), the typical norm of the noise. Gradients through a flow map are
            heavy-tailed.
    """

    prior: float = 0.01
    step: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prior >= 0:
            raise ValueError(f"prior={self.prior}: must be at least 0")
        if not self.step > 0:
            raise ValueError(f"step={self.step}: must be positive")

    def check(self, reward: Reward) -> None:
        if not reward.differentiable:
            raise RewardError(
                f"reward {reward.name!r} is a black box, and {type(self).__name__} follows its gradient: use ZeroOrderSearch, "
                "RandomSearch or BestOfN"
            )

    def _weigh(self, trials: Trials) -> Trials:
        """The candidates without their graph; the penalty is subtracted from the objective."""
        norm, d = _norm(trials.x), trials.x[0].numel()
        objective = trials.objective.detach() - self.prior * (0.5 * norm.square() - (d - 1) * norm.log())
        return Trials(trials.x.detach(), trials.sample.detach(), objective, trials.reward.detach(), trials.components)

    def _climb(self, problem: Problem, x: Tensor) -> tuple[Trials, Tensor]:
        """The candidates, and the gradient of their objectives, (b, *shape)."""
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            trials = self._look(problem, x)
            up = gradient_of(problem, trials.objective, x, "ZeroOrderSearch, RandomSearch or BestOfN")
        trials = self._weigh(trials)
        pull = self.prior * (1 - (x[0].numel() - 1) / _norm(trials.x).square())
        return trials, up - expand_time(pull, trials.x) * trials.x


@dataclass(frozen=True)
class ReNO(NoiseAscent):
    """Reward-based noise optimisation (Eyring et al. 2406.04312): gradient ascent on x_0 with Nesterov momentum.

    Gradients are clipped row by row. The result is the candidate with the best objective. The defaults are the paper's for
    latents of 16,384 entries (rate 5, gradients clipped at 0.1, prior 0.01, 50 iterations), with the clip made relative to
    sqrt(d). Within a budget: 3 iterations at 64 evaluations, 5 at 256, of many chains, with proportionally longer steps
    (docs/methods.md).

    Costs an iteration: ``hops`` forwards and backwards, one decode, one reward call and backward per particle; one
    evaluation without backward at the end.
    Samples: no. It is an ascent: even with prior 1 it looks for the mode of the tilt, not for draws.

    Attributes:
        rate: step per gradient.
        momentum: share of the last step that carries over, in (0, 1).
    """

    paper: ClassVar[str] = "2406.04312"

    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 5}

    step: float = 0.004
    rate: float = 5.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}: must be positive")
        if not 0 < self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be in (0, 1)")

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; fewer steps are longer, so that the total distance stays the same."""
        return replace(super().sized(steps, number), step=self.step * self.iterations / steps)

    def _walk(self, problem: Problem, noise: Noise, x: Tensor) -> Iterator[Trials]:
        velocity = torch.zeros_like(x)
        for _ in range(self.iterations):
            trials, gradient = self._climb(problem, x)
            yield trials
            gradient = _clip(gradient, self.step / self.rate)
            velocity = self.momentum * velocity + gradient  # by hand: the first use of torch.optim imports its compiler
            x = x + self.rate * (gradient + self.momentum * velocity)
        yield self._weigh(self._look(problem, x))


@dataclass(frozen=True)
class DFlow(NoiseAscent):
    """Differentiate through the flow (Ben-Hamu et al. 2402.14017, algorithm 1): L-BFGS on x_0 through several jumps.

    Rows are independent: each has its own curvature pairs, and each iteration tries one point for every row. A point that
    gains enough (Armijo) becomes the row's next state; any other point halves the row's step. So a line search in one row
    costs the other rows nothing. The penalty and its weight are those of `ReNO`.

    Costs an iteration: ``hops`` forwards and backwards, one decode, one reward call and backward per particle; one
    evaluation without backward at the end.
    Within a budget: 2 iterations at 64 evaluations, 5 at 256, the rest particles (docs/methods.md).
    Samples: no. It is an ascent: even with prior 1 it looks for the mode of the tilt, not for draws.

    Attributes:
        memory: number of curvature pairs.
    """

    paper: ClassVar[str] = "2402.14017"
    shape: ClassVar[Mapping[int, float]] = {64: 2, 256: 5}

    iterations: int = 20
    hops: int = 4
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"memory={self.memory}: at least one pair is needed")

    def _walk(self, problem: Problem, noise: Noise, x: Tensor) -> Iterator[Trials]:
        curvature = Curvature(self.memory)
        now, gradient = self._climb(problem, x)
        length = torch.ones_like(now.objective)
        yield now
        for i in range(self.iterations):
            move = _scale(_clip(curvature.direction(gradient), self.step), length)
            if i + 1 == self.iterations:
                yield self._weigh(self._look(problem, now.x + move))
                return
            trial, gradient_there = self._climb(problem, now.x + move)
            yield trial
            curvature.learn(trial.x - now.x, gradient - gradient_there)  # a rejected point informs the curvature as well
            gains = trial.objective - now.objective >= 1e-4 * _dot(gradient, move)
            now = now.replace(trial, gains)
            gradient = torch.where(expand_time(gains, x).bool(), gradient_there, gradient)
            length = torch.where(gains, 1.0, 0.5 * length)


class Curvature:
    """The inverse curvature of every row, from its last moves: limited-memory BFGS (Nocedal & Wright 2006, algorithm 7.4).

    Args:
        memory: number of moves to remember.
    """

    def __init__(self, memory: int) -> None:
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=memory)
        self.scale: Tensor | float = 1.0

    def learn(self, s: Tensor, y: Tensor) -> None:
        """Add a move. Rows that curve upwards are ignored.

        Args:
            s: (b, *shape) the move.
            y: (b, *shape) the decrease of the gradient along it.
        """
        bend, squares = _dot(s, y), _dot(y, y)
        concave = bend > torch.finfo(s.dtype).eps * (squares * _dot(s, s)).sqrt()
        # a zero weight removes the pair from the row's recursion, so that all rows can share one list
        self.pairs.append((s, y, torch.where(concave, 1 / bend, 0.0)))
        self.scale = torch.where(concave, bend / squares, self.scale)

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient times the inverse curvature, (b, *shape): the step to the maximum of a quadratic objective."""
        steps, q = [], gradient
        for s, y, weight in reversed(self.pairs):
            steps.append(weight * _dot(s, q))
            q = q - _scale(y, steps[-1])
        q = _scale(q, self.scale)
        for (s, y, weight), step in zip(self.pairs, reversed(steps)):
            q = q + _scale(s, step - weight * _dot(y, q))
        return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product row by row, (b,), in the wide dtype."""
    return (a * b).flatten(1).sum(1, dtype=wide(a.device))


def _norm(x: Tensor) -> Tensor:
    """Length of every row, (b,), in the wide dtype."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide(x.device))


def _scale(x: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply every row by its factor (b,), in the dtype of x."""
    return expand_time(factor, x) * x


def _clip(x: Tensor, step: float) -> Tensor:
    """Shorten the rows to a norm of at most ``step`` sqrt(d)."""
    longest = step * math.sqrt(x[0].numel())
    return _scale(x, (longest / _norm(x).clamp_min(1e-30)).clamp_max(1.0))
