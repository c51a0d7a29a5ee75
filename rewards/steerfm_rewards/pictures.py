"""Read picture files as tensors: any mode and depth that PIL reads, with transparency and orientation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from steerfm.rewards import RewardError

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601), as in PIL."""


def read_picture(
    source: str | Path | Tensor,
    what: str,
    grey: bool = False,
    size: int | Sequence[int] | None = None,
    ground: float | None = None,
) -> Tensor:
    """Read a picture as float32 (c, h, w) in [0, 1]. Grey files have one channel, others three.

    Files are rotated by their EXIF orientation. 16-bit files keep their depth, and floating-point files must be in [0, 1].

    Args:
        source: path to an image file, or a tensor (c, h, w) or (h, w), which is neither resized nor composited.
        what: name of the argument, for messages.
        grey: whether to convert colour files to grey.
        size: side in pixels to resize a file to, by area averages, or (height, width); None for its own size.
        ground: value behind transparent pixels, in [0, 1]; None for white behind colours and black behind grey.

    Raises:
        RewardError: the file does not exist or is not an image, its shape or range is wrong, or ``size`` has other proportions.
    """
    if not isinstance(source, str | Path):
        picture = torch.as_tensor(source).detach().float()
        return _in_range(picture.unsqueeze(0) if picture.ndim == 2 else picture, what)
    if ground is not None and not 0 <= ground <= 1:
        raise RewardError(f"reward 'target_image' has ground={ground}: give a number from 0 (black) to 1 (white)")
    try:
        with Image.open(source) as file:
            picture = _channels(ImageOps.exif_transpose(file))
    except RewardError:
        raise
    except Exception as error:  # a broken file can raise anything in PIL's decoders
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RewardError(f"reward 'target_image' cannot read its {what} {str(source)!r}: {reason}") from None
    c = len(picture) - 1 + len(picture) % 2  # with 2 or 4 channels, the last one is transparency
    if c < len(picture):
        behind = (1.0 if c == 3 else 0.0) if ground is None else ground
        alpha = picture[c:]
        picture = alpha * picture[:c] + (1 - alpha) * behind
    if grey and c == 3:
        picture = (picture * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return _resize(_in_range(picture, what), size, what)


def _channels(file: Image.Image) -> Tensor:
    """Return grey or colour, with alpha if present: (1 to 4, h, w) float32; 8 and 16 bits are scaled to [0, 1]."""
    clear = file.info.get("transparency")
    if file.mode.startswith("I") or file.mode == "F":
        pixels = np.asarray(file).astype(np.float64)
        if file.mode != "F" and not (pixels.min() >= 0 and pixels.max() <= 65535):
            raise RewardError(f"values from {pixels.min():g} to {pixels.max():g}: more than 16 bits, of unknown scale")
        values = pixels if file.mode == "F" else pixels / 65535
        planes = [values] if clear is None else [values, (pixels != clear).astype(np.float64)]
        return torch.from_numpy(np.stack(planes)).float()
    greys, alpha = ("1", "L", "LA", "La"), ("LA", "La", "PA", "RGBA", "RGBa")
    mode = "L" if file.mode in greys else "RGB"
    if file.mode in alpha or clear is not None:
        mode += "A"
    whole = file
    if file.mode == "1":  # PIL would take its transparent value for one of 256 levels
        whole = file.convert("L")
        if clear is not None:
            whole.info["transparency"] = 255 * bool(clear)
    pixels = np.atleast_3d(np.asarray(whole if whole.mode == mode else whole.convert(mode)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _in_range(picture: Tensor, what: str) -> Tensor:
    if picture.ndim != 3 or not picture.numel() or not (picture.min() >= 0 and picture.max() <= 1):
        values = f" in [{picture.min():.3g}, {picture.max():.3g}]" if picture.numel() else ""
        raise RewardError(f"reward 'target_image' takes a {what} (c, h, w) in [0, 1], got {tuple(picture.shape)}{values}")
    return picture


def _resize(picture: Tensor, size: int | Sequence[int] | None, what: str) -> Tensor:
    if size is None:
        return picture
    height, width = (size, size) if isinstance(size, int) else size
    h, w = picture.shape[-2:]
    if min(height, width) < 1 or abs(h * width - w * height) > max(h, w):  # off by more than a pixel
        raise RewardError(
            f"reward 'target_image' has size={size} for a {what} of {h} x {w}: cut the file to these proportions first"
        )
    if (h, w) == (height, width):
        return picture
    return F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
