"""What a training logs: lines of metrics.jsonl, lines on a screen that is no terminal, and the reading of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from steerfm import files


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


class Lines(L.Callback):
    """A line every ``every`` steps, where there is no terminal for a progress bar."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and trainer.is_global_zero:
            values = {name: f"{float(value):.4f}" for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
            print(f"step {trainer.global_step}/{trainer.max_steps}", *(f"{k} {v}" for k, v in values.items()), flush=True)


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
