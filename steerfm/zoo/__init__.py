"""Shipped checkpoints: half-precision safetensors with a model card in the JSON beside each.

>>> flow_map = steerfm.load("fashion")            # or a path to a .safetensors file of your own
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from steerfm.flowmap import FlowMap, NeuralFlowMap

FOLDER = Path(__file__).parent


def models() -> dict[str, dict[str, Any]]:
    """Shipped models by name, with the content of their JSON."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def find(name: str | Path) -> Path:
    """Path of the weights of a shipped model or of a file of your own.

    Raises:
        ValueError: naming the models there are.
    """
    path = Path(name)
    if path.suffix == ".safetensors" or path.parent != Path("."):
        return path
    known = [path.stem for path in sorted(FOLDER.glob("*.safetensors"))]
    if str(name) in known:
        return FOLDER / f"{name}.safetensors"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown model {str(name)!r}{hint}; models: {', '.join(known)}, or a path to a .safetensors file")


def load(name: str | Path | FlowMap, device: str = "cpu") -> FlowMap:
    """A flow map from the zoo, from a path, or as it is.

    Args:
        name: a shipped name, a path to a ``.safetensors`` file with its ``.json`` beside, or a FlowMap.
        device: where to put it.

    Raises:
        ValueError, FileNotFoundError: unknown, missing, corrupt or not a flow map; nothing is ever unpickled.
    """
    flow_map = name if isinstance(name, FlowMap) else NeuralFlowMap.load(find(name))
    return flow_map.to(device)
