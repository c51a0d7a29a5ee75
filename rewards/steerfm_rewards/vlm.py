"""A vision-language model as a judge, over the HTTP protocol of OpenAI's chat completions, which vLLM and others serve."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from PIL import Image
from torch import Tensor

from steerfm.rewards import Prompts, RewardError
from steerfm_rewards.checks import check_pictures
from steerfm_rewards.remote import Remote, whole
from steerfm_rewards.servers import Answer, Server, kind

QUESTIONS = {
    "number": "From 0 (not at all) to 10 (perfectly), how well does this picture show: {prompt}? Answer with one number.",
    "yes": "Does this picture show: {prompt}? Answer yes or no.",
}
KNOWN = 100_000
"""Answers that a process remembers."""
_UNDERWAY: dict[bytes, Future[Answer]] = {}  # of a process, as the servers' lines are


class Vlm(Remote):
    """The opinion of a vision-language model: it is sent the picture and a question, and its answer is the score.

    The protocol is that of OpenAI's chat completions. Unit: the number that is answered, 0 to 10, or the probability of yes.
    Gradient: none, it is a black box. One request a picture, several at once; the same picture and question are asked once.

    Args:
        url: of the server, http://localhost:8000 or up to /v1, or a list of several; without a secret in it.
        model: the name that the server has for its model.
        question: with {prompt} where the prompt belongs; None for one that fits ``answer``.
        prompt: for all pictures; None for the prompt that each was asked for.
        answer: "number", the first number of the answer, or "yes", the probability of yes against no for the first token (from
            the server's logprobs).
        concurrent: requests at a time to each server.
        timeout: seconds for an answer, all its tries together.
        retries: further tries where the server cannot be reached, is busy or breaks its answer off.
        pause: seconds before the second try, doubled before each further one.
        token_env: environment variable that holds the key, STEERFM_ and more; it goes into the header Authorization, over https
            or to this machine only, and is written nowhere.
        tokens: most tokens of an answer.

    >>> steerfm.reward("vlm", url="http://localhost:8000", model="Qwen/Qwen2.5-VL-7B-Instruct", question="How sharp, 0 to 10?")
    """

    name, unit, range = "vlm", "0 to 10, or probability of yes", (0.0, 10.0)
    content = "application/json"

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        question: str | None = None,
        prompt: str | None = None,
        answer: str = "number",
        concurrent: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 0.5,
        token_env: str | None = None,
        tokens: int = 64,
    ) -> None:
        super().__init__(url, 64, timeout, retries, pause, token_env, concurrent)
        self.batch_size = None
        if answer not in QUESTIONS:
            raise RewardError(f"reward 'vlm' has answer={answer!r}: one of {', '.join(QUESTIONS)}")
        whole(self.name, "tokens", tokens, 1)
        for key, value in {"model": model, "question": question or QUESTIONS[answer]}.items():
            if not isinstance(value, str) or not value.strip():
                raise RewardError(f"reward 'vlm': {key}={value!r}: give a text")
        self.servers = self.moved(_completions)
        self.model, self.question, self.prompt = model, question or QUESTIONS[answer], prompt
        self.answer, self.tokens = answer, tokens
        self.known: OrderedDict[bytes, float] = OrderedDict()
        self.needs = frozenset({"prompts"} if "{prompt}" in self.question and prompt is None else ())

    def late_networks(self) -> Sequence[str]:
        return [f"{self.model} at {server.url}" for server in self.servers]

    def send(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Callable[[], Tensor]:
        """images (b, 1 or 3, h, w), and prompts where the question has a place for them -> what waits for (b,)."""
        check_pictures(self.name, images)
        if images.shape[1] not in (1, 3):
            raise RewardError(f"reward 'vlm': pictures have {images.shape[1]} channels: a model of pictures takes 1 or 3")
        levels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        words = [self.prompt] * len(images) if self.prompt is not None or prompts is None else prompts
        asked = [self._request(picture, self.question.replace("{prompt}", word or "")) for picture, word in zip(levels, words)]
        keys = [hashlib.sha256(self.servers[0].url.encode() + body).digest() for body in asked]
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self.known:
                first.setdefault(key, row)
        known: dict[bytes, float] = {key: self.known[key] for key in keys if key in self.known}
        pool, waiting = ThreadPoolExecutor(self.concurrent * len(self.servers)), {}
        for key, row in first.items():
            if (future := _UNDERWAY.get(key)) is None:  # what another part asks is not asked again
                _UNDERWAY[key] = future = pool.submit(self.ask, asked[row], 1)
                future.add_done_callback(lambda _, key=key: _UNDERWAY.pop(key, None))
            waiting[key] = future
        pool.shutdown(wait=False)
        device = images.device

        def wait() -> Tensor:
            try:
                for key, future in waiting.items():
                    known[key] = self.known[key] = self._read(future, first[key])
            finally:
                for future in waiting.values():
                    future.cancel()
            while len(self.known) > KNOWN:
                self.known.popitem(last=False)
            return torch.tensor([known[key] for key in keys], dtype=torch.float32, device=device)

        return wait

    def _request(self, picture: Tensor, question: str) -> bytes:
        """The body of a request: a picture (h, w, c) uint8 as a PNG, and a question."""
        file = io.BytesIO()
        Image.fromarray(picture.squeeze(2).numpy() if picture.shape[2] == 1 else picture.numpy()).save(file, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1 if self.answer == "yes" else self.tokens,
        }
        if self.answer == "yes":
            body |= {"logprobs": True, "top_logprobs": 20}
        return json.dumps(body).encode()

    def _read(self, future: Future[Answer], row: int) -> float:
        """The number in the answer about the picture of this row."""
        try:
            answer = self.told(future.result())
            server, told = answer.server, answer.said
            if isinstance(told, Mapping) and told.get("error") is not None:
                raise server.error(f"answered: {server.said(str(told['error']))}")
            try:
                choice = told["choices"][0]
                text = choice["message"]["content"]
            except (KeyError, IndexError, TypeError):
                raise server.error(f"answered {kind(told)} that is no chat completion: url= names another protocol") from None
            return _number(server, text) if self.answer == "number" else _yes(server, choice)
        except RewardError as error:
            error.sample = row
            raise


def _completions(url: str) -> str:
    """The address of chat completions, of a server or of its /v1."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if re.search(r"/v\d+$", path) else "/v1/chat/completions"
    return urlunsplit(parts._replace(path=path))


def _number(server: Server, text: Any) -> float:
    """The first number of an answer, after what it thinks aloud."""
    told = re.sub(r"(?s)^.*</think>", "", text) if isinstance(text, str) else ""
    found = re.search(r"(?<![\w.])[+-]?\d+(?:\.\d+)?", told)
    value = float(found[0]) if found else math.nan
    if not 0 <= value <= 10:
        raise server.error(f"answered {server.said(str(text))!r}, no number from 0 to 10: question= should ask for one")
    return value


def _yes(server: Server, choice: Mapping[str, Any]) -> float:
    """Probability of yes against no, from the first token's logprobs."""
    shares = {"yes": 0.0, "no": 0.0}
    try:
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            word = token["token"].strip(" \n\t.,!▁Ġ\"'").lower()
            if word in shares:
                shares[word] += math.exp(min(0.0, float(token["logprob"])))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise server.error("answered without logprobs: answer=number does without them") from None
    total = sum(shares.values())
    if not total > 0:
        said = server.said(str(choice["message"]["content"]))
        raise server.error(f"answered {said!r}, neither yes nor no: question= should ask for one of them")
    return shares["yes"] / total
