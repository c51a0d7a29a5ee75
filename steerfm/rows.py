"""Conditions, labels and prompts, with one row for each output or each particle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

Condition = Tensor | Mapping[str, Tensor] | None
"""One row per output (labels, embeddings), a dictionary of such tensors, or None for no condition."""


def map_condition(function: Callable[[Tensor], Tensor], cond: Condition) -> Condition:
    """Apply ``function`` (repeat, index, move) to all tensors of a condition."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else function(cond)
    return {name: function(value) for name, value in cond.items()}


def move_condition(cond: Condition, device: torch.device | str) -> Condition:
    """The condition on another device."""
    return map_condition(lambda c: c.to(device), cond)


def cuts(n: int, size: int) -> list[slice]:
    """Slices of n rows with ``size`` rows each; the last one may be shorter."""
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def take_rows(cond: Condition, rows: slice | Tensor) -> Condition:
    """Some rows of a condition."""
    return map_condition(lambda c: c[rows], cond)


def repeat_rows(cond: Condition, k: int) -> Condition:
    """Repeat every row ``k`` times in place: from one row per output to one per particle."""
    return map_condition(lambda c: c.repeat_interleave(k, 0), cond)


def expand_rows(null: Condition, b: int, device: torch.device | str) -> Condition:
    """Expand a condition of one row to ``b`` equal rows, without a copy."""
    return map_condition(lambda c: c.to(device).expand(b, *c.shape[1:]), null)


def join_conditions(first: Condition, second: Condition) -> Condition:
    """Concatenate the rows of two conditions.

    Raises:
        ValueError: their forms differ.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: torch.cat([first[name], second[name]]) for name in first}
    raise ValueError("cond and the null condition must both be tensors, or both dictionaries with the same keys")


def replace_rows(cond: Condition, rows: Tensor, null: Condition) -> Condition:
    """The condition with the rows of a mask (b,) replaced by the null condition of one row."""
    if cond is None or null is None:
        return cond
    n = len(rows)
    index = torch.arange(n, device=rows.device).masked_fill(rows, n)
    null = expand_rows(null, 1, rows.device)
    return take_rows(join_conditions(cond, null), index)


def is_null(cond: Condition, null: Condition) -> Tensor:
    """Mask (b,) of the rows that equal the null condition of one row."""
    if isinstance(cond, Tensor) and isinstance(null, Tensor):
        return (cond == null.to(cond.device)).view(len(cond), -1).all(1)
    assert isinstance(cond, Mapping) and isinstance(null, Mapping)
    return torch.stack([is_null(cond[name], null[name]) for name in cond]).all(0)


def with_negative(cond: Condition, negative: Condition) -> Condition:
    """Combine a condition with a negative condition for guidance, row by row; `Guided` reads it with `split_negative`.

    Raises:
        ValueError: their forms differ.
    """
    if isinstance(cond, Tensor) and isinstance(negative, Tensor):
        return {"cond": cond, "negative": negative}
    if isinstance(cond, Mapping) and isinstance(negative, Mapping):
        return {**cond, **{f"negative {name}": value for name, value in negative.items()}}
    raise ValueError("negative= needs a condition of the same form: give cond= or label= as well")


def split_negative(cond: Condition) -> tuple[Condition, Condition]:
    """Split a condition of `with_negative` into (condition, negative); without a negative one the second is None."""
    if not isinstance(cond, Mapping):
        return cond, None
    if cond.keys() == {"cond", "negative"}:
        return cond["cond"], cond["negative"]
    negative = {name.removeprefix("negative "): value for name, value in cond.items() if name.startswith("negative ")}
    return {name: value for name, value in cond.items() if not name.startswith("negative ")}, negative or None


@dataclass(frozen=True, eq=False)
class Rows:
    """Conditions, labels and prompts, one row for each output or each particle.

    Attributes:
        n: number of rows.
        cond: condition of the map; n rows, or None.
        labels: (n,) classes, for rewards that read them; or None.
        prompts: n texts, likewise.
        groups: (n,) group numbers for rewards that compare rows of a group; None if each row is a separate group.
    """

    n: int = 1
    cond: Condition = None
    labels: Tensor | None = None
    prompts: list[str] | None = None
    groups: Tensor | None = None

    @classmethod
    def of(cls, cond: Condition, prompts: Sequence[str] | None = None) -> Self:
        """Rows for a condition; a condition of integers also gives the labels.

        Raises:
            ValueError: the numbers of prompts and of rows differ.
        """
        first = cond if isinstance(cond, Tensor) or cond is None else next(iter(cond.values()))
        n = len(first) if first is not None else len(prompts) if prompts is not None else 1
        if prompts is not None and len(prompts) != n:
            raise ValueError(f"{len(prompts)} prompts for {n} conditions: give one prompt for each")
        return cls(n, cond, labels_of(cond), None if prompts is None else list(prompts))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Some rows, in order; a tensor (b,) of indices may repeat a row."""
        numbers = range(self.n)[rows] if isinstance(rows, slice) else rows.tolist()
        return replace(
            self,
            n=len(numbers),
            cond=take_rows(self.cond, rows),
            labels=None if self.labels is None else self.labels[rows],
            prompts=None if self.prompts is None else [self.prompts[row] for row in numbers],
            groups=None if self.groups is None else self.groups[rows],
        )

    def kinds(self) -> Tensor:
        """(n,) a number for each row, from 0 in order of occurrence; rows with equal condition, label and prompt share one."""
        columns = [] if self.labels is None else [self.labels]
        columns += self.cond.values() if isinstance(self.cond, Mapping) else [] if self.cond is None else [self.cond]
        numbers = [_number(column.detach().cpu().reshape(self.n, -1).tolist()) for column in columns]
        return torch.tensor(_number(list(zip(self.prompts or [""] * self.n, *numbers))))

    def repeat(self, k: int) -> Self:
        """Repeat every row ``k`` times in place."""
        return replace(
            self,
            n=self.n * k,
            cond=repeat_rows(self.cond, k),
            labels=None if self.labels is None else self.labels.repeat_interleave(k),
            prompts=None if self.prompts is None else [prompt for prompt in self.prompts for _ in range(k)],
            groups=None if self.groups is None else self.groups.repeat_interleave(k),
        )

    def to(self, device: torch.device | str) -> Self:
        """The rows on another device."""
        labels, groups = (None if part is None else part.to(device) for part in (self.labels, self.groups))
        return replace(self, cond=move_condition(self.cond, device), labels=labels, groups=groups)


def labels_of(cond: Condition) -> Tensor | None:
    """The labels in a condition: the condition itself if it is (n,) integers, else None."""
    return cond if isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point() else None


def _number(values: Sequence[Any]) -> list[int]:
    """A number for each value, from 0 in order of first occurrence; equal values share one."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(repr(value), len(numbers)) for value in values]
