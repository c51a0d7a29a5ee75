"""How unlike the other pictures of its output a picture is: a reward that sees all particles."""

from __future__ import annotations

import torch
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError
from steerfm_rewards.checks import check_pictures


class Diversity(Reward):
    """Distance to the other pictures of its group (the particles of one output): 1 - mean cosine of their features.

    Unit: cosine distance, from 0 (all alike) to 2. Gradient: yes. It needs all particles at once, so it depends on the others
    and is not one fixed function of a picture: with it no method samples a tilt, all of them search or ascend. Take it with a
    small weight beside a reward of the picture itself.

    Args:
        features: "pixels" (centred), or an open_clip model as for the reward ``clip``.

    >>> steerfm.reward("clip") + 0.1 * steerfm.reward("diversity")
    """

    name, unit, range = "diversity", "1 - mean cosine", (0.0, 2.0)
    groupwise = True

    def __init__(self, features: str = "pixels") -> None:
        super().__init__()
        self.encoder = None
        if features != "pixels":
            from steerfm_rewards.clip import Clip

            self.encoder = Clip(prompt="", model=features)

    def score(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """images (b, c, h, w) and groups (b,) int, None for one group -> (b,); 0 for a picture that is alone."""
        check_pictures(self.name, images)
        b = len(images)
        same = torch.ones(b, b, dtype=torch.bool, device=images.device) if groups is None else groups[:, None] == groups[None]
        if len(same) != b:
            raise RewardError(f"reward 'diversity' got {len(same)} groups for {b} pictures")
        f = self.encoder.image(images) if self.encoder is not None else (images - images.mean((2, 3), keepdim=True)).flatten(1)
        f = f * (f.square().sum(1, keepdim=True) + 1e-8).rsqrt()  # finite for a constant picture, too
        others = same.fill_diagonal_(False).to(f.dtype)
        count = others.sum(1)
        return (1 - (f @ f.T * others).sum(1) / count.clamp_min(1)).clamp(0, 2) * (count > 0)
