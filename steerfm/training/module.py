"""What every training is: a LightningModule with AdamW, a schedule, and the EMA as part of its own state.

Automatic optimisation, one loss, one optimiser: precision, devices and strategy are the Lightning Trainer's own arguments.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from steerfm.randomness import global_stream, stream
from steerfm.training.sharding import shard, whole, whole_weights


class Trained(L.LightningModule):
    """What both trainings share: AdamW, warm-up and linear decay, gradient clipping, an EMA and a noise generator.

    The EMA lives in the module's state, not in a callback, so a checkpoint can never hold swapped weights. Its decay warms
    up as min(decay, (1 + n)/(10 + n)). Every update has a generator of its own, on the CPU: a continued run draws what an
    uninterrupted one does.

    Args:
        network: the network to train.
        lr, betas, weight_decay: AdamW.
        steps: length of the schedule; resuming with a larger or smaller value moves the decay.
        warmup: steps of linear warm-up.
        decay: share of the steps over which the rate falls linearly to zero, at the end.
        ema: decay of the average.
        seed: of the noise, of the times and of dropout.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        steps: int = 10_000,
        warmup: int = 200,
        decay: float = 0.3,
        ema: float = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        average = _ema(ema)
        self.average = AveragedModel(_Lean(network), avg_fn=average, use_buffers=False).requires_grad_(False)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.steps, self.warmup, self.decay, self.seed = steps, warmup, decay, seed
        self.skipped = 0
        self._generator: tuple[int, torch.Generator] | None = None
        self._global = ExitStack()

    @property
    def generator(self) -> torch.Generator:
        """Of this update and this process."""
        if self._generator is None or self._generator[0] != self.global_step:
            self._generator = self.global_step, stream(self.seed, "training", self.global_step, self.global_rank)
        return self._generator[1]

    @property
    def ema(self) -> nn.Module:
        """The averaged network."""
        return self.average.module

    def configure_model(self) -> None:
        """Share out all weights where that is the Trainer's strategy."""
        if self.device_mesh is not None:
            for network in self.networks():
                shard(network, self.device_mesh["data_parallel"])

    def networks(self) -> list[nn.Module]:
        """All whose weights are shared out, the frozen ones among them."""
        return [self.network, self.ema]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is optimised, as AdamW takes it."""
        return [{"params": [p for p in self.network.parameters() if p.requires_grad]}]

    def _rate(self, step: int) -> float:
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup), max(0.0, left))

    def configure_callbacks(self) -> list[L.Callback]:
        return [_Released()]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # dropout draws from torch's own generators
        self._global.enter_context(global_stream(self.seed, "dropout", self.global_step, self.global_rank))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.release()

    def release(self) -> None:
        """Give torch's own generators back as they were before this update."""
        self._global.close()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step whose gradient is not finite is skipped and counted."""
        norm = whole(nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None]))
        if not torch.isfinite(norm):
            optimizer.zero_grad()
            self.skipped += 1
        self.log("train/skipped", float(self.skipped))
        self.log("train/gradient_norm", norm)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """The average follows at once: callbacks that save a checkpoint run before any later hook of a module."""
        super().optimizer_step(*arguments, **options)
        self.average.update_parameters(self.network)

    def learnt(self) -> dict[str, Tensor]:
        """The averaged weights, whole, without those that are frozen. All processes must ask."""
        frozen = self.frozen()
        return whole_weights({name: value.detach() for name, value in self.ema.state_dict().items() if name not in frozen})

    def frozen(self) -> set[str]:
        """Names of the network's parameters that are not trained."""
        return {name for name, parameter in self.network.named_parameters() if not parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is frozen is not saved: whoever goes on has it."""
        checkpoint["skipped"] = self.skipped
        for name in self.frozen():
            for place in ("network", "average.module"):
                checkpoint.get("state_dict", {}).pop(f"{place}.{name}", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint["skipped"]
        if "state_dict" in checkpoint:  # else the strategy has loaded it
            checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}


class _Released(L.Callback):
    """An update that fails ends no hook of its module: torch's generators would change when that is collected, at any time."""

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.release()


def share_frozen(network: nn.Module) -> nn.Module:
    """A copy of a network that has its frozen parameters in common with it, wherever they move: low-rank tuning needs one
    network and not three."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})


class _Lean(nn.Module):
    """A network that shares its frozen parameters with its copies."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return share_frozen(self.network)


def _ema(decay: float):
    """The averaging rule with warm-up, for `AveragedModel`."""

    def average(averaged: Tensor, current: Tensor, seen: Tensor | int) -> Tensor:
        n = float(seen)
        d = min(decay, (1 + n) / (10 + n))
        return torch.lerp(current, averaged, d) if math.isfinite(d) else averaged

    return average
