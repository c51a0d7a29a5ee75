"""A pipeline of diffusers on the command line: steered, killed and continued, tuned, and loaded again. Tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import steerfm
from steerfm import cli

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Stable Diffusion of 16 x 16 pixels, which is asked in words."""
    place = tmp_path_factory.mktemp("pipeline")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (place / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer(
        str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=16, pad_token="<|endoftext|>"
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(sample_size=16, block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(str(place / "pipe"), safe_serialization=True)
    return place / "pipe"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def asked(folder: Path, *more: str) -> list[str]:
    return [f"model=diffusers:{folder}", "model.height=16", "model.width=16", "model.steps=3", "model.guidance=2", *more]


STEER = ["reward=brightness", "judge=null", "prompt=a red fox", "n=2", "batch_size=1", "method=best_of_n", "method.particles=3"]


def test_a_pipeline_is_steered_like_a_shipped_model(folder, tmp_path, capsys):
    assert cli.main(["steer", *asked(folder, *STEER), "method.steps=3", "out=run"]) == 0
    for name in ("config.yaml", "result.json", "samples.safetensors", "grid.png", "trace.png", "report.html"):
        assert (tmp_path / "run" / name).is_file(), name
    plain = steerfm.load(f"diffusers:{folder}", height=16, width=16, steps=3, guidance=2.0)
    result = steerfm.steer(plain, "brightness", steerfm.BestOfN(particles=3, steps=3), n=2, strength=10.0, cond="a red fox")
    torch.testing.assert_close(load_file(tmp_path / "run" / "samples.safetensors")["samples"], result.samples)
    capsys.readouterr()
    assert cli.main(["steer", *asked(folder, "reward=brightness", "prompt=a fox", "n=1", "out=usual")]) == 0
    assert "since the model has only a velocity" in " ".join(capsys.readouterr().out.split())


def test_a_killed_run_continues_to_the_same_tensors(folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef reward(images):\n"
        "    if os.path.exists('stop') and os.path.exists('once'): raise KeyboardInterrupt\n"
        "    open('once', 'w').close()\n    return images.mean((1, 2, 3))\n"
    )
    steer = ["steer", *asked(folder, *STEER, "method.steps=2")]
    steer[steer.index("reward=brightness")] = "reward=mine.py:reward"
    assert cli.main([*steer, "out=whole"]) == 0
    (tmp_path / "once").unlink()
    (tmp_path / "stop").touch()
    assert cli.main([*steer, "out=killed"]) == 130
    (tmp_path / "stop").unlink()
    assert cli.main([*steer, "out=killed"]) == 0
    whole, killed = (load_file(tmp_path / run / "samples.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_a_pipeline_is_tuned_and_its_adapter_loads_here_and_there(folder, tmp_path, capsys):
    pytest.importorskip("peft")
    finetune = [
        "finetune", *asked(folder), "reward=brightness", "judge=null", "prompt=[a red fox, a blue cat]",
        "lora.rank=2", "optimizer.steps=4", "optimizer.lr=0.03", "batch_size=4", "watch.n=8", "watch.base=8",
        "watch.report=8", "watch.every=2", "watch.patience=0", "trainer.accelerator=cpu", "out=run",
    ]  # fmt: skip
    assert cli.main(finetune) == 0
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    assert file.is_file() and (tmp_path / "run" / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "method={name: draft_k, jumps: 3}, since the model has only a velocity" in " ".join(shown.split())
    assert str(file.relative_to(tmp_path)) in "".join(shown.split())
    tuned = steerfm.load(file)
    mine = steerfm.sample(tuned, n=2, seeds=5, cond="a red fox")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, feature_extractor=None)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    there = steerfm.models.from_pipeline(pipe, height=16, width=16, steps=3, guidance=2.0)
    torch.testing.assert_close(steerfm.sample(there, n=2, seeds=5, cond="a red fox"), mine, atol=1e-5, rtol=1e-5)
    base = steerfm.load(f"diffusers:{folder}", height=16, width=16, steps=3, guidance=2.0)
    assert not torch.allclose(steerfm.sample(base, n=2, seeds=5, cond="a red fox"), mine, atol=1e-4)
    torch.testing.assert_close(
        steerfm.sample(tuned.with_strength(0.0), n=2, seeds=5, cond="a red fox"),
        steerfm.sample(base, n=2, seeds=5, cond="a red fox"),
    )
    assert cli.main(["sample", f"model={file}", "prompt=a fox", "n=2", "out=samples"]) == 0
