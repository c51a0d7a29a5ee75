"""Maps of pipelines under steerfm: what they can do, precision, memory switches, steering."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm.models import from_pipeline
from steerfm.transitions import Bridge, Jump, Renoise
from tests.models.pipelines import PIPELINES, in_words
from tests.models.test_diffusers import UNGUIDED, made, relative

pytestmark = pytest.mark.slow
EVERYTHING = {"two_time", "endpoint", "velocity", "generator"}
TWO_TIME = ("anyflow r", "anyflow t-r", "hunyuan meanflow")
CONSISTENCY = ("sd 1.5 tcd", "lcm", "lcm-lora sd 1.5", "lcm-lora sdxl", "sana-sprint", "sd3 lcm", "sd3 re-noising")


def able(name: str) -> set[str]:
    return EVERYTHING if name in TWO_TIME else {"endpoint", "generator"} if name in CONSISTENCY else {"velocity"}


def bright(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).mean(1)


# --- what they can do ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_scheduler_says_of_its_network(name: str) -> None:
    _, _, fm = made(name)
    assert fm.capabilities == able(name)
    for steps in (1, 2, 3, 7):
        times = fm.grid(steps)
        assert times[0] == 0 and times[-1] == 1 and times == sorted(set(times)) and len(times) == steps + 1


def test_what_is_said_of_a_network_goes_first() -> None:
    pipe, call = PIPELINES["flux schnell"]()
    fm = from_pipeline(pipe, **call, capability="endpoint", steps=3)
    assert fm.capabilities == {"endpoint", "generator"} and fm.transition == Jump() and fm.steps == 3
    x = steerfm.sample(fm, n=2)
    assert torch.equal(x, steerfm.sample(from_pipeline(pipe, **call), n=2, steps=3))  # it is sampled as its scheduler does
    assert from_pipeline(pipe, **call, capability="generator").capabilities == {"generator"}


def test_two_times_are_two_times() -> None:
    """The second time of a two-time network matters, that of others does not."""
    for name, matters in (
        ("anyflow r", True),
        ("anyflow t-r", True),
        ("hunyuan meanflow", True),
        ("hunyuan", False),
        ("sd3", False),
    ):
        _, _, fm = made(name)
        x, cond = steerfm.sampling.Noise([0, 1]).start(fm), fm.condition(None, 2)
        s = torch.tensor([0.3, 0.5])
        with torch.no_grad():
            near, far = (fm.average_velocity(x, s, torch.full((2,), t), cond) for t in (0.6, 1.0))
        assert (relative(near, far) > 1e-4) == matters, name
        assert relative(fm.velocity(x, s, cond), fm.average_velocity(x, s, s, cond)) == 0


def test_the_transition_is_the_schedulers() -> None:
    moves = {"sana-sprint": Renoise, "lcm": Renoise, "sd3 re-noising": Renoise, "sd3": type(None), "anyflow r": type(None)}
    assert {name: type(made(name)[2].transition) for name in moves} == moves
    inner = {"sd 1.5 ddim": Jump(), "sdxl lightning": Jump(), "sdxl turbo": Bridge(1.0), "sd 1.5 ddpm": Bridge(1.0)}
    assert {name: made(name)[2].transition.inner for name in inner} == inner


# --- precision and memory --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["flux dev", "sd3", "sana-sprint", "sdxl lightning"])
def test_states_are_float32_beside_a_network_in_bfloat16(name: str) -> None:
    """FLUX multiplies its guidance by 1000 in bfloat16, which has no 3000, but has 4000."""
    pipe, call = PIPELINES[name]()
    call: dict[str, Any] = call | UNGUIDED[name] | ({"guidance": 4.0} if name == "flux dev" else {})
    expected = steerfm.sample(from_pipeline(pipe, **call), n=2, steps=64, seeds=0)
    pipe.to(dtype=torch.bfloat16)
    call = {key: value.bfloat16() if "embeds" in key and "mask" not in key else value for key, value in call.items()}
    narrow = from_pipeline(pipe, **call)
    assert narrow.dtype == torch.bfloat16
    x = steerfm.sample(narrow, n=2, steps=64, seeds=0)
    assert x.dtype == torch.float32
    assert relative(x, expected) < 1e-2
    assert narrow.decode(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["sd3", "sdxl lightning", "z-image"])
def test_a_map_is_cast_as_a_whole(name: str) -> None:
    pipe, call = PIPELINES[name]()
    fm = from_pipeline(pipe, **UNGUIDED[name], **call)
    expected = steerfm.sample(fm, n=2, steps=8, seeds=0)
    narrow = steerfm.sample(fm.to(torch.bfloat16), n=2, steps=8, seeds=0)
    assert fm.dtype == torch.bfloat16 and narrow.dtype == torch.float32 and 0 < relative(narrow, expected) < 1e-2
    assert fm.decode(narrow).dtype == torch.float32


def gradient(fm: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    fm.decode(fm.jump(x, 0.3, 1.0, fm.condition(None, 2))).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", ["flux dev", "sd3", "wan", "sdxl lightning", "z-image", "lumina 2", "anyflow r", "chroma"])
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    _, _, fm = made(name)
    x = steerfm.sampling.Noise([0, 1]).start(fm)
    expected = gradient(fm, x)
    assert expected.isfinite().all() and expected.norm() > 0
    assert all(parameter.grad is None for parameter in fm.parameters())
    pipe, call = PIPELINES[name]()
    thrifty: Any = from_pipeline(pipe, **UNGUIDED[name], **call, gradient_checkpointing=True)
    calls: list[int] = []
    blocks = {type(module): module for module in thrifty.network.modules() if getattr(module, "gradient_checkpointing", False)}
    assert blocks
    inner = [module for module in thrifty.network.modules() if type(module).__name__.endswith(("Attention", "Attention2D"))]
    for module in inner:
        module.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(gradient(thrifty, x), expected)
    assert len(calls) == 0 or len(calls) > len(inner)  # activations are made again


def test_tiles_and_slices() -> None:
    pipe, call = PIPELINES["sd3"]()
    fm = from_pipeline(pipe, **call, guidance=1.0, tiling=True, slicing=True)
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    assert fm.decode(steerfm.sample(fm, n=2)).shape == (2, 3, 8, 8)


def test_a_copy_shares_prompts_and_no_weights() -> None:
    _, _, fm = made("flux dev")
    other = copy.deepcopy(fm)
    assert other.prompts is fm.prompts and torch.equal(steerfm.sample(other, n=2), steerfm.sample(fm, n=2))
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(steerfm.sample(other, n=2), steerfm.sample(fm, n=2))


def test_the_page_of_models_runs(tmp_path: Path) -> None:
    """The ten lines of docs/models.md, with the folder of a tiny pipeline."""
    page = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text()
    section = page.partition("## A pipeline of diffusers")[2].partition("\n## ")[0]
    pipe, size = in_words()["sd3"]()
    pipe.save_pretrained(tmp_path)
    code = (
        section.partition("```python\n")[2]
        .partition("```")[0]
        .replace("FOLDER", str(tmp_path))
        .replace("steps=4", f"steps=4, **{size}")
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["pictures"].shape == (2, 3, 8, 8) and scope["result"].best().shape == (2, 4, 8, 8)


# --- steering --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["flux dev", "sd3", "sdxl lightning", "sana-sprint", "lcm"])
def test_the_method_that_fits_raises_a_reward(name: str) -> None:
    _, _, fm = made(name)
    plain = bright(fm.decode(steerfm.sample(fm, n=2, seeds=0)))
    result = steerfm.steer(fm, bright, n=2, seeds=0, strength=200.0)
    best = bright(fm.decode(result.best()))
    assert best.mean() > plain.mean() + 1e-3
    assert result.images().shape[-3] == 3


@pytest.mark.parametrize("name", ["flux dev", "sd3", "sdxl lightning", "sana-sprint"])
def test_gradients_steer(name: str) -> None:
    _, _, fm = made(name)
    method = steerfm.FMRGJ(steps=1) if name == "sana-sprint" else steerfm.DPS(steps=4)
    result = steerfm.steer(fm, bright, method, n=2, seeds=0, strength=200.0)
    assert result.samples.isfinite().all() and result.cost.backwards > 0


@pytest.mark.parametrize("name", ["flux schnell", "sd3", "wan", "anyflow r", "sana-sprint", "lcm", "qwen"])
def test_the_contract_of_models(name: str) -> None:
    _, _, fm = made(name)
    cond = fm.condition(None, 2)
    steerfm.testing.check_model(fm, {key: rows[:1] for key, rows in cond.items()})
