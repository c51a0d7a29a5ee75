"""The folder of a run: its configuration, numbers and tensors, each file whole or not there at all."""

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
"""Files of a run folder that are worth something."""
NEUTRAL = {"out", "force"}
"""Keys of a configuration that do not make it another run."""
ANEW = "choose another out= or delete it, or start anew with force=true"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
"""Sizes of safetensors' types."""


class RunFolder:
    """The folder of one run. Every file appears whole or not at all, so a kill loses at most the part in progress.

    One process writes it: with several ranks, rank 0.

    Args:
        path: of the folder; made if missing.
        config_yaml: the run's configuration, kept as config.yaml. It decides whether an existing folder is continued;
            its keys ``out`` and ``force`` are ignored, so that a folder can be moved.
            A run that has no result yet is replaced.
        resume: continue a folder that holds a run with the same configuration; False: such a folder is an error.
        inputs: what else makes the run: digests of the files that it reads, by name; kept as inputs.json.
        shared: several processes write the folder, each its own files: nobody is refused.
        force: start anew in a folder that holds another run, or this one and finished: what it wrote is deleted, nothing else.
            An unfinished run of the same configuration goes on.

    Raises:
        ValueError: the folder holds another configuration, a run of files that were edited since, a run although ``resume`` is
            False, or is no folder; another process writes it.
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
        config, known = self.path / "config.yaml", self.path / "inputs.json"
        if config.is_file():
            self._continue(config_yaml, resume, inputs or {}, force)
        if inputs is not None and not (config.is_file() and known.is_file()):
            files.write(known, json.dumps(dict(inputs), indent=1) + "\n")
        if not config.is_file():
            files.write(config, config_yaml)
        files.drop_cut_line(self.path / "metrics.jsonl")  # the step is logged again
        if (self.path / "result.json").is_file():
            self.clear_parts()

    def _continue(self, config_yaml: str, resume: bool, inputs: Mapping[str, str], force: bool) -> None:
        """Make room for a run in a folder that holds one, or refuse."""
        config = self.path / "config.yaml"
        before, now = _read_yaml(config.read_text(encoding="utf-8")), _read_yaml(config_yaml)
        different, changed, begun = _differences(before, now), edited(self.path, inputs), self._holds_results()
        own = isinstance(before, dict) and isinstance(now, dict) and before.keys() - NEUTRAL == now.keys() - NEUTRAL
        ours = own or (self.path / files.LIST).is_file()
        finished = any((self.path / name).is_file() for name in ("result.json", "summary.json"))
        if force and ours and (different or changed or finished):
            files.clear(self.path)
            return
        fix = ANEW if ours else "choose another out= or delete it"
        if not resume and (begun or not different):
            raise ValueError(f"{self.path} holds a run already; {fix}")
        if different and (begun or not own):
            names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            raise ValueError(f"{self.path} holds a run with another configuration (differs in: {names}); {fix}")
        if changed and begun:
            raise ValueError(f"{self.path}: {', '.join(changed)}: edited since this run began; {fix}")
        if different or changed:  # a run that failed before its first result is in nobody's way
            for log in self.path.rglob("metrics.jsonl"):
                log.unlink(missing_ok=True)
            config.unlink()

    def _holds_results(self) -> bool:
        """Whether there is something that a run could go on from, or that would be lost."""
        return any(next(self.path.glob(pattern), None) for pattern in RESULTS)

    def __fspath__(self) -> str:
        return str(self.path)

    # --- numbers -----------------------------------------------------------------------------------------------------
    def log(self, *, once: Sequence[str] = (), **numbers: Any) -> None:
        """Append one line to metrics.jsonl, in place of an earlier one with the same values of the keys ``once``."""
        line, file = plain(numbers), self.path / "metrics.jsonl"
        rows = self.history() if once else []
        others = [row for row in rows if any(row.get(key) != line[key] for key in once)]
        if len(others) < len(rows):
            files.write(file, "".join(json.dumps(row) + "\n" for row in [*others, line]))
            return
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, allow_nan=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def save_result(self, result: Mapping[str, Any]) -> Path:
        """Write result.json: tensors become lists, floats get 7 digits, NaN and infinities become null."""
        text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False)
        return files.write(self.path / "result.json", (text + "\n").encode())

    def load_result(self) -> dict[str, Any] | None:
        """result.json, or None where the run is not finished."""
        file = self.path / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    # --- tensors -----------------------------------------------------------------------------------------------------
    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write ``name``.safetensors."""
        return files.write(self.path / f"{name}.safetensors", _pack(tensors))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read ``name``.safetensors, on the CPU.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or corrupt.
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
        """Keep one batch of an unfinished run: parts/``prefix``-``index``.safetensors."""
        return files.write(self.part(index, prefix), _pack(tensors))

    def load_part(self, index: int, prefix: str = "part") -> dict[str, Tensor] | None:
        """The tensors of a part, or None where it is missing or corrupt and has to be done (again)."""
        try:
            return load(self.part(index, prefix).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def parts(self, prefix: str = "part") -> list[int]:
        """Indices of the parts that can be loaded, in order."""
        return [index for index in self._indices(prefix) if self.load_part(index, prefix) is not None]

    def merge_parts(
        self, name: str, keys: Sequence[str] = (), prefix: str = "part", told: Mapping[str, str] | None = None
    ) -> Path:
        """Write ``name``.safetensors: tensors of all parts, joined along their first axis, a part at a time in memory.

        Args:
            keys: names of the tensors; default those that all parts have.
            told: what the file says of itself beside them.
        """
        parts = [self.part(index, prefix) for index in self._indices(prefix)]
        facts: list[dict[str, tuple[str, list[int]]]] = []  # of each part, of each key: type and shape
        for file in parts:
            with safe_open(file, "pt") as tensors:
                views = {key: tensors.get_slice(key) for key in keys or tensors.keys()}
                facts.append({key: (view.get_dtype(), view.get_shape()) for key, view in views.items()})
        kinds = {key: kind for key, (kind, _) in facts[0].items() if all(key in part for part in facts)}
        keys = sorted(kinds, key=lambda key: (-BYTES[kinds[key]], key))  # large types first: each stays aligned
        header: dict[str, Any] = {"__metadata__": dict(told)} if told else {}
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
        """Delete all parts: the run is finished."""
        parts = self.path / "parts"
        for file in parts.glob("*-[0-9]*.safetensors"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or somebody else's files are in it
            parts.rmdir()

    def _indices(self, prefix: str) -> list[int]:
        parts = (self.path / "parts").glob(f"{prefix}-*.safetensors")
        return sorted(int(end) for file in parts if (end := file.stem.removeprefix(f"{prefix}-")).isdigit())

    def part(self, index: int, prefix: str = "part") -> Path:
        """Where a part is, once it is there."""
        return self.path / "parts" / f"{prefix}-{index:05d}.safetensors"


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file.

    Raises:
        FileNotFoundError, ValueError: the file is missing, torn, or has no such tensor.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error})") from None


def edited(folder: Path, inputs: Mapping[str, str]) -> list[str]:
    """Names of the inputs that are no longer what the run of a folder began with."""
    try:
        before = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an earlier version, or one that was killed at its start
        return []
    return [name for name in inputs if name in before and before[name] != inputs[name]]


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    # clone: safetensors refuses tensors that share memory, such as expanded ones and views of one batch
    return save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # differs from any configuration


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if prefix or key not in NEUTRAL]
        missing = object()
        return [name for key in keys for name in _differences(a.get(key, missing), b.get(key, missing), f"{prefix}{key}.")]
    return [] if a == b else [prefix.rstrip(".") or "everything"]
