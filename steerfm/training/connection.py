"""How a Lightning Trainer works in processes that `steerfm.distributed.launch`, torchrun or SLURM started."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment

from steerfm.processes import Group, active
from steerfm.training.sharding import STRATEGY, Sharded


class Connected(ClusterEnvironment):
    """The processes of a group, which are connected already.

    Args:
        here: processes on this machine.
    """

    def __init__(self, group: Group, here: int) -> None:
        super().__init__()
        self.group, self.here = group, here

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return active() is not None

    def world_size(self) -> int:
        return self.group.size

    def set_world_size(self, size: int) -> None:
        """Nothing: it is known."""

    def global_rank(self) -> int:
        return self.group.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it is known."""

    def local_rank(self) -> int:
        return self.group.rank % self.here

    def node_rank(self) -> int:
        return self.group.rank // self.here


def connection(devices: str, num_nodes: int, strategy: str, *plugins: Any) -> dict[str, Any]:
    """The arguments of a Trainer that say which processes there are: those of the group, or what the Trainer makes of them."""
    group = active()
    chosen: Any = [int(part) for part in devices.split(",")] if "," in devices else devices
    chosen = int(devices) if devices.isdigit() else chosen
    if strategy == STRATEGY and group is None and devices not in ("1", "auto"):
        raise ValueError(f"strategy={STRATEGY}, devices={devices}: start them by steerfm.distributed.launch, torchrun or srun")
    if strategy == STRATEGY and (group is None or group.size == 1):  # one process holds all
        strategy, chosen = "auto", 1
    if group is None:
        return {"devices": chosen, "num_nodes": num_nodes, "strategy": strategy, "plugins": list(plugins)}
    here = group.size // num_nodes
    return {
        "devices": chosen if isinstance(chosen, list) else here,
        "num_nodes": num_nodes,
        "strategy": {"auto": "ddp", STRATEGY: Sharded(group.size)}.get(strategy, strategy),
        "plugins": [Connected(group, here), *plugins],
    }
