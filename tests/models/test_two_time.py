"""Networks that are given a second time, for the adapters of flow maps; on tiny random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import sure
from torch import Tensor

import steerfm
from steerfm.capabilities import TWO_TIME, VELOCITY
from steerfm.finetuning import Direct, FineTuning, LoRA
from steerfm.models import from_pipeline, save_lora
from steerfm.models.diffusers import pipeline_map
from steerfm.models.two_time import Averaged, Gated
from steerfm.rewards import as_reward
from steerfm.training import fit

pytest.importorskip("diffusers")
from pipelines import PIPELINES

SECOND = {"flux dev": "second_embedder", "flux schnell": "second_embedder", "sd3": "delta_embedder"}


def made(name: str, **arguments: Any) -> Any:
    pipe, call = PIPELINES[name]()
    one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()}
    one = {key: value for key, value in one.items() if not key.startswith("negative_")}
    return from_pipeline(pipe, steps=2, **({"guidance": 1.0} if name == "sd3" else {}), **one, **arguments)


def second(flow_map: Any, name: str) -> torch.nn.Module:
    return getattr(sure(pipeline_map(flow_map)).body.time_text_embed, SECOND[name])


def moved(flow_map: Any, name: str) -> Any:
    """The map with a second embedder that has learnt something."""
    generator = torch.Generator().manual_seed(5)
    for parameter in second(flow_map, name).parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return flow_map


@pytest.mark.parametrize("name", SECOND)
def test_at_first_it_is_the_network_that_it_was(name):
    plain, two = made(name), made(name, two_time=True)
    assert (plain.capabilities, two.capabilities) == (VELOCITY, TWO_TIME)
    x = torch.randn(3, *two.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.3, 0.9):
        torch.testing.assert_close(two.velocity(x, t), plain.velocity(x, t), atol=1e-5, rtol=1e-5)
    assert two.grid(4) == plain.grid(4)


@pytest.mark.parametrize("name", SECOND)
def test_the_second_time_is_where_a_jump_goes(name):
    two = moved(made(name, two_time=True), name)
    x = torch.randn(2, *two.shape, generator=torch.Generator().manual_seed(0))
    near, far = two.jump(x, 0.2, 0.3), two.jump(x, 0.2, 0.9)
    assert not torch.allclose((near - x) / 0.1, (far - x) / 0.7, atol=1e-4)
    seen = []
    embedding: Any = sure(pipeline_map(two)).body.time_text_embed
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    two.jump(x, torch.tensor([0.2, 0.4]), torch.tensor([0.5, 1.0]))
    handle.remove()
    torch.testing.assert_close(seen[0].float(), 1000 * torch.tensor([[0.8, 0.5], [0.6, 0.0]]))


def test_how_the_times_are_joined():
    class Times(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, t: Tensor, *others: Tensor) -> Tensor:
            return (self.weight * t).unsqueeze(1) + sum(others, torch.zeros(()))

    averaged: Any = Averaged(Times())
    averaged.second_embedder.weight.data.fill_(4.0)
    times, pooled = torch.tensor([[1.0, 10.0]]), torch.tensor([[100.0]])
    assert float(averaged(times, pooled)) == (2 * 1 + 4 * 10) / 2 + 100
    assert float(averaged(times[:, 0], pooled)) == 102

    class Combined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_proj, self.timestep_embedder, self.text_embedder = torch.nn.Identity(), Times(), torch.nn.Identity()

    gated: Any = Gated(Combined())
    gated.delta_embedder.weight.data.fill_(4.0)
    assert float(gated(times, pooled)) == pytest.approx(0.75 * 2 * 1 + 0.25 * 4 * 10 + 100)


@pytest.mark.parametrize("name", ["flux schnell", "sd3"])
def test_a_tuned_map_of_two_times_goes_back_with_its_surgery(name, tmp_path):
    pytest.importorskip("peft")
    base = made(name, two_time=True)
    reward = as_reward(lambda images: images.mean((1, 2, 3)))
    module = FineTuning(
        base, reward, Direct(), batch_size=2, control=0.0, scale=0.1, steps=2, lora=LoRA(rank=2), lr=0.1, warmup=1
    )
    fit(module, module.data(), tmp_path / "run", accelerator="cpu", log_every=9, validate_every=0, save_every=9, progress=False)
    tuned = module.averaged()
    file = save_lora(tuned, tmp_path)
    again = made(name, two_time=True, lora=file)
    x = torch.randn(2, *base.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.jump(x, 0.1, 0.8), tuned.jump(x, 0.1, 0.8), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(again.jump(x, 0.1, 0.8), base.jump(x, 0.1, 0.8), atol=1e-4)
    with pytest.raises(ValueError, match="two_time=True"):
        made(name, lora=file)


def test_all_methods_take_it_and_others_say_no():
    two = made("flux schnell", two_time=True)
    result = steerfm.steer(two, lambda images: images.mean((1, 2, 3)), steerfm.FeynmanKac(particles=2, steps=2))
    assert torch.isfinite(result.samples).all()
    with pytest.raises(ValueError, match="two_time=True is not supported for SanaTransformer2DModel"):
        made("sana", two_time=True)
