"""Text recognition: how much of a text can be read in a picture. A black box, with PaddleOCR's networks."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError
from steerfm_rewards.checks import check_pictures


@lru_cache(maxsize=1)
def _reader() -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR  # type: ignore[import-not-found]
    except ImportError:
        raise RewardError("reward 'ocr' needs a package: pip install rapidocr-onnxruntime") from None
    return RapidOCR()


class Ocr(Reward):
    """Similarity of the text in a picture and a given text, ignoring case and spaces.

    Unit: share of matching characters, from 0 to 1 (2 x matches / lengths). Gradient: none, it is a black box.
    It takes a quarter of a second per picture. Pictures: 1 or 3 channels, with letters of 16 pixels or more. Weights: the
    package rapidocr-onnxruntime.

    Args:
        text: text that the picture should show.

    >>> steerfm.reward("ocr", text="HELLO")
    """

    name, unit, range = "ocr", "share of characters", (0.0, 1.0)
    differentiable = False

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = _plain(text)
        if not self.text:
            raise RewardError("reward 'ocr' has no text to read: give text='HELLO'")

    def late_networks(self) -> Sequence[str]:
        return ["rapidocr-onnxruntime"]

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) -> (b,)."""
        check_pictures(self.name, images)
        if images.shape[1] not in (1, 3):
            raise RewardError(f"reward 'ocr' takes 1 or 3 channels, got {images.shape[1]}")
        rgb = images.detach().clamp(0, 1).expand(-1, 3, -1, -1)
        pixels = (rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self._likeness(picture[..., ::-1]) for picture in pixels], device=images.device)

    def _likeness(self, picture: Any) -> float:
        lines, _ = _reader()(picture)
        letters = _plain("".join(line[1] for line in lines or ()))
        return SequenceMatcher(None, self.text, letters, autojunk=False).ratio()


def _plain(text: str) -> str:
    return "".join(text.lower().split())
