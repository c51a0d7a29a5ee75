"""FLUX, SD3, SDXL, LCM and SANA-Sprint, tiny and random, on the command line: steered, killed and continued, tuned, and loaded
again by diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from steerfm_rewards.clip import Clip

import steerfm
from steerfm import cli

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow
NAMES = ("flux", "sd3", "sdxl", "lcm", "sana-sprint")
PROMPT = "a red heart"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The folder of each pipeline, and what its call takes."""
    from tests.models.pipelines import in_words

    place, out = tmp_path_factory.mktemp("pipelines"), {}
    for name in NAMES:
        pipe, call = in_words()[name]()
        pipe.save_pretrained(str(place / name), safe_serialization=True)
        out[name] = place / name, dict(call) | {"steps": 2}
    return out


def asked(at: tuple[Path, dict[str, Any]], *more: str) -> list[str]:
    folder, call = at
    settings = [f"model.{key}={json.dumps(value)}" for key, value in call.items()]
    reward = ["reward=clip", f"reward.prompt={PROMPT}", "judge=null"]
    return [f"model=diffusers:{folder}", *settings, *reward, f"prompt={PROMPT}", *more]


class Interrupted:
    """`Clip.score` that counts its calls, and is interrupted at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.last, score = 0, float("inf"), Clip.score

        def counted(reward: Clip, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            if self.calls > self.last:
                raise KeyboardInterrupt
            return score(reward, *args, **kwargs)

        monkeypatch.setattr(Clip, "score", counted)


STEER = ("n=2", "batch_size=1", "method.particles=3", "strength=20")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_steered_killed_and_continued(name, folders, tmp_path, monkeypatch):
    steer, clip = ["steer", *asked(folders[name], *STEER)], Interrupted(monkeypatch)
    assert cli.main([*steer, "out=whole"]) == 0
    for file in ("config.yaml", "result.json", "samples.safetensors", "grid.png", "trace.png", "report.html"):
        assert (tmp_path / "whole" / file).is_file(), file
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["cost"]["forwards"] > 0 and "clip" in (tmp_path / "whole" / "report.html").read_text()
    clip.last = clip.calls + clip.calls * 3 // 4  # of the second of two batches
    assert cli.main([*steer, "out=killed"]) == 130
    assert not (tmp_path / "killed" / "result.json").exists() and list((tmp_path / "killed").rglob("*.safetensors"))
    clip.last = float("inf")
    assert cli.main([*steer, "out=killed"]) == 0
    whole, killed = (load_file(tmp_path / run / "samples.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.parametrize("name", NAMES)
def test_its_adapter_raises_the_reward_and_loads_in_diffusers(name, folders, tmp_path):
    pytest.importorskip("peft")
    folder, call = folders[name]
    words = asked(
        folders[name], "lora.rank=4", "optimizer.steps=12", "optimizer.lr=0.03", "batch_size=8", "control=0.1",
        "watch.n=8", "watch.base=8", "watch.every=12", "watch.patience=0", "trainer.accelerator=cpu", "out=run",
    )  # fmt: skip
    assert cli.main(["finetune", *words]) == 0
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    base, tuned = steerfm.load(f"diffusers:{folder}", **call), steerfm.load(file)
    reward = steerfm.reward("clip", prompt=PROMPT)
    before, after = (steerfm.sample(fm, n=16, seeds=100, cond=PROMPT) for fm in (base, tuned))
    gain = reward(tuned.decode(after)) - reward(base.decode(before))
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **parts_without(folder))
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    there = steerfm.models.from_pipeline(pipe, **call)
    pictures = there.decode(steerfm.sample(there, n=4, seeds=100, cond=PROMPT))
    torch.testing.assert_close(pictures, tuned.decode(after[:4]), atol=1e-5, rtol=0)


def parts_without(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without."""
    index = json.loads((folder / "model_index.json").read_text())
    return {part: None for part, where in index.items() if where == [None, None]}


@pytest.mark.parametrize(
    ("name", "samplers"), [("lcm", ["1 jump", "2 jumps"]), ("sdxl", ["1 step", "2 steps", "3 Euler steps"])]
)
def test_it_is_evaluated_on_the_prompts_that_it_is_asked_for(name, samplers, folders, tmp_path):
    folder, call = folders[name]
    settings = [f"model.{key}={json.dumps(value)}" for key, value in call.items()]
    found = {}
    for prompt in ("a cat", "a dog", "[a cat, a dog]"):
        words = [f"model=diffusers:{folder}", *settings, f"prompt={prompt}", "n=4", "steps=[1,2]", "euler=3"]
        assert cli.main(["evaluate", *words, f"out={len(found)}"]) == 0
        result = json.loads((tmp_path / str(len(found)) / "result.json").read_text())
        assert list(result["samplers"]) == samplers and "semigroup error" not in result
        found[prompt] = result["samplers"][samplers[-1]]["diversity"]
    assert len(set(found.values())) == 3
