"""Low-rank adapters: the base is untouched, what is saved loads without peft, and their strength is a scale."""

from __future__ import annotations

import copy

import pytest
import torch
from kinds import a

import steerfm
from steerfm import zoo
from steerfm.finetuning import FineTuning, LoRA, Policy
from steerfm.finetuning.lora import LoRAOff, switched_off
from steerfm.flowmap import NeuralFlowMap
from steerfm.models.lora import factors as factors_of
from steerfm.models.lora import merged
from steerfm.networks import UNet
from steerfm.rewards import as_reward


@pytest.fixture
def flow_map(randomise):
    return NeuralFlowMap(randomise(UNet(1, widths=(8, 16), patch=2, classes=2)), (1, 8, 8), class_names=("a", "b"))


@pytest.fixture
def adapted(flow_map, randomise):
    """The map with adapters that do something."""
    network = copy.deepcopy(flow_map.network)
    LoRA(rank=2).inject(network)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return flow_map.with_network(network)


@pytest.fixture
def x():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_nothing_changes_until_they_are_trained(flow_map, x):
    network = copy.deepcopy(flow_map.network)
    LoRA(rank=2).inject(network)
    assert torch.equal(flow_map.with_network(network).jump(x, 0.0, 1.0), flow_map.jump(x, 0.0, 1.0))
    trained = [p for p in network.parameters() if p.requires_grad]
    assert trained and all(p.numel() < 1000 for p in trained)


def test_switched_off_they_are_the_base_and_let_gradients_through(flow_map, adapted, x):
    off = LoRAOff(adapted)
    assert torch.equal(off.jump(x, 0.0, 0.5), flow_map.jump(x, 0.0, 0.5))
    assert not torch.allclose(adapted.jump(x, 0.0, 0.5), flow_map.jump(x, 0.0, 0.5))
    start = adapted.jump(x, 0.0, 0.5)
    off.jump(start, 0.5, 1.0).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.network.named_parameters() if "lora_B" in n)
    with switched_off(adapted.network):
        assert torch.equal(adapted.jump(x, 0.0, 0.5), flow_map.jump(x, 0.0, 0.5))


def test_merged_they_are_a_plain_network(flow_map, adapted, x):
    plain = flow_map.with_network(merged(adapted.network))
    assert torch.allclose(plain.jump(x, 0.0, 1.0), adapted.jump(x, 0.0, 1.0), atol=1e-5)
    assert plain.network.state_dict().keys() == flow_map.network.state_dict().keys()


def test_saved_apart_they_load_onto_their_base_at_any_strength(flow_map, adapted, x, tmp_path):
    card = {"name": "unet", "channels": 1, "widths": [8, 16], "patch": 2, "classes": 2}
    base = flow_map.save(tmp_path / "base", card, {}, half=False)
    factors = {name: value.contiguous() for name, value in factors_of(adapted.network).items()}
    tuned = zoo.with_adapters(steerfm.load(base), factors, tmp_path)
    assert torch.allclose(tuned.jump(x, 0.0, 1.0), adapted.jump(x, 0.0, 1.0), atol=1e-5)
    assert torch.allclose(tuned.with_strength(0).jump(x, 0.0, 1.0), flow_map.jump(x, 0.0, 1.0), atol=1e-6)
    half, layer = tuned.with_strength(0.5), "inputs.weight"
    weights = [m.body.state_dict()[layer] for m in (flow_map, half, tuned)]
    assert torch.allclose(weights[1], (weights[0] + weights[2]) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="another architecture"):
        zoo.with_adapters(steerfm.load(base), {"nowhere.up": torch.zeros(2, 2), "nowhere.down": torch.zeros(2, 2)}, tmp_path)


def test_a_map_that_was_not_tuned_has_no_strength(flow_map):
    with pytest.raises(ValueError, match="fine-tuned"):
        flow_map.with_strength(0.5)


def test_unknown_layers_are_named(flow_map):
    with pytest.raises(ValueError, match="did you mean 'conv1'"):
        LoRA(layers=["conv11"]).targets(flow_map.network)
    assert all(name.endswith("conv1") for name in LoRA(layers=["conv1"]).targets(flow_map.network))


def test_on_the_shipped_model_they_are_less_than_a_tenth():
    fm = a(NeuralFlowMap, steerfm.load("fashion"))
    module = FineTuning(fm, as_reward(lambda x: x.mean((1, 2, 3))), Policy(), lora=LoRA(rank=4), batch_size=16)
    sizes = {True: 0, False: 0}
    for p in module.network.parameters():
        sizes[p.requires_grad] += p.numel()
    assert sizes[True] < 0.1 * (sizes[True] + sizes[False])
