"""The judge over chat completions, against a server that speaks the protocol."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from steerfm_rewards.vlm import Vlm
from torch import Tensor

import steerfm
from steerfm.rewards import RewardError
from steerfm.testing import check_reward

Answer = Callable[[Tensor, str], Any]


pytestmark = pytest.mark.slow


@contextmanager
def server(answer: Answer, code: int = 200) -> Iterator[tuple[str, list[dict]]]:
    """Answers each request by its picture (h, w, c) and question; yields the address and what was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            picture, text = body["messages"][0]["content"]
            head, _, data = picture["image_url"]["url"].partition(",")
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data))))).float() / 255
            asked.append(body | {"path": self.path, "key": self.headers["Authorization"], "head": head, "text": text["text"]})
            told = answer(pixels, text["text"])
            raw = told if isinstance(told, bytes) else json.dumps(told).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            with suppress(OSError):  # whoever asked has gone
                self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", asked
    finally:
        made.shutdown()
        made.server_close()


def says(text: Any, tokens: dict[str, float] | None = None) -> dict:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
    if tokens is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
        choice["logprobs"] = {"content": [{"token": "Yes", "logprob": 0.0, "top_logprobs": top}]}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def brightness(picture: Tensor, _: str) -> dict:
    return says(f"Score: {10 * picture.mean():.4f} / 10")


def judge(url: str, **options: Any) -> Vlm:
    made = steerfm.reward(Vlm, url=url, model="m", **({"pause": 0.01} | options))
    assert isinstance(made, Vlm)
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_and_the_question_arrive_and_the_number_comes_back(channels):
    x = torch.rand(3, channels, 5, 7)
    with server(brightness) as (url, asked):
        value = judge(url, question="Is it {prompt}, {really}?")(x, prompts=["a", "b {c}", "ü"])
    torch.testing.assert_close(value, 10 * x.mean((1, 2, 3)), atol=0.03, rtol=0)
    assert sorted(body["text"] for body in asked) == ["Is it a, {really}?", "Is it b {c}, {really}?", "Is it ü, {really}?"]
    assert {body["head"] for body in asked} == {"data:image/png;base64"} and {body["model"] for body in asked} == {"m"}


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_address_may_end_anywhere(end):
    with server(brightness) as (url, asked):
        judge(url + end, question="?")(torch.rand(1, 3, 4, 4))
    assert asked[0]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7.0), ("7/10", 7.0), ("I say 8.5.", 8.5), ("<think>2 or 3?</think>\n\n9", 9.0), ("**10**", 10.0), ("0", 0.0)],
)
def test_numbers_as_models_write_them(text, value):
    with server(lambda *_: says(text)) as (url, _):
        assert judge(url, question="?")(torch.rand(1, 3, 4, 4)).tolist() == [value]


def test_the_probability_of_yes():
    tokens = {"Yes": 0.3, " yes": 0.1, "No": 0.1, "Maybe": 0.4}
    with server(lambda *_: says("Yes", tokens)) as (url, asked):
        value = judge(url, answer="yes", prompt="a dog")(torch.rand(1, 3, 4, 4))
    assert float(value) == pytest.approx(0.8) and asked[0]["logprobs"] and asked[0]["max_tokens"] == 1
    assert "a dog" in asked[0]["text"]


def test_the_same_question_is_asked_once():
    x = torch.rand(2, 3, 4, 4)
    with server(brightness) as (url, asked):
        made = judge(url)
        first = made(torch.cat([x, x]), prompts=["a", "b", "a", "c"])
        assert len(asked) == 3 and torch.equal(first[0], first[2])
        assert torch.equal(made(x, prompts=["a", "b"]), first[:2]) and len(asked) == 3
        made(x, prompts=["b", "b"])
        assert len(asked) == 4


def test_requests_go_side_by_side_and_no_more_than_asked():
    running, most, lock = [0], [0], threading.Lock()

    def slow(*_: object) -> dict:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.1)
        with lock:
            running[0] -= 1
        return says("5")

    with server(slow) as (url, asked):
        judge(url, question="?", concurrent=3)(torch.rand(9, 1, 4, 4))
    assert 2 <= most[0] <= 3 and len(asked) == 9


@pytest.mark.parametrize(
    ("told", "options", "message"),
    [
        (says("I cannot judge"), {}, "'I cannot judge', no number from 0 to 10: question= should ask for one for sample 0$"),
        (says("11"), {}, "no number from 0 to 10"),
        (says("-3"), {}, "no number from 0 to 10"),
        (says(None), {}, "no number from 0 to 10"),
        ({"scores": [1]}, {}, "no chat completion: url= must be a server of that protocol"),
        ([1], {}, "no chat completion"),
        ({"error": {"message": "no such model"}}, {}, "no such model"),
        (says("yes"), {"answer": "yes"}, "without logprobs: answer=number"),
        (says("maybe", {"maybe": 0.9}), {"answer": "yes"}, "'maybe', neither yes nor no"),
        (b"<html>", {}, "did not answer in JSON"),
    ],
)
def test_nonsense_is_one_line_that_names_the_sample_and_the_fix(told, options, message):
    with server(lambda *_: told) as (url, _), pytest.raises(RewardError, match=message) as error:
        judge(url, question="?", **options)(torch.rand(2, 3, 4, 4))
    assert "\n" not in str(error.value) and "for sample 0" in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [(401, "answered 401: .*token_env="), (404, "answered 404: .*model="), (400, "answered 400"), (503, "2 tries")],
)
def test_another_status(code, message):
    with server(lambda *_: {"error": "no"}, code) as (url, _), pytest.raises(RewardError, match=f"{message}.*for sample 0$"):
        judge(url, question="?", retries=1)(torch.rand(1, 3, 4, 4))


def test_a_server_that_is_away_or_slow():
    with pytest.raises(RewardError, match=r"cannot be reached .* is it running\? for sample 0"):
        judge("http://127.0.0.1:9", question="?", retries=1)(torch.rand(1, 3, 4, 4))
    with server(lambda *_: time.sleep(1) or says("5")) as (url, _), pytest.raises(RewardError, match="timeout= allows more"):
        judge(url, question="?", timeout=0.2)(torch.rand(1, 3, 4, 4))


def test_the_key_is_sent_and_written_nowhere(monkeypatch):
    monkeypatch.setenv("STEERFM_KEY", "sk-5ecret")
    with server(lambda *_: {"error": "bad key sk-5ecret"}) as (url, asked):
        made = judge(url, question="?", token_env="STEERFM_KEY")
        with pytest.raises(RewardError) as error:
            made(torch.rand(1, 3, 4, 4))
    assert asked[0]["key"] == "Bearer sk-5ecret" and "5ecret" not in str(error.value) + repr(vars(made))
    with pytest.raises(RewardError, match=r"'vlm'.*STEERFM_"):
        judge("http://127.0.0.1:1", token_env="HOME")
    with pytest.raises(RewardError, match=r"'vlm'.*unencrypted"):
        judge("http://example.org", token_env="STEERFM_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "stars"}, "answer='stars': give one of number, yes"),
        ({"concurrent": 0}, "concurrent=0"),
        ({"question": " "}, "question=' ': give a text"),
        ({"url": "ftp://x"}, "'vlm': url= takes an address"),
        ({"timeout": 0}, "'vlm': timeout=0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(RewardError, match=message):
        steerfm.reward(Vlm, **({"url": "http://localhost:1", "model": "m"} | options))


def test_it_keeps_the_contract():
    with server(brightness) as (url, _):
        check_reward(judge(url, question="How bright?"), (3, 8, 8))
        check_reward(judge(url), (1, 8, 8))
