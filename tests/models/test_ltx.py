"""LTX-Video, whose autoencoder may be told a time and be given noise: its pictures against the pipeline's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerfm
from steerfm.models import from_pipeline
from steerfm.randomness import stream

pytest.importorskip("diffusers")
from pipelines import ltx, relative


def both(monkeypatch: pytest.MonkeyPatch, timed: bool, **told: Any) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(map, its latents, its pictures, those of the pipeline from the same noise)."""
    pipe, call = ltx(timed)
    pipe.set_progress_bar_config(disable=True)
    fm = from_pipeline(pipe, guidance=1.0, scheduler_grid=True, **call, **told)
    z = steerfm.sample(fm, n=2, steps=2, seeds=0)
    monkeypatch.setattr(  # the pipeline draws that of its decoder itself
        "diffusers.pipelines.ltx.pipeline_ltx.randn_tensor",
        lambda shape, **_: torch.randn(1, *shape[1:], generator=stream(0, "decoder")).expand(shape),
    )
    noise = steerfm.sampling.Noise([0, 1]).start(fm)
    usual = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "pt", "return_dict": False}
    pictures = pipe(**call, **told, **usual, latents=noise)[0]
    return fm, z, fm.decode(z), pictures.transpose(1, 2)


@pytest.mark.parametrize(
    ("timed", "told"),
    [
        (False, {}), (True, {}), (True, {"decode_timestep": 0.05}),
        (True, {"decode_timestep": 0.05, "decode_noise_scale": 0.0}),
        (True, {"decode_timestep": 0.05, "decode_noise_scale": 0.025}),
    ],
)  # fmt: skip
def test_pictures_are_the_pipelines_own(timed: bool, told: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    fm, z, ours, theirs = both(monkeypatch, timed, **told)
    assert relative(ours, theirs) < 1e-5
    assert torch.equal(fm.decode(z), ours)  # the same noise always
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fm.decode(z).square().sum(), z)
    assert gradient.isfinite().all() and gradient.norm() > 0
    inner = z.detach()
    for piece in fm.decoder.pieces:
        inner = piece(inner)
    for piece in reversed(fm.decoder.pieces):
        inner = piece.inverse(inner)
    assert relative(inner, z.detach()) < 1e-6 and fm.encode(ours.detach()).shape == z.shape


def test_time_and_noise_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{}, {"decode_timestep": 0.5, "decode_noise_scale": 0.0}, {"decode_timestep": 0.5, "decode_noise_scale": 0.3}]
    pictures = [both(monkeypatch, True, **more)[2] for more in told]
    assert min(relative(pictures[0], pictures[1]), relative(pictures[1], pictures[2])) > 1e-5
