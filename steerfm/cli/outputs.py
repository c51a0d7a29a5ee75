"""What outputs are asked for: labels, prompts and seeds, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from steerfm.cli.prompts import read_prompts
from steerfm.flowmap import FlowMap
from steerfm.rewards import Reward
from steerfm.rows import Rows
from steerfm.sampling import add_negative
from steerfm.values import ConfigError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, eq=False)
class Outputs(Rows):
    """What the outputs of a run are asked for, one row each.

    Attributes:
        names: n texts to write beside each.
        each: outputs of one prompt, one after the other.
    """

    names: tuple[str, ...] = ()
    each: int = 1

    def __getitem__(self, rows: slice | Tensor) -> Outputs:
        chosen = range(self.n)[rows] if isinstance(rows, slice) else rows.tolist()
        return replace(super().__getitem__(rows), names=tuple(self.names[row] for row in chosen))

    def seeds(self, seeds: int | list[int]) -> list[int]:
        """A seed for each output; a number is the first of those of a prompt, which every prompt has.

        Raises:
            ConfigError: see `spread`.
        """
        return self.spread("seeds", list(range(seeds, seeds + self.each)) if isinstance(seeds, int) else seeds)

    def strengths(self, strength: float | list[float] | Literal["auto"]) -> float | list[float] | Literal["auto"]:
        """One strength for all outputs, or a list of one for each.

        Raises:
            ConfigError: see `spread`.
        """
        return self.spread("strengths", strength) if isinstance(strength, list) else strength

    def spread(self, what: str, values: list[Number]) -> list[Number]:
        """Values, one for each output: as many as there are, or those of a prompt, which every prompt has.

        Args:
            what: they are called, for the message.

        Raises:
            ConfigError: another number of them.
        """
        if len(values) not in (self.each, self.n):
            of = "outputs" if self.each == self.n else f"outputs of each of {self.n // self.each} prompts"
            raise ConfigError(f"{len(values)} {what} for n={self.each} {of}: give one number, or one per output")
        return values * (self.n // len(values))


def outputs_of(
    flow_map: FlowMap, label: str | list[str] | None, prompt: Any, n: int, reward: Reward | None = None, negative: Any = None
) -> Outputs:
    """``n`` outputs of each prompt, where there are several; a map of texts is conditioned on them, others on the label, or on
    all classes in turn where a reward reads labels and none is given.

    Raises:
        ConfigError: n below 1; a file of prompts that cannot be read; a label for a map of texts.
        ValueError: a negative for a map without guidance.
    """
    if n < 1:
        raise ConfigError(f"n={n}: at least one output is needed")
    texts = [text for text in read_prompts(prompt) for _ in range(n)]
    reads = isinstance(flow_map.null, Mapping)
    if reads and label is not None:
        raise ConfigError(f"label={label}: this model is asked in words: prompt={label!r}")
    if reads:
        cond = add_negative(flow_map, flow_map.condition(texts, len(texts)) if texts else None, negative, len(texts) or n)
        return Outputs(len(texts) or n, cond, None, texts or None, names=tuple(texts or [""] * n), each=n)
    total = len(texts) or n
    names = flow_map.class_names
    turns = label is None and reward is not None and "labels" in reward.needs and names
    labels = flow_map.condition([names[i % len(names)] for i in range(total)] if turns else label, total)
    assert labels is None or isinstance(labels, Tensor)
    names = texts or ([""] * n if labels is None else [flow_map.class_names[i] for i in labels.tolist()])
    return Outputs(total, add_negative(flow_map, labels, negative, total), labels, texts or None, names=tuple(names), each=n)
