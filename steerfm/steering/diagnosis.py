"""What the strength did to the particles of a run: too little to matter, too much, or weights that cannot be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from steerfm.steering.outcome import Outcome
from steerfm.steering.weights import effective_sample_size, ess_in_words

EVEN, ALL = 0.99, 0.99
"""ESS from which particles are worth the same, and share of the weight with which one particle is all."""
HEAVY = 0.7
"""Pareto k-hat from which means by the weights are not to be trusted (Vehtari et al. 1507.02646, section 3.2)."""
FEWEST, MOST = 5, 10.0
"""Weights in the tail that a fit needs, and the largest k-hat that is told: where fewer of them stand out, it is that."""


def tail(k: int) -> int:
    """How many of k weights are their tail: a fifth, and at most 3 sqrt(k) (Vehtari et al. 1507.02646, section 3.3)."""
    return int(min(0.2 * k, 3 * k**0.5))


def pareto_k(log_w: Tensor) -> Tensor:
    """Pareto k-hat of log-weights (n, k), (n,): the shape of the generalised Pareto law that their largest ones follow.

    Below 1/2 weights have a variance; above 0.7 means by them are not to be trusted; from 1 on they have no mean. NaN where it
    cannot be told: fewer than `FEWEST` weights in the `tail`, or equal ones there. As published the fit is drawn a little to
    1/2, as if ten more weights had said so (Vehtari et al. 1507.02646, appendix C).
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
    """Shape k and scale sigma, (n,) each, of the generalised Pareto law of each row (n, m) of values of at least 0.

    The density is (1 + k x / sigma)^(-1/k - 1) / sigma. The estimate is the mean of a posterior over theta = -k / sigma on a
    grid (Zhang & Stephens 2009, Technometrics 51, 316-325). NaN for rows of zeros.
    """
    x = x.sort(1).values
    m = x.shape[1]
    top, positive = x[:, -1:], x.masked_fill(x <= 0, torch.inf).amin(1, keepdim=True)
    quarter = torch.maximum(x[:, int(m / 4 + 0.5) - 1].unsqueeze(1), positive)  # of the values, as published; ties give zeros
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
    """What is known of n outputs.

    Attributes:
        log_weights: (n, k) at the end.
        lowest: (n,) lowest ESS over the run, as a share of the particles.
        alone: (n,) whether all particles were copies of one, or one has all the weight at the end.
        heavy: (n,) Pareto k-hat of the weights at the end; NaN where it cannot be told.
        guided: (n,) whether a gradient moved the particles: then even weights are no sign of a small strength.
        weighs: (n,) whether the run weighs its particles; a search does not.
    """

    log_weights: Tensor
    lowest: Tensor
    alone: Tensor
    heavy: Tensor
    guided: Tensor
    weighs: Tensor

    @classmethod
    def of(cls, run: Outcome) -> Diagnosis:
        """That of the outputs of a run."""
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
        """That of further outputs as one, on the CPU."""
        return cls(**{each.name: torch.cat([getattr(part, each.name).cpu() for part in parts]) for each in fields(cls)})

    def in_words(self) -> dict[str, str]:
        """A line each, by name: the ESS, what the strength did, what k-hat says of the weights; of a search the ESS alone."""
        words, n = ess_in_words(self.log_weights), len(self.log_weights)
        if not self.weighs.any():
            return words
        alone, known = int((self.alone & self.weighs).sum()), self.heavy.isfinite() & self.weighs
        if alone > n / 2:
            did = "too large: one particle, or copies of one, stands for all"
            words["the strength"] = f"{did}{_of(alone, n)}; lower it, or take more particles or steps"
        elif bool(((self.lowest >= EVEN) & ~self.guided).all()):
            did = f"too small to matter: the ESS never fell below {self.lowest.min():.1%}"
            words["the strength"] = f"{did}; raise it, strength=auto chooses one"
        else:
            words["the strength"] = "matters, and no particle stands for all" + (f", but{_of(alone, n)}" if alone else "")
        if known.any():
            heavy = self.heavy[known]  # of few particles one output's is noise: the mean decides
            high = f"above {HEAVY}{_of(int((heavy > HEAVY).sum()), len(heavy))}"
            doubt = f": {high}; the weighted particles are not to be trusted as a sample"
            fine = f": below {HEAVY}, the weights can be relied on" + (f" ({high})" if (heavy > HEAVY).any() else "")
            mean = heavy.mean()
            words["Pareto k-hat"] = f"{mean:.2f}, mean over outputs" + (doubt if mean > HEAVY else fine)
        return words


def _of(some: int, n: int) -> str:
    return "" if some == n else f" in {some} of {n} outputs"
