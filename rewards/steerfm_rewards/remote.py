"""A reward that lives elsewhere: pictures go to an HTTP server, scores come back. `examples/reward_server.py` is a server."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import torch
from safetensors.torch import save
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError


class Remote(Reward):
    """The scores of an HTTP server, for rewards with an environment or a machine of their own.

    The request is a POST of a safetensors file: ``images`` (b, c, h, w) uint8 (or float32 vectors), ``labels`` where there are
    any, and prompts as JSON in its metadata. The answer is JSON: {"scores": [b numbers]} or {"error": "why"}.
    Unit: the server's. Gradient: none, it is a black box.

    Args:
        url: of the server.
        batch: pictures a request. timeout: seconds a request. retries: further tries where the server cannot be reached or is
            busy, with doubling pauses from ``pause`` seconds.

    >>> steerfm.reward("remote", url="http://localhost:8000")
    """

    name, unit, range = "remote", "the server's", (-float("inf"), float("inf"))
    differentiable = False

    def __init__(self, url: str, batch: int = 64, timeout: float = 30.0, retries: int = 3, pause: float = 0.5) -> None:
        super().__init__()
        if not url.startswith(("http://", "https://")) or batch < 1 or timeout <= 0 or retries < 0:
            raise RewardError(
                f"reward 'remote': url={url!r}, batch={batch}, timeout={timeout}, retries={retries} cannot be used"
            )
        self.url, self.batch_size, self.timeout, self.retries, self.pause = url, batch, timeout, retries, pause

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) or (b, d) -> (b,)."""
        x = images.detach().cpu()
        tensors = {"images": (x.clamp(0, 1) * 255).round().to(torch.uint8) if x.ndim == 4 else x.float()}
        if labels is not None:
            tensors["labels"] = labels.detach().cpu()
        body = save(
            {k: v.contiguous() for k, v in tensors.items()}, {"prompts": json.dumps(list(prompts) if prompts else None)}
        )
        answer = self._ask(body)
        if "error" in answer or len(answer.get("scores", ())) != len(images):
            said = answer.get("error", f"{len(answer.get('scores', ()))} scores for {len(images)} pictures")
            raise RewardError(f"reward 'remote': {self.url} answered: {said}")
        return torch.tensor(answer["scores"], dtype=torch.float32, device=images.device)

    def _ask(self, body: bytes) -> dict:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/octet-stream"})
        for trial in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    answer = json.loads(reply.read())
                return answer if isinstance(answer, dict) else {"error": "not a JSON object"}
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:200]
                if error.code not in (429, 502, 503, 504):  # anything else will not change by asking again
                    raise RewardError(f"reward 'remote': {self.url} answered {error.code}: {said}") from None
                reason = f"{error.code} {said}"
            except ValueError as error:
                raise RewardError(f"reward 'remote': {self.url} did not answer in JSON: {error}") from None
            except OSError as error:  # refused, unknown host, timeout
                reason = str(getattr(error, "reason", error))
            if trial < self.retries:
                time.sleep(self.pause * 2**trial)
        raise RewardError(
            f"reward 'remote': {self.url} cannot be reached ({reason}) after {self.retries + 1} tries: is it running?"
        )
