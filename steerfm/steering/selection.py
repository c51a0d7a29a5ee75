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
    """The input of a selection: n outputs of k particles.

    Attributes:
        log_w: (n, k) log-weights.
        tilt: (n, k) strength * reward of the look-ahead, untempered; a search ranks by it.
        u: (n, k) uniform numbers.
        step: number of transitions so far.
        t: the time.
        parts: whether the next step has noise, so that copies part; without noise copies stay copies.
    """

    log_w: Tensor
    tilt: Tensor
    u: Tensor
    step: int
    t: float
    parts: bool = True


@dataclass
class Selected:
    """The output of a selection.

    Attributes:
        ancestors: (n, k') indices into the particles of each output. k' may be smaller than k if all outputs are resampled.
        resampled: (n,) whether the output was resampled.
        log_odds: (n, k) log of the probability that a child descends from each particle; None for the shares in ``ancestors``.
        log_w: (n, k') new log-weights of the resampled outputs; None for 0.
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
        """No selection: every particle (n, k) is its own ancestor."""
        n, k = log_w.shape
        stay = torch.arange(k, device=log_w.device).expand(n, k)
        return cls(stay, torch.zeros(n, dtype=torch.bool, device=log_w.device))


class Selection(Protocol):
    """Decides which particles survive. Any object with these members is a selection.

    Attributes:
        ranks: whether it reads ``tilt``, so that it needs a look-ahead even where the value is tempered to zero.
        prunes: whether it may leave fewer particles. Other selections are only used before a step with noise: without
            noise, copies would stay copies.

    A selection by weights can also be `Fair`; otherwise the run has no log Z.
    """

    @property
    def ranks(self) -> bool: ...

    @property
    def prunes(self) -> bool: ...

    def select(self, candidates: Candidates) -> Selected: ...


@runtime_checkable
class Fair(Protocol):
    """A selection with the attribute ``unbiased``: on average, children are in proportion to weights."""

    @property
    def unbiased(self) -> bool: ...


@runtime_checkable
class Leaving(Protocol):
    """A selection by plain look-aheads whose number of survivors is fixed in advance: only survivors need a gradient."""

    def leaves(self, step: int, t: float, k: int) -> int:
        """How many of ``k`` particles survive after ``step`` steps, at time t."""
        ...


@runtime_checkable
class Timely(Protocol):
    """A selection that ranks particles at some steps only; at other steps it needs no look-ahead."""

    def looks(self, step: int, k: int) -> bool:
        """Whether it ranks the ``k`` particles of an output after ``step`` steps."""
        ...


@runtime_checkable
class Grouping(Protocol):
    """A selection within groups of ``group`` particles; the number of particles is a multiple of it."""

    @property
    def group(self) -> int: ...


def group(selection: Selection | None) -> int:
    """Group size of a selection; 1 if it has no groups."""
    return selection.group if isinstance(selection, Grouping) else 1


def ranking(selection: Selection | None, step: int, k: int) -> bool:
    """Whether a selection ranks the ``k`` particles of an output by their look-aheads after ``step`` steps."""
    return selection is not None and selection.ranks and (not isinstance(selection, Timely) or selection.looks(step, k))


def unbiased(selection: Selection | None) -> bool:
    """Whether, on average, particles have children in proportion to their weights."""
    return selection is None or (isinstance(selection, Fair) and selection.unbiased)


@dataclass(frozen=True)
class Resample:
    """Resample an output when its ESS / k falls below ``threshold``.

    Args:
        scheme: a key of `SCHEMES`, or a function of the same signature.
        threshold: share of the particles in [0, 1]; 0 never resamples, 1 (nearly) always.
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
        """Ancestors (n, k) of every output, at any ESS."""
        scheme = SCHEMES[self.scheme] if isinstance(self.scheme, str) else self.scheme
        return scheme(log_w.softmax(1), u.to(log_w))


@dataclass(frozen=True)
class Narrow:
    """Before the first step, draw ``keep`` particles by their weights and drop the others.

    Unbiased: the mean weight of all particles goes into log Z. If the weights are equal, the first particles survive. Before a
    step without noise no particle is drawn twice: see `distinct`.

    Args:
        keep: number of survivors, at most the number of particles.
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
            due = candidates.parts or self.then.prunes
            return self.then.select(candidates) if due else Selected.none(log_w)
        w, u = log_w.softmax(1), candidates.u[:, : self.keep].to(log_w)
        draws, log_v = (systematic(w, u), None) if candidates.parts else distinct(w, u)
        first = torch.arange(self.keep, device=log_w.device).expand_as(draws)
        unequal = (effective_sample_size(log_w) < EQUAL).unsqueeze(1)
        ancestors = torch.where(unequal, draws, first)
        log_v = None if log_v is None else torch.where(unequal, log_v, 0.0)
        resampled = torch.ones(len(log_w), dtype=torch.bool, device=log_w.device)
        return Selected(ancestors, resampled, log_w.log_softmax(1), log_v)


@dataclass(frozen=True)
class TopK:
    """The best ``keep`` particles of each output by look-ahead reward, each copied equally often. Search, not sampling.

    Args:
        keep: number of survivors, at most the number of particles.
        prune: continue with the survivors only, without copies.
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
    """At some steps only the best particles by look-ahead reward survive, without copies. Search, not sampling.

    In a tie the first particles survive.

    Args:
        at: steps before each pruning, ascending.
        keep: survivors of each pruning, at most the number of particles.
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
    """In each group of ``children`` particles the best by look-ahead reward survives (SVDD 2408.08252, algorithm 1).

    Args:
        children: group size; must divide the number of particles.
        soft: draw the survivor with probability proportional to exp(strength r) (SVDD's soft version).
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
    """Apply a selection in a part of the run only.

    Args:
        selection: the selection.
        every: steps between selections, and before the first one.
        start: first time of the window.
        stop: last time of the window.
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
    """The same selection with another threshold for resampling.

    Raises:
        ValueError: the selection has no threshold.
    """
    if isinstance(selection, Resample):
        return replace(selection, threshold=threshold)
    if isinstance(selection, Narrow):
        return replace(selection, then=with_threshold(selection.then, threshold))
    if isinstance(selection, Window):
        return replace(selection, selection=with_threshold(selection.selection, threshold))
    raise ValueError(f"threshold={threshold}: this method does not resample below an ESS; resampling={selection!r}")
