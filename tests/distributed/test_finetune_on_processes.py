"""`steerfm finetune` on two processes, of which one is killed, and then on one: the losses of one process from the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerfm import training
from steerfm.cli import main

CODE = '''
import os, signal
from pathlib import Path
import steerfm, torch
from steerfm import distributed
from steerfm.networks import Mlp
from steerfm.randomness import global_stream

def plane():
    with global_stream(0, "plane"):
        network = Mlp(2, width=16, depth=1)
        torch.nn.init.normal_(network.outputs.weight, std=0.3)
    return steerfm.NeuralFlowMap(network, (2,)).eval().requires_grad_(False)

def deadly(x):
    """Kills the second process in a chain of updates that share samples, once there is a checkpoint."""
    if Path(os.environ["STEERFM_DEADLY"]).is_file() and distributed.rank() == 1 and torch.is_grad_enabled() is False:
        if len(x) == 4 and any(Path(os.environ["STEERFM_DEADLY"]).parent.glob("many/tune/checkpoints/last.ckpt")):
            os.kill(os.getpid(), signal.SIGKILL)
    return x[:, 0]
'''
KEYS = [
    "batch_size=8", "method=policy", "method.group=2", "method.reuse=3", "method.steps=2", "watch.n=6", "watch.base=6",
    "watch.every=4", "optimizer.steps=8", "distil.steps=2", "distil.samples=8", "distil.batch_size=8", "trainer.save_every=1",
    "trainer.log_every=1", "trainer.accelerator=cpu",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tuning_whose_process_was_killed_goes_on_with_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    deadly, threads, code = tmp_path / "deadly", torch.get_num_threads(), tmp_path / "code.py"
    monkeypatch.setenv("STEERFM_DEADLY", str(deadly))
    code.write_text(CODE)
    keys = ["finetune", f"model={code}:plane", f"reward={code}:deadly", *KEYS]
    torch.set_num_threads(1)
    try:
        assert main([*keys, f"out={tmp_path / 'one'}"]) == 0, capfd.readouterr().err
        many = f"out={tmp_path / 'many'}"
        assert main([*keys, many, "trainer.devices=2", "batch_size=6"]) == 2
        printed = capfd.readouterr()
        assert "batch_size=6 cannot be divided between 2 processes in groups of 2: use a multiple of 4" in printed.err
        assert not (tmp_path / "many").exists()

        deadly.touch()
        assert main([*keys, many, "trainer.devices=2", "trainer.strategy=ddp"]) == 2
        assert "process 1 of 2 was killed (SIGKILL), which ends all of them; the same command" in capfd.readouterr().err
        deadly.unlink()
        assert main([*keys, many]) == 0, capfd.readouterr().err
    finally:
        torch.set_num_threads(threads)
    one, other = ((training.history(tmp_path / name / "tune")) for name in ("one", "many"))
    assert one["train/loss"][0] == other["train/loss"][0] == list(range(8))
    for key in ("train/loss", "train/reward", "train/control_cost", "train/ratio"):
        assert one[key][1] == pytest.approx(other[key][1], rel=1e-4, abs=1e-6), key
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "many")]
    assert results[0]["scale"] == pytest.approx(results[1]["scale"]) and results[0]["cost"]["tune"]["reward_calls"] == 24
    for name, reading in results[0]["readings"].items():
        assert reading["reward"] == pytest.approx(results[1]["readings"][name]["reward"], abs=1e-3), name
    assert results[0]["cost"]["tune"]["reward_calls"] == results[1]["cost"]["tune"]["reward_calls"]
