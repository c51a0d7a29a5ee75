"""A reward is a function that returns one number per picture; higher is better. Copy this file and edit the function.

steerfm steer label=Dress reward=examples/my_reward.py:striped strength=120
"""

import torch
from torch import Tensor


def striped(images: Tensor) -> Tensor:
    """Strength of horizontal stripes about four pixels apart: pictures (b, c, h, w) in [0, 1] to (b,), about 0 to 0.2."""
    columns = images.mean(1)  # (b, h, w)
    spectrum = torch.fft.rfft(columns, dim=1).abs() / columns.shape[1]
    high = spectrum[:, 6:9].sum(1)  # 6 to 8 periods in 28 pixels
    return high.mean(1)
