"""A reward that lives elsewhere: pictures go to an HTTP server, scores come back. `examples/reward_server.py` is a server."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError
from steerfm_rewards.servers import Answer, Server, Started, addresses, ask, kind

LARGEST = torch.finfo(torch.float32).max


class Remote(Reward):
    """The scores of HTTP servers, for rewards with an environment or a machine of their own.

    The request is a POST of a safetensors file: ``images`` (b, c, h, w) uint8 (or float32 vectors), ``labels`` where there are
    any, and prompts as JSON in its metadata. The answer is JSON: {"scores": [b numbers]} or {"error": "why"}. While a server
    scores some particles, the network goes on with the next ones. Unit: the server's. Gradient: none, it is a black box.

    Args:
        url: of the server, http or https, or several that give the same scores, a list: each takes a request when it is free,
            and what one that is away had goes to the others. Without a secret in it, since it is written into the run folder.
        batch: pictures a request.
        timeout: seconds for the whole answer to a request, all its tries together.
        retries: further tries where the server cannot be reached, is busy or breaks its answer off.
        pause: seconds before the second try, doubled before each further one.
        token_env: environment variable that holds a token, STEERFM_ and more; it goes into the header Authorization as a
            Bearer token, over https or to this machine only, and is written nowhere.
        concurrent: requests at a time to each server.

    >>> steerfm.reward("remote", url="http://localhost:8000")
    >>> steerfm.reward("remote", url=["https://a.example.org", "https://b.example.org"], token_env="STEERFM_TOKEN")
    """

    name, unit, range = "remote", "the server's", (-float("inf"), float("inf"))
    differentiable = False
    elsewhere = True
    one_process = True  # the server may be near the first machine only
    content = "application/octet-stream"

    def __init__(
        self,
        url: str | Sequence[str],
        batch: int = 64,
        timeout: float = 30.0,
        retries: int = 3,
        pause: float = 0.5,
        token_env: str | None = None,
        concurrent: int = 1,
    ) -> None:
        super().__init__()
        whole(self.name, "batch", batch, 1)
        whole(self.name, "retries", retries, 0)
        whole(self.name, "concurrent", concurrent, 1)
        for key, value in {"timeout": timeout, "pause": pause}.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise RewardError(f"reward {self.name!r}: {key}={value!r}: give seconds")
        if timeout == 0:
            raise RewardError(f"reward {self.name!r}: timeout=0: no server answers at once, give seconds")
        self.batch_size, self.concurrent = batch, concurrent
        self.servers = [
            Server(self.name, each, timeout, retries, pause, token_env, self.content) for each in addresses(self.name, url)
        ]

    def late_networks(self) -> Sequence[str]:
        return [server.url for server in self.servers]

    def send(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Callable[[], Tensor]:
        """images (b, c, h, w) or (b, d) -> what waits for (b,)."""
        x = images.detach().cpu()
        tensors = {"images": (x.clamp(0, 1) * 255).round().to(torch.uint8) if x.ndim == 4 else x.float()}
        if labels is not None:
            tensors["labels"] = labels.detach().cpu()
        body = save(
            {k: v.contiguous() for k, v in tensors.items()}, {"prompts": json.dumps(list(prompts) if prompts else None)}
        )
        n, device = len(x), images.device
        started = Started(lambda: self.ask(body, n))

        def wait() -> Tensor:
            return torch.tensor(_numbers(self.told(started.result()), n), dtype=torch.float32, device=device)

        return wait

    def ask(self, body: bytes, n: int) -> Answer:
        """What one of the servers says to a request about n pictures; waits until one is free."""
        return ask(self.servers, self.concurrent, body, n)

    def told(self, answer: Answer) -> Answer:
        """The same answer, with a warning of each server that gave none before."""
        for error in answer.away:
            warnings.warn(f"{error}: its pictures go to {answer.server.place}", stacklevel=2)
        return answer

    def moved(self, change: Callable[[str], str]) -> list[Server]:
        """Its servers, each with another address."""
        return [replace(server, url=change(server.url)) for server in self.servers]


def _numbers(answer: Answer, n: int) -> list[float]:
    """The numbers of an answer, checked."""
    server, said = answer.server, answer.said
    if not isinstance(said, dict):
        raise server.error(f'answered {kind(said)} in place of {{"scores": [...]}}')
    if said.get("error") is not None:
        raise server.error(f"answered: {server.said(str(said['error']))}")
    scores = said.get("scores")
    if not isinstance(scores, list):
        what = f"{kind(scores)} as scores" if "scores" in said else "no scores"
        raise server.error(f'answered with {what}, in place of {{"scores": [...]}}')
    if len(scores) != n:
        raise server.error(f"answered: {len(scores)} scores for {n} pictures")
    for row, value in enumerate(scores):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise server.error(f"answered with {kind(value)} as a score", row)
        if not abs(value) <= LARGEST:
            raise server.error(f"answered with {value if isinstance(value, float) else 'a number too large'} as a score", row)
    return [float(value) for value in scores]


def whole(name: str, key: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least ``least``, in the words of a reward of this name."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RewardError(f"reward {name!r}: {key}={value!r}: give a whole number of at least {least}")
