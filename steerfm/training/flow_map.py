"""Training of flow maps, and pictures of how they come on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from steerfm.capabilities import can
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.networks import posterior_weights
from steerfm.randomness import stream
from steerfm.report.pictures import picture_grid
from steerfm.rows import Condition, replace_rows, take_rows
from steerfm.sampling import sample
from steerfm.training.log import log_picture
from steerfm.training.module import Trained
from steerfm.training.objectives import DRAWS, FlowMatching, Objective, Trajectory


class FlowMapTraining(Trained):
    """Train a flow map: flow matching on the diagonal, self-distillation off it (Boffi et al. 2505.18825).

    Each batch is split: a share goes to the off-diagonal objective, the rest to flow matching. Both are averaged over the
    whole batch, so the shares are the weights.

    Args:
        flow_map: the map; its network is trained in place. With a ``posterior_rank`` and objectives of draws only, all weights
            that other calls use are frozen.
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
        if sum(off_diagonal.values()) > 1:
            raise ValueError(f"shares of the off-diagonal objectives sum to {sum(off_diagonal.values())}, above 1")
        network = flow_map.network
        draws = sum(share for objective, share in off_diagonal.items() if isinstance(objective, DRAWS))
        if draws == 1 and start == 0 and getattr(network, "posterior_rank", 0):
            of_draws = posterior_weights(network)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name in of_draws)
        super().__init__(network, **options)
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
        if any(size > 0 and isinstance(objective, DRAWS) for objective, size in zip(parts, sizes)):
            return total
        unused = posterior_weights(flow_map.body).values()
        return total + 0.0 * sum(
            p.sum() for p in unused if p.requires_grad
        )  # processes wait for the gradient of each parameter

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


def grid_rows(module: Any, flow_map: FlowMap, asked: Sequence[str | int] = ()) -> tuple[int, Condition]:
    """How many samples show a map that a module trains, and the condition of each, n rows.

    Args:
        asked: a class or prompt for each; default each class, or eight of none.
    """
    asked = asked or flow_map.class_names
    n = len(asked) or 8
    return n, flow_map.condition(asked, n) if asked and module.null is not None else None


def posterior_pictures(
    flow_map: FlowMap, x_t: Tensor, t: float, cond: Condition, draws: int, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """A row of states, one of the jumps from them, and some of draws of what they may become; with the names of the rows.

    Args:
        x_t: (n, *shape) states.
        t: their time.
        draws: rows of draws.

    Returns:
        (2 + draws, n, c, h, w), and 2 + draws names.
    """
    noise = torch.randn(draws, *x_t.shape, generator=stream(seed, "posteriors")).to(x_t)
    with torch.no_grad():
        rows = [x_t, flow_map.lookahead(x_t, t, cond), *(flow_map.posterior(x_t, t, z, cond) for z in noise)]
    names = [f"t = {t:g}", "one jump", *(f"draw {i + 1}" for i in range(draws))]
    return torch.stack([flow_map.decode(row) for row in rows]), names


class SampleGrid(L.Callback):
    """Every ``every`` steps, draws the same seeds in 1, 2, 4 and 8 jumps of the averaged map: ``samples/<step>.png``.

    Of a map with posteriors also what noised samples may become, in one call each: ``samples/<step>-posterior.png``.

    Args:
        asked: a class or prompt for each column; default each class, or eight columns of none.
    """

    def __init__(self, folder: Path, every: int, asked: Sequence[str | int] = ()) -> None:
        self.folder, self.every, self.asked = folder, every, asked

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not self.every or step % self.every or not trainer.is_global_zero:
            return
        flow_map = pl_module.averaged()
        n, cond = grid_rows(pl_module, flow_map, self.asked)
        samples = {jumps: sample(flow_map, n=n, steps=jumps, seeds=0, cond=cond) for jumps in (1, 2, 4, 8)}
        labels = [f"{jumps} jump{'s' * (jumps > 1)}" for jumps in samples]
        file = self.folder / f"{step:07d}.png"
        picture_grid(torch.stack([flow_map.decode(x) for x in samples.values()]).cpu(), file, row_labels=labels)
        log_picture(trainer, "samples", file, step)
        if can(flow_map, "posterior"):
            x1, t = samples[4], 0.3
            noise = torch.randn(x1.shape, generator=stream(0, "states")).to(x1)
            grid, labels = posterior_pictures(flow_map, flow_map.interpolant.interpolate(noise, x1, t), t, cond, 4)
            file = self.folder / f"{step:07d}-posterior.png"
            picture_grid(grid.cpu(), file, row_labels=labels)
            log_picture(trainer, "posteriors", file, step)
