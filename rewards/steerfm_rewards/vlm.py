"""A vision-language model as a judge, over the protocol of OpenAI's chat completions, which vLLM and others serve."""

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
CACHE_SIZE = 100_000
"""Answers to cache per reward."""
_UNDERWAY: dict[bytes, Future[Answer]] = {}  # one per process, like the queues of the servers


class Vlm(Remote):
    """The answer of a vision-language model to a question about the picture.

    The protocol is that of OpenAI's chat completions. Unit: the number in the answer, 0 to 10, or the probability of yes.
    Gradient: none, it is a black box. One request per picture, several at once; repeated requests are answered from a cache.

    Args:
        url: address of the server, such as http://localhost:8000, with or without /v1, or a list of servers. It must not
            contain a secret.
        model: the server's name of the model.
        question: question to ask, with {prompt} as a placeholder for the prompt; None for a default that fits ``answer``.
        prompt: prompt of all pictures; None for each picture's own prompt.
        answer: "number" for the first number in the answer, or "yes" for the probability of yes against no as the first token,
            from the server's logprobs.
        concurrent: simultaneous requests per server.
        timeout: seconds for an answer, including all retries.
        retries: number of retries if the server cannot be reached, is busy, or breaks off its answer.
        pause: seconds before the first retry, doubled before each further one.
        token_env: environment variable that holds the key; its name starts with STEERFM_. The key is sent in the header
            Authorization, only over https or to this machine, and is never stored.
        tokens: largest number of tokens in an answer.

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
            raise RewardError(f"reward 'vlm' has answer={answer!r}: give one of {', '.join(QUESTIONS)}")
        whole(self.name, "tokens", tokens, 1)
        for key, value in {"model": model, "question": question or QUESTIONS[answer]}.items():
            if not isinstance(value, str) or not value.strip():
                raise RewardError(f"reward 'vlm': {key}={value!r}: give a text")
        self.servers = self.servers_at(_completions)
        self.model, self.question, self.prompt = model, question or QUESTIONS[answer], prompt
        self.answer, self.tokens = answer, tokens
        self.cache: OrderedDict[bytes, float] = OrderedDict()
        self.needs = frozenset({"prompts"} if "{prompt}" in self.question and prompt is None else ())

    def late_networks(self) -> Sequence[str]:
        return [f"{self.model} at {server.url}" for server in self.servers]

    def send(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Callable[[], Tensor]:
        """images (b, 1 or 3, h, w), and prompts if the question contains {prompt} -> a function that waits for (b,)."""
        check_pictures(self.name, images)
        if images.shape[1] not in (1, 3):
            raise RewardError(f"reward 'vlm': pictures have {images.shape[1]} channels: a model of pictures takes 1 or 3")
        levels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        words = [self.prompt] * len(images) if self.prompt is not None or prompts is None else prompts
        questions = [self.question.replace("{prompt}", word or "") for word in words]
        requests = [self._request(picture, question) for picture, question in zip(levels, questions)]
        keys = [hashlib.sha256(self.servers[0].url.encode() + body).digest() for body in requests]
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self.cache:
                first.setdefault(key, row)
        scores: dict[bytes, float] = {key: self.cache[key] for key in keys if key in self.cache}
        pool, waiting = ThreadPoolExecutor(self.concurrent * len(self.servers)), {}
        for key, row in first.items():
            if (future := _UNDERWAY.get(key)) is None:  # another call is asking the same question
                _UNDERWAY[key] = future = pool.submit(self.ask, requests[row], 1)
                future.add_done_callback(lambda _, key=key: _UNDERWAY.pop(key, None))
            waiting[key] = future
        pool.shutdown(wait=False)
        device = images.device

        def wait() -> Tensor:
            try:
                for key, future in waiting.items():
                    scores[key] = self.cache[key] = self._value(future, first[key])
            finally:
                for future in waiting.values():
                    future.cancel()
            while len(self.cache) > CACHE_SIZE:
                self.cache.popitem(last=False)
            return torch.tensor([scores[key] for key in keys], dtype=torch.float32, device=device)

        return wait

    def _request(self, picture: Tensor, question: str) -> bytes:
        """Encode a request: a picture (h, w, c) uint8 as a PNG, and a question."""
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

    def _value(self, future: Future[Answer], row: int) -> float:
        """Wait for the answer about the picture of a row, and return its score."""
        try:
            answer = self.with_warnings(future.result())
            server, content = answer.server, answer.content
            if isinstance(content, Mapping) and content.get("error") is not None:
                raise server.error(f"answered: {server.excerpt(str(content['error']))}")
            try:
                choice = content["choices"][0]
                text = choice["message"]["content"]
            except (KeyError, IndexError, TypeError):
                what = f"answered {kind(content)} that is no chat completion: url= must be a server of that protocol"
                raise server.error(what) from None
            return _number(server, text) if self.answer == "number" else _yes(server, choice)
        except RewardError as error:
            error.sample = row
            raise


def _completions(url: str) -> str:
    """Return the address of chat completions on a server, given its root or its /v1."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if re.search(r"/v\d+$", path) else "/v1/chat/completions"
    return urlunsplit(parts._replace(path=path))


def _number(server: Server, text: Any) -> float:
    """Return the first number in an answer, after its thinking section."""
    final = re.sub(r"(?s)^.*</think>", "", text) if isinstance(text, str) else ""
    match = re.search(r"(?<![\w.])[+-]?\d+(?:\.\d+)?", final)
    value = float(match[0]) if match else math.nan
    if not 0 <= value <= 10:
        raise server.error(f"answered {server.excerpt(str(text))!r}, no number from 0 to 10: question= should ask for one")
    return value


def _yes(server: Server, choice: Mapping[str, Any]) -> float:
    """Return the probability of yes against no, from the first token's logprobs."""
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
        answer = server.excerpt(str(choice["message"]["content"]))
        raise server.error(f"answered {answer!r}, neither yes nor no: question= should ask for one of them")
    return shares["yes"] / total
