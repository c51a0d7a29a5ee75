"""Diagnosis of a run: whether the strength was too small to matter or too large, and whether the weights can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from steerfm.steering.outcome import Outcome
from steerfm.steering.weights import effective_sample_size, ess_in_words

EVEN, ALL = 0.99, 0.99
"""ESS above which weights count as equal, and share of the weight above which one particle counts as all."""
HEAVY = 0.7
"""Pareto k-hat above which weighted means are unreliable (Vehtari et al. 1507.02646, section 3.2)."""
FEWEST, MOST = 5, 10.0
"""Fewest weights in the tail for a fit, and largest k-hat to report; it is also reported if fewer weights stand out."""


def tail(k: int) -> int:
    """Number of weights in the tail of k: a fifth of them, at most 3 sqrt(k) (Vehtari et al. 1507.02646, section 3.3)."""
    return int(min(0.2 * k, 3 * k**0.5))


def pareto_k(log_w: Tensor) -> Tensor:
    """Pareto k-hat (n,) of log-weights (n, k): the shape of the generalised Pareto law of the largest weights.

    Below 1/2 the weights have a variance; above 0.7 weighted means are unreliable; from 1 on there is no mean. NaN if there are
    fewer than `FEWEST` weights in the `tail`, or if they are equal. As published, the fit is regularised towards 1/2 with the
    weight of ten observations (Vehtari et al. 1507.02646, appendix C).
    """
    log_w = log_w.detach().double().cpu()
    n, m = len(log_w), tail(log_w.shape[1])
    if m < FEWEST:
        return log_w.new_full((n,), torch.nan)
    largest = (log_w - log_w.amax(1, keepdim=True)).exp().topk(m + 1, 1).values.flip(1)
    over = largest[:, 1:] - largest[:, :1]
    out = (over > 0).sum(1)
    k, _ = generalised_pareto(over)
    k = torch.where((out > 0) & (out < FEWEST), MOST, (m * k + 10 * 0.5) / (m + 10))
    return k.clamp_max(MOST)


def generalised_pareto(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale sigma, (n,) each, of the generalised Pareto law of each row (n, m) of non-negative values.

    The density is (1 + k x / sigma)^(-1/k - 1) / sigma. The estimate is the mean of a posterior over theta = -k / sigma on a
    grid (Zhang & Stephens 2009, Technometrics 51, 316-325). NaN for rows of zeros.
    """
    x = x.sort(1).values
    m = x.shape[1]
    top, positive = x[:, -1:], x.masked_fill(x <= 0, torch.inf).amin(1, keepdim=True)
    quarter = torch.maximum(x[:, int(m / 4 + 0.5) - 1].unsqueeze(1), positive)  # of the values, as published; ties are zeros
    points = 30 + int(m**0.5)
    j = torch.arange(1, points + 1, dtype=x.dtype)
    theta = 1 / top + (1 - (points / (j - 0.5)).sqrt()) / (3 * quarter)  # (n, points)
    shape = (-theta.unsqueeze(2) * x.unsqueeze(1)).log1p().mean(2)
    likelihood = m * ((-theta / shape).log() - shape - 1)
    theta = (likelihood.softmax(1) * theta).sum(1)
    k = (-theta.unsqueeze(1) * x).log1p().mean(1)
    return k, -k / theta


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of n outputs.

    Attributes:
        log_weights: (n, k) at the end.
        lowest: (n,) lowest ESS over the run, as a share of the particles.
        alone: (n,) whether all particles were copies of one, or one has all the weight at the end.
        heavy: (n,) Pareto k-hat of the weights at the end; NaN if it is undefined.
        guided: (n,) whether a gradient moved the particles; then even weights are no sign of a small strength.
        weighs: (n,) whether the run weights its particles; a search does not.
    """

    log_weights: Tensor
    lowest: Tensor
    alone: Tensor
    heavy: Tensor
    guided: Tensor
    weighs: Tensor

    @classmethod
    def of(cls, run: Outcome) -> Diagnosis:
        """The diagnosis of a run."""
        log_w, trace = run.log_weights, run.trace
        share = effective_sample_size(log_w)
        lowest = torch.cat([trace.ess.to(share).nan_to_num(1.0), share.unsqueeze(0)]).amin(0)
        there = trace.ancestors >= 0
        copies = ((trace.ancestors == trace.ancestors[:, :, :1]) | ~there).all(2) & (there.sum(2) > 1)
        alone = (copies.any(0) | (log_w.exp().amax(1) > ALL)) & (log_w.shape[1] > 1)
        guided = trace.guidance_ratio.nan_to_num().ne(0).any(2).any(0)
        weighs = (log_w != log_w[:, :1]).any(1) if run.log_z is None else torch.ones_like(alone)
        return cls(log_w, lowest, alone, pareto_k(log_w).to(share), guided, weighs & (log_w.shape[1] > 1))

    @classmethod
    def cat(cls, parts: Sequence[Diagnosis]) -> Diagnosis:
        """Join diagnoses of different outputs, on the CPU."""
        return cls(**{each.name: torch.cat([getattr(part, each.name).cpu() for part in parts]) for each in fields(cls)})

    @property
    def too_large(self) -> bool:
        """Whether one particle stands for all in more than half of the outputs: the strength is too large."""
        return int((self.alone & self.weighs).sum()) > len(self.alone) / 2

    @property
    def too_small(self) -> bool:
        """Whether the strength is too small to matter: weights stayed even, and no gradient moved anything."""
        return bool(self.weighs.any() and ((self.lowest >= EVEN) & ~self.guided).all())

    def in_words(self) -> dict[str, str]:
        """One line each, by name: the ESS, the effect of the strength, how reliable weights are; of a search only the ESS."""
        words, n = ess_in_words(self.log_weights), len(self.log_weights)
        if not self.weighs.any():
            return words
        alone, finite = int((self.alone & self.weighs).sum()), self.heavy.isfinite() & self.weighs
        if self.too_large:
            effect = "too large: one particle, or its copies, has all the weight"
            words["the strength"] = f"{effect}{_of(alone, n)}; lower it, or use more particles or steps"
        elif self.too_small:
            effect = f"too small to matter: the ESS never fell below {self.lowest.min():.1%}"
            words["the strength"] = f"{effect}; raise it, or use strength=auto"
        else:
            words["the strength"] = "has an effect, and no particle has all the weight" + (
                f", except{_of(alone, n)}" if alone else ""
            )
        if finite.any():
            heavy = self.heavy[finite]  # with few particles the value of one output is noise: the mean decides
            high = f"above {HEAVY}{_of(int((heavy > HEAVY).sum()), len(heavy))}"
            doubt = f": {high}; do not trust the weighted particles as a sample"
            fine = f": below {HEAVY}, the weights can be trusted" + (f" ({high})" if (heavy > HEAVY).any() else "")
            mean = heavy.mean()
            words["Pareto k-hat"] = f"{mean:.2f}, mean over outputs" + (doubt if mean > HEAVY else fine)
        return words


def _of(some: int, n: int) -> str:
    return "" if some == n else f" in {some} of {n} outputs"
