"""Selection: which particles go on, by their weights (sampling) or by their look-aheads (search)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from steerfm.checks import at_least_one
from steerfm.steering.resampling import SCHEMES, Scheme, distinct, multinomial, systematic
from steerfm.steering.weights import effective_sample_size, wide

EQUAL = 1 - 1e-12
"""Equal weights have an ESS above this: 1, up to rounding."""


@dataclass
class Candidates:
    """What a selection sees of n outputs of k particles.

    Attributes:
        log_w: (n, k) log-weights.
        tilt: (n, k) strength * reward of the look-ahead, untempered: what a search ranks by.
        u: (n, k) uniform numbers.
        step: transitions done.
        t: time.
        parts: whether the next step has noise; without it copies stay copies.
    """

    log_w: Tensor
    tilt: Tensor
    u: Tensor
    step: int
    t: float
    parts: bool = True


@dataclass
class Selected:
    """ancestors: (n, k') indices into the particles of each output; resampled: (n,) where that was done.

    The weights of a resampled output start anew, from ``log_w`` (n, k') where that is given and from 0 where not. k' may be
    smaller than k, where ``resampled`` holds for all outputs.
    log_odds: (n, k) log of the odds that an ancestor is each of the particles; None where they are what came out.
    """

    ancestors: Tensor
    resampled: Tensor
    log_odds: Tensor | None = None
    log_w: Tensor | None = None

    def odds(self, k: int) -> Tensor:
        """log_odds (n, k), in the wide dtype."""
        if self.log_odds is not None:
            return self.log_odds
        ones = torch.ones(self.ancestors.shape, dtype=wide(self.ancestors.device), device=self.ancestors.device)
        children = ones.new_zeros(len(ones), k).scatter_add(1, self.ancestors, ones)
        return torch.log(children / ones.shape[1])

    @classmethod
    def none(cls, log_w: Tensor) -> Selected:
        """Every particle (n, k) its own ancestor."""
        n, k = log_w.shape
        stay = torch.arange(k, device=log_w.device).expand(n, k)
        return cls(stay, torch.zeros(n, dtype=torch.bool, device=log_w.device))


class Selection(Protocol):
    """Which particles go on; any object with these members is a selection.

    Attributes:
        ranks: whether it looks at ``tilt``, so that a look-ahead is needed even where its value is tempered to zero.
        prunes: whether it may leave fewer particles. The engine asks the others only before a step with noise: without
            it, copies would stay copies.

    One by weights may also be `Fair`; without that there is no log Z.
    """

    @property
    def ranks(self) -> bool: ...

    @property
    def prunes(self) -> bool: ...

    def select(self, candidates: Candidates) -> Selected: ...


@runtime_checkable
class Fair(Protocol):
    """A selection that says whether every particle has children in proportion to its weight on average."""

    @property
    def unbiased(self) -> bool: ...


@runtime_checkable
class Leaving(Protocol):
    """A selection by plain look-aheads that says beforehand how many it leaves: only those are worth a gradient."""

    def leaves(self, step: int, t: float, k: int) -> int:
        """How many of ``k`` particles go on, after so many steps, at time t."""
        ...


@runtime_checkable
class Timely(Protocol):
    """A selection that looks at some steps only, and says when: elsewhere a look-ahead that only it would see is not made."""

    def looks(self, step: int, k: int) -> bool:
        """Whether it ranks the ``k`` particles of an output, after so many steps."""
        ...


@runtime_checkable
class Grouping(Protocol):
    """A selection within groups of so many particles: their number is a multiple of it."""

    @property
    def group(self) -> int: ...


def group(selection: Selection | None) -> int:
    """Particles that a selection takes together; 1 where it takes any number."""
    return selection.group if isinstance(selection, Grouping) else 1


def ranking(selection: Selection | None, step: int, k: int) -> bool:
    """Whether a selection ranks the ``k`` particles of an output by their look-aheads, after so many steps."""
    return selection is not None and selection.ranks and (not isinstance(selection, Timely) or selection.looks(step, k))


def unbiased(selection: Selection | None) -> bool:
    """Whether the particles that go on have children in proportion to their weights on average."""
    return selection is None or (isinstance(selection, Fair) and selection.unbiased)


@dataclass(frozen=True)
class Resample:
    """Resample an output when its ESS / k falls below ``threshold``.

    Args:
        scheme: a key of `SCHEMES`, or a function of the same signature.
        threshold: 0 never, 1 (nearly) always.
    """

    scheme: str | Scheme = "systematic"
    threshold: float = 0.5
    ranks = prunes = False
    unbiased = True

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str) and self.scheme not in SCHEMES:
            raise ValueError(f"unknown resampling scheme {self.scheme!r}; schemes: {', '.join(SCHEMES)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a share of the particles, in [0, 1]")

    def select(self, candidates: Candidates) -> Selected:
        log_w = candidates.log_w
        stay = Selected.none(log_w)
        low = effective_sample_size(log_w) < self.threshold * EQUAL
        if not low.any():
            return stay
        rows = low.unsqueeze(1)
        odds = torch.where(rows, log_w.log_softmax(1), -math.log(log_w.shape[1]))
        return Selected(torch.where(rows, self.draw(log_w, candidates.u), stay.ancestors), low, odds)

    def draw(self, log_w: Tensor, u: Tensor) -> Tensor:
        """Ancestors (n, k) of every output, whatever its ESS."""
        scheme = SCHEMES[self.scheme] if isinstance(self.scheme, str) else self.scheme
        return scheme(log_w.softmax(1), u.to(log_w))


@dataclass(frozen=True)
class Narrow:
    """Before the first step, ``keep`` particles are drawn by the weights, and they alone go on.

    Unbiased: the mean weight of the many goes into log Z. Equal weights choose nothing, and the first particles go on. Before a
    step without noise no particle is drawn twice: see `distinct`.

    Args:
        keep: particles that go on, at most those there are.
        then: selection before the later steps.
    """

    keep: int = 16
    then: Selection = field(default_factory=Resample)
    prunes = True

    def __post_init__(self) -> None:
        at_least_one(keep=self.keep)

    @property
    def ranks(self) -> bool:
        return self.then.ranks

    @property
    def unbiased(self) -> bool:
        return unbiased(self.then)

    def select(self, candidates: Candidates) -> Selected:
        log_w, k = candidates.log_w, candidates.log_w.shape[1]
        if candidates.step or k <= self.keep:
            asked = candidates.parts or self.then.prunes
            return self.then.select(candidates) if asked else Selected.none(log_w)
        w, u = log_w.softmax(1), candidates.u[:, : self.keep].to(log_w)
        drawn, carried = (systematic(w, u), None) if candidates.parts else distinct(w, u)
        first = torch.arange(self.keep, device=log_w.device).expand_as(drawn)
        told_apart = (effective_sample_size(log_w) < EQUAL).unsqueeze(1)
        kept = torch.where(told_apart, drawn, first)
        carried = None if carried is None else torch.where(told_apart, carried, 0.0)
        resampled = torch.ones(len(log_w), dtype=torch.bool, device=log_w.device)
        return Selected(kept, resampled, log_w.log_softmax(1), carried)


@dataclass(frozen=True)
class TopK:
    """The best ``keep`` particles of each output by look-ahead reward, each copied equally often. Search, not sampling.

    Args:
        keep: particles that survive, at most those there are.
        prune: go on with those only, without copies.
    """

    keep: int = 1
    prune: bool = False
    ranks = True

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: at least one particle must survive")

    @property
    def prunes(self) -> bool:
        return self.prune

    def leaves(self, step: int, t: float, k: int) -> int:
        """See `Leaving`."""
        return min(self.keep, k) if self.prune else k

    def select(self, candidates: Candidates) -> Selected:
        n, k = candidates.tilt.shape
        keep = min(self.keep, k)
        best = candidates.tilt.topk(keep, 1).indices
        slots = torch.arange(keep if self.prune else k, device=best.device) % keep
        return Selected(best[:, slots], torch.ones(n, dtype=torch.bool, device=best.device))


@dataclass(frozen=True)
class Prune:
    """At some steps the best by look-ahead reward go on, and nobody is copied. Search, not sampling.

    Equals stay in the order in which they are.

    Args:
        at: steps done before each pruning, ascending.
        keep: particles that go on from each, at most those there are.
    """

    at: Sequence[int] = (0,)
    keep: Sequence[int] = (4,)
    ranks = prunes = True

    def __post_init__(self) -> None:
        if len(self.at) != len(self.keep):
            raise ValueError(f"at={list(self.at)}, keep={list(self.keep)}: give a number of particles for each step")
        for keep in self.keep:
            at_least_one(keep=keep)

    def leaves(self, step: int, t: float, k: int) -> int:
        """See `Leaving`."""
        return min([k, *(keep for at, keep in zip(self.at, self.keep) if at <= step)])

    def looks(self, step: int, k: int) -> bool:
        """See `Timely`."""
        return self.leaves(step, 0.0, k) < k

    def select(self, candidates: Candidates) -> Selected:
        n, k = candidates.tilt.shape
        keep = self.leaves(candidates.step, candidates.t, k)
        if keep == k:
            return Selected.none(candidates.log_w)
        best = candidates.tilt.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(1).values
        return Selected(best, torch.ones(n, dtype=torch.bool, device=best.device))


@dataclass(frozen=True)
class BestChild:
    """Each group of ``children`` particles is followed by its best, by look-ahead reward (SVDD 2408.08252, algorithm 1).

    Args:
        children: group size; must divide the number of particles.
        soft: draw the survivor with odds exp(strength r) instead (SVDD's soft version).
    """

    children: int = 4
    soft: bool = False
    ranks, prunes = True, False

    def __post_init__(self) -> None:
        at_least_one(children=self.children)

    @property
    def group(self) -> int:
        return self.children

    def select(self, candidates: Candidates) -> Selected:
        n, k = candidates.tilt.shape
        if k % self.children:
            raise ValueError(f"{k} particles do not divide into groups of {self.children} children")
        groups = candidates.tilt.view(-1, self.children)
        if self.soft:
            u = candidates.u.reshape(-1, self.children)[:, :1].to(groups)
            best = multinomial(groups.softmax(1), u)[:, 0]
        else:
            best = groups.argmax(1)
        first = torch.arange(0, k, self.children, device=best.device)
        ancestors = (best.view(n, -1) + first).repeat_interleave(self.children, 1)
        return Selected(ancestors, torch.ones(n, dtype=torch.bool, device=best.device))


@dataclass(frozen=True)
class Window:
    """A selection in a part of the run only.

    Args:
        selection: what is done there.
        every: steps from one selection to the next; the first is after as many.
        start, stop: only at times start <= t <= stop.
    """

    selection: Selection
    every: int = 1
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: at least one step")

    @property
    def group(self) -> int:
        return group(self.selection)

    @property
    def ranks(self) -> bool:
        return self.selection.ranks

    @property
    def prunes(self) -> bool:
        return self.selection.prunes

    @property
    def unbiased(self) -> bool:
        return unbiased(self.selection)

    def leaves(self, step: int, t: float, k: int) -> int:
        """See `Leaving`."""
        return self.selection.leaves(step, t, k) if self._due(step, t) and isinstance(self.selection, Leaving) else k

    def select(self, candidates: Candidates) -> Selected:
        due = self._due(candidates.step, candidates.t)
        return self.selection.select(candidates) if due else Selected.none(candidates.log_w)

    def _due(self, step: int, t: float) -> bool:
        return step > 0 and step % self.every == 0 and self.start <= t <= self.stop


def with_threshold(selection: Selection | None, threshold: float) -> Selection:
    """The selection, which resamples below another ESS.

    Raises:
        ValueError: it has no threshold.
    """
    if isinstance(selection, Resample):
        return replace(selection, threshold=threshold)
    if isinstance(selection, Narrow):
        return replace(selection, then=with_threshold(selection.then, threshold))
    if isinstance(selection, Window):
        return replace(selection, selection=with_threshold(selection.selection, threshold))
    raise ValueError(f"threshold={threshold}: this method does not resample below an ESS; resampling={selection!r}")
