"""Inverse problems: the likelihood of a measurement y = A x + noise, with which steering samples p(x | y)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from steerfm.randomness import stream
from steerfm.rewards import Prompts, Reward, RewardError, check_arguments
from steerfm_rewards.checks import check_pictures
from steerfm_rewards.pictures import read_picture


# --- operators: linear; pictures (b, c, h, w) and arguments to measurements (b, ...) ----------------------------------
def identity(images: Tensor) -> Tensor:
    """Every pixel: denoising. (b, c, h, w) -> (b, c, h, w)."""
    return images


def inpaint(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Only the known pixels. (b, c, h, w) -> (b, known values).

    Args:
        mask: (h, w), (1, h, w) or (c, h, w), above 1/2 where a pixel is known; by default all but a centre box of half the
            height and width.

    Raises:
        RewardError: a mask of another size, or without a known pixel.
    """
    c, h, w = images.shape[1:]
    if mask is None:
        mask = torch.ones(h, w)
        mask[h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
    if mask.shape[-2:] != (h, w) or mask.shape[:-2] not in ((), (1,), (c,)):
        raise RewardError(f"reward 'target_image' has a mask of {tuple(mask.shape)} for pictures of {(c, h, w)}: fit the mask")
    visible = (mask > 0.5).to(images.device).expand(c, h, w)
    if not bool(visible.any()):
        raise RewardError("reward 'target_image' has a mask without a known pixel: 1 is known, 0 is to be filled in")
    return images[:, visible]


def downsample(images: Tensor, factor: int = 2) -> Tensor:
    """Means of factor x factor blocks: super-resolution. (b, c, h, w) -> (b, c, h/factor, w/factor).

    Raises:
        RewardError: a factor that does not divide height and width.
    """
    h, w = images.shape[-2:]
    if not isinstance(factor, int) or factor < 1 or h % factor or w % factor:
        raise RewardError(f"reward 'target_image' has factor={factor!r}: give a whole number that divides {h} and {w}")
    return F.avg_pool2d(images, factor)


def blur(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian blur, truncated at three standard deviations, edges repeated: deblurring. (b, c, h, w) -> (b, c, h, w).

    Args:
        sigma: standard deviation in pixels.

    Raises:
        RewardError: a sigma that is not positive.
    """
    if not 0 < sigma < float("inf"):
        raise RewardError(f"reward 'target_image' has sigma={sigma!r}: give a positive number of pixels")
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma) ** 2, 0)
    single = images.flatten(0, 1).unsqueeze(1)  # each channel separately
    single = F.pad(single, (radius,) * 4, mode="replicate")
    single = F.conv2d(F.conv2d(single, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return single.view_as(images)


Operator = Callable[..., Tensor]
OPERATORS: dict[str, Operator] = {"identity": identity, "inpaint": inpaint, "downsample": downsample, "blur": blur}
"""Measurement operators by name."""


# --- the reward ------------------------------------------------------------------------------------------------------
class TargetImage(Reward):
    """Gaussian log-likelihood of a measurement y = A x + noise of an unknown picture x, in [0, 1] picture space:

        r(x) = -|y - A x|^2 / (2 noise^2),    summed over the m measured values

    The constant -m/2 log(2 pi noise^2) is left out, so the reward is 0 if the picture explains y exactly. With ``strength=1``
    the steered distribution is the posterior p(x | y).

    Unit: nats, up to 0. Gradient: yes, exact. Any channels and size that fit the target.

    Args:
        target: path to an image file (see `read_picture`), or a tensor (c, h, w) or (h, w) in [0, 1].
        operator: A: identity, inpaint, downsample, blur, or your own function (b, c, h, w) -> (b, ...).
        noise: standard deviation of the noise, in pixel values.
        mask: for inpaint: path or tensor, 1 where a pixel is known; by default all but a centre box.
        factor: for downsample, by default 2.
        sigma: for blur, in pixels, by default 1.
        measured: whether the target is y itself. Otherwise it is a full picture, the ``truth``, and y is computed from it.
        seed: seed of the noise added to a computed y; None for no noise.
        size: side in pixels to resize a file to, or [height, width]; None for its own size.
        ground: value behind the transparent pixels of a file, from 0 (black) to 1 (white); None for white behind colours and
            black behind grey, like the training pictures of the shipped models.

    >>> steerfm.reward("target_image", target="bag.png", operator="downsample", factor=4, noise=0.05)
    """

    name, unit, range = "target_image", "log-likelihood (nats)", (-float("inf"), 0.0)
    y: Tensor
    mask: Tensor | None

    def __init__(
        self,
        target: str | Path | Tensor,
        operator: str | Operator = "identity",
        *,
        noise: float = 0.1,
        mask: str | Path | Tensor | None = None,
        factor: int | None = None,
        sigma: float | None = None,
        measured: bool = False,
        seed: int | None = None,
        size: int | Sequence[int] | None = None,
        ground: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < noise < float("inf"):
            raise RewardError(f"reward 'target_image' has noise={noise!r}: give a positive standard deviation")
        if isinstance(operator, str) and operator not in OPERATORS:
            raise RewardError(f"reward 'target_image' has no operator {operator!r}; operators: {', '.join(OPERATORS)}")
        self.operator = OPERATORS[operator] if isinstance(operator, str) else operator
        self.noise, self.factor, self.sigma = float(noise), factor, sigma
        self.register_buffer("mask", None if mask is None else read_picture(mask, "mask", grey=True, size=size, ground=0.0))
        parameters = dict(list(inspect.signature(self.operator).parameters.items())[1:])
        check_arguments(f"target_image operator={getattr(self.operator, '__name__', operator)}", parameters, self.arguments)
        y = read_picture(target, "target", size=size, ground=ground).unsqueeze(0)
        if not measured:
            self.truth = y[0]
            y = self.operator(y, **self.arguments)
            if seed is not None:
                y = y + self.noise * torch.randn(y.shape, generator=stream(seed, "measurement"))
        self.register_buffer("y", y)

    @property
    def arguments(self) -> dict[str, Tensor | float]:
        """Arguments of the operator that are not None."""
        arguments = {"mask": self.mask, "factor": self.factor, "sigma": self.sigma}
        return {key: value for key, value in arguments.items() if value is not None}

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) -> (b,)."""
        check_pictures(self.name, images)
        if self.y.device != images.device:
            self.to(images.device)
        ax = self.operator(images, **self.arguments)
        if ax.shape[1:] != self.y.shape[1:]:
            raise RewardError(
                f"reward 'target_image' measures {tuple(ax.shape[1:])} in pictures of {tuple(images.shape[1:])}, "
                f"but its target has {tuple(self.y.shape[1:])}: give a target of the model's shape, or size="
            )
        return -(self.y - ax).square().flatten(1).sum(1) / (2 * self.noise**2)
