"""Size as a JPEG file: the standard black-box reward."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError
from steerfm_rewards.checks import check_pictures


class Compressibility(Reward):
    """Minus the size of the picture as a JPEG file: high for smooth, plain pictures, low for detail and noise.

    Unit: kilobytes (1000 bytes), below 0; pictures are rounded to 8 bits. Gradient: none, it is a black box.
    One channel (grey) or three (RGB), any size. For incompressibility, use a negative weight.

    Args:
        quality: JPEG quality, 1 to 95 as in Pillow.

    >>> steerfm.reward("compressibility", quality=75)
    """

    name, unit, range = "compressibility", "minus JPEG kilobytes", (-float("inf"), 0.0)
    differentiable = False

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise RewardError(f"reward 'compressibility' has quality={quality!r}: give an integer from 1 to 95")
        self.quality = quality

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) -> (b,)."""
        check_pictures(self.name, images)
        c = images.shape[1]
        if c not in (1, 3):
            raise RewardError(f"reward 'compressibility' takes 1 or 3 channels, got {c}: a JPEG is grey or RGB")
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [self.jpeg_bytes(picture) for picture in (pixels[..., 0] if c == 1 else pixels)]
        return -torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000

    def jpeg_bytes(self, pixels: np.ndarray) -> int:
        """Length of the JPEG file of pixels (h, w) or (h, w, 3), uint8."""
        file = BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=self.quality)
        return file.tell()
