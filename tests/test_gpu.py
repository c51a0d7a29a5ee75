"""What an accelerator changes: speed and rounding, and nothing else.

``STEERFM_TEST_DEVICE=cpu`` runs them on the CPU, where they say little, but show that they run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import a

import steerfm
from steerfm import cli
from steerfm.finetuning import Direct, FineTuning
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import UNet
from steerfm.sampling import Noise
from steerfm.training import fit, history

DEVICE = os.environ.get("STEERFM_TEST_DEVICE", "cuda")
CUDA = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no accelerator"),
]
ASKED: dict[str, dict[str, Any]] = {"fashion": {"label": "Bag"}, "emoji": {"cond": "a red heart"}}
REWARDS: dict[str, dict[str, Any]] = {
    "fashion": {"name": "classifier", "target": "Bag"},
    "emoji": {"name": "clip", "prompt": "a red heart"},
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions and products of float32 in float32, so that what is left is the order of sums."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def steered(device: str, name: str = "fashion", **options: Any) -> steerfm.SteeringResult:
    given: dict[str, Any] = {"n": 2, "strength": 4.0, "seeds": 5} | ASKED[name] | options
    return steerfm.steer(steerfm.load(name, device), REWARDS[name], **given)


# --- the same draws ----------------------------------------------------------------------------------------------------
def test_noise_is_drawn_on_the_cpu_and_is_the_same_bits():
    here, there = Noise([3, 4], 5), Noise([3, 4], 5)
    like = torch.empty(0, device=DEVICE)
    for shape in ((1, 28, 28), (7,)):
        made = there.normal(shape, like)
        assert made.device.type == DEVICE
        assert torch.equal(made.cpu(), here.normal(shape, torch.empty(0)))
    assert torch.equal(there.uniform(5, like.device).cpu(), here.uniform(5, torch.device("cpu")))


def test_the_global_state_of_the_device_is_left_alone():
    flow_map, reward = steerfm.load("fashion", DEVICE), steerfm.reward("classifier", target="Bag")
    before = torch.cuda.get_rng_state() if CUDA else torch.get_rng_state()
    steerfm.steer(flow_map, reward, {"name": "feynman_kac", "particles": 4, "steps": 2}, label="Bag")
    assert torch.equal(before, torch.cuda.get_rng_state() if CUDA else torch.get_rng_state())


# --- the same numbers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["fashion", "emoji"])
def test_samples_are_those_of_the_cpu(name: str, steps: int):
    made = {}
    for device in ("cpu", DEVICE):
        flow_map = steerfm.load(name, device)
        words = ASKED[name]
        made[device] = steerfm.sample(flow_map, n=4, steps=steps, cond=words.get("cond") or words["label"]).cpu()
    torch.testing.assert_close(made[DEVICE], made["cpu"], rtol=0, atol=2e-3)


METHODS: dict[str, dict[str, Any]] = {
    "best_of_n": {"name": "best_of_n", "particles": 4, "steps": 2},
    "feynman_kac": {"name": "feynman_kac", "particles": 4, "steps": 3},
    "fk_steering": {"name": "fk_steering", "particles": 4, "steps": 3},
    "svdd": {"name": "svdd", "particles": 4, "steps": 3},
    "fmrg_j": {"name": "fmrg_j", "particles": 2, "steps": 3},
    "dps": {"name": "dps", "steps": 3},
    "reno": {"name": "reno", "iterations": 3},
    "random_search": {"name": "random_search", "iterations": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_steering_is_that_of_the_cpu(method: str):
    """Rewards to 1%: a choice between particles that are level may fall otherwise, and did not for these seeds."""
    here, there = (steered(device, method=METHODS[method]) for device in ("cpu", DEVICE))
    torch.testing.assert_close(there.rewards.cpu(), here.rewards, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(there.samples.cpu(), here.samples, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["fashion", "emoji"])
def test_gradients_are_those_of_the_cpu(name: str):
    found = {}
    for device in ("cpu", DEVICE):
        flow_map, words = steerfm.load(name, device), ASKED[name]
        reward = steerfm.reward(REWARDS[name]["name"], **{k: v for k, v in REWARDS[name].items() if k != "name"}).to(device)
        x = Noise([1, 2], 1).normal(flow_map.shape, torch.empty(0, device=device)).requires_grad_()
        cond = flow_map.condition(words.get("cond") or words["label"], 2)
        reward(flow_map.decode(flow_map.jump(x, 0.2, 1.0, cond))).sum().backward()
        assert x.grad is not None
        found[device] = x.grad.cpu()
    scale = found["cpu"].abs().max().item()
    torch.testing.assert_close(found[DEVICE], found["cpu"], rtol=0, atol=2e-2 * scale)


# --- precision and compilation -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["feynman_kac", "fmrg_j"])
def test_bf16_is_near(method: str):
    whole = steered(DEVICE, method=METHODS[method])
    with torch.autocast(DEVICE, torch.bfloat16):
        half = steered(DEVICE, method=METHODS[method])
    assert half.samples.dtype == torch.float32 and half.rewards.dtype == torch.float32
    assert bool(torch.isfinite(half.samples).all() and torch.isfinite(half.rewards).all())
    assert (half.rewards.mean() - whole.rewards.mean()).abs() < 1.0  # of a log-probability that ranges over tens


@pytest.mark.skipif(not CUDA, reason="the CPU has its own tests of it")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_network_gives_the_same(mode: str):
    flow_map = a(NeuralFlowMap, steerfm.load("fashion", DEVICE))
    graphs: Any = torch.compile(flow_map.network, mode=mode)
    compiled = flow_map.compiled() if mode == "default" else flow_map.with_network(graphs)
    method = steerfm.FeynmanKac(8, 3)
    made = [
        steerfm.steer(each, REWARDS["fashion"], method, n=2, label="Bag").rewards for each in (flow_map, compiled, compiled)
    ]
    torch.testing.assert_close(made[1], made[0], rtol=1e-2, atol=2e-2)
    assert torch.equal(made[1], made[2])  # memory of a graph that is used again would show here


# --- memory and speed --------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not CUDA, reason="the peak of a process does not fall")
@pytest.mark.parametrize("method", ["feynman_kac", "fmrg_j"])
def test_micro_batches_bound_memory(method: str):
    def peak(rows: int) -> float:
        arguments = {"name": method, "particles": 512, "steps": 2}
        return steered(DEVICE, n=1, method=arguments, micro_batch=rows).cost.peak_bytes

    peak(16)  # libraries take their own at the first call
    assert peak(16) < 0.5 * peak(512)


@pytest.mark.skipif(not CUDA, reason="memory of an accelerator")
def test_a_run_goes_on_with_fewer_rows_where_memory_is_short():
    wide = steerfm.NeuralFlowMap(UNet(channels=3, widths=[64, 64], blocks=1), (3, 128, 128)).to(DEVICE).eval()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3 * 2**30 / total))
    try:
        with pytest.warns(UserWarning, match="out of memory: continuing with"):
            result = steerfm.steer(wide, "brightness", {"name": "feynman_kac", "particles": 1024, "steps": 1}, n=1)
        assert bool(torch.isfinite(result.rewards).all())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# --- training ----------------------------------------------------------------------------------------------------------
@pytest.mark.data("fashion")
def test_training_steps_are_those_of_the_cpu(tmp_path: Path):
    def losses(device: str, precision: str) -> list[float]:
        out = tmp_path / f"{device}-{precision}"
        words = ["init=fashion", "objective.teacher=fashion", "data.batch_size=16", "optimizer.steps=3", "trainer.log_every=1"]
        words += ["trainer.sample_every=0", "trainer.validate_every=1000", f"trainer.precision={precision}", f"out={out}"]
        assert cli.main(["train", "--config", "fashion", *words, f"trainer.accelerator={accelerator(device)}"]) == 0
        return history(out)["train/loss"][1]

    want = losses("cpu", "32-true")
    assert len(want) == 3
    assert losses(DEVICE, "32-true") == pytest.approx(want, rel=2e-2)
    assert losses(DEVICE, "bf16-mixed") == pytest.approx(want, rel=0.2)


def test_tuning_steps_are_those_of_the_cpu(tmp_path: Path):
    def losses(device: str, precision: str) -> list[float]:
        flow_map, reward = steerfm.load("fashion", device), steerfm.reward("classifier", target="Bag").to(device)
        module = FineTuning(flow_map, reward, Direct(), batch_size=8, scale=1.0, steps=3)  # type: ignore[arg-type]
        out = tmp_path / f"{device}-{precision}"
        where: dict[str, Any] = {"accelerator": accelerator(device), "devices": "1", "precision": precision}
        fit(module, module.data(), out, validate_every=0, log_every=1, progress=False, **where)
        return history(out)["train/loss"][1]

    want = losses("cpu", "32-true")
    assert len(want) == 3
    assert losses(DEVICE, "32-true") == pytest.approx(want, rel=2e-2)
    assert losses(DEVICE, "bf16-mixed") == pytest.approx(want, rel=0.2)


def accelerator(device: str) -> str:
    return "gpu" if device == "cuda" else device
