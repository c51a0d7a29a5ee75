"""The run of a training: from where it stopped, with its log, its checkpoints and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from steerfm.processes import of_first
from steerfm.signals import Stopped, held
from steerfm.training.checkpoints import Checkpoints, WholeCheckpoints, newest_checkpoint, save_checkpoint
from steerfm.training.connection import connection
from steerfm.training.log import Lines, loggers
from steerfm.training.module import Trained
from steerfm.training.sharding import whole_weights


class NothingTrainedError(ValueError):
    """A training that left no model."""

    exit_code = 1


def check_trained(module: Trained) -> None:
    """Refuse to call a network trained that is not.

    Raises:
        NothingTrainedError: no step was taken, all were skipped, or the averaged weights are not finite.
    """
    steps = int(module.average.get_buffer("n_averaged"))
    if not steps:
        raise NothingTrainedError("nothing was trained: no step was taken")
    if module.skipped >= steps:
        raise NothingTrainedError(
            f"nothing was trained: all of {steps} steps were skipped, their gradients were not finite; try a smaller "
            "optimizer.lr, or trainer.precision=32-true"
        )
    for name, value in whole_weights(module.ema.state_dict()).items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NothingTrainedError(f"the training blew up: {name} is not finite; delete the run, try a smaller optimizer.lr")


def fit(
    module: Trained,
    data: L.LightningDataModule,
    folder: Path,
    *,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: Any = "32-true",
    clip: float = 1.0,
    log_every: int = 20,
    validate_every: int = 1000,
    save_every: int = 200,
    progress: bool = True,
    callbacks: Sequence[L.Callback] = (),
    logger: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> L.Trainer:
    """Train for ``module.steps`` steps, continuing from the newest of ``folder/checkpoints`` where there is one.

    Logs to ``folder/metrics.jsonl``, which `history` reads.

    Args:
        module: what is trained.
        data: batches for it.
        folder: of the run.
        accelerator, devices, num_nodes, strategy, precision: the Trainer's own. In processes that are connected already
            (`steerfm.distributed.launch`) all of them train.
        clip: largest norm of a gradient.
        log_every: steps from one line of the log to the next.
        validate_every: steps; 0 is never.
        save_every: steps from one checkpoint to the next; 0 is at the end only.
        progress: a bar; otherwise a line now and then.
        callbacks: called before a checkpoint is written.
        logger: where to log as well: csv, tensorboard, wandb, or auto for tensorboard where it is installed.
        settings: what the run was asked for, for tensorboard and wandb.

    Raises:
        NothingTrainedError: no steps. ValueError: the logger's package is not installed.
        Stopped: a signal stopped the run; its checkpoint is there.
    """
    if module.steps < 1:
        raise NothingTrainedError(f"nothing was trained: optimizer.steps={module.steps}")
    kept = folder / "checkpoints"
    with loggers(logger, folder, settings or {}) as places:
        with held() as pending:
            shown = RichProgressBar(refresh_rate=1) if progress else Lines(10 * log_every)
            trainer = L.Trainer(
                **connection(devices, num_nodes, strategy, WholeCheckpoints()),
                accelerator=accelerator,
                precision=precision,
                max_steps=module.steps,
                max_epochs=-1,
                gradient_clip_val=clip,
                log_every_n_steps=log_every,
                val_check_interval=validate_every or None,
                check_val_every_n_epoch=None,
                num_sanity_val_steps=0,
                logger=places,
                callbacks=[*callbacks, shown, Checkpoints(kept, save_every, pending)],
                enable_checkpointing=False,
                enable_progress_bar=progress,
                enable_model_summary=False,
            )
            newest = of_first(lambda: newest_checkpoint(kept))
            trainer.fit(module, data, ckpt_path=None if newest is None else str(newest), weights_only=True)
            save_checkpoint(trainer, kept)
        if pending.number:  # it came in the last update
            raise Stopped(pending.number, f"all {module.steps} steps are in {kept}")
        if validate_every:
            trainer.validate(module, data, verbose=False)
    return trainer
