"""Run a command on several processes. Each runs it, and the first one writes and prints."""

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
"""Environment variables that torchrun and srun set in their processes."""


def on_processes(command: Callable[[Config, str], None], config: Config, line: str) -> None:
    """Run a command on the devices that the key ``trainer`` of its configuration names.

    Args:
        command: module-level function of the configuration and the command line.
        config: its configuration.
        line: the command line, for the report.

    Raises:
        ConfigError: a device does not exist, or a machine has not been started.
        Exception: any error of the command.
    """
    trainer = config.trainer
    alone = trainer.devices in ("auto", "1") and trainer.num_nodes in (None, 1)
    if alone and not any(name in os.environ for name in LAUNCHERS):
        command(config, line)  # without Lightning, which takes seconds to import
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
        raise ConfigError(f"{key}={device} is one GPU: name the GPUs in trainer.devices, for example 0,1, and give {key}=cuda")
    where: dict[str, Any] = {"devices": trainer.devices, "num_nodes": trainer.num_nodes, "accelerator": kind}
    try:
        check(**where)
    except ValueError as error:
        raise ConfigError(_in_keys(str(error), key)) from error
    try:
        launch(_on_process, command, config, line, **where)
    except ChildProcessError as error:
        raise ChildProcessError(f"{error}; the same command continues where it was") from error


def share_weights(flow_map: FlowMap, trainer: SpreadConfig) -> None:
    """Shard the weights of a map over the processes, if ``trainer.strategy`` says so.

    Raises:
        ConfigError: the weights cannot be sharded.
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
    """Rewrite a launch error with the keys of the command line; ``key`` is that of the accelerator."""
    return re.sub(r"(?<![\w.])(devices|num_nodes)=", r"trainer.\1=", text).replace("accelerator=", f"{key}=")


def _on_process(command: Callable[[Config, str], None], config: Config, line: str) -> None:
    """Run the command in one process, quietly unless it is the first."""
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics)(\.|$)")
    console.quiet = console.quiet or not first()
    command(config, line)
