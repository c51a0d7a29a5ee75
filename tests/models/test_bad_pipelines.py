"""What is no pipeline, or cannot be one here, is refused in one line that names the fix."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steerfm
from steerfm.models import from_pipeline
from tests.models.pipelines import diffusers, flux, sd3, sd15, sdxl


def refused(call: Any, *words: str, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as info:
        call()
    line = str(info.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


# --- places ----------------------------------------------------------------------------------------------------------
def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    refused(lambda: steerfm.load(f"diffusers:{tmp_path}"), str(tmp_path), "model_index.json", "save_pretrained")
    (tmp_path / "model_index.json").write_text("{}")
    refused(lambda: steerfm.load(f"diffusers:{tmp_path}"), str(tmp_path), "cannot be read")
    (tmp_path / "model_index.json").write_text("{nothing")
    refused(lambda: steerfm.load(f"diffusers:{tmp_path}"), str(tmp_path), "cannot be read")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    refused(lambda: steerfm.load(f"diffusers:{tmp_path}"), str(tmp_path), "NoSuchPipeline")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/such/folder", "a/b/c", ""])
def test_no_folder(name: str) -> None:
    refused(lambda: steerfm.load(f"diffusers:{name}"), f"diffusers:{name}: no such folder", kind=FileNotFoundError)


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: steerfm.load("diffusers:owner/model"), "owner/model", "hf download owner/model --local-dir FOLDER")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    refused(lambda: steerfm.load("diffusers:somewhere"), "pip install 'steerfm[diffusers]'", kind=ImportError)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    pipe, _ = sd3()
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    refused(lambda: steerfm.load(f"diffusers:{tmp_path}"), "cannot be read", "safetensors")


# --- pipelines -------------------------------------------------------------------------------------------------------
class Other(diffusers.DiffusionPipeline):
    """A pipeline that goes as far as it is told."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, how: str = "fails", num_inference_steps: int = 4) -> Any:
        if how == "fails":
            raise RuntimeError("first line\nsecond line")


def test_a_first_call_that_cannot_be_captured() -> None:
    pipe, _ = sd15()
    other = Other(pipe.unet, pipe.scheduler)
    refused(lambda: from_pipeline(other), "Other cannot be called: RuntimeError: first line")
    refused(lambda: from_pipeline(other, how="ends"), "Other: its call ends without a step of its scheduler")
    refused(lambda: from_pipeline(object()), "object", "a transformer or unet and a scheduler is needed")
    pipe.unet = None
    refused(lambda: from_pipeline(pipe), "StableDiffusionPipeline", "a transformer or unet")


def test_a_pipeline_that_refuses_its_arguments_is_quoted() -> None:
    pipe, call = sd15()
    refused(lambda: from_pipeline(pipe, **{**call, "height": 17}), "StableDiffusionPipeline cannot be called", "divisible by 8")
    refused(lambda: from_pipeline(pipe, "a cat"), "StableDiffusionPipeline cannot be called")  # it has no text encoder


def test_schedulers_that_are_not_known() -> None:
    pipe, call = sdxl()
    pipe.scheduler = diffusers.CMStochasticIterativeScheduler()
    refused(
        lambda: from_pipeline(pipe, guidance=1.0, **call),
        "CMStochasticIterativeScheduler is not supported",
        "set pipe.scheduler",
    )


def test_two_networks_without_a_boundary() -> None:
    pipe, call = sd3()
    pipe.transformer_2 = pipe.transformer
    refused(lambda: from_pipeline(pipe, **call), "StableDiffusion3Pipeline has two networks", "transformer_2=None")


def test_a_network_that_gives_another_shape() -> None:
    pipe, call = flux()
    fm = from_pipeline(pipe, **call)
    original = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: (original(*args, **kwargs)[0][:, 1:],)
    refused(lambda: steerfm.sample(fm, n=2), "FluxTransformer2DModel returns (95, 16) for states of (96, 16)")
    refused(lambda: from_pipeline(pipe, **call), "FluxTransformer2DModel returns (95, 16) for states of (96, 16)")


# --- arguments -------------------------------------------------------------------------------------------------------
def test_arguments() -> None:
    pipe, call = sd3()
    refused(lambda: from_pipeline(pipe, **call, heigth=8), "StableDiffusion3Pipeline takes no heigth= (did you mean 'height'?)")
    refused(lambda: from_pipeline(pipe, **call, num_inference_steps=3), "num_inference_steps=: use steps=")
    refused(lambda: from_pipeline(pipe, **call, generator=torch.Generator()), "generator=: use seeds= of sample and steer")
    refused(lambda: from_pipeline(pipe, **call, steps=0), "steps=0")
    half: Any = 2.5
    refused(lambda: from_pipeline(pipe, **call, steps=half), "steps=2.5")
    refused(lambda: from_pipeline(pipe, **call, capability="jump"), "unknown capability 'jump'", "endpoint")
    refused(lambda: from_pipeline(pipe, **call, guidance=2.0, guidance_scale=3.0), "guidance_scale= and guidance= are given")
    fm = from_pipeline(pipe, **call, guidance=1.0)
    wrong: list[Any] = [0, -1, 1.5]
    for steps in wrong:
        refused(lambda steps=steps: fm.grid(steps), f"steps={steps}")
    refused(lambda: steerfm.load("diffusers:owner/model", dtype="floaty"), "dtype='floaty'", "bfloat16")
    refused(lambda: steerfm.load("fashion", prompt="a cat"), "prompt=", "fashion", "takes no arguments")


def test_a_switch_that_there_is_not() -> None:
    pipe, call = sd3()
    pipe.register_modules(vae=None)
    refused(lambda: from_pipeline(pipe, **call, tiling=True), "tiling=True: StableDiffusion3Pipeline does not support it")
    fm = from_pipeline(pipe, **call, guidance=1.0)
    refused(lambda: fm.decode(steerfm.sample(fm, n=2)), "latents (4, 8, 8) cannot be decoded", "decode()")
