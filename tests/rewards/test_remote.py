"""The reward of a server: what it says is checked, what breaks is tried again, and no secret is written anywhere."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm import cli
from steerfm.rewards import RewardError

TOKEN = "sk-5ecret.T0ken"
Answer = Callable[[socket.socket, bytes], None]


@contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[bytes]]]:
    """Answers each connection in turn, the last answer again and again; yields the address and the requests."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    asked.append(request(connection))
                    answers[min(len(asked), len(answers)) - 1](connection, asked[-1])
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.close()


def request(connection: socket.socket) -> bytes:
    data = b""
    while not (b"\r\n\r\n" in data and len(data) >= whole(data)):
        if not (more := connection.recv(65536)):
            raise OSError("gone")
        data += more
    return data


def whole(data: bytes) -> int:
    head = data.partition(b"\r\n\r\n")[0]
    lines = head.decode().lower().split("\r\n")
    return len(head) + 4 + next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))


def says(body: object, code: int = 200, length: int | None = None, headers: str = "") -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {code} X\r\nContent-Length: {len(raw) if length is None else length}\r\n{headers}\r\n"
    return lambda connection, _: connection.sendall(head.encode() + raw)


def raw(text: bytes) -> Answer:
    return lambda connection, _: connection.sendall(text)


def reset(connection: socket.socket, _: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def drips(text: bytes, pause: float = 0.1) -> Answer:
    def answer(connection: socket.socket, _: bytes) -> None:
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return answer


def pictures(n: int = 2) -> Tensor:
    return torch.rand(n, 1, 4, 4)


def ask(url: str, n: int = 2, **options: object) -> Tensor:
    return steerfm.reward("remote", url=url, **({"pause": 0.01} | options))(pictures(n))


GOOD = says({"scores": [1, 2.5]})
BROKEN = {
    "a cut answer": says(b'{"scores": [1', length=100),
    "a cut answer without its length": raw(b'HTTP/1.0 200 OK\r\n\r\n{"scores": [1, 2.'),
    "an empty answer": raw(b"HTTP/1.0 200 OK\r\n\r\n"),
    "a cut chunk": raw(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{"scores"'),
    "a bad status line": raw(b"what?\r\n\r\n"),
    "nothing at all": raw(b""),
    "half a header": raw(b"HTTP/1.1 200 OK\r\nContent-"),
    "a reset": reset,
    "busy": says({"error": "later"}, code=503),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))
def test_what_breaks_is_tried_again(broken):
    with server(broken, broken, GOOD) as (url, asked):
        assert ask(url).tolist() == [1.0, 2.5]
        assert len(asked) == 3
    with server(broken) as (url, asked):
        with pytest.raises(RewardError, match=r"127\.0\.0\.1:\d+ cannot be reached \(.+\) after 2 tries") as error:
            ask(url, retries=1)
        assert len(asked) == 2 and "\n" not in str(error.value)


DRIPS = {
    "its content": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b" " * 900, 0.01),
    "its header": drips(b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 90, 0.02),
    "nothing": lambda connection, _: time.sleep(5),
    "an error": drips(b"HTTP/1.1 400 Bad\r\n\r\n" + b"no" * 500, 0.02),
}


@pytest.mark.parametrize("slow", DRIPS.values(), ids=list(DRIPS))
def test_the_whole_answer_has_a_deadline(slow):
    with server(slow) as (url, _):
        begin = time.monotonic()
        with pytest.raises(RewardError, match=r"did not give a whole answer within 0\.4 s"):
            ask(url, timeout=0.4)
        assert time.monotonic() - begin < 1.5


def test_pauses_end_at_the_deadline_too():
    with server(reset) as (url, _):
        begin = time.monotonic()
        with pytest.raises(RewardError, match="cannot be reached"):
            ask(url, timeout=0.5, pause=30, retries=9)
        assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "answered null in place of"),
        (3.5, "answered a number in place of"),
        ("no", "answered a text in place of"),
        ([1, 2], "answered a list in place of"),
        (True, "answered true or false in place of"),
        ({}, "answered with no scores"),
        ({"error": None}, "answered with no scores"),
        ({"error": "no\nGPU\x1b[31m"}, r"answered: no GPU \[31m$"),
        ({"error": {"why": 3}}, "answered: .'why': 3."),
        ({"scores": None}, "answered with null as scores"),
        ({"scores": "12"}, "answered with a text as scores"),
        ({"scores": 2}, "answered with a number as scores"),
        ({"scores": {"0": 1, "1": 2}}, "answered with an object as scores"),
        ({"scores": [1]}, "1 scores for 2 pictures"),
        ({"scores": [1, 2, 3]}, "3 scores for 2 pictures"),
        ({"scores": [1, None]}, "answered with null as a score for sample 1"),
        ({"scores": ["1", 2]}, "answered with a text as a score for sample 0"),
        ({"scores": [1, [2]]}, "answered with a list as a score"),
        ({"scores": [1, False]}, "answered with true or false as a score"),
        ({"scores": [1, float("nan")]}, "answered with nan as a score for sample 1"),
        (b'{"scores": [1, 1e999]}', "answered with inf as a score for sample 1"),
        ({"scores": [1, 1e39]}, r"answered with 1e\+39 as a score"),
        ({"scores": [1, 10**400]}, "answered with a number too large as a score"),
        (b"<html><b>hello</b></html>", r"did not answer in JSON: <html>"),
        (b"[" * 100_000, "answered with more than|did not answer in JSON"),
        (b"[" * 60_000, "did not answer in JSON"),
        (b"\xff\xfe\x00", "did not answer in JSON"),
        (b" " * 10**6, "answered with more than 66048 bytes for 2 pictures"),
    ],
)
def test_answers_that_are_no_scores_are_one_clear_line(answer, message):
    with server(says(answer)) as (url, asked):
        with pytest.raises(RewardError, match=message) as error:
            ask(url)
        assert len(asked) == 1 and len(str(error.value)) < 400
        assert str(error.value).isprintable()


def test_an_error_that_is_null_is_none():
    with server(says({"error": None, "scores": [1, 2]})) as (url, _):
        assert ask(url).tolist() == [1.0, 2.0]


def test_an_endless_answer_is_not_read_to_its_end():
    def endless(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"scores": [')
        while True:
            connection.sendall(b"1," * 50_000)

    with server(endless) as (url, _), pytest.raises(RewardError, match="answered with more than"):
        ask(url)


# --- addresses and secrets -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x/y", "localhost:8000", "http://", "http://a b", "http://x:99999", "http://x:port/",
     "http://[::1", "http://ä.example", "http://x/\r\nHost: y", "", None, 3, [], ["http://x", "ftp://y"], [3]],
)  # fmt: skip
def test_only_addresses_of_the_web(url):
    with pytest.raises(RewardError, match="url= takes an address such as"):
        steerfm.reward("remote", url=url)


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"batch": 1.5}, {"batch": "8"}, {"timeout": 0}, {"timeout": None}, {"timeout": float("nan")},
     {"timeout": float("inf")}, {"retries": -1}, {"retries": True}, {"pause": -1}, {"pause": "1"}],
)  # fmt: skip
def test_options_of_the_wrong_kind_are_refused(options):
    with pytest.raises(RewardError, match=rf"'remote': {next(iter(options))}="):
        steerfm.reward("remote", url="http://localhost:1", **options)


@pytest.mark.parametrize(
    "where",
    ["http://me:{}@localhost:1/x", "http://{}@localhost:1", "https://x.org/s?token={}", "https://x.org/s?a=1&api_key={}",
     "https://x.org/?access-token={}", "https://x.org/?X-Api-Key={}", "https://x.org/?sig={}", "https://x.org/#token={}"],
)  # fmt: skip
def test_a_secret_in_the_address_is_refused_and_not_repeated(where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match="token_env=STEERFM_TOKEN") as error:
        steerfm.reward("remote", url=where.format(TOKEN))
    assert TOKEN not in "".join(traceback.format_exception(error.value))
    assert cli.main(["steer", "label=Bag", "reward=remote", f"reward.url={where.format(TOKEN)}"]) == 2
    assert TOKEN not in "".join(capsys.readouterr()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("query", ["sigma=2", "tokenizer=a", "keyword=x", "monkey=1", "model=clip"])
def test_other_queries_stay(query):
    assert steerfm.reward("remote", url=f"http://localhost:1/?{query}")


@pytest.mark.parametrize("name", ["HOME", "AWS_SECRET_ACCESS_KEY", "steerfm_token", "STEERFM_", "STEERFM_A B", "", 3, ["X"]])
def test_a_configuration_can_ask_for_no_other_variable(name, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
    with pytest.raises(RewardError, match="starts with STEERFM_") as error:
        steerfm.reward("remote", url="http://localhost:1", token_env=name)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "line\nbreak", "ümlaut"])
def test_a_token_that_is_not_there_or_cannot_be_sent(value, monkeypatch):
    monkeypatch.delenv("STEERFM_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("STEERFM_TOKEN", value)
    with pytest.raises(RewardError, match="STEERFM_TOKEN") as error:
        steerfm.reward("remote", url="http://localhost:1", token_env="STEERFM_TOKEN")
    assert value is None or not value.strip() or value not in str(error.value)


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org"])
def test_a_token_is_not_sent_unencrypted(host, monkeypatch):
    monkeypatch.setenv("STEERFM_TOKEN", TOKEN)
    with pytest.raises(RewardError, match="give an https address"):
        steerfm.reward("remote", url=f"http://{host}/", token_env="STEERFM_TOKEN")
    assert steerfm.reward("remote", url=f"https://{host}/", token_env="STEERFM_TOKEN")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_nothing_goes_to_where_an_answer_points(code, monkeypatch):
    monkeypatch.setenv("STEERFM_TOKEN", TOKEN)
    with server(GOOD) as (other, reached), server(says(b"", code, headers=f"Location: {other}\r\n")) as (url, _):
        with pytest.raises(RewardError, match=f"answered {code}, it sends to another address"):
            ask(url, token_env="STEERFM_TOKEN")
        assert reached == []


def echo(connection: socket.socket, request: bytes) -> None:
    head = request.partition(b"\r\n\r\n")[0].decode()
    says({"error": head}, code=401)(connection, b"")


def test_a_token_is_sent_and_repeated_nowhere(monkeypatch):
    monkeypatch.setenv("STEERFM_TOKEN", TOKEN)
    for answer in (echo, raw(f"HTTP/{TOKEN} what\r\n\r\n".encode()), says(f"<b>{TOKEN}</b>".encode())):
        with server(answer) as (url, asked):
            with pytest.raises(RewardError) as error:
                ask(url, token_env="STEERFM_TOKEN", retries=0)
            assert f"Authorization: Bearer {TOKEN}".encode() in asked[0]
            assert TOKEN not in "".join(traceback.format_exception(error.value))


def test_a_token_is_in_no_file_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STEERFM_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    small = ["label=Bag", "n=1", "method=best_of_n", "method.particles=2", "method.steps=1", "judge=null", "out=run"]
    with server(says({"scores": [1, 2]}), says({"scores": [1]})) as (url, asked):
        words = [*small, "reward=remote", f"reward.url={url}", "reward.token_env=STEERFM_TOKEN"]
        assert cli.main(["steer", *words]) == 0, capsys.readouterr().err
        assert all(TOKEN.encode() in request for request in asked)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 4 and not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in "".join(capsys.readouterr())
    assert "STEERFM_TOKEN" in (tmp_path / "run" / "config.yaml").read_text()
