"""What outputs are asked for: a condition, labels and prompts, a row for each output or each particle."""

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
    """Apply ``function`` to the tensors of a condition (repeat, index, move), whatever its form."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else function(cond)
    return {name: function(value) for name, value in cond.items()}


def move_condition(cond: Condition, device: torch.device | str) -> Condition:
    """The condition on another device."""
    return map_condition(lambda c: c.to(device), cond)


def cuts(n: int, size: int) -> list[slice]:
    """The slices of n rows that hold ``size`` rows each, the last one what is left."""
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def take_rows(cond: Condition, rows: slice | Tensor) -> Condition:
    """The given rows of a condition."""
    return map_condition(lambda c: c[rows], cond)


def repeat_rows(cond: Condition, k: int) -> Condition:
    """Every row ``k`` times, one after the other: one row per output to one per particle."""
    return map_condition(lambda c: c.repeat_interleave(k, 0), cond)


def expand_rows(null: Condition, b: int, device: torch.device | str) -> Condition:
    """A condition of one row as ``b`` equal rows; nothing is copied."""
    return map_condition(lambda c: c.to(device).expand(b, *c.shape[1:]), null)


def join_conditions(first: Condition, second: Condition) -> Condition:
    """The rows of both, one after the other.

    Raises:
        ValueError: of different forms.
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
    """A condition that also says what guidance leads away from, row by row; `Guided` reads it by `split_negative`.

    Raises:
        ValueError: of different forms.
    """
    if isinstance(cond, Tensor) and isinstance(negative, Tensor):
        return {"cond": cond, "negative": negative}
    if isinstance(cond, Mapping) and isinstance(negative, Mapping):
        return {**cond, **{f"negative {name}": value for name, value in negative.items()}}
    raise ValueError("negative= needs a condition of the same form: pass cond= or label=, too")


def split_negative(cond: Condition) -> tuple[Condition, Condition]:
    """(condition, negative) of what `with_negative` put together; the second is None where there is none."""
    if not isinstance(cond, Mapping):
        return cond, None
    if cond.keys() == {"cond", "negative"}:
        return cond["cond"], cond["negative"]
    negative = {name.removeprefix("negative "): value for name, value in cond.items() if name.startswith("negative ")}
    return {name: value for name, value in cond.items() if not name.startswith("negative ")}, negative or None


@dataclass(frozen=True, eq=False)
class Rows:
    """All that outputs are asked for, a row for each output, or for each particle.

    Attributes:
        n: number of rows.
        cond: condition of the map; n rows, or None.
        labels: (n,) classes, for rewards that read them; or None.
        prompts: n texts, likewise.
        groups: (n,) rows that a reward compares with each other share a number; None where each is by itself.
    """

    n: int = 1
    cond: Condition = None
    labels: Tensor | None = None
    prompts: list[str] | None = None
    groups: Tensor | None = None

    @classmethod
    def of(cls, cond: Condition, prompts: Sequence[str] | None = None) -> Self:
        """Rows for a condition; labels are the condition where that holds integers.

        Raises:
            ValueError: another number of prompts than rows of the condition.
        """
        first = cond if isinstance(cond, Tensor) or cond is None else next(iter(cond.values()))
        n = len(first) if first is not None else len(prompts) if prompts is not None else 1
        if prompts is not None and len(prompts) != n:
            raise ValueError(f"{len(prompts)} prompts for {n} conditions: give one each")
        return cls(n, cond, labels_of(cond), None if prompts is None else list(prompts))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The given rows, in order; a tensor (b,) of numbers may name a row more than once."""
        chosen = range(self.n)[rows] if isinstance(rows, slice) else rows.tolist()
        return replace(
            self,
            n=len(chosen),
            cond=take_rows(self.cond, rows),
            labels=None if self.labels is None else self.labels[rows],
            prompts=None if self.prompts is None else [self.prompts[row] for row in chosen],
            groups=None if self.groups is None else self.groups[rows],
        )

    def kinds(self) -> Tensor:
        """(n,) a number for each row, from 0 in the order of first rows: the same where condition, label and prompt are."""
        columns = [] if self.labels is None else [self.labels]
        columns += self.cond.values() if isinstance(self.cond, Mapping) else [] if self.cond is None else [self.cond]
        numbers = [_numbered(column.detach().cpu().reshape(self.n, -1).tolist()) for column in columns]
        return torch.tensor(_numbered(list(zip(self.prompts or [""] * self.n, *numbers))))

    def repeat(self, k: int) -> Self:
        """Every row ``k`` times, one after the other."""
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
    """A condition (n,) of whole numbers is one of labels; others hold none."""
    return cond if isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point() else None


def _numbered(values: Sequence[Any]) -> list[int]:
    """A number for each value, the same for equal ones, in the order of their first."""
    seen: dict[str, int] = {}
    return [seen.setdefault(repr(value), len(seen)) for value in values]
