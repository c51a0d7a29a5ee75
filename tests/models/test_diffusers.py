"""Pipelines of diffusers as flow maps: the same numbers as the pipelines' own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm.models import from_pipeline
from tests.models.pipelines import PIPELINES, diffusers, edm, hunyuan, lumina2, qwen, relative, sd3, sdxl, wan, z_image

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's

UNGUIDED: dict[str, dict[str, Any]] = {name: {"guidance": 0.0 if name == "z-image" else 1.0} for name in PIPELINES}
for name in ("hunyuan", "hunyuan meanflow", "flux dev", "sana-sprint", "lcm"):  # an input of the network
    UNGUIDED[name] = {"guidance": 3.0}
SCALES = {"hunyuan": "distilled_guidance_scale", "hunyuan meanflow": "distilled_guidance_scale", "qwen": "true_cfg_scale"}
NO_SINGLE_STEP = {"qwen", "mochi"}  # one divides by 0 to NaN, the other to an error
CLOSE = {"sana-sprint": 5e-6}  # its angles are float32: pi / 2 to 4e-6
CLOSE |= {"sdxl edm": 3e-5, "sdxl edm v": 3e-5}  # its states are 80 wide and end at 1: see the test in double precision


@functools.cache
def made(name: str) -> tuple[Any, dict[str, Any], Any]:
    """A pipeline, arguments of its own call without guidance, and its map."""
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    fm = from_pipeline(pipe, **UNGUIDED[name], **call, scheduler_grid=True)
    return pipe, call | {SCALES.get(name, "guidance_scale"): UNGUIDED[name]["guidance"]}, fm


def own(name: str, pipe: Any, fm: Any, call: dict[str, Any], steps: int, output_type: str = "latent") -> Tensor:
    """What the pipeline gives from the noise that `steerfm.sample` draws for seeds 0 and 1."""
    noise = steerfm.sampling.Noise([0, 1])
    x = noise.start(fm)
    if name.startswith("anyflow"):
        x = x.transpose(1, 2)
    if name == "flux 2 klein":
        x = x.transpose(1, 2).unflatten(2, (8, 12))
    if name == "sana-sprint" and steps != 2:
        call = call | {"intermediate_timesteps": None}
    with pytest.MonkeyPatch.context() as patch:
        if name.startswith("sd3"):  # it does not pass its generator on to the scheduler
            patch.setattr(pipe.scheduler, "step", functools.partial(pipe.scheduler.step, generator=noise.generators))
        drawn = {"latents": x, "generator": noise.generators}
        return pipe(**call, **drawn, num_inference_steps=steps, output_type=output_type, return_dict=False)[0]


def arranged(fm: Any, x: Tensor, like: Tensor) -> Tensor:
    """Our latents as the pipeline gives them out."""
    if x.shape == like.shape:
        return x
    if x.ndim == 5:
        return x.transpose(1, 2)
    for piece in fm.decoder.pieces:
        x = piece(x)
    return x


# --- samples ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
def test_samples_are_the_pipelines_own(name: str, steps: int) -> None:
    pipe, call, fm = made(name)
    x = steerfm.sample(fm, n=2, steps=steps, seeds=0)
    if name in NO_SINGLE_STEP and steps == 1:
        assert x.isfinite().all()
        return
    out = own(name, pipe, fm, call, steps)
    assert relative(arranged(fm, x, out), out) < CLOSE.get(name, 1e-6)


GUIDED: dict[str, tuple[Any, float, dict[str, Any], float]] = {
    "sd3": (sd3, 5.0, {}, 5.0),
    "sana": (PIPELINES["sana"], 5.0, {}, 5.0),
    "wan": (wan, 5.0, {}, 5.0),
    "lumina 2": (lumina2, 5.0, {"cfg_normalization": False}, 5.0),
    "sdxl euler": (PIPELINES["sdxl euler"], 5.0, {}, 5.0),
    "sd 1.5 ddim v": (PIPELINES["sd 1.5 ddim v"], 7.5, {}, 7.5),
    "z-image": (z_image, 4.0, {}, 5.0),  # it counts from 0
    "pixart sigma": (PIPELINES["pixart sigma"], 4.0, {}, 4.0),
}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", GUIDED)
def test_guided_samples_are_the_pipelines_own(name: str, steps: int) -> None:
    make, scale, more, ours = GUIDED[name]
    pipe, call = make()
    pipe.set_progress_bar_config(disable=True)
    fm = from_pipeline(pipe, guidance=scale, **call, **more, scheduler_grid=True)
    assert isinstance(fm, steerfm.Guided) and fm.scale == ours and fm.evaluations == 2
    x = steerfm.sample(fm, n=2, steps=steps, seeds=0)
    assert relative(x, own(name, pipe, fm, call | more | {"guidance_scale": scale}, steps)) < 2e-6


def test_noise_of_ddim_is_a_bridge() -> None:
    pipe, call = PIPELINES["sd 1.5 ddim"]()
    pipe.set_progress_bar_config(disable=True)
    fm = from_pipeline(pipe, **call, guidance=1.0, eta=0.5)
    x = steerfm.sample(fm, n=2, steps=4, seeds=0)
    assert relative(x, own("ddim", pipe, fm, call | {"guidance_scale": 1.0, "eta": 0.5}, 4)) < 1e-6
    pipe, call = PIPELINES["sdxl euler"]()
    with pytest.raises(ValueError, match=r"eta=0\.3: eta is not supported for EulerDiscreteScheduler"):
        from_pipeline(pipe, **call, guidance=1.0, eta=0.3)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
def test_noise_of_tcd_overshoots(eta: float, steps: int) -> None:
    pipe, call = PIPELINES["sd 1.5 tcd"]()
    pipe.set_progress_bar_config(disable=True)
    fm = from_pipeline(pipe, **call, guidance=1.0, eta=eta)
    x = steerfm.sample(fm, n=2, steps=steps, seeds=0)
    assert relative(x, own("tcd", pipe, fm, call | {"guidance_scale": 1.0, "eta": eta}, steps)) < 1e-6
    plain = from_pipeline(pipe, **call, guidance=1.0)
    assert (relative(x, steerfm.sample(plain, n=2, steps=steps, seeds=0)) > 1e-2) == (steps > 1)


def test_guidance_that_is_not_linear_is_refused() -> None:
    pipe, call = qwen()
    negative = {"negative_prompt_embeds": -call["prompt_embeds"], "negative_prompt_embeds_mask": call["prompt_embeds_mask"]}
    with pytest.raises(ValueError, match=r"does not guide by .* switch guidance off, guidance=1"):
        from_pipeline(pipe, guidance=4.0, **call, **negative)
    with pytest.raises(ValueError, match="does not guide by"):
        from_pipeline((made := lumina2())[0], guidance=4.0, **made[1])  # cfg_normalization=True
    with pytest.raises(ValueError, match="does not guide by"):
        from_pipeline((made := sdxl())[0], guidance=4.0, guidance_rescale=0.7, **made[1])
    pipe, call = hunyuan(False, diffusers.AdaptiveProjectedMixGuidance())
    with pytest.raises(ValueError, match="guided by AdaptiveProjectedMixGuidance, which is not linear: give guider=None"):
        from_pipeline(pipe, **call)


def test_the_last_call_of_a_grid_is_not_wasted() -> None:
    """diffusers shifts twice: SD3 in four steps has t = .991 for its last call, Wan .953."""
    pipe, call = sd3()
    sigmas = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    once = 1 - 3 * sigmas / (1 + 2 * sigmas)
    fm = from_pipeline(pipe, guidance=1.0, **call)
    assert fm.grid(4) == pytest.approx([*once.tolist(), 1.0], abs=1e-6)
    assert from_pipeline(pipe, guidance=1.0, **call, scheduler_grid=True).grid(4)[-2] == pytest.approx(0.991, abs=1e-3)
    assert fm.grid(1) == [0.0, 1.0]


# --- pictures --------------------------------------------------------------------------------------------------------
PICTURES = ["flux dev", "flux 2 klein", "sd3", "sana", "wan", "anyflow r", "qwen", "z-image", "lumina 2", "sana-sprint", "lcm",
            "sdxl euler", "mochi", "cogvideox"]  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_the_pipelines_own_and_pass_gradients_on(name: str) -> None:
    pipe, call, fm = made(name)
    pictures = own(name, pipe, fm, call, 2, "pt")
    z = steerfm.sample(fm, n=2, steps=2, seeds=0).requires_grad_()
    with steerfm.cost.Ledger() as ledger:
        decoded = fm.decode(z)
    assert ledger.cost.decodes == 2 and decoded.dtype == torch.float32
    video = pictures.ndim == 5
    assert decoded.shape[1] == 3 and decoded.ndim == (5 if video else 4)
    assert relative(decoded.detach(), pictures.transpose(1, 2) if video else pictures) < 1e-6
    (gradient,) = torch.autograd.grad(decoded.square().sum(), z)
    assert gradient.isfinite().all() and gradient.norm() > 0


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_become_latents_of_the_maps_shape(name: str) -> None:
    """Exactly the inverse pieces around the autoencoder's own encoder."""
    _, _, fm = made(name)
    z = steerfm.sample(fm, n=2, steps=2, seeds=0)
    back = fm.encode(fm.decode(z))
    assert back.shape == z.shape and back.isfinite().all()
    inner = z
    for piece in fm.decoder.pieces:
        inner = piece(inner)
    for piece in reversed(fm.decoder.pieces):
        inner = piece.inverse(inner)
    assert relative(inner, z) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction", "sigma_max": 30.0}, {"sigma_data": 1.0}], ids=str)
def test_edm_is_nearer_to_double_precision_than_the_pipeline_is(config: dict[str, Any], steps: int) -> None:
    """The pipeline subtracts states that are 80 wide; the linear path has none."""
    pipe, call = edm(**config)
    fm = from_pipeline(pipe, guidance=1.0, **call)
    x, noise = steerfm.sample(fm, n=2, steps=steps, seeds=0), steerfm.sampling.Noise([0, 1]).start(fm)
    usual = {"guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    single = pipe(**call, **usual, latents=noise)[0]
    wide, _ = edm(**config)
    for part in (wide.unet, wide.vae):
        part.double()
    call = {key: value.double() if isinstance(value, Tensor) else value for key, value in call.items()}
    double = wide(**call, **usual, latents=noise.double())[0]
    assert relative(x, double) < 1e-5
    assert relative(x, double) < 2 * relative(single, double)
