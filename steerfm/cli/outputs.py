"""What outputs are asked for: labels, prompts and seeds, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerfm.cli.prompts import read_prompts
from steerfm.flowmap import Condition, FlowMap, take_rows
from steerfm.rewards import Reward
from steerfm.values import ConfigError


@dataclass
class Outputs:
    """What the outputs of a run are asked for, one row each.

    Attributes:
        cond: condition of the map. labels: (n,), or None. prompts: n texts, or None. names: what to write beside each.
        each: outputs of one prompt, one after the other.
    """

    cond: Condition
    labels: Tensor | None
    prompts: list[str] | None
    names: list[str]
    each: int

    @property
    def n(self) -> int:
        return len(self.names)

    def seeds(self, first: int) -> list[int]:
        """A seed for each output: the same ones for every prompt."""
        return [first + i % self.each for i in range(self.n)]

    def take(self, rows: slice) -> Outputs:
        """Some of the rows."""
        labels = None if self.labels is None else self.labels[rows]
        prompts = None if self.prompts is None else self.prompts[rows]
        return Outputs(take_rows(self.cond, rows), labels, prompts, self.names[rows], self.each)


def outputs_of(flow_map: FlowMap, label: str | None, prompt: Any, n: int, reward: Reward | None = None) -> Outputs:
    """``n`` outputs of each prompt, where there are several; a map of texts is conditioned on them, others on the label, or on
    all classes in turn where a reward reads labels and none is given.

    Raises:
        ConfigError: n below 1; a file of prompts that cannot be read; a label for a map of texts.
    """
    if n < 1:
        raise ConfigError(f"n={n}: at least one output is needed")
    texts = [text for text in read_prompts(prompt) for _ in range(n)]
    reads = isinstance(flow_map.null, Mapping)
    if reads and label is not None:
        raise ConfigError(f"label={label}: this model is asked in words: prompt={label!r}")
    if reads:
        return Outputs(flow_map.condition(texts, len(texts)) if texts else None, None, texts or None, texts or [""] * n, n)
    total = len(texts) or n
    names = flow_map.class_names
    turns = label is None and reward is not None and "labels" in reward.needs and names
    labels = flow_map.condition([names[i % len(names)] for i in range(total)] if turns else label, total)
    assert labels is None or isinstance(labels, Tensor)
    names = texts or ([""] * n if labels is None else [flow_map.class_names[i] for i in labels.tolist()])
    return Outputs(labels, labels, texts or None, names, n)
