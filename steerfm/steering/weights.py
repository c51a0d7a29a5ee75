"""Log-weights, effective sample size and resampling: per output, in log space, on the device.

Log-weights are (n, k): n outputs of k particles. A resampling scheme is a function of the normalised weights (n, k) and of
uniform numbers (n, k), to ancestors (n, k); all are unbiased: particle j has k w_j children on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from steerfm.sampling import whole_numbers

Scheme = Callable[[Tensor, Tensor], Tensor]
EQUAL = 1 - 1e-12
"""Equal weights have an ESS above this: 1, up to rounding."""


def wide(device: torch.device) -> torch.dtype:
    """The dtype of log-weights and of sums: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_one(**counts: int) -> None:
    """Refuse counts below one, and what is no whole number, by name.

    Raises:
        ValueError: naming the argument.
    """
    whole_numbers(**counts)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: at least one is needed")


def normalise(log_w: Tensor) -> Tensor:
    """Log-weights (n, k) with logsumexp = 0 in every row."""
    return log_w - torch.logsumexp(log_w, 1, keepdim=True)


def log_mean(log_w: Tensor) -> Tensor:
    """log of the mean weight of every row, (n, k) -> (n,)."""
    return torch.logsumexp(log_w, 1) - math.log(log_w.shape[1])


def effective_sample_size(log_w: Tensor) -> Tensor:
    """ESS / k = (sum w)^2 / (k sum w^2), (n, k) -> (n,) in [1/k, 1]."""
    w = torch.exp(log_w - log_w.amax(1, keepdim=True))
    return w.sum(1).square() / (w.square().sum(1) * log_w.shape[1])


def largest(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, halvings: int = 30) -> Tensor:
    """The largest value from ``low``, where it holds, to ``high`` at which it still holds, entry by entry, by bisection."""
    low = torch.where(holds(high), high, low)
    for _ in range(halvings):
        middle = (low + high) / 2
        fits = holds(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return low


def log_mean_exp(log_w: Tensor, values: Tensor) -> Tensor:
    """log of the weighted mean of exp(values) over the last axis: (b, k) -> (b,)."""
    if values.shape[-1] == 1:
        return values.squeeze(-1)
    return torch.logsumexp(log_w + values, -1) - torch.logsumexp(log_w, -1)


# --- resampling schemes ----------------------------------------------------------------------------------------------
def _invert(w: Tensor, points: Tensor) -> Tensor:
    """Ancestors of sorted or unsorted points in [0, 1): the inverse of the cumulative weights."""
    edges = w.cumsum(1)
    number = torch.finfo(w.dtype)
    edges = edges / edges[:, -1:].clamp_min(number.tiny)
    points = points.to(edges).clamp_max(1 - number.eps / 2)  # rounding must not leave a point beyond the last edge
    return torch.searchsorted(edges, points, right=True).clamp_max(w.shape[1] - 1)


def multinomial(w: Tensor, u: Tensor) -> Tensor:
    """k independent draws: the highest variance."""
    return _invert(w, u)


def stratified(w: Tensor, u: Tensor) -> Tensor:
    """One draw in each of equal strata, one a column of ``u`` (Kitagawa 1996)."""
    k = u.shape[1]
    return _invert(w, (torch.arange(k, device=w.device) + u) / k)


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """One uniform number for all strata (Carpenter et al. 1999): cheap and low in variance."""
    return stratified(w, u[:, :1].expand_as(u))


def residual(w: Tensor, u: Tensor) -> Tensor:
    """floor(k w) copies of each particle, the rest by independent draws from what is left (Liu & Chen 1998)."""
    copies, left = _certain(w)
    filled = copies.cumsum(1)
    slot = torch.arange(w.shape[1], device=w.device).expand_as(w).to(w)
    return torch.where(slot < filled[:, -1:], _ancestors(copies), _invert(left, u))


def ssp(w: Tensor, u: Tensor) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin & Whiteley 1708.08396): each particle has floor or ceil of k w children.

    Goes once over the particles with one unresolved share in hand, its carrier's. It meets the share of the next particle,
    and one of the two is resolved: it rises to 1 if both together allow that, else drops to 0; the other carries the rest on,
    and the odds keep both expectations. What is in hand is the sum of all shares so far, modulo 1, whoever carries it: so all
    meetings are decided at once, and a carrier is the last one to have taken over.
    """
    copies, left = _certain(w)
    upto = left.cumsum(1)
    carried = (upto - upto.floor())[:, :-1]
    other = left[:, 1:]
    total = carried + other
    over = upto[:, 1:].floor() > upto[:, :-1].floor()
    odds, against = torch.where(over, 1 - carried, carried), torch.where(over, 2 - total, total)
    stays = (other == 0) | (u[:, 1:] * against < odds)  # the carrier goes on, and the newcomer is the one resolved
    index = torch.arange(w.shape[1], device=w.device).expand(w.shape)
    carriers = torch.cat([index[:, :1], torch.where(stays, 0, index[:, 1:])], 1).cummax(1).values
    risen = torch.where(stays, index[:, 1:], carriers[:, :-1])
    copies = copies.scatter_add(1, risen, over.to(copies))
    missing = w.shape[1] - copies.sum(1, keepdim=True)  # the last one in hand is a whole one, up to rounding
    return _ancestors(copies.scatter_add(1, carriers[:, -1:], missing))


def _certain(w: Tensor) -> tuple[Tensor, Tensor]:
    """floor(k w), and what is left of k w; a product that rounding keeps below a whole number is that number."""
    k = w.shape[1]
    copies = torch.floor(k * w * (1 + 4 * torch.finfo(w.dtype).eps))
    return copies, (k * w - copies).clamp_min(0)


def _ancestors(copies: Tensor) -> Tensor:
    """Ancestors in ascending order, from the number of children of each; the last one where there are less than k."""
    slot = torch.arange(copies.shape[1], device=copies.device).expand_as(copies).to(copies)
    return torch.searchsorted(copies.cumsum(1), slot, right=True).clamp_max(copies.shape[1] - 1)


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


# --- selection -------------------------------------------------------------------------------------------------------
@dataclass
class Candidates:
    """What a selection sees of n outputs of k particles.

    Attributes:
        log_w: (n, k) log-weights.
        tilt: (n, k) strength * reward of the look-ahead, untempered: what a search ranks by.
        u: (n, k) uniform numbers.
        step: transitions done. t: time.
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

    The weights of a resampled output start anew. k' may be smaller than k, where ``resampled`` holds for all outputs.
    log_odds: (n, k) log of the odds that an ancestor is each of the particles; None where they are what came out.
    """

    ancestors: Tensor
    resampled: Tensor
    log_odds: Tensor | None = None

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

    One that is ``unbiased``, so that every particle has children in proportion to its weight on average, says so by a member
    of that name; without it there is no log Z.
    """

    @property
    def ranks(self) -> bool: ...

    @property
    def prunes(self) -> bool: ...

    def select(self, candidates: Candidates) -> Selected: ...


def unbiased(selection: Selection | None) -> bool:
    """Whether the particles that go on have children in proportion to their weights on average."""
    return selection is None or bool(getattr(selection, "unbiased", False))


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

    Unbiased: the mean weight of the many goes into log Z. Equal weights choose nothing, and the first particles go on.

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
        drawn = systematic(log_w.softmax(1), candidates.u[:, : self.keep].to(log_w))
        first = torch.arange(self.keep, device=log_w.device).expand_as(drawn)
        told_apart = effective_sample_size(log_w) < EQUAL
        kept = torch.where(told_apart.unsqueeze(1), drawn, first)
        resampled = torch.ones(len(log_w), dtype=torch.bool, device=log_w.device)
        return Selected(kept, resampled, log_w.log_softmax(1))


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

    def select(self, candidates: Candidates) -> Selected:
        n, k = candidates.tilt.shape
        keep = min(self.keep, k)
        best = candidates.tilt.topk(keep, 1).indices
        slots = torch.arange(keep if self.prune else k, device=best.device) % keep
        return Selected(best[:, slots], torch.ones(n, dtype=torch.bool, device=best.device))


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
    def ranks(self) -> bool:
        return self.selection.ranks

    @property
    def prunes(self) -> bool:
        return self.selection.prunes

    @property
    def unbiased(self) -> bool:
        return unbiased(self.selection)

    def select(self, candidates: Candidates) -> Selected:
        if candidates.step and candidates.step % self.every == 0 and self.start <= candidates.t <= self.stop:
            return self.selection.select(candidates)
        return Selected.none(candidates.log_w)


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
