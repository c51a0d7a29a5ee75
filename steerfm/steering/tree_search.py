"""Searches in which outputs and particles are at different times: a tree, and a budget that rolls over.

Both grow states by one kernel, `transitions.Renoise` with a time for every row. Both score a state by one jump to the data:

    x' = (alpha_t / alpha_r) X_{s,r}(x) + std z,      r = t + gamma (1 - t),      value strength * r(X_{t,1}(x'))

Every look-ahead is a finished sample. With gamma = 1 it is also the start of the next states, at no further cost. The noise
at t = 0 has a root as its parent: the children of the root are draws of N(0, I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from steerfm.capabilities import can, needs
from steerfm.checks import at_least_one
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.registry import Readable
from steerfm.rewards import Reward
from steerfm.rows import take_rows
from steerfm.sampling import Noise
from steerfm.steering.noise_search import Trials, search_trace
from steerfm.steering.outcome import Outcome, Tick
from steerfm.steering.resampling import multinomial
from steerfm.steering.size import Sized
from steerfm.steering.value import Problem
from steerfm.steering.weights import effective_sample_size, normalise, wide


def grow(problem: Problem, x: Tensor, endpoint: Tensor, s: Tensor, t: Tensor, gamma: float, z: Tensor) -> Trials:
    """Children of the states x (b, *shape) at the times s (b,): states at the times t (b,), their look-aheads and rewards.

    Args:
        endpoint: (b, *shape) X_{s,1}(x).
        gamma: of `Renoise`; 1 saves the network call for the kernel's mean.
        z: (b, *shape) standard normal.
    """
    flow_map = problem.flow_map
    r = 1 - (1 - gamma) * (1 - t)
    ahead = endpoint if gamma == 1 else flow_map.jump(x, s, r, problem.cond)
    scale, std = flow_map.interpolant.renoise(r, t)
    x = expand_time(scale, x) * ahead + expand_time(std, x) * z
    sample, scores = problem.generate(lambda rows: flow_map.jump(x[rows], t[rows], 1.0, take_rows(problem.cond, rows)))
    return Trials(x, sample, problem.tilt(scores.total), scores.total, scores.components)


def _lacks(flow_map: FlowMap, steps: int, gamma: float) -> str:
    """What the map lacks for `grow` in this many steps, and what to use instead; "" if it lacks nothing."""
    if can(flow_map, "two_time") or can(flow_map, "endpoint" if gamma == 1 else "two_time"):
        return ""
    if can(flow_map, "velocity"):
        return needs("endpoint", "take fk_steering, svdd, or feynman_kac with lookahead=denoise and transition=midpoint")
    if can(flow_map, "endpoint"):
        return f"with gamma={gamma} " + needs("two_time", "take gamma=1")
    return "" if steps == 1 and can(flow_map, "generator") else needs("endpoint", "take steps=1")


RECORDS = 64
"""Most records in the trace of a tree; each one holds all particles."""


# --- a tree ----------------------------------------------------------------------------------------------------------
@dataclass
class Tree:
    """One tree per output, all in the same tensors: node 0 is the root, node j + 1 is the j-th to grow.

    Attributes:
        x, endpoint: (n, nodes, *shape) states and their look-aheads.
        value: (n, nodes) soft value; -inf where there is no node yet.
        parent: (n, nodes) index of the parent; -1 for none.
        level: (n, nodes) 0 for the root, i + 1 for time t_i.
        visits: (n, nodes) paths through the node.
        children: (n, nodes) number of children.
    """

    x: Tensor
    endpoint: Tensor
    value: Tensor
    parent: Tensor
    level: Tensor
    visits: Tensor
    children: Tensor

    @classmethod
    def of_roots(cls, n: int, nodes: int, like: Tensor) -> Tree:
        """Trees of a root only, with room for ``nodes`` nodes.

        Args:
            like: (b, *shape) a tensor with the shape, dtype and device of the states.
        """
        x = like.new_zeros(n, nodes, *like.shape[1:])
        value = torch.full((n, nodes), -math.inf, dtype=wide(x.device), device=x.device)
        level = torch.zeros(n, nodes, dtype=torch.long, device=x.device)
        return cls(x, x.clone(), value, level - 1, level, level.clone(), level.clone())

    def values_below(self, node: Tensor) -> Tensor:
        """Values (n, nodes) of the children of one node (n,) of each tree; -inf for all other nodes."""
        return self.value.masked_fill(self.parent != node.unsqueeze(1), -math.inf)

    def add(self, begin: int, parent: Tensor, children: Trials) -> None:
        """Add children (n * width rows) to one node (n,) of each tree, as nodes ``begin`` and following."""
        row, n = torch.arange(len(parent), device=parent.device), len(parent)
        width = len(children.reward) // n
        new = slice(begin, begin + width)
        self.x[:, new], self.endpoint[:, new] = children.x.unflatten(0, (n, width)), children.sample.unflatten(0, (n, width))
        self.value[:, new] = children.objective.view(n, width)
        self.parent[:, new] = parent.unsqueeze(1)
        self.level[:, new] = self.level[row, parent].unsqueeze(1) + 1
        self.children[row, parent] += width

    def back_up(self, path: Tensor) -> None:
        """Soft Bellman update v = log mean exp v(children), from the end of the paths (n, depth) to the root."""
        row = torch.arange(len(path), device=path.device)
        for node in path.flip(1).T:
            self.value[row, node] = self.values_below(node).logsumexp(1) - self.children[row, node].log()
        self.visits.scatter_(1, path, self.visits.gather(1, path) + 1)  # early ends repeat; they count once

    def log_weights(self, depth: int) -> Tensor:
        """Log-weights of all nodes but the root, (n, nodes - 1), with logsumexp = the root's value.

        A leaf has its value times the probability that a random walk from the root reaches it. Inner nodes have no weight:
        their children represent them.
        """
        above = self.parent.clamp_min(0)
        step = torch.where(self.parent < 0, 0.0, -self.children.gather(1, above).clamp_min(1).to(self.value).log())
        chance = step
        for _ in range(depth):
            chance = step + torch.where(self.parent < 0, 0.0, chance.gather(1, above))
        return (chance + self.value).masked_fill(self.children > 0, -math.inf)[:, 1:]


@dataclass(frozen=True)
class TreeSearch(Sized, metaclass=Readable):
    """Diffusion tree sampling (DTS, 2506.20701, algorithm 1): one jump completes a node of any depth (cf. BFMT 2607.02915).

    One tree per output over the states at t_0 = 0, ..., t_{steps-1}. Each iteration walks down from the root, to each child
    with probability proportional to exp(value). It stops at a node with fewer than branching * visits^widening children, or
    at the last time. It grows ``width`` children there and backs up v = log mean exp v(children). A node without children has
    the value strength * r of its look-ahead. That is exact at t_{steps-1}, where the step to the data is the same jump.

    Returns every look-ahead as a particle. A leaf's weight is its contribution to the root's value; inner nodes weigh zero.

    Costs an iteration: ``width`` forwards, decodes and reward calls per output; twice the forwards with gamma < 1. Within a
    budget: 8 steps (docs/methods.md).
    Samples: in the limit only: the tilt of the base chain's own law, for a bounded reward and 0 < widening < 1, as the
    number of particles goes to infinity. No for any finite number: lucky nodes grow first and regress to their mean, so the
    root's value is too low (one Gaussian, two steps, strength 1: by 0.02 at 64 particles and 0.01 at 256; by 0.7 on nine
    separate modes, four steps, 512 particles). So log_z is only returned for steps = 1, which is plain importance sampling.
    `FeynmanKac` has no such bias. With widening = 0, or greedy = True (DTS*: a search with uniform weights): never.

    Attributes:
        particles: nodes of each tree.
        steps: transitions from t = 0 to t = 1; the tree branches at the root and at all steps but the last.
        width: children per iteration; must divide ``particles``. More make larger batches with fewer updates.
        branching: see above.
        widening: see above; 0 gives every node the same number of children, rounded up to ``width``.
        gamma: of the transition `Renoise`, in (0, 1].
        greedy: always walk to the best child.
    """

    samples: ClassVar[str] = "in the limit only"
    paper: ClassVar[str] = "2506.20701"
    shape: ClassVar[Mapping[int, float]] = {64: 8, 256: 8}

    particles: int = 64
    steps: int = 4
    width: int = 1
    branching: float = 2.0
    widening: float = 0.25
    gamma: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps)
        if self.particles < 1:
            raise ValueError(f"particles={self.particles}: at least one particle is needed")
        if self.width < 1 or self.particles % self.width:
            raise ValueError(f"width={self.width}: must divide particles={self.particles}")
        if not self.branching > 0:
            raise ValueError(f"branching={self.branching}: must be positive")
        if not 0 <= self.widening < 1:
            raise ValueError(f"widening={self.widening}: must be in [0, 1)")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: must be in (0, 1]; without noise a tree has no branches")

    def check(self, reward: Reward) -> None:
        """Accepts any reward."""

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of iterations."""
        return replace(self, steps=steps, particles=number * self.width)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`."""
        return _lacks(flow_map, self.steps, self.gamma)

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`."""
        with torch.inference_mode():
            return self._run(problem, noise, n, lookaheads, tick)

    def _run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        flow_map, k, width = problem.flow_map, self.particles, self.width
        z = noise.start(flow_map)
        tree, z = Tree.of_roots(n, k + 1, z), z.unflatten(0, (n, k))
        iterations, row = k // width, torch.arange(n, device=z.device)
        u = noise.uniform(iterations * self.steps, z.device).view(n, iterations, self.steps)
        times = torch.tensor([0.0, *flow_map.grid(self.steps)[:-1]], dtype=z.dtype, device=z.device)  # of the levels
        problem = problem.select((row.unsqueeze(1) * k + torch.arange(width, device=z.device)).flatten())
        strength, every = problem.strength.view(n, width)[:, :1], math.ceil(iterations / RECORDS)
        parts: list[Trials] = []
        values, looks, shares = [], [], []
        for i in range(iterations):
            path = self._walk(tree, u[:, i])
            node = path[:, -1]
            level = tree.level[row, node].repeat_interleave(width)
            x, endpoint = (field[row, node].repeat_interleave(width, 0) for field in (tree.x, tree.endpoint))
            begin, end = i * width, (i + 1) * width
            children = grow(problem, x, endpoint, times[level], times[level + 1], self.gamma, z[:, begin:end].flatten(0, 1))
            tree.add(1 + begin, node, children)
            tree.back_up(path)
            parts.append(children)
            if end % (every * width) == 0 or end == k:
                tilts = strength * torch.cat([part.reward.view(n, width) for part in parts], 1)
                values.append(torch.cat([tilts, tree.value[:, :1].expand(n, k - end)], 1))
                shares.append(effective_sample_size(tree.log_weights(self.steps)))
                if lookaheads:
                    looks.append(tree.endpoint[row, 1 + tilts.argmax(1)])
            tick(i + 1, iterations)
        log_w = tree.log_weights(self.steps)
        names = parts[0].components
        return Outcome(
            samples=tree.endpoint[:, 1:],
            rewards=torch.cat([part.reward.view(n, width) for part in parts], 1),
            components={name: torch.cat([part.components[name].view(n, width) for part in parts], 1) for name in names},
            log_weights=torch.full_like(log_w, -math.log(k)) if self.greedy else normalise(log_w),
            log_z=self._log_z(tree.value[:, 0]),
            trace=replace(search_trace(values, looks), ess=torch.stack(shares)),
        )

    def _log_z(self, root: Tensor) -> Tensor | None:
        """log Z (n,) from the values of the roots; None where that estimate is biased."""
        return root if self.steps == 1 and not self.greedy else None

    def _walk(self, tree: Tree, u: Tensor) -> Tensor:
        """Paths (n, steps) from the roots to the nodes that will grow, by uniform numbers (n, steps)."""
        row, node = torch.arange(len(u), device=u.device), torch.zeros(len(u), dtype=torch.long, device=u.device)
        stop, path = torch.zeros_like(node, dtype=torch.bool), [node]
        for i in range(self.steps - 1):
            children = tree.children[row, node]
            room = children < self.branching * tree.visits[row, node] ** self.widening
            stop = stop | room | (children == 0)
            values = tree.values_below(node)
            child = values.argmax(1) if self.greedy else multinomial(values.softmax(1), u[:, i : i + 1].to(values)).squeeze(1)
            node = torch.where(stop, node, child)
            path.append(node)
        return torch.stack(path, 1)


# --- a budget that rolls over ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BudgetForcing(Sized, metaclass=Readable):
    """Rollover budget forcing (RBF, 2503.19385): advance at the first child that beats the best so far.

    The budget is divided equally between the times t_0 = 0, ..., t_{steps-1}. At t_0 the whole share goes into draws from
    N(0, I), and the best noise wins. From then on a particle draws ``width`` children of its state at a time, by `Renoise`.
    As soon as the look-ahead of a child beats the best reward so far, the particle moves there, and the rest of its share
    rolls over to the next time. If the share runs out first, the particle moves to the best of the children. At the last
    time the whole remaining budget is used. Particles can be at different times; a finished particle costs nothing. Returns
    the best look-ahead of each particle: every look-ahead is a finished sample.

    Costs a child: one forward, decode and reward call; two forwards with gamma < 1. ``budget`` children per particle.
    Within a budget: 3 steps at 64 evaluations, 8 at 256, the rest children (docs/methods.md).
    Samples: no. It is a search: it keeps the samples of highest reward.

    Attributes:
        particles: independent chains per output.
        steps: transitions from t = 0 to t = 1, the last of them the look-ahead's own jump.
        budget: children per chain, at least one for each step.
        width: children at a time; more make larger batches and save fewer evaluations.
        gamma: of the transition `Renoise`, in (0, 1].
    """

    samples: ClassVar[str] = "no"
    paper: ClassVar[str] = "2503.19385"
    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 8}

    particles: int = 1
    steps: int = 8
    budget: int = 64
    width: int = 1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps)
        at_least_one(particles=self.particles, width=self.width)
        if self.budget < self.steps:
            raise ValueError(f"budget={self.budget}: at least one for each of the steps={self.steps}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: must be in (0, 1]; without noise all children are the same")

    def check(self, reward: Reward) -> None:
        """Accepts any reward."""

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of children."""
        return replace(self, steps=steps, budget=number)

    def least(self, steps: int) -> int:
        """One child for each step."""
        return steps

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`."""
        return _lacks(flow_map, self.steps, self.gamma)

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`."""
        with torch.inference_mode():
            return self._run(problem, noise, n, lookaheads, tick)

    def _run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        flow_map, width = problem.flow_map, self.width
        x = torch.zeros(len(problem.strength), *flow_map.shape, dtype=flow_map.state_dtype, device=flow_map.device)
        times = torch.tensor([0.0, *flow_map.grid(self.steps)[:-1]], dtype=x.dtype, device=x.device)  # before and at each level
        edges = torch.arange(self.steps + 1, device=x.device) * self.budget // self.steps
        shares = torch.cat([edges.diff(), edges[:1]])  # nothing more at the end
        endpoint, level = x, torch.zeros(len(x), dtype=torch.long, device=x.device)
        remaining, slots = shares[level], torch.arange(width, device=x.device)
        bar = problem.strength.new_full((len(x),), math.inf)  # the search for the first noise never ends early
        best = here = None  # over all levels, and over the children of the present state
        values, looks = [], []
        # each level may end with a round that is not full
        iterations = (self.budget + self.steps * (width - 1)) // width
        for i in range(iterations):
            active = (slots < remaining.unsqueeze(1)) & (level < self.steps).unsqueeze(1)
            if bool(active.any()):
                rows = active.nonzero()[:, 0]
                z = noise.normal((width, *flow_map.shape), x)[active]
                s, t = times[level[rows]], times[level[rows] + 1]
                trial = _best_of(grow(problem.select(rows), x[rows], endpoint[rows], s, t, self.gamma, z), active)
                best, here = (part.better(trial) if part else trial for part in (best, here))
                remaining = remaining - active.sum(1)
                early = (here.objective > bar) & (level < self.steps - 1)  # the last time has no next one
                moves = (level < self.steps) & (early | (remaining == 0))
                wide_moves = expand_time(moves, x).bool()
                x, endpoint = torch.where(wide_moves, here.x, x), torch.where(wide_moves, here.sample, endpoint)
                bar = torch.where(moves, best.objective, bar)
                here = replace(here, objective=here.objective.masked_fill(moves, -math.inf))
                level = level + moves.long()
                remaining = remaining + moves * shares[level]
            assert best is not None
            values.append((problem.strength * best.reward).view(n, -1))
            if lookaheads:
                looks.append(best.sample.unflatten(0, (n, -1))[:, 0])
            tick(i + 1, iterations)
        assert best is not None
        return best.outcome(n, search_trace(values, looks))


def _best_of(children: Trials, active: Tensor) -> Trials:
    """The best child of every row, among those that ``active`` (b, width) marks; objective -inf for a row without children."""
    value = children.objective.new_full(active.shape, -math.inf)
    value[active] = children.objective
    number = (active.flatten().cumsum(0) - 1).clamp_min(0).view_as(active)
    top, slot = value.max(1)
    return replace(children.select(number.gather(1, slot.unsqueeze(1)).squeeze(1)), objective=top)
