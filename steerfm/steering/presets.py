"""Presets: published methods as settings of the four parts. Each docstring gives the paper, the parts and the target.

The fields of a preset are its own and those of `Sampler`; the other parts are derived in ``parts``:
``FeynmanKac(particles=64, guidance="map")`` is the gradient-twisted variant.
Methods that do not walk from noise to data once are in other files: `noise_search.py`, `parallel_tempering.py`,
`waltz.py` and `tree_search.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from steerfm.held_out import has_weights
from steerfm.rewards import Reward
from steerfm.sampling import Noise
from steerfm.steering.correction import Correction, Jarzynski, Marginal, Move, Parts, Twisted, Uncorrected
from steerfm.steering.guidance import EndpointAscent, EndpointGradient, FreeGradient, Guidance, MapGradient, NoiseGradient
from steerfm.steering.lookahead import Denoise, Lookahead, Posterior, Renoise, Smooth
from steerfm.steering.noise_search import DFlow, RandomSearch, ReNO, ZeroOrderSearch
from steerfm.steering.outcome import Preset
from steerfm.steering.parallel_tempering import ParallelTempering
from steerfm.steering.pruning import Drafts, SeedPruning
from steerfm.steering.sampler import Sampler, Steering
from steerfm.steering.selection import BestChild, Narrow, Resample, Selection, TopK, Window
from steerfm.steering.size import Evaluations
from steerfm.steering.state import Begin, State
from steerfm.steering.tempering import Exponential, Tempering, untempered
from steerfm.steering.tree_search import BudgetForcing, TreeSearch
from steerfm.steering.value import Evaluation, Problem
from steerfm.steering.waltz import Waltz
from steerfm.transitions import Auto, Bridge, Diffuse, Transition
from steerfm.transitions import Jump as JumpTransition
from steerfm.transitions import Renoise as RenoiseTransition

LARGE = 64
"""Numbers in a state above which no budget covers the map's distribution. Beyond that, a walk along the gradient of a reward
that is no network, which can be followed far, is worth more than particles."""
ANOTHER = 1 / 3
"""`steerfm.metrics.jump_error` above which one jump does not show the final picture."""


# --- samplers --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BestOfN(Steering):
    """Independent samples, and the best of them: ``result.best()``.

    Parts: no look-ahead, transition jump, correction twisted (here: one importance weight exp(strength r(x_1)) at the end).
    Samples: yes, the weighted particles, by importance sampling, as they grow in number; ``best()`` is a search.
    Within a budget: 1 step at 8 evaluations, 2 at 64, 4 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "yes"
    paper: ClassVar[str] = ""
    shape: ClassVar[Mapping[int, float]] = {8: 1, 64: 2, 256: 4}

    steps: int = 4
    lookahead: Lookahead | None = None
    transition: Transition = field(default_factory=JumpTransition)
    resampling: Selection | None = None


@dataclass(frozen=True)
class FeynmanKac(Steering):
    """Sequential Monte Carlo along the path of a flow map (FK steering 2501.06848 with the twisted weights of 2306.17775).

    Parts: look-ahead jump, tempering linear, transition renoise, correction marginal (twisted if the kernels of all parents
    are not available), systematic resampling below ESS 1/2; gradient-free, or twisted by a gradient with ``guidance="map"`` or
    ``"endpoint"``.
    Samples: yes, the tilt of the base chain's own law, for any look-ahead, as the particles grow; exp(log_z) is unbiased. With
    ``correction="twisted"`` and steps that forget the past, it is unbiased only through rare large values, and nearly all are
    too low. Without tempering log_z comes from the first look, as in `Funnel`.
    Within a budget: 3 steps at 64 evaluations, 6 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "yes"
    paper: ClassVar[str] = "2501.06848"
    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 6}

    correction: Correction = field(default_factory=Marginal)


@dataclass(frozen=True)
class Funnel(Steering):
    """Look ahead with many particles, walk with few; the default method (the funnel schedule of 2508.12361, for flow maps).

    One jump shows the final picture of a noise, so a single call can tell good noise from bad. ``first`` particles make that
    jump; ``particles`` of them, drawn by their weights, take the steps.

    Parts: as `FeynmanKac`, with no tempering; the selection is `Narrow` before the first step, ``resampling`` later; the
    gradient at the endpoint, if the reward has one (no network backward), scaled with the dimension, at most half a step.
    ``transition="auto"`` is renoise; but jump, without guidance, if one jump of the map shows another picture than four
    (`steerfm.metrics.jump_error` above 1/3 on its card) and the reward is a network (docs/emoji.md).
    Costs: first + particles (steps - 1) network evaluations per output, since the transition shares the look-ahead. A walk by
    jumps cannot share it, so ``particles`` fewer look ahead.
    Samples: yes, with a bias of order 1 / particles, the tilt of the base chain's own law as the particles grow. In many
    dimensions a step forgets part of the first look, and few particles carry the weight: their mean reward is too high if the
    target is rare under the map (docs/results/benchmarks.md). `FeynmanKac` is closer there.
    log_z comes from the first look, a jump from noise: exp(log_z) is unbiased for the map in one jump, for any steps.
    Within a budget: 4 steps at 8 evaluations, 5 from 32 on, one particle per eight. Below 32, if the reward has no gradient,
    all particles look and none walks. From 32 on, if the reward has a gradient but no network and a state has more than 64
    numbers: 9 steps, 17 from 256 on, with fewer particles (docs/methods.md).

    Args:
        calls: budget of map calls, set by `within`; the shape then adapts to the kind of reward. 0: the shape is fixed.
    """

    samples: ClassVar[str] = "yes, with a bias of order 1 / particles"
    paper: ClassVar[str] = "2508.12361"

    steps: int = 5
    first: int = 64
    calls: int = field(default=0, kw_only=True)
    guidance: Guidance | None = field(default_factory=lambda: EndpointGradient(cap=0.5, required=False, dimension=12))
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=Auto)
    correction: Correction = field(default_factory=Marginal)

    def __post_init__(self) -> None:
        if self.first < self.particles:
            raise ValueError(f"first={self.first}: must be at least particles={self.particles}")
        super().__post_init__()

    @cached_property
    def parts(self) -> Parts:
        then = Resample(threshold=0.0) if self.resampling is None else self.resampling
        return self.mix(self.correction, Narrow(self.particles, then))

    def fit(self, budget: int, evaluations: Evaluations, steps: int | None) -> Funnel:
        """See `Sized`. One particle per eight calls, with four steps after the first look (three below 32 calls); below eight
        calls best-of-n by single jumps."""
        call = evaluations(replace(self, particles=1, first=1, steps=1))
        calls = int(budget / call)
        if not calls:
            raise ValueError(f"budget={budget}: one call of this network costs {call:g}")
        walk = steps - 1 if steps is not None else 0 if calls < 8 else 3 if calls < 32 else 4
        walk = min(walk, calls - 1)
        particles = max(1, calls // (2 * max(walk, 4))) if walk else calls
        return replace(
            self, particles=particles, steps=1 + walk, first=calls - particles * walk, calls=calls if steps is None else 0
        )

    def fitted(self, problem: Problem) -> Sampler:
        """As for other methods; ``transition="auto"`` can switch to jumps (see above)."""
        error, auto = problem.flow_map.jump_error, isinstance(self.transition, Auto)
        if auto and self.steps > 1 and error is not None and error > ANOTHER and has_weights(problem.reward):
            k, spare = self.particles, self.first >= 2 * self.particles  # keep the number of calls: jumps share no look
            first, steps = max(k, self.first - k), self.steps if spare else max(1, self.steps - 1)
            return replace(self, first=first, steps=steps, transition=JumpTransition(), guidance=None)
        method, calls = super().fitted(problem), self.calls
        if calls != self.first + self.particles * (self.steps - 1):  # the shape was changed since
            return method
        if 0 < calls < 32 and self.guidance is not None and method.guidance is None:
            return replace(self, guidance=None, particles=calls, first=calls, steps=1)
        large = math.prod(problem.flow_map.shape) > LARGE
        if calls >= 32 and large and method.guidance is not None and not has_weights(problem.reward):
            walk = 8 if calls < 256 else 16
            k = calls // (2 * walk)
            return replace(method, particles=k, first=calls - k * walk, steps=1 + walk)
        return method

    def _look(
        self, problem: Problem, noise: Noise, x: Tensor, times: Sequence[float], i: int, move: Move | None, log_w: Tensor,
        plain: bool = False,
    ) -> Evaluation:  # fmt: skip
        """As for other methods, but without a look between jumps, where it would select no particle."""
        pruning = self.resampling is not None and self.resampling.prunes
        if move is None or self.transition.stochastic or self.guidance is not None or pruning:
            return super()._look(problem, noise, x, times, i, move, log_w, plain)
        return replace(move.before, endpoint=None, scores=None)

    def start(self, problem: Problem, noise: Noise, begin: Begin | None = None) -> State:
        return super().start(*problem.resize(noise, self.first), begin)


@dataclass(frozen=True)
class FKSteering(Sampler):
    """FK steering as published (Singhal et al. 2501.06848, algorithm 1), gradient-free, with a denoiser.

    Parts: look-ahead denoise, no tempering, transition bridge (ancestral), correction twisted with ``potential`` difference,
    max or sum, multinomial resampling below ESS 1/2.
    Samples: yes, as `FeynmanKac`; here the base chain is the ancestral one, right only in the limit of many steps. The full
    reward at a blurry denoiser misleads: for a concentrated target, the weights' estimate of Z is unbiased only through rare
    outputs, and nearly all are too low (docs/results/benchmarks.md). So there is no log_z.
    Within a budget: 6 steps at 64 evaluations, 14 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "yes"
    paper: ClassVar[str] = "2501.06848"
    shape: ClassVar[Mapping[int, float]] = {64: 6, 256: 14}

    particles: int = 4
    steps: int = 16
    potential: str = "difference"
    lookahead: Lookahead | None = field(default_factory=Denoise)
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=Bridge)
    resampling: Selection | None = field(default_factory=lambda: Resample("multinomial"))
    threshold: float | None = None

    @cached_property
    def parts(self) -> Parts:
        return self.mix(Twisted(self.potential), self.resampling)


@dataclass(frozen=True)
class TDS(Steering):
    """Twisted diffusion sampling (Wu et al. 2306.17775, algorithm 1).

    Parts: look-ahead denoise, gradient through the network, no tempering, transition bridge (ancestral), correction twisted,
    systematic resampling at every step.
    Samples: yes, as `FeynmanKac`; the base chain is the ancestral one. No log_z, as in `FKSteering`.
    Within a budget: 3 steps at 64 evaluations, 8 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "yes"
    paper: ClassVar[str] = "2306.17775"
    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 8}

    steps: int = 16
    lookahead: Lookahead | None = field(default_factory=Denoise)
    guidance: Guidance | None = field(default_factory=MapGradient)
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=Bridge)
    resampling: Selection | None = field(default_factory=lambda: Resample(threshold=1.0))


@dataclass(frozen=True)
class DAS(Steering):
    """Diffusion alignment as sampling (Kim et al. 2501.05803, algorithm 1): TDS with tempering and SSP resampling.

    Parts: look-ahead denoise, gradient through the network, tempering exponential (``tempering="adaptive"``: the paper's other
    choice), transition bridge (ancestral), correction twisted, SSP resampling below ESS 1/2.
    Samples: yes, as `FeynmanKac`; the base chain is the ancestral one. With adaptive tempering log Z is consistent but
    not unbiased: it is too low with few particles.
    Within a budget: 4 steps at 64 evaluations, 8 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "yes"
    paper: ClassVar[str] = "2501.05803"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 8}

    particles: int = 4
    steps: int = 16
    lookahead: Lookahead | None = field(default_factory=Denoise)
    guidance: Guidance | None = field(default_factory=MapGradient)
    tempering: Tempering = field(default_factory=Exponential)
    transition: Transition = field(default_factory=Bridge)
    resampling: Selection | None = field(default_factory=lambda: Resample("ssp"))


@dataclass(frozen=True)
class FMTT(Steering):
    """Flow map trajectory tilting, the sampler (Sabour et al. 2511.22688, algorithm 1 in sampling mode).

    Parts: look-ahead jump, FMTT's drift (the gradient through the map at scale 1/2, uncapped), tempering linear, transition
    diffuse, correction jarzynski (simple), multinomial resampling below ESS 1/2.
    Samples: in the limit of many steps only, for a true flow map: an error of order 1 / steps that more particles do not
    remove. No log_z: it would be a third too low on nine separate modes in 32 steps, and arbitrarily wrong where the drift,
    which has no cap, diverges.
    Within a budget: 3 steps at 64 evaluations, 6 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "in the limit of many steps only"
    paper: ClassVar[str] = "2511.22688"
    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 6}

    steps: int = 32
    guidance: Guidance | None = field(default_factory=lambda: MapGradient(scale=0.5, cap=None))
    transition: Transition = field(default_factory=Diffuse)
    correction: Correction = field(default_factory=Jarzynski)
    resampling: Selection | None = field(default_factory=lambda: Resample("multinomial"))

    def _log_z(self, first: Tensor, chain: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class DiamondSMC(Steering):
    """Particles on posterior samples (Diamond Maps 2602.05993, algorithm 2), with GLASS transitions.

    Parts: look-ahead posterior (GLASS inner ODE), no tempering, transition bridge through the sampled endpoint, correction
    twisted, systematic resampling at every step.
    Samples: yes, the tilt, as particles and inner steps grow, for any number of outer steps. No log_z: with few
    particles, the weights' estimate is too low in nearly all outputs.
    Within a budget: 2 steps at 64 evaluations, 4 at 256, the rest particles (docs/methods.md).
    """

    samples: ClassVar[str] = "yes"
    paper: ClassVar[str] = "2602.05993"
    shape: ClassVar[Mapping[int, float]] = {64: 2, 256: 4}

    particles: int = 8
    lookahead: Lookahead | None = field(default_factory=Posterior)
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=lambda: Bridge(endpoint="posterior"))
    resampling: Selection | None = field(default_factory=lambda: Resample(threshold=1.0))


# --- guidance: one trajectory ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ascent(Sampler):
    """Base of the methods below: one particle, the full reward from the start, deterministic jumps, no correction.

    Samples: no.
    """

    particles: int = 1
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=JumpTransition)


@dataclass(frozen=True)
class DPS(Ascent):
    """Diffusion posterior sampling (Chung et al. 2209.14687, algorithm 1): gradient of the reward at the denoiser.

    Parts: look-ahead denoise, gradient through the network, no tempering, transition bridge (ancestral, with the same
    denoiser: one call per step), correction none.
    Samples: no. The denoiser replaces the posterior, without a correction.
    Within a budget: 3 steps at 64 evaluations, 16 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2209.14687"
    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 16}

    steps: int = 16
    lookahead: Lookahead | None = field(default_factory=Denoise)
    guidance: Guidance | None = field(default_factory=MapGradient)
    transition: Transition = field(default_factory=Bridge)


@dataclass(frozen=True)
class NoiseTilt(Ascent):
    """The whitened gradient as a part of a step's noise; its mean stays (Hwang et al. 2606.18066).

    Parts: look-ahead jump, gradient at its endpoint as a share of the noise (independent of ``strength`` and the reward's
    scale), no tempering, transition renoise (which shares the look-ahead), correction none. The last step has no noise and is
    not guided. In the paper the gradient goes through the network, ``guidance={"through": True}``, of a denoiser, with
    ancestral steps: ``lookahead="denoise", transition="bridge"``; its whitening has more parts than `white`. Samples: no. It
    is an ascent within the noise on which the map was trained. Within a budget: 6 steps at 64 evaluations, 8 at 256, the rest
    particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2606.18066"
    shape: ClassVar[Mapping[int, float]] = {64: 6, 256: 8}

    steps: int = 8
    guidance: Guidance | None = field(default_factory=NoiseGradient)
    transition: Transition = field(default_factory=RenoiseTransition)


@dataclass(frozen=True)
class LGDMC(Ascent):
    """Loss-guided diffusion by Monte Carlo (Song et al., ICML 2023, equation 11): the denoiser blurred by noise.

    Parts: look-ahead smooth (k endpoints of one call), gradient through the network, rescaled to half of the step's
    displacement (independent of ``strength`` and the reward's scale), no tempering, transition bridge (ancestral), correction
    none.
    Samples: no. A Gaussian replaces the posterior.
    Within a budget: 5 steps at 64 evaluations, 8 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "Song et al., ICML 2023"
    shape: ClassVar[Mapping[int, float]] = {64: 5, 256: 8}

    steps: int = 16
    lookahead: Lookahead | None = field(default_factory=Smooth)
    guidance: Guidance | None = field(default_factory=lambda: MapGradient(scale=0.5, normalised=True))
    transition: Transition = field(default_factory=Bridge)


@dataclass(frozen=True)
class FreeDoM(Ascent):
    """DPS with time travel (Yu et al. 2303.09833, algorithm 2): every step is repeated ``recurrence`` times.

    Parts: as `DPS`, the gradient rescaled to half of the step's displacement, as in the release (independent of ``strength``
        and
    the reward's scale); between repeats the state is noised back.
    Samples: no. It is an ascent; the repeats pull the state back to the data.
    Within a budget: 5 steps at 64 evaluations, 8 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2303.09833"
    shape: ClassVar[Mapping[int, float]] = {64: 5, 256: 8}

    steps: int = 8
    recurrence: int = 2
    lookahead: Lookahead | None = field(default_factory=Denoise)
    guidance: Guidance | None = field(default_factory=lambda: MapGradient(scale=0.5, normalised=True))
    transition: Transition = field(default_factory=Bridge)


@dataclass(frozen=True)
class MPGD(Ascent):
    """Manifold-preserving guidance (He et al. 2311.16424, algorithm 1): the gradient at the denoised picture only.

    Parts: look-ahead denoise, gradient at the endpoint (no network backward), no tempering, transition bridge without noise
    (DDIM), correction none.
    Samples: no.
    Within a budget: 8 steps at 64 evaluations, 12 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2311.16424"
    shape: ClassVar[Mapping[int, float]] = {64: 8, 256: 12}

    steps: int = 16
    lookahead: Lookahead | None = field(default_factory=Denoise)
    guidance: Guidance | None = field(default_factory=EndpointGradient)
    transition: Transition = field(default_factory=lambda: Bridge(eta=0.0))


@dataclass(frozen=True)
class WarmedAscent(Ascent):
    """An ascent that starts with several particles; after ``warmup`` steps only the best by look-ahead continues.

    The steps of the warm-up are guided. The look that selects needs no gradient; later gradients are for one particle only.
    Samples: no.
    Within a budget: 5 steps, the rest particles in one step of warm-up (docs/methods.md).
    """

    shape: ClassVar[Mapping[int, float]] = {64: 5, 256: 5}

    steps: int = 8
    warmup: int = 0

    def check(self, reward: Reward) -> None:
        if self.warmup and self.particles == 1:
            raise ValueError(f"warmup={self.warmup} does nothing with one particle: give particles=2 or more")
        super().check(reward)

    @cached_property
    def parts(self) -> Parts:
        return self.mix(Uncorrected(), Window(TopK(1, prune=True), self.warmup) if self.warmup else None)

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of particles, with at least one step of warm-up."""
        return replace(self, steps=steps, particles=number, warmup=self.warmup or 1)

    def least(self, steps: int) -> int:
        return 2


@dataclass(frozen=True)
class FMRGJ(WarmedAscent):
    """Flow map reward guidance through the map's Jacobian, FMRG-J (2604.27147).

    Parts: look-ahead jump, gradient through the map, rescaled to the step's displacement (independent of ``strength``
    and the reward's scale), no tempering, transition jump, correction none. With several particles, only the best by
    look-ahead continues after ``warmup`` steps; ``stop`` leaves the last steps unguided.
    Samples: no. It is optimal control of one trajectory: an ascent.
    Within a budget: 5 steps, the rest particles in one step of warm-up (docs/methods.md).
    """

    paper: ClassVar[str] = "2604.27147"

    guidance: Guidance | None = field(default_factory=lambda: MapGradient(scale=0.5, normalised=True))


@dataclass(frozen=True)
class FMRGE(WarmedAscent):
    """Flow map reward guidance at the endpoint, FMRG-E (2604.27147): no network backward.

    Parts: look-ahead jump, a few reward-gradient steps on the endpoint, x' = X_{s,t}(x) + (1 - s) t (z_opt - z), no
    tempering, transition jump (two calls per step; ``transition=renoise`` jumps to the data and back, one call), correction
    none. ``warmup`` and ``stop`` as in `FMRGJ`.
    Samples: no. It is an ascent; good for measurements (inverse problems).
    Within a budget: 5 steps, the rest particles in one step of warm-up (docs/methods.md).
    """

    paper: ClassVar[str] = "2604.27147"

    guidance: Guidance | None = field(default_factory=lambda: EndpointAscent(rate=0.3))


@dataclass(frozen=True)
class MFMG(Ascent):
    """Meta flow map guidance (Potaptchik et al. 2601.14430, algorithm 2): gradient of the value over posterior samples.

    Parts: look-ahead posterior with k = 4 (GLASS inner ODE in place of the trained map), gradient through it, no tempering,
    transition diffuse without noise (Euler), correction none.
    Samples: no for a finite k; the tilt as k, inner steps and steps grow.
    Within a budget: 4 steps at 64 evaluations, 8 at 256, the rest endpoints (docs/methods.md).
    """

    samples: ClassVar[str] = "no for a finite k"
    paper: ClassVar[str] = "2601.14430"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 8}

    steps: int = 16
    lookahead: Lookahead | None = field(default_factory=lambda: Posterior(steps=2, k=4))
    guidance: Guidance | None = field(default_factory=MapGradient)
    transition: Transition = field(default_factory=lambda: Diffuse(0.0))

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of endpoints, where the look-ahead has several."""
        looks = self.lookahead
        several = isinstance(looks, Posterior | Renoise)
        return replace(self, steps=steps, **{"lookahead": replace(looks, k=number)} if several else {"particles": number})


@dataclass(frozen=True)
class MFMGF(MFMG):
    """Gradient-free meta flow map guidance (Potaptchik et al. 2601.14430): for black-box rewards.

    Parts: as `MFMG`, with the tilted mean minus the mean of the endpoints in place of a gradient, k = 8.
    Samples: no for a finite k; the tilt as k, inner steps and steps grow.
    Within a budget: 3 steps at 64 evaluations, 8 at 256, the rest endpoints (docs/methods.md).
    """

    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 8}

    lookahead: Lookahead | None = field(default_factory=lambda: Posterior(steps=2, k=8))
    guidance: Guidance | None = field(default_factory=FreeGradient)


@dataclass(frozen=True)
class WeightedDiamond(Ascent):
    """Weighted Diamond guidance (2602.05993): renoised look-aheads, importance-weighted, no further training.

    Parts: look-ahead renoise, equally weighted (k = 1), gradient through it, rescaled to the step's displacement (independent
    of ``strength`` and the reward's scale), no tempering, transition jump, correction none.
    Samples: no. With ``lookahead={"name": "renoise", "k": 4}`` the endpoints have the paper's importance weights, which are
    exact as k grows. But log-weights are of order d: in pictures one endpoint has all the weight, and the gradient is that of
    the weights. The paper's release omits them as well.
    Within a budget: 3 steps at 64 evaluations, 4 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2602.05993"
    shape: ClassVar[Mapping[int, float]] = {64: 3, 256: 4}

    steps: int = 8
    lookahead: Lookahead | None = field(default_factory=lambda: Renoise(snr_factor=1.1, k=1, terms=()))
    guidance: Guidance | None = field(default_factory=lambda: MapGradient(normalised=True))


# --- search: particles compete ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MultiRound(Sampler):
    """Multi-round best-of-n: the best sample of a round is noised back and starts the next round (the baseline of FMTT).

    Parts: look-ahead jump, transition renoise (shared with the look-ahead: one call per step), correction none, the best
    ``keep`` by look-ahead survive each round.
    Samples: no. It is a search.
    Within a budget: 4 steps at 64 evaluations, 8 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2511.22688"
    shape: ClassVar[Mapping[int, float]] = {64: 4, 256: 8}

    keep: int = 1

    @cached_property
    def parts(self) -> Parts:
        return self.mix(Uncorrected(), TopK(self.keep))


@dataclass(frozen=True)
class Beam(MultiRound):
    """Beam search over the path: as `MultiRound`, with several survivors (cf. Fernandes et al. 2503.02039).

    Samples: no. It is a search, and it collapses modes.
    Within a budget: 2 steps at 64 evaluations, 7 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2503.02039"
    shape: ClassVar[Mapping[int, float]] = {64: 2, 256: 7}

    keep: int = 4


@dataclass(frozen=True)
class FMTTSearch(Sampler):
    """Flow map trajectory tilting, the search (Sabour et al. 2511.22688, algorithm 1 in search mode).

    Parts: look-ahead jump, FMTT's drift (capped), tempering linear, transition diffuse, correction none, the best ``keep``
    survive every ``every`` steps.
    Samples: no. It is a search, and it collapses modes.
    Within a budget: 2 steps at 64 evaluations, 4 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2511.22688"
    shape: ClassVar[Mapping[int, float]] = {64: 2, 256: 4}

    particles: int = 8
    steps: int = 16
    keep: int = 4
    every: int = 4
    guidance: Guidance | None = field(default_factory=lambda: MapGradient(scale=0.5))
    transition: Transition = field(default_factory=Diffuse)

    @cached_property
    def parts(self) -> Parts:
        return self.mix(Uncorrected(), Window(TopK(self.keep), self.every))


@dataclass(frozen=True)
class SVDD(Sampler):
    """Soft value-based decoding (Li et al. 2408.08252, algorithm 1): at every step the best of ``children`` survives.

    Parts: look-ahead denoise, transition bridge (ancestral), correction none, the best child of each parent; ``soft`` draws
    it with probability proportional to exp(strength r). ``particles`` counts children: 16 with 4 children are 4 parents.
    Samples: no. The soft version would, for exact values and infinitely many children.
    Within a budget: 8 steps at 64 evaluations, 12 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2408.08252"
    shape: ClassVar[Mapping[int, float]] = {64: 8, 256: 12}

    steps: int = 16
    children: int = 4
    soft: bool = False
    every: int = 1
    lookahead: Lookahead | None = field(default_factory=Denoise)
    tempering: Tempering = untempered
    transition: Transition = field(default_factory=Bridge)

    def __post_init__(self) -> None:
        if self.particles % self.children:
            raise ValueError(f"particles={self.particles} do not divide into groups of children={self.children}")
        super().__post_init__()

    @cached_property
    def parts(self) -> Parts:
        return self.mix(Uncorrected(), Window(BestChild(self.children, self.soft), self.every))


@dataclass(frozen=True)
class CoDe(SVDD):
    """Controlled denoising (Singh et al. 2502.00968): best of ``children`` over blocks of ``every`` steps.

    Parts: as `SVDD`. With one step per block it is SVDD; with one block for all steps, best-of-n.
    Samples: no. It is a search.
    Within a budget: 5 steps at 64 evaluations, 8 at 256, the rest particles (docs/methods.md).
    """

    paper: ClassVar[str] = "2502.00968"
    shape: ClassVar[Mapping[int, float]] = {64: 5, 256: 8}

    every: int = 4


METHODS: dict[str, type[Preset]] = {
    "best_of_n": BestOfN,
    "feynman_kac": FeynmanKac,
    "funnel": Funnel,
    "fk_steering": FKSteering,
    "tds": TDS,
    "das": DAS,
    "fmtt": FMTT,
    "diamond_smc": DiamondSMC,
    "dps": DPS,
    "noise_tilt": NoiseTilt,
    "lgd_mc": LGDMC,
    "freedom": FreeDoM,
    "mpgd": MPGD,
    "fmrg_j": FMRGJ,
    "fmrg_e": FMRGE,
    "mfm_g": MFMG,
    "mfm_gf": MFMGF,
    "weighted_diamond": WeightedDiamond,
    "multi_round": MultiRound,
    "beam": Beam,
    "fmtt_search": FMTTSearch,
    "svdd": SVDD,
    "code": CoDe,
    "seed_pruning": SeedPruning,
    "drafts": Drafts,
    "rbf": BudgetForcing,
    "tree_search": TreeSearch,
    "reno": ReNO,
    "d_flow": DFlow,
    "random_search": RandomSearch,
    "zero_order": ZeroOrderSearch,
    "parallel_tempering": ParallelTempering,
    "waltz": Waltz,
    "steering": Steering,
}
"""Presets by their names in configurations; ``steering`` is a free combination of parts."""
