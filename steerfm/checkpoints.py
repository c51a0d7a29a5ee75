"""Checkpoints: weights in safetensors, everything else in a JSON file next to it. Nothing is ever unpickled."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from steerfm import files, registry, shipped, trust
from steerfm.encoders import for_file
from steerfm.interpolant import Interpolant, Trigonometric
from steerfm.networks import NETWORKS

INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": Interpolant, "trigonometric": Trigonometric}

LARGEST = 2**14
"""Largest size in a file, so that it cannot exhaust memory or time."""

Check = tuple[Callable[[Any], bool], str]
"""A test of a key's value, and a description of valid values."""


def is_number(value: Any) -> bool:
    """Whether the value is a number whose square does not overflow; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def is_count(value: Any) -> bool:
    """Whether the value is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_texts(value: Any) -> bool:
    """Whether the value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


NETWORK: Check = lambda value: isinstance(value, dict), "a name and its arguments"

SHAPE: Check = (
    lambda value: isinstance(value, list) and bool(value) and all(is_count(n) and n <= LARGEST for n in value),
    "a list of sizes",
)

CLASSES: Check = is_texts, "a list of texts"

HEAD: dict[str, Check] = {
    "network": NETWORK,
    "shape": SHAPE,
    "interpolant": (lambda value: isinstance(value, str) and value in INTERPOLANTS, f"one of {', '.join(INTERPOLANTS)}"),
    "class_names": CLASSES,
    "mean": (is_number, "a finite number"),
    "std": (lambda value: is_number(value) and value > 0, "a number above 0"),
}

HEAD_TEXT: dict[str, Check] = {
    "text": (
        lambda value: isinstance(value, dict) and isinstance(value.get("encoder"), str) and is_count(value.get("width")),
        "an encoder and its width",
    )
}


def check_head(head: Mapping[str, Any], path: str | Path, checks: Mapping[str, Check]) -> None:
    """Check the JSON of the weights at ``path``.

    Raises:
        ValueError: a key is missing or invalid; the message names the file and the key.
    """
    for key, (is_good, words) in checks.items():
        if key not in head:
            raise ValueError(f"corrupt checkpoint {path}: missing {key!r} in its .json, it should be {words}")
        if not is_good(head[key]):
            value = repr(head[key]) if isinstance(head[key], str) else json.dumps(head[key])
            raise ValueError(f"corrupt checkpoint {path}: {key} {value[:80]} in its .json, it should be {words}")


def build_network(architecture: Mapping[str, Any], path: str | Path | None = None) -> nn.Module:
    """A network from {"name": a key of `networks.NETWORKS`, or my_file.py:Net, **arguments}.

    Args:
        architecture: see above.
        path: of the file that describes it, for errors.

    Raises:
        ValueError: a name or argument is unknown or invalid.
    """
    arguments = dict(architecture)
    name = arguments.pop("name", None)
    if isinstance(name, str) and registry.is_code(name):
        return registry.build(name, NETWORK_KIND, arguments)
    where = "" if path is None else f"corrupt checkpoint {Path(path).with_suffix('.json')}: "
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"{where}unknown network {name!r}; networks: {', '.join(NETWORKS)}, or your own, FILE.py:NAME")
    check_arguments(NETWORKS[name], arguments, f"{where}network.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # a size of 0 raises an error below
            network = NETWORKS[name](**arguments)
    except Exception as error:  # arguments of the right type may still not fit each other
        raise ValueError(f"{where}network {name!r}: {' '.join(str(error).split())[:200]}") from None
    return network.to(memory_format=torch.channels_last)  # convolutions take 15 to 27% less time on a CPU


NETWORK_KIND = registry.Kind(
    "network",
    lambda thing: issubclass(thing, nn.Module) if isinstance(thing, type) else isinstance(thing, nn.Module),
    "a torch.nn.Module",
    "steerfm.networks.NETWORKS",
    NETWORKS,
)


# --- user code in a file -------------------------------------------------------------------------------------------
def code_of(architecture: Mapping[str, Any]) -> dict[str, str]:
    """Digests, by name, of the user's file that makes a model and of the neighbouring files that it imports; empty for networks
    of steerfm and for modules."""
    place, _, _ = str(architecture.get("name", "")).rpartition(":")
    if not place.endswith(".py"):
        return {}
    path = shipped.example(Path(place))
    if not path.is_file():
        raise ValueError(f"no such file: {place}; the model to save needs it")
    folder = path.resolve().parent
    return {file.relative_to(folder).as_posix(): files.digest(file) for file in [path.resolve(), *trust.neighbours(path)]}


def locate_code(architecture: Mapping[str, Any], head: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The name and arguments that make the network or map of a file again. Code that is missing at its place is read from the
    folder of the file.

    Args:
        architecture: a name and its arguments.
        head: the JSON of the file.
        path: of the weights.

    Raises:
        ValueError: the code is missing, or has changed since the file was written.
    """
    place, _, attribute = str(architecture.get("name", "")).rpartition(":")
    if not place.endswith(".py"):
        return dict(architecture)
    json_file, beside = Path(path).with_suffix(".json"), Path(path).parent / Path(place).name
    file = next((file for file in (shipped.example(Path(place)), beside) if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"{json_file} needs {place}, but there is no such file: restore it, or put it next to {Path(path).name}"
        )
    now, then = code_of({"name": f"{file}:{attribute}"}), head.get("code")
    for name, digest in then.items() if isinstance(then, Mapping) else ():
        if now.get(name) != digest:
            what = "has changed since" if name in now or (file.parent / name).is_file() else "is missing, but existed when"
            raise ValueError(
                f"{file.parent / name} {what} {Path(path).name} was written: restore the old file, or remove "
                f'"code" from {json_file} to use the new one'
            )
    return {**architecture, "name": f"{file}:{attribute}"}


def check_arguments(kind: type, arguments: Mapping[str, Any], where: str) -> None:
    """Check the arguments of a network against its type annotations.

    Raises:
        ValueError: an argument has the wrong type; the message names ``where`` and the argument.
    """
    checks: dict[Any, Check] = {
        int: (lambda value: value == 0 or is_count(value), "a whole number"),
        float: (is_number, "a number"),
        bool: (lambda value: isinstance(value, bool), "true or false"),
        str: (lambda value: isinstance(value, str), "a text"),
        Sequence[int]: (SHAPE[0], "a list of whole numbers above 0"),
    }
    for key, hint in get_type_hints(kind.__init__).items():
        if key not in arguments or hint not in checks:
            continue
        value, (is_good, words) = arguments[key], checks[hint]
        if hint == Sequence[int] and isinstance(value, tuple):
            value = list(value)
        numbers = value if isinstance(value, list) else [value]
        large = any(isinstance(n, int | float) and abs(n) > LARGEST for n in numbers)
        if isinstance(value, bool) != (hint is bool) or not is_good(value) or large:
            text = json.dumps(value, default=str)[:80]
            raise ValueError(f"{where}{key} is {text}, it should be {words}" + (f" up to {LARGEST}" if large else ""))


def restore(head: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path, shape: Sequence[int]) -> nn.Module:
    """The network of a file, frozen and in evaluation mode. It is first built without memory, so that a mismatch raises before
    anything is allocated.

    Args:
        head: its JSON, with the key network.
        weights: its tensors.
        path: of the file, for errors.
        shape: of one sample or picture.

    Raises:
        ValueError: arguments have wrong types, or weights or samples do not fit the architecture.
    """
    if registry.is_code(str(head["network"].get("name"))):
        network = build_network(locate_code(head["network"], head, path))
        load_into(network, weights, path)
        return network.eval().requires_grad_(False)
    plan, output = _plan(json.dumps(head["network"]), tuple(shape), str(head["kind"]), str(path))
    check_weights(plan, weights, path)
    if output != ((len(head["class_names"]),) if head["kind"] == "classifier" else tuple(shape)):
        raise ValueError(f"corrupt checkpoint {path}: its network returns {list(output)} for samples of shape {list(shape)}")
    network = copy.deepcopy(plan).to_empty(device="cpu")  # without initial weights, which would change torch's random state
    network.load_state_dict(dict(weights))  # checked above
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=32)  # a process may load the same few files many times
def _plan(architecture: str, shape: tuple[int, ...], kind: str, path: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network without memory, and the shape of its output for one sample."""
    with torch.device("meta"):
        plan = build_network(json.loads(architecture), path).to("meta")  # some packages ignore `torch.device`
        x, t = torch.empty(3, *shape), torch.empty(3)
        try:
            out = plan(x) if kind == "classifier" else plan(x, t, t, None)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"corrupt checkpoint {path}: its network does not take samples of shape {list(shape)} ({reason})"
            ) from None
    return plan, tuple(out.shape[1:])


def weights_file(path: str | Path) -> Path:
    """``path`` with the suffix .safetensors; other dots belong to the name (``model-0.5``)."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def save_weights(network: nn.Module, path: str | Path, head: Mapping[str, Any], half: bool = True) -> None:
    """Write a network's tensors to ``path`` (safetensors) and ``head`` to its JSON."""
    write_weights(network.state_dict(), path, head, half)


def write_weights(tensors: Mapping[str, Tensor], path: str | Path, head: Mapping[str, Any], half: bool = True) -> None:
    """Write tensors to ``path`` (safetensors), as float16 by default, and ``head`` to its JSON."""
    path = weights_file(path)
    files.write(path.with_suffix(".json"), json.dumps(head, indent=2) + "\n")
    files.write_tensors(path, for_file(tensors, half))  # last: a model exists once its weights do


def read_weights(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON and the tensors (in float32 or wider) of `save_weights`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is not safetensors, is corrupt, or has another kind of model.
    """
    path = weights_file(path)
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file} (a model is a .safetensors file and a .json file of the same name)")
    try:
        head = json.loads(path.with_suffix(".json").read_text())
        weights = load_file(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"corrupt checkpoint {path}: {error}; download or train it again") from None
    if not isinstance(head, dict) or head.get("kind") != kind:
        actual = head.get("kind") if isinstance(head, dict) else type(head).__name__
        raise ValueError(f"{path.with_suffix('.json')} describes {actual!r}, expected {kind!r}")
    return head, {
        name: value.float() if value.is_floating_point() and value.itemsize < 4 else value for name, value in weights.items()
    }


def load_into(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load tensors into a network.

    Raises:
        ValueError: names, shapes or types do not fit the architecture, or a number is not finite; the message names the file.
    """
    check_weights(network, weights, path)
    network.load_state_dict(dict(weights))


def check_weights(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that tensors fit a network.

    Raises:
        ValueError: as in `load_into`.
    """
    own = network.state_dict()
    for name in [*own, *(name for name in weights if name not in own)]:
        value, other = weights.get(name), own.get(name)
        if value is None or other is None or value.shape != other.shape:
            has = "is missing" if value is None else "is unknown" if other is None else f"is {list(value.shape)}"
            should = f", it should be {list(other.shape)}" if value is not None and other is not None else ""
            raise ValueError(f"corrupt checkpoint {path}: the weights do not fit its architecture ({name} {has}{should})")
        if value.is_floating_point() != other.is_floating_point():
            raise ValueError(f"corrupt checkpoint {path}: {name} is {value.dtype}, it should be {other.dtype}")
        if not is_finite(value):
            raise ValueError(f"corrupt checkpoint {path}: {name} has numbers that are not finite")


def is_finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; one pass, no copy."""
    return not value.numel() or not value.is_floating_point() or all(torch.isfinite(end) for end in value.aminmax())
