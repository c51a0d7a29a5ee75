"""Fine-tune a flow map on a reward, by a choice of methods; `FineTuning` is the Lightning module."""

from typing import TYPE_CHECKING, Any

from steerfm.finetuning.adjoint import Adjoint
from steerfm.finetuning.base import Method, Tasks, Terms, Update, chain, check, draw, spread
from steerfm.finetuning.direct import AlignProp, Direct, DRaFT, DRaFTK, DRaFTLV, DRTune, ReFL
from steerfm.finetuning.forward import AWM, NFT, Forward, MeanFlowNFT
from steerfm.finetuning.lora import LoRA
from steerfm.finetuning.noise import HyperNoise
from steerfm.finetuning.policy import DDPO, FlowGRPO, Policy
from steerfm.finetuning.posterior import Posterior, PosteriorFree
from steerfm.finetuning.weighted import ORWCFM, Distil, Refit, Weighted
from steerfm.registry import Kind

if TYPE_CHECKING:
    from steerfm.finetuning.module import FineTuning, TaskData

METHODS: dict[str, type] = {
    "direct": Direct,
    "draft": DRaFT,
    "draft_k": DRaFTK,
    "draft_lv": DRaFTLV,
    "alignprop": AlignProp,
    "refl": ReFL,
    "drtune": DRTune,
    "weighted": Weighted,
    "orw_cfm": ORWCFM,
    "policy": Policy,
    "flow_grpo": FlowGRPO,
    "ddpo": DDPO,
    "forward": Forward,
    "meanflow_nft": MeanFlowNFT,
    "nft": NFT,
    "awm": AWM,
    "adjoint": Adjoint,
    "posterior": Posterior,
    "posterior_free": PosteriorFree,
    "noise": HyperNoise,
}
"""Fine-tuning methods by the name that configurations use."""

METHOD = Kind(
    "method",
    lambda thing: all(hasattr(thing, name) for name in ("loss", "law", "law_is_map")),
    "an object with the interface of steerfm.finetuning.Method",
    "steerfm methods",
    METHODS,
)

__all__ = [
    "AWM", "DDPO", "METHOD", "METHODS", "NFT", "ORWCFM", "Adjoint", "AlignProp", "DRTune", "DRaFT", "DRaFTK", "DRaFTLV",
    "Direct", "Distil", "FineTuning", "FlowGRPO", "Forward", "HyperNoise", "LoRA", "MeanFlowNFT", "Method", "Policy",
    "Posterior", "PosteriorFree", "ReFL", "Refit", "TaskData", "Tasks", "Terms", "Update", "Weighted", "chain", "check",
    "draw", "spread",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What Lightning trains is imported on first use: it takes seconds, which a list of the methods need not wait."""
    if name in ("FineTuning", "TaskData"):
        from steerfm.finetuning import module

        return getattr(module, name)
    raise AttributeError(f"module 'steerfm.finetuning' has no attribute {name!r}")
