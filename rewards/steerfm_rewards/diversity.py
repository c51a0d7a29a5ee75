"""How much a picture differs from the other particles of its output: a reward that sees all particles."""

from __future__ import annotations

import torch
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError
from steerfm_rewards.checks import check_pictures


class Diversity(Reward):
    """Distance to the other pictures of its group (the particles of one output): 1 - mean cosine of their features.

    Unit: cosine distance, from 0 (all alike) to 2. Gradient: yes. The reward of a picture depends on the other particles, so it
    is not a fixed function of the picture. With it, no method samples a tilted density: all of them search or ascend. Add it
    with a small weight to a reward of the picture itself.

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
        """images (b, c, h, w) and groups (b,) int, None for one group -> (b,); 0 for a picture that is alone in its group."""
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
