"""Checkpoints of a training that are whole or not there, the newest that can be read, and one where a signal stops the run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from signal import SIGTERM
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from steerfm import files
from steerfm.signals import Pending, Stopped


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

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.saved = trainer.global_step
        self.pending.listen()  # Lightning has put a handler of its own before ours

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(bool(self.pending.number), all=False)
        if step > self.saved and (stop or (self.every and step % self.every == 0)):
            save_checkpoint(trainer, self.folder)
            self.saved = step
        if stop:
            raise Stopped(self.pending.number or SIGTERM, f"the run up to step {step} is in {self.folder}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
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
