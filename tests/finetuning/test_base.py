"""The module that Lightning trains: a run killed and continued, two processes for one, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from kinds import a

from steerfm.finetuning import (
    METHODS,
    Direct,
    FineTuning,
    HyperNoise,
    Policy,
    TaskData,
    Tasks,
    Weighted,
    chain,
    check,
    draw,
    spread,
)
from steerfm.finetuning.evaluation import Monitor, Panel, control_cost
from steerfm.flowmap import NeuralFlowMap
from steerfm.metrics import interval
from steerfm.networks import Mlp
from steerfm.rewards import Reward, RewardError, as_reward
from steerfm.training import fit

QUICK: dict[str, Any] = {"accelerator": "cpu", "log_every": 1, "validate_every": 0, "save_every": 3, "progress": False}
SMALL = {
    "direct": {},
    "weighted": {"rounds": 3, "samples": 64},
    "policy": {"group": 4, "reuse": 3},
    "adjoint": {"steps": 5},
    "noise": {},
    "forward": {"group": 4, "reuse": 3},
    "nft": {"group": 4, "reuse": 3},
    "awm": {"group": 4, "reuse": 3},
}


def linear(x):
    return x[:, 0] - 0.5 * x[:, 1]


def small_map(classes: int = 0) -> NeuralFlowMap:
    torch.manual_seed(0)
    network = Mlp(2, width=16, depth=2, classes=classes)
    torch.nn.init.normal_(network.outputs.weight, std=0.1)
    return NeuralFlowMap(network, (2,), class_names=tuple("abcdef"[:classes])).eval().requires_grad_(False)


def module(method, steps: int = 10, reward=linear, flow_map=None, **options) -> FineTuning:
    options = {"lr": 1e-2, "batch_size": 8, "steps": steps, "warmup": 2, "ema": 0.9} | options
    return FineTuning(flow_map or small_map(), as_reward(reward), method, **options)


def weights(m: FineTuning) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for net in (m.network, m.ema) for p in net.parameters()])


class KilledError(Exception):
    pass


# --- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SMALL)
def test_a_killed_run_continues_to_the_same_bits(name, tmp_path):
    method = METHODS[name](**SMALL[name])
    whole = module(method)
    fit(whole, whole.data(), tmp_path / "whole", **QUICK)
    killed: Any = module(method)
    loss, calls = killed.method.loss, iter(range(100))

    class Fragile:  # dies in the middle of step 8
        def __getattr__(self, attribute):
            return getattr(method, attribute)

        def loss(self, update):
            if next(calls) == 7:
                raise KilledError
            return loss(update)

    killed.method = Fragile()
    with pytest.raises(KilledError):
        fit(killed, killed.data(), tmp_path / "killed", **QUICK)
    again = module(method)
    trainer = fit(again, again.data(), tmp_path / "killed", **QUICK)
    assert trainer.global_step == 10
    assert torch.equal(weights(whole), weights(again))
    assert again.spent.reward_calls == whole.spent.reward_calls and again.scale == whole.scale


def test_the_reference_and_the_base_are_never_changed(tmp_path):
    flow_map = small_map()
    before = copy.deepcopy(flow_map.network.state_dict())
    m = module(Direct(), flow_map=flow_map)
    fit(m, m.data(), tmp_path, **QUICK)
    assert all(torch.equal(before[name], value) for name, value in flow_map.network.state_dict().items())
    assert not torch.equal(weights(m)[: len(weights(m)) // 2], torch.cat([v.flatten() for v in before.values()])[:0])
    x = torch.randn(4, 2)
    assert not torch.equal(m.averaged().jump(x, 0.0, 0.5), flow_map.jump(x, 0.0, 0.5))


@pytest.mark.slow
def test_the_reward_goes_up(tmp_path):
    for name, options in SMALL.items():
        m = module(METHODS[name](**options), steps=60, control=0.3, scale=1.0, batch_size=32)
        fit(m, m.data(), tmp_path / name, **dict(QUICK, save_every=60))
        x, y = (draw(law, Tasks(), m.reference, [7], 2000) for law in (m.law(), chain(4)(m.reference)))
        assert linear(x).mean() > linear(y).mean() + 0.1, name


def losses_and_weights(name: str, devices: int) -> tuple[list[float], torch.Tensor]:
    """Of six updates of eight rows, on rank 0."""
    m = module(METHODS[name](**SMALL[name]), scale=1.0)
    losses = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx):
            losses.append(a(torch.Tensor, pl_module.all_gather(outputs["loss"])).mean().item())

    trainer = L.Trainer(
        max_steps=6, max_epochs=-1, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(m, m.data())
    if trainer.is_global_zero:
        assert m.spent.reward_calls == 8 * 6 // SMALL[name].get("reuse", 1)
    return losses, weights(m)


SHARED = ["direct", "policy", "noise", "forward", "nft", "awm"]
SCRIPT = """
import os, sys, torch
sys.path[:0] = {folders!r}
import test_base as t
found = {{name: t.losses_and_weights(name, 2) for name in {names!r}}}
if os.environ.get("LOCAL_RANK", "0") == "0":
    torch.save(found, {out!r})
"""


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Of every method, by one pair of processes: they take longer to start than to train."""
    folder = tmp_path_factory.mktemp("two")
    script, out = folder / "two.py", folder / "two.pt"
    script.write_text(SCRIPT.format(folders=[str(folder) for folder in Path(__file__).parents[:2]], names=SHARED, out=str(out)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert out.is_file(), done.stderr[-2000:]
    return torch.load(out)


@pytest.mark.slow
def test_two_processes_do_what_one_does(of_two_processes):
    """The same global batch: the same losses and weights, to rounding."""
    assert list(of_two_processes) == SHARED
    for name, (again, two) in of_two_processes.items():
        losses, one = losses_and_weights(name, 1)
        assert len(losses) == 6, name
        assert losses == pytest.approx(again, rel=1e-4, abs=1e-5), name
        assert torch.allclose(one, two, atol=2e-4), name


# --- conditions ------------------------------------------------------------------------------------------------------
def test_labels_reach_the_reward_and_the_map(tmp_path):
    seen = []

    def reward(images, labels):
        seen.append(labels)
        return linear(images) * (1 - 2 * labels)

    flow_map = small_map(classes=2)
    m = module(
        Direct(), reward=reward, tasks=Tasks.of(flow_map.condition(["a", "b"], 2)), flow_map=flow_map, steps=40, control=0.1
    )
    fit(m, m.data(), tmp_path, **QUICK)
    assert {tuple(labels.tolist()) for labels in seen if len(labels) == 8} <= {(0, 1) * 4, (1, 0) * 4}
    a, b = draw(m.law(), m.tasks, m.reference, [1, 2], 500).split(500)
    assert linear(a).mean() > linear(b).mean() + 0.2


def test_weights_are_within_a_task(tmp_path):
    """A task whose rewards are all higher must not take the samples of another."""
    flow_map = small_map(classes=2)
    m = module(
        Weighted(rounds=1, samples=400), reward=lambda images, labels: images[:, 0] + 100.0 * labels, scale=1.0,
        tasks=Tasks.of(flow_map.condition(["a", "b"], 2)), flow_map=flow_map, steps=2,
    )  # fmt: skip
    fit(m, m.data(), tmp_path, **QUICK)
    assert m.memory["log_w"].shape == (2, 200)
    assert torch.allclose(m.memory["log_w"].logsumexp(1).exp(), torch.ones(2, dtype=torch.float64))


def test_updates_that_share_samples_are_asked_for_the_same():
    batches = [rows.tolist() for rows, _ in zip(TaskData(5, 8, group=4, reuse=2).train_dataloader(), range(20))]
    assert all(one == two for one, two in zip(batches[::2], batches[1::2]))
    assert len({tuple(rows) for rows in batches}) > 3
    assert all(rows[:4] == [rows[0]] * 4 and rows[4:] == [(rows[0] + 1) % 5] * 4 for rows in batches)


# --- judging ---------------------------------------------------------------------------------------------------------
def panel(flow_map, n: int = 64) -> Panel:
    tasks, support = Tasks()[torch.zeros(n).long()], Tasks()[torch.zeros(400).long()]
    return Panel(flow_map, as_reward(linear), None, tasks, support, lambda x: x)


def test_the_base_is_as_diverse_and_as_near_as_itself():
    flow_map = small_map()
    readings = [replace(panel(flow_map, 400), seeds=1000 * i).measure(chain(4)(flow_map)) for i in range(12)]
    reading = readings[0]
    mean, half = interval([reading.diversity for reading in readings])
    assert abs(mean - 1) < 1.5 * half and half < 0.05
    assert all(reading.support > 0.9 and reading.distance < 0.2 for reading in readings)
    best = panel(flow_map).measure(chain(4)(flow_map), 16)
    assert best.reward > reading.reward + 1
    assert control_cost(flow_map, flow_map, Tasks()[torch.zeros(8).long()]) == 0


def test_without_control_it_collapses_and_the_guard_keeps_a_model_from_before(tmp_path):
    flow_map = small_map()
    judge, m = panel(flow_map), module(Direct(jumps=1), steps=200, control=0.0, scale=1.0, lr=3e-2)
    base = judge.measure(chain(4)(flow_map))
    monitor = Monitor(judge, base, tmp_path, every=5, patience=3)
    fit(m, m.data(), tmp_path, **QUICK, callbacks=[monitor])
    assert "stopped at step" in monitor.reason and m.global_step < 200
    assert monitor.rows[-1]["support"] < 0.9 * base.support
    monitor.restore(m)
    kept = judge.measure(m.law())
    assert kept.support >= 0.9 * base.support and kept.diversity >= 0.9 * min(1, base.diversity)
    assert kept.reward == pytest.approx(
        next(row["reward"] for row in monitor.rows if row["step"] == monitor.best_step), abs=1e-5
    )
    assert len(list((tmp_path / "averaged").glob("*.safetensors"))) == len(monitor.rows)


def test_a_run_without_a_model_within_the_floor_keeps_the_base(tmp_path):
    """A floor that nothing reaches, the base neither."""
    judge, m = panel(small_map()), module(Direct(jumps=1), steps=20, control=0.0, scale=1.0, lr=3e-2)
    before = torch.cat([p.detach().flatten() for p in m.ema.parameters()]).clone()
    monitor = Monitor(judge, judge.measure(chain(4)(small_map())), tmp_path, every=5, floor=10.0, patience=3)
    fit(m, m.data(), tmp_path, **QUICK, callbacks=[monitor])
    monitor.restore(m)
    assert monitor.kept_base and monitor.best_step == 0
    assert torch.equal(torch.cat([p.flatten() for p in m.ema.parameters()]), before)


# --- what is refused -------------------------------------------------------------------------------------------------
class BlackBox(Reward):
    differentiable = False

    def score(self, images, prompts=None, labels=None):
        return linear(images)


def test_what_cannot_work_is_refused_at_once():
    with pytest.raises(ValueError, match="control=-1"):
        check(Direct(), as_reward(linear), -1.0)
    with pytest.raises(ValueError, match="infinite tilt"):
        check(Weighted(), as_reward(linear), 0.0)
    for method in (Direct(), HyperNoise()):
        with pytest.raises(RewardError, match="black box"):
            check(method, BlackBox(), 1.0)
    check(Policy(), BlackBox(), 0.0)
    with pytest.raises(RewardError, match="nothing to learn"):
        spread(small_map(), as_reward(lambda x: 0 * x[:, 0]), Tasks())


def test_a_reward_that_breaks_names_the_sample_and_loses_nothing(tmp_path):
    calls = []

    def breaks(x):
        calls.append(1)
        r = linear(x)
        return torch.where(torch.arange(len(x)) == 3, r / 0 * 0, r) if len(calls) == 8 else r  # the first one is a try

    m = module(Direct(), reward=breaks, scale=1.0)
    monitor = Monitor(panel(small_map()), panel(small_map()).measure(chain(4)(small_map())), tmp_path, every=100)
    monitor.rows = [{"step": 0.0}]  # no judgement with this reward
    with pytest.raises(RewardError, match="for sample 3"):
        fit(m, m.data(), tmp_path, **QUICK, callbacks=[monitor])
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
