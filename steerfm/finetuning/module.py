"""The module that Lightning trains by a fine-tuning method, and the tasks of its batches."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from steerfm.cost import Cost, Ledger
from steerfm.finetuning.base import Law, Method, Reusing, Tasks, Update, ask_for_a_gradient, check, check_weights, spread
from steerfm.finetuning.lora import LoRA, LoRAOff
from steerfm.flowmap import FlowMap
from steerfm.randomness import derive, stream
from steerfm.rewards import Reward
from steerfm.sampling import Noise
from steerfm.training import Trained
from steerfm.training.data import endless
from steerfm.training.module import share_frozen


class TaskData(L.LightningDataModule):
    """Endless batches of rows of `Tasks`: which of them each row of the global batch is asked for.

    Args:
        n: number of tasks.
        batch_size: rows of the global batch; consecutive ``group`` rows share a task.
        reuse: updates in a row that are asked for the same.
        seed: of the choice.
    """

    def __init__(self, n: int, batch_size: int, group: int = 1, reuse: int = 1, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or batch_size % group:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of the group of {group}")
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
        flow_map: the base; it is copied, never changed. What is frozen in it stays so, unless all of it is.
        reward: what is optimised.
        method: how.
        tasks: what the model is asked for.
        batch_size: rows of the global batch, shared out over the processes.
        control: lambda, at least 0.
        scale: spread of the reward; None to measure it on the base; 1 for a reward in units of its own.
        lora: train low-rank adapters only; the base with them switched off is then the reference, without a copy.
        start: weights to start from, default the base's.
        options: arguments of `Trained`.

    Raises:
        ValueError: no weights, a control that is negative, or 0 for a method that tilts; RewardError: a black box where the
            method needs a gradient.
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
        network.train()
        if lora is not None:
            lora.inject(network, options.get("seed", 0))
        super().__init__(network, **options)
        tuned = flow_map.with_network(self.network)
        reference = flow_map if lora is None or start is not None else LoRAOff(tuned)
        self.maps = (tuned, reference)  # in a tuple: the trained network is registered once, the frozen ones never
        self.judged = (reward,)
        self.method, self.tasks, self.batch_size = method, tasks or Tasks(), batch_size
        self.control, self.scale, self.lora = control, scale, lora
        self.memory: dict[str, Tensor] = {}
        self.spent = Cost()

    @property
    def reference(self) -> FlowMap:
        return self.maps[1]

    def averaged(self) -> FlowMap:
        """The map with the averaged weights."""
        return self.maps[0].with_network(self.ema.eval())

    def law(self) -> Law:
        """How samples of what was learnt are drawn, with the averaged weights."""
        return self.method.law(self.averaged(), self.reference)

    def data(self) -> TaskData:
        """The batches that this module trains on."""
        return TaskData(self.tasks.n, self.batch_size, self.method.group, _reuse(self.method), self.seed)

    def on_train_start(self) -> None:
        world = self.trainer.world_size
        if self.batch_size % (world * self.method.group):
            raise ValueError(
                f"batch_size={self.batch_size} cannot be shared out over {world} processes in groups of {self.method.group}"
            )
        self.place(self.device)
        if self.method.differentiates:
            ask_for_a_gradient(self.tasks[torch.zeros(1, dtype=torch.long)].problem(self.reference, self.judged[0]))
        if self.scale is None:
            self.scale = spread(self.reference, self.judged[0], self.tasks, seed=self.seed)

    def place(self, device: torch.device | str) -> None:
        """Move the frozen parts, which Lightning does not know of."""
        for part in (*self.maps, *self.judged):
            part.to(device)

    def update(self, rows: Tensor) -> Update:
        """This process's share of an update."""
        size = self.batch_size // self.trainer.world_size
        mine = slice(self.global_rank * size, (self.global_rank + 1) * size)
        step, tuned = self.global_step, self.maps[0]
        reuse = _reuse(self.method)
        drawn = step // reuse * reuse
        assert self.scale is not None
        return Update(
            step, self.steps, tuned, self.averaged(), self.reference, self.judged[0], self.tasks[rows[mine].cpu()],
            self.tasks, Noise([derive(self.seed, "training", drawn, row) for row in range(mine.start, mine.stop)]),
            stream(self.seed, "update", step), self.control, self.scale, self.memory, self.seed,
        )  # fmt: skip

    def training_step(self, rows: Tensor, batch_index: int) -> Tensor:
        with Ledger() as ledger:
            terms = self.method.loss(self.update(rows))
        self._ledger = ledger  # its backward calls are still to come
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach().float(), prog_bar=name in ("loss", "reward"))
        return terms["loss"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._started = time.perf_counter()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        counts = self._ledger.cost.as_dict() | {"seconds": 0, "peak_bytes": 0}
        total = Cost(**{name: int(count) * self.trainer.world_size for name, count in counts.items()})
        cost = replace(total, seconds=time.perf_counter() - self._started, peak_bytes=self._ledger.cost.peak_bytes)
        self.spent = self.spent + cost  # here, since a callback that saves a checkpoint runs before later hooks

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.log("train/reward_calls", float(self.spent.reward_calls))
        self.log("train/evaluations", float(self.spent.evaluations))
        self.log("train/seconds", self.spent.seconds)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"scale": self.scale, "memory": dict(self.memory), "spent": self.spent.as_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.scale, self.memory, self.spent = checkpoint["scale"], checkpoint["memory"], Cost(**checkpoint["spent"])


def _reuse(method: Method) -> int:
    return method.reuse if isinstance(method, Reusing) else 1
