"""Resampling schemes, from normalised weights (n, k) and uniform numbers (n, k) to ancestors (n, k).

All are unbiased: particle j has k w_j children on average. None of them loops over particles. Where possible they use a sum
in place of a search: the number of children of all particles up to one is known in closed form, and ancestors are cumulative
sums of a histogram of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Scheme = Callable[[Tensor, Tensor], Tensor]

BLOCK = 2**14
"""Particles to resample at a time on a CPU, so that intermediate results stay in its cache."""
LEAST = 4
"""Fewest outputs to resample at a time, since each call has a fixed cost."""
FEW, SMALL = 2**7, 2**11
"""Most particles per output, and in total, for which a binary search is faster than a table or a histogram."""


def _by_block(scheme: Scheme) -> Scheme:
    """Apply a scheme to a few outputs at a time on a CPU."""

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
    """One draw in each of k equal strata (Kitagawa 1996)."""
    return _by_stratum(w, u, u.shape[1])


@_by_block
def systematic(w: Tensor, u: Tensor) -> Tensor:
    """One uniform number for all strata (Carpenter et al. 1999): cheap, with low variance."""
    return _by_stratum(w, u[:, :1], u.shape[1])


def _by_stratum(w: Tensor, u: Tensor, strata: int) -> Tensor:
    """Ancestors (n, strata).

    Args:
        w: (n, k) normalised weights.
        u: (n, strata) a uniform number for each stratum, or (n, 1) one for all.
        strata: number of strata.
    """
    edges = _edges(w)
    if _few(edges):
        return _find(edges, (torch.arange(strata, device=w.device) + u) / strata)
    upto = edges.mul_(strata)
    whole = upto.floor().clamp_(0, strata - 1)  # strata below an edge; the point of the next one may be, too
    stratum = whole.long()
    point = u if u.shape[1] == 1 else u.gather(1, stratum)
    return _ancestors(stratum + (point < upto.sub_(whole)).long(), strata)


@_by_block
def residual(w: Tensor, u: Tensor) -> Tensor:
    """floor(k w) copies of each particle; the rest by independent draws from the remainders (Liu & Chen 1998)."""
    k = w.shape[1]
    copies, shares = _certain(w)
    upto = copies.long().cumsum(1)
    ancestors, first = _ancestors(upto, k), int(upto[:, -1].clamp_(0, k).min())
    slots = torch.arange(first, k, device=w.device)
    rest = _find(_edges(shares), u[:, first:])
    ancestors[:, first:] = torch.where(slots < upto[:, -1:], ancestors[:, first:], rest)
    return ancestors


@_by_block
def ssp(w: Tensor, u: Tensor) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin & Whiteley 1708.08396): each particle has floor or ceil of k w children.

    The process visits the particles in turn and carries one unresolved fraction. At each particle it resolves one of the two
    fractions, the carried one or the particle's own: to 1 if their sum is at least 1, else to 0. The other fraction takes the
    rest and is carried on. The probabilities preserve both expectations. The carried fraction is always the sum of all
    fractions so far, modulo 1, so all visits can be computed at once. The carrier is the last particle that took over.
    """
    k = w.shape[1]
    copies, shares = _certain(w)
    upto = shares.cumsum(1)
    whole = upto.floor()
    hand = (upto - whole)[:, :-1]
    other = shares[:, 1:]
    over = (whole[:, 1:] - whole[:, :-1]).clamp_max_(1)  # 1 where the sum is above one, else 0
    odds, against = (over - hand).abs_(), (hand + other).sub_(over, alpha=2).abs_()
    stays = (other == 0) | (against.mul_(u[:, 1:]) < odds)  # the carrier stays, and the new particle is resolved
    index = torch.arange(k, device=w.device)
    carriers = (~stays).long().mul_(index[1:])
    carriers = torch.nn.functional.pad(carriers, (1, 0)).cummax(1).values
    risen = torch.where(stays, index[1:], carriers[:, :-1])
    copies = copies.scatter_add_(1, risen, over).long()
    missing = k - copies.sum(1, keepdim=True)  # the last fraction is a whole number, up to rounding
    return _ancestors(copies.scatter_add_(1, carriers[:, -1:], missing).cumsum_(1), k)


def distinct(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw m different particles of each output, for steps without noise (Fearnhead & Clifford 2003, section 5).

    Particles with a weight above c survive for certain and keep their weight. The others survive with probability w / c and
    get weight c. Unbiased: the expectation of each weight does not change.

    Args:
        w: (n, k) normalised weights.
        u: (n, m) uniform numbers, m < k; only one of each row is used.

    Returns:
        Ancestors (n, m), and log of m times their new weights, (n, m).
    """
    m = u.shape[1]
    heavy = w.sort(1, descending=True).values
    tails = heavy.flip(1).cumsum(1).flip(1)[:, :m]  # weight of each particle and all lighter ones
    limit = tails / torch.arange(m, 0, -1, device=w.device)
    first = (heavy[:, :m] < limit).long().argmax(1, keepdim=True)  # if there is none, only m weights are not zero
    c = limit.gather(1, first)
    odds = (w / c).clamp_max(1.0)
    edges = odds.cumsum(1)
    points = torch.arange(m, device=w.device) + u[:, :1]
    edges = edges * (m / edges[:, -1:])
    ancestors = torch.searchsorted(edges, points.to(edges), right=True).clamp_max_(w.shape[1] - 1)
    return ancestors, torch.log(m * torch.maximum(w, c).gather(1, ancestors))


def _certain(w: Tensor) -> tuple[Tensor, Tensor]:
    """floor(k w) and the remainder of k w. A product that is below a whole number by rounding only counts as that number."""
    expected = w.shape[1] * w
    copies = (expected * (1 + 4 * torch.finfo(w.dtype).eps)).floor_()
    return copies, expected.sub_(copies).clamp_min_(0)


def _edges(w: Tensor) -> Tensor:
    """Cumulative weights (n, k); the last one is 1."""
    edges = w.cumsum(1)
    return edges / edges[:, -1:]


def _few(edges: Tensor) -> bool:
    """Whether a search is faster than several vectorised calls."""
    return edges.shape[1] <= FEW or edges.numel() <= SMALL


def _ancestors(upto: Tensor, m: int) -> Tensor:
    """Ancestors (n, m) in ascending order: for each slot, the number of particles whose children are all before it.

    Args:
        upto: (n, k) cumulative number of children, integers. If the total is less than m, the last particle takes the rest.
        m: number of slots.
    """
    n, k = upto.shape
    ends = upto.new_zeros(n, m + 1).scatter_add_(1, upto.clamp_(0, m), torch.ones_like(upto))
    return ends[:, :m].cumsum(1).clamp_max_(k - 1)


def _find(edges: Tensor, points: Tensor) -> Tensor:
    """Ancestors (n, m) of points in [0, 1), in any order: for each point, the number of edges (n, k) that are not above it.

    With many particles, only the point's bucket is searched, and a table has the number of edges before it (Chen & Asau 1974).
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
