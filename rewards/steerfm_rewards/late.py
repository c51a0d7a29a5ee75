"""Rewards with large networks, loaded on the first call, once per process, and moved to the device of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.rewards import Prompts, Reward, RewardError
from steerfm.scores import Scores
from steerfm_rewards.checks import check_pictures


class LateReward(Reward):
    """A reward whose network is not a submodule: all rewards of a process that use the same network share it.

    Attributes:
        offloads: whether to move the network to the CPU after each call without a gradient. The backward pass of a call with a
            gradient still needs it.
    """

    offloads = False

    def raw_scores(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Scores:
        scores = super().raw_scores(images, prompts, labels, groups, latents)
        if self.offloads and not scores.total.requires_grad:
            self.offload()
        return scores

    def load(self) -> nn.Module:
        """Return the network, from a cache after the first call. Subclasses implement this.

        Raises:
            ImportError: a package is missing. The message says what to install.
            ValueError: the weights are corrupt.
            FileNotFoundError: a file is missing. The message says where to put it.
        """
        raise NotImplementedError(f"reward {self.name!r} does not define load()")

    def network(self, device: torch.device | str = "cpu") -> Any:
        """Return the network, on a device.

        Raises:
            RewardError: the network cannot be loaded.
        """
        with torch.inference_mode(False):  # later calls may need gradients, even if the first one does not
            try:
                network = self.load()
            except (ImportError, ValueError, FileNotFoundError) as error:
                raise RewardError(f"reward {self.name!r}: {error}") from None
            if next(network.parameters()).device != torch.device(device):
                network.to(device)
        return network

    def late_networks(self) -> Sequence[nn.Module]:
        return [self.network()]

    def offload(self) -> None:
        """Move the network to the CPU, to free accelerator memory between calls; the next call moves it back."""
        self.network("cpu")


@lru_cache(maxsize=4096)
def _embedding(network: Any, prompt: str) -> Tensor:
    """Return the embedding (d,) of a prompt, on the CPU, from a cache shared by all particles and steps.

    It is computed in full precision and without a graph, because the cache serves calls under any autocast.
    """
    device = next(network.parameters()).device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return network.encode_text([prompt])[0].float().cpu()


class WordsReward(LateReward):
    """A reward whose network embeds pictures and texts in one space, as unit vectors: ``encode_image``, ``encode_text``.

    Attributes:
        prompt: prompt of all pictures; None for each picture's own prompt.
    """

    prompt: str | None = None

    def ask(self, prompt: str | None) -> None:
        """Set the prompt of all pictures; with None, the reward needs prompts."""
        self.prompt = prompt
        self.needs = frozenset({"prompts"} if prompt is None else ())

    def image(self, images: Tensor) -> Tensor:
        """Embed pictures (b, 1 or 3, h, w) in [0, 1] as unit vectors (b, d).

        Raises:
            RewardError: the images are vectors or have other channels, or the network cannot be loaded.
        """
        check_pictures(self.name, images)
        network = self.network(images.device)
        try:
            return network.encode_image(images)
        except ValueError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from None

    def text(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """Embed n prompts as unit vectors (n, d), with the device and dtype of ``like``. Each is encoded once per process."""
        network = self.network(like.device)
        return torch.stack([_embedding(network, prompt) for prompt in prompts]).to(like)

    def likeness(self, image: Tensor, prompts: Prompts) -> Tensor:
        """Cosine (b,) of each picture's embedding and its prompt's, or that of the common prompt."""
        return (image * self.text(list(prompts or ()) if self.prompt is None else [self.prompt], image)).sum(1)
