"""Tunings that one process does and that several do, for the tests beside this file: functions that processes can import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import steerfm
from steerfm import NeuralFlowMap, processes
from steerfm.finetuning import METHODS, Distil, FineTuning, LoRA, Refit, Tasks, chain
from steerfm.finetuning.evaluation import Monitor, Panel
from steerfm.networks import Mlp
from steerfm.randomness import global_stream
from steerfm.rewards import Reward, as_reward
from steerfm.training import fit, history
from steerfm.training.sharding import shard

STEPS = 4
QUICK: dict[str, Any] = {
    "accelerator": "cpu",
    "log_every": 1,
    "validate_every": 0,
    "save_every": 1,
    "progress": False,
    "logger": "csv",
}
SMALL: dict[str, Mapping[str, Any]] = {
    "direct": {},
    "draft_lv": {},
    "alignprop": {},
    "weighted": {"rounds": 2, "samples": 64},
    "orw_cfm": {"rounds": 2, "samples": 64},
    "policy": {"group": 2, "reuse": 3},
    "ddpo": {"group": 2, "steps": 3},
    "forward": {"group": 2, "reuse": 3, "jumps": 2},
    "nft": {"group": 2, "reuse": 3, "ode": 2},
    "awm": {"group": 2, "reuse": 3, "ode": 2},
    "adjoint": {"steps": 4},
    "noise": {},
}
ALL = (*SMALL, "distil", "followed", "groupwise", "one process", "lora")
SHARDED = ("direct", "weighted", "policy", "forward", "nft", "adjoint", "noise", "distil", "followed", "lora", "bf16")
"""Runs under FSDP2: every family."""
AGAIN = ("direct", "weighted", "policy", "lora")
"""Runs that stop in the middle and go on with another number of processes: with and without samples to keep."""


class KilledError(Exception):
    pass


class Kill(L.Callback):
    """Ends a run in its third update, whose start is in a checkpoint."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            raise KilledError


def linear(x: Tensor) -> Tensor:
    return x[:, 0] - 0.5 * x[:, 1]


class Among(Reward):
    """Compares pictures: how far each is from the mean of its group; notes how many it saw."""

    groupwise = True

    def __init__(self, one_process: bool = False) -> None:
        super().__init__()
        self.one_process, self.groupwise, self.seen = one_process, not one_process, []

    def score(self, images: Tensor, prompts: Any = None, labels: Any = None, groups: Any = None) -> Tensor:
        self.seen.append(len(images))
        if groups is None:
            return linear(images)
        means = torch.stack([images[groups == group].mean(0) for group in groups])
        return (images - means).square().sum(1)


def classes() -> NeuralFlowMap:
    with global_stream(0, "classes"):
        network = Mlp(2, width=16, depth=2, classes=3, posterior=True)  # weights that tuning does not train
        torch.nn.init.normal_(network.outputs.weight, std=0.3)
    return NeuralFlowMap(network, (2,), class_names=("a", "b", "c")).eval().requires_grad_(False)


def tuning(name: str) -> FineTuning:
    """A tuning of a small map, by a method or of a kind that is called so."""
    flow_map = classes()
    tasks = Tasks.of(flow_map.condition(["a", "b", "c"], 3))
    options: dict[str, Any] = {"lr": 1e-2, "batch_size": 8, "steps": STEPS, "warmup": 1, "ema": 0.9}
    reward: Reward = as_reward(linear)
    if name == "groupwise":
        reward = 1.0 * Among() + 0.5 * reward
    if name == "one process":
        reward = Among(one_process=True)
    if name == "lora":
        options["lora"] = LoRA(rank=2)
    if name == "distil":
        method: Any = Distil(chain(4)(flow_map), samples=32, refit=Refit(0.3))
    elif name == "followed":
        method = Distil(chain(4)(flow_map), teacher=flow_map)
    else:
        method = METHODS.get(name, METHODS["direct"])(**SMALL.get(name, {}))
    return FineTuning(flow_map, reward, method, tasks, **options)


def outcome(name: str, folder: Path, strategy: str = "auto", kill: bool = False) -> dict[str, Any]:
    """What a tuning logged, where its weights came to, its cost and its judgements; ``kill`` leaves it in its third update."""
    module = tuning(name)
    callbacks: list[L.Callback] = [Kill()] if kill else []
    if name == "direct":
        tasks = module.tasks[torch.arange(40) % 3]
        panel = Panel(module.reference, as_reward(linear), None, tasks, tasks, lambda x: x)
        callbacks.insert(0, Monitor(panel, panel.measure(chain()(module.reference)), folder, every=2, patience=0))
    precision = "bf16-mixed" if name == "bf16" else "32-true"
    try:
        fit(module, module.data(), folder, strategy=strategy, precision=precision, callbacks=callbacks, **QUICK)
    except KilledError:
        return {}
    weights = torch.cat([value.flatten() for value in module.learnt().values()])
    logged = {key: values for key, (_, values) in history(folder).items() if "seconds" not in key}
    seen = module.rewards[0].seen if isinstance(module.rewards[0], Among) else []
    group = processes.active()
    networks = [network for network in module.networks() if network is not module.base[0].body or name != "lora"]
    own = [p.to_local() if isinstance(p, DTensor) else p for network in networks for p in network.parameters()]
    return {
        "held": sum(p.numel() for p in own) / sum(p.numel() for network in networks for p in network.parameters()),
        "units": sum(isinstance(part, FSDPModule) for part in module.network.modules()),
        "logged": logged, "weights": weights, "scale": module.scale, "memory": sorted(module.memory),
        "seen": group.exchange(seen) if group else [seen],
    }  # fmt: skip


def begin(folder: Path, strategy: str = "auto") -> None:
    """Runs that end in the middle, for another number of processes to go on from."""
    for name in AGAIN:
        outcome(name, folder / name, strategy, kill=True)


def gone_on(folder: Path, strategy: str = "auto") -> dict[str, Any]:
    """What becomes of runs that another number of processes began."""
    return {name: outcome(name, folder / name, strategy) for name in AGAIN}


def steered(share_out: bool = False) -> dict[str, Tensor]:
    """Samples of a map, whose weights several processes hold together: rows are uneven, or fewer than processes."""
    flow_map = classes()
    if share_out:
        shard(flow_map.body, init_device_mesh("cpu", (steerfm.distributed.size(),)))
    runs = {"particles": (steerfm.FeynmanKac(particles=37, steps=2), 1), "guided": (steerfm.FMRGJ(steps=2), 3)}
    return {
        name: steerfm.steer(flow_map, linear, method, n=n, seeds=0, strength=2.0, label="a").samples
        for name, (method, n) in runs.items()
    }


def together(folder: Path) -> dict[str, Any]:
    """What several processes do: all tunings, beginnings, the rest of what one process began, and what is refused."""
    out: dict[str, Any] = {"refused": refused(folder), "steered": steered(True)}
    for strategy, names in (("ddp", ALL), ("fsdp2", SHARDED)):
        out[strategy] = {name: outcome(name, folder / strategy / name, strategy) for name in names}
        out[f"{strategy} after one"] = gone_on(folder / f"one for {strategy}", strategy)
        begin(folder / f"{strategy} for one", strategy)
    return out


def same(one: dict[str, Any], other: dict[str, Any], judged: bool = True, rel: float = 1e-4) -> None:
    """Two outcomes are the same, to rounding."""
    assert one["logged"].keys() == other["logged"].keys()
    for key, values in one["logged"].items():
        if not (judged or key.startswith("train/")):  # of a run that went on, under other numbers
            continue
        if key == "train/evaluations":  # two processes may both follow a trajectory that rows of each are fitted to
            assert all(two >= value for value, two in zip(values, other["logged"][key]))
            continue
        assert values == pytest.approx(other["logged"][key], rel=rel, abs=1e-2 * rel, nan_ok=True), key
    assert one["scale"] == pytest.approx(other["scale"], rel=rel)
    assert torch.allclose(one["weights"], other["weights"], atol=rel)


def refused(folder: Path) -> dict[str, str]:
    """What is said where it cannot be done, or breaks in one of the processes."""
    out = {}
    module = tuning("policy")
    module.batch_size = 6
    broken = tuning("policy")
    broken.rewards = (as_reward(_broken),)
    for name, one in {"rows": module, "row": broken}.items():
        try:
            fit(one, one.data(), folder / f"refused {name}", **QUICK)
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out


def _broken(x: Tensor) -> Tensor:
    """NaN for the row that only the second process has."""
    rank = steerfm.distributed.rank()
    return linear(x).masked_fill(torch.arange(len(x)) == (2 if rank == 1 and len(x) == 4 else -1), float("nan"))
