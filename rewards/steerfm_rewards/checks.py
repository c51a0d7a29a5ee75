"""What the rewards of this package ask of their pictures, beyond `steerfm.rewards`."""

from __future__ import annotations

from torch import Tensor

from steerfm.rewards import RewardError


def check_pictures(name: str, images: Tensor) -> None:
    """Refuse vectors (b, d).

    Raises:
        RewardError: naming the shape.
    """
    if images.ndim != 4:
        raise RewardError(f"reward {name!r} takes pictures (b, c, h, w), got {tuple(images.shape)}: use a model of pictures")
