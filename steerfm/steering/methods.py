"""Presets: published methods as settings of the four parts. Each docstring gives the paper, the parts and what it samples.

Every field of `Steering` may be changed: ``FeynmanKac(particles=64, guidance="map")`` is the gradient-twisted variant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steerfm.sampling import Jump as JumpTransition
from steerfm.sampling import Transition
from steerfm.steering.corrections import Correction, Uncorrected
from steerfm.steering.engine import Steering
from steerfm.steering.lookahead import Denoise, Lookahead
from steerfm.steering.value import EndpointAscent, Guidance, MapGradient, Tempering, untempered
from steerfm.steering.weights import Selection


@dataclass(frozen=True)
class BestOfN(Steering):
    """Independent samples, and the best of them: ``result.best()``.

    Parts: no look-ahead, transition jump, correction twisted (here: one importance weight exp(strength r(x_1)) at the end).
    Samples: ``best()`` no, it is a search; the weighted particles yes, by importance sampling, as the particles grow.
    """

    steps: int = 4
    lookahead: Lookahead | str | None = None
    transition: Transition | str = field(default_factory=JumpTransition)
    resampling: Selection | str | None = None


@dataclass(frozen=True)
class FeynmanKac(Steering):
    """Sequential Monte Carlo along the path (FK steering 2501.06848; twisted weights: TDS 2306.17775, equation 8).

    Parts: look-ahead jump, tempering linear, transition renoise, correction twisted, systematic resampling below ESS 1/2;
    gradient-free, or twisted by a gradient with ``guidance="map"`` or ``"endpoint"``.
    Samples: yes, the tilt of the base chain's own law, for any look-ahead, as the particles grow; exp(log_z) is unbiased.
    """


@dataclass(frozen=True)
class Ascent(Steering):
    """What the ascents below share: one particle, the full reward from the start, deterministic jumps, no correction.

    Samples: no.
    """

    particles: int = 1
    tempering: Tempering | str | float = untempered
    transition: Transition | str = field(default_factory=JumpTransition)
    correction: Correction | str = field(default_factory=Uncorrected)
    resampling: Selection | str | None = None


@dataclass(frozen=True)
class DPS(Ascent):
    """Diffusion posterior sampling (Chung et al. 2209.14687, algorithm 1): gradient of the reward at the denoiser.

    Parts: look-ahead denoise, gradient through the network, no tempering, transition jump, correction none.
    Samples: no. The denoiser stands in for the posterior, and nothing corrects it.
    """

    steps: int = 16
    lookahead: Lookahead | str | None = field(default_factory=Denoise)
    guidance: Guidance | str | None = field(default_factory=MapGradient)


@dataclass(frozen=True)
class FMRGJ(Ascent):
    """Flow map reward guidance through the map's Jacobian, FMRG-J (2604.27147).

    Parts: look-ahead jump, gradient through the map, rescaled to the step's displacement (the reward's scale and
    ``strength`` drop out), no tempering, transition jump, correction none.
    Samples: no. It is optimal control of one trajectory: an ascent.
    """

    steps: int = 8
    guidance: Guidance | str | None = field(default_factory=lambda: MapGradient(scale=0.25, normalised=True))


@dataclass(frozen=True)
class FMRGE(Ascent):
    """Flow map reward guidance at the endpoint, FMRG-E (2604.27147): no network backward.

    Parts: look-ahead jump, a few reward-gradient steps on the endpoint, x' = X_{s,t}(x) + (1 - s) t (z_opt - z), no
    tempering, transition jump, correction none.
    Samples: no. It is an ascent; good for measurements (inverse problems).
    """

    steps: int = 8
    guidance: Guidance | str | None = field(default_factory=EndpointAscent)


METHODS: dict[str, type[Steering]] = {
    "best_of_n": BestOfN,
    "feynman_kac": FeynmanKac,
    "dps": DPS,
    "fmrg_j": FMRGJ,
    "fmrg_e": FMRGE,
    "steering": Steering,
}
"""Presets by the name that configurations use; ``steering`` is a free mix of the parts."""
