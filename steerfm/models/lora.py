"""Read, write and apply low-rank adapters in the layout of diffusers and peft, W + scale B A.

    <part>.<layer>.lora_A.weight  (r, in, ...)      <part>.<layer>.lora_B.weight  (out, r, ...)      part: transformer or unet
    <part>.<layer>.weight, .bias                    whole tensors of layers without factors

Here a layer has ``down`` and ``up``, with the scale in ``up``, so that every reader gets the same weights. Files of peft itself
have no part names, and their scale is in a separate JSON.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from steerfm import files
from steerfm.models.two_time import EMBEDDING

FILE = "pytorch_lora_weights.safetensors"
"""File name in a folder of diffusers."""
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""File names in a folder of peft."""
PARTS = ("transformer", "transformer_2", "unet")
"""Names of networks in pipelines."""
ENDS = {".lora_A.weight": ".down", ".lora_B.weight": ".up"}
METADATA = "lora_adapter_metadata"


def adapter_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """The layers of a network with adapters of peft, by name."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without peft there are none
        return []
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]


def factors(network: nn.Module) -> dict[str, Tensor]:
    """The factors of the adapters in a network: <layer>.down and <layer>.up, with the scale in ``up``."""
    out = {}
    for name, layer in adapter_layers(network):
        (key,) = layer.lora_A.keys()
        out[f"{name}.down"] = layer.lora_A[key].weight.detach()
        out[f"{name}.up"] = layer.lora_B[key].weight.detach() * layer.scaling[key]
    return out


def merged(network: nn.Module) -> nn.Module:
    """A plain copy of an adapted network, with the adapters added to the weights."""
    network = copy.deepcopy(network)
    for name, layer in adapter_layers(network):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    return network


def write(of: Mapping[str, Tensor], path: Path, part: str = "") -> Path:
    """Write factors in the layout of diffusers, for ``pipe.load_lora_weights(path.parent, weight_name=path.name)``.

    Args:
        of: the factors.
        path: of the file.
        part: name of the network in the pipeline; empty if names of layers already begin with it.
    """
    part = f"{part}." if part else ""
    ends = {ours: theirs for theirs, ours in ENDS.items()}
    tensors = {}
    for name, value in of.items():
        layer, _, end = name.rpartition(".")
        tensors[f"{part}{layer}{ends[f'.{end}']}"] = value.detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write_tensors(path, tensors)


def in_layout(names: Iterable[str]) -> bool:
    """Whether names of tensors follow this layout."""
    return any(name.endswith(tuple(ENDS)) for name in names)


def file_of(path: str | Path) -> Path:
    """The file of an adapter: the path itself, or the file in that folder."""
    path = Path(path)
    return next((path / name for name in (FILE, PEFT) if (path / name).is_file()), path / FILE) if path.is_dir() else path


def read(path: str | Path, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read the factors of an adapter, with its scale applied, and its whole tensors, by their names in the network.

    Args:
        path: of a file, or of a folder with `FILE` or `PEFT`.
        parts: names of the networks in the pipeline; with several, names of layers begin with them. Default: those in the
            file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such an adapter; one line, with the fix.
    """
    file = file_of(path)
    if not file.is_file():
        raise FileNotFoundError(f"lora={path}: no such file; a folder must have {FILE}, or {PEFT} of peft")
    try:
        with safe_open(file, "pt") as store:
            config = json.loads((store.metadata() or {}).get(METADATA, "{}"))
            tensors = {_plain(name): store.get_tensor(name) for name in store.keys()}  # noqa: SIM118 - it is no dictionary
        if file.name == PEFT and (beside := file.with_name(PEFT_CONFIG)).is_file():
            config = json.loads(beside.read_text())
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"lora={path} is not a safetensors file: {' '.join(str(error).split())}") from None
    out: dict[str, Tensor] = {}
    parts = parts or tuple(sorted({name.partition(".")[0] for name in tensors} & {*PARTS}))
    tensors = _of_parts(tensors, parts, path)
    for name, value in tensors.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is not None:
            out[f"{name.removesuffix(end)}{ENDS[end]}"] = value.float()
        elif "lora_" in name:
            raise ValueError(f"lora={path} has {name}, which is not a factor of a low-rank adapter")
        elif not name.endswith(".alpha") and ".original_module." not in name:
            out[name] = value.float()
    for layer in {name.rpartition(".")[0] for name in out if name.endswith(tuple(ENDS.values()))}:
        if f"{layer}.up" not in out or f"{layer}.down" not in out:
            raise ValueError(f"lora={path}: layer {layer} has only one of two factors")
        whole = f"{parts[0]}.{layer}" if len(parts) == 1 else layer
        out[f"{layer}.up"] *= _scale(config, whole, out[f"{layer}.down"].shape[0], tensors.get(f"{layer}.alpha"))
    return out


def _scale(config: Mapping[str, Any], layer: str, rank: int, alpha: Tensor | None) -> float:
    """The scale of the product of two factors, in the convention of peft; 1 if there is none."""
    part, _, own = layer.partition(".")
    options = {name.removeprefix(f"{part}."): value for name, value in config.items()}
    number = (options.get("alpha_pattern") or {}).get(own, options.get("lora_alpha")) if alpha is None else alpha
    return 1.0 if number is None else float(number) / (rank**0.5 if options.get("use_rslora") else rank)


def _plain(name: str) -> str:
    """A tensor's name without peft's wrappers and adapter name."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", re.sub(r"\.modules_to_save\.[^.]+\.", ".", name))


def _of_parts(tensors: Mapping[str, Tensor], parts: Sequence[str], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by their names in the network.

    Raises:
        ValueError: a tensor belongs to another part of the pipeline, or the part is ambiguous.
    """
    those = " and ".join(parts)
    if not any(name.startswith((*(f"{part}." for part in PARTS), "text_encoder")) for name in tensors):
        if len(parts) > 1:
            raise ValueError(f"lora={path} does not say whether it is for {' or '.join(parts)}: its names begin with neither")
        return dict(tensors)  # a file of peft is for the network only
    for name in tensors:
        own = name.partition(".")[0]
        if own not in PARTS:
            raise ValueError(
                f"lora={path} has {name}, so it is not for a {those} alone: use pipe.load_lora_weights(...), "
                "pipe.fuse_lora(), and steerfm.models.from_pipeline(pipe)"
            )
        if own not in parts:
            raise ValueError(
                f"lora={path} is for the {own} of a pipeline, but this one has a {those}: it is of another architecture"
            )
    return {name.removeprefix(f"{parts[0]}.") if len(parts) == 1 else name: value for name, value in tensors.items()}


def add(network: nn.Module, of: Mapping[str, Tensor], scale: float, path: str | Path) -> None:
    """Add adapters to the weights of a network, in place; whole tensors replace its own.

    Args:
        network: the network.
        of: factors and whole tensors from `read`.
        scale: strength; 0 leaves the network unchanged.
        path: of the file, for errors.

    Raises:
        ValueError: they are of another architecture; nothing is changed then.
    """
    own, changes = network.state_dict(), []
    for name in sorted(of, key=lambda name: name.endswith(".up")):  # whole tensors first: factors may be added to them
        layer, _, end = name.rpartition(".")
        if end == "down":
            continue
        weight = own.get(f"{layer}.weight" if end == "up" else name)
        if weight is None:
            needs_two_times = layer.startswith(f"{EMBEDDING}.")
            raise ValueError(
                f"lora={path} is of another architecture: {type(network).__name__} has no layer {layer}"
                + needs_two_times * " (the adapter of a flow map needs a network with two times: two_time=True)"
            )
        parts = [_matrix(of[key]) for key in ((name, f"{layer}.down") if end == "up" else (name,))]
        (rows, inner), columns, there = parts[0].shape, parts[-1].shape[1], _matrix(weight).shape
        if (rows, columns) != there or inner != (len(parts[1]) if end == "up" else columns):
            raise ValueError(
                f"lora={path} is of another architecture: its layer {layer} is {rows} x {columns}, that of "
                f"{type(network).__name__} {there[0]} x {there[1]}"
            )
        changes.append((weight, parts))
    with torch.no_grad():
        for weight, parts in changes:
            wide = _matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))
            first, *more = (part.to(wide) for part in parts)
            weight.copy_((wide + scale * (first @ more[0]) if more else wide.lerp(first, scale)).view_as(weight))


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix (out, in ...); a bias as one column."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
