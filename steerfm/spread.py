"""Calls of a map and of a reward whose rows several processes share out: wrappers, so that no method knows of it.

A call is cut into parts by its number of rows alone, each part is made by one process, and all of them get every row. So the
samples do not depend on the number of processes. They are those of one process without this as well: to the bit where
``micro_batch`` says how calls are cut, and else as far as rows do not depend on how many there are of them, which holds of
what ships from `LEAST` rows on (``tests/distributed/``).
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
"""Rows of a part where nobody says how many; fewer are not worth sending."""


def spread(flow_map: FlowMap, rows: int | None, exact: bool = True) -> FlowMap:
    """The map with at most ``rows`` rows a call, shared out where there are several processes.

    Args:
        rows: None for all at once.
        exact: parts have that many rows; else they may have fewer.
    """
    thrifty = flow_map if rows is None else Microbatched(flow_map, rows)
    return thrifty if active() is None else Spread(thrifty, rows, exact)


def shared_out(flow_map: FlowMap) -> FlowMap:
    """The map as it is, shared out where there are several processes."""
    return flow_map if active() is None else spread(flow_map, flow_map.micro_batch)


class Spread(Wrapped):
    """The same map, whose rows are shared out over the processes. Its ``micro_batch`` is what all of them make at a time.

    Args:
        flow_map: the map, evaluated ``rows`` rows at a time.
        rows, exact: see `spread`.
    """

    def __init__(self, flow_map: FlowMap, rows: int | None, exact: bool = True) -> None:
        super().__init__(flow_map)
        self.rows, self.exact = rows, exact and rows is not None
        group = active()
        self.micro_batch = rows if rows is None or not self.exact or group is None else rows * group.size

    def parts(self, n: int) -> list[slice]:
        """How n rows are cut, whatever the number of processes."""
        return self.cuts(n) if self.exact else [part for cut in self.cuts(n) for part in even(cut)]

    def cuts(self, n: int) -> list[slice]:
        """How one process alone cuts n rows."""
        return cuts(n, self.rows or max(1, n))

    def decode(self, z: Tensor) -> Tensor:
        if active() is None or not len(z):
            return self.flow_map.decode(z)
        return share("decode", self.parts(len(z)), lambda _, z: (self.flow_map.decode(z), None), [z])[0]

    # Where one process would not cut its calls, what stands around the network is part of a call: its gradients round alike.
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

    def _shared(
        self, hook: Callable[..., Tensor], what: str, x: Tensor, times: Sequence[float | Tensor], cond: Condition
    ) -> Tensor:
        if active() is None or not len(x):
            return hook(x, *times, cond)
        times = [expand_time(time, x).flatten() for time in times]
        names = list(cond) if isinstance(cond, Mapping) else []
        asked = [] if cond is None else [cond] if isinstance(cond, Tensor) else [cond[name] for name in names]

        in_step = sharded(self.flow_map)

        def part(_: slice, x: Tensor, *given: Tensor) -> tuple[Tensor, None]:
            times_, rest = given[: len(times)], given[len(times) :]
            own = None if cond is None else rest[0] if isinstance(cond, Tensor) else dict(zip(names, rest))
            with _plain() if in_step else nullcontext():
                return hook(x, *times_, own), None

        return share(what, self.parts(len(x)), part, [x, *times, *asked], in_step=in_step)[0]


@contextmanager
def _plain() -> Iterator[None]:
    """No inference mode: weights that are brought together in it would be of no use for gradients later."""
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graph):
        yield


def even(rows: slice) -> list[slice]:
    """Parts of almost the same number of rows, at least `LEAST` where there are as many."""
    n = rows.stop - rows.start
    many = max(1, n // LEAST)
    ends = [rows.start + number * n // many for number in range(many + 1)]
    return [slice(begin, end) for begin, end in zip(ends, ends[1:])]


def score(flow_map: FlowMap, reward: Reward, z: Tensor, rows: Rows) -> Scores:
    """Decode samples (b, *shape) of the model, unless nobody reads pictures, and score them. Both are shared out in one: no
    pictures are sent; but a term that one process makes needs all of them there."""
    return promise(flow_map, reward, z, rows)()


def promise(flow_map: FlowMap, reward: Reward, z: Tensor, rows: Rows) -> Callable[[], Scores]:
    """Begin what `score` does, and return what waits for it; see `Reward.promise`."""

    def looked(z: Tensor, rows: Rows, reward: Reward) -> Callable[[], Scores]:
        images = z if reward.space == MODEL else flow_map.decode(z)
        return reward.promise(images, rows.prompts, rows.labels, rows.groups, latents=z)

    if not isinstance(flow_map, Spread) or not len(z):
        return looked(z, rows, reward)
    if active() is None:
        waits = [looked(z[cut], rows[cut], reward) for cut in flow_map.cuts(len(z))]
        return lambda: Scores.join([wait() for wait in waits])
    if any(map(by_one, terms(reward))):
        how = None if reward.groupwise else flow_map  # what compares pictures is never cut, with all that is added to it
        return looked(z, rows, each_term(reward, lambda term: Dealt(term, how)))

    def part(of: slice, z: Tensor) -> tuple[Tensor, list[str]]:
        return _as_rows(looked(z, rows[of], reward)())

    scores = _as_scores(*share("score", flow_map.parts(len(z)), part, [z]))
    return lambda: scores


def terms(reward: Reward) -> list[Reward]:
    """The terms of a sum, or the reward alone."""
    return [term for _, part in reward.terms for term in terms(part)] if isinstance(reward, WeightedSum) else [reward]


def place(reward: Reward, device: torch.device) -> None:
    """Move a reward to a device; of terms that one process makes, in that process only."""
    for term in terms(reward):
        if first() or not term.one_process:
            term.to(device)


def by_one(reward: Reward) -> bool:
    """Whether one process sees all pictures."""
    return reward.one_process or reward.groupwise


def each_term(reward: Reward, make: Callable[[Reward], Reward]) -> Reward:
    """The reward with each term of a sum replaced by what is made of it; of one that is no sum, what is made of that."""
    if isinstance(reward, WeightedSum):
        return WeightedSum([(weight, each_term(term, make)) for weight, term in reward.terms])
    return make(reward)


class SameReward(Reward):
    """A reward whose values are another one's, which processes make together. A call has all rows.

    Args:
        reward: no sum.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward
        self.take_facts([reward])
        self.name, self.batch_size = reward.name, None

    @property
    def spaces(self) -> frozenset[str]:
        return self.reward.spaces


class Dealt(SameReward):
    """The same reward, shared out over the processes; the first alone makes one that compares pictures, or that says so.

    Args:
        reward: no sum.
        flow_map: says how rows are cut; None for one process that does not.
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
        """See `Reward.begin`. What is elsewhere begins in the first process, and the others hear of it when they wait."""
        n = len(images)
        rows = Rows(n, labels=labels, prompts=None if prompts is None else list(prompts), groups=groups)
        waits: dict[int, Callable[[], Scores]] = {}

        def begun(of: slice, images: Tensor, latents: Tensor | None = None) -> Callable[[], Scores]:
            own = rows[of]
            return self.reward.begin(images, own.prompts, own.labels, own.groups, latents)

        def part(of: slice, images: Tensor, latents: Tensor | None = None) -> tuple[Tensor, list[str]]:
            return _as_rows(waits[of.start]() if of.start in waits else begun(of, images, latents)())

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
                waits |= {cut.start: _later(begun, cut, *(x[cut] for x in both)) for cut in cuts}
        return wait


def _later(begin: Callable[..., Callable[[], Scores]], *given: Any) -> Callable[[], Scores]:
    """What waits for what is begun; if that fails, the wait does: all processes are there then."""
    try:
        return begin(*given)
    except Exception as error:
        failure = error

    def fail() -> Scores:
        raise failure

    return fail


def _as_rows(scores: Scores) -> tuple[Tensor, list[str]]:
    """Scores as (b, 1 + components), which can be sent, and the names of the components."""
    columns = [scores.total, *(value.to(scores.total) for value in scores.components.values())]
    return torch.stack(columns, 1), list(scores.components)


def _as_scores(columns: Tensor, names: list[str]) -> Scores:
    total, *components = columns.unbind(1)
    return Scores(total, {name: value.detach() for name, value in zip(names, components)})
