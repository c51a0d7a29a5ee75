"""Functions of log-weights (n, k), for n outputs of k particles: in log space, on their device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def wide(device: torch.device) -> torch.dtype:
    """The dtype of log-weights and sums: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


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


LOW = 0.25
"""ESS below which `ess_in_words` gives advice."""


def ess_in_words(log_w: Tensor) -> dict[str, str]:
    """Summary of log-weights (n, k) at the end of a run, one line each, by name; with advice if they are uneven."""
    share = effective_sample_size(log_w)
    summary = f"{share.mean():.0%} of the particles carry the weight at the end (mean over outputs; lowest {share.min():.0%})"
    advice = "few particles have all the weight: lower the strength, or use more particles or steps"
    return {"ESS": summary} | ({"low ESS": advice} if share.mean() < LOW else {})


def largest(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, halvings: int = 30) -> Tensor:
    """The largest value between ``low`` and ``high`` at which a condition holds, entry by entry, by bisection.

    Args:
        holds: the condition of values (b,); it is true at ``low`` and changes at most once.
        low: (b,) lower bounds.
        high: (b,) upper bounds.
        halvings: steps of the bisection.
    """
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
