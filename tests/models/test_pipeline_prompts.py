"""Prompts of pipelines: rows of a condition, each encoded once, and text encoders that go."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm.models import from_pipeline
from tests.models.pipelines import PIPELINES, in_words, of_any_length, relative

READERS = in_words() | of_any_length()
PROMPTS = ["a cat", "two dogs and a bird"]


@functools.cache
def made(name: str) -> tuple[Any, dict[str, Any], Any]:
    pipe, call = READERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, from_pipeline(pipe, steps=2, scheduler_grid=True, **call)


def own(pipe: Any, fm: Any, call: dict[str, Any], **more: Any) -> Tensor:
    noise = steerfm.sampling.Noise([0, 1])
    x = noise.start(fm)
    more = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False} | more
    return pipe(**call, latents=x, generator=noise.generators, **more)[0]


@pytest.mark.parametrize("name", READERS)
def test_prompts_are_rows(name: str) -> None:
    """Two prompts of different length, for two outputs: what the pipeline makes of both, with guidance by its own default."""
    pipe, call, fm = made(name)
    x = steerfm.sample(fm, n=2, seeds=0, cond=PROMPTS)
    assert relative(x, own(pipe, fm, call, prompt=PROMPTS)) < 1e-5
    rows = fm.condition(PROMPTS[::-1], 2)
    assert all(torch.equal(rows[name][[1, 0]], value) for name, value in fm.condition(PROMPTS, 2).items())
    alone = steerfm.sample(fm, n=1, seeds=1, cond=PROMPTS[1])
    assert relative(alone, x[1:]) < 1e-5


def test_a_negative_prompt_is_what_guidance_leads_away_from() -> None:
    pipe, call = in_words()["sd 1.5"]()
    fm = from_pipeline(pipe, PROMPTS, "blurry", guidance=3.0, **call, scheduler_grid=True)
    assert isinstance(fm, steerfm.Guided) and fm.scale == 3.0
    out = own(pipe, fm, call, prompt=PROMPTS, negative_prompt=["blurry"] * 2, guidance_scale=3.0)
    assert relative(steerfm.sample(fm, n=2, steps=2, seeds=0), out) < 1e-5
    plain = from_pipeline(pipe, PROMPTS, guidance=3.0, **call, scheduler_grid=True)
    assert relative(steerfm.sample(plain, n=2, steps=2, seeds=0), out) > 1e-3
    assert relative(steerfm.sample(plain, n=2, steps=2, seeds=0, negative="blurry"), out) < 1e-5


def test_each_prompt_is_encoded_once() -> None:
    pipe, call = in_words()["flux"]()
    fm = from_pipeline(pipe, "a cat", **call)
    seen: list[int] = []
    pipe.text_encoder_2.register_forward_pre_hook(lambda *_: seen.append(1))
    fm.condition(["a cat", "a dog", "a dog", "a cat"], 4)
    fm.condition("a dog", 3)
    assert len(seen) == 1
    fm.condition(["a bird", "a bee"], 2)
    fm.grid(7)
    copy.deepcopy(fm).condition("a bee", 1)
    assert len(seen) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sdxl", "lcm", "sana-sprint", "qwen"])
def test_text_encoders_go_and_their_prompts_stay(name: str) -> None:
    pipe, call = READERS[name]()
    encoders = [weakref.ref(part) for key, part in pipe.components.items() if "text_encoder" in key and part is not None]
    expected = steerfm.sample(from_pipeline(pipe, PROMPTS, **call), n=2, steps=2, seeds=0)
    fm = from_pipeline(pipe, PROMPTS, **call, drop_text_encoders=True)
    gc.collect()
    assert encoders and all(encoder() is None for encoder in encoders)
    assert torch.equal(steerfm.sample(fm, n=2, steps=2, seeds=0), expected)
    assert torch.equal(steerfm.sample(fm, n=2, steps=2, seeds=0, cond=PROMPTS), expected)
    assert len(fm.grid(5)) == 6
    with pytest.raises(ValueError, match="'a bird' is new, but the text encoders were dropped: give it in prompt="):
        fm.condition("a bird", 1)


def test_embeddings_in_place_of_words() -> None:
    pipe, call = PIPELINES["sd3"]()
    fm = from_pipeline(pipe, guidance=1.0, **call)
    rows: Any = fm.condition(None, 2)
    assert torch.equal(rows["encoder_hidden_states"], call["prompt_embeds"])
    with pytest.raises(ValueError, match="prompt_embeds= has 2 rows for n=3 outputs"):
        steerfm.sample(fm, n=3)
    with pytest.raises(ValueError, match="cond='a cat': this map was made with prompt_embeds="):
        steerfm.sample(fm, n=2, cond="a cat")
    with pytest.raises(ValueError, match="prompt= and prompt_embeds= are given"):
        from_pipeline(pipe, "a cat", guidance=1.0, **call)


def test_other_numbers_of_prompts_are_refused() -> None:
    _, _, fm = made("flux")
    with pytest.raises(ValueError, match="2 prompts for n=3 outputs"):
        fm.condition(PROMPTS, 3)
    two = from_pipeline(made("flux")[0], PROMPTS, **made("flux")[1])
    with pytest.raises(ValueError, match="2 prompts for n=3 outputs"):
        steerfm.sample(two, n=3)
