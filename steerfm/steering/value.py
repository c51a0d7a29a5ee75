"""The value of a state and its gradient, through interchangeable look-aheads.

    V_t(x) = log mean_k exp(log_w_k + beta strength r(z_k)),      z_k the look-ahead's endpoints

estimates log E[exp(strength r(x_1)) | x_t = x] at beta = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steerfm.flowmap import FlowMap
from steerfm.randomness import stream
from steerfm.rewards import Reward, RewardError, Scores
from steerfm.rows import Condition, Rows, cuts
from steerfm.sampling import Noise, walk
from steerfm.scores import counted_from
from steerfm.spread import even, promise
from steerfm.steering.lookahead import Endpoints, Lookahead
from steerfm.steering.weights import log_mean_exp, wide
from steerfm.transitions import usual

Beta = Callable[[Endpoints, Tensor], Tensor]
"""The inverse temperature (b,) of one evaluation, from the endpoints with their log-weights and strength * r (b, k)."""


# --- the problem -----------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """The problem to steer: the map, the reward, and one row per particle of everything that depends on the output.

    Attributes:
        flow_map: the model.
        reward: the reward.
        strength: (b,) strength of the tilt per particle.
        rows: condition, prompt and labels of each particle.
    """

    flow_map: FlowMap
    reward: Reward
    strength: Tensor
    rows: Rows

    @property
    def cond(self) -> Condition:
        """The condition of each particle."""
        return self.rows.cond

    def score(self, z: Tensor, k: int = 1) -> Scores:
        """Scores of b * k endpoints in model space, ``k`` for each particle; see `promise`."""
        return self.promise(z, k)()

    def promise(self, z: Tensor, k: int = 1) -> Callable[[], Scores]:
        """Start to score b * k endpoints in model space, ``k`` for each particle, and return a function that waits.

        The endpoints are decoded (unless the reward reads the model's space) and scored, at most ``micro_batch`` at a time. A
        reward that compares them receives all of them at once.
        """
        rows, most = self.rows if k == 1 else self.rows.repeat(k), self.flow_map.micro_batch
        if most is None or len(z) <= most or self.reward.groupwise:
            return promise(self.flow_map, self.reward, z, rows)
        waits = {}
        for part in cuts(len(z), most):
            with counted_from(part.start):
                waits[part.start] = promise(self.flow_map, self.reward, z[part], rows[part])
        return lambda: joined(waits)

    def generate(self, make: Callable[[slice], Tensor]) -> tuple[Tensor, Scores]:
        """Generate endpoints (b * k, *shape) and score them.

        This happens in one piece, or in `parts` if the reward runs elsewhere: the map then makes one part while the part before
        it is scored.

        Args:
            make: returns the endpoints (b' * k, *shape) of some of the particles.
        """
        parts = self.parts()
        if len(parts) == 1:
            z = make(parts[0])
            return z, self.score(z, len(z) // len(self.strength))
        ends, waits, begin = [], {}, 0
        for rows in parts:
            ends.append(z := make(rows))
            with counted_from(begin):
                waits[begin] = self.select(rows).promise(z, len(z) // (rows.stop - rows.start))
            begin += len(z)
        return torch.cat(ends), joined(waits)

    def parts(self) -> list[slice]:
        """The parts in which `generate` works: one, or several (see `even`) if the reward runs elsewhere."""
        n, most = len(self.strength), self.flow_map.micro_batch
        if not self.reward.elsewhere or self.reward.groupwise:
            return [slice(0, n)]
        return even(slice(0, n)) if most is None else cuts(n, most)

    def tilt(self, r: Tensor) -> Tensor:
        """strength * r of rewards (b * k,), ``k`` for each particle, in the wide dtype.

        Raises:
            RewardError: the product is not finite.
        """
        strength = self.strength.to(wide(r.device)).repeat_interleave(len(r) // len(self.strength))
        tilt = strength * r.to(strength)
        finite = torch.isfinite(tilt.detach())
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise RewardError(
                f"strength {strength[row].item():g} times reward {self.reward.name!r} ({r[row].item():g}) is not finite: "
                "lower the strength", sample=row,
            )  # fmt: skip
        return tilt

    def has_gradient(self) -> bool:
        """Whether the reward has a gradient. It is tried on one picture, since a plain function does not declare it."""
        if not self.reward.differentiable:
            return False
        one = self.select(slice(0, 1))
        with torch.enable_grad():
            z = self.probe().requires_grad_()
            try:
                total = one.score(z).total
            except Exception:  # the run without a gradient will raise it again
                return False
            return total.requires_grad and torch.autograd.grad(total.sum(), z, allow_unused=True)[0] is not None

    def probe(self) -> Tensor:
        """A state (1, *shape) to try the reward on."""
        z = torch.randn(1, *self.flow_map.shape, generator=stream(0, "probe"), dtype=torch.float32)
        return z.to(self.flow_map.device, self.flow_map.state_dtype)

    def select(self, rows: slice | Tensor) -> Problem:
        """The problem of some of the particles, by a slice or indices (b',)."""
        return replace(self, strength=self.strength[rows], rows=self.rows[rows])

    def resize(self, noise: Noise, k: int) -> tuple[Problem, Noise]:
        """The same outputs with ``k`` particles each, in place of ``noise.k``. Call it before anything is drawn."""
        first = torch.arange(0, len(self.strength), noise.k, device=self.strength.device)
        return self.select(first.repeat_interleave(k)), noise.of(k)


def plain_rewards(problem: Problem, seeds: Sequence[int]) -> Tensor:
    """Rewards (b,), in float64, of unsteered samples: one sample per row of the problem, each with its own seed."""
    flow_map = problem.flow_map
    with torch.no_grad():
        x = walk(flow_map, Noise(seeds), flow_map.grid(flow_map.steps), problem.cond, usual(flow_map))
        return problem.score(x).total.double()


def deviation(rewards: Tensor) -> float:
    """Standard deviation of rewards (b,); 0 where they differ by no more than rounding: scores are float32."""
    std = rewards.std().item()
    return std if std > 1e-6 * rewards.abs().max().item() else 0.0


def joined(waits: Mapping[int, Callable[[], Scores]]) -> Scores:
    """Wait for the scores of consecutive parts and join them.

    Args:
        waits: the function that waits for each part, by the index of the part's first endpoint.
    """
    parts = []
    for begin, wait in waits.items():
        with counted_from(begin):
            parts.append(wait())
    return Scores.join(parts)


# --- the value -------------------------------------------------------------------------------------------------------
@dataclass
class Evaluation:
    """The evaluation of the particles at one time.

    Attributes:
        value: (b,) V_t(x), tempered, in the wide dtype.
        tilt: (b,) strength * r of the first endpoint, untempered.
        beta: (b,) inverse temperature of the value.
        endpoint: (b, *shape) the first endpoint.
        direction: (b, *shape) direction of the guidance, before its coefficient; None without guidance.
        memory: (b,) a correction's memory of the path; None if it has none.
        scores: of the first endpoint; None if it was not scored.
    """

    value: Tensor
    tilt: Tensor
    beta: Tensor
    endpoint: Tensor | None = None
    direction: Tensor | None = None
    memory: Tensor | None = None
    scores: Scores | None = None

    @classmethod
    def join(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of consecutive particles as one."""
        first = parts[0]
        tensors = {k: torch.cat([vars(p)[k] for p in parts]) for k, value in vars(first).items() if isinstance(value, Tensor)}
        return replace(first, **tensors, scores=first.scores and Scores.join([p.scores for p in parts if p.scores]))

    def select(self, rows: Tensor) -> Evaluation:
        """The evaluations of some of the particles, by indices (b',)."""
        parts = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts, scores=None if self.scores is None else self.scores[rows])


@dataclass
class Weights:
    """Weights of the endpoints.

    Attributes:
        log_w: (b, k) log-weights of the look-ahead.
        tilt: (b, k) strength * r.
        beta: (b,) inverse temperature.
        scores: (b,) of the first endpoints.
    """

    log_w: Tensor
    tilt: Tensor
    beta: Tensor
    scores: Scores

    @property
    def tempered(self) -> Tensor:
        return self.beta.unsqueeze(1) * self.tilt


@dataclass
class View:
    """One look at the particles: the problem, the look-ahead, the states and the temperature.

    Attributes:
        problem: with one row per particle.
        lookahead: the look-ahead.
        noise: a separate stream for look-aheads that draw.
        x: (b, *shape) the states at time t.
        t: the time.
        beta: see `Beta`.
    """

    problem: Problem
    lookahead: Lookahead
    noise: Noise
    x: Tensor
    t: float
    beta: Beta

    def endpoints(self, x: Tensor) -> Endpoints:
        return self.lookahead.endpoints(self.problem.flow_map, x, self.t, self.problem.cond, self.noise)

    def judge(self) -> tuple[Endpoints, Weights]:
        """The endpoints and their weights, generated as in `Problem.generate`; without a gradient."""
        shared, ends = Shared(self.noise), []

        def make(rows: slice) -> Tensor:
            whole = rows.stop - rows.start == len(self.x)
            part = self if whole else replace(self, problem=self.problem.select(rows), noise=shared.part(rows))
            ends.append(part.endpoints(self.x[rows]))
            return ends[-1].z.flatten(0, 1)

        z, scores = self.problem.generate(make)
        log_w = [end.log_w for end in ends if end.log_w is not None]
        every = Endpoints(z.unflatten(0, (len(self.x), -1)), torch.cat(log_w) if log_w else None)
        return every, self._weights(every, scores)

    def weigh(self, ends: Endpoints) -> Weights:
        """Score all endpoints in one call; differentiable in ``ends`` where gradients are on."""
        return self._weights(ends, self.problem.score(ends.z.flatten(0, 1), ends.z.shape[1]))

    def _weights(self, ends: Endpoints, scores: Scores) -> Weights:
        b, k = ends.z.shape[:2]
        tilt = self.problem.tilt(scores.total).view(b, k)
        log_w = torch.zeros_like(tilt) if ends.log_w is None else ends.log_w.to(tilt)
        return Weights(log_w, tilt, self.beta(replace(ends, log_w=log_w.detach()), tilt.detach()), scores[::k])

    def value(self, ends: Endpoints) -> Evaluation:
        """The evaluation of the endpoints; differentiable in ``ends`` where gradients are on."""
        return self._value(ends, self.weigh(ends))

    def look(self) -> Evaluation:
        """The evaluation at x, without a direction and without a gradient."""
        return self._value(*self.judge())

    def _value(self, ends: Endpoints, weights: Weights) -> Evaluation:
        value = log_mean_exp(weights.log_w, weights.tempered)
        return Evaluation(value, weights.tilt[:, 0].detach(), weights.beta, ends.z[:, 0].detach(), scores=weights.scores)


class Shared(Noise):
    """A stream of noise that draws once for all rows and returns the rows of each part."""

    def __init__(self, noise: Noise, draws: list[Tensor] | None = None, rows: slice = slice(None)) -> None:
        super().__init__(noise.seeds, noise.k)
        self.noise, self.draws, self.rows, self.next = noise, [] if draws is None else draws, rows, 0

    def part(self, rows: slice) -> Shared:
        return Shared(self.noise, self.draws, rows)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `Noise.normal`, for these rows."""
        if self.next == len(self.draws):
            self.draws.append(self.noise.normal(shape, like))
        self.next += 1
        return self.draws[self.next - 1][self.rows]
