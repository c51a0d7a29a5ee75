"""`steerfm finetune` as a person uses it, on the shipped model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from kinds import a

import steerfm
from steerfm import cli
from steerfm.checkpoints import read_weights
from steerfm.flowmap import NeuralFlowMap

FAST = [
    "batch_size=4", "watch.n=8", "watch.base=8", "watch.report=2", "watch.every=2", "optimizer.steps=4", "distil.steps=2",
    "distil.samples=8", "distil.batch_size=8",
]  # fmt: skip
BAG = ["finetune", "reward=classifier", "reward.target=Bag", *FAST]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, fix",
    [
        (["finetune", "contrl=1"], "did you mean 'control'"),
        (["finetune", "method=dirrect"], "did you mean 'direct'"),
        (["finetune", "method.jumsp=2"], "did you mean 'jumps'"),
        (["finetune", "control=-1"], "control=-1"),
        (["finetune", "method=weighted", "control=0", "reward=brightness"], "infinite tilt"),
        (["finetune", "reward=compressibility"], "use weighted or policy"),
        (["finetune", "reward=brightness", "lora.rank=4", "lora.layers=[conv11]"], "did you mean 'conv1'"),
        (["finetune", "reward=brightness", "label=Hat"], "classes: 0 T-shirt"),
        (["finetune", "reward=brightness", "batch_size=7", "method=policy"], "multiple of the group"),
        (["finetune", "reward=brightness", "optimizer.setps=3"], "did you mean 'steps'"),
        (["finetune", "model=nowhere/model.safetensors", "reward=brightness"], "no such file"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(capsys, tmp_path, monkeypatch, argv, fix):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert fix in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_run_leaves_a_map_that_every_command_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*BAG, "watch.report=12", "lora.rank=2", "out=tuned"]
    code, _, err = run(capsys, *command)
    assert code == 0, err
    folder = tmp_path / "tuned"
    for name in ("config.yaml", "result.json", "metrics.jsonl", "report.html", "grid.png", "frontier.png", "curves-tune.png"):
        assert (folder / name).stat().st_size > 0, name
    result = json.loads((folder / "result.json").read_text())
    assert result["trained_parameters"] < 0.1 * result["parameters"]
    assert {"base, 4 jumps", "as learnt", "tuned, 1 jump", "tuned, 8 jumps"} <= result["readings"].keys()
    assert result["cost"]["tune"]["reward_calls"] == 16
    found, base = result["readings"]["tuned, 1 jump"], result["readings"]["base, 4 jumps"]
    assert base["over_base"] == 0 and found["over_base_half"] > 0
    assert found["over_base"] == pytest.approx(found["held_out"] - base["held_out"], abs=1e-4)  # the same seeds
    tuned = a(NeuralFlowMap, steerfm.load(folder / "fashion-tuned.safetensors"))
    assert tuned.data == "fashion"  # what it draws is judged like what its base draws
    x = torch.randn(2, 1, 28, 28)
    adapted = steerfm.load(folder / "adapter.safetensors")
    assert torch.allclose(tuned.jump(x, 0.0, 1.0), adapted.jump(x, 0.0, 1.0), atol=5e-3)  # both are stored in half precision
    base = steerfm.load("fashion")
    assert torch.allclose(tuned.with_strength(0).jump(x, 0.0, 1.0), base.jump(x, 0.0, 1.0), atol=5e-3)
    assert run(capsys, "sample", "model=tuned/fashion-tuned.safetensors", "n=2")[0] == 0
    assert "finished already" in run(capsys, *command)[1]
    code, _, err = run(capsys, *BAG, "out=tuned")
    assert code == 2 and "another configuration" in err


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle of tuning; the same command goes on."""
    monkeypatch.chdir(tmp_path)
    command = [*BAG, "optimizer.steps=8", "trainer.save_every=2"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "steerfm.cli", *command, "out=killed"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums in another order are other bits
    )  # fmt: skip
    last = tmp_path / "killed" / "tune" / "checkpoints" / "last.ckpt"
    deadline = time.time() + 300
    while not last.is_file() and killed.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "result.json").is_file()
    for out in ("killed", "whole"):
        code, _, err = run(capsys, *command, f"out={out}")
        assert code == 0, err
    one, two = (read_weights(tmp_path / out / "fashion-tuned.safetensors", "flow_map")[1] for out in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_reward_that_breaks_stops_the_run_and_loses_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom pathlib import Path\n\n"
        "def mine(images):\n"
        "    r = images.mean((1, 2, 3))\n"
        "    broken = Path('broken').is_file() and images.requires_grad\n"
        "    return torch.where(torch.arange(len(r)) == 2, r * float('nan'), r) if broken else r\n"
    )
    command = ["finetune", "reward=mine.py:mine", *FAST, "optimizer.steps=6", "trainer.save_every=2", "out=run"]
    real = cli.main

    from steerfm.finetuning import evaluation

    judge = evaluation.Monitor._judge

    def break_at_four(self, trainer, module):
        judge(self, trainer, module)
        if trainer.global_step == 4:
            (tmp_path / "broken").touch()

    monkeypatch.setattr(evaluation.Monitor, "_judge", break_at_four)
    assert real(command) == 2
    err = capsys.readouterr().err
    assert "step 5" in err and "sample 2" in err and "continues it" in err
    (tmp_path / "broken").unlink()
    monkeypatch.setattr(evaluation.Monitor, "_judge", judge)
    code, _, err = run(capsys, *command)
    assert code == 0, err
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if row["stage"] == "tune"] == [0, 2, 4, 6]
