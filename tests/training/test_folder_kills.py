"""Trainings on a folder of pictures that are killed and go on with the same command: as if they had been left alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from steerfm.cli import main
from steerfm.training import ClassifierTraining, FlowMapTraining, history

pytestmark = pytest.mark.slow
SMALL = [
    "name=mine", "data.size=8", "data.batch_size=4", "network.widths=[8,16]", "optimizer.steps=8", "optimizer.warmup=1",
    "trainer.accelerator=cpu", "trainer.validate_every=4", "trainer.sample_every=8", "trainer.save_every=2",
    "trainer.log_every=1", "objective.keep=8", "objective.uses=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERFM_DATA", str(tmp_path / "cache"))


def folder(form: str) -> None:
    """pics/, with a folder for each class, with captions, or with neither; pictures of several sizes."""
    lines = []
    for seed in range(24):
        file = Path("pics") / (("cat", "dog")[seed % 2] if form == "classes" else "") / f"{seed}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        sizes = np.random.default_rng(seed)
        Image.fromarray(sizes.integers(0, 255, (8 + seed % 3, 9, 3), dtype=np.uint8)).save(file)
        lines.append(json.dumps({"file_name": file.name, "text": f"picture {seed % 5}"}))
    if form == "captions":
        Path("pics/metadata.jsonl").write_text("\n".join(lines))


class Killed(BaseException):
    """Nothing is tidied up."""


def start(train: list[str], kind: type, step: int, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that ends early: killed before its update of a step, killed after it, or stopped by a signal in it."""
    name = "on_train_batch_end" if when == "after" else "training_step"
    usual = getattr(kind, name)

    def until(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.global_step >= step:
            if when != "signal":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, until)
        if when == "signal":
            assert main(train) == 128 + signal.SIGTERM
        else:
            with pytest.raises(Killed):
                main(train)


def curves(out: str) -> dict[str, Any]:
    """What was logged, without what a clock says."""
    return {key: value for key, value in history(Path(out)).items() if not key.endswith(("seconds", "time"))}


@pytest.mark.parametrize(("form", "more", "kills"), [
    ("classes", ["data.augment=2"], [(3, "before"), (5, "signal")]),
    ("captions", ["text=emoji-clip", "data.flip=true"], [(5, "after"), (6, "signal")]),
    ("plain", ["data.channels=1", "data.fit=pad"], [(1, "before"), (4, "after"), (7, "before")]),
    ("classifier", [], [(5, "before")]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_killed_training_goes_on_to_the_same_weights(form, more, kills, monkeypatch):
    folder("classes" if form == "classifier" else form)
    kind: Any = FlowMapTraining
    if form == "classifier":
        kind, more = ClassifierTraining, ["task=classifier", "network={name: resnet, widths: [8, 16]}", "data.name=folder"]
    recipe = ["--config", "folder"] if form != "classifier" else []
    settings = [word for word in SMALL if form != "classifier" or not word.startswith("network")]
    train = ["train", *recipe, "data.root=pics", *settings, *more]
    assert main([*train, "out=whole"]) == 0
    for step, when in kills:
        start([*train, "out=killed"], kind, step, when, monkeypatch)
        assert not Path("killed/mine.safetensors").exists()
    assert main([*train, "out=killed"]) == 0
    for file in ("mine.safetensors", *(["mine-statistics.safetensors"] if form == "classifier" else [])):
        whole, killed = (load_file(Path(out) / file) for out in ("whole", "killed"))
        assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert curves("whole") and curves("whole") == curves("killed")
    heads = [json.loads((Path(out) / "mine.json").read_text()) for out in ("whole", "killed")]
    for head in heads:
        for key in ("command", "recipe"):
            head["card"].pop(key, None)
    assert heads[0] == heads[1]


def test_a_folder_that_changed_is_not_gone_on_with(monkeypatch, capsys):
    folder("classes")
    train = ["train", "--config", "folder", "data.root=pics", *SMALL, "out=run"]
    start(train, FlowMapTraining, 5, "before", monkeypatch)
    Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8)).save("pics/cat/0.png")
    capsys.readouterr()
    assert main(train) == 2
    assert "data folder: edited since this run began" in capsys.readouterr().err.splitlines()[-1]
