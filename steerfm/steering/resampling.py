"""Resampling schemes, from normalised weights (n, k) and uniform numbers (n, k) to ancestors (n, k).

All are unbiased: particle j has k w_j children on average. None of them loops over particles or searches where a sum does:
the children of all particles up to one are counted in closed form, and ancestors are the sums of a histogram of the counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Scheme = Callable[[Tensor, Tensor], Tensor]

BLOCK = 2**14
"""Particles that are resampled at a time on a CPU: what lies between stays in its cache."""
LEAST = 4
"""Outputs that are resampled at a time at least, since a call has its price, too."""
FEW, SMALL = 2**7, 2**11
"""Particles of an output, and of all, up to which a binary search is faster than a table or a histogram."""


def _by_block(scheme: Scheme) -> Scheme:
    """The scheme, on a CPU some outputs at a time."""

    @wraps(scheme)
    def blocks(w: Tensor, u: Tensor) -> Tensor:
        rows = max(LEAST, BLOCK // w.shape[1])
        if len(w) <= rows or w.device.type != "cpu":
            return scheme(w, u)
        ancestors = torch.empty_like(u, dtype=torch.long)
        for out, *part in zip(ancestors.split(rows), w.split(rows), u.split(rows)):
            out.copy_(scheme(*part))
        return ancestors

    return blocks


@_by_block
def multinomial(w: Tensor, u: Tensor) -> Tensor:
    """k independent draws: the highest variance."""
    return _find(_edges(w), u)


@_by_block
def stratified(w: Tensor, u: Tensor) -> Tensor:
    """One draw in each of equal strata, one a column of ``u`` (Kitagawa 1996)."""
    return _by_stratum(w, u, u.shape[1])


@_by_block
def systematic(w: Tensor, u: Tensor) -> Tensor:
    """One uniform number for all strata (Carpenter et al. 1999): cheap and low in variance."""
    return _by_stratum(w, u[:, :1], u.shape[1])


def _by_stratum(w: Tensor, u: Tensor, strata: int) -> Tensor:
    """Ancestors (n, strata), by a uniform number for each stratum, (n, strata), or for all of them, (n, 1)."""
    edges = _edges(w)
    if _few(edges):
        return _find(edges, (torch.arange(strata, device=w.device) + u) / strata)
    upto = edges.mul_(strata)
    whole = upto.floor().clamp_(0, strata - 1)  # strata that lie below an edge; the point of the next may, too
    stratum = whole.long()
    drawn = u if u.shape[1] == 1 else u.gather(1, stratum)
    return _ancestors(stratum + (drawn < upto.sub_(whole)).long(), strata)


@_by_block
def residual(w: Tensor, u: Tensor) -> Tensor:
    """floor(k w) copies of each particle, the rest by independent draws from what is left (Liu & Chen 1998)."""
    k = w.shape[1]
    copies, left = _certain(w)
    upto = copies.long().cumsum(1)
    ancestors, first = _ancestors(upto, k), int(upto[:, -1].clamp_(0, k).min())
    slots = torch.arange(first, k, device=w.device)
    drawn = _find(_edges(left), u[:, first:])
    ancestors[:, first:] = torch.where(slots < upto[:, -1:], ancestors[:, first:], drawn)
    return ancestors


@_by_block
def ssp(w: Tensor, u: Tensor) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin & Whiteley 1708.08396): each particle has floor or ceil of k w children.

    Goes once over the particles with one unresolved share in hand, its carrier's. It meets the share of the next particle,
    and one of the two is resolved: it rises to 1 if both together allow that, else drops to 0; the other carries the rest on,
    and the odds keep both expectations. What is in hand is the sum of all shares so far, modulo 1, whoever carries it: so all
    meetings are decided at once, and a carrier is the last one to have taken over.
    """
    k = w.shape[1]
    copies, left = _certain(w)
    upto = left.cumsum(1)
    whole = upto.floor()
    carried = (upto - whole)[:, :-1]
    other = left[:, 1:]
    over = (whole[:, 1:] - whole[:, :-1]).clamp_max_(1)  # 1 where both together rise above one, else 0
    odds, against = (over - carried).abs_(), (carried + other).sub_(over, alpha=2).abs_()
    stays = (other == 0) | (against.mul_(u[:, 1:]) < odds)  # the carrier goes on, and the newcomer is the one resolved
    index = torch.arange(k, device=w.device)
    carriers = (~stays).long().mul_(index[1:])
    carriers = torch.nn.functional.pad(carriers, (1, 0)).cummax(1).values
    risen = torch.where(stays, index[1:], carriers[:, :-1])
    copies = copies.scatter_add_(1, risen, over).long()
    missing = k - copies.sum(1, keepdim=True)  # the last one in hand is a whole one, up to rounding
    return _ancestors(copies.scatter_add_(1, carriers[:, -1:], missing).cumsum_(1), k)


def distinct(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """m different particles of each output, and log of m times the weight that each goes on with (Fearnhead & Clifford 2003,
    section 5): the best there is where copies would stay copies.

    Those that are heavier than c go on for certain, with their weight; the others with odds w / c, and with weight c. Unbiased:
    the expectation of each weight is what it was.

    Args:
        w: (n, k) normalised weights.
        u: (n, m) uniform numbers, m < k; one of each row is used.
    """
    m = u.shape[1]
    heavy = w.sort(1, descending=True).values
    left = heavy.flip(1).cumsum(1).flip(1)[:, :m]  # of those from each on
    limit = left / torch.arange(m, 0, -1, device=w.device)
    first = (heavy[:, :m] < limit).long().argmax(1, keepdim=True)  # where none is, all weights but m are zero
    c = limit.gather(1, first)
    odds = (w / c).clamp_max(1.0)
    edges = odds.cumsum(1)
    points = torch.arange(m, device=w.device) + u[:, :1]
    edges = edges * (m / edges[:, -1:])
    ancestors = torch.searchsorted(edges, points.to(edges), right=True).clamp_max_(w.shape[1] - 1)
    return ancestors, torch.log(m * torch.maximum(w, c).gather(1, ancestors))


def _certain(w: Tensor) -> tuple[Tensor, Tensor]:
    """floor(k w), and what is left of k w; a product that rounding keeps below a whole number is that number."""
    expected = w.shape[1] * w
    copies = (expected * (1 + 4 * torch.finfo(w.dtype).eps)).floor_()
    return copies, expected.sub_(copies).clamp_min_(0)


def _edges(w: Tensor) -> Tensor:
    """Cumulative weights (n, k), whose last is 1."""
    edges = w.cumsum(1)
    return edges / edges[:, -1:]


def _few(edges: Tensor) -> bool:
    """Whether a search takes less than what needs several calls."""
    return edges.shape[1] <= FEW or edges.numel() <= SMALL


def _ancestors(upto: Tensor, m: int) -> Tensor:
    """Ancestors (n, m) in ascending order, from the number of children of each particle and those before it, (n, k) integers:
    how many particles have theirs among the slots so far. The last particle, where there are less than m."""
    n, k = upto.shape
    ends = upto.new_zeros(n, m + 1).scatter_add_(1, upto.clamp_(0, m), torch.ones_like(upto))
    return ends[:, :m].cumsum(1).clamp_max_(k - 1)


def _find(edges: Tensor, points: Tensor) -> Tensor:
    """Ancestors (n, m) of points in [0, 1), in any order: how many of the edges (n, k) are not above a point.

    Among many particles, those of the points' bucket are searched alone, and a table says how many there are before it
    (Chen & Asau 1974).
    """
    k = edges.shape[1]
    points = points.to(edges).clamp_max(1 - torch.finfo(edges.dtype).eps / 2)  # none lies beyond the last edge
    if _few(edges) or edges.device.type != "cpu":
        return torch.searchsorted(edges, points, right=True).clamp_max_(k - 1)
    bucket = (edges * k).long().clamp_(0, k)
    inside = bucket.new_zeros(len(edges), k + 2)
    inside[:, 1:].scatter_add_(1, bucket, torch.ones_like(bucket))
    below = inside.cumsum(1).gather(1, (points * k).long())
    step = 1 << int(inside.max()).bit_length()
    while step := step // 2:
        ahead = edges.gather(1, (below + (step - 1)).clamp_max_(k - 1))
        below.add_((ahead <= points).long(), alpha=step)
    return below.clamp_max_(k - 1)


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}
