"""HTTP requests to servers that score pictures: with a deadline, retries, and failover to another server."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Generic, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

from steerfm.rewards import RewardError

Result = TypeVar("Result")
BUSY = (429, 502, 503, 504)
"""Status codes after which a retry may succeed."""
HINTS = {
    401: " (token_env= names the environment variable that holds its token)",
    403: " (token_env= names the environment variable that holds its token)",
    404: " (check url= and model=)",
}
"""Advice by status code."""
PREFIX = "STEERFM_"
SECRET = re.compile(
    r"(?i)token(?!i)|secret|passw|credential|bearer|jwt|api.?key|(^|[_.-])(key|pwd|pass|auth|authorization|sig|signature)($|[_.-])"
)
"""Keys of a URL query that hold a secret."""
REST = 60.0
"""Seconds for which a server that failed is skipped, if there is another one."""


class Away(RewardError):  # noqa: N818
    """A server did not answer; another one may.

    Attributes:
        why: the message without the name of the reward.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass
class Answer:
    """The answer of a server.

    Attributes:
        server: the server.
        content: its answer, decoded from JSON.
        away: errors of the servers that were tried before and did not answer.
    """

    server: Server
    content: Any
    away: list[Away] = field(default_factory=list)


@dataclass
class Server:
    """A server.

    Attributes:
        reward: name of the reward, for errors.
        url: address, without a secret.
        timeout: see `steerfm_rewards.remote.Remote`, as for the next three.
        retries: number of retries.
        pause: seconds before the first retry.
        token_env: environment variable of the token.
        content: content type of the requests.
    """

    reward: str
    url: str
    timeout: float
    retries: int
    pause: float
    token_env: str | None
    content: str

    def __post_init__(self) -> None:
        address = parse_url(self.reward, self.url)
        self.place, self.local = f"{address.scheme}://{address.netloc}{address.path}", _is_local(address.hostname or "")
        if self.token_env is not None:
            if address.scheme == "http" and not self.local:
                raise RewardError(
                    f"reward {self.reward!r}: {self.place} would get the token unencrypted: give an https address"
                )
            self._token()

    def ask(self, body: bytes, n: int) -> Any:
        """Send a request about n pictures, and return the answer, decoded from JSON.

        Raises:
            Away: the server cannot be reached, is busy for too long, or does not give a complete answer in time.
            RewardError: the answer is an error.
        """
        deadline, limit, reason = time.monotonic() + self.timeout, 2**16 + 256 * n, ""
        trial = 0
        for trial in range(self.retries + 1):
            if trial:
                time.sleep(max(0.0, min(self.pause * 2 ** (trial - 1), deadline - time.monotonic())))
            if (remaining := deadline - time.monotonic()) <= 0:
                break
            try:
                code, raw = Call(lambda seconds=remaining: self._post(body, seconds, limit)).result(remaining)
            except TimeoutError:
                raise self._away(f"did not give a whole answer within {self.timeout:g} s: timeout= allows more") from None
            except (http.client.HTTPException, OSError) as error:  # refused, unknown host, reset, broken off, not HTTP
                reason = self.excerpt(str(getattr(error, "reason", error)) or type(error).__name__)
                continue
            if len(raw) > limit:
                raise self.error(f"answered with more than {limit} bytes for {n} pictures")
            if 300 <= code < 400:
                raise self.error(f"answered {code}, it sends to another address: give that one as url=")
            text = raw.decode(errors="replace")
            if code in BUSY:
                reason = f"{code} {self.excerpt(text)}"
                continue
            if not 200 <= code < 300:  # a retry would not help
                raise self.error(f"answered {code}: {self.excerpt(text)}{HINTS.get(code, '')}")
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                if text.strip() and not text.lstrip().startswith("{"):
                    raise self.error(f"did not answer in JSON: {self.excerpt(text)}") from None
                reason = "an answer that ends in the middle"
        tries = f"{trial + 1} tries" if trial else "1 try"
        raise self._away(f"cannot be reached ({reason or 'no answer'}) after {tries}: is it running?")

    def _post(self, body: bytes, timeout: float, limit: int) -> tuple[int, bytes]:
        """Return (status code, content) of the answer. At most one byte more than ``limit`` is read."""
        headers = {"Content-Type": self.content}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {self._token()}"
        try:
            reply = _opener(self.local).open(urllib.request.Request(self.url, body, headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            content = reply.read(limit + 1)
            length = reply.headers.get("Content-Length", "")
            if length.isdigit() and len(content) < min(int(length), limit + 1):  # read(n) does not raise for a short answer
                raise http.client.IncompleteRead(content, int(length) - len(content))
            return reply.status or 0, content

    def _token(self) -> str:
        """Read the token from the environment. It is never stored.

        Raises:
            RewardError: there is no such variable, or its value cannot be sent in a header. The message never shows it.
        """
        name = self.token_env
        if not isinstance(name, str) or not re.fullmatch(PREFIX + r"\w+", name):
            raise RewardError(
                f"reward {self.reward!r}: token_env takes the name of an environment variable that starts with {PREFIX}, such "
                f"as {PREFIX}TOKEN: a configuration must not be able to ask for any other"
            )
        token = os.environ.get(name, "").strip()
        if not token:
            raise RewardError(
                f"reward {self.reward!r}: the environment has no {name}: set it, token_env= names where the token is"
            )
        if not re.fullmatch(r"[!-~]+", token):
            raise RewardError(f"reward {self.reward!r}: {name} holds characters that no token has")
        return token

    def error(self, what: str, sample: int | None = None) -> RewardError:
        """Return an error that names the server; ``sample`` is the row that caused it."""
        return RewardError(f"reward {self.reward!r}: {self.place} {what}", sample)

    def _away(self, why: str) -> Away:
        return Away(f"reward {self.reward!r}: {self.place} {why}", f"{self.place} {why}")

    def excerpt(self, text: str) -> str:
        """Shorten a server's text for a message: one line, without control characters and without the token."""
        if self.token_env is not None:
            text = text.replace(self._token(), "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
        return line if len(line) <= 200 else line[:199] + "…"


@dataclass
class _Line:
    """State of an address: number of open requests, time of its last failure, and the error."""

    busy: int = 0
    since: float = -REST
    why: Away | None = None


_LINES: dict[str, _Line] = {}  # one per process, because copies of a reward use the same servers
_CHANGE = threading.Condition()


def ask(servers: Sequence[Server], concurrent: int, body: bytes, n: int) -> Answer:
    """Send a request to the least busy of several servers, with at most ``concurrent`` open requests each.

    A server that does not answer is skipped for `REST` seconds, and its request goes to another one.

    Raises:
        RewardError: the answer is an error, or no server answers.
    """
    began, away = time.monotonic(), []
    lines = [_LINES.setdefault(server.url, _Line()) for server in servers]
    available = [began - line.since >= REST for line in lines]
    available = available if any(available) else [True] * len(lines)

    while True:
        with _CHANGE:
            while True:
                free = [number for number, line in enumerate(lines) if available[number] and line.since <= began]
                if not free:
                    raise _no_answer(servers, [line.why for line in lines if line.why is not None])
                number = min(free, key=lambda number: lines[number].busy)
                if lines[number].busy < concurrent:
                    break
                _CHANGE.wait()
            server, line = servers[number], lines[number]
            line.busy += 1
        try:
            content = server.ask(body, n)
            line.since = -REST
            return Answer(server, content, away)
        except Away as error:
            away.append(error)
            line.since, line.why = time.monotonic(), error
        finally:
            with _CHANGE:
                line.busy -= 1
                _CHANGE.notify_all()


def _no_answer(servers: Sequence[Server], away: Sequence[Away]) -> RewardError:
    if len(servers) == 1:
        return away[0]
    return RewardError(
        f"reward {servers[0].reward!r}: none of its {len(servers)} servers answers: {'; '.join(e.why for e in away)}"
    )


class Call(Generic[Result]):
    """A call that runs in its own daemon thread."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self.box: list[Any] = []

        def work() -> None:
            try:
                self.box.append((True, call()))
            except BaseException as error:
                self.box.append((False, error))

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def result(self, seconds: float | None = None) -> Result:
        """Wait for the result of the call. Name look-up, connection and transfer have no common deadline, so this sets one.

        Raises:
            TimeoutError: it takes longer than ``seconds``. The thread continues in the background.
            Exception: any error of the call.
        """
        self.thread.join(seconds)
        if not self.box:
            raise TimeoutError
        ok, value = self.box[0]
        if not ok:
            raise value
        return value


@lru_cache(maxsize=2)
def _opener(local: bool) -> urllib.request.OpenerDirector:
    """Return an opener that uses no proxy for this machine and follows no redirect, which could leak pictures or the token."""
    direct = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_NoRedirect(), *direct)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def addresses(name: str, url: Any) -> list[Any]:
    """Return the addresses of ``url``, which is one or several.

    Raises:
        RewardError: there is none, or one occurs twice; ``concurrent=`` sets the simultaneous requests per server.
    """
    if isinstance(url, str) or not isinstance(url, Sequence):
        return [url]
    if not url:
        raise RewardError(f"reward {name!r}: url= takes an address such as http://localhost:8000, or several, got none")
    twice = next((each for number, each in enumerate(url) if each in url[:number]), None)
    if twice is not None:
        parse_url(name, twice)
        raise RewardError(
            f"reward {name!r}: url= names {urlsplit(twice).netloc} twice: concurrent=2 sends it two requests at a time"
        )
    return list(url)


def parse_url(name: str, url: Any) -> SplitResult:
    """Check an address, and return its parts.

    Raises:
        RewardError: it is not http or https, or it contains a secret. The message shows at most its host.
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
        raise RewardError(f"{wrong}, in ASCII and without spaces, got the scheme {parts.scheme!r}")
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


def kind(value: Any) -> str:
    """Return the type of a JSON value in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
