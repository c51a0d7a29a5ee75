"""What was tuned goes back to where it came from: adapters and whole pipelines, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import sure
from torch import Tensor

import steerfm
from steerfm.capabilities import can
from steerfm.finetuning import Direct, FineTuning, LoRA, chain
from steerfm.models import from_pipeline, save_lora, save_pipeline
from steerfm.models.diffusers import pipeline_map
from steerfm.models.lora import FILE
from steerfm.rewards import as_reward
from steerfm.sampling import Noise
from steerfm.training import fit

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from pipelines import PIPELINES

pytestmark = pytest.mark.slow
QUICK: dict[str, Any] = {"accelerator": "cpu", "log_every": 50, "validate_every": 0, "save_every": 100, "progress": False}
NAMES = ["flux schnell", "sd3", "sd 1.5 ddim", "sdxl ddim", "lcm", "sana-sprint"]


def brightness(images: Tensor) -> Tensor:
    return images.mean(tuple(range(1, images.ndim)))


def made(name: str, **arguments: Any) -> tuple[Any, Any]:
    """A pipeline of one row, and its map without guidance."""
    pipe, call = PIPELINES[name]()
    one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()}
    one = {key: value for key, value in one.items() if not key.startswith("negative_")}
    guidance = None if name in ("flux schnell", "sana-sprint", "lcm") else 1.0
    return pipe, from_pipeline(pipe, steps=2, guidance=guidance, **one, **arguments)


def tuned(base: Any, folder: Path, steps: int = 3, lora: LoRA | None = None, **options: Any) -> FineTuning:
    module = FineTuning(
        base, as_reward(brightness), Direct(jumps=2, trained=None, jitter=0.0), batch_size=4, control=0.0, scale=0.05,
        steps=steps, warmup=1, lora=lora, ema=0.5, **options,
    )  # fmt: skip
    fit(module, module.data(), folder, **QUICK)
    return module


def drawn(flow_map: Any, n: int = 4) -> Tensor:
    with torch.no_grad():
        return chain(2)(flow_map)(Noise(list(range(n))), None)


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_tuning_raises_the_reward_and_its_adapter_loads_in_diffusers(name, tmp_path):
    _, base = made(name)
    before = drawn(base)
    module = tuned(base, tmp_path / "run", steps=20, lora=LoRA(rank=2), lr=3e-2)
    after = module.averaged()
    samples = drawn(after)
    assert brightness(base.decode(samples)).mean() > brightness(base.decode(before)).mean()
    torch.testing.assert_close(drawn(base), before)  # the base is what it was
    torch.testing.assert_close(drawn(module.reference), before)  # so is the map with its adapters off

    file = save_lora(after, tmp_path / "adapter")
    assert file == tmp_path / "adapter" / FILE
    other, again = made(name)
    network: Any = sure(pipeline_map(again)).body
    part = "transformer" if hasattr(other, "transformer") else "unet"
    if hasattr(other, "load_lora_weights"):
        other.load_lora_weights(str(tmp_path / "adapter"), weight_name=FILE)
    else:
        network.load_lora_adapter(str(tmp_path / "adapter"), weight_name=FILE, prefix=part)
    torch.testing.assert_close(drawn(again), samples, atol=1e-5, rtol=1e-5)
    _, ours = made(name, lora=tmp_path / "adapter")
    torch.testing.assert_close(drawn(ours), samples, atol=1e-5, rtol=1e-5)
    _, off = made(name, lora=file, lora_scale=0.0)
    torch.testing.assert_close(drawn(off), before)


@pytest.mark.parametrize("name", ["flux schnell", "sd 1.5 ddim"])
def test_an_adapter_of_diffusers_with_a_scale_of_its_own_loads_here(name, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, base = made(name)
    network: Any = sure(pipeline_map(base)).body
    torch.manual_seed(3)
    network.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False))
    want = drawn(base)
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    layers = get_peft_model_state_dict(network)
    metadata = {f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict()}
    pipe.save_lora_weights(str(tmp_path), **{f"{part}_lora_layers": layers}, **metadata)
    _, again = made(name, lora=tmp_path)
    torch.testing.assert_close(drawn(again), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sd 1.5 ddim"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_full_weights_go_back_into_the_folder_of_the_pipeline(name, lora, tmp_path):
    pipe, base = made(name)
    own = sure(pipeline_map(base)).body
    module = tuned(base, tmp_path / "run", lora=lora, lr=1e-2)
    after = module.averaged()
    folder = save_pipeline(after, tmp_path / "pipeline")
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    assert getattr(pipe, part) is own
    read = type(pipe).from_pretrained(str(folder), **{k: None for k, v in pipe.components.items() if v is None})
    _, call = PIPELINES[name]()
    one: dict[str, Any] = {key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()}
    again = from_pipeline(read, steps=2, guidance=1.0, **{k: v for k, v in one.items() if not k.startswith("negative_")})
    torch.testing.assert_close(drawn(again), drawn(after), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux schnell", "lcm"])
@pytest.mark.parametrize("method", [
    {"name": "draft_k", "jumps": 2},
    {"name": "weighted", "samples": 8, "rounds": 1, "jumps": 2, "refit": {"trajectory": 0.0}},
    {"name": "policy", "group": 2, "steps": 2},
    {"name": "nft", "group": 2, "ode": 2},
    {"name": "forward", "group": 2},
    {"name": "noise"},
], ids=lambda spec: spec["name"])  # fmt: skip
def test_every_family_tunes_an_adapter_or_says_what_does(name, method, tmp_path):
    from steerfm.finetuning import METHOD
    from steerfm.registry import build

    _, base = made(name)
    if can(base, "velocity"):
        method = method | {"policy": {"transition": "midpoint"}, "noise": {"jumps": 8}}.get(method["name"], {})
    options: dict[str, Any] = {"batch_size": 4, "control": 0.1, "scale": 0.05, "lora": LoRA(rank=2)}
    if method["name"] == "forward" or (method["name"] in ("weighted", "nft") and not can(base, "velocity")):
        with pytest.raises(ValueError, match="does not fit this model"):
            FineTuning(base, as_reward(brightness), build(method, METHOD), steps=2, **options)
        return
    module = FineTuning(base, as_reward(brightness), build(method, METHOD), steps=2, **options)
    fit(module, module.data(), tmp_path / "run", **QUICK)
    save_lora(module.averaged(), tmp_path)


def test_adapters_of_another_architecture_are_one_line(tmp_path):
    _, base = made("flux schnell")
    save_lora(tuned(base, tmp_path / "run", lora=LoRA(rank=2)).averaged(), tmp_path)
    for name in ("sd3", "sd 1.5 ddim"):
        with pytest.raises(ValueError, match="of another architecture") as error:
            made(name, lora=tmp_path)
        assert "\n" not in str(error.value) and "two_time" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=FILE):
        made("sd3", lora=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no adapters"):
        save_lora(base, tmp_path)
    with pytest.raises(ValueError, match="not the map of a pipeline"):
        save_lora(steerfm.load("fashion"), tmp_path)


def test_an_adapter_for_two_times_needs_a_network_with_two_times(tmp_path):
    from steerfm.models.lora import write

    factors = {
        "time_text_embed.second.linear_1.down": torch.zeros(2, 4),
        "time_text_embed.second.linear_1.up": torch.zeros(4, 2),
    }
    write(factors, tmp_path / FILE, "transformer")
    with pytest.raises(ValueError, match="needs a network with two times: two_time=True"):
        made("flux schnell", lora=tmp_path)


def test_an_adapter_that_moves_the_noise_is_loaded_as_what_was_learnt(tmp_path, monkeypatch):
    """It is no adapter of the network alone, which is said where it is taken for one."""
    import json

    from pipelines import in_words

    from steerfm import cli

    monkeypatch.chdir(tmp_path)
    pipe, call = in_words()["lcm"]()
    pipe.save_pretrained("pipe", safe_serialization=True)
    words = [
        "finetune", "model=diffusers:pipe", *(f"model.{key}={value}" for key, value in call.items()), "model.steps=2",
        "reward=brightness", "judge=null", "prompt=a cat", "method=noise", "lora.rank=2", "optimizer.steps=3", "batch_size=2",
        "optimizer.lr=0.03", "watch.n=4", "watch.base=8", "watch.patience=0", "trainer.accelerator=cpu", "out=run",
    ]  # fmt: skip
    assert cli.main(words) == 0
    file = Path("run/adapter") / FILE
    tuned = steerfm.load(file)
    reward = brightness(tuned.decode(steerfm.sample(tuned, n=4, seeds=0, cond="a cat"))).mean().item()
    readings = json.loads(Path("run/result.json").read_text())["readings"]
    assert reward == pytest.approx(readings["as learnt"]["reward"], abs=1e-5)
    assert reward != pytest.approx(readings["base, 2 jumps"]["reward"], abs=1e-4)
    for path in (file, file.parent):
        with pytest.raises(ValueError, match="is an adapter of the noise"):
            from_pipeline(pipe, **call, lora=path)
