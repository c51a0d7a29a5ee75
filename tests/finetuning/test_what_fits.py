"""Tuning a map that cannot make every jump: each method does what is right for it, or says what to take in its place."""

from dataclasses import fields

import pytest
import torch

import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, TWO_TIME, VELOCITY, can
from steerfm.finetuning import METHOD, METHODS, Direct, FineTuning, Refit, chain
from steerfm.finetuning.direct import between
from steerfm.flowmap import NeuralFlowMap
from steerfm.registry import build
from steerfm.rewards import as_reward
from steerfm.training import fit

pytestmark = pytest.mark.slow
CAPABILITIES = {"two_time": TWO_TIME, "endpoint": ENDPOINT, "velocity": VELOCITY, "generator": GENERATOR}
QUICK = {"accelerator": "cpu", "log_every": 1, "save_every": 100, "validate_every": 0, "progress": False}


class Strict(NeuralFlowMap):
    """Stops a run that asks for something that it cannot do."""

    def average_velocity(self, x, s, t, cond):
        if not can(self, "two_time") and not can(self, "velocity"):
            assert bool((t == 1).all()), "a jump to a time before the data"
            assert can(self, "endpoint") or bool((s == 0).all()), "a jump from a time after the noise"
        return super().average_velocity(x, s, s if self.capabilities == VELOCITY else t, cond)

    def instantaneous_velocity(self, x, t, cond):
        assert can(self, "velocity"), "a velocity"
        return super().average_velocity(x, t, t, cond)


def linear(x):
    return x[:, 0]


@pytest.fixture
def strict(randomise):
    def strict(capability):
        network = randomise(steerfm.networks.Mlp(2, width=8, depth=1), scale=0.5)
        flow_map = Strict(network, (2,)).eval().requires_grad_(False)
        flow_map.capabilities = CAPABILITIES[capability]
        flow_map.steps = 1 if capability == "generator" else 3
        return flow_map

    return strict


FEW = {"samples": 16, "rounds": 1, "group": 2, "jumps": 2, "steps": 3, "ode": 2}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_tunes_right_or_is_refused_with_what_works(name, capability, strict, tmp_path):
    flow_map, keys = strict(capability), {field.name for field in fields(METHODS[name])}
    few = {key: value for key, value in FEW.items() if key in keys}
    method = build({"name": name, **few}, METHOD)
    try:
        module = FineTuning(flow_map, as_reward(linear), method, batch_size=4, control=0.1, steps=2)
    except ValueError as error:
        assert capability != "two_time"
        assert type(method).__name__ in str(error)
        assert "take" in str(error), error
        return
    trained = fit(module, module.data(), tmp_path, **QUICK)
    assert trained.global_step == 2
    law = module.law()
    assert torch.isfinite(law(steerfm.sampling.Noise([0, 1]), None)).all()


@pytest.mark.parametrize(
    ("capability", "spec"),
    [
        ("velocity", {"name": "draft_k", "jumps": 3}),
        ("velocity", {"name": "direct", "trained": None, "jumps": 3}),
        ("velocity", {"name": "weighted", "refit": Refit(trajectory=0.0), "samples": 16, "rounds": 1}),
        ("velocity", {"name": "policy", "transition": "diffuse", "group": 2}),
        ("velocity", {"name": "policy", "transition": "midpoint", "group": 2}),
        ("velocity", {"name": "noise", "jumps": 8}),
        ("endpoint", {"name": "draft", "jumps": 3}),
        ("endpoint", {"name": "draft_lv", "jumps": 2}),
        ("endpoint", {"name": "policy", "group": 2, "steps": 2}),
        ("endpoint", {"name": "noise"}),
        ("generator", {"name": "direct", "jumps": 1, "trained": None}),
        ("generator", {"name": "noise"}),
    ],
)
def test_what_refusals_name_works(capability, spec, strict, tmp_path):
    module = FineTuning(strict(capability), as_reward(linear), build(spec, METHOD), batch_size=4, control=0.1, steps=2)
    assert fit(module, module.data(), tmp_path, **QUICK).global_step == 2


@pytest.mark.parametrize(("capability", "fits_jumps"), [("two_time", True), ("velocity", False)])
@pytest.mark.parametrize("name", ["weighted", "orw_cfm"])
def test_a_network_without_two_times_is_never_fitted_to_jumps(name, capability, fits_jumps, strict, tmp_path, monkeypatch):
    """It would learn the mean velocity to a later time as that of this one."""
    method = build({"name": name, "samples": 16, "rounds": 1}, METHOD)
    module = FineTuning(strict(capability), as_reward(linear), method, batch_size=4, control=0.1, steps=2)
    seen = []
    monkeypatch.setattr(module, "log", lambda key, *_, **__: seen.append(key))
    fit(module, module.data(), tmp_path, **QUICK)
    assert ("train/jumps" in seen) == fits_jumps
    assert "train/velocity" in seen


@pytest.mark.parametrize(("capability", "jumps"), [("endpoint", 3), ("velocity", 3), ("generator", 1)])
def test_the_reward_goes_up_on_fixed_seeds(capability, jumps, strict, tmp_path):
    flow_map = strict(capability)
    method = Direct(jumps=jumps, trained=None, jitter=0.0)
    module = FineTuning(flow_map, as_reward(linear), method, batch_size=16, control=0.0, steps=30, lr=1e-2, ema=0.5)
    noise = list(range(64))
    before = linear(chain(jumps)(flow_map)(steerfm.sampling.Noise(noise), None)).mean()
    fit(module, module.data(), tmp_path, **QUICK)
    with torch.no_grad():
        after = linear(module.law()(steerfm.sampling.Noise(noise), None)).mean()
    assert after > before + 0.1


def test_the_law_of_a_trained_chain_is_how_the_map_is_sampled(strict):
    for capability in ("endpoint", "velocity"):
        flow_map = strict(capability)
        with torch.no_grad():
            law = Direct(jumps=3, trained=None).law(flow_map, flow_map)(steerfm.sampling.Noise([4, 5]), None)
        torch.testing.assert_close(law, steerfm.sample(flow_map, n=2, steps=3, seeds=4))


def test_tuning_follows_the_grid_of_the_map():
    grid = [0.0, 0.1, 0.4, 1.0]
    assert [between(grid, i / 3) for i in range(4)] == pytest.approx(grid)
    assert between(grid, 0.5) == pytest.approx(0.25)
    assert between([0.0, 0.5, 1.0], 0.3) == 0.3
    method = Direct(jumps=3, jitter=0.4)
    assert method.times([0.0, 0.0], grid) == pytest.approx(grid)
    low, high = method.times([-1.0, -1.0], grid), method.times([1.0, 1.0], grid)
    assert all(a < b for a, b in zip(low, low[1:]))
    assert all(a < b < c for a, b, c in zip(low[1:-1], grid[1:-1], high[1:-1]))


def test_a_base_with_its_adapters_off_is_as_capable_as_the_map(strict):
    flow_map = strict("endpoint")
    off = steerfm.finetuning.lora.LoRAOff(flow_map)
    assert (off.capabilities, off.steps, off.grid(2)) == (ENDPOINT, 3, flow_map.grid(2))
