"""What tuning of the noise leaves: a map that samples what was learnt, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm import cli
from steerfm.capabilities import GENERATOR
from steerfm.finetuning import FineTuning, HyperNoise, LoRA
from steerfm.models.moved_noise import MovedNoise
from steerfm.rewards import as_reward
from steerfm.sampling import Noise
from steerfm.training import fit

MAPS = """
import torch
from torch import nn
import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, TWO_TIME, VELOCITY

class Map(steerfm.FlowMap):
    def __init__(self):
        super().__init__((1, 4, 4))
        self.first, self.last = nn.Linear(18, 8), nn.Linear(8, 16)
        for i, p in enumerate(self.parameters()):
            p.data = torch.linspace(-0.5, 0.6, p.numel()).view(p.shape) * (1 + 0.1 * i)

    def average_velocity(self, x, s, t, cond):
        able = steerfm.capabilities.closed(self.capabilities)
        if "velocity" not in able:
            assert bool((t == 1).all()) and ("endpoint" in able or bool((s == 0).all())), "a jump that was never trained"
        flat = torch.cat([x.flatten(1), s.view(-1, 1).to(x), t.view(-1, 1).to(x)], 1)
        return self.last(torch.tanh(self.first(flat))).view(x.shape) - 0.5 * x

def make(kind="generator"):
    flow_map = Map()
    flow_map.capabilities = {"velocity": VELOCITY, "endpoint": ENDPOINT, "generator": GENERATOR, "two_time": TWO_TIME}[kind]
    flow_map.steps = {"velocity": 6, "endpoint": 2, "generator": 1, "two_time": 4}[kind]
    return flow_map
"""
QUICK: dict[str, Any] = {"accelerator": "cpu", "log_every": 50, "validate_every": 0, "save_every": 100, "progress": False}
KINDS = [("generator", 1), ("endpoint", 1), ("two_time", 1), ("two_time", 3), ("velocity", 8)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MAPS)


def bright(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


def learnt(kind: str, jumps: int, folder: Path, lora: LoRA | None = None) -> FineTuning:
    base = steerfm.load("mine.py:make", kind=kind)
    module = FineTuning(
        base, as_reward(bright), HyperNoise(jumps), batch_size=8, steps=5, warmup=1, lr=3e-2, ema=0.0, scale=0.1, control=0.1,
        lora=lora,
    )  # fmt: skip
    fit(module, module.data(), folder, **QUICK)
    return module


@pytest.mark.parametrize(("kind", "jumps"), KINDS)
def test_the_whole_map_samples_what_was_learnt(kind, jumps, tmp_path):
    module = learnt(kind, jumps, tmp_path / "run")
    whole = HyperNoise(jumps).whole(module.averaged(), module.reference, {"name": "mine.py:make", "kind": kind})
    assert whole.capabilities == GENERATOR and whole.steps == 1
    with torch.no_grad():
        law = module.law()(Noise(list(range(6))), None)
    ours = steerfm.sample(whole, n=6, seeds=0)
    torch.testing.assert_close(ours, law, atol=1e-6, rtol=1e-6)
    plain = module.averaged()
    assert not torch.allclose(steerfm.sample(plain, n=6, seeds=0), law, atol=1e-3)
    whole.save("mine")
    again = steerfm.load("mine.safetensors")
    assert isinstance(again, MovedNoise)
    torch.testing.assert_close(steerfm.sample(again, n=6, seeds=0), ours, atol=1e-6, rtol=1e-6)
    base = steerfm.sample(module.reference, n=6, steps=jumps, seeds=0)
    torch.testing.assert_close(steerfm.sample(again.with_strength(0.0), n=6, seeds=0), base, atol=1e-6, rtol=1e-6)
    again.save("once more")  # what it moves the noise of is not forgotten
    torch.testing.assert_close(steerfm.sample(steerfm.load("once more.safetensors"), n=6, seeds=0), ours, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize(("kind", "more"), [
    ("generator", []), ("endpoint", []), ("velocity", ["method.jumps=8", "distil.steps=0"]), ("two_time", ["distil.steps=0"]),
])  # fmt: skip
def test_a_run_leaves_the_map_that_it_measured(kind, more, lora, tmp_path, capsys):
    if lora:
        pytest.importorskip("peft")
    words = [
        "finetune", "model=mine.py:make", f"model.kind={kind}", "reward=brightness", "judge=null", "method=noise", *more,
        "optimizer.steps=6", "optimizer.lr=0.03", "batch_size=8", "watch.n=8", "watch.base=8",
        "watch.patience=0", "watch.every=3",
        f"lora.rank={lora}", "control=0.1", "trainer.accelerator=cpu", "out=run",
    ]  # fmt: skip
    assert cli.main(words) == 0
    readings = json.loads(Path("run/result.json").read_text())["readings"]
    assert readings["tuned, 1 jump"]["reward"] == pytest.approx(readings["as learnt"]["reward"], abs=1e-5)
    files = ["run/mine-make-tuned.safetensors", *(["run/adapter.safetensors"] if lora else [])]
    for file in files:
        tuned = steerfm.load(file)
        reward = steerfm.reward("brightness")(tuned.decode(steerfm.sample(tuned, n=8, seeds=0)))
        assert reward.mean().item() == pytest.approx(readings["as learnt"]["reward"], abs=1e-5)
    assert cli.main(["steer", f"model={files[-1]}", "reward=brightness", "judge=null", "n=1", "out=steered"]) == 0
    assert "has only one jump from noise to data" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["evaluate", f"model={files[-1]}", "n=4", "out=measured"]) == 0


def test_who_is_moved_must_be_known(tmp_path):
    module = learnt("generator", 1, tmp_path / "run")
    with pytest.raises(ValueError, match="the base model is missing"):
        HyperNoise().whole(module.averaged(), module.reference).save("mine")
    HyperNoise().whole(module.averaged(), module.reference, "mine.py:make").save("mine")
    head = json.loads(Path("mine.json").read_text())
    Path("mine.json").write_text(json.dumps(head | {"moves_noise": 0}))
    with pytest.raises(ValueError, match=r"moves_noise 0 in its \.json, it should be a number of jumps"):
        steerfm.load("mine.safetensors")
