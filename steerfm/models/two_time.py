"""A second time for networks with one time, for the adapters of flow maps that were distilled from FLUX.1 and SD3.5.

    FLUX.1   (E(s) + E'(t)) / 2           E embeds time, guidance and pooled text (the flow maps of LSD, 2505.18825)
    SD3.5    (1 - g) E(s) + g E'(t) + P   E embeds time, P embeds the pooled text, g = 1/4 (AnyFlow 2605.13724, MeanFlow)

E' starts as a copy of E, so at t = s the network is unchanged. Both times are in one argument, (b, 2). The names of layers are
those of the released adapters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

EMBEDDING = "time_text_embed"
"""The name of the replaced part in these networks."""


class Averaged(nn.Module):
    """The mean of two embeddings, one per time.

    Args:
        embedding: of (b,) times and the network's other inputs.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.original_embedder, self.second_embedder = embedding, copy.deepcopy(embedding)

    def forward(self, timestep: Tensor, *others: Any) -> Tensor:
        if timestep.ndim == 1:
            return self.original_embedder(timestep, *others)
        first, second = timestep.unbind(-1)
        return (self.original_embedder(first, *others) + self.second_embedder(second, *others)) / 2


class Gated(nn.Module):
    """Two embeddings of time in shares of 1 - gate and gate, plus one of the pooled text.

    Args:
        embedding: with ``time_proj``, ``timestep_embedder`` and ``text_embedder``.
        gate: share of the second time, in [0, 1].
    """

    def __init__(self, embedding: Any, gate: float = 0.25) -> None:
        super().__init__()
        self.time_proj, self.timestep_embedder = embedding.time_proj, embedding.timestep_embedder
        self.text_embedder, self.gate = embedding.text_embedder, gate
        self.delta_embedder = copy.deepcopy(embedding.timestep_embedder)

    def forward(self, timestep: Tensor, pooled_projection: Tensor) -> Tensor:
        first, second = (timestep, timestep) if timestep.ndim == 1 else timestep.unbind(-1)
        like = next(self.timestep_embedder.parameters())
        start = self.timestep_embedder(self.time_proj(first).to(like.dtype))
        end = self.delta_embedder(self.time_proj(second).to(like.dtype))
        return torch.lerp(start, end, self.gate) + self.text_embedder(pooled_projection)


KINDS: dict[str, type[Averaged | Gated]] = {"FluxTransformer2DModel": Averaged, "SD3Transformer2DModel": Gated}
"""The combination of two times, by class of network."""


def add_second_time(network: nn.Module) -> None:
    """Give a network a second time, in place; repeated calls have no effect.

    Raises:
        ValueError: this class of network is not supported.
    """
    name = type(network).__name__
    if name not in KINDS:
        raise ValueError(f"two_time=True is not supported for {name}; supported: {', '.join(KINDS)}")
    embedding = getattr(network, EMBEDDING)
    if not isinstance(embedding, Averaged | Gated):
        setattr(network, EMBEDDING, KINDS[name](embedding))


def has_second_time(network: nn.Module) -> bool:
    """Whether a network has a second time by `add_second_time`."""
    return isinstance(getattr(network, EMBEDDING, None), Averaged | Gated)
