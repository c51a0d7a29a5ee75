"""Shipped checkpoints: half-precision safetensors, each with a model card in a JSON file.

>>> flow_map = steerfm.load("fashion")            # or a path to a .safetensors file of your own
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from steerfm import plugins, registry, trust
from steerfm.checkpoints import (
    CLASSES,
    NETWORK,
    SHAPE,
    check_arguments,
    check_head,
    is_count,
    is_finite,
    load_into,
    locate_code,
    read_weights,
    restore,
)
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.models import diffusers, lora, moved_noise

DIFFUSERS = "diffusers:"
"""Prefix of the names of pipelines."""


def models() -> dict[str, dict[str, Any]]:
    """Shipped models by name, with the content of their JSON."""
    return {name: json.loads(path.read_text()) for name, path in plugins.models().items()}


def find(name: str | Path) -> Path:
    """Path of the weights of a shipped model, of your own file, or of the model in a run folder.

    Raises:
        ValueError: there is no such model; the message lists the models.
    """
    path, shipped_models = Path(name), plugins.models()
    if str(name) in shipped_models:
        return shipped_models[str(name)].with_suffix(".safetensors")
    if files := models_in(path):
        if len(files) > 1:
            raise ValueError(f"{path} has several models: give one of {', '.join(map(str, files))}")
        return files[0]
    if path.suffix == ".safetensors" or path.parent != Path("."):
        return path
    hint = trust.nearest(str(name), shipped_models)
    raise ValueError(
        f"unknown model {str(name)!r}{hint}; models: {', '.join(shipped_models)}, a path to a .safetensors file, "
        "or FILE.py:NAME"
    )


def models_in(folder: Path) -> list[Path]:
    """The weights in a folder that have a JSON file; an empty list if it is no folder."""
    if not os.path.isdir(folder) or os.path.isfile(f"{folder}.safetensors"):
        return []
    return sorted(file for file in folder.glob("*.safetensors") if file.with_suffix(".json").is_file())


MODEL = registry.Kind(
    "model",
    lambda thing: issubclass(thing, FlowMap) if isinstance(thing, type) else isinstance(thing, FlowMap),
    "a FlowMap (steerfm.VelocityModel makes one of a network)",
    "steerfm models",
)


def load(name: str | Path | FlowMap | Mapping[str, Any], device: str | torch.device | None = None, **arguments: Any) -> FlowMap:
    """Load a flow map from the zoo, a path, diffusers or code. A FlowMap is returned as it is.

    Args:
        name: a shipped name; a path to a ``.safetensors`` file with its ``.json`` file, or to the run folder with them;
            ``diffusers:FOLDER_OR_HUB_ID`` for a pipeline; ``FILE.py:NAME`` for a FlowMap, or a class or function that makes
            one, also as {"name": "FILE.py:NAME", argument: value}; or a FlowMap.
        device: device of the map; default the CPU for files, and the present device for a FlowMap.
        **arguments: of `steerfm.models.diffusers.load` (prompt, guidance, height, dtype, ...), or of the class or function.

    Raises:
        ValueError: the name is unknown, or the file is corrupt or not a flow map. Nothing is ever unpickled.
        FileNotFoundError: a file is missing.
        ImportError: a package is missing; the message names the extra to install.
    """
    if isinstance(name, Mapping):
        name, own = registry.split_spec(name, "model")
        arguments = {**own, **arguments}
    if isinstance(name, str | Path) and str(name).startswith(DIFFUSERS):
        flow_map = diffusers.load(str(name).removeprefix(DIFFUSERS), device, **arguments)
        flow_map.maker = {"name": str(name), **arguments}
        return flow_map
    if not isinstance(name, str | Path) or registry.is_code(str(name)):
        flow_map = registry.build(name, MODEL, arguments)
        if not isinstance(name, FlowMap):
            flow_map.maker = {"name": str(name), **arguments}
        return flow_map if device is None else flow_map.to(device)
    if arguments:
        raise ValueError(f"{next(iter(arguments))}=: {name} is a file, which takes no arguments but device=")
    path = find(name)
    file = path.with_suffix(".json")
    try:
        head = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        head = {}  # reading the model will raise the error
    head = head if isinstance(head, dict) else {}
    kind, base = head.get("kind"), load(_base(path)) if head.get("kind") == "adapter" or moved_noise.KEY in head else None
    if kind == "adapter" and base is not None:
        factors = read_weights(path, "adapter")[1]
        flow_map = with_adapters(base, lora.read(path, diffusers.parts_of(base)) if lora.in_layout(factors) else factors, path)
    else:
        flow_map = _of_code(path) if kind == "code" else NeuralFlowMap.load(path)
        flow_map.card = {key: _beside(value, path.parent) for key, value in flow_map.card.items()}
        if "base" in head:
            flow_map.without_posterior().origin = lambda: _weights(head["base"])  # needed only by with_strength
    if base is not None and moved_noise.KEY in head:
        check_head(head, path, {moved_noise.KEY: (is_count, "a number of jumps")})
        flow_map = moved_noise.MovedNoise(base, flow_map, head[moved_noise.KEY], head["base"])
    return flow_map.to(device or "cpu")


def _of_code(path: Path) -> FlowMap:
    """A map from user code, with the weights of a file."""
    head, weights = read_weights(path, "code")
    check_head(head, path, {"maker": NETWORK})
    maker = locate_code(head["maker"], head, path)
    flow_map = load(maker)
    if (
        not str(maker.get("name")).rpartition(":")[0].endswith(".py")
    ):  # a module is imported once, so its object may be in use elsewhere
        flow_map = copy.deepcopy(flow_map)
    load_into(flow_map.body, weights, path)
    flow_map.maker, flow_map.card = maker, head.get("card") or {}
    return flow_map.eval()


def _beside(value: Any, folder: Path) -> Any:
    """A value of a card, with names of files in its folder replaced by their paths."""
    if isinstance(value, Mapping):
        return {key: _beside(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    if not isinstance(value, str) or not re.fullmatch(r"[^:\n]+\.(safetensors|py:\w+)", value):
        return value
    return str(folder / value) if (folder / value.partition(":")[0]).is_file() else value


def _base(path: Path) -> dict[str, Any] | Path:
    """The base model of an adapter: its file, or the code or pipeline that makes it.

    Raises:
        ValueError: there is no name, or the chain of bases is circular.
        FileNotFoundError: the base is missing.
    """
    own = _base_spec(path)
    if own["name"].startswith(DIFFUSERS):
        return own
    if registry.is_code(own["name"]):
        return locate_code(own, json.loads(path.with_suffix(".json").read_text()), path)
    chain = [path.resolve()]
    while True:
        file = chain[-1].with_suffix(".json")
        head = json.loads(file.read_text()) if file.is_file() else {}
        if (
            not isinstance(head, dict)
            or head.get("kind") != "adapter"
            or registry.is_code(name := _base_spec(chain[-1])["name"])
        ):
            return find(own["name"])
        base = find(name).resolve()
        if base in chain:
            raise ValueError(
                f"corrupt checkpoint {path}: its base leads back to {base}: an adapter needs a flow map as its base"
            )
        chain.append(base)


def _base_spec(path: Path) -> dict[str, Any]:
    """The name of an adapter's base model, with its arguments."""
    base = json.loads(path.with_suffix(".json").read_text()).get("base")
    spec = {"name": base} if isinstance(base, str) else base
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str) or not spec["name"]:
        raise ValueError(f"corrupt checkpoint {path.with_suffix('.json')}: base is {json.dumps(base)}, it should name a model")
    return spec


def _weights(name: str | Mapping[str, Any]) -> dict[str, Tensor]:
    return load(name).body.state_dict()


def with_adapters(base: FlowMap, factors: dict[str, Tensor], path: Path) -> FlowMap:
    """A map with low-rank adapters added to its weights, W + up down; it remembers the base for `FlowMap.with_strength`.

    Args:
        base: the base map.
        factors: <layer>.up (out, r, ...) and <layer>.down (r, in, ...).
        path: of the file, for errors.

    Raises:
        ValueError: the adapters do not fit this base.
    """
    body = copy.deepcopy(base.body)
    weights = body.state_dict()
    names = {key.rpartition(".")[0] for key in factors}
    for key in sorted({f"{name}.{end}" for name in names for end in ("up", "down")} ^ factors.keys()):
        raise ValueError(
            f"corrupt checkpoint {path}: {key} is {'unknown' if key in factors else 'missing'}; each layer needs up and down"
        )
    for key, value in factors.items():
        if not (value.is_floating_point() and value.ndim > 1 and is_finite(value)):
            raise ValueError(f"corrupt checkpoint {path}: {key} is not a matrix of finite numbers")
    if not names:
        raise ValueError(f"corrupt checkpoint {path}: it has no adapters")
    for name in sorted(names):
        up, down, weight = factors[f"{name}.up"].flatten(1), factors[f"{name}.down"].flatten(1), weights.get(f"{name}.weight")
        if weight is None or (len(up), *down.shape) != (len(weight), up.shape[1], weight[0].numel()):
            raise ValueError(f"{path} has adapters of another architecture: layer {name} does not fit the base")
        weight += (up @ down).view_as(weight)
    tuned = base.with_network(body).without_posterior()
    tuned.origin = base.body.state_dict
    return tuned


def load_classifier(name: str | Path) -> tuple[nn.Module, tuple[str, ...], tuple[int, ...]]:
    """Load a classifier, frozen and in evaluation mode.

    Returns:
        The network, the names of its classes, and the shape (c, h, w) of its pictures. The network maps pictures in [0, 1] to
        logits (b, classes); its ``features(pictures)`` are (b, num_features).

    Raises:
        ValueError: the name is unknown, or the file is corrupt or not a classifier.
        FileNotFoundError: a file is missing.
    """
    path = find(name)
    head, weights = read_weights(path, kind="classifier")
    check_head(head, path, {"network": NETWORK, "class_names": CLASSES, "shape": SHAPE})
    network = restore(head, weights, path, head["shape"])
    return network, tuple(head["class_names"]), tuple(head["shape"])


def load_image_text_head(name: str | Path) -> Any:
    """Load an image-text scorer on frozen towers, frozen and in evaluation mode, with the interface of `encoders.OpenClip`.

    Raises:
        ValueError: the name is unknown, or the file is corrupt or not such a scorer.
        FileNotFoundError: a file is missing.
        ImportError: a package is missing; the message names it.
    """
    path = find(name)
    head, weights = read_weights(path, "image_text_head")
    check_head(head, path, {"network": (lambda value: isinstance(value, dict), "the arguments of an image_text_head")})
    where = f"corrupt checkpoint {path.with_suffix('.json')}: network"
    kind = plugins.image_text_head()
    check_arguments(kind, head["network"], f"{where}.")
    try:
        network = kind(**head["network"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    load_into(network, weights, path)
    return network.eval().requires_grad_(False)


def pictured(spec: Any) -> Any:
    """A data set with the interface of `steerfm.metrics.evaluator.Pictured`; None if there is none.

    Args:
        spec: from a card: a name, or {"name": NAME, argument: value}.

    Raises:
        ValueError: the data set does not take an argument.
    """
    if not isinstance(spec, str | Mapping) or not spec:
        return None
    name, arguments = registry.split_spec(spec, "data")
    points = plugins.data_sets()
    if name not in points:
        return None
    data = points[name].load()
    return registry.make(data, arguments, "data") if hasattr(data, "reference") else None


def statistics_file(name: str | Path) -> Path:
    """The file of `statistics`, next to the classifier."""
    path = find(name)
    return path.with_name(f"{path.stem}-statistics.safetensors")


def statistics(name: str | Path) -> dict[str, Tensor]:
    """Statistics of a classifier's features on its data, so that distances need no data.

    Returns:
        test_mean (d,), test_cov (d, d): of the features of the test split, of test_count () pictures, in float64.
        test_texture (): the mean of `metrics.texture` of these pictures.
        test_rows (m, d): the features of some of them, drawn at random.
        train_...: the same for an equal number of training pictures, without the rows.
    """
    return {key: value.to(torch.float64) for key, value in load_file(statistics_file(name)).items()}
