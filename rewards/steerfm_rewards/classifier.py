"""Log-probability of a class under a shipped classifier, and under a held-out one for judging."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from steerfm.flowmap import label_index
from steerfm.rewards import Prompts, Reward, RewardError
from steerfm.zoo import load_classifier
from steerfm_rewards.checks import check_pictures


class Classifier(Reward):
    """Log-probability of a class: log p(class | picture), by a small residual network trained on Fashion-MNIST.

    Unit: nats, up to 0 (certain). Gradient: yes, through the network. Pictures: 28 x 28, grey, like the training data.

    Args:
        target: class by name (any case) or index; None for the label of each picture.
        model: a classifier of the zoo, or a path to your own.

    >>> steerfm.reward("classifier", target="Bag")
    """

    name, unit, range = "classifier", "log-probability (nats)", (-float("inf"), 0.0)

    def __init__(self, target: str | int | None = None, model: str | Path = "fashion-classifier") -> None:
        super().__init__()
        self.network, self.class_names, self.shape = load_classifier(model)
        self.target = None if target is None else label_index(target, self.class_names)
        if target is None:
            self.needs = frozenset({"labels"})

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) and, without a target, labels (b,) -> (b,)."""
        check_pictures(self.name, images)
        if images.shape[1:] != self.shape:
            c, h, w = self.shape
            raise RewardError(
                f"reward {self.name!r} takes pictures of {c} x {h} x {w} (channels, height, width), "
                f"got {tuple(images.shape[1:])}: use a model of such pictures, or model= for another classifier"
            )
        weight = next(self.network.parameters())
        if weight.device != images.device:
            self.network.to(images.device)
        log_p = self.network(images.to(weight.dtype)).log_softmax(1)
        if self.target is not None:
            return log_p[:, self.target]
        assert labels is not None  # self.needs
        labels = labels.to(images.device)
        if not bool(((labels >= 0) & (labels < log_p.shape[1])).all()):
            raise RewardError(
                f"reward {self.name!r} got a label outside 0..{log_p.shape[1] - 1}: condition on a class, or pass target="
            )
        return log_p.gather(1, labels.long().unsqueeze(1)).squeeze(1)


class Judge(Classifier):
    """Log-probability of a class under a held-out classifier: another architecture, seed and augmentation.

    Use it only to judge pictures that were optimised for another reward. If you optimise it too, nothing can distinguish a
    better picture from a fooled classifier. Unit, range, gradient and pictures as for `Classifier`.

    Args:
        target: class by name (any case) or index; None for the label of each picture.
        model: a classifier of the zoo, or a path to your own.

    >>> steerfm.reward("judge", target="Bag")
    """

    name = "judge"

    def __init__(self, target: str | int | None = None, model: str | Path = "fashion-judge") -> None:
        super().__init__(target, model)
