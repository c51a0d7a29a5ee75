"""Steering: independent parts (look-ahead, guidance, transition, correction, selection), one sampler, many presets."""

from steerfm.steering.correction import Jarzynski, Marginal, Twisted, Uncorrected
from steerfm.steering.guidance import EndpointAscent, EndpointGradient, FreeGradient, MapGradient, NoiseGradient
from steerfm.steering.lookahead import Denoise, Endpoints, ExactPosterior, Jump, Posterior, Renoise, Rollout, Smooth, residual
from steerfm.steering.names import METHOD, method, methods
from steerfm.steering.noise_search import DFlow, RandomSearch, ReNO, ZeroOrderSearch
from steerfm.steering.outcome import Method, Outcome, Trace
from steerfm.steering.parallel_tempering import ParallelTempering
from steerfm.steering.presets import (
    DAS,
    DPS,
    FMRGE,
    FMRGJ,
    FMTT,
    LGDMC,
    METHODS,
    MFMG,
    MFMGF,
    MPGD,
    SVDD,
    TDS,
    Beam,
    BestOfN,
    CoDe,
    DiamondSMC,
    FeynmanKac,
    FKSteering,
    FMTTSearch,
    FreeDoM,
    Funnel,
    MultiRound,
    NoiseTilt,
    WeightedDiamond,
)
from steerfm.steering.pruning import Drafts, SeedPruning
from steerfm.steering.result import SteeringResult
from steerfm.steering.sampler import Sampler, Steering
from steerfm.steering.selection import BestChild, Candidates, Narrow, Prune, Resample, Selected, TopK, Window
from steerfm.steering.state import State
from steerfm.steering.steer import steer, steer_batches, steps
from steerfm.steering.tempering import Adaptive, Damping, Exponential, Power
from steerfm.steering.tree_search import BudgetForcing, TreeSearch
from steerfm.steering.waltz import Waltz

__all__ = [
    "DAS", "DPS", "FMRGE", "FMRGJ", "FMTT", "LGDMC", "METHOD", "METHODS", "MFMG", "MFMGF", "MPGD", "SVDD", "TDS", "Adaptive",
    "Beam", "BestChild", "BestOfN", "BudgetForcing", "Candidates", "CoDe", "DFlow", "Damping", "Denoise", "DiamondSMC",
    "Drafts", "EndpointAscent", "EndpointGradient", "Endpoints", "ExactPosterior", "Exponential", "FKSteering", "FMTTSearch",
    "FeynmanKac", "FreeDoM", "FreeGradient", "Funnel", "Jarzynski", "Jump", "MapGradient", "Marginal", "Method", "MultiRound",
    "Narrow", "NoiseGradient", "NoiseTilt", "Outcome", "ParallelTempering", "Posterior", "Power", "Prune", "RandomSearch",
    "ReNO", "Renoise", "Resample", "Rollout", "Sampler", "SeedPruning", "Selected", "Smooth", "State", "Steering",
    "SteeringResult", "TopK", "Trace", "TreeSearch", "Twisted", "Uncorrected", "Waltz", "WeightedDiamond", "Window",
    "ZeroOrderSearch", "method", "methods", "residual", "steer", "steer_batches", "steps",
]  # fmt: skip
