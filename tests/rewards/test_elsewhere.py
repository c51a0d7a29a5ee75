"""Rewards whose numbers come from elsewhere: the network goes on while they wait, and nothing else changes."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import away
import pytest
import torch
from away import Away, Here, Watched, numbers
from kinds import a
from safetensors.torch import load
from steerfm_rewards import servers
from torch import Tensor

import steerfm
from steerfm import cli, distributed
from steerfm.rewards import RewardError


@pytest.fixture(autouse=True)
def rested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_LINES", {})


# --- the run ---------------------------------------------------------------------------------------------------------
METHODS: dict[str, dict[str, Any]] = {
    "particles": {"method": {"name": "feynman_kac", "particles": 12, "steps": 4}},
    "adaptive": {"method": {"name": "feynman_kac", "particles": 7, "steps": 3, "tempering": "adaptive"}},
    "drawn look-aheads": {
        "method": {"name": "feynman_kac", "particles": 6, "steps": 3, "lookahead": {"name": "renoise", "k": 3}}
    },
    "without a derivative": {
        "method": {"name": "steering", "particles": 5, "steps": 3, "lookahead": {"name": "renoise", "k": 2}, "guidance": "free"}
    },
    "the default": {"method": "funnel"},
    "fk_steering": {"method": "fk_steering"},
    "random search": {"method": "random_search"},
    "neighbours": {"method": "zero_order"},
    "a tree": {"method": "tree_search"},
    "best of n": {"method": {"name": "best_of_n", "particles": 8}},
    "steps of their own": {"method": {"name": "feynman_kac", "particles": 7, "steps": 3, "transition": "diffuse"}},
    "steps by a denoiser": {
        "method": {"name": "feynman_kac", "particles": 7, "steps": 3, "lookahead": "denoise", "transition": "midpoint"}
    },
}


@pytest.mark.parametrize(("name", "micro_batch"), [*((name, 5) for name in METHODS), ("particles", None), ("best of n", None)])
def test_what_comes_out_is_that_of_a_reward_that_is_here(name: str, micro_batch: int | None):
    given: dict[str, Any] = {"n": 3, "strength": 8.0, "label": "Bag", "micro_batch": micro_batch} | METHODS[name]
    here, away = (numbers(steerfm.steer("fashion", reward, **given)) for reward in (Here(), Away()))
    assert here.keys() == away.keys()
    for key, value in here.items():
        torch.testing.assert_close(away[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["particles", "random search", "a tree", "best of n", "steps of their own"])
def test_the_network_goes_on_while_a_part_is_scored(name: str):
    reward = Away()
    flow_map = Watched(reward.events)
    steerfm.steer(flow_map, reward, n=12, micro_batch=4, label="Bag", **METHODS[name])
    kinds = [what for what, _ in reward.events]
    first = kinds.index("sent")
    assert kinds[first : first + 4] == ["sent", "network", "sent", "network"]
    waiting = most = 0
    for what, _ in reward.events:
        waiting += {"sent": 1, "waited": -1}.get(what, 0)
        most = max(most, waiting)
    assert waiting == 0 and most >= 3


def test_without_micro_batches_parts_are_as_large_as_rows_do_not_depend_on():
    reward = Away()
    steerfm.steer("fashion", reward, {"name": "feynman_kac", "particles": 40, "steps": 2}, n=1, label="Bag")
    assert {rows for what, rows in reward.events if what == "sent"} == {20}


def test_a_group_is_seen_whole():
    reward = Away()
    reward.groupwise = True
    steerfm.steer("fashion", reward, {"name": "feynman_kac", "particles": 6, "steps": 2}, n=2, micro_batch=4, label="Bag")
    assert {rows for what, rows in reward.events if what == "sent"} == {12}


def test_an_error_names_the_sample_of_the_whole_run():
    method = {"name": "feynman_kac", "particles": 12, "steps": 2}
    with pytest.raises(RewardError) as here:
        steerfm.steer("fashion", Here(broken=True), method, n=2, micro_batch=5, label="Bag")
    with pytest.raises(RewardError) as away:
        steerfm.steer("fashion", Away(broken=True), method, n=2, micro_batch=5, label="Bag")
    assert a(int, here.value.sample) == a(int, away.value.sample) > 5
    assert str(here.value) == str(away.value)


@pytest.mark.parametrize("many", [2])
def test_on_several_processes_the_first_asks_and_all_go_on(many: int):
    here = away.run(False)
    values, events = distributed.launch(away.run_with_events, devices=many)
    for key, value in here.items():
        torch.testing.assert_close(values[key], value, rtol=0, atol=0, equal_nan=True)
    assert [what for what, _ in events].count("sent") > 4
    assert ["sent", "sent"] in [[events[i][0], events[i + 1][0]] for i in range(len(events) - 1)]


# --- sums ------------------------------------------------------------------------------------------------------------
def test_terms_that_are_here_are_made_while_the_others_are_waited_for():
    away, order = Away(), []

    def local(images: Tensor) -> Tensor:
        order.append([what for what, _ in away.events])
        return images.mean((1, 2, 3))

    x = torch.rand(4, 1, 5, 5)
    both = (2.0 * steerfm.reward(local) + 1.0 * away).evaluate(x)
    assert order == [["sent"]]
    torch.testing.assert_close(both.total, 2 * x.mean((1, 2, 3)) + Here()(x))
    assert list(both.components) == ["local", "away"]


def test_members_that_are_elsewhere_are_under_way_at_once():
    first, second = Away(), Away()
    second.events = first.events
    x = torch.rand(4, 1, 5, 5)
    value = steerfm.reward("ensemble", members=[first, second], k=0.0)(x)
    assert [what for what, _ in first.events] == ["sent", "sent", "waited", "waited"]
    torch.testing.assert_close(value, Here()(x))


def test_a_sum_with_a_gradient_elsewhere_has_none_even_if_it_is_waited_for_later():
    x = torch.rand(4, 1, 5, 5, requires_grad=True)
    total = (steerfm.reward("brightness") + Away()).promise(x)().total
    assert not total.requires_grad


def test_one_that_does_not_say_how_to_send():
    class Nothing(steerfm.Reward):
        elsewhere = True

    with pytest.raises(NotImplementedError, match="'nothing' is elsewhere and does not define send"):
        Nothing()(torch.rand(2, 1, 4, 4))


# --- servers ---------------------------------------------------------------------------------------------------------
Handle = Callable[[Tensor], tuple[int, object]]


@contextmanager
def serving(*handles: Handle) -> Iterator[list[str]]:
    """A server for each handle, which gets pictures and gives a code and what it says."""
    running = []
    for handle in handles:

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self, handle: Handle = handle) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code, said = handle(load(body)["images"].float() / 255)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *_: object) -> None: ...  # type: ignore[override]

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield [f"http://127.0.0.1:{server.server_port}" for server in running]
    finally:
        for server in running:
            server.shutdown()
            server.server_close()


def good(images: Tensor) -> tuple[int, object]:
    return 200, {"scores": images.mean((1, 2, 3)).tolist()}


def busy(images: Tensor) -> tuple[int, object]:
    return 503, {"error": "later"}


def remote(url: object, **options: object) -> steerfm.Reward:
    return steerfm.reward("remote", url=url, **{"pause": 0.01, "retries": 1, "timeout": 20.0} | options)


def test_several_servers_score_at_once():
    both = threading.Barrier(2, timeout=20)

    def meets(images: Tensor) -> tuple[int, object]:
        both.wait()  # passes only where two requests are under way
        return good(images)

    x = (torch.rand(8, 1, 4, 4) * 255).round() / 255
    with serving(meets, meets) as urls:
        torch.testing.assert_close(remote(urls, batch=2)(x), x.mean((1, 2, 3)))
    with serving(meets) as urls:
        torch.testing.assert_close(remote(urls, batch=2, concurrent=2)(x), x.mean((1, 2, 3)))


def test_one_server_gets_no_more_requests_at_a_time_than_it_should():
    lock, now, most = threading.Lock(), [0], [0]

    def counts(images: Tensor) -> tuple[int, object]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1
        return good(images)

    with serving(counts) as (url,):
        remote(url, batch=1)(torch.rand(6, 1, 4, 4))
    assert most == [1]


def test_what_one_that_is_away_had_goes_to_the_others_with_a_warning():
    x = (torch.rand(9, 1, 4, 4) * 255).round() / 255
    with serving(good, busy, good) as urls:
        reward = remote(urls, batch=1)
        with pytest.warns(UserWarning, match=rf"{urls[1]} cannot be reached \(503.*its pictures go to http") as told:
            torch.testing.assert_close(reward(x), x.mean((1, 2, 3)))
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is left alone for a while
            torch.testing.assert_close(reward(x), x.mean((1, 2, 3)))


def test_one_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    state = {"code": 503}
    asked = []

    def comes_back(images: Tensor) -> tuple[int, object]:
        asked.append(len(images))
        return (200, good(images)[1]) if state["code"] == 200 else busy(images)

    with serving(comes_back, good) as urls:
        reward = remote(urls, batch=1)
        with pytest.warns(UserWarning, match="cannot be reached"):
            reward(torch.rand(4, 1, 4, 4))
        state["code"], before = 200, len(asked)
        monkeypatch.setattr(servers, "REST", 0.0)
        reward(torch.rand(4, 1, 4, 4))
        assert len(asked) > before


@pytest.mark.filterwarnings("ignore:reward 'remote'")
def test_where_all_are_away_one_line_says_so_of_each_and_the_next_call_asks_again():
    state = {"away": True}

    def maybe(images: Tensor) -> tuple[int, object]:
        return busy(images) if state["away"] else good(images)

    x = (torch.rand(5, 1, 4, 4) * 255).round() / 255
    with serving(maybe, maybe) as urls:
        reward = remote(urls, batch=1)
        with pytest.raises(RewardError, match="none of its 2 servers answers") as error:
            reward(x)
        assert all(url in str(error.value) for url in urls) and str(error.value).isprintable()
        state["away"] = False
        torch.testing.assert_close(reward(x), x.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((400, {"error": "no GPU"}), "answered 400"),
        ((200, {"scores": ["x"]}), "a text as a score"),
        ((200, 3), "answered a number"),
    ],
)
def test_a_wrong_answer_names_its_server_and_goes_nowhere_else(said: tuple[int, object], words: str):
    asked = []

    def other(images: Tensor) -> tuple[int, object]:
        asked.append(1)
        return good(images)

    with serving(lambda _: said, other) as urls:
        with pytest.raises(RewardError, match=words) as error:
            remote(urls)(torch.rand(1, 1, 4, 4))
        assert urls[0] in str(error.value) and not asked


def test_a_run_whose_servers_die_keeps_its_batches_and_goes_on(tmp_path: Any, monkeypatch: Any, capsys: Any):
    monkeypatch.chdir(tmp_path)
    state: dict[str, float] = {"left": 10**9}

    def dies(images: Tensor) -> tuple[int, object]:
        state["left"] -= len(images)
        return good(images) if state["left"] >= 0 else busy(images)

    words = ["label=Bag", "n=3", "batch_size=1", "method=feynman_kac", "method.particles=4", "method.steps=2", "judge=null"]
    with serving(dies, dies) as urls:
        words += ["reward=remote", f"reward.url=[{','.join(urls)}]", "reward.pause=0.01", "reward.retries=0"]
        assert cli.main(["steer", *words, "out=whole"]) == 0, capsys.readouterr().err
        state["left"] = 14
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli.main(["steer", *words, "out=cut"]) == 2
        assert "none of its 2 servers answers" in capsys.readouterr().err
        state["left"] = 10**9
        assert cli.main(["steer", *words, "out=cut"]) == 0, capsys.readouterr().err
        done = 10**9 - state["left"]
        assert done < 3 * 4 * 3  # a batch was there
    whole, cut = (steerfm.SteeringResult.load(tmp_path / name) for name in ("whole", "cut"))
    assert torch.equal(whole.samples, cut.samples) and torch.equal(whole.rewards, cut.rewards)


@pytest.mark.parametrize("url", [["http://localhost:1", "http://localhost:1"]])
def test_an_address_twice(url: list[str]):
    with pytest.raises(RewardError, match=r"names localhost:1 twice: concurrent=2"):
        steerfm.reward("remote", url=url)


@pytest.mark.parametrize("value", [0, 1.5, "2", True])
def test_requests_at_a_time_are_a_whole_number(value: object):
    with pytest.raises(RewardError, match="concurrent="):
        steerfm.reward("remote", url="http://localhost:1", concurrent=value)
