"""The blocks of a transformer: what is shared out one by one, and what is computed again to save memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network: those of a `torch.nn.ModuleList` of one class, unless they are part of another one's."""
    found: list[nn.Module] = []
    for each in network.modules():  # the outer ones come first
        if not isinstance(each, nn.ModuleList) or len({type(block) for block in each}) != 1:
            continue
        has_calls = not isinstance(each[0], nn.ModuleList | nn.ModuleDict) and any(True for _ in each[0].parameters())
        inner = any(part is each for block in found for part in block.modules())
        found += list(each) if has_calls and not inner else []
    return found


def checkpoint_activations(network: nn.Module) -> None:
    """Forget what the blocks of a network compute, and compute it again on the way back: less memory, a third more time, and
    the same gradients. A derivative forwards keeps it. Changes the network, in place; its copies do likewise.

    Raises:
        ValueError: it has no blocks.
    """
    parts = blocks(network)
    if not parts:
        raise ValueError(
            f"activation_checkpoints=true: {type(network).__name__} has no blocks: a torch.nn.ModuleList of one class, each "
            "with a forward of its own"
        )
    for block in parts:
        if not isinstance(block, _Checkpointed):
            block.__class__ = _checkpointed(type(block))


class _Checkpointed(nn.Module):
    """What a block of another class is as well, if its activations are computed again."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not torch.is_grad_enabled() or any(forward_ad.unpack_dual(x).tangent is not None for x in given):
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Checkpointed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
