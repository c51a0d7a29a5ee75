"""Low-rank adapters in the layout of diffusers and peft, W + scale B A: written, read, and added to a network.

    <part>.<layer>.lora_A.weight  (r, in, ...)      <part>.<layer>.lora_B.weight  (out, r, ...)      part: transformer or unet
    <part>.<layer>.weight, .bias                    whole tensors, of layers that were trained as they are

Here a layer has ``down`` and ``up``, with the scale in ``up``, so that a file means the same to whoever loads it. A file of
peft itself names no part, and its scale stands in the JSON beside.
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
"""What diffusers looks for in a folder."""
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What peft writes into one."""
PARTS = ("transformer", "transformer_2", "unet")
"""What pipelines call the networks that are adapted."""
ENDS = {".lora_A.weight": ".down", ".lora_B.weight": ".up"}
METADATA = "lora_adapter_metadata"


def adapted(network: nn.Module) -> list[tuple[str, Any]]:
    """The layers of a network that peft has adapted, by name."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # then nobody has adapted any
        return []
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]


def factors(network: nn.Module) -> dict[str, Tensor]:
    """The factors of the adapters in a network: <layer>.down and <layer>.up, with the scale in ``up``."""
    out = {}
    for name, layer in adapted(network):
        (key,) = layer.lora_A.keys()
        out[f"{name}.down"] = layer.lora_A[key].weight.detach()
        out[f"{name}.up"] = layer.lora_B[key].weight.detach() * layer.scaling[key]
    return out


def merged(network: nn.Module) -> nn.Module:
    """A copy of an adapted network as a plain one, its adapters added to its weights."""
    network = copy.deepcopy(network)
    for name, layer in adapted(network):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    return network


def write(of: Mapping[str, Tensor], path: Path, part: str = "") -> Path:
    """Write factors as diffusers has them, for ``pipe.load_lora_weights(path.parent, weight_name=path.name)``.

    Args:
        of: the factors.
        path: of the file.
        part: what the pipeline calls its network; empty where names of layers begin with that.
    """
    part = f"{part}." if part else ""
    ends = {ours: theirs for theirs, ours in ENDS.items()}
    named = {}
    for name, value in of.items():
        layer, _, end = name.rpartition(".")
        named[f"{part}{layer}{ends[f'.{end}']}"] = value.detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write_tensors(path, named)


def in_layout(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of this layout."""
    return any(name.endswith(tuple(ENDS)) for name in names)


def file_of(path: str | Path) -> Path:
    """The file of an adapter: the path itself, or what its folder holds."""
    path = Path(path)
    return next((path / name for name in (FILE, PEFT) if (path / name).is_file()), path / FILE) if path.is_dir() else path


def read(path: str | Path, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """The factors of an adapter, with the scale that it says, and its whole tensors under the network's own names.

    Args:
        path: of a file, or of a folder that holds `FILE` or `PEFT`.
        parts: what the pipeline calls its network; names of layers begin with that where it has several. Default: those
            that the file names.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is of another kind; in one line, with the fix.
    """
    file = file_of(path)
    if not file.is_file():
        raise FileNotFoundError(f"lora={path}: no such file; a folder holds {FILE}, or {PEFT} of peft")
    try:
        with safe_open(file, "pt") as store:
            told = json.loads((store.metadata() or {}).get(METADATA, "{}"))
            named = {_plain(name): store.get_tensor(name) for name in store.keys()}  # noqa: SIM118 - it is no dictionary
        if file.name == PEFT and (beside := file.with_name(PEFT_CONFIG)).is_file():
            told = json.loads(beside.read_text())
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"lora={path} is no safetensors file: {' '.join(str(error).split())}") from None
    out: dict[str, Tensor] = {}
    parts = parts or tuple(sorted({name.partition(".")[0] for name in named} & {*PARTS}))
    named = _of_parts(named, parts, path)
    for name, value in named.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is not None:
            out[f"{name.removesuffix(end)}{ENDS[end]}"] = value.float()
        elif "lora_" in name:
            raise ValueError(f"lora={path} holds {name}, which is no factor of a low-rank adapter")
        elif not name.endswith(".alpha") and ".original_module." not in name:
            out[name] = value.float()
    for layer in {name.rpartition(".")[0] for name in out if name.endswith(tuple(ENDS.values()))}:
        if f"{layer}.up" not in out or f"{layer}.down" not in out:
            raise ValueError(f"lora={path}: layer {layer} has one of two factors")
        whole = f"{parts[0]}.{layer}" if len(parts) == 1 else layer
        out[f"{layer}.up"] *= _scale(told, whole, out[f"{layer}.down"].shape[0], named.get(f"{layer}.alpha"))
    return out


def _scale(told: Mapping[str, Any], layer: str, rank: int, alpha: Tensor | None) -> float:
    """What the product of two factors is multiplied by, as peft has it; 1 where nothing is said."""
    part, _, own = layer.partition(".")
    said = {name.removeprefix(f"{part}."): value for name, value in told.items()}
    number = (said.get("alpha_pattern") or {}).get(own, said.get("lora_alpha")) if alpha is None else alpha
    return 1.0 if number is None else float(number) / (rank**0.5 if said.get("use_rslora") else rank)


def _plain(name: str) -> str:
    """A tensor's name without peft's wrappers, and without what it calls the adapter."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", re.sub(r"\.modules_to_save\.[^.]+\.", ".", name))


def _of_parts(named: Mapping[str, Tensor], parts: Sequence[str], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in the network.

    Raises:
        ValueError: some are of another part of the pipeline, or it has several and none is named.
    """
    those = " and ".join(parts)
    if not any(name.startswith((*(f"{part}." for part in PARTS), "text_encoder")) for name in named):
        if len(parts) > 1:
            raise ValueError(f"lora={path} does not say whether it adapts {' or '.join(parts)}: its names begin with neither")
        return dict(named)  # a file of peft is of the network alone
    for name in named:
        own = name.partition(".")[0]
        if own not in PARTS:
            raise ValueError(
                f"lora={path} holds {name}, which is no adapter of a {those} alone: pipe.load_lora_weights(...), "
                "pipe.fuse_lora(), and steerfm.models.from_pipeline(pipe)"
            )
        if own not in parts:
            raise ValueError(
                f"lora={path} adapts the {own} of a pipeline, and this one has a {those}: it is of another architecture"
            )
    return {name.removeprefix(f"{parts[0]}.") if len(parts) == 1 else name: value for name, value in named.items()}


def add(network: nn.Module, of: Mapping[str, Tensor], scale: float, path: str | Path) -> None:
    """Add adapters to the weights of a network, in place; whole tensors stand in place of its own.

    Args:
        of: factors and whole tensors, as `read` gives them.
        scale: 0 leaves the network as it is.
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
            timed = layer.startswith(f"{EMBEDDING}.")
            raise ValueError(
                f"lora={path} is of another architecture: {type(network).__name__} has no layer {layer}"
                + timed * " (the adapter of a flow map needs a network with two times: two_time=True)"
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
    """(out, in ...), a bias as one column."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
