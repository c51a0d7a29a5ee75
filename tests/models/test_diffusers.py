"""Pipelines of diffusers as flow maps: the same numbers as the pipelines' own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm.models import from_pipeline
from tests.models.pipelines import PIPELINES

UNGUIDED = {name: {"guidance": 0.0 if name == "z-image" else 1.0} for name in PIPELINES}
for name in ("hunyuan", "hunyuan meanflow", "flux dev", "sana-sprint", "lcm"):  # an input of the network
    UNGUIDED[name] = {"guidance": 3.0}
SCALES = {"hunyuan": "distilled_guidance_scale", "hunyuan meanflow": "distilled_guidance_scale", "qwen": "true_cfg_scale"}
CLOSE = {"sana-sprint": 5e-6}  # its angles are float32: pi / 2 to 4e-6


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def own(name: str, pipe: Any, fm: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The pipeline's latents from the noise that `steerfm.sample` draws for seeds 0 and 1."""
    noise = steerfm.sampling.Noise([0, 1])
    x = noise.start(fm)
    if name.startswith("sd3"):  # it does not pass its generator on to the scheduler
        step = pipe.scheduler.step
        monkeypatch.setattr(torch, "randn_like", lambda like, **_: noise.normal(fm.shape, like))
        monkeypatch.setattr(pipe.scheduler, "step", functools.partial(step, generator=noise.generators))
    if name.startswith("anyflow"):
        x = x.transpose(1, 2)
    if name == "flux 2 klein":
        x = x.transpose(1, 2).unflatten(2, (8, 12))
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, latents=x, generator=noise.generators, output_type="latent", return_dict=False)[0]


def arranged(fm: Any, x: Tensor, like: Tensor) -> Tensor:
    """Our latents as the pipeline gives them out."""
    if x.shape == like.shape:
        return x
    if x.ndim == 5:
        return x.transpose(1, 2)
    for piece in fm.decoder.pieces:
        x = piece(x)
    return x


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
def test_samples_are_the_pipelines_own(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = PIPELINES[name]()
    fm = from_pipeline(pipe, **UNGUIDED[name], **call, scheduler_grid=True)
    x = steerfm.sample(fm, n=2, steps=steps, seeds=0)
    more = {SCALES.get(name, "guidance_scale"): UNGUIDED[name]["guidance"], "num_inference_steps": steps}
    if name == "sana-sprint" and steps != 2:
        more["intermediate_timesteps"] = None
    out = own(name, pipe, fm, call | more, monkeypatch)
    if name == "qwen" and steps == 1:  # the scheduler itself divides by 0
        assert out.isnan().all() and x.isfinite().all()
        return
    assert relative(arranged(fm, x, out), out) < CLOSE.get(name, 1e-6)
