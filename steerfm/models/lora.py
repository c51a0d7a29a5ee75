"""Low-rank adapters in the layout of diffusers and peft, W + scale B A: written, read, and added to a network.

    <part>.<layer>.lora_A.weight  (r, in, ...)      <part>.<layer>.lora_B.weight  (out, r, ...)      part: transformer or unet

Here a layer has ``down`` and ``up``, with the scale in ``up``, so that a file means the same to whoever loads it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from steerfm import files

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
PARTS = ("transformer", "unet")
"""What pipelines call the network that is adapted."""
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


def write(of: Mapping[str, Tensor], path: Path, part: str) -> Path:
    """Write factors as diffusers has them, for ``pipe.load_lora_weights(path.parent, weight_name=path.name)``."""
    ends = {ours: theirs for theirs, ours in ENDS.items()}
    named = {}
    for name, value in of.items():
        layer, _, end = name.rpartition(".")
        named[f"{part}.{layer}{ends[f'.{end}']}"] = value.detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write_tensors(path, named)


def in_layout(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of this layout."""
    return any(name.endswith(tuple(ENDS)) for name in names)


def read(path: str | Path, part: str | None = None) -> dict[str, Tensor]:
    """The factors of a file, or of `FILE` in a folder, with the scale that it says.

    Args:
        path: of the file or folder.
        part: what the pipeline calls its network; None for whichever the file names.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is of another kind; in one line, with the fix.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"lora={path}: no such file; a folder holds {FILE}")
    try:
        with safe_open(file, "pt") as store:
            told = json.loads((store.metadata() or {}).get(METADATA, "{}"))
            named = {name: store.get_tensor(name) for name in store.keys()}  # noqa: SIM118 - it is no dictionary
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"lora={path} is no safetensors file: {' '.join(str(error).split())}") from None
    part = part or next((name.partition(".")[0] for name in named), "")
    settings = {name.removeprefix(f"{part}."): value for name, value in told.items()}
    out: dict[str, Tensor] = {}
    for name, value in named.items():
        own, _, rest = name.partition(".")
        if own not in PARTS:
            raise ValueError(
                f"lora={path} holds {name}, which is no adapter of a {part} alone: pipe.load_lora_weights(...), "
                "pipe.fuse_lora(), and steerfm.models.from_pipeline(pipe)"
            )
        if own != part:
            raise ValueError(
                f"lora={path} adapts the {own} of a pipeline, and this one has a {part}: it is of another architecture"
            )
        end = next((end for end in ENDS if rest.endswith(end)), None)
        if end is not None:
            out[f"{rest.removesuffix(end)}{ENDS[end]}"] = value.float()
        elif not rest.endswith(".alpha"):
            raise ValueError(f"lora={path} holds {name}, which is no factor of a low-rank adapter")
    for layer in {name.rpartition(".")[0] for name in out}:
        if f"{layer}.up" not in out or f"{layer}.down" not in out:
            raise ValueError(f"lora={path}: layer {layer} has one of two factors")
        rank = out[f"{layer}.down"].shape[0]
        alpha = named.get(f"{part}.{layer}.alpha", (settings.get("alpha_pattern") or {}).get(layer, settings.get("lora_alpha")))
        out[f"{layer}.up"] *= 1.0 if alpha is None else float(alpha) / rank
    return out


def add(network: nn.Module, of: Mapping[str, Tensor], scale: float, path: str | Path) -> None:
    """Add adapters to the weights of a network, in place.

    Args:
        of: factors, as `read` gives them. scale: 0 leaves the network as it is. path: of the file, for errors.

    Raises:
        ValueError: they are of another architecture; nothing is changed then.
    """
    changes = []
    for layer in sorted({name.rpartition(".")[0] for name in of}):
        up, down = of[f"{layer}.up"].flatten(1), of[f"{layer}.down"].flatten(1)
        module = dict(network.named_modules()).get(layer)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"lora={path} is of another architecture: {type(network).__name__} has no layer {layer} (the adapter of "
                "a flow map needs a network with two times: two_time=True)"
            )
        if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != (weight.shape[0], weight[0].numel()):
            raise ValueError(
                f"lora={path} is of another architecture: its layer {layer} is {up.shape[0]} x {down.shape[1]}, that of "
                f"{type(network).__name__} {weight.shape[0]} x {weight[0].numel()}"
            )
        changes.append((weight, up, down))
    with torch.no_grad():
        for weight, up, down in changes:
            change = scale * (up.to(weight.device) @ down.to(weight.device))
            weight.add_(change.view_as(weight).to(weight.dtype))
