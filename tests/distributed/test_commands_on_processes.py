"""`steerfm steer` and `sample` on processes: the folder of one, also where one process died in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerfm.cli import main

REWARD = '''
import os, signal
from pathlib import Path
import steerfm
from steerfm import distributed

class Deadly(steerfm.Reward):
    """Kills the process that is named in a file, where there are files of an earlier batch."""
    name = "deadly"
    def score(self, images, prompts=None, labels=None):
        file = Path(os.environ["STEERFM_DEADLY"])
        if file.is_file() and any(file.parent.glob("many/parts/*")) and distributed.rank() == int(file.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        return images.mean((1, 2, 3))
'''
KEYS = ["label=Bag", "n=5", "batch_size=2", "method=fmrg_j", "method.particles=3", "method.steps=2", "micro_batch=2"]
KEYS += ["strength=auto", "device=cpu"]


@pytest.mark.slow
def test_a_process_that_dies_ends_all_and_the_run_goes_on_with_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    deadly, threads = tmp_path / "rank", torch.get_num_threads()
    monkeypatch.setenv("STEERFM_DEADLY", str(deadly))
    (tmp_path / "deadly.py").write_text(REWARD)
    keys = ["steer", f"reward={tmp_path / 'deadly.py'}:Deadly", *KEYS]
    torch.set_num_threads(1)
    try:
        assert main([*keys, f"out={tmp_path / 'one'}"]) == 0
    finally:
        torch.set_num_threads(threads)
    alone = capfd.readouterr().out
    many = f"out={tmp_path / 'many'}"

    deadly.write_text("1")
    assert main([*keys, many, "trainer.devices=2"]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.splitlines() == [
        "error: process 1 of 2 was killed (SIGKILL), which ends all of them; the same command continues where it was"
    ]
    assert [file.name for file in (tmp_path / "many" / "parts").iterdir()] == ["part-00000.safetensors"]
    assert not list((tmp_path / "many").glob("**/.*.tmp"))

    deadly.unlink()
    assert main([*keys, many, "trainer.devices=3"]) == 0
    assert capfd.readouterr().out.replace("/many", "/one").splitlines()[:6] == alone.splitlines()[:6]  # one of them prints
    one, other = tmp_path / "one", tmp_path / "many"
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    want, got = (load_file(folder / "samples.safetensors") for folder in (one, other))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for result in results:
        result.pop("command")
        result["cost"] = {key: value for key, value in result["cost"].items() if key not in ("seconds", "peak_bytes")}
    assert results[0] == results[1]
    configs = [(folder / "config.yaml").read_text() for folder in (one, other)]
    assert configs[0].replace("/one", "/many") == configs[1] and "trainer" not in configs[0]

    assert main([*keys, many]) == 0  # the same run, on whatever number of processes
    assert "finished already" in capfd.readouterr().out

    sharded = tmp_path / "sharded"  # convolutions round otherwise where their weights are shared out
    assert main([*keys, f"out={sharded}", "trainer.devices=2", "trainer.strategy=fsdp2"]) == 0
    got = load_file(sharded / "samples.safetensors")
    torch.testing.assert_close(got["samples"], want["samples"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["trainer.devices=0"], "trainer.devices=0: give auto, a number of at least 1, or a list: 0,1"),
        (["trainer.devices=0,1"], "trainer.devices="),
        (["trainer.devices=-1"], "trainer.devices=-1: on a CPU give the number"),
        (["trainer.devices=2", "trainer.num_nodes=2"], "trainer.num_nodes=2: no launcher started the other machines"),
        (["trainer.num_nodes=0"], "trainer.num_nodes=0: must be at least 1"),
        (["trainer.num_nodes=3"], "trainer.num_nodes=3: no launcher started the other machines"),
        (["trainer.devices=2", "device=cuda:1"], "device=cuda:1 is one GPU: name the GPUs in trainer.devices, for example 0,1"),
        (["trainer.devices=2", "device=mps"], "device=mps: several processes need cpu or cuda"),
        (["trainer.devices=2", "device=cuda"], "device=cuda: this machine has no CUDA device"),
        (["trainer.device=2"], "unknown key 'trainer.device' (did you mean 'devices'?)"),
        (["micro_batch=0"], "micro_batch=0: must be at least 1"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp (did you mean 'fsdp2'?); strategies: auto, fsdp2"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_work(
    keys: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["steer", "reward=brightness", f"out={tmp_path / 'run'}", *keys]) == 2
    line = capsys.readouterr().err
    assert words in line and len(line.splitlines()) == 1 and not (tmp_path / "run").exists()
