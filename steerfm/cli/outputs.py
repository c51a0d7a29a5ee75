"""Labels, prompts and seeds of the outputs of a run, one row each."""

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
    """The condition, labels and prompts of the outputs of a run, one row each.

    Attributes:
        names: n texts, the prompt or class of each output.
        each: number of outputs per prompt. The outputs of a prompt are consecutive rows.
    """

    names: tuple[str, ...] = ()
    each: int = 1

    def __getitem__(self, rows: slice | Tensor) -> Outputs:
        indices = range(self.n)[rows] if isinstance(rows, slice) else rows.tolist()
        return replace(super().__getitem__(rows), names=tuple(self.names[row] for row in indices))

    def seeds(self, seeds: int | list[int]) -> list[int]:
        """Return a seed for each output.

        Args:
            seeds: a list as for `broadcast`, or the first seed of each prompt's outputs, the same for all prompts.

        Raises:
            ConfigError: see `spread`.
        """
        return self.broadcast("seeds", list(range(seeds, seeds + self.each)) if isinstance(seeds, int) else seeds)

    def strengths(self, strength: float | list[float] | Literal["auto"]) -> float | list[float] | Literal["auto"]:
        """One strength for all outputs, or a list of one for each.

        Raises:
            ConfigError: see `spread`.
        """
        return self.broadcast("strengths", strength) if isinstance(strength, list) else strength

    def broadcast(self, what: str, values: list[Number]) -> list[Number]:
        """Return one value for each output.

        Args:
            what: name of the values, for the error message.
            values: one for each output, or one for each output of a prompt, the same for all prompts.

        Raises:
            ConfigError: the number of values is neither.
        """
        if len(values) not in (self.each, self.n):
            of = "outputs" if self.each == self.n else f"outputs of each of {self.n // self.each} prompts"
            raise ConfigError(f"{len(values)} {what} for n={self.each} {of}: give one number, or one per output")
        return values * (self.n // len(values))


def outputs_of(
    flow_map: FlowMap, label: str | list[str] | None, prompt: Any, n: int, reward: Reward | None = None, negative: Any = None
) -> Outputs:
    """Build the outputs of a run.

    A text-conditional map is conditioned on the prompts. Any other map is conditioned on the label; if there is none and the
    reward reads labels, on all classes in turn.

    Args:
        flow_map: the model.
        label: class by name or index, or a list with one for each output.
        prompt: prompts, or a file of them, as for `read_prompts`.
        n: number of outputs per prompt.
        reward: the reward, if any.
        negative: class or text that guidance leads away from.

    Raises:
        ConfigError: n is below 1, the prompt file cannot be read, or a text-conditional map got a label.
        ValueError: a negative for a map without guidance.
    """
    if n < 1:
        raise ConfigError(f"n={n}: at least one output is needed")
    texts = [text for text in read_prompts(prompt) for _ in range(n)]
    reads = isinstance(flow_map.null, Mapping)
    if reads and label is not None:
        raise ConfigError(f"label={label}: this model takes a prompt: prompt={label!r}")
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
