"""A command on several processes: each runs it, the first writes and prints."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from steerfm.cli.config import FinetuneConfig, SampleConfig, SpreadConfig, SteerConfig
from steerfm.cli.console import console
from steerfm.flowmap import FlowMap
from steerfm.processes import active, first
from steerfm.values import ConfigError

Config = TypeVar("Config", SteerConfig, SampleConfig, FinetuneConfig)
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
"""What torchrun and srun tell the processes that they start."""


def on_processes(command: Callable[[Config, str], None], config: Config, line: str) -> None:
    """Run a command as its ``trainer`` says.

    Args:
        command: a function of a file, of the configuration and of the line that was typed.

    Raises:
        ConfigError: devices that are not there, or machines that nobody started. Whatever the command raises.
    """
    asked = config.trainer
    alone = asked.devices in ("auto", "1") and asked.num_nodes in (None, 1)
    if alone and not any(name in os.environ for name in LAUNCHERS):
        command(config, line)  # Lightning takes seconds to import
        return
    from steerfm.distributed import check, launch

    key, device = (
        ("device", config.device)
        if not isinstance(config, FinetuneConfig)
        else ("trainer.accelerator", config.trainer.accelerator)
    )
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "gpu"):
        raise ConfigError(f"{key}={device}: several processes need cpu or cuda; leave trainer.devices out")
    if ":" in device:
        raise ConfigError(f"{key}={device} is one GPU: trainer.devices=0,1 says which, and {key}=cuda")
    where: dict[str, Any] = {"devices": asked.devices, "num_nodes": asked.num_nodes, "accelerator": kind}
    try:
        check(**where)
    except ValueError as error:
        raise ConfigError(_in_keys(str(error), key)) from error
    try:
        launch(_on_process, command, config, line, **where)
    except ChildProcessError as error:
        raise ChildProcessError(f"{error}; the same command continues where it was") from error


def share_weights(flow_map: FlowMap, trainer: SpreadConfig) -> None:
    """Let the processes hold the weights of a map together, where that is asked for.

    Raises:
        ConfigError: they cannot be shared out.
    """
    group = active()
    if trainer.strategy == "auto" or group is None:
        return
    from torch.distributed.device_mesh import init_device_mesh

    from steerfm.training.sharding import check_shardable, shard

    try:
        check_shardable(flow_map)
    except ValueError as error:
        raise ConfigError(f"trainer.{error}") from None
    shard(flow_map.body, init_device_mesh(flow_map.device.type, (group.size,)))


def _in_keys(text: str, key: str) -> str:
    """An error of a launch in the words of the command line; ``key`` says on what."""
    return re.sub(r"(?<![\w.])(devices|num_nodes)=", r"trainer.\1=", text).replace("accelerator=", f"{key}=")


def _on_process(command: Callable[[Config, str], None], config: Config, line: str) -> None:
    """What each process does."""
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics)(\.|$)")
    console.quiet = console.quiet or not first()
    command(config, line)
