"""The blocks of a transformer, for sharding and for activation checkpointing."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network: the members of each `torch.nn.ModuleList` of one class that is not part of another block."""
    parts: list[nn.Module] = []
    for each in network.modules():  # the outer ones come first
        if not isinstance(each, nn.ModuleList) or len({type(block) for block in each}) != 1:
            continue
        has_calls = not isinstance(each[0], nn.ModuleList | nn.ModuleDict) and any(True for _ in each[0].parameters())
        inner = any(part is each for block in parts for part in block.modules())
        parts += list(each) if has_calls and not inner else []
    return parts


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute the activations of the blocks in the backward pass: less memory, a third more time, the same gradients.
    Forward-mode derivatives do not use this. Changes the network in place; copies of it behave in the same way.

    Raises:
        ValueError: the network has no blocks.
    """
    parts = blocks(network)
    if not parts:
        raise ValueError(
            f"activation_checkpoints=true: {type(network).__name__} has no blocks: a torch.nn.ModuleList of one class, each "
            "with a forward of its own"
        )
    for block in parts:
        if not isinstance(block, _Checkpoint):
            block.__class__ = _checkpoint_class(type(block))


class _Checkpoint(nn.Module):
    """Mixin for blocks that recompute their activations."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not torch.is_grad_enabled() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


@cache
def _checkpoint_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Checkpoint, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
