"""A reward that lives elsewhere: pictures go to an HTTP server, scores come back. `examples/reward_server.py` is a server."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError

Result = TypeVar("Result")
BUSY = (429, 502, 503, 504)
"""Codes that say that the same request may be answered later."""
HINTS = {
    401: " (token_env= names the environment variable that holds its token)",
    403: " (token_env= names the environment variable that holds its token)",
    404: " (url= or model= names what it does not have)",
}
"""What mends a request that was refused with a code."""
PREFIX = "STEERFM_"
SECRET = re.compile(
    r"(?i)token(?!i)|secret|passw|credential|bearer|jwt|api.?key|(^|[_.-])(key|pwd|pass|auth|authorization|sig|signature)($|[_.-])"
)
"""Keys of a query that hold a secret."""
LARGEST = torch.finfo(torch.float32).max


class Remote(Reward):
    """The scores of an HTTP server, for rewards with an environment or a machine of their own.

    The request is a POST of a safetensors file: ``images`` (b, c, h, w) uint8 (or float32 vectors), ``labels`` where there are
    any, and prompts as JSON in its metadata. The answer is JSON: {"scores": [b numbers]} or {"error": "why"}.
    Unit: the server's. Gradient: none, it is a black box.

    Args:
        url: of the server, http or https; without a secret in it, since it is written into the run folder.
        batch: pictures a request.
        timeout: seconds for the whole answer to a request, all its tries together.
        retries: further tries where the server cannot be reached, is busy or breaks its answer off.
        pause: seconds before the second try, doubled before each further one.
        token_env: environment variable that holds a token, STEERFM_ and more; it goes into the header Authorization as a
            Bearer token, over https or to this machine only, and is written nowhere.

    >>> steerfm.reward("remote", url="http://localhost:8000")
    >>> steerfm.reward("remote", url="https://scores.example.org", token_env="STEERFM_TOKEN")
    """

    name, unit, range = "remote", "the server's", (-float("inf"), float("inf"))
    differentiable = False
    one_process = True  # the server may be near the first machine only
    content = "application/octet-stream"

    def __init__(
        self,
        url: str,
        batch: int = 64,
        timeout: float = 30.0,
        retries: int = 3,
        pause: float = 0.5,
        token_env: str | None = None,
    ) -> None:
        super().__init__()
        whole(self.name, "batch", batch, 1)
        whole(self.name, "retries", retries, 0)
        for key, value in {"timeout": timeout, "pause": pause}.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise RewardError(f"reward {self.name!r}: {key}={value!r}: give seconds")
        if timeout == 0:
            raise RewardError(f"reward {self.name!r}: timeout=0: no server answers at once, give seconds")
        address = _address(self.name, url)
        self.url, self.batch_size, self.timeout, self.retries, self.pause = url, batch, timeout, retries, pause
        self.token_env, self.place = token_env, f"{address.scheme}://{address.netloc}{address.path}"
        local = _is_local(address.hostname or "")
        if token_env is not None:
            if address.scheme == "http" and not local:
                raise RewardError(f"reward {self.name!r}: {self.place} would get the token unencrypted: give an https address")
            self._token()
        self.opener = partial(_opener, local)

    def late_networks(self) -> Sequence[str]:
        return [self.url]

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w) or (b, d) -> (b,)."""
        x = images.detach().cpu()
        tensors = {"images": (x.clamp(0, 1) * 255).round().to(torch.uint8) if x.ndim == 4 else x.float()}
        if labels is not None:
            tensors["labels"] = labels.detach().cpu()
        body = save(
            {k: v.contiguous() for k, v in tensors.items()}, {"prompts": json.dumps(list(prompts) if prompts else None)}
        )
        return torch.tensor(self._numbers(self.ask(body, len(x)), len(x)), dtype=torch.float32, device=images.device)

    def _numbers(self, answer: Any, n: int) -> list[float]:
        """The numbers of an answer, checked."""
        if not isinstance(answer, dict):
            raise self.error(f'answered {kind(answer)} in place of {{"scores": [...]}}')
        if answer.get("error") is not None:
            raise self.error(f"answered: {self.said(str(answer['error']))}")
        scores = answer.get("scores")
        if not isinstance(scores, list):
            what = f"{kind(scores)} as scores" if "scores" in answer else "no scores"
            raise self.error(f'answered with {what}, in place of {{"scores": [...]}}')
        if len(scores) != n:
            raise self.error(f"answered: {len(scores)} scores for {n} pictures")
        for row, value in enumerate(scores):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self.error(f"answered with {kind(value)} as a score", row)
            if not abs(value) <= LARGEST:
                raise self.error(f"answered with {value if isinstance(value, float) else 'a number too large'} as a score", row)
        return [float(value) for value in scores]

    def ask(self, body: bytes, n: int) -> Any:
        """What the server says to a request about n pictures, from JSON."""
        deadline, limit, reason = time.monotonic() + self.timeout, 2**16 + 256 * n, ""
        trial = 0
        for trial in range(self.retries + 1):
            if trial:
                time.sleep(max(0.0, min(self.pause * 2 ** (trial - 1), deadline - time.monotonic())))
            if (left := deadline - time.monotonic()) <= 0:
                break
            try:
                code, raw = _within(left, lambda left=left: self._post(body, left, limit))
            except TimeoutError:
                raise self.error(f"did not give a whole answer within {self.timeout:g} s: timeout= allows more") from None
            except (http.client.HTTPException, OSError) as error:  # refused, unknown host, reset, cut, no HTTP
                reason = self.said(str(getattr(error, "reason", error)) or type(error).__name__)
                continue
            if len(raw) > limit:
                raise self.error(f"answered with more than {limit} bytes for {n} pictures")
            if 300 <= code < 400:
                raise self.error(f"answered {code}, it sends to another address: give that one as url=")
            text = raw.decode(errors="replace")
            if code in BUSY:
                reason = f"{code} {self.said(text)}"
                continue
            if not 200 <= code < 300:  # will not change by asking again
                raise self.error(f"answered {code}: {self.said(text)}{HINTS.get(code, '')}")
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                if text.strip() and not text.lstrip().startswith("{"):
                    raise self.error(f"did not answer in JSON: {self.said(text)}") from None
                reason = "an answer that ends in the middle"
        tries = f"{trial + 1} tries" if trial else "1 try"
        raise self.error(f"cannot be reached ({reason or 'no answer'}) after {tries}: is it running?")

    def _post(self, body: bytes, timeout: float, limit: int) -> tuple[int, bytes]:
        """(code, content) of the answer; no more than a byte above the limit is read."""
        headers = {"Content-Type": self.content}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {self._token()}"
        try:
            reply = self.opener().open(urllib.request.Request(self.url, body, headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            content = reply.read(limit + 1)
            told = reply.headers.get("Content-Length", "")
            if told.isdigit() and len(content) < min(int(told), limit + 1):  # read(n) does not complain
                raise http.client.IncompleteRead(content, int(told) - len(content))
            return reply.status or 0, content

    def _token(self) -> str:
        """The secret, read where it is used and kept nowhere.

        Raises:
            RewardError: no such variable, or nothing that a header can hold; the value is not shown.
        """
        name = self.token_env
        if not isinstance(name, str) or not re.fullmatch(PREFIX + r"\w+", name):
            raise RewardError(
                f"reward {self.name!r}: token_env takes the name of an environment variable that starts with {PREFIX}, such as "
                f"{PREFIX}TOKEN: a configuration must not be able to ask for any other"
            )
        token = os.environ.get(name, "").strip()
        if not token:
            raise RewardError(
                f"reward {self.name!r}: the environment has no {name}: set it, token_env= names where the token is"
            )
        if not re.fullmatch(r"[!-~]+", token):
            raise RewardError(f"reward {self.name!r}: {name} holds characters that no token has")
        return token

    def error(self, what: str, sample: int | None = None) -> RewardError:
        """An error that names the server."""
        return RewardError(f"reward {self.name!r}: {self.place} {what}", sample)

    def said(self, text: str) -> str:
        """What a server said, as part of a message: one short line, without control characters and without the token."""
        if self.token_env is not None:
            text = text.replace(self._token(), "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
        return line if len(line) <= 200 else line[:199] + "…"


@lru_cache(maxsize=2)
def _opener(local: bool) -> urllib.request.OpenerDirector:
    """What makes requests. This machine is asked directly; an answer that sends elsewhere is not followed, so that neither
    pictures nor the token go there."""
    direct = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_NoRedirect(), *direct)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of a call that may hang in many places: names, connections, headers and contents have no common deadline.

    Raises:
        TimeoutError: it took longer; the call is left alone. Whatever the call raises.
    """
    box: list[Any] = []

    def work() -> None:
        try:
            box.append((True, call()))
        except BaseException as error:
            box.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError
    done, value = box[0]
    if not done:
        raise value
    return value


def _address(name: str, url: Any) -> SplitResult:
    """The parts of a url.

    Raises:
        RewardError: not http or https, or with a secret in it; no message repeats more of it than its host.
    """
    wrong = f"reward {name!r}: url= takes an address such as http://localhost:8000"
    if not isinstance(url, str):
        raise RewardError(f"{wrong}, got {kind(url)}")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise RewardError(f"{wrong}; its host or port cannot be read") from None
    if not good or not re.fullmatch(r"[!-~]+", url):
        raise RewardError(f"{wrong}, without spaces and other signs than those of ASCII, got the scheme {parts.scheme!r}")
    keys = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if SECRET.search(key)]
    if "@" in parts.netloc or keys or SECRET.search(parts.fragment):
        where = f"its {keys[0]}=" if keys else "its user name and password" if "@" in parts.netloc else "its end"
        raise RewardError(
            f"reward {name!r}: url= holds a secret ({where}) that would be written into the run folder: put it into an "
            f"environment variable and name that, token_env={PREFIX}TOKEN"
        )
    return parts


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def whole(name: str, key: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least ``least``, in the words of a reward of this name."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RewardError(f"reward {name!r}: {key}={value!r}: give a whole number of at least {least}")


def kind(value: Any) -> str:
    """A JSON value in a word."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
