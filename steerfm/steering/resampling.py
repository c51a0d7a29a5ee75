"""Resampling schemes, from normalised weights (n, k) and uniform numbers (n, k) to ancestors (n, k).

All are unbiased: particle j has k w_j children on average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scheme = Callable[[Tensor, Tensor], Tensor]


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
