"""Where a training logs beside metrics.jsonl: a table, tensorboard, wandb."""

from __future__ import annotations

import csv
import importlib.util
import struct
from pathlib import Path

import lightning as L
import pytest
import torch
import wandb
from torch.utils.data import DataLoader
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

from steerfm import files
from steerfm.cli import main
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import UNet
from steerfm.training import FlowMapTraining, SampleGrid, fit, history


class Grey(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        pictures = [(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4))] * 9
        return DataLoader(pictures, batch_size=None)  # type: ignore[arg-type]


def train(folder: Path, steps: int, logger: str) -> None:
    flow_map = NeuralFlowMap(UNet(1, widths=(8,), attention=False), (1, 8, 8))
    fit(
        FlowMapTraining(flow_map, {}, steps=steps, warmup=1), Grey(), folder, accelerator="cpu", log_every=1,
        validate_every=0, save_every=2, progress=False, callbacks=[SampleGrid(folder / "samples", 2)], logger=logger,
        settings={"lr": {"peak": 3}},
    )  # fmt: skip


def test_a_table_holds_the_history_of_all_starts(tmp_path):
    for steps in (2, 4):
        train(tmp_path, steps, "csv")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = history(tmp_path)
    assert "train/loss" in curves and rows[0].keys() == {"step", *curves}
    for name, (steps, values) in curves.items():
        assert [(int(row["step"]), float(row[name])) for row in rows if row[name]] == list(zip(steps, values))
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_gets_the_curves_the_pictures_and_the_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, 4, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    events.Reload()
    shown = {(event.step, event.value) for event in events.Scalars("train/loss")}
    assert shown == set(zip(*history(tmp_path)["train/loss"]))
    assert [event.step for event in events.Images("samples")] == [2, 4]
    assert "lr:\n  peak: 3" in (tmp_path / "tensorboard" / "hparams.yaml").read_text()


def test_wandb_is_offline_and_one_run_however_often_it_was_started(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for steps in (2, 4):
        train(tmp_path, steps, "wandb")
    wandb.teardown()  # its service writes on after a run has ended
    starts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    (name,) = {start.name.split("-")[-1] for start in starts}
    assert len(starts) == 2 and name == (tmp_path / "wandb-id").read_text()
    records = [record for start in starts for record in stored(next(start.glob("*.wandb")))]
    logged = [{item.key or "/".join(item.nested_key): item.value_json for item in row.history.item} for row in records]
    losses = [float(row["train/loss"]) for row in logged if "train/loss" in row]
    assert losses == pytest.approx(history(tmp_path)["train/loss"][1])
    assert sum(len(list(start.glob("files/media/images/samples*.png"))) for start in starts) == 2
    assert any(item.key == "lr" for row in records for item in (*row.config.update, *row.run.config.update))
    files.clear(tmp_path)
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb-id").exists()


def stored(file: Path) -> list[Record]:
    """The records of a file of wandb's: a log in blocks of 32 KiB, a record in parts of a header and bytes."""
    content, at, parts, records = file.read_bytes(), 7, b"", []
    while at < len(content):
        if (left := -at % 2**15) and left < 7:  # no room for a header
            at += left
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts, at = parts + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_missing_package_is_named_before_the_work(command, tmp_path, monkeypatch, capsys):
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else usual(name, *rest))
    assert (
        main([command, "model=none" if command == "finetune" else "init=none", "trainer.logger=wandb", f"out={tmp_path}"]) == 2
    )
    assert "trainer.logger=wandb: wandb is not installed: pip install 'steerfm[wandb]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "strategy", "words"), [
    ("finetune", "fsdp", "fsdp (did you mean 'fsdp2'?); strategies: auto, ddp, fsdp2"),
    ("finetune", "dpp", "dpp (did you mean 'ddp'?)"),
    ("train", "dpp", "dpp (did you mean 'ddp'?); strategies: auto, ddp"),
    ("train", "fsdp", "fsdp"),
    ("train", "fsdp2", "fsdp2"),
])  # fmt: skip
def test_a_strategy_that_there_is_not_is_named_before_the_work(command, strategy, words, tmp_path, capsys):
    assert main([command, f"trainer.strategy={strategy}", f"out={tmp_path}"]) == 2
    assert f"unknown trainer.strategy={words}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="logger=mlflow: there are auto, csv, tensorboard, wandb"):
        train(tmp_path, 1, "mlflow")
