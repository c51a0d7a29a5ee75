"""Checks of the rewards in this package, beyond those of `steerfm.rewards`."""

from __future__ import annotations

from torch import Tensor

from steerfm.rewards import RewardError


def check_pictures(name: str, images: Tensor) -> None:
    """Check that the images are pictures (b, c, h, w), not vectors (b, d).

    Raises:
        RewardError: they have another shape.
    """
    if images.ndim != 4:
        raise RewardError(f"reward {name!r} takes pictures (b, c, h, w), got {tuple(images.shape)}: use a model of pictures")
