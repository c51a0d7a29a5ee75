"""Evaluation during fine-tuning: fixed seeds and tasks, a held-out reward, and a guard against reward hacking."""

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
    """Metrics of one sampler on the fixed evaluation seeds.

    Attributes:
        reward: mean reward.
        held_out: mean held-out reward; None without a judge.
        diversity: mean distance of two samples of the same class, divided by that of the base in that class.
        support: share of the samples among those of the base, of any class (precision, k = 5).
        distance: Fréchet distance of the features to samples of the base with the same classes in the same shares.
        pictures: the decoded samples.
        scores: (n,) the score that counts: held-out rewards, or rewards without a judge.
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
        """Mean difference of `scores` to another sampler on the same seeds and tasks, and half its 95% interval."""
        return interval(self.scores - other.scores)

    @property
    def counts(self) -> float:
        """The mean of the score that counts."""
        return self.reward if self.held_out is None else self.held_out


@dataclass
class Panel:
    """Evaluates samplers on fixed seeds and tasks.

    Attributes:
        base: the map before tuning.
        reward: the reward to optimise.
        judge: the held-out reward; None: the reward itself counts.
        tasks: of the n samples, one each.
        support: tasks of the base's samples for comparison, with all classes of the base.
        features: maps pictures or vectors to features (n, d).
        classes: maps pictures to class indices (n,); None for one class.
        seeds: first seed of the samples; the base's samples have other seeds.
        jumps: number of jumps of the base's samples; None for its default.

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
    _base_features: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_held_out(self.reward, self.judge)

    @property
    def counts(self) -> str:
        """The name of the score that counts: "held_out", or "reward" without a judge."""
        return "reward" if self.judge is None else "held_out"

    def place(self, device: torch.device | str) -> None:
        """Move the base and the rewards; features are computed on the CPU."""
        self.base.to(device)
        for reward in (self.reward, self.judge):
            if reward is not None:
                place(reward, torch.device(device))

    def measure(self, law: Law, k: int = 1) -> Reading:
        """Evaluate a sampler; with k > 1 the best of k samples by the reward, for each task and seed."""
        base = shared_out(self.base)
        x = draw(law, self.tasks, base, [self.seeds + i for i in range(self.tasks.n)], k)
        with torch.no_grad():
            r = self._score(self.reward, x, k)
            if k > 1:
                best = r.view(-1, k).argmax(1)
                rows = torch.arange(self.tasks.n, device=x.device) * k + best
                x, r = x[rows], r[rows]
            judge_scores = None if self.judge is None else self._score(self.judge, x)
            pictures = base.decode(x)
            f, c = self._look(pictures, self.tasks)
        base_features, classes = self._reference()
        return Reading(
            r.mean().item(), None if judge_scores is None else judge_scores.mean().item(), self._diversity(f, c),
            precision(f, base_features), self._distance(f, c, base_features, classes), pictures.cpu(),
            (r if judge_scores is None else judge_scores).cpu(),
        )  # fmt: skip

    def _score(self, reward: Reward, x: Tensor, k: int = 1) -> Tensor:
        return self.tasks.repeat(k).score(shared_out(self.base), reward, x)

    def _look(self, pictures: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Features and classes, computed by the first process for all, so that all take the same decisions."""
        return of_first(lambda: self._features(pictures, tasks))

    def _features(self, pictures: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Features and classes; without a classifier, samples of one prompt are a class, or all samples."""
        pictures = pictures.cpu().float().clone()  # user code may write into them
        f = torch.cat([self.features(part).flatten(1) for part in pictures.split(256)])
        if self.classes is not None:
            return f, torch.cat([self.classes(part) for part in pictures.split(256)])
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(self.support.prompts or ()))}
        if tasks.prompts is None or not numbers:
            return f, torch.zeros(len(f), dtype=torch.long)
        return f, torch.tensor([numbers[prompt] for prompt in tasks.prompts])

    def _reference(self) -> tuple[Tensor, Tensor]:
        """Features and classes of the base's samples."""
        if self._base_features is None:
            seeds = [derive(self.seeds, "support", 0, i) for i in range(self.support.n)]
            with torch.no_grad():
                base = shared_out(self.base)
                x = draw(chain(self.jumps)(base), self.support, base, seeds)
                self._base_features = self._look(base.decode(x), self.support)
        return self._base_features

    def _diversity(self, f: Tensor, c: Tensor) -> float:
        """Relative diversity over all pairs of the same class; NaN if there are none."""
        base_features, classes = self._reference()
        total = expected = 0.0
        for label in c.unique():
            mine, theirs = f[c == label], base_features[classes == label]
            if len(mine) >= 2 and len(theirs) >= 2:
                pairs = len(mine) * (len(mine) - 1)
                total, expected = total + pairs * pairwise_diversity(mine), expected + pairs * pairwise_diversity(theirs)
        return total / expected if expected else float("nan")

    @staticmethod
    def _distance(f: Tensor, c: Tensor, base_features: Tensor, classes: Tensor) -> float:
        present = [label for label in c.unique() if (classes == label).sum() >= 4]
        if not present:
            return float("inf")
        least = min(int((classes == label).sum()) * len(c) / int((c == label).sum()) for label in present)
        parts = []  # base samples with the class shares of the tuned samples
        for label in present:
            share = int((c == label).sum()) / len(c)
            parts.append(base_features[classes == label][: max(2, round(share * least))])
        return sample_distance(f, torch.cat(parts))


def control_cost(tuned: FlowMap, base: FlowMap, tasks: Tasks, seeds: int = 0) -> float:
    """Mean over samples of sum_i h_i |u(x_i) - u_base(x_i)|^2 / 2 along the tuned map's jumps, mean over entries.

    u is the velocity of the jump between consecutive times; for a map that only jumps to the data, of that jump.
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
    """Evaluates the averaged map every ``every`` steps, keeps the best good one, and stops the run early.

    A model is good if its diversity and support are at least ``floor`` times those of the base. (The base's diversity counts
    as at most 1.) The run stops after ``patience`` evaluations in a row without a better good model. Files:
    ``samples/<step>.png``, ``averaged/<step>.safetensors``.

    Args:
        panel: evaluates the models.
        base: the panel's reading of the base.
        folder: of the run; None to write no files.
        every: steps between evaluations.
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
            raise ValueError(
                f"panel seeds from {self.panel.seeds}: training uses seeds of 128 bits, so give smaller ones to the panel"
            )
        with pl_module.together():
            pl_module.place(pl_module.device)
            self.panel.place(pl_module.device)
        if self.reason:  # the run had stopped before it was started again
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
        cost = {"reward_calls": float(module.spent.reward_calls), "seconds": module.spent.seconds}
        cost["evaluations"] = float(module.spent.evaluations)
        is_good = not self._off(numbers)
        self.rows.append({"step": float(step), **numbers, **cost, "kept": float(is_good)})
        counts = self.panel.counts
        best = next((row[counts] for row in self.rows if row["step"] == self.best_step), None)
        if not self.patience or best is None or (is_good and numbers[counts] > best):  # the first is the base itself
            self.best_step = step
            self.best_weights = {name: value.cpu().clone() for name, value in module.learnt().items()}
        without_gain = sum(row["step"] > self.best_step for row in self.rows)
        if self.patience and without_gain >= self.patience and step < module.steps:
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
        """Names of the metrics that are too low; NaN does not count."""
        n, share = self.panel.tasks.n, self.base.support
        least = {"diversity": self.floor * min(1.0, self.base.diversity), "support": self.floor * share}
        least["support"] -= (share * (1 - share) / n) ** 0.5  # minus a standard error, as a share of n samples
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
        """Restore the best averaged weights, and move everything to the device of the module."""
        module.place(module.device)
        self.panel.place(module.device)
        if self.best_weights:
            put(module.ema, self.best_weights)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the state before the step that failed, so that a later start can resume."""
        if isinstance(exception, RewardError) and self.folder is not None and trainer.global_step:
            save_checkpoint(trainer, self.folder / "checkpoints")

    @property
    def kept_base(self) -> bool:
        """Whether no tuned model was better than the base."""
        return self.patience > 0 and self.best_step <= 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best_step": self.best_step, "best_weights": self.best_weights, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best_step = state_dict["rows"], state_dict["best_step"]
        self.best_weights, self.reason = state_dict["best_weights"], state_dict["reason"]
