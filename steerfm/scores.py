"""Inputs and outputs of rewards, with their checks: pictures, video, vectors or states of the model; scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Prompts = Sequence[str] | None

PICTURES, VIDEO, MODEL = "pictures", "video", "model"
SPACES = {
    PICTURES: "float images (b, c, h, w) in [0, 1] or vectors (b, d)",
    VIDEO: "float video (b, c, f, h, w) in [0, 1]",
    MODEL: "float samples (b, ...) of the model's own space",
}
"""Inputs of rewards, by their ``space``."""
AXES = {PICTURES: (2, 4), VIDEO: (5,)}


class RewardError(ValueError):
    """A reward broke its contract; the message names the reward and the fix.

    Attributes:
        sample: number of the picture with the error; None if it is not about one.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample

    def __str__(self) -> str:
        return super().__str__() + ("" if self.sample is None else f" for sample {self.sample}")


@contextmanager
def counted_from(begin: int) -> Iterator[None]:
    """A context in which errors count pictures from ``begin`` on: the pictures are part of a larger batch."""
    try:
        yield
    except RewardError as error:
        error.sample = None if error.sample is None else error.sample + begin
        raise


@dataclass
class Scores:
    """The values of a reward.

    Attributes:
        total: (b,) float32, the value to optimise.
        components: raw value of every term, (b,) each, by name, without a graph.
    """

    total: Tensor
    components: dict[str, Tensor]

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Join the scores of consecutive pictures."""
        components = {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components}
        return cls(torch.cat([part.total for part in parts]), components)

    def __getitem__(self, rows: Tensor | slice) -> Scores:
        """The scores of some rows, without a graph."""
        return Scores(self.total[rows].detach(), {name: value[rows] for name, value in self.components.items()})


def check_samples(name: str, space: str, samples: Any) -> None:
    """Check the input of a reward.

    Args:
        name: of the reward, for the message.
        space: a key of `SPACES`.
        samples: the input.

    Raises:
        RewardError: not a float tensor, a wrong number of axes, pictures outside [0, 1], or numbers that are not finite.
    """
    if space not in SPACES:
        raise RewardError(f"reward {name!r} has space = {space!r}: it must be one of {', '.join(map(repr, SPACES))}")
    floats = isinstance(samples, Tensor) and samples.is_floating_point()
    if not floats or samples.ndim not in AXES.get(space, range(2, samples.ndim + 1)):
        got = f"{samples.dtype} {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise RewardError(f"reward {name!r} takes {SPACES[space]}, got {got}{_mend(space, samples.ndim if floats else 0)}")
    if samples.ndim >= 4 and space != MODEL:
        if len(samples):
            low, high = (float(bound) for bound in samples.detach().aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):
                what = "images" if space == PICTURES else "video"
                raise RewardError(f"reward {name!r} takes {what} in [0, 1], got [{low:.3g}, {high:.3g}]: use FlowMap.decode")
    elif not bool(torch.isfinite(samples.detach()).all()):
        row = int((~torch.isfinite(samples.detach())).flatten(1).any(1).nonzero()[0])
        what, fix = "samples" if space == MODEL else "vectors", "lower the strength, or guide less"
        raise RewardError(f"reward {name!r} takes finite {what}, but the samples are not finite ({fix})", sample=row)


def _mend(space: str, axes: int) -> str:
    if space == PICTURES and axes == 5:
        return ', a video: score its frames with reward=frames reward.reward=NAME, or set its space = "video" if it reads video'
    if space == VIDEO and axes == 4:
        return ", pictures: use it with a model of video"
    return ""


def check_finite(value: Tensor, what: str, begin: int) -> None:
    """Raise a RewardError with the number of the first value (b,) that is infinite or NaN."""
    finite = torch.isfinite(value.detach())
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise RewardError(f"{what} {value[row].item()}", sample=begin + row)


def as_numbers(value: Any) -> Any:
    """Convert a list or array of numbers to a tensor; a list of tensors keeps its graph. Other values stay unchanged."""
    if isinstance(value, list | tuple) and any(isinstance(number, Tensor) for number in value):
        numbers = [torch.as_tensor(number) for number in value]
        return torch.stack(numbers) if len({number.shape for number in numbers}) == 1 else value
    try:
        return torch.from_numpy(np.array(value, dtype=np.float64))
    except (ValueError, TypeError):
        return value
