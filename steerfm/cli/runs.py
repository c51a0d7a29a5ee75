"""Run folders: their paths, the files that a run reads, and the commit that it ran."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm import files, plugins, shipped, trust, zoo
from steerfm.cli.loading import config_yaml, plain
from steerfm.registry import is_code, split_spec
from steerfm.report.run_folder import RunFolder

FINISHED = "finished already: {} (force=true runs it again; out= names another folder)"


def run_folder(config: Any, default: str) -> RunFolder:
    """Open the run folder ``config.out``, or ``default`` if that is None."""
    text = config_yaml(config)
    return RunFolder(config.out or default, text, inputs=inputs(config), force=config.force)


def inputs(config: Any) -> dict[str, str]:
    """Return the SHA-256 of every file that a configuration names, yours or shipped, by key and file: "reward my.py"."""
    values = plain(config)
    return {name: digest for key in values if key != "out" for name, digest in contents(values[key], key).items()}


def contents(value: Any, key: str = "") -> dict[str, str]:
    """Return the digests of the files that a value names, at any depth; ``key`` is the prefix of their names."""
    if isinstance(value, Mapping):
        return {name: digest for item in value.values() for name, digest in contents(item, key).items()}
    if isinstance(value, list | tuple):
        return {name: digest for item in value for name, digest in contents(item, key).items()}
    return {f"{key} {file}".strip(): files.digest(file) for file in _named_files(value)} if isinstance(value, str) else {}


def _named_files(text: str) -> list[Path]:
    """Return the files that a text names: a file, code as path.py:name, weights and their JSON, a model folder, or a shipped
    file of that name."""
    path, code = Path(text), shipped.example(Path(text.rsplit(":", 1)[0]))
    if os.path.isdir(path) and os.path.isfile(path / "open_clip_config.json"):
        return sorted(file for file in path.iterdir() if file.is_file())
    models = plugins.models()
    if text not in models and len(weights := zoo.models_in(path)) == 1:  # a run folder
        return _named_files(str(weights[0]))
    ours = [zoo.find(text)] if text in models else [shipped.folder("configs") / "prompts" / text] if path.name == text else []
    for file in (path, *([code] if code.suffix == ".py" else []), *ours):
        if os.path.isfile(file):
            head = file.with_suffix(".json")
            beside = trust.neighbours(file) if file.suffix == ".py" else []
            return [file, head] if file.suffix == ".safetensors" and head.is_file() else [file, *beside]
    return []


def slug(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(slug(item) for item in value)
    name, arguments = split_spec(value, "reward")
    words = [
        Path(name.split(":")[0]).stem,
        *name.split(":")[1:],
        *(str(v) for v in arguments.values() if isinstance(v, str)),
    ]
    return "-".join("".join(c if c.isalnum() else "_" for c in word) for word in words)


def stem(model: Any) -> str:
    """Return the name of a model for files and titles: without folders; for a model made by code, with its file name."""
    name = split_spec(model, "model")[0].removeprefix(zoo.DIFFUSERS)
    place, _, maker = name.rpartition(":")
    return f"{Path(place).stem}-{maker}" if is_code(name) else Path(name.replace(":", "-")).stem


def commit() -> str:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def grid_rows(pictures: Tensor, captions: Sequence[str], columns: int = 6) -> tuple[Tensor, list[list[str]]]:
    """Arrange pictures (n, c, h, w) and their captions in rows of at most ``columns``, padded with white."""
    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    full = torch.cat([pictures, torch.ones(missing, *pictures.shape[1:])])
    texts = [*captions, *[""] * missing]
    rows = len(full) // columns
    return full.unflatten(0, (rows, columns)), [texts[i * columns : (i + 1) * columns] for i in range(rows)]
