"""Files of models are checked before they are used: weights, the JSON beside them, open_clip folders, bases of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from kinds import a
from safetensors.torch import load_file, save_file

import steerfm
from steerfm import encoders, zoo
from steerfm.cli.bench import inert
from steerfm.flowmap import NeuralFlowMap
from steerfm.networks import Mlp

ARCHITECTURE = {"name": "mlp", "dim": 2, "width": 8, "depth": 1, "classes": 2}


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "own.safetensors"
    NeuralFlowMap(Mlp(2, width=8, depth=1, classes=2), (2,), class_names=("a", "b")).save(path, ARCHITECTURE, {})
    steerfm.load(path)
    return path


VALUES = [None, -1, 0, 1e400, float("nan"), 7, "text", [], [None], ["a"], {}, {"name": []}, {"a": 1}, True]


def test_json_of_wrong_types_is_one_line_that_names_the_file(own):
    head = json.loads(own.with_suffix(".json").read_text())
    keys = [key for key in head if key not in ("card", "data")]
    refused = 0
    for key in keys:
        for value in VALUES:
            own.with_suffix(".json").write_text(json.dumps(head | {key: value}))
            try:
                steerfm.load(own)
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                assert "\n" not in str(error) and "own" in str(error)
    assert refused > 0.8 * len(keys) * len(VALUES)
    for key in keys:
        own.with_suffix(".json").write_text(json.dumps({k: v for k, v in head.items() if k != key}))
        with pytest.raises(ValueError, match=r"own\."):
            steerfm.load(own)
    for whole in (None, [], 3, "text", {}):
        own.with_suffix(".json").write_text(json.dumps(whole))
        with pytest.raises(ValueError, match=r"own\."):
            steerfm.load(own)


@pytest.mark.parametrize("key", ["dim", "width", "depth", "classes", "widths"])
@pytest.mark.parametrize("value", [*VALUES, 10**30, 3.5, -7, 10**9])
def test_an_architecture_of_wrong_types_is_refused_before_it_is_built(own, key, value):
    """10**9 layers would take all the memory there is, 10**30 of them would never end."""
    head = json.loads(own.with_suffix(".json").read_text())
    head["network"] |= {key: value}
    own.with_suffix(".json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match=r"own\.") as error:
        steerfm.load(own)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "change", [{"shape": [3]}, {"shape": [2, 2]}, {"class_names": ["a"]}, {"class_names": []}, {"class_names": ["a", "b", "c"]},
               {"text": {"encoder": "emoji-clip", "width": 2}}, {"shape": [10**30]}, {"mean": 1e30}],
)  # fmt: skip
def test_keys_that_do_not_fit_each_other_are_refused(own, change):
    head = json.loads(own.with_suffix(".json").read_text())
    own.with_suffix(".json").write_text(json.dumps(head | change))
    with pytest.raises(ValueError, match=r"corrupt checkpoint .*own\."):
        steerfm.load(own)


CLIP = [
    ("model_cfg",), ("model_cfg", "embed_dim"), ("model_cfg", "vision_cfg"), ("model_cfg", "vision_cfg", "image_size"),
    ("model_cfg", "vision_cfg", "timm_drop"), ("model_cfg", "text_cfg"), ("model_cfg", "text_cfg", "context_length"),
    ("preprocess_cfg",), ("preprocess_cfg", "size"), ("preprocess_cfg", "mean"), ("preprocess_cfg", "std"),
    ("preprocess_cfg", "resize_mode"),
]  # fmt: skip


@pytest.mark.parametrize("path", CLIP, ids=".".join)
@pytest.mark.parametrize("value", [None, -1, float("nan"), "text", [None]], ids=str)
def test_a_configuration_of_open_clip_of_wrong_types_is_one_line(tmp_path, path, value):
    (tmp_path / "clip").mkdir()
    for file in (zoo.find("emoji-clip").with_suffix("")).iterdir():
        (tmp_path / "clip" / file.name).symlink_to(file)
    config = tmp_path / "clip" / "open_clip_config.json"
    told = json.loads(config.read_text())
    part = told
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    config.unlink()
    config.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"corrupt model .*clip") as error:
        encoders.open_clip(str(tmp_path / "clip"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "change"),
    [("text_cfg", {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}),
     ("vision_cfg", {"timm_model_name": "hf-hub:someone/something"})],
)  # fmt: skip
def test_a_configuration_of_open_clip_runs_and_fetches_nothing(tmp_path, part, change):
    folder = tmp_path / "clip"
    shutil.copytree(zoo.find("emoji-clip").with_suffix(""), folder)
    told = json.loads((folder / "open_clip_config.json").read_text())
    told["model_cfg"][part] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"corrupt model .*{part}"):
        encoders.open_clip(str(folder))


@pytest.mark.parametrize("std", [0, -1, float("nan"), float("inf"), "1", None])
def test_a_spread_that_is_none_is_refused(own, std):
    head = json.loads(own.with_suffix(".json").read_text())
    own.with_suffix(".json").write_text(json.dumps(head | {"std": std}))
    with pytest.raises(ValueError, match="std"):
        steerfm.load(own)


@pytest.mark.parametrize("change", ["nan", "inf", "int", "missing", "extra", "shape", "cut"])
def test_weights_are_whole_finite_and_of_their_type(own, change):
    weights = load_file(own)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    value = weights[name]
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["more"] = value.clone()
    else:
        broken = value.clone()
        broken[0, 0] = {"nan": float("nan"), "inf": float("inf")}.get(change, 0.0)
        weights[name] = {"int": value.long(), "shape": value[:1].clone()}.get(change, broken)
    save_file(weights, own)
    if change == "cut":
        own.write_bytes(own.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"corrupt checkpoint .*own"):
        steerfm.load(own)


@pytest.mark.parametrize("bases", [["a"], ["b", "a"], ["b", "c", "b"]])
def test_adapters_that_lead_back_to_themselves_are_refused(tmp_path, bases):
    for name, base in zip("abc", bases):
        save_file({"x.up": torch.zeros(1, 1)}, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": "adapter", "base": str(tmp_path / f"{base}.safetensors")}))
    with pytest.raises(ValueError, match="leads back"):
        steerfm.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("change", ["nan", "int", "down", "up", "more", "none", "rank", "layer", "flat"])
def test_adapters_are_whole_finite_and_of_their_base(own, tmp_path, change):
    """inputs is 2 -> 8."""
    factors = {"inputs.up": torch.ones(8, 1), "inputs.down": torch.ones(1, 2)}
    changes = {
        "nan": {"inputs.up": torch.full((8, 1), torch.nan)}, "int": {"inputs.up": torch.ones(8, 1, dtype=torch.int64)},
        "more": {"inputs.scale": torch.ones(1, 1)}, "rank": {"inputs.down": torch.ones(2, 2)},
        "layer": {"elsewhere.up": torch.ones(8, 1), "elsewhere.down": torch.ones(1, 2)}, "flat": {"inputs.up": torch.ones(8)},
    }  # fmt: skip
    path = tmp_path / "adapter.safetensors"
    path.with_suffix(".json").write_text(json.dumps({"kind": "adapter", "base": str(own)}))
    save_file(factors, path)
    before, after = (a(Mlp, steerfm.load(name).network).inputs.weight for name in (own, path))
    torch.testing.assert_close(after, before + 1)
    save_file(
        {k: v for k, v in (factors | changes.get(change, {})).items() if k != f"inputs.{change}" and change != "none"}, path
    )
    with pytest.raises(ValueError, match="adapter"):
        steerfm.load(path)


def test_the_strength_of_a_map_whose_base_is_another(own, tmp_path):
    path = tmp_path / "tuned.safetensors"
    NeuralFlowMap(Mlp(2, width=4, depth=1), (2,)).save(path, ARCHITECTURE | {"width": 4, "classes": 0}, {}, origin=str(own))
    with pytest.raises(ValueError, match="another architecture"):
        a(NeuralFlowMap, steerfm.load(path)).with_strength(0.5)


@pytest.mark.parametrize("base", [None, 3, "", [], {"a": 1}])
def test_an_adapter_names_its_base(tmp_path, base):
    save_file({"x.up": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps({"kind": "adapter", "base": base}))
    with pytest.raises(ValueError, match="base"):
        steerfm.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("change", ["part", "none", "cut", "missing", "nan"])
def test_an_open_clip_folder_is_never_a_random_network(tmp_path, change):
    folder = tmp_path / "clip"
    shutil.copytree(zoo.find("emoji-clip").with_suffix(""), folder)
    file = folder / "open_clip_model.safetensors"
    if change == "part":
        file.rename(file.with_name(f"{file.name}.part"))
    elif change == "none":
        file.unlink()
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        weights = load_file(file)
        name = sorted(weights)[3]
        weights[name] = weights[name].float() * float("nan")
        if change == "missing":
            del weights[name]
        save_file(weights, file)
    with pytest.raises((ValueError, FileNotFoundError), match="clip") as error:
        encoders.open_clip(str(folder))
    assert "\n" not in str(error.value)


def test_csv_cells_are_inert():
    for text in ("=HYPERLINK(1)", "+1", "-x", "@sum", "\tx", "\rx"):
        assert inert(text) == f"'{text}"
    assert [inert(value) for value in ("plain", -1.5, 3, "a=b")] == ["plain", -1.5, 3, "a=b"]
