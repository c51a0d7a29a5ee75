"""A reward of pictures, applied to the frames of a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError, build

OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.mean(1),
    "min": lambda values: values.amin(1),
    "max": lambda values: values.amax(1),
    "last": lambda values: values[:, -1],
}


class Frames(Reward):
    """A reward of pictures, applied to the frames of a video (b, c, f, h, w).

    Unit: that of the reward. Gradient: as the reward, to the frames that are scored.

    Args:
        reward: a reward of pictures, a name, or {name: ..., arguments, weight: ...}.
        over: how the frames' values are combined: mean, min, max, or last (only the last frame is scored).
        every: score every k-th frame, starting with the first.
        batch: frames per call of the reward; None for the reward's own number.

    >>> steerfm.reward("frames", reward={"name": "clip", "prompt": "a dog runs"}, every=4)
    """

    name, unit, range = "frames", "as its reward", (-float("inf"), float("inf"))
    space = "video"

    def __init__(self, reward: Any, over: str = "mean", every: int = 1, batch: int | None = None) -> None:
        super().__init__()
        if over not in OVER:
            raise RewardError(f"reward 'frames' has over={over!r}: give one of {', '.join(OVER)}")
        for key, value in {"every": every, "batch": batch}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RewardError(f"reward 'frames' has {key}={value!r}: give a whole number of at least 1")
        self.member, self.over, self.every = build(reward), over, every
        if self.member.spaces != {"pictures"}:
            what = "video already" if "video" in self.member.spaces else "the model's space"
            raise RewardError(f"reward 'frames' takes a reward of pictures, but {self.member.name!r} reads {what}")
        self.name = f"frames {self.member.name}"
        self.take_facts([self.member])
        self.space, self.batch_size = "video", None  # batches are of frames, not of videos
        self.batch = batch

    def score(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """images (b, c, f, h, w), and the group of each (b,) if the reward compares pictures -> (b,)."""
        selection = images[:, :, -1:] if self.over == "last" else images[:, :, :: self.every]
        b, f = len(images), selection.shape[2]
        if self.member.groupwise:  # compare frames of the same time
            moments = [self.member.raw_scores(selection[:, :, i], prompts, labels, groups).total for i in range(f)]
            return OVER[self.over](torch.stack(moments, 1))
        frames = selection.transpose(1, 2).flatten(0, 1)
        words = None if prompts is None else [prompt for prompt in prompts for _ in range(f)]
        classes = None if labels is None else labels.repeat_interleave(f)
        size, values = self.batch or max(1, b * f), []
        for begin in range(0, b * f, size):
            rows = slice(begin, begin + size)
            context = (None if words is None else words[rows], None if classes is None else classes[rows], None)
            try:
                values.append(self.member.raw_scores(frames[rows], *context).total)
            except RewardError as error:
                error.sample = None if error.sample is None else (error.sample + begin) // f
                raise
        return OVER[self.over](torch.cat(values).view(b, f))
