"""What a run is made of: the model, the reward, the method and the judge of a configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from steerfm import plugins, registry, rewards, trust, zoo
from steerfm.blocks import checkpoint_activations
from steerfm.capabilities import in_words
from steerfm.cli.config import DataConfig, FinetuneConfig, LightningConfig, OptimizerConfig, SteerConfig
from steerfm.cli.console import console
from steerfm.cli.loading import plain
from steerfm.flowmap import FlowMap, Guided, NeuralFlowMap
from steerfm.held_out import check_held_out, in_common
from steerfm.metrics.evaluator import Evaluator
from steerfm.rewards import Reward
from steerfm.steering import METHOD
from steerfm.values import ConfigError, line


def load_model(model: Any, device: str, guidance: float = 1.0, compiled: bool = False, checkpoints: bool = False) -> FlowMap:
    """The model of a configuration: a name, or a name with arguments. A pipeline is guided as itself means it."""
    name, arguments = registry.split_spec(model, "model")
    if name.startswith(zoo.DIFFUSERS) and guidance != 1:
        arguments, guidance = {"guidance": guidance, **arguments}, 1.0
    flow_map = zoo.load(name, pick_device(device), **arguments)
    if checkpoints:
        save_memory(flow_map)
    if compiled and isinstance(flow_map, NeuralFlowMap):
        flow_map = flow_map.compiled()
    return flow_map if guidance == 1 else Guided(flow_map, guidance).to(flow_map.device)


def save_memory(flow_map: FlowMap) -> None:
    """Compute activations again for gradients.

    Raises:
        ConfigError: its network has no blocks.
    """
    try:
        checkpoint_activations(flow_map.body)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def autocast(flow_map: FlowMap, precision: str) -> torch.autocast:
    """The network and the reward in this precision: 32 or bf16."""
    if precision not in ("32", "bf16"):
        raise ConfigError(f"unknown precision {precision!r}; precisions: 32, bf16")
    return torch.autocast(flow_map.device.type, torch.bfloat16, enabled=precision == "bf16")


def check_trainer(trainer: LightningConfig, *strategies: str) -> None:
    """Refuse a logger whose package is missing, or a strategy that there is not, before the work.

    Args:
        strategies: those that are offered; others of Lightning's are taken as they are, but for those that shard.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    from steerfm.training import check_logger

    try:
        check_logger(trainer.logger)
    except ValueError as error:
        raise ConfigError(f"trainer.{error}") from None
    name, others = trainer.strategy, [name for name in StrategyRegistry.available_strategies() if not name.startswith("fsdp")]
    if name not in (*strategies, *others):
        near, offered = trust.nearest(name, strategies), ", ".join(strategies)
        raise ConfigError(f"unknown trainer.strategy={name}{near}; strategies: {offered}")


def pick_device(device: str) -> str:
    """ "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: not a device of this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device}: {str(error).splitlines()[0]}") from None
    return device


def data_set(name: str) -> Any:
    """The data module of a name.

    Raises:
        ConfigError: no plug-in brings it; with the nearest.
    """
    points = plugins.data_sets()
    if name not in points:
        names = sorted(points, key=lambda point: point != DataConfig().name)  # the default first
        raise ConfigError(f"unknown data {name!r}{trust.nearest(name, points)}; data: {', '.join(names)}")
    return points[name].load()


def make_data(config: DataConfig, seed: int) -> Any:
    """The data module of a configuration; nothing is read.

    Raises:
        ConfigError: no such data set, or a key that it does not take.
    """
    kind, usual = data_set(config.name), ("name", "batch_size", "root", "augment")
    own = {key: value for key, value in plain(config).items() if key not in usual and value is not None}
    takes = list(inspect.signature(kind).parameters)
    for key, value in own.items():
        if key not in takes:
            listed = ", ".join(name for name in takes if name != "seed")
            raise ConfigError(f"data.{key}={line(value)}: data {config.name!r} has no such key; keys: {listed}")
    with data_words():
        return kind(config.batch_size, config.root, config.augment, seed, **own)


@contextmanager
def data_words() -> Iterator[None]:
    """Errors of a data module name its arguments as the command line does: data.root= for root=."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        keys = "|".join(field.name for field in fields(DataConfig))
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConfigError
        raise kind(re.sub(rf"(?<![\w.])({keys})=", r"data.\1=", str(error))) from error


def build_reward(value: Any) -> Reward:
    """A reward from a configuration: a name, a name with arguments and weight, or a list of such terms."""
    return rewards.build(value)


def build_method(value: Any, kind: registry.Kind = METHOD) -> Any:
    """A method from a configuration: a name, or a name with arguments; ``kind`` says of steering or of fine-tuning."""
    return registry.build(value, kind)


def fitting(
    config: SteerConfig | FinetuneConfig, method: Any, flow_map: FlowMap, usual: Callable[[FlowMap], dict[str, Any]]
) -> dict[str, Any] | None:
    """What to take, and a line that says so, where nobody named a method and the default one does not fit the map.

    What was set of the default one, ``method.particles=8``, is set of what is taken.
    """
    default, own = registry.split_spec(config.method, "method")
    if default != registry.split_spec(type(config)().method, "method")[0] or not (why := method.lacks(flow_map)):
        return None
    instead = usual(flow_map) | own
    console.print(f"method={line(instead)}, since the model has only {in_words(flow_map)}: {default} does not fit, {why}")
    return instead


@dataclass(frozen=True)
class HeldOut:
    """judge: the held-out reward, or None. gap: why there is none, where nobody said that there should be none; else empty."""

    judge: Reward | None
    gap: str = ""


def build_judge(config: SteerConfig | FinetuneConfig, flow_map: FlowMap, reward: Reward) -> HeldOut:
    """The held-out reward: what ``judge`` says, or by default the one that the model's card names, where it knows what is
    asked for.

    Raises:
        RewardError: what ``judge`` says is the reward itself, or shares weights with it.
    """
    if config.judge is None:
        return HeldOut(None)
    if config.judge != "auto":
        judge = build_reward(config.judge)
        check_held_out(reward, judge)
        return HeldOut(judge)
    labels = config.label is not None or "labels" in reward.needs  # all classes in turn where none is given
    judge = Evaluator(flow_map).judge(reward, labels=labels, prompts=config.prompt is not None)
    if judge is None:
        return HeldOut(None, NO_JUDGE)
    why = in_common(reward, judge)
    return (
        HeldOut(None, f"no held-out reward: {judge.name!r}, which the model's card names, {why}; {OTHER}")
        if why
        else HeldOut(judge)
    )


OTHER = "judge=NAME for one"
NO_JUDGE = f"no held-out reward: the model's card names none that knows what is asked for here; {OTHER}"


def check_needs(terms: Iterable[Reward | None], labels: object, prompts: object) -> None:
    """Refuse a reward or judge that reads labels or prompts where there are none, in the keys of the command line.

    Raises:
        ConfigError: naming the key.
    """
    for reward in terms:
        if reward is not None and "prompts" in reward.needs and not prompts:
            raise ConfigError(f"reward {reward.name!r} needs prompts: prompt='a red heart', a file of them, or reward.prompt=")
        if reward is not None and "labels" in reward.needs and labels is None:
            raise ConfigError(f"reward {reward.name!r} needs labels, a class for each picture: label=NAME, reward.target=NAME")


def schedule(o: OptimizerConfig) -> dict[str, Any]:
    """The optimiser's part of the arguments of `training.Trained`."""
    return {
        "lr": o.lr, "betas": (o.beta1, o.beta2), "weight_decay": o.weight_decay, "steps": o.steps, "warmup": o.warmup,
        "decay": o.decay, "ema": o.ema,
    }  # fmt: skip
