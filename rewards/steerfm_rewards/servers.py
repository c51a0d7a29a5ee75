"""Servers that are asked for scores: over HTTP, with a deadline, further tries, and others in the place of one that is away."""

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
REST = 60.0
"""Seconds for which a server that was away is not asked, where there is another one."""


class Away(RewardError):  # noqa: N818
    """A server did not answer; another one may. ``why`` is the message without its name."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass
class Answer:
    """What a server said, from JSON; ``away`` are the errors of those that did not answer before it."""

    server: Server
    said: Any
    away: list[Away] = field(default_factory=list)


@dataclass
class Server:
    """One address.

    Attributes:
        reward: name of the reward, for errors.
        url: of the server; without a secret in it.
        timeout, retries, pause, token_env: see `steerfm_rewards.remote.Remote`.
        content: type of what it is sent.
    """

    reward: str
    url: str
    timeout: float
    retries: int
    pause: float
    token_env: str | None
    content: str

    def __post_init__(self) -> None:
        address = checked(self.reward, self.url)
        self.place, self.local = f"{address.scheme}://{address.netloc}{address.path}", _is_local(address.hostname or "")
        if self.token_env is not None:
            if address.scheme == "http" and not self.local:
                raise RewardError(
                    f"reward {self.reward!r}: {self.place} would get the token unencrypted: give an https address"
                )
            self._token()

    def ask(self, body: bytes, n: int) -> Any:
        """What it says to a request about n pictures, from JSON.

        Raises:
            Away: it cannot be reached, is busy for too long, or gives no whole answer in time.
            RewardError: what it says is wrong.
        """
        deadline, limit, reason = time.monotonic() + self.timeout, 2**16 + 256 * n, ""
        trial = 0
        for trial in range(self.retries + 1):
            if trial:
                time.sleep(max(0.0, min(self.pause * 2 ** (trial - 1), deadline - time.monotonic())))
            if (left := deadline - time.monotonic()) <= 0:
                break
            try:
                code, raw = Started(lambda left=left: self._post(body, left, limit)).result(left)
            except TimeoutError:
                raise self._away(f"did not give a whole answer within {self.timeout:g} s: timeout= allows more") from None
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
        raise self._away(f"cannot be reached ({reason or 'no answer'}) after {tries}: is it running?")

    def _post(self, body: bytes, timeout: float, limit: int) -> tuple[int, bytes]:
        """(code, content) of the answer; no more than a byte above the limit is read."""
        headers = {"Content-Type": self.content}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {self._token()}"
        try:
            reply = _opener(self.local).open(urllib.request.Request(self.url, body, headers), timeout=timeout)
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
        """An error that names the server."""
        return RewardError(f"reward {self.reward!r}: {self.place} {what}", sample)

    def _away(self, why: str) -> Away:
        return Away(f"reward {self.reward!r}: {self.place} {why}", f"{self.place} {why}")

    def said(self, text: str) -> str:
        """What a server said, as part of a message: one short line, without control characters and without the token."""
        if self.token_env is not None:
            text = text.replace(self._token(), "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
        return line if len(line) <= 200 else line[:199] + "…"


@dataclass
class _Line:
    """Who waits at an address: requests under way, and when it last was away, and why."""

    busy: int = 0
    since: float = -REST
    why: Away | None = None


_LINES: dict[str, _Line] = {}  # of a process: rewards are copied, and copies ask the same servers
_MOVED = threading.Condition()


def ask(servers: Sequence[Server], concurrent: int, body: bytes, n: int) -> Answer:
    """The answer of the first of several servers that is free, ``concurrent`` requests at a time to each.

    One that is away is left out for `REST` seconds, and what it had goes to the others.

    Raises:
        RewardError: the answer is wrong, or all servers are away.
    """
    began, away = time.monotonic(), []
    lines = [_LINES.setdefault(server.url, _Line()) for server in servers]
    rested = [began - line.since >= REST for line in lines]
    rested = rested if any(rested) else [True] * len(lines)

    while True:
        with _MOVED:
            while True:
                left = [number for number, line in enumerate(lines) if rested[number] and line.since <= began]
                if not left:
                    raise _nobody(servers, [line.why for line in lines if line.why is not None])
                number = min(left, key=lambda number: lines[number].busy)
                if lines[number].busy < concurrent:
                    break
                _MOVED.wait()
            server, line = servers[number], lines[number]
            line.busy += 1
        try:
            said = server.ask(body, n)
            line.since = -REST
            return Answer(server, said, away)
        except Away as error:
            away.append(error)
            line.since, line.why = time.monotonic(), error
        finally:
            with _MOVED:
                line.busy -= 1
                _MOVED.notify_all()


def _nobody(servers: Sequence[Server], away: Sequence[Away]) -> RewardError:
    if len(servers) == 1:
        return away[0]
    return RewardError(
        f"reward {servers[0].reward!r}: none of its {len(servers)} servers answers: {'; '.join(e.why for e in away)}"
    )


class Started(Generic[Result]):
    """A call in a thread of its own, which ends with the process."""

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
        """What the call returns. It may hang in many places: names, connections, headers and contents have no common deadline.

        Raises:
            TimeoutError: it takes longer; the call is left alone. Whatever the call raises.
        """
        self.thread.join(seconds)
        if not self.box:
            raise TimeoutError
        done, value = self.box[0]
        if not done:
            raise value
        return value


@lru_cache(maxsize=2)
def _opener(local: bool) -> urllib.request.OpenerDirector:
    """What makes requests. This machine is asked directly; an answer that sends elsewhere is not followed, so that neither
    pictures nor the token go there."""
    direct = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_NoRedirect(), *direct)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def addresses(name: str, url: Any) -> list[Any]:
    """The addresses of a url= that may be one or several.

    Raises:
        RewardError: none, or one twice: ``concurrent=`` says how many requests one takes at a time.
    """
    if isinstance(url, str) or not isinstance(url, Sequence):
        return [url]
    if not url:
        raise RewardError(f"reward {name!r}: url= takes an address such as http://localhost:8000, or several, got none")
    twice = next((each for number, each in enumerate(url) if each in url[:number]), None)
    if twice is not None:
        checked(name, twice)
        raise RewardError(
            f"reward {name!r}: url= names {urlsplit(twice).netloc} twice: concurrent=2 sends it two requests at a time"
        )
    return list(url)


def checked(name: str, url: Any) -> SplitResult:
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


def kind(value: Any) -> str:
    """A JSON value in a word."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
