"""How a fine-tuning run is watched: the same seeds and tasks for every model, a held-out reward, a guard against hacking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from steerfm.capabilities import can
from steerfm.files import write_tensors
from steerfm.finetuning.base import Law, Tasks, chain, draw
from steerfm.finetuning.module import FineTuning
from steerfm.flowmap import FlowMap
from steerfm.held_out import IN_WORDS, check_held_out
from steerfm.metrics import interval, pairwise_diversity, precision, sample_distance, semigroup_error
from steerfm.processes import of_first
from steerfm.randomness import derive, is_derived
from steerfm.report.pictures import picture_grid
from steerfm.rewards import Reward, RewardError
from steerfm.rows import move_condition
from steerfm.sampling import Noise
from steerfm.spread import place, shared_out
from steerfm.training import log_picture, save_checkpoint
from steerfm.training.sharding import put
from steerfm.transitions import usual

Features = Callable[[Tensor], Tensor]


@dataclass
class Reading:
    """What a law was found to be, on the panel.

    Attributes:
        reward, held_out: means; held_out is None where there is no judge.
        diversity: mean distance of two samples of the same class, relative to the base's in that class.
        support: share of the samples that lie among the base's, of any class (precision, k = 5).
        distance: Fréchet distance of the features to the base's samples of the same classes in the same shares.
        pictures: the samples, decoded.
        scores: (n,) what counts of them: the held-out rewards, or the rewards.
    """

    reward: float
    held_out: float | None
    diversity: float
    support: float
    distance: float
    pictures: Tensor
    scores: Tensor

    def numbers(self) -> dict[str, float]:
        """The means, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}

    def over(self, other: Reading) -> tuple[float, float]:
        """Mean difference of what counts to another law's on the same seeds and tasks, and half its 95% interval."""
        return interval(self.scores - other.scores)

    @property
    def counts(self) -> float:
        """The mean of what counts."""
        return self.reward if self.held_out is None else self.held_out


@dataclass
class Panel:
    """Judges laws on fixed seeds and tasks.

    Attributes:
        base: the map before tuning.
        reward: what is optimised.
        judge: what is not; None for none, and then the reward is all that counts.
        tasks: of the n samples, one each.
        support: tasks of the samples of the base that others are compared with, of every class that it knows.
        features: pictures or vectors to (n, d).
        classes: to (n,) class indices, or None for one class.
        seeds: of the samples; those of the comparison are others.
        jumps: that samples of the base take; None for as many as are usual for it.

    Raises:
        RewardError: the judge is the reward itself, or shares weights with it.
    """

    base: FlowMap
    reward: Reward
    judge: Reward | None
    tasks: Tasks
    support: Tasks
    features: Features
    classes: Features | None = None
    seeds: int = 0
    jumps: int | None = None
    _known: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_held_out(self.reward, self.judge)

    @property
    def counts(self) -> str:
        """The name of what counts: "held_out", or "reward" where there is no judge."""
        return "reward" if self.judge is None else "held_out"

    def place(self, device: torch.device | str) -> None:
        """Move the base and the rewards; features are computed on the CPU."""
        self.base.to(device)
        for reward in (self.reward, self.judge):
            if reward is not None:
                place(reward, torch.device(device))

    def measure(self, law: Law, k: int = 1) -> Reading:
        """Judge a law; with k > 1 the best of k samples by the reward, of each task and seed."""
        base = shared_out(self.base)
        x = draw(law, self.tasks, base, [self.seeds + i for i in range(self.tasks.n)], k)
        with torch.no_grad():
            r = self._score(self.reward, x, k)
            if k > 1:
                best = r.view(-1, k).argmax(1)
                rows = torch.arange(self.tasks.n, device=x.device) * k + best
                x, r = x[rows], r[rows]
            held = None if self.judge is None else self._score(self.judge, x)
            pictures = base.decode(x)
            f, c = self._look(pictures, self.tasks)
        known, classes = self._reference()
        return Reading(
            r.mean().item(), None if held is None else held.mean().item(), self._diversity(f, c), precision(f, known),
            self._distance(f, c, known, classes), pictures.cpu(), (r if held is None else held).cpu(),
        )  # fmt: skip

    def _score(self, reward: Reward, x: Tensor, k: int = 1) -> Tensor:
        return self.tasks.repeat(k).score(shared_out(self.base), reward, x)

    def _look(self, pictures: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Features and classes, which the first process makes for all: what they decide is the same everywhere."""
        return of_first(lambda: self._features(pictures, tasks))

    def _features(self, pictures: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Features and classes; without a classifier a class is what was asked for, in words, or everything."""
        pictures = pictures.cpu().float().clone()  # lent
        f = torch.cat([self.features(part).flatten(1) for part in pictures.split(256)])
        if self.classes is not None:
            return f, torch.cat([self.classes(part) for part in pictures.split(256)])
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(self.support.prompts or ()))}
        if tasks.prompts is None or not numbers:
            return f, torch.zeros(len(f), dtype=torch.long)
        return f, torch.tensor([numbers[prompt] for prompt in tasks.prompts])

    def _reference(self) -> tuple[Tensor, Tensor]:
        """Features and classes of the base's samples."""
        if self._known is None:
            seeds = [derive(self.seeds, "support", 0, i) for i in range(self.support.n)]
            with torch.no_grad():
                base = shared_out(self.base)
                x = draw(chain(self.jumps)(base), self.support, base, seeds)
                self._known = self._look(base.decode(x), self.support)
        return self._known

    def _diversity(self, f: Tensor, c: Tensor) -> float:
        """Over all pairs of the same class; NaN where there is none."""
        known, classes = self._reference()
        found = expected = 0.0
        for label in c.unique():
            mine, theirs = f[c == label], known[classes == label]
            if len(mine) >= 2 and len(theirs) >= 2:
                pairs = len(mine) * (len(mine) - 1)
                found, expected = found + pairs * pairwise_diversity(mine), expected + pairs * pairwise_diversity(theirs)
        return found / expected if expected else float("nan")

    @staticmethod
    def _distance(f: Tensor, c: Tensor, known: Tensor, classes: Tensor) -> float:
        present = [label for label in c.unique() if (classes == label).sum() >= 4]
        if not present:
            return float("inf")
        least = min(int((classes == label).sum()) * len(c) / int((c == label).sum()) for label in present)
        parts = []  # as many of each class as keeps the shares of the tuned samples
        for label in present:
            share = int((c == label).sum()) / len(c)
            parts.append(known[classes == label][: max(2, round(share * least))])
        return sample_distance(f, torch.cat(parts))


def control_cost(tuned: FlowMap, base: FlowMap, tasks: Tasks, seeds: int = 0) -> float:
    """Mean over samples of sum_i h_i |u(x_i) - u_base(x_i)|^2 / 2 along the tuned map's jumps, mean over entries.

    u is that of the jump from one time to the next; of a map that jumps to the data only, that of the jump there.
    """
    cond = move_condition(tasks.cond, tuned.device)
    total, velocity = 0.0, can(tuned, "velocity")
    with torch.no_grad():
        noise = Noise([seeds + i for i in range(tasks.n)])
        x = noise.start(tuned)
        for s, t in pairwise(tuned.grid(tuned.steps)):
            to = t if velocity else 1.0
            after = tuned.jump(x, s, to, cond)
            miss = (after - base.jump(x, s, to, cond)).square().mean() / (2 * (to - s))
            total += miss.item() * ((t - s) / (to - s))
            if to != t:
                step = usual(tuned).step(tuned, x, s, t, cond, after)
                after = step.sample(noise.normal(tuned.shape, x) if step.std else None)
            x = after
    return total


class Monitor(L.Callback):
    """Judges the averaged map every ``every`` steps, keeps the best that is neither narrower nor off the data, and stops.

    A model may be kept while its diversity and support are at least ``floor`` times those of the base (1 where the base,
    without a class, is more diverse in a class than the samples that are asked for it). The run stops after ``patience``
    judgements in a row that brought no better one. Files: ``samples/<step>.png``, ``averaged/<step>.safetensors``.

    Args:
        panel: what judges.
        base: the panel's reading of the base.
        folder: of the run; None to write nothing.
        every: steps.
        floor: see above.
        patience: see above; 0 never stops and keeps the last model.
    """

    def __init__(
        self, panel: Panel, base: Reading, folder: Path | None, every: int = 20, floor: float = 0.9, patience: int = 5
    ) -> None:
        self.panel, self.base, self.folder, self.every, self.floor, self.patience = panel, base, folder, every, floor, patience
        self.rows: list[dict[str, float]] = []
        self.best_step, self.best_weights, self.reason = -1, {}, ""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if is_derived(self.panel.seeds + self.panel.tasks.n - 1):
            raise ValueError(f"panel seeds from {self.panel.seeds}: seeds of 128 bits are trained on, hold out smaller ones")
        with pl_module.together():
            pl_module.place(pl_module.device)
            self.panel.place(pl_module.device)
        if self.reason:  # a run that was stopped and started again
            trainer.should_stop = True
        elif not self.rows:
            self._judge(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if (step % self.every == 0 or step >= pl_module.steps) and (not self.rows or self.rows[-1]["step"] < step):
            self._judge(trainer, pl_module)

    def _judge(self, trainer: L.Trainer, module: FineTuning) -> None:
        step, tasks = trainer.global_step, self.panel.tasks
        with module.together():
            reading = self.panel.measure(module.law())
            numbers = reading.numbers()
            if can(self.panel.base, "two_time"):
                numbers["semigroup"] = semigroup_error(shared_out(module.averaged()), tasks.n, tasks.cond)
        module.log_dict({f"val/{name}": value for name, value in numbers.items()} if step else {})
        spent = {"reward_calls": float(module.spent.reward_calls), "seconds": module.spent.seconds}
        spent["evaluations"] = float(module.spent.evaluations)
        kept = not self._off(numbers)
        self.rows.append({"step": float(step), **numbers, **spent, "kept": float(kept)})
        counts = self.panel.counts
        best = next((row[counts] for row in self.rows if row["step"] == self.best_step), None)
        if not self.patience or best is None or (kept and numbers[counts] > best):  # at first it is the base itself
            self.best_step = step
            self.best_weights = {name: value.cpu().clone() for name, value in module.learnt().items()}
        waited = sum(row["step"] > self.best_step for row in self.rows)
        if self.patience and waited >= self.patience and step < module.steps:
            last = [row for row in self.rows if row["step"] > self.best_step]
            off = self._off(last[-1])
            fell = ", ".join(f"{name} fell to {last[-1][name]:.2f}" for name in off)
            stood = f"the {IN_WORDS[counts]} no longer rose"
            self.reason = f"stopped at step {step}: {fell or stood}; kept step {self.best_step}"
            trainer.should_stop = True
        weights = module.learnt()  # of all processes
        if self.folder is not None and trainer.is_global_zero:
            self._write(trainer, reading, weights)

    def _off(self, numbers: dict[str, float]) -> list[str]:
        """What is too low; what cannot be told, for want of samples, is not."""
        n, share = self.panel.tasks.n, self.base.support
        least = {"diversity": self.floor * min(1.0, self.base.diversity), "support": self.floor * share}
        least["support"] -= (share * (1 - share) / n) ** 0.5  # it is a share of n samples: a standard error
        return [name for name, value in least.items() if numbers[name] < value]

    def _write(self, trainer: L.Trainer, reading: Reading, weights: Mapping[str, Tensor]) -> None:
        assert self.folder is not None
        step = trainer.global_step
        half = {name: value.half().cpu().contiguous() for name, value in weights.items()}
        write_tensors(self.folder / "averaged" / f"{step:06d}.safetensors", half)
        if reading.pictures.ndim == 4:
            file = self.folder / "samples" / f"{step:06d}.png"
            picture_grid(reading.pictures[None, :10], file, [f"step {step}"])
            log_picture(trainer, "samples", file, step)
            some = {"pictures": reading.pictures[:10].half().contiguous()}
            write_tensors(self.folder / "samples" / f"{step:06d}.safetensors", some)

    def restore(self, module: FineTuning) -> None:
        """Put the best averaged weights back; everything moves to where Lightning leaves the module."""
        module.place(module.device)
        self.panel.place(module.device)
        if self.best_weights:
            put(module.ema, self.best_weights)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The state before the step that failed is what a later start goes on from."""
        if isinstance(exception, RewardError) and self.folder is not None and trainer.global_step:
            save_checkpoint(trainer, self.folder / "checkpoints")

    @property
    def kept_base(self) -> bool:
        """Whether nothing that was learnt was better than the base."""
        return self.patience > 0 and self.best_step <= 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best_step": self.best_step, "best_weights": self.best_weights, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best_step = state_dict["rows"], state_dict["best_step"]
        self.best_weights, self.reason = state_dict["best_weights"], state_dict["reason"]
