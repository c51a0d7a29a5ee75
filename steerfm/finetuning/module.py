"""The Lightning module of fine-tuning, and the tasks of its batches."""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from steerfm import distributed
from steerfm.cost import Cost, Ledger
from steerfm.finetuning.base import Law, Method, Reusing, Tasks, Update, ask_for_a_gradient, check, check_weights, part, spread
from steerfm.finetuning.by_first import by_first
from steerfm.finetuning.lora import LoRA, LoRAOff
from steerfm.flowmap import FlowMap
from steerfm.networks import posterior_weights
from steerfm.processes import Group, active, tell, together
from steerfm.randomness import derive, stream
from steerfm.rewards import Reward
from steerfm.sampling import Noise
from steerfm.scores import counted_from
from steerfm.spread import place, shared_out
from steerfm.training import Trained
from steerfm.training.data import endless
from steerfm.training.module import share_frozen
from steerfm.training.sharding import check_shardable


class TaskData(L.LightningDataModule):
    """Endless batches of indices into `Tasks`, one for each row of the global batch.

    Args:
        n: number of tasks.
        batch_size: rows of the global batch.
        group: consecutive rows that share a task.
        reuse: consecutive updates with the same tasks.
        seed: of the draw.
    """

    def __init__(self, n: int, batch_size: int, group: int = 1, reuse: int = 1, seed: int = 0) -> None:
        super().__init__()
        check_shares(batch_size, group, 1)
        self.n, self.batch_size, self.group, self.reuse, self.seed = n, batch_size, group, reuse, seed

    def train_dataloader(self) -> DataLoader:
        return endless(self, self.rows)

    def rows(self, step: int) -> Tensor:
        """Tasks (batch_size,) of an update."""
        generator = stream(self.seed, "tasks", step // self.reuse)
        start, groups = torch.randint(self.n, (1,), generator=generator), self.batch_size // self.group
        rows = (start + torch.arange(groups)) % self.n  # as even as the batch allows
        return rows.repeat_interleave(self.group)


class FineTuning(Trained):
    """Fine-tunes a flow map by a method. Precision, devices and strategy are the Lightning Trainer's own arguments.

    Args:
        flow_map: the base; it is copied and never changed. Its frozen parameters stay frozen, unless all are frozen.
        reward: the reward to optimise.
        method: the fine-tuning method.
        tasks: conditions, prompts and labels to train on.
        batch_size: rows of the global batch, divided between the processes.
        control: lambda, at least 0.
        scale: spread of the reward; None: measured on the base; 1: the reward keeps its own units.
        lora: train low-rank adapters only. The reference is then the base without them, so that no copy is needed.
        start: weights to start from; default those of the base.
        options: arguments of `Trained`.

    Raises:
        ValueError: the map has no weights, or control is negative, or 0 for a method that tilts.
        RewardError: the reward is a black box, and the method needs its gradient.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        reward: Reward,
        method: Method,
        tasks: Tasks | None = None,
        batch_size: int = 64,
        control: float = 1.0,
        scale: float | None = None,
        lora: LoRA | None = None,
        start: FlowMap | None = None,
        **options: Any,
    ) -> None:
        check(method, reward, control, flow_map)
        check_weights(flow_map)
        base = (start or flow_map).body
        network = copy.deepcopy(base) if lora is None else share_frozen(base)
        free = {name for name, parameter in flow_map.body.named_parameters() if parameter.requires_grad}
        for name, parameter in network.named_parameters() if lora is None else ():
            parameter.requires_grad_(name in free or not free)
        for parameter in posterior_weights(network).values():  # of no use here, and processes wait for each gradient
            parameter.requires_grad_(False)
        network.train()
        if lora is not None:
            lora.inject(network, options.get("seed", 0))
        super().__init__(network, **options)
        tuned = flow_map.with_network(self.network)
        reference = flow_map if lora is None or start is not None else LoRAOff(tuned)
        tuned.without_posterior()
        self.base = (flow_map,)
        self.maps = (tuned, reference)  # in a tuple, so that torch does not register them
        self.rewards = (reward,)
        self.method, self.tasks, self.batch_size = method, tasks or Tasks(), batch_size
        self.control, self.scale, self.lora = control, scale, lora
        self.memory: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self.group: Group | None = None  # the processes of this run, once they are connected
        self.spent = Cost()

    @property
    def reference(self) -> FlowMap:
        return self.maps[1]

    def networks(self) -> list[nn.Module]:
        for flow_map in (self.base[0], self.reference):
            check_shardable(flow_map)
        return [*super().networks(), self.reference.body, self.base[0].body]

    def averaged(self) -> FlowMap:
        """The map with the averaged weights."""
        return self.maps[0].with_network(self.ema.eval())

    def law(self) -> Law:
        """The sampler of the tuned model, with the averaged weights; processes share its calls."""
        return self.method.law(shared_out(self.averaged()), shared_out(self.reference))

    def data(self) -> TaskData:
        """The training batches of this module."""
        return TaskData(self.tasks.n, self.batch_size, self.method.group, _reuse(self.method), self.seed)

    def on_train_start(self) -> None:
        check_shares(self.batch_size, self.method.group, self.trainer.world_size)
        with self.together():
            self.place(self.device)
            if self.method.differentiates:
                one = self.tasks[torch.zeros(1, dtype=torch.long)]
                ask_for_a_gradient(one.problem(self.reference, by_first(self.rewards[0])))
            if self.scale is None:
                self.scale = spread(self.reference, self.rewards[0], self.tasks, seed=self.seed)

    def together(self) -> AbstractContextManager[None]:
        """A context in which the processes share the calls of maps from `shared_out`."""
        if self.group is None and self.trainer.world_size > 1:
            self.group = active() or distributed.torch_group()
        return together(self.group)

    def place(self, device: torch.device | str) -> None:
        """Move the frozen parts, which Lightning does not register."""
        for flow_map in self.maps:
            flow_map.to(device)
        place(self.rewards[0], torch.device(device))

    def update(self, rows: Tensor) -> Update:
        """This process's share of an update."""
        mine = part(self.batch_size, self.group)
        step, tuned = self.global_step, self.maps[0]
        reuse = _reuse(self.method)
        first_use = step // reuse * reuse
        reward = self.rewards[0] if self.group is None else by_first(self.rewards[0])
        assert self.scale is not None
        return Update(
            step, self.steps, tuned, self.averaged(), self.reference, reward, self.tasks[rows[mine].cpu()],
            self.tasks, Noise([derive(self.seed, "training", first_use, row) for row in range(mine.start, mine.stop)]),
            stream(self.seed, "update", step), self.control, self.scale, self.memory, self.seed, self.own,
        )  # fmt: skip

    def training_step(self, rows: Tensor, batch_index: int) -> Tensor:
        terms, error = {}, None
        with Ledger() as ledger, self.together():
            try:
                with counted_from(part(self.batch_size, self.group).start):
                    terms = self.method.loss(self.update(rows))
            except Exception as failure:
                error = failure
            all_terms = tell({name: value.detach().float().cpu() for name, value in terms.items()}, error)
        self._ledger = ledger  # its backward calls come later
        for name in terms:  # mean over the global batch
            value = torch.stack([each[name] for each in all_terms]).mean()
            self.log(f"train/{name}", value, prog_bar=name in ("loss", "reward"))
        return terms["loss"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._started = time.perf_counter()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        with self.together():
            all_counts = tell(self._ledger.cost.counts())
        total = Cost(**{name: sum(counts[name] for counts in all_counts) for name in all_counts[0]})
        cost = replace(total, seconds=time.perf_counter() - self._started, peak_bytes=self._ledger.cost.peak_bytes)
        self.spent = self.spent + cost  # here: checkpoint callbacks run before later hooks

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.log("train/reward_calls", float(self.spent.reward_calls))
        self.log("train/evaluations", float(self.spent.evaluations))
        self.log("train/seconds", self.spent.seconds)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        with self.together():
            own = {name: torch.cat(tell(rows.cpu())) for name, rows in self.own.items()}
        checkpoint |= {"scale": self.scale, "memory": dict(self.memory), "own": own, "spent": self.spent.as_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.scale, self.memory, self.spent = checkpoint["scale"], checkpoint["memory"], Cost(**checkpoint["spent"])
        with self.together():
            self.own = {name: rows[part(len(rows), self.group)] for name, rows in checkpoint["own"].items()}


def check_shares(batch_size: int, group: int, processes: int) -> None:
    """Check that the processes can divide a global batch.

    Raises:
        ValueError: they cannot; the message has sizes that work.
    """
    if processes == 1 and (batch_size < 1 or batch_size % group):
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of the group of {group}")
    if batch_size % (processes * group):
        groups = f" in groups of {group}" if group > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} cannot be divided between {processes} processes{groups}: use a multiple of "
            f"{processes * group}"
        )


def _reuse(method: Method) -> int:
    return method.reuse if isinstance(method, Reusing) else 1
