"""The arguments of a network with one row per sample, and their form as a condition: a dictionary of tensors (n, ...).

The layout is derived from two calls, with b and with 2 b samples: arguments that double have rows. Names are paths, such as
"added_cond_kwargs.time_ids".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerfm.models.capture import SECOND_TIMES, STATES, TIMES, Call

Path = tuple[str | int, ...]


class Part(Protocol):
    """One argument with a row per sample."""

    def take(self, value: Any, length: int) -> dict[str, Tensor]:
        """The rows in a condition.

        Args:
            value: the argument.
            length: of the texts in this call.
        """
        ...

    def give(self, cond: Mapping[str, Tensor], b: int) -> Any:
        """The argument for the b rows of a condition."""
        ...


@dataclass(frozen=True)
class Plain:
    """A tensor with rows of equal shapes."""

    name: str

    def take(self, value: Any, length: int) -> dict[str, Tensor]:
        return {self.name: value}

    def give(self, cond: Mapping[str, Tensor], b: int) -> Any:
        return cond[self.name]


@dataclass(frozen=True)
class Texts:
    """Rows as long as their texts, (b, length, ...) or a list of (length, ...); in a condition all are padded to ``longest``.

    The network gets the same input as from its pipeline: rows are only padded to the longest among them.

    Args:
        name: of the argument.
        longest: length of the rows of a condition.
        listed: whether the argument is a list.
        optional: whether it is a mask, which is omitted if all rows have the same length.
    """

    name: str
    longest: int
    listed: bool = False
    optional: bool = False

    def take(self, value: Any, length: int) -> dict[str, Tensor]:
        rows = [torch.ones(length, dtype=torch.long)] if value is None else list(value)
        for row in rows:
            if len(row) > self.longest:
                raise ValueError(
                    f"a prompt has {len(row)} tokens, at most {self.longest} fit: give max_sequence_length={len(row)}"
                )
        padded = [F.pad(row, (0, 0) * (row.ndim - 1) + (0, self.longest - len(row))) for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=padded[0].device)
        return {self.name: torch.stack(padded), self._length: lengths}

    def give(self, cond: Mapping[str, Tensor], b: int) -> Any:
        lengths, rows = cond[self._length].tolist(), cond[self.name]
        if self.listed:
            return [row[:length] for row, length in zip(rows, lengths)]
        return None if self.optional and len(set(lengths)) == 1 else rows[:, : max(lengths)]

    @property
    def _length(self) -> str:
        return f"{self.name} length"


@dataclass(frozen=True)
class Constant:
    """A list with the same item for every sample, such as its size."""

    item: Any

    def take(self, value: Any, length: int) -> dict[str, Tensor]:
        return {}

    def give(self, cond: Mapping[str, Tensor], b: int) -> Any:
        return [self.item] * b


class Layout:
    """The arguments of a network except states and times.

    Args:
        one: first call, with b samples.
        two: first call, with 2 b samples.
        longest: tokens of the longest prompt, for prompts of variable length.

    Attributes:
        states: name of the argument with the states.
        time: name of the argument with the time.
        second_time: name of the argument with the time to jump to, or None.
        listed: shape of one element if states are a list; None if they are a tensor.
        dtype: of the states in the recorded call.
        reference: the time in the recorded call; its form is used for all times.
    """

    def __init__(self, one: Call, two: Call, longest: int) -> None:
        states, time = one.among(STATES), one.among(TIMES)
        if states is None or time is None:
            raise ValueError(
                f"its network is called with {', '.join(one.arguments)}, but {STATES[0]} and {TIMES[0]} are needed"
            )
        self.states, self.time, self.second_time = states, time, one.among(SECOND_TIMES)
        value_of_states = one.arguments[states]
        self.listed = tuple(value_of_states[0].shape) if isinstance(value_of_states, list) else None
        self.dtype: torch.dtype = (value_of_states[0] if isinstance(value_of_states, list) else value_of_states).dtype
        self.reference = torch.as_tensor(one.arguments[time])
        self.fixed: dict[str, Any] = {}
        self.parts: dict[Path, Part] = {}
        self._longest = longest
        ours = {states, time, self.second_time, "return_dict"}
        for name, value in one.arguments.items():
            if name not in ours:
                self.fixed[name] = value
                for path, first, second in _leaves(value, two.arguments.get(name), (name,)):
                    part = self._part(path, first, second)
                    if part is not None:
                        self.parts[path] = part

    def widen(self, network: nn.Module, call: Call) -> None:
        """Use float32 times if the pipeline rounds them to half precision (by 2 of 1000) and its network accepts float32.

        Args:
            network: of the pipeline; called once if times are in half precision.
            call: a recorded call of it.
        """
        if self.reference.dtype not in (torch.float16, torch.bfloat16):
            return
        wide = {name: call.arguments[name].float() for name in (self.time, self.second_time) if name is not None}
        try:
            with torch.no_grad():
                network(**call.arguments | wide)
        except RuntimeError:  # it computes in the precision of the time that it is given
            return
        self.reference = self.reference.float()

    def _part(self, path: Path, one: Any, two: Any) -> Part | None:
        name = ".".join(str(key) for key in path)
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            if one.ndim == 0 or 2 * len(one) != len(two):
                return None
            same = one.shape[1:] == two.shape[1:]
            return Plain(name) if same else Texts(name, max(self._longest, one.shape[1]))
        if one is None and isinstance(two, Tensor):
            return Texts(name, self._longest, optional=True)
        if isinstance(one, list) and isinstance(two, list) and 2 * len(one) == len(two):
            if isinstance(one[0], Tensor):
                return Texts(name, max(self._longest, *(len(row) for row in one)), listed=True)
            return Constant(one[0])
        return None

    def take(self, call: Call) -> dict[str, Tensor]:
        """The rows of a call, as a condition."""
        values = {path: _at(call.arguments, path) for path in self.parts}
        length = max((value.shape[1] for path, value in values.items()
                      if isinstance(self.parts[path], Texts) and isinstance(value, Tensor)), default=0)  # fmt: skip
        rows: dict[str, Tensor] = {}
        for path, part in self.parts.items():
            rows |= part.take(values[path], length)
        return rows

    def give(self, cond: Mapping[str, Tensor], b: int) -> dict[str, Any]:
        """The arguments for the b rows of a condition."""
        arguments = dict(self.fixed)
        for path, part in self.parts.items():
            _set(arguments, path, part.give(cond, b))
        return arguments


def _leaves(one: Any, two: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in one:
            yield from _leaves(one[key], two.get(key), (*path, key))
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        for index, (first, second) in enumerate(zip(one, two)):
            yield from _leaves(first, second, (*path, index))
    else:
        yield path, one, two


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        value = None if value is None else value[key]
    return value


def _set(holder: dict[Any, Any], path: Path, value: Any) -> None:
    """Set the value at a path; its containers are copied, so that nothing else changes."""
    key, *rest = path
    if rest:
        inner = holder[key]
        as_dict = dict(inner) if isinstance(inner, Mapping) else dict(enumerate(inner))
        _set(as_dict, tuple(rest), value)
        value = as_dict if isinstance(inner, Mapping) else type(inner)(as_dict.values())
    holder[key] = value
