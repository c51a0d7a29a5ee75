"""Rewards with heavy networks: loaded on the first call, once a process, and moved to where the pictures are."""

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
    """A reward whose network is not one of its own submodules: all rewards of a process that name it share it.

    Attributes:
        offloads: whether the network goes to the CPU after each call without a gradient; one with a gradient needs it still.
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
        """The hook that authors write: the network, from a cache after the first call.

        Raises:
            ImportError, ValueError, FileNotFoundError: it cannot be had; the message says what to install or to put where.
        """
        raise NotImplementedError(f"reward {self.name!r} does not define load()")

    def network(self, device: torch.device | str = "cpu") -> Any:
        """The network, on a device.

        Raises:
            RewardError: it cannot be had.
        """
        with torch.inference_mode(False):  # the first call may be of a run without gradients, the next one of a run with them
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
        """Move the network to the CPU, to free an accelerator between calls; the next call moves it back."""
        self.network("cpu")


@lru_cache(maxsize=4096)
def _embedded(network: Any, prompt: str) -> Tensor:
    """One prompt's embedding (d,) on the CPU: the particles of an output share it, and so do steps.

    In full precision and without a graph: it is kept for calls under any autocast.
    """
    device = next(network.parameters()).device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return network.encode_text([prompt])[0].float().cpu()


class WordsReward(LateReward):
    """A reward whose network puts pictures and words into one space: ``encode_image`` and ``encode_text``, of length 1.

    Attributes:
        prompt: for all pictures; None for the prompt that each was asked for.
    """

    prompt: str | None = None

    def ask(self, prompt: str | None) -> None:
        """Set the prompt of all pictures; with None prompts are needed."""
        self.prompt = prompt
        self.needs = frozenset({"prompts"} if prompt is None else ())

    def image(self, images: Tensor) -> Tensor:
        """Pictures (b, 1 or 3, h, w) in [0, 1] to embeddings (b, d).

        Raises:
            RewardError: vectors, other channels, or a network that cannot be had.
        """
        check_pictures(self.name, images)
        network = self.network(images.device)
        try:
            return network.encode_image(images)
        except ValueError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from None

    def text(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """Embeddings (n, d), on the device and in the precision of others; each prompt is encoded once a process."""
        network = self.network(like.device)
        return torch.stack([_embedded(network, prompt) for prompt in prompts]).to(like)

    def likeness(self, image: Tensor, prompts: Prompts) -> Tensor:
        """Cosine (b,) of each picture's embedding and that of its prompt, or of the prompt of all."""
        return (image * self.text(list(prompts or ()) if self.prompt is None else [self.prompt], image)).sum(1)
