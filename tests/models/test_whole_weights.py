"""Adapters that hold whole tensors beside their factors, and files of peft itself: as flow maps of SD3.5 are given away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import sure
from safetensors.torch import save_file
from torch import Tensor

from steerfm.models import from_pipeline
from steerfm.models.diffusers import pipeline_map
from steerfm.models.lora import FILE, PEFT, PEFT_CONFIG

pytest.importorskip("diffusers")
from pipelines import PIPELINES

SECOND = "time_text_embed.delta_embedder"
LAYER = "transformer_blocks.0.attn.to_q"
RANK, ALPHA = 2, 6.0


def made(**arguments: Any) -> Any:
    pipe, call = PIPELINES["sd3"]()
    one: dict[str, Any] = {key: value[:1] if isinstance(value, Tensor) else value for key, value in call.items()}
    one = {key: value for key, value in one.items() if not key.startswith("negative_")}
    settings: dict[str, Any] = {"steps": 2, "guidance": 1.0, "two_time": True, **one, **arguments}
    return from_pipeline(pipe, **settings)


def network(flow_map: Any) -> Any:
    return sure(pipeline_map(flow_map)).body


def drawn(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def learnt() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(factors of one layer, all of the second embedder), by the network's names."""
    weights = network(made()).state_dict()
    out, into = weights[f"{LAYER}.weight"].shape
    whole = {name: drawn(value, i) for i, (name, value) in enumerate(weights.items()) if name.startswith(SECOND)}
    assert len(whole) == 4
    return {"lora_A": drawn(torch.empty(RANK, into), 90), "lora_B": drawn(torch.empty(out, RANK), 91)}, whole


def by_hand(factors: dict[str, Tensor], whole: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """The weights that there must be."""
    weights = {name: value.clone() for name, value in network(made()).state_dict().items()}
    weights[f"{LAYER}.weight"] += scale * ALPHA / RANK * factors["lora_B"] @ factors["lora_A"]
    return weights | {name: torch.lerp(weights[name], value, scale) for name, value in whole.items()}


def same(flow_map: Any, weights: dict[str, Tensor]) -> None:
    own = network(flow_map).state_dict()
    assert own.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(own[name], value, atol=1e-5, rtol=1e-5, msg=name)


def written(layout: str, folder: Path, factors: dict[str, Tensor], whole: dict[str, Tensor]) -> Path:
    """The same adapter in each of the layouts in which there are such files."""
    wrapped = {name.replace(SECOND, f"{SECOND}.modules_to_save.default"): value for name, value in whole.items()}
    wrapped |= {name.replace(SECOND, f"{SECOND}.original_module"): torch.zeros_like(value) for name, value in whole.items()}
    named = {
        "diffusers": {f"transformer.{LAYER}.{name}.weight": value for name, value in factors.items()}
        | {f"transformer.{LAYER}.alpha": torch.tensor(ALPHA)}
        | {f"transformer.{name}": value for name, value in whole.items()},
        "state": {f"{LAYER}.{name}.default.weight": value for name, value in factors.items()} | whole,
        "peft": {f"base_model.model.{LAYER}.{name}.weight": value for name, value in factors.items()}
        | {f"base_model.model.{name}": value for name, value in whole.items()},
        "wrapped": {f"{LAYER}.{name}.mine.weight": value for name, value in factors.items()} | wrapped,
    }[layout]
    folder.mkdir(exist_ok=True)
    save_file(named, folder / (FILE if layout == "diffusers" else PEFT))
    if layout != "diffusers":
        (folder / PEFT_CONFIG).write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}))
    return folder


@pytest.mark.parametrize("of", ["folder", "file"])
@pytest.mark.parametrize("layout", ["diffusers", "state", "peft", "wrapped"])
def test_whole_tensors_are_read_beside_factors(layout, of, tmp_path):
    factors, whole = learnt()
    path = written(layout, tmp_path, factors, whole)
    path = path if of == "folder" else path / (FILE if layout == "diffusers" else PEFT)
    same(made(lora=path), by_hand(factors, whole))
    same(made(lora=path, lora_scale=0.0), by_hand(factors, whole, 0.0))
    same(made(lora=path, lora_scale=0.25), by_hand(factors, whole, 0.25))


def test_several_adapters_are_added_in_their_order(tmp_path):
    """The last whole tensor counts, and all products."""
    factors, whole = learnt()
    first = written("state", tmp_path / "1", factors, {name: -value for name, value in whole.items()})
    second = written("diffusers", tmp_path / "2", factors, whole)
    weights = by_hand(factors, whole)
    weights[f"{LAYER}.weight"] += ALPHA / RANK * factors["lora_B"] @ factors["lora_A"]
    same(made(lora=[first, second]), weights)


def test_factors_of_a_layer_that_is_whole_are_added_to_it(tmp_path):
    """So it is where the second time is adapted itself: its layers in the file are what the factors are added to."""
    _, whole = learnt()
    name = f"{SECOND}.linear_2"
    out, into = whole[f"{name}.weight"].shape
    a, b = drawn(torch.empty(RANK, into), 7), drawn(torch.empty(out, RANK), 8)
    base = {key.replace(name, f"{name}.base_layer"): value for key, value in whole.items()}
    save_file({**base, f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}, tmp_path / PEFT)
    weights = network(made(lora=tmp_path)).state_dict()
    torch.testing.assert_close(weights[f"{name}.weight"], whole[f"{name}.weight"] + b @ a, atol=1e-5, rtol=1e-5)


def test_what_peft_itself_saves_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = made()
    body = network(theirs)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 3, "init_lora_weights": False, "use_rslora": True}
    config = peft.LoraConfig(target_modules=["to_k"], modules_to_save=["delta_embedder"], **settings)
    adapted = peft.get_peft_model(body, config)
    for name, value in adapted.named_parameters():
        if "modules_to_save" in name:
            value.data += drawn(value, 3)
    adapted.save_pretrained(tmp_path)
    x = torch.randn(2, *theirs.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(lora=tmp_path).jump(x, 0.1, 0.8), theirs.jump(x, 0.1, 0.8), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path):
    factors, whole = learnt()
    path = written("state", tmp_path, factors, whole)
    with pytest.raises(ValueError, match=r"has no layer time_text_embed\.delta_embedder\.linear_1 .*two_time=True"):
        made(lora=path, two_time=False)
    wrong = {name: torch.cat([value, value]) for name, value in whole.items()}
    pipe, call = PIPELINES["sd3"]()
    given: dict[str, Any] = call
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another architecture: its layer time_text_embed\.delta_embedder"):
        from_pipeline(pipe, guidance=1.0, two_time=True, lora=written("state", tmp_path, factors, wrong), **given)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    written("state", tmp_path / "right", factors, whole)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        from_pipeline(pipe, guidance=1.0, two_time=True, lora=[tmp_path / "right", tmp_path / "nowhere"], **given)
    assert torch.equal(pipe.transformer.state_dict()[f"{LAYER}.weight"], before[f"{LAYER}.weight"])
    save_file({f"{LAYER}.lora_magnitude_vector.default.weight": torch.ones(3)}, tmp_path / PEFT)
    with pytest.raises(ValueError, match="is not a factor of a low-rank adapter"):
        made(lora=tmp_path)
