"""The public names of steerfm, each with the module that it comes from: for type checkers, and for `__init__.py` itself."""

# ruff: noqa: I001
# fmt: off
from . import (
    blocks as blocks, capabilities as capabilities, checkpoints as checkpoints, checks as checks, cli as cli,
    closed_form as closed_form, cost as cost, distributed as distributed, encoders as encoders, files as files,
    finetuning as finetuning, flowmap as flowmap, glass as glass, held_out as held_out, interpolant as interpolant,
    metrics as metrics, models as models, networks as networks, plugins as plugins, processes as processes,
    randomness as randomness, registry as registry,
    report as report, rewards as rewards, rows as rows, sampling as sampling, scores as scores, shipped as shipped,
    signals as signals, spread as spread, steering as steering, testing as testing, training as training,
    transitions as transitions, trust as trust, values as values, zoo as zoo,
)
from steerfm.closed_form import GaussianMixture as GaussianMixture
from steerfm.cost import Cost as Cost, Ledger as Ledger
from steerfm.flowmap import FlowMap as FlowMap, Guided as Guided, NeuralFlowMap as NeuralFlowMap
from steerfm.models.network import VelocityModel as VelocityModel
from steerfm.interpolant import Interpolant as Interpolant, Trigonometric as Trigonometric
from steerfm.rewards import Reward as Reward, RewardError as RewardError, reward as reward
from steerfm.sampling import sample as sample
from steerfm.transitions import Diffuse as Diffuse, Renoise as Renoise
from steerfm.steering import (
    DAS as DAS, DPS as DPS, FMRGE as FMRGE, FMRGJ as FMRGJ, FMTT as FMTT, LGDMC as LGDMC, MFMG as MFMG, MFMGF as MFMGF,
    MPGD as MPGD, SVDD as SVDD, TDS as TDS, Beam as Beam, BestOfN as BestOfN, BudgetForcing as BudgetForcing, CoDe as CoDe,
    Denoise as Denoise, DFlow as DFlow, DiamondSMC as DiamondSMC, Drafts as Drafts, EndpointAscent as EndpointAscent,
    EndpointGradient as EndpointGradient, FeynmanKac as FeynmanKac, FKSteering as FKSteering, FMTTSearch as FMTTSearch,
    FreeDoM as FreeDoM, Funnel as Funnel, Jump as Jump, MapGradient as MapGradient, MultiRound as MultiRound,
    NoiseGradient as NoiseGradient, NoiseTilt as NoiseTilt, ParallelTempering as ParallelTempering,
    RandomSearch as RandomSearch, ReNO as ReNO, SeedPruning as SeedPruning,
    State as State, Steering as Steering, SteeringResult as SteeringResult,
    TreeSearch as TreeSearch, Waltz as Waltz, WeightedDiamond as WeightedDiamond,
    ZeroOrderSearch as ZeroOrderSearch, method as method, methods as methods, steer as steer, steps as steps,
)
from steerfm.zoo import load as load

__all__: list[str]
__version__: str
