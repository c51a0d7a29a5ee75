"""LightningModules that train flow maps and classifiers, with the EMA as part of their own state.

Automatic optimisation, one loss, one optimiser: precision, devices and strategy are the Lightning Trainer's own arguments.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from steerfm import files
from steerfm.flowmap import Condition, FlowMap, NeuralFlowMap, move_condition, replace_rows, take_rows
from steerfm.objectives import FlowMatching, Objective, Trajectory
from steerfm.randomness import global_stream, stream
from steerfm.results import picture_grid
from steerfm.sampling import sample
from steerfm.signals import Pending, Stopped, held


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
        self.average = AveragedModel(network, avg_fn=average, use_buffers=False).requires_grad_(False)
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

    def on_train_batch_start(self, *_: Any) -> None:  # dropout draws from torch's own generators
        self._global.enter_context(global_stream(self.seed, "dropout", self.global_step, self.global_rank))

    def on_train_batch_end(self, *_: Any) -> None:
        self._global.close()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step whose gradient is not finite is skipped and counted."""
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            optimizer.zero_grad()
            self.skipped += 1
        self.log("train/skipped", float(self.skipped))
        self.log("train/gradient_norm", norm)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """The average follows at once: callbacks that save a checkpoint run before any later hook of a module."""
        super().optimizer_step(*arguments, **options)
        self.average.update_parameters(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint["skipped"]


class FlowMapTraining(Trained):
    """Train a flow map: flow matching on the diagonal, self-distillation off it (Boffi et al. 2505.18825).

    Each batch is split: a share goes to the off-diagonal objective, the rest to flow matching. Both are averaged over the
    whole batch, so the shares are the weights.

    Args:
        flow_map: the map; its network is trained in place.
        off_diagonal: objectives with their shares of the batch, e.g. {Lagrangian(): 0.25}; the rest is flow matching.
        diagonal: the flow-matching objective.
        start: share of the steps with flow matching only.
        null: condition of one row that replaces another with probability ``drop``, for classifier-free guidance; None for a
            map without conditions.
        options: arguments of `Trained`.
    """

    def __init__(
        self,
        flow_map: NeuralFlowMap,
        off_diagonal: Mapping[Objective, float],
        diagonal: Objective | None = None,
        start: float = 0.1,
        null: Condition = None,
        drop: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(flow_map.network, **options)
        if sum(off_diagonal.values()) > 1:
            raise ValueError(f"shares of the off-diagonal objectives sum to {sum(off_diagonal.values())}, above 1")
        self.flow_map = [flow_map]  # in a list: the network is registered once, as self.network
        self.off_diagonal, self.diagonal = dict(off_diagonal), diagonal or FlowMatching()
        self.start, self.null, self.drop = start, null, drop

    def condition(self, batch: Sequence[Any]) -> Condition:
        """What the rows of a batch, (pictures, labels or captions, ...), are asked for."""
        if self.null is None:
            return None
        return batch[1] if isinstance(batch[1], Tensor) else self.flow_map[0].condition(batch[1], len(batch[1]))

    def training_step(self, batch: Sequence[Any], batch_index: int) -> Tensor:
        (flow_map,) = self.flow_map
        x1, cond = flow_map.encode(batch[0]), self.condition(batch)
        if cond is not None and self.drop:
            dropped = torch.rand(len(x1), generator=self.generator) < self.drop
            cond = replace_rows(cond, dropped.to(x1.device), self.null)
        parts = {} if self.global_step < self.start * self.steps else self.off_diagonal
        sizes = [round(share * len(x1)) for share in parts.values()]
        total, begin = torch.zeros((), device=x1.device), 0
        for objective, size in [*zip(parts, sizes), (self.diagonal, len(x1) - sum(sizes))]:
            if size <= 0:  # a small batch, or shares that leave nothing
                continue
            rows = slice(begin, begin := begin + size)
            mixed = objective is self.diagonal and torch.is_autocast_enabled(x1.device.type)
            with torch.autocast(x1.device.type, enabled=mixed):  # off the diagonal, tangents need float32
                losses = objective(flow_map, x1[rows], take_rows(cond, rows), self.generator)
            total = total + losses.float().sum() / len(x1)
            self.log(f"train/{type(objective).__name__}", losses.detach().mean())
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["trajectories"] = [objective.pool.state_dict() for objective in self._pooled()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for objective, state in zip(self._pooled(), checkpoint.get("trajectories", ())):
            objective.pool.load_state_dict(state)

    def _pooled(self) -> list[Trajectory]:
        return [objective for objective in self.off_diagonal if isinstance(objective, Trajectory)]

    def averaged(self) -> NeuralFlowMap:
        """The flow map with the averaged weights: the one to sample from and to ship."""
        (flow_map,) = self.flow_map
        return flow_map.with_network(self.ema.eval())

    def validation_step(self, batch: Sequence[Any], batch_index: int) -> None:
        """Flow-matching loss of the averaged network on held-out data, with fixed noise and times."""
        flow_map, generator = self.averaged(), stream(0, "validation", batch_index)
        even = FlowMatching(lambda n, _: (torch.arange(n) + 0.5) / n)
        losses = even(flow_map, flow_map.encode(batch[0]), self.condition(batch), generator)
        self.log("val/flow_matching", losses.mean(), prog_bar=True, batch_size=len(batch[0]), sync_dist=True)


class ClassifierTraining(Trained):
    """Train a classifier of pictures: cross entropy with label smoothing; `ema` is the network to ship.

    Args:
        network: pictures (b, c, h, w) in [0, 1] -> logits (b, classes).
        smoothing: label smoothing, in [0, 1).
        noise: standard deviation of Gaussian noise added to the training pictures.
        options: arguments of `Trained`.
    """

    def __init__(self, network: nn.Module, smoothing: float = 0.1, noise: float = 0.0, **options: Any) -> None:
        super().__init__(network, **options)
        self.smoothing, self.noise = smoothing, noise

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        pictures, labels = batch
        if self.noise:
            pictures = pictures + self.noise * torch.randn(pictures.shape, generator=self.generator).to(pictures)
        loss = F.cross_entropy(self.network(pictures), labels, label_smoothing=self.smoothing)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        pictures, labels = batch
        network = self.ema.eval()
        right = (network(pictures).argmax(1) == labels).float().mean()
        self.log("val/accuracy", right, prog_bar=True, batch_size=len(labels), sync_dist=True)


class ContrastiveTraining(Trained):
    """Train an image-text model (open_clip's) contrastively: CLIP's loss (Radford et al. 2103.00020, figure 3) with all
    pictures of one concept in a batch as each other's positives, in equal shares.

    Args:
        network: with ``encode_image(x, normalize)``, ``encode_text(tokens, normalize)`` and ``logit_scale``.
        tokenizer: captions to what ``encode_text`` takes.
        prepare: pictures (b, c, h, w) in [0, 1] to what the network takes.
        slow: names of the parts with pretrained weights; they learn at ``slow_rate`` times the rate.
        noise: largest standard deviation of Gaussian noise added to the training pictures, drawn for each.
        options: arguments of `Trained`.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Callable[[list[str]], Any],
        prepare: Callable[[Tensor], Tensor],
        slow: tuple[str, ...] = (),
        slow_rate: float = 0.2,
        noise: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.tokenizer, self.prepare, self.slow, self.slow_rate, self.noise = tokenizer, prepare, slow, slow_rate, noise
        self._held_out: list[tuple[Tensor, Tensor, Tensor]] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups[name.startswith(self.slow) if self.slow else False].append(parameter)
        return [{"params": groups[slow], "lr": self.lr * (self.slow_rate if slow else 1.0)} for slow in groups if groups[slow]]

    def training_step(self, batch: tuple[Tensor, list[str], Tensor], batch_index: int) -> Tensor:
        pictures, captions, concepts = batch
        pictures = self._noisy(pictures)
        image, text = self._embed(self.network, pictures, captions)
        logits = self.network.logit_scale.exp().clamp_max(100) * image @ text.T  # type: ignore[operator, union-attr]
        same = (concepts[:, None] == concepts[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _noisy(self, pictures: Tensor) -> Tensor:
        if not self.noise:
            return pictures
        level = self.noise * torch.rand(len(pictures), 1, 1, 1, generator=self.generator)
        noise = torch.randn(pictures.shape, generator=self.generator)
        return (pictures + (level * noise).to(pictures)).clamp(0, 1)

    def _embed(self, network: Any, pictures: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions)
        tokens = tokens.to(pictures.device) if isinstance(tokens, Tensor) else tokens
        return network.encode_image(self.prepare(pictures), normalize=True), network.encode_text(tokens, normalize=True)

    def validation_step(self, batch: tuple[Tensor, list[str], Tensor], batch_index: int) -> None:
        pictures, captions, concepts = batch
        self._held_out.append((*self._embed(self.ema.eval(), pictures, captions), concepts))

    def on_validation_epoch_end(self) -> None:
        """Recall at 1, 5 and 10 among the held-out concepts, one style at a time, both ways."""
        image, text, concept = (torch.cat(part) for part in zip(*self._held_out))
        self._held_out.clear()
        starts = (concept.diff() < 0).nonzero().flatten().add(1).tolist()
        found: dict[str, list[float]] = {}
        for begin, end in zip([0, *starts], [*starts, len(concept)]):
            cosine = image[begin:end] @ text[begin:end].T
            for way, table in {"image to text": cosine, "text to image": cosine.T}.items():
                rank = (table > table.diagonal()[:, None]).sum(1)
                for k in (1, 5, 10):
                    found.setdefault(f"{way} R@{k}", []).append((rank < k).float().mean().item())
        for name, values in found.items():
            self.log(f"val/{name}", sum(values) / len(values), prog_bar="R@5" in name)


class RobustTraining(ContrastiveTraining):
    """Train the image tower to give, under the worst small change of each picture, the embedding that a teacher gives to the
    picture itself: |phi(x + delta) - phi_teacher(x)|^2 (FARE, Schlarmann et al. 2402.12336, equation 4, in L2). A reward made
    of it has a gradient that is harder to hack. The text tower stays as it is.

    Args:
        network: its image tower starts with ``visual``.
        teacher: pictures (b, c, h, w) in [0, 1] to embeddings (b, d) of length 1, on the CPU.
        radius: largest L2 length of a change, drawn for each picture; it is found by one step from a random start (Wong et al.
            2001.03994).
        samples: pictures (n, c, h, w) to mix in, half of each batch, such as a generative model's own; None for none.
        options: arguments of `ContrastiveTraining`.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Callable[[list[str]], Any],
        prepare: Callable[[Tensor], Tensor],
        teacher: Callable[[Tensor], Tensor],
        radius: float,
        samples: Tensor | None = None,
        **options: Any,
    ) -> None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("visual"))
        super().__init__(network, tokenizer, prepare, **options)
        self.teacher, self.radius, self.samples = teacher, radius, samples

    def training_step(self, batch: tuple[Tensor, list[str], Tensor], batch_index: int) -> Tensor:
        pictures = batch[0]
        if self.samples is not None:
            half = len(pictures) // 2
            rows = torch.randint(len(self.samples), (half,), generator=self.generator)
            pictures = torch.cat([pictures[half:], self.samples[rows].to(pictures)])
        goal = self.teacher(pictures.cpu()).to(pictures)
        loss = self._distance(self._worst(self._noisy(pictures), goal), goal).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _distance(self, pictures: Tensor, goal: Tensor) -> Tensor:
        image = self.network.encode_image(self.prepare(pictures), normalize=True)  # type: ignore[operator, union-attr]
        return (image - goal).square().sum(1)

    def _worst(self, pictures: Tensor, goal: Tensor) -> Tensor:
        """Pictures moved to where the embedding is farther off, each by no more than a length drawn for it."""
        radius = self.radius * torch.rand(len(pictures), 1, 1, 1, generator=self.generator).to(pictures)
        start = torch.randn(pictures.shape, generator=self.generator).to(pictures)
        change = (start * radius / _length(start)).requires_grad_()
        (slope,) = torch.autograd.grad(self._distance((pictures + change).clamp(0, 1), goal).sum(), change)
        change = change.detach() + 1.25 * radius * slope / _length(slope)
        return (pictures + change * (radius / _length(change)).clamp_max(1)).clamp(0, 1)


def _length(pictures: Tensor) -> Tensor:
    """L2 (b, 1, 1, 1)."""
    return pictures.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def _ema(decay: float):
    """The averaging rule with warm-up, for `AveragedModel`."""

    def average(averaged: Tensor, current: Tensor, seen: Tensor | int) -> Tensor:
        n = float(seen)
        d = min(decay, (1 + n) / (10 + n))
        return torch.lerp(current, averaged, d) if math.isfinite(d) else averaged

    return average


# --- consistency ----------------------------------------------------------------------------------------------------
@dataclass
class _Points:
    """Random triples of times s <= m <= t, states x at s on the paths of a map, and where one jump to t takes them."""

    s: Tensor
    m: Tensor
    t: Tensor
    x: Tensor
    direct: Tensor
    cond: Condition


def _points(flow_map: FlowMap, n: int, cond: Condition, seed: int) -> _Points:
    generator = stream(seed, "consistency")
    times = torch.rand(3, n, generator=generator).sort(0).values
    s, m, t = (time.to(flow_map.device) for time in times)
    cond = move_condition(cond, flow_map.device)
    x0 = torch.randn(n, *flow_map.shape, generator=generator).to(flow_map.device)
    x = flow_map.jump(x0, 0.0, s, cond)
    return _Points(s, m, t, x, flow_map.jump(x, s, t, cond), cond)


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _semigroup(flow_map: FlowMap, p: _Points) -> float:
    return _root_mean_square(flow_map.jump(flow_map.jump(p.x, p.s, p.m, p.cond), p.m, p.t, p.cond) - p.direct)


def semigroup_error(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0) -> float:
    """Root mean square per entry of X_{m,t}(X_{s,m}(x)) - X_{s,t}(x), over n random times, x on the path of the map.

    Args:
        cond: n rows, or None.
    """
    with torch.no_grad():
        return _semigroup(flow_map, _points(flow_map, n, cond, seed))


def consistency_errors(flow_map: FlowMap, n: int, cond: Condition = None, seed: int = 0) -> dict[str, float]:
    """How far a map is from being a flow map, root mean square per entry: `semigroup_error`, and on the same points

    diagonal: |d/dt X_{s,t}(x) - v(X_{s,t}(x), t)|.
    """
    with torch.no_grad():
        p = _points(flow_map, n, cond, seed)
        _, tangent = torch.func.jvp(lambda t: flow_map.jump(p.x, p.s, t, p.cond), (p.t,), (torch.ones_like(p.t),))[:2]
        diagonal = tangent - flow_map.velocity(p.direct, p.t, p.cond)
        return {"semigroup error": _semigroup(flow_map, p), "diagonal error": _root_mean_square(diagonal)}


# --- running ---------------------------------------------------------------------------------------------------------
class SampleGrid(L.Callback):
    """Every ``every`` steps, draws the same seeds in 1, 2, 4 and 8 jumps of the averaged map: ``samples/<step>.png``.

    Args:
        asked: a class or prompt for each column; default each class, or eight columns of none.
    """

    def __init__(self, folder: Path, every: int, asked: Sequence[str | int] = ()) -> None:
        self.folder, self.every, self.asked = folder, every, asked

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        step = trainer.global_step
        if not self.every or step % self.every or not trainer.is_global_zero:
            return
        flow_map = module.averaged()
        asked = self.asked or flow_map.class_names
        n = len(asked) or 8
        cond = flow_map.condition(asked, n) if asked and module.null is not None else None
        pictures = [flow_map.decode(sample(flow_map, n=n, steps=jumps, seeds=0, cond=cond)) for jumps in (1, 2, 4, 8)]
        labels = [f"{jumps} jump{'s' * (jumps > 1)}" for jumps in (1, 2, 4, 8)]
        picture_grid(torch.stack(pictures).cpu(), self.folder / f"{step:07d}.png", row_labels=labels)


class NothingTrainedError(ValueError):
    """A training that left no model."""

    exit_code = 1


def check_trained(module: Trained) -> None:
    """Refuse to call a network trained that is not.

    Raises:
        NothingTrainedError: no step was taken, all were skipped, or the averaged weights are not finite.
    """
    steps = int(module.average.n_averaged)  # type: ignore[arg-type]
    if not steps:
        raise NothingTrainedError("nothing was trained: no step was taken")
    if module.skipped >= steps:
        raise NothingTrainedError(
            f"nothing was trained: all of {steps} steps were skipped, their gradients were not finite; try a smaller "
            "optimizer.lr, or trainer.precision=32-true"
        )
    for name, value in module.ema.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NothingTrainedError(f"the training blew up: {name} is not finite; delete the run, try a smaller optimizer.lr")


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with files.whole(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:
                raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def save_checkpoint(trainer: L.Trainer, folder: Path) -> None:
    """Write ``folder/last.ckpt``; the one before becomes ``previous.ckpt``."""
    last, new = folder / "last.ckpt", folder / "new.ckpt"
    trainer.save_checkpoint(new)
    if trainer.is_global_zero:
        if last.is_file():
            os.replace(last, folder / "previous.ckpt")
        os.replace(new, last)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read, with a line where that is not the newest.

    Raises:
        ValueError: there are some, none of which can be read.
    """
    ends = {"new.ckpt": 0, "last.ckpt": 1, "previous.ckpt": 2}
    torn = ""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: (ends.get(path.name, 3), -path.stat().st_mtime)):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no more than its head
        except Exception as error:  # whatever a torn file makes of it
            torn = torn or f"{path} cannot be read ({str(error).splitlines()[0][:80]})"
            continue
        if torn:
            print(f"{torn}: going on from {path.name}", file=sys.stderr)
        return path
    if torn:
        raise ValueError(f"{torn}, and there is none before it: delete {folder} to train from the start")
    return None


class Checkpoints(L.Callback):
    """Saves a checkpoint every ``every`` updates, and one where a signal stops the run: between two updates, when the average,
    the judgement, the validation and the log of the first are done and nothing of the second is."""

    def __init__(self, folder: Path, every: int, pending: Pending) -> None:
        self.folder, self.every, self.pending = folder, every, pending
        self.saved = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.saved = trainer.global_step
        self.pending.listen()  # Lightning has put a handler of its own before ours

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(bool(self.pending.number), all=False)
        if step > self.saved and (stop or (self.every and step % self.every == 0)):
            save_checkpoint(trainer, self.folder)
            self.saved = step
        if stop:
            raise Stopped(self.pending.number or SIGTERM, f"the run up to step {step} is in {self.folder}")

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning knows how to go on from the end of an update, where it saves by itself: so the count of batches says that
        the last update has just ended, and not that a batch has been fetched since."""
        loops = checkpoint["loops"]["fit_loop"]
        counts = loops["epoch_loop.batch_progress"]
        done = counts["total"]["processed"]
        if counts["total"]["ready"] != done + 1 or counts["total"]["completed"] != done:
            return
        for count in (counts["total"], counts["current"]):
            done = count["processed"]
            count |= {"ready": done, "started": done, "completed": done - 1}
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


class Lines(L.Callback):
    """A line every ``every`` steps, where there is no terminal for a progress bar."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step % self.every == 0 and trainer.is_global_zero:
            values = {name: f"{float(value):.4f}" for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
            print(f"step {trainer.global_step}/{trainer.max_steps}", *(f"{k} {v}" for k, v in values.items()), flush=True)


def fit(
    module: Trained,
    data: L.LightningDataModule,
    folder: Path,
    accelerator: str = "auto",
    devices: str = "auto",
    strategy: str = "auto",
    precision: str = "32-true",
    clip: float = 1.0,
    log_every: int = 20,
    validate_every: int = 1000,
    save_every: int = 200,
    progress: bool = True,
    callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """Train for ``module.steps`` steps, continuing from ``folder/checkpoints/last.ckpt`` where there is one.

    Logs to ``folder/metrics.jsonl``, which `history` reads, and to tensorboard where it is installed. ``callbacks`` come before
    the checkpoints; ``validate_every`` 0 is never; the remaining arguments are the Trainer's.
    """
    loggers: list[Any] = [Metrics(folder)]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if module.steps < 1:
        raise NothingTrainedError(f"nothing was trained: optimizer.steps={module.steps}")
    kept = folder / "checkpoints"
    with held() as pending:
        shown = RichProgressBar(refresh_rate=1) if progress else Lines(10 * log_every)
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=int(devices) if devices.isdigit() else devices,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            max_steps=module.steps,
            max_epochs=-1,
            gradient_clip_val=clip,
            log_every_n_steps=log_every,
            val_check_interval=validate_every or None,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=loggers,
            plugins=[WholeCheckpoints()],
            callbacks=[*callbacks, shown, Checkpoints(kept, save_every, pending)],
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
        newest = newest_checkpoint(kept)
        trainer.fit(module, data, ckpt_path=None if newest is None else str(newest), weights_only=True)
        save_checkpoint(trainer, kept)
    if pending.number:  # it came in the last update
        raise Stopped(pending.number, f"all {module.steps} steps are in {kept}")
    if validate_every:
        trainer.validate(module, data, verbose=False)
    return trainer


class Metrics(Logger):
    """Appends what is logged to ``folder/metrics.jsonl``, a line at a time: a kill cuts the last line at most."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "metrics.jsonl"
        self.begun = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self.begun:
            files.drop_cut_line(self.file)
            self.begun = True
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}}) + "\n")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""


def history(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """What `fit` logged to a run folder, {name: (steps, values)}; where a continued run repeats a step, the later counts."""
    merged: dict[str, dict[int, float]] = {}
    file = Path(folder) / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():  # a kill cuts the last line
        row = json.loads(line)
        for name in row.keys() - {"step", "epoch"}:
            merged.setdefault(name, {})[row["step"]] = row[name]
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in sorted(merged.items())}
