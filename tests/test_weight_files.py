"""Files of models are checked before they are used: weights, the JSON beside them, open_clip folders, bases of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import steerfm
from steerfm import encoders, zoo
from steerfm.commands_bench import inert
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


@pytest.mark.parametrize("base", [None, 3, "", [], {"a": 1}])
def test_an_adapter_names_its_base(tmp_path, base):
    save_file({"x.up": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps({"kind": "adapter", "base": base}))
    with pytest.raises(ValueError, match="base"):
        steerfm.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("change", ["part", "none", "cut", "missing", "nan"])
def test_an_open_clip_folder_is_never_a_random_network(tmp_path, change):
    folder = tmp_path / "clip"
    shutil.copytree(zoo.FOLDER / "emoji-clip", folder)
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
