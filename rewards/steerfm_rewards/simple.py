"""Rewards of one line of arithmetic: exact, smooth and without weights."""

from __future__ import annotations

import math

from torch import Tensor

from steerfm.rewards import Prompts, Reward
from steerfm_rewards.checks import check_pictures


class Brightness(Reward):
    """Mean pixel value over all channels and positions.

    Unit: fraction of full white, from 0 (black) to 1. Gradient: yes, the same for every pixel. Any channels and size.

    >>> steerfm.reward("brightness")
    """

    name, unit, range = "brightness", "mean pixel value", (0.0, 1.0)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) -> (b,)."""
        check_pictures(self.name, images)
        return images.mean((1, 2, 3))


class Symmetry(Reward):
    """Left-right symmetry: minus the mean squared difference between a picture and its mirror image.

    Unit: squared pixel values, from -1 to 0 (equal to its mirror image). Gradient: yes, smooth. Any channels and size.

    >>> steerfm.reward("symmetry")
    """

    name, unit, range = "symmetry", "minus mean squared mirror difference", (-1.0, 0.0)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) -> (b,)."""
        check_pictures(self.name, images)
        return -(images - images.flip(-1)).square().mean((1, 2, 3))


class Sharpness(Reward):
    """Log of the mean squared gradient: sharp edges and texture high, blur low.

        log( mean over pixels and channels of (d/dx)^2 + (d/dy)^2  +  (1/255)^2 )

    with forward differences between neighbouring pixels. The floor is one grey level of an 8-bit picture: invisible
    differences do not count, and a constant picture has the finite value -11.08 and gradient zero.

    Unit: nats, +1 is e times the gradient energy; at most 0.69. Gradient: yes. Any channels and size.

    >>> steerfm.reward("sharpness")
    """

    floor = 1 / 255**2
    name, unit, range = "sharpness", "log gradient energy (nats)", (math.log(floor), math.log(2 + floor))

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) -> (b,)."""
        check_pictures(self.name, images)
        dx, dy = images.diff(dim=-1), images.diff(dim=-2)
        squares = dx.square().sum((1, 2, 3)) + dy.square().sum((1, 2, 3))  # a mean over no differences would be NaN
        return (squares / images[0].numel() + self.floor).log()
