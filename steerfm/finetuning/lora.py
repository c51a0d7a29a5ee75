"""Low-rank adapters by peft: an option for every method.

The adapters are saved separately, as plain products, so that a tuned map loads without peft: W = W_base + strength * B A.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerfm.flowmap import Wrapped
from steerfm.models.lora import adapter_layers
from steerfm.networks import posterior_weights
from steerfm.randomness import stream
from steerfm.rows import Condition

PREFIX = "lora_"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2106.09685) of linear and convolutional layers.

    Args:
        rank: of the adapters.
        alpha: their scale is alpha / rank; default 2 rank.
        layers: last parts of the names of the layers to adapt, such as ["conv1", "conv2"]. None for all, except embeddings,
            grouped convolutions, to whose weights the factors could not be added, and what only posteriors use.
    """

    rank: int = 4
    alpha: float | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: must be at least 1")

    def targets(self, network: nn.Module) -> list[str]:
        """Names of the layers to adapt.

        Raises:
            ValueError: no layer has a name in ``layers``.
        """
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        without = {name.rpartition(".")[0] for name in posterior_weights(network)}
        names = [
            name
            for name, layer in network.named_modules()
            if isinstance(layer, kinds) and not _grouped(layer) and name not in without
        ]
        if self.layers is None:
            return names
        ends = [f".{name}".rsplit(".", 1)[-1] for name in names]
        for layer in self.layers:
            if not any(name == layer or name.endswith(f".{layer}") for name in names):
                near = difflib.get_close_matches(layer, {*names, *ends}, n=1, cutoff=0.4)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"lora.layers: no layer {layer!r}{hint}; layers: {', '.join(names)}")
        return [name for name in names if any(name == layer or name.endswith(f".{layer}") for layer in self.layers)]

    def inject(self, network: nn.Module, seed: int = 0) -> None:
        """Add adapters to a network, in place. Only they are trained; at first they do not change the output."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("lora needs peft: pip install 'steerfm[lora]'") from None
        targets = self.targets(network)
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets), network)  # type: ignore[arg-type]
        generator = stream(seed, "adapters")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(PREFIX in name)
            if f"{PREFIX}A" in name:  # peft would draw from the global generator
                bound = parameter[0].numel() ** -0.5
                parameter.data.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def _grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups > 1


class LoRAOff(Wrapped):
    """The map of an adapted network with its adapters off: the base, without a second copy of its weights."""

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        with switched_off(self.flow_map.body):
            return self.flow_map.average_velocity(x, s, t, cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        with switched_off(self.flow_map.body):
            return self.flow_map.instantaneous_velocity(x, t, cond)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        with switched_off(self.flow_map.body):
            return self.flow_map.posterior_velocity(z, s, e, x, t, cond)


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """Disable the adapters. Unlike peft's own switch, this does not change requires_grad, so gradients can pass through."""
    layers: list = [layer for _, layer in adapter_layers(network)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
