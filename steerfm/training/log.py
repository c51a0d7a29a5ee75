"""What a training logs: lines of metrics.jsonl, lines on a screen that is no terminal, and the reading of them; on request a
table, tensorboard or wandb beside them."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from steerfm import files

LOGGERS = ("auto", "csv", "tensorboard", "wandb")
"""What `fit` can write to beside metrics.jsonl; auto is tensorboard where it is installed."""


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


def check_logger(logger: str) -> None:
    """Whether a run can be logged so.

    Raises:
        ValueError: no such logger, or its package is not installed; with what to do.
    """
    if logger not in LOGGERS:
        raise ValueError(f"logger={logger}: there are {', '.join(LOGGERS)}")
    if logger in ("tensorboard", "wandb") and not importlib.util.find_spec(logger):
        raise ValueError(f"logger={logger}: {logger} is not installed: pip install 'steerfm[{logger}]'")


@contextmanager
def loggers(logger: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Logger]]:
    """The loggers of a run; closed at the end of it, whatever ended it.

    ``folder/metrics.jsonl`` is always written: it is what `history` reads. Beside it: csv, its table ``metrics.csv``;
    tensorboard, ``folder/tensorboard``; wandb, ``folder/wandb``, offline unless WANDB_MODE says otherwise, and one run of
    wandb's however often it was started.

    Args:
        logger: one of `LOGGERS`.
        settings: what the run was asked for, shown beside its curves.

    Raises:
        ValueError: as `check_logger`.
    """
    check_logger(logger)
    if logger == "auto" and importlib.util.find_spec("tensorboard"):
        logger = "tensorboard"
    more: list[Logger] = []
    if logger == "tensorboard":
        more = [TensorBoardLogger(folder, name="", version="tensorboard")]
    if logger == "wandb":
        more = [WandbLogger(experiment=_wandb_run(folder))]
    for one in more:
        one.log_hyperparams(dict(settings))
    try:
        yield [Metrics(folder), *more]
    finally:
        if logger == "csv":
            _write_table(folder)
        if logger == "wandb":
            _finish_wandb()


@rank_zero_only
def _wandb_run(folder: Path) -> Any:
    import wandb

    file = folder / "wandb-id"
    if not file.is_file():
        files.write(file, secrets.token_hex(4))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "steerfm"),
        name="-".join(folder.resolve().parts[-2:]),
        dir=folder,
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


@rank_zero_only
def _finish_wandb() -> None:
    import wandb

    wandb.finish()


@rank_zero_only
def _write_table(folder: Path) -> None:
    curves = history(folder)
    rows = {step: {name: "" for name in curves} for steps, _ in curves.values() for step in steps}
    for name, (steps, values) in curves.items():
        for step, value in zip(steps, values):
            rows[step][name] = repr(value)
    text = io.StringIO()
    table = csv.DictWriter(text, ["step", *curves], lineterminator="\n")
    table.writeheader()
    table.writerows({"step": step, **rows[step]} for step in sorted(rows))
    files.write(folder / "metrics.csv", text.getvalue())


def log_picture(trainer: L.Trainer, name: str, file: Path, step: int) -> None:
    """Show a picture of a step where the run is logged, if there are pictures there."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)], step)


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
