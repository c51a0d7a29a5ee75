"""Log-weights, effective sample size and resampling: per output, in log space, on the device.

Log-weights are (n, k): n outputs of k particles. A resampling scheme is a function of the normalised weights (n, k) and of
uniform numbers (n, k), to ancestors (n, k); all are unbiased: particle j has k w_j children on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Scheme = Callable[[Tensor, Tensor], Tensor]


def wide(device: torch.device) -> torch.dtype:
    """The dtype of log-weights and of sums: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def normalise(log_w: Tensor) -> Tensor:
    """Log-weights (n, k) with logsumexp = 0 in every row."""
    return log_w - torch.logsumexp(log_w, 1, keepdim=True)


def log_mean(log_w: Tensor) -> Tensor:
    """log of the mean weight of every row, (n, k) -> (n,)."""
    return torch.logsumexp(log_w, 1) - math.log(log_w.shape[1])


def effective_sample_size(log_w: Tensor) -> Tensor:
    """ESS / k = (sum w)^2 / (k sum w^2), (n, k) -> (n,) in [1/k, 1]."""
    return torch.exp(2 * torch.logsumexp(log_w, 1) - torch.logsumexp(2 * log_w, 1)) / log_w.shape[1]


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
    """One draw in each of k equal strata (Kitagawa 1996)."""
    k = w.shape[1]
    return _invert(w, (torch.arange(k, device=w.device) + u) / k)


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """One uniform number for all strata (Carpenter et al. 1999): cheap and low in variance."""
    return stratified(w, u[:, :1].expand_as(u))


def residual(w: Tensor, u: Tensor) -> Tensor:
    """floor(k w) copies of each particle, the rest by systematic draws from what is left (Liu & Chen 1998)."""
    k = w.shape[1]
    copies = torch.floor(k * w)
    left = k * w - copies
    missing = left.sum(1, keepdim=True)
    # slots below the number of copies are filled in order; the others draw from the remainders
    filled = copies.cumsum(1)
    slot = torch.arange(k, device=w.device).expand_as(w).to(w)
    certain = torch.searchsorted(filled, slot, right=True).clamp_max(k - 1)
    position = (slot - filled[:, -1:] + u[:, :1]) / missing.clamp_min(torch.finfo(w.dtype).tiny)
    drawn = _invert(left, position.clamp_min(0))
    return torch.where(slot < filled[:, -1:], certain, drawn)


def ssp(w: Tensor, u: Tensor) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin & Whiteley 1708.08396): each particle has floor or ceil of k w children.

    Runs once over the particles, for all outputs together.
    """
    n, k = w.shape
    copies = torch.floor(k * w)
    fraction = k * w - copies
    row = torch.arange(n, device=w.device)
    carrier = torch.zeros(n, dtype=torch.long, device=w.device)  # the one index with an unresolved fraction
    carried = fraction[:, 0].clone()
    for j in range(1, k):
        other = fraction[:, j]
        total = carried + other
        over = total >= 1
        # one of the pair is resolved: it rises to 1 if the total allows, else drops to 0; the other carries the rest on,
        # and the odds keep both expectations
        odds, against = torch.where(over, 1 - carried, carried), torch.where(over, 2 - total, total)
        keep = u[:, j] * against < odds
        copies[row, torch.where(keep, torch.full_like(carrier, j), carrier)] += over.to(w.dtype)
        carrier = torch.where(keep, carrier, torch.full_like(carrier, j))
        carried = torch.where(over, total - 1, total)
    missing = k - copies.sum(1)
    copies[row, carrier] += missing.round()
    edges = copies.cumsum(1)
    slot = torch.arange(k, device=w.device).expand_as(w).to(w)
    return torch.searchsorted(edges, slot, right=True).clamp_max(k - 1)


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


# --- selection -------------------------------------------------------------------------------------------------------
@dataclass
class Selected:
    """ancestors: (n, k) indices into the particles of each output; resampled: (n,) where that was done."""

    ancestors: Tensor
    resampled: Tensor


class Selection(Protocol):
    """Which particles go on; any object with this method is a selection."""

    def select(self, log_w: Tensor, u: Tensor) -> Selected:
        """Log-weights and uniform numbers, (n, k) each."""
        ...


@dataclass(frozen=True)
class Resample:
    """Resample an output when its ESS / k falls below ``threshold``.

    Args:
        scheme: a key of `SCHEMES`, or a function of the same signature.
        threshold: 0 never, 1 (nearly) always.
    """

    scheme: str | Scheme = "systematic"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str) and self.scheme not in SCHEMES:
            raise ValueError(f"unknown resampling scheme {self.scheme!r}; schemes: {', '.join(SCHEMES)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a share of the particles, in [0, 1]")

    def select(self, log_w: Tensor, u: Tensor) -> Selected:
        k = log_w.shape[1]
        stay = torch.arange(k, device=log_w.device).expand_as(log_w)
        low = effective_sample_size(log_w) < self.threshold
        if not low.any():
            return Selected(stay, low)
        scheme = SCHEMES[self.scheme] if isinstance(self.scheme, str) else self.scheme
        drawn = scheme(log_w.softmax(1), u.to(log_w))
        return Selected(torch.where(low.unsqueeze(1), drawn, stay), low)
