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
    """What is steered: the map, the reward, and one row per particle of everything that depends on the output.

    Attributes:
        flow_map, reward: as given.
        strength: (b,) strength of the tilt per particle.
        rows: what each particle is asked for.
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
        """Begin to score b * k endpoints in model space, ``k`` for each particle, and return what waits for the scores.

        They are decoded, unless the reward reads nothing but the model's space, and scored, as many at a time as the map takes;
        a reward that compares them sees all at once.
        """
        rows, most = self.rows if k == 1 else self.rows.repeat(k), self.flow_map.micro_batch
        if most is None or len(z) <= most or self.reward.groupwise:
            return promise(self.flow_map, self.reward, z, rows)
        waits = {}
        for part in cuts(len(z), most):
            with counted_from(part.start):
                waits[part.start] = promise(self.flow_map, self.reward, z[part], rows[part])
        return lambda: joined(waits)

    def made(self, make: Callable[[slice], Tensor]) -> tuple[Tensor, Scores]:
        """Endpoints (b * k, *shape) and their scores, where ``make`` makes those of some of the particles, (b' * k, *shape).

        All at once; for a reward that is elsewhere in `parts`: while one is scored, the map makes the next.
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
        """How the particles are cut to be made: as many at a time as the map takes, or `LEAST`, if the reward is elsewhere."""
        n, most = len(self.strength), self.flow_map.micro_batch
        if not self.reward.elsewhere or self.reward.groupwise:
            return [slice(0, n)]
        return even(slice(0, n)) if most is None else cuts(n, most)

    def tilt(self, r: Tensor) -> Tensor:
        """strength * r of rewards (b * k,), ``k`` for each particle, in the wide dtype.

        Raises:
            RewardError: a product that is not finite.
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
        """Whether the reward has a gradient, tried on one picture: a plain function does not say it of itself."""
        if not self.reward.differentiable:
            return False
        one = self.select(slice(0, 1))
        with torch.enable_grad():
            z = self.probe().requires_grad_()
            try:
                total = one.score(z).total
            except Exception:  # what is wrong with the reward, the run without a gradient will say
                return False
            return total.requires_grad and torch.autograd.grad(total.sum(), z, allow_unused=True)[0] is not None

    def probe(self) -> Tensor:
        """A state (1, *shape) to try the reward on."""
        z = torch.randn(1, *self.flow_map.shape, generator=stream(0, "probe"), dtype=torch.float32)
        return z.to(self.flow_map.device, self.flow_map.state_dtype)

    def select(self, rows: slice | Tensor) -> Problem:
        """The problem of the given particles, a slice or (b',)."""
        return replace(self, strength=self.strength[rows], rows=self.rows[rows])

    def resized(self, noise: Noise, k: int) -> tuple[Problem, Noise]:
        """The same outputs with ``k`` particles each, in place of those of the noise; before anything is drawn."""
        first = torch.arange(0, len(self.strength), noise.k, device=self.strength.device)
        return self.select(first.repeat_interleave(k)), noise.of(k)


def plain_rewards(problem: Problem, seeds: Sequence[int]) -> Tensor:
    """Rewards (b,) of unsteered samples, one for each row of a problem and each of the seeds; in float64."""
    flow_map = problem.flow_map
    with torch.no_grad():
        x = walk(flow_map, Noise(seeds), flow_map.grid(flow_map.steps), problem.cond, usual(flow_map))
        return problem.score(x).total.double()


def deviation(rewards: Tensor) -> float:
    """Standard deviation of rewards (b,); 0 where they differ by no more than rounding: scores are float32."""
    std = rewards.std().item()
    return std if std > 1e-6 * rewards.abs().max().item() else 0.0


def joined(waits: Mapping[int, Callable[[], Scores]]) -> Scores:
    """The scores of consecutive endpoints, by the number of each part's first, once they are there."""
    parts = []
    for begin, wait in waits.items():
        with counted_from(begin):
            parts.append(wait())
    return Scores.join(parts)


# --- the value -------------------------------------------------------------------------------------------------------
@dataclass
class Evaluation:
    """What is known about the particles at one time.

    Attributes:
        value: (b,) V_t(x), tempered, in the wide dtype.
        tilt: (b,) strength * r of the first endpoint, untempered.
        beta: (b,) inverse temperature of the value.
        endpoint: (b, *shape) the first endpoint.
        direction: (b, *shape) what a guidance adds to the state, before its coefficient; None without guidance.
        memory: (b,) what a correction carries along the path; None where it carries nothing.
        scores: of the first endpoint, where that was scored.
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
        named = {k: torch.cat([vars(p)[k] for p in parts]) for k, value in vars(first).items() if isinstance(value, Tensor)}
        return replace(first, **named, scores=first.scores and Scores.join([p.scores for p in parts if p.scores]))

    def select(self, rows: Tensor) -> Evaluation:
        """The evaluations of the given particles (b',)."""
        parts = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts, scores=None if self.scores is None else self.scores[rows])


@dataclass
class Weighed:
    """Endpoints judged: log_w, tilt (b, k) log-weights and strength * r; beta (b,); scores of the first endpoints, (b,)."""

    log_w: Tensor
    tilt: Tensor
    beta: Tensor
    scores: Scores

    @property
    def tempered(self) -> Tensor:
        return self.beta.unsqueeze(1) * self.tilt


@dataclass
class View:
    """One look at the particles: the problem, how to look, where, and how hot.

    Attributes:
        x: (b, *shape) at time t.
        noise: a stream of its own for look-aheads that draw.
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

    def judged(self) -> tuple[Endpoints, Weighed]:
        """The endpoints and what they are worth, made as `Problem.made` says; without a gradient."""
        shared, ends = Shared(self.noise), []

        def make(rows: slice) -> Tensor:
            whole = rows.stop - rows.start == len(self.x)
            part = self if whole else replace(self, problem=self.problem.select(rows), noise=shared.part(rows))
            ends.append(part.endpoints(self.x[rows]))
            return ends[-1].z.flatten(0, 1)

        z, scores = self.problem.made(make)
        log_w = [end.log_w for end in ends if end.log_w is not None]
        every = Endpoints(z.unflatten(0, (len(self.x), -1)), torch.cat(log_w) if log_w else None)
        return every, self._weighed(every, scores)

    def weigh(self, ends: Endpoints) -> Weighed:
        """Score all endpoints in one call; differentiable in ``ends`` where gradients are on."""
        return self._weighed(ends, self.problem.score(ends.z.flatten(0, 1), ends.z.shape[1]))

    def _weighed(self, ends: Endpoints, scores: Scores) -> Weighed:
        b, k = ends.z.shape[:2]
        tilt = self.problem.tilt(scores.total).view(b, k)
        log_w = torch.zeros_like(tilt) if ends.log_w is None else ends.log_w.to(tilt)
        return Weighed(log_w, tilt, self.beta(replace(ends, log_w=log_w.detach()), tilt.detach()), scores[::k])

    def value(self, ends: Endpoints) -> Evaluation:
        """V and what it is made of; differentiable in ``ends`` where gradients are on."""
        return self._value(ends, self.weigh(ends))

    def look(self) -> Evaluation:
        """V at x, without a direction; without a gradient."""
        return self._value(*self.judged())

    def _value(self, ends: Endpoints, found: Weighed) -> Evaluation:
        value = log_mean_exp(found.log_w, found.tempered)
        return Evaluation(value, found.tilt[:, 0].detach(), found.beta, ends.z[:, 0].detach(), scores=found.scores)


class Shared(Noise):
    """A stream of noise whose draws are made once, for all rows, and handed out in parts."""

    def __init__(self, noise: Noise, drawn: list[Tensor] | None = None, rows: slice = slice(None)) -> None:
        super().__init__(noise.seeds, noise.k)
        self.noise, self.drawn, self.rows, self.next = noise, [] if drawn is None else drawn, rows, 0

    def part(self, rows: slice) -> Shared:
        return Shared(self.noise, self.drawn, rows)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `Noise.normal`, of these rows."""
        if self.next == len(self.drawn):
            self.drawn.append(self.noise.normal(shape, like))
        self.next += 1
        return self.drawn[self.next - 1][self.rows]


# --- guidance --------------------------------------------------------------------------------------------------------
