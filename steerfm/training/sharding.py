"""Networks whose weights several processes hold together: torch's FSDP2, under a Lightning Trainer.

Each process holds a part of every tensor. A block's weights are brought together for its call, and let go after it. Checkpoints
are whole, gathered by the first process: so any number of processes goes on from them, one included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from steerfm.blocks import blocks
from steerfm.flowmap import FlowMap
from steerfm.processes import sharded

STRATEGY = "fsdp2"
"""What ``trainer.strategy`` calls it."""


def check_shardable(flow_map: FlowMap) -> None:
    """Refuse a map whose weights cannot be shared out.

    Raises:
        ValueError: it is no map around a network.
    """
    if isinstance(flow_map.body, FlowMap):
        raise ValueError(
            f"strategy={STRATEGY}: a {type(flow_map).__name__} holds its weights itself, and they are brought together for "
            "calls of a network: make it a map around a torch.nn.Module, or take strategy=ddp"
        )


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the weights of a network, in place: block by block where it has a list of equal blocks, and the rest."""
    if sharded(network):
        return
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no channels-last weights
    for block in blocks(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def whole(value: Any) -> Any:
    """A tensor that is shared out, as a whole, in all processes; other things as they are. All of them must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as whole tensors on the CPU, where some are shared out; others as they are."""
    return {name: whole(value).detach().cpu() if isinstance(value, DTensor) else value for name, value in weights.items()}


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which all processes have, shared out as another one is."""
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    own = value.to(other.to_local().device)
    return distribute_tensor(own, other.device_mesh, other.placements, src_data_rank=None)


def put(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load some whole weights, by name, into a network, whether or not its own are shared out."""
    own = network.state_dict()
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(like(value, own[name]))


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with whole checkpoints that one process can read, too.

    Args:
        processes: how many there are.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._of_first(self.lightning_module.state_dict().items())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        told = getattr(optimizer, "_optimizer", optimizer).state_dict()
        state = {number: self._of_first(values.items()) for number, values in told["state"].items()}
        return {"state": state, "param_groups": told["param_groups"]}

    def _of_first(self, tensors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """Whole tensors on the CPU, in the first process; it alone has room for all of them."""
        out = {}
        for name, value in tensors:
            entire = whole(value)
            if self.global_rank == 0:
                out[name] = entire.cpu() if isinstance(entire, Tensor) else entire
        return out

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        checkpoint = torch.load(self.broadcast(checkpoint_path), mmap=True, map_location="cpu", weights_only=weights_only)
        put(self.lightning_module, checkpoint.pop("state_dict"))
        for optimizer, told in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: like(value, parameters[number]) if isinstance(value, Tensor) else value for name, value in of.items()
                }
                for number, of in told["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": told["param_groups"]})
        return checkpoint
