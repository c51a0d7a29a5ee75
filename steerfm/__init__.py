"""steerfm: reward-guided steering and fine-tuning of flow maps.

>>> import steerfm
>>> fm = steerfm.load("fashion")
>>> rw = steerfm.reward("classifier", target="Bag")
>>> res = steerfm.steer(fm, rw, steerfm.FeynmanKac(particles=16, steps=8), n=4, seeds=0, strength=5.0)
>>> res.best().shape
torch.Size([4, 1, 28, 28])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerfm.closed_form import GaussianMixture
    from steerfm.cost import Cost, Ledger
    from steerfm.flowmap import FlowMap, Guided, NeuralFlowMap
    from steerfm.interpolant import Interpolant, Trigonometric
    from steerfm.rewards import Reward, RewardError, reward
    from steerfm.sampling import Diffuse, Renoise, sample
    from steerfm.steering import (
        DPS,
        FMRGE,
        FMRGJ,
        BestOfN,
        Denoise,
        EndpointAscent,
        EndpointGradient,
        FeynmanKac,
        Funnel,
        Jump,
        MapGradient,
        Steering,
        SteeringResult,
        steer,
    )
    from steerfm.zoo import load

__version__ = "0.1.0"

__all__ = [
    "DPS",
    "FMRGE",
    "FMRGJ",
    "BestOfN",
    "Cost",
    "Denoise",
    "Diffuse",
    "EndpointAscent",
    "EndpointGradient",
    "FeynmanKac",
    "FlowMap",
    "Funnel",
    "GaussianMixture",
    "Guided",
    "Interpolant",
    "Jump",
    "Ledger",
    "MapGradient",
    "NeuralFlowMap",
    "Renoise",
    "Reward",
    "RewardError",
    "Steering",
    "SteeringResult",
    "Trigonometric",
    "load",
    "reward",
    "sample",
    "steer",
]  # fmt: skip

_WHERE = {
    "closed_form": ("GaussianMixture",),
    "cost": ("Cost", "Ledger"),
    "flowmap": ("FlowMap", "Guided", "NeuralFlowMap"),
    "interpolant": ("Interpolant", "Trigonometric"),
    "rewards": ("Reward", "RewardError", "reward"),
    "sampling": ("Diffuse", "Renoise", "sample"),
    "steering": (
        "DPS",
        "FMRGE",
        "FMRGJ",
        "BestOfN",
        "Denoise",
        "EndpointAscent",
        "EndpointGradient",
        "FeynmanKac",
        "Funnel",
        "Jump",
        "MapGradient",
        "Steering",
        "SteeringResult",
        "steer",
    ),
    "zoo": ("load",),
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that ``steerfm --help`` does not wait for torch."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f"steerfm.{module}"), name)
    if name == "testing":
        return import_module("steerfm.testing")
    raise AttributeError(f"module 'steerfm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
