"""Pipelines of two networks, one for much noise and one for little, as Wan 2.2 is; on tiny random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import sure
from torch import Tensor

import steerfm
from steerfm.finetuning import Direct, FineTuning, LoRA
from steerfm.models import from_pipeline, save_lora, save_pipeline
from steerfm.models.diffusers import pipeline_map
from steerfm.models.experts import Experts
from steerfm.models.lora import FILE, write
from steerfm.training import fit

pytest.importorskip("diffusers")
from pipelines import diffusers, relative, wan

STEPS = 5


class Brightness(steerfm.Reward):
    name, space = "brightness of a video", "video"

    def score(self, images: Tensor, prompts: Any = None, labels: Any = None) -> Tensor:
        return images.mean((1, 2, 3, 4))


BOUNDARIES = [1.0, 0.95, 0.9, 0.5, 0.0]
"""From the late network alone but for t = 0 to the early one alone."""


def pipeline(boundary: float, scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe, call = wan(scheduler)
    torch.manual_seed(7)
    second = diffusers.WanTransformer3DModel.from_config(pipe.transformer.config).eval()
    pipe = diffusers.WanPipeline(
        vae=pipe.vae, scheduler=pipe.scheduler, transformer=pipe.transformer, transformer_2=second, text_encoder=None,
        tokenizer=None, boundary_ratio=boundary,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def one_row(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in call.items()}


def own(pipe: Any, fm: Any, call: dict[str, Any], steps: int = STEPS) -> Tensor:
    noise = steerfm.sampling.Noise([0, 1]).start(fm)
    return pipe(**call, latents=noise, num_inference_steps=steps, output_type="latent", return_dict=False)[0]


@pytest.mark.parametrize("scales", [(1.0, None), (3.0, None), (4.0, 3.0), (3.0, 1.0)], ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_samples_are_the_pipelines_own(boundary: float, scales: tuple[float, float | None]) -> None:
    pipe, call = pipeline(boundary)
    given: dict[str, Any] = call | ({} if scales[1] is None else {"guidance_scale_2": scales[1]})
    fm = from_pipeline(pipe, guidance=scales[0], scheduler_grid=True, **given)
    x = steerfm.sample(fm, n=2, steps=STEPS, seeds=0)
    assert relative(x, own(pipe, fm, given | {"guidance_scale": scales[0]})) < 2e-6
    assert fm.evaluations == (1 if scales[0] == 1 else 2)


def test_both_networks_and_both_scales_matter() -> None:
    """Or the test above could not fail."""
    drawn = []
    for boundary, late in ((0.9, 3.0), (0.9, 1.0), (0.5, 3.0), (1.0, 3.0)):
        pipe, call = pipeline(boundary)
        fm = from_pipeline(pipe, guidance=3.0, guidance_scale_2=late, **call)
        drawn.append(steerfm.sample(fm, n=2, steps=STEPS, seeds=0))
    assert min(relative(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > 1e-3


def test_rows_of_both_kinds_in_one_call() -> None:
    pipe, call = pipeline(0.5)
    fm = from_pipeline(pipe, guidance=4.0, guidance_scale_2=2.0, **call)
    x = torch.randn(6, *fm.shape, generator=torch.Generator().manual_seed(0))
    s, t = torch.tensor([0.7, 0.1, 0.5, 0.9, 0.51, 0.0]), torch.ones(6)
    two: Any = fm.condition(None, 2)
    cond = {name: rows.repeat(3, *[1] * (rows.ndim - 1)) for name, rows in two.items()}
    whole = fm.jump(x, s, t, cond)
    for i in range(6):
        row = {name: rows[i : i + 1] for name, rows in cond.items()}
        torch.testing.assert_close(whole[i : i + 1], fm.jump(x[i : i + 1], s[i : i + 1], t[:1], row), atol=1e-5, rtol=1e-5)


def test_it_is_steered() -> None:
    pipe, call = pipeline(0.9)
    call = one_row(call)
    fm = from_pipeline(pipe, guidance=2.0, micro_batch=2, steps=3, **call)
    result = steerfm.steer(fm, Brightness(), steerfm.FeynmanKac(particles=2, steps=3, lookahead="denoise", transition="bridge"))
    assert torch.isfinite(result.samples).all()


def test_tuning_adapts_both_and_what_was_learnt_goes_back(tmp_path) -> None:
    pytest.importorskip("peft")

    def made(**arguments: Any) -> Any:
        pipe, call = pipeline(0.9)
        return from_pipeline(pipe, steps=3, guidance=1.0, **one_row(call), **arguments)

    base = made()
    module = FineTuning(
        base, Brightness(), Direct(jumps=3, trained=None), batch_size=2, control=0.0,
        scale=0.1, steps=2, lora=LoRA(rank=2), lr=0.1, warmup=1,
    )  # fmt: skip
    fit(module, module.data(), tmp_path / "run", accelerator="cpu", log_every=9, validate_every=0, save_every=9, progress=False)
    tuned = module.averaged()
    before, after = (steerfm.sample(fm, n=2, steps=3, seeds=0) for fm in (base, tuned))
    assert relative(after, before) > 1e-4
    file = save_lora(tuned, tmp_path)
    assert relative(steerfm.sample(made(lora=file), n=2, steps=3, seeds=0), after) < 1e-5
    there, _ = pipeline(0.9)
    there.load_lora_weights(str(tmp_path), weight_name=FILE)  # as diffusers has it: the first; the second by itself
    there.transformer_2.load_lora_adapter(str(tmp_path), weight_name=FILE, prefix="transformer_2")
    again = from_pipeline(there, steps=3, guidance=1.0, **one_row(pipeline(0.9)[1]))
    assert relative(steerfm.sample(again, n=2, steps=3, seeds=0), after) < 1e-5
    folder = save_pipeline(tuned, tmp_path / "whole")
    read = diffusers.WanPipeline.from_pretrained(str(folder), text_encoder=None, tokenizer=None)
    for name in ("transformer", "transformer_2"):
        want = getattr(sure(pipeline_map(made(lora=file))).body, name).state_dict()
        for key, value in getattr(read, name).state_dict().items():
            torch.testing.assert_close(value, want[key], atol=1e-6, rtol=1e-5)


def test_an_adapter_of_one_network_leaves_the_other(tmp_path) -> None:
    pipe, call = pipeline(0.9)
    layer, width = "blocks.0.attn1.to_q", pipe.transformer.blocks[0].attn1.to_q.weight.shape[0]
    factors = {f"{layer}.down": torch.ones(1, width), f"{layer}.up": torch.ones(width, 1)}
    for part, other in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
        pipe, call = pipeline(0.9)
        before = {name: getattr(pipe, name).get_submodule(layer).weight.clone() for name in (part, other)}
        from_pipeline(pipe, guidance=1.0, lora=write(factors, tmp_path / FILE, part), **call)
        torch.testing.assert_close(getattr(pipe, part).get_submodule(layer).weight, before[part] + 1)
        assert torch.equal(getattr(pipe, other).get_submodule(layer).weight, before[other])
    write(factors, tmp_path / FILE, "blocks")
    with pytest.raises(ValueError, match="does not say whether it is for transformer or transformer_2"):
        from_pipeline(pipe, guidance=1.0, lora=tmp_path, **call)


def test_a_folder_of_two_networks_is_loaded(tmp_path) -> None:
    pipe, call = pipeline(0.9)
    fm = from_pipeline(pipe, guidance=3.0, guidance_scale_2=2.0, **call)
    pipe.save_pretrained(str(tmp_path / "wan"), safe_serialization=True)
    again = steerfm.load(f"diffusers:{tmp_path / 'wan'}", guidance=3.0, guidance_scale_2=2.0, **call)
    assert isinstance(again.body, Experts) and again.body.boundary == 900
    assert relative(steerfm.sample(again, n=2, steps=2, seeds=0), steerfm.sample(fm, n=2, steps=2, seeds=0)) < 1e-6
    assert "late 2" in repr(again) and "scale 3" in repr(again)


def test_a_second_network_that_the_pipeline_does_not_ask_is_left_alone() -> None:
    pipe, call = wan()
    pipe.transformer_2 = pipe.transformer
    fm = from_pipeline(pipe, guidance=1.0, scheduler_grid=True, **call)
    assert fm.body is pipe.transformer
