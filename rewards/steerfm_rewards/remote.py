"""A reward on an HTTP server: pictures go there, scores come back. `examples/reward_server.py` is such a server."""

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
from steerfm_rewards.servers import Answer, Call, Server, addresses, ask, kind

LARGEST = torch.finfo(torch.float32).max


class Remote(Reward):
    """Scores from HTTP servers, for rewards that need their own environment or machine.

    The request is a POST of a safetensors file: ``images`` (b, c, h, w) uint8 (or float32 vectors), ``labels`` if present,
    and prompts as JSON in its metadata. The answer is JSON: {"scores": [b numbers]} or {"error": "why"}. While a server scores
    some particles, the network computes the next ones. Unit: the server's. Gradient: none, it is a black box.

    Args:
        url: address of the server, http or https, or a list of servers that give the same scores. Each free server takes a
            request; the requests of a server that is down go to the others. The address is written into the run folder, so it
            must not contain a secret.
        batch: pictures per request.
        timeout: seconds for the complete answer to a request, including all retries.
        retries: number of retries if the server cannot be reached, is busy, or breaks off its answer.
        pause: seconds before the first retry, doubled before each further one.
        token_env: environment variable that holds a token; its name starts with STEERFM_. The token is sent in the header
            Authorization as a Bearer token, only over https or to this machine, and is never stored.
        concurrent: simultaneous requests per server.

    >>> steerfm.reward("remote", url="http://localhost:8000")
    >>> steerfm.reward("remote", url=["https://a.example.org", "https://b.example.org"], token_env="STEERFM_TOKEN")
    """

    name, unit, range = "remote", "the server's", (-float("inf"), float("inf"))
    differentiable = False
    elsewhere = True
    one_process = True  # the server may be reachable from the first machine only
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
        """images (b, c, h, w) or (b, d) -> a function that waits for the scores (b,)."""
        x = images.detach().cpu()
        tensors = {"images": (x.clamp(0, 1) * 255).round().to(torch.uint8) if x.ndim == 4 else x.float()}
        if labels is not None:
            tensors["labels"] = labels.detach().cpu()
        body = save(
            {k: v.contiguous() for k, v in tensors.items()}, {"prompts": json.dumps(list(prompts) if prompts else None)}
        )
        n, device = len(x), images.device
        request = Call(lambda: self.ask(body, n))

        def wait() -> Tensor:
            return torch.tensor(_numbers(self.with_warnings(request.result()), n), dtype=torch.float32, device=device)

        return wait

    def ask(self, body: bytes, n: int) -> Answer:
        """Send a request about n pictures to the next free server, and return its answer."""
        return ask(self.servers, self.concurrent, body, n)

    def with_warnings(self, answer: Answer) -> Answer:
        """Return the answer, after a warning for each server that did not give one."""
        for error in answer.away:
            warnings.warn(f"{error}: its pictures go to {answer.server.place}", stacklevel=2)
        return answer

    def servers_at(self, change: Callable[[str], str]) -> list[Server]:
        """Return the servers, with their addresses changed."""
        return [replace(server, url=change(server.url)) for server in self.servers]


def _numbers(answer: Answer, n: int) -> list[float]:
    """Check an answer about n pictures, and return its numbers.

    Raises:
        RewardError: the answer is not n finite numbers.
    """
    server, content = answer.server, answer.content
    if not isinstance(content, dict):
        raise server.error(f'answered {kind(content)} in place of {{"scores": [...]}}')
    if content.get("error") is not None:
        raise server.error(f"answered: {server.excerpt(str(content['error']))}")
    scores = content.get("scores")
    if not isinstance(scores, list):
        what = f"{kind(scores)} as scores" if "scores" in content else "no scores"
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
    """Raise RewardError unless the value is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RewardError(f"reward {name!r}: {key}={value!r}: give a whole number of at least {least}")
