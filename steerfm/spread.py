"""Wrappers of maps and rewards that divide the rows of their calls between several processes, transparently for methods.

A call is divided into parts by its number of rows only. Each part is computed by one process, and all processes get every row.
So samples do not depend on the number of processes. They also equal those of a single process without wrappers: to the bit
if ``micro_batch`` fixes the parts, otherwise as far as rows do not depend on the size of their batch. The shipped models
satisfy this from `LEAST` rows on (``tests/distributed/``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from steerfm.flowmap import FlowMap, Microbatched, Wrapped
from steerfm.interpolant import expand_time
from steerfm.processes import active, alone, first, sharded, share
from steerfm.rewards import Reward, WeightedSum
from steerfm.rows import Condition, Rows, cuts
from steerfm.scores import MODEL, Prompts, Scores

LEAST = 16
"""Fewest rows of a part by default; smaller parts are not worth sending."""


def spread(flow_map: FlowMap, rows: int | None, exact: bool = True) -> FlowMap:
    """The map with at most ``rows`` rows per call, divided between processes if there are several.

    Args:
        flow_map: the map.
        rows: rows per call; None for all at once.
        exact: whether parts have exactly that many rows, or may have fewer.
    """
    thrifty = flow_map if rows is None else Microbatched(flow_map, rows)
    return thrifty if active() is None else Spread(thrifty, rows, exact)


def shared_out(flow_map: FlowMap) -> FlowMap:
    """The map with its own ``micro_batch``, divided between processes if there are several."""
    return flow_map if active() is None else spread(flow_map, flow_map.micro_batch)


class Spread(Wrapped):
    """The same map, with its rows divided between the processes. Its ``micro_batch`` is the number of rows of all together.

    Args:
        flow_map: the map, evaluated ``rows`` rows at a time.
        rows: see `spread`.
        exact: see `spread`.
    """

    def __init__(self, flow_map: FlowMap, rows: int | None, exact: bool = True) -> None:
        super().__init__(flow_map)
        self.rows, self.exact = rows, exact and rows is not None
        group = active()
        self.micro_batch = rows if rows is None or not self.exact or group is None else rows * group.size

    def parts(self, n: int) -> list[slice]:
        """The parts of n rows, for any number of processes."""
        return self.cuts(n) if self.exact else [part for cut in self.cuts(n) for part in even(cut)]

    def cuts(self, n: int) -> list[slice]:
        """The parts of n rows in a single process."""
        return cuts(n, self.rows or max(1, n))

    def decode(self, z: Tensor) -> Tensor:
        if active() is None or not len(z):
            return self.flow_map.decode(z)
        return share("decode", self.parts(len(z)), lambda _, z: (self.flow_map.decode(z), None), [z])[0]

    # If one process would not divide a call, the operations around the network belong to it: gradients then round equally.
    def jump(self, x: Tensor, s: float | Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        if self._cuts() or (isinstance(s, float | int) and isinstance(t, float | int) and s == t):
            return super().jump(x, s, t, cond)
        return self._shared(self.flow_map.jump, "jump", x, (s, t), cond)

    def velocity(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        if self._cuts():
            return super().velocity(x, t, cond)
        return self._shared(self.flow_map.velocity, "velocity", x, (t,), cond)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        if self._cuts():
            return super().denoise(x, t, cond)
        return self._shared(self.flow_map.denoise, "denoise", x, (t,), cond)

    def _cuts(self) -> bool:
        return self.rows is not None or active() is None

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._shared(self.flow_map.average_velocity, "jump", x, (s, t), cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._shared(self.flow_map.instantaneous_velocity, "velocity", x, (t,), cond)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._shared(self.flow_map.posterior_velocity, "posterior", z, (s, e, x, t), cond)

    def _shared(
        self, hook: Callable[..., Tensor], what: str, x: Tensor, times: Sequence[float | Tensor], cond: Condition
    ) -> Tensor:
        if active() is None or not len(x):
            return hook(x, *times, cond)
        times = [
            time if isinstance(time, Tensor) and time.shape == x.shape else expand_time(time, x).flatten() for time in times
        ]
        names = list(cond) if isinstance(cond, Mapping) else []
        conditions = [] if cond is None else [cond] if isinstance(cond, Tensor) else [cond[name] for name in names]

        in_step = sharded(self.flow_map)

        def part(_: slice, x: Tensor, *inputs: Tensor) -> tuple[Tensor, None]:
            times_, rest = inputs[: len(times)], inputs[len(times) :]
            own = None if cond is None else rest[0] if isinstance(cond, Tensor) else dict(zip(names, rest))
            with _plain() if in_step else nullcontext():
                return hook(x, *times_, own), None

        return share(what, self.parts(len(x)), part, [x, *times, *conditions], in_step=in_step)[0]


@contextmanager
def _plain() -> Iterator[None]:
    """Leave inference mode: weights that are gathered in it could not be used for gradients later."""
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graph):
        yield


def even(rows: slice) -> list[slice]:
    """Parts of almost equal size, with at least `LEAST` rows if there are enough."""
    n = rows.stop - rows.start
    many = max(1, n // LEAST)
    ends = [rows.start + number * n // many for number in range(many + 1)]
    return [slice(begin, end) for begin, end in zip(ends, ends[1:])]


def score(flow_map: FlowMap, reward: Reward, z: Tensor, rows: Rows) -> Scores:
    """Decode samples (b, *shape) of the model, if the reward reads pictures, and score them. Each process does both for its
    rows, so no pictures are sent, except to terms that one process computes."""
    return promise(flow_map, reward, z, rows)()


def promise(flow_map: FlowMap, reward: Reward, z: Tensor, rows: Rows) -> Callable[[], Scores]:
    """Start `score`, and return a function that waits for the result; see `Reward.promise`."""

    def begin(z: Tensor, rows: Rows, reward: Reward) -> Callable[[], Scores]:
        images = z if reward.space == MODEL else flow_map.decode(z)
        return reward.promise(images, rows.prompts, rows.labels, rows.groups, latents=z)

    if not isinstance(flow_map, Spread) or not len(z):
        return begin(z, rows, reward)
    if active() is None:
        waits = [begin(z[cut], rows[cut], reward) for cut in flow_map.cuts(len(z))]
        return lambda: Scores.join([wait() for wait in waits])
    if any(map(by_one, terms(reward))):
        how = None if reward.groupwise else flow_map  # a sum with a group-wise term is never divided
        return begin(z, rows, each_term(reward, lambda term: SpreadReward(term, how)))

    def part(of: slice, z: Tensor) -> tuple[Tensor, list[str]]:
        return _as_rows(begin(z, rows[of], reward)())

    scores = _as_scores(*share("score", flow_map.parts(len(z)), part, [z]))
    return lambda: scores


def terms(reward: Reward) -> list[Reward]:
    """The terms of a sum, or the reward itself."""
    return [term for _, part in reward.terms for term in terms(part)] if isinstance(reward, WeightedSum) else [reward]


def place(reward: Reward, device: torch.device) -> None:
    """Move a reward to a device; ``one_process`` terms only in the first process."""
    for term in terms(reward):
        if first() or not term.one_process:
            term.to(device)


def by_one(reward: Reward) -> bool:
    """Whether a reward needs all pictures in one process."""
    return reward.one_process or reward.groupwise


def each_term(reward: Reward, make: Callable[[Reward], Reward]) -> Reward:
    """Apply ``make`` to each term of a sum, or to a reward that is no sum."""
    if isinstance(reward, WeightedSum):
        return WeightedSum([(weight, each_term(term, make)) for weight, term in reward.terms])
    return make(reward)


class SameReward(Reward):
    """Base of rewards with the values of another reward, computed by several processes. A call has all rows.

    Args:
        reward: the reward, no sum.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward
        self.take_facts([reward])
        self.name, self.batch_size = reward.name, None

    @property
    def spaces(self) -> frozenset[str]:
        return self.reward.spaces


class SpreadReward(SameReward):
    """The same reward, divided between the processes; the first process computes group-wise and ``one_process`` rewards alone.

    Args:
        reward: the reward, no sum.
        flow_map: defines the parts; None for one part in one process.
    """

    def __init__(self, reward: Reward, flow_map: Spread | None) -> None:
        super().__init__(reward)
        self.of = flow_map
        self.elsewhere = reward.elsewhere and by_one(reward)

    def raw_scores(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Scores:
        return self.begin(images, prompts, labels, groups, latents)()

    def begin(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Callable[[], Scores]:
        """See `Reward.begin`. A reward elsewhere starts in the first process; the others get its result when they wait."""
        n = len(images)
        rows = Rows(n, labels=labels, prompts=None if prompts is None else list(prompts), groups=groups)
        waits: dict[int, Callable[[], Scores]] = {}

        def start(of: slice, images: Tensor, latents: Tensor | None = None) -> Callable[[], Scores]:
            own = rows[of]
            return self.reward.begin(images, own.prompts, own.labels, own.groups, latents)

        def part(of: slice, images: Tensor, latents: Tensor | None = None) -> tuple[Tensor, list[str]]:
            return _as_rows(waits[of.start]() if of.start in waits else start(of, images, latents)())

        cuts, parts = ([slice(0, n)], even(slice(0, n))) if self.of is None else (self.of.cuts(n), self.of.parts(n))
        both = [images] if latents is None else [images, latents]
        one = by_one(self.reward)

        def wait() -> Scores:
            return _as_scores(*share(f"reward {self.name}", cuts if one else parts, part, both, by_first=one))

        if not self.elsewhere:
            scores = wait()
            return lambda: scores
        if first():
            with alone():
                waits |= {cut.start: _later(start, cut, *(x[cut] for x in both)) for cut in cuts}
        return wait


def _later(begin: Callable[..., Callable[[], Scores]], *inputs: Any) -> Callable[[], Scores]:
    """Start a call and return a function that waits for it. That function raises any error, when all processes wait."""
    try:
        return begin(*inputs)
    except Exception as error:
        failure = error

    def fail() -> Scores:
        raise failure

    return fail


def _as_rows(scores: Scores) -> tuple[Tensor, list[str]]:
    """Scores as a tensor (b, 1 + components) for sending, and the names of the components."""
    columns = [scores.total, *(value.to(scores.total) for value in scores.components.values())]
    return torch.stack(columns, 1), list(scores.components)


def _as_scores(columns: Tensor, names: list[str]) -> Scores:
    total, *components = columns.unbind(1)
    return Scores(total, {name: value.detach() for name, value in zip(names, components)})
