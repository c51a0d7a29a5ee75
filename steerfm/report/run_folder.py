"""The folder of a run: its configuration, numbers and tensors. Every file is written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, uint8

from steerfm import files
from steerfm.report.formats import plain

RESULTS = ("*.safetensors", "result.json", "*.ckpt", "parts/*", "cells/*", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")
"""Files of a run folder that hold results."""
NEUTRAL = {"out", "force"}
"""Configuration keys that may differ when a run is continued."""
ANEW = "choose another out= or delete it, or start anew with force=true"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
"""Bytes per number of each safetensors type."""


class RunFolder:
    """The folder of one run. Files are written atomically, so a killed run loses at most the part in progress.

    Only one process writes the folder: with several ranks, rank 0.

    Args:
        path: the folder; created if missing.
        config_yaml: configuration of the run, stored as config.yaml. An existing run with the same configuration is continued.
            The keys ``out`` and ``force`` are ignored, so that a folder can be moved. A run without results is replaced.
        resume: whether to continue an existing run with the same configuration; if False, such a folder is an error.
        inputs: digests of the files that the run reads, by name, stored as inputs.json.
        shared: whether several processes may write the folder, each its own files.
        force: whether to start again in a folder that holds another run or a finished one. Only files that a run wrote are
            deleted. An unfinished run with the same configuration is continued.

    Raises:
        ValueError: ``path`` is not a folder; another process is writing it; it holds a run with another configuration, or a run
            whose input files have changed; or it holds any run and ``resume`` is False.
    """

    def __init__(
        self,
        path: str | Path,
        config_yaml: str,
        resume: bool = True,
        inputs: Mapping[str, str] | None = None,
        shared: bool = False,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another out=")
        self.path.mkdir(parents=True, exist_ok=True)
        if shared:
            files.sweep(self.path)
        else:
            files.claim(self.path)
        files.keep_list(self.path)
        config, digests = self.path / "config.yaml", self.path / "inputs.json"
        if config.is_file():
            self._continue(config_yaml, resume, inputs or {}, force)
        if inputs is not None and not (config.is_file() and digests.is_file()):
            files.write(digests, json.dumps(dict(inputs), indent=1) + "\n")
        if not config.is_file():
            files.write(config, config_yaml)
        files.drop_cut_line(self.path / "metrics.jsonl")  # that step will be logged again
        if (self.path / "result.json").is_file():
            self.clear_parts()

    def _continue(self, config_yaml: str, resume: bool, inputs: Mapping[str, str], force: bool) -> None:
        """Prepare a folder that already holds a run, or raise if the new run may not continue there."""
        config = self.path / "config.yaml"
        before, now = _read_yaml(config.read_text(encoding="utf-8")), _read_yaml(config_yaml)
        different, stale, has_results = _differences(before, now), changed_inputs(self.path, inputs), self._holds_results()
        own = isinstance(before, dict) and isinstance(now, dict) and before.keys() - NEUTRAL == now.keys() - NEUTRAL
        ours = own or (self.path / files.LIST).is_file()
        finished = any((self.path / name).is_file() for name in ("result.json", "summary.json"))
        if force and ours and (different or stale or finished):
            files.clear(self.path)
            return
        fix = ANEW if ours else "choose another out= or delete it"
        if not resume and (has_results or not different):
            raise ValueError(f"{self.path} holds a run already; {fix}")
        if different and (has_results or not own):
            names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            raise ValueError(f"{self.path} holds a run with another configuration (differs in: {names}); {fix}")
        if stale and has_results:
            raise ValueError(f"{self.path}: {', '.join(stale)}: edited since this run began; {fix}")
        if different or stale:  # the earlier run has no results: replace it
            for log in self.path.rglob("metrics.jsonl"):
                log.unlink(missing_ok=True)
            config.unlink()

    def _holds_results(self) -> bool:
        """Whether the folder holds results that a run could continue from, or that would be lost."""
        return any(next(self.path.glob(pattern), None) for pattern in RESULTS)

    def __fspath__(self) -> str:
        return str(self.path)

    # --- numbers -----------------------------------------------------------------------------------------------------
    def log(self, *, once: Sequence[str] = (), **numbers: Any) -> None:
        """Append a line to metrics.jsonl; it replaces an earlier line with the same values of the keys ``once``."""
        line, file = plain(numbers), self.path / "metrics.jsonl"
        rows = self.history() if once else []
        others = [row for row in rows if any(row.get(key) != line[key] for key in once)]
        if len(others) < len(rows):
            files.write(file, "".join(json.dumps(row) + "\n" for row in [*others, line]))
            return
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, allow_nan=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, in order."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def save_result(self, result: Mapping[str, Any]) -> Path:
        """Write result.json: tensors become lists, floats are rounded to 7 digits, NaN and infinities become null."""
        text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False)
        return files.write(self.path / "result.json", (text + "\n").encode())

    def load_result(self) -> dict[str, Any] | None:
        """Return the content of result.json, or None if the run is not finished."""
        file = self.path / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    # --- tensors -----------------------------------------------------------------------------------------------------
    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write ``name``.safetensors."""
        return files.write(self.path / f"{name}.safetensors", _pack(tensors))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read ``name``.safetensors onto the CPU.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file is corrupt.
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
        try:
            return load(file.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt ({error}); delete it and run the same command again") from None

    # --- parts: batches of an unfinished run -------------------------------------------------------------------------
    def save_part(self, index: int, tensors: Mapping[str, Tensor], prefix: str = "part") -> Path:
        """Save one batch of an unfinished run as parts/``prefix``-``index``.safetensors."""
        return files.write(self.part(index, prefix), _pack(tensors))

    def load_part(self, index: int, prefix: str = "part") -> dict[str, Tensor] | None:
        """Return the tensors of a part, or None if it is missing or corrupt and must be computed again."""
        try:
            return load(self.part(index, prefix).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def parts(self, prefix: str = "part") -> list[int]:
        """Return the indices of the parts that can be loaded, in order."""
        return [index for index in self._indices(prefix) if self.load_part(index, prefix) is not None]

    def merge_parts(
        self, name: str, keys: Sequence[str] = (), prefix: str = "part", metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Concatenate all parts along the first axis into ``name``.safetensors, with one part in memory at a time.

        Args:
            name: name of the file, without its suffix.
            keys: names of the tensors; by default those that all parts have.
            prefix: prefix of the parts.
            metadata: metadata of the file.

        Returns:
            Path of the file.
        """
        parts = [self.part(index, prefix) for index in self._indices(prefix)]
        facts: list[dict[str, tuple[str, list[int]]]] = []  # (type, shape) of each key of each part
        for file in parts:
            with safe_open(file, "pt") as tensors:
                views = {key: tensors.get_slice(key) for key in keys or tensors.keys()}
                facts.append({key: (view.get_dtype(), view.get_shape()) for key, view in views.items()})
        kinds = {key: kind for key, (kind, _) in facts[0].items() if all(key in part for part in facts)}
        keys = sorted(kinds, key=lambda key: (-BYTES[kinds[key]], key))  # larger types first, for alignment
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for key in keys:
            shape = [sum(part[key][1][0] for part in facts), *facts[0][key][1][1:]]
            begin, end = end, end + math.prod(shape) * BYTES[kinds[key]]
            header[key] = {"dtype": kinds[key], "shape": shape, "data_offsets": [begin, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)

        def content() -> Iterator[bytes]:
            yield len(head).to_bytes(8, "little") + head
            for key in keys:
                for file in parts:
                    with safe_open(file, "pt") as tensors:
                        yield tensors.get_tensor(key).view(uint8).numpy().tobytes()

        return files.write(self.path / f"{name}.safetensors", content())

    def clear_parts(self) -> None:
        """Delete all parts of a finished run."""
        parts = self.path / "parts"
        for file in parts.glob("*-[0-9]*.safetensors"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # there is no such folder, or it holds other files
            parts.rmdir()

    def _indices(self, prefix: str) -> list[int]:
        parts = (self.path / "parts").glob(f"{prefix}-*.safetensors")
        return sorted(int(end) for file in parts if (end := file.stem.removeprefix(f"{prefix}-")).isdigit())

    def part(self, index: int, prefix: str = "part") -> Path:
        """Return the path of a part, whether or not it exists."""
        return self.path / "parts" / f"{prefix}-{index:05d}.safetensors"


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor from a safetensors file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is corrupt or has no such tensor.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error})") from None


def changed_inputs(folder: Path, inputs: Mapping[str, str]) -> list[str]:
    """Return the names of the inputs that have changed since the run in a folder began."""
    try:
        before = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an earlier version, or one killed at its start
        return []
    return [name for name in inputs if name in before and before[name] != inputs[name]]


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    # clone: safetensors refuses tensors that share memory, such as views of one batch
    return save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # differs from any configuration


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if prefix or key not in NEUTRAL]
        missing = object()
        return [name for key in keys for name in _differences(a.get(key, missing), b.get(key, missing), f"{prefix}{key}.")]
    return [] if a == b else [prefix.rstrip(".") or "everything"]
