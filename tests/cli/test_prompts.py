"""Prompts on the command line: one, several, files; a grid and numbers for each; sums of rewards by yaml and by Python."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import steerfm
from steerfm import cli
from steerfm.cli.finetune import make_tasks
from steerfm.cli.prompts import read_prompts
from steerfm.encoders import TextEncoder
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import UNet

FAST = ["method=best_of_n", "method.particles=4", "n=2", "judge=null"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, randomise) -> str:
    """A small map that reads words, with random weights, in a file."""
    architecture = {"channels": 3, "widths": [8], "text": 256, "attention": False}
    network = randomise(UNet(**architecture))
    flow_map = NeuralFlowMap(network, (3, 16, 16), text=TextEncoder("emoji-clip", 256))
    return str(flow_map.save(tmp_path_factory.mktemp("words") / "words", {"name": "unet", **architecture}, {}, half=False))


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_several_prompts_get_the_same_seeds_and_a_grid_each(capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red heart\n\npizza\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red heart"}\n{"prompt": "pizza", "id": 2}\n')
    samples = []
    for prompt in ("prompts.txt", "prompts.jsonl", "[red heart, pizza]"):
        code, _, err = run(capsys, "steer", f"model={model}", f"prompt={prompt}", "reward=clip", f"out={len(samples)}", *FAST)
        assert code == 0, err
        samples.append(load_file(tmp_path / str(len(samples)) / "samples.safetensors"))
    assert all(torch.equal(samples[0][name], other[name]) for other in samples[1:] for name in samples[0])
    assert samples[0]["samples"].shape[:2] == (4, 4)  # two of each prompt
    found = json.loads((tmp_path / "0" / "result.json").read_text())
    assert [row["prompt"] for row in found["prompts"]] == ["red heart", "pizza"]
    assert (tmp_path / "0" / "grid-0.png").is_file() and (tmp_path / "0" / "grid-1.png").is_file()
    fm = steerfm.load(model)
    pizza = steerfm.steer(fm, steerfm.reward("clip"), steerfm.BestOfN(particles=4), 2, 0, 10.0, "pizza")
    torch.testing.assert_close(pizza.samples, samples[0]["samples"][2:])
    code, out, err = run(capsys, "sample", f"model={model}", "prompt=prompts.txt", "n=3", "out=s")
    assert code == 0 and "6 samples" in out, err


@pytest.mark.parametrize(
    ("prompt", "fix"),
    [
        ("nowhere.txt", "nowhere.txt: no such file"),
        ("empty.txt", "has no prompts"),
        ("wrong.jsonl", 'wrong.jsonl, line 2: not {"prompt": "..."}'),
    ],
)
def test_files_that_cannot_be_used(capsys, tmp_path, monkeypatch, model, prompt, fix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    code, _, err = run(capsys, "sample", f"model={model}", f"prompt={prompt}")
    assert code == 2 and fix in err and err.count("\n") == 1


def test_the_prompts_that_ship_are_found_by_name_and_judged_several_times_each(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    texts = read_prompts("emoji.txt")
    assert len(texts) == len(set(texts)) == 1436
    tasks = make_tasks(steerfm.load(model), None, "emoji.txt", 40)  # type: ignore[arg-type]
    assert tasks.prompts == texts[:5] * 8
    (tmp_path / "emoji.txt").write_text("my own\n")
    assert read_prompts("emoji.txt") == ["my own"]


def test_a_label_for_a_map_of_words_is_refused(capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "sample", f"model={model}", "label=Bag")
    assert code == 2 and "prompt='Bag'" in err
    code, _, err = run(capsys, "steer", f"model={model}", "reward=clip")
    assert code == 2 and "needs prompts" in err


def test_a_sum_is_the_same_by_yaml_and_by_python(capsys, tmp_path, monkeypatch, model):
    """1.0 clip + 0.1 image_quality - 0.05 compressibility; result.json has the raw components and the total."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sum.yaml").write_text(
        f"model: {model}\nprompt: red heart\nreward:\n- {{name: clip}}\n- {{name: image_quality, weight: 0.1}}\n"
        "- {name: compressibility, weight: -0.05}\n"
    )
    code, _, err = run(capsys, "steer", "--config", "sum.yaml", "out=run", "strength=3", *FAST)
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    rw = steerfm.reward("clip") + 0.1 * steerfm.reward("image_quality") - 0.05 * steerfm.reward("compressibility")
    res = steerfm.steer(steerfm.load(model), rw, steerfm.BestOfN(particles=4), 2, 0, 3.0, "red heart")
    weights = res.log_weights.exp()
    for name, value in res.components.items():
        assert found["components"][name] == pytest.approx((weights * value).sum(1).mean().item(), abs=1e-3)
    raw = found["components"]
    total = raw["clip"] + 0.1 * raw["image_quality"] - 0.05 * raw["compressibility"]
    assert found["reward_weighted"] == pytest.approx(total, abs=1e-3)
    assert found["reward"] == rw.name and not rw.differentiable


@pytest.mark.slow
def test_fine_tuning_takes_prompts(capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    fast = [
        "batch_size=4", "watch.n=8", "watch.base=8", "watch.every=2", "optimizer.steps=2", "distil.steps=2", "distil.samples=8",
        "distil.batch_size=8", "judge=null",
    ]  # fmt: skip
    code, _, err = run(capsys, "finetune", f"model={model}", "prompt=[red heart, pizza]", "reward=clip", "out=run", *fast)
    assert code == 0, err
    tuned = steerfm.load(next((tmp_path / "run").glob("*-tuned.safetensors")))
    x = steerfm.sample(tuned, n=2, steps=1, seeds=0, cond=["red heart", "pizza"])
    assert torch.isfinite(x).all() and not torch.equal(x[0], x[1])
