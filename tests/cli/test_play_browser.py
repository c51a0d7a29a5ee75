"""The playground in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerfm.cli.config import PlayConfig
from steerfm.cli.loading import load
from steerfm.cli.playground import Playground

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'steerfm[play]'")
driver = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium, or its path in CHROMIUM"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # those of the server's packages
]
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
OWN = """
import time
from pathlib import Path

calls = 0

def held(images):
    global calls
    calls += 1
    while calls > 2 and (Path(__file__).parent / "hold").exists():  # the third step
        time.sleep(0.02)
    return images.mean((1, 2, 3))

def broken(images):
    raise KeyError("no such weight")
"""
SMALL = """() => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), small = []
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), parent = walker.currentNode.parentElement
        if (!text || !parent.checkVisibility() || ["STYLE", "SCRIPT"].includes(parent.tagName)) continue
        const size = parseFloat(getComputedStyle(parent).fontSize)
        if (size < 11) small.push(`${size} px: ${text}`)
    }
    return small
}"""
"""Texts below 11 px."""
MINUTE = 60_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the rewards; while it has a file of the name hold, those runs stand still that `held` scores."""
    return tmp_path_factory.mktemp("play")


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    from steerfm.cli.pages import Visits, page, serve

    (folder / "own.py").write_text(OWN)
    rewards = f"reward=[{{name: brightness}}, {{name: '{folder}/own.py:held'}}, {{name: '{folder}/own.py:broken'}}]"
    keys = ["model=fashion", rewards, "method=feynman_kac", "method.particles=4", "method.steps=4", "n=2", "strength=1000"]
    play = Playground(load(PlayConfig, None, keys), folder / "runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = page(play, Visits())
    yield serve(demo, play, port)[0]
    demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS.split()])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address) -> Iterator[Any]:
    """Opens the page, with one reward, in a window of its own; nothing may be asked for elsewhere, and no script may fail."""
    contexts, wrong = [], []

    def visit(reward: str = "brightness", width: int = 1280) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(MINUTE)
        page.on("request", lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#steer:enabled")
        choose(page, "Reward", reward)
        for number in (2, 3):
            choose(page, f"Reward {number}", "none")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def choose(page: Any, field: str, value: str) -> None:
    """Choose in a field with a list, as by hand."""
    box = page.get_by_label(field, exact=True)
    box.click()
    page.get_by_role("option", name=re.compile(rf"{re.escape(value)}$")).first.click()


def steer(page: Any) -> None:
    page.click("#steer")


def status(page: Any, text: str) -> None:
    """Wait for a line of the status."""
    page.locator("#status").get_by_text(text).wait_for()


def test_a_click_path_through_every_tab(visit, tmp_path):
    page = visit()
    choose(page, "Class", "Bag")
    steer(page)
    status(page, "Done in")
    tab = page.get_by_role("tabpanel")
    assert page.get_by_role("tab", name="Result").get_attribute("aria-selected") == "true"
    assert tab.get_by_alt_text("base, output 2").is_visible() and tab.get_by_alt_text("steered, output 2").is_visible()
    for words in ("reward: brightness", "held-out judge: judge", "ESS", "cost: 32 forwards"):
        tab.get_by_text(words).first.wait_for()
    assert page.locator("p.warning").is_visible()  # 1000 is too much for four particles
    for button, ending in (("Download the picture", ".png"), ("Download the run folder", ".zip")):
        with page.expect_download() as download:
            page.get_by_text(button).click()
        download.value.save_as(tmp_path / f"file{ending}")
    names = {Path(name).name for name in zipfile.ZipFile(tmp_path / "file.zip").namelist()}
    numbers = {"config.yaml", "inputs.json", "metrics.jsonl", "result.json", "samples.safetensors"}
    assert names == numbers | {"grid.png", "trace.png", "report.html"}
    assert (tmp_path / "file.png").read_bytes().startswith(b"\x89PNG")

    page.get_by_role("tab", name="Watch").click()
    assert page.locator(".sf-one img").count() == 8 and page.locator("table.walk tr").count() == 5
    page.get_by_role("tab", name="Plots").click()
    page.get_by_alt_text("value, ESS and guidance over time").wait_for()
    page.get_by_role("tab", name="Code").click()
    code = page.get_by_role("tabpanel").inner_text()
    assert "steerfm steer model=fashion label=Bag reward=brightness method=feynman_kac" in " ".join(code.split())
    assert 'label="Bag"' in code
    page.set_viewport_size({"width": 390, "height": 900})
    for name in ("Watch", "Plots", "Code", "Result"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate(SMALL) == [] and page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_choice_of_a_model_fills_the_form(visit):
    page = visit()
    choose(page, "Model", "emoji")
    page.wait_for_function("document.querySelector('textarea').value == 'a heart'")
    assert not page.get_by_label("Class", exact=True).is_visible()
    assert page.get_by_label("Reward", exact=True).input_value() == "examples/blue.py:blue"
    choose(page, "Reward", "clip")
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(text => text.placeholder.includes('prompt=...'))")


def test_a_reward_that_raises_and_a_setting_that_there_is_not(visit):
    page = visit("own.py:broken")
    steer(page)
    status(page, "no such weight")
    assert page.locator("#status p.error").is_visible()
    settings = page.get_by_label("Its settings").first
    settings.fill("of=another")
    choose(page, "Reward", "brightness")
    page.wait_for_function("settings => settings.value === ''", arg=settings.element_handle())  # another reward empties them
    settings.fill("targt=Bag")
    steer(page)
    status(page, "has no argument 'targt'")
    assert page.locator("#steer").is_enabled() and page.locator("#stop").is_disabled()


def test_only_a_choice_empties_what_was_typed(visit):
    page = visit("brightness")
    settings = page.get_by_label("Its settings").first
    settings.fill("of=another")
    waiting = []

    def hold(route):
        waiting.append(route)

    page.route("**/run/predict", hold)  # a server that takes its time
    for field in ("Reward", "Model"):
        page.get_by_label(field, exact=True).click()
        settings.click()  # away from the list without a choice
    page.wait_for_timeout(300)
    assert waiting == [] and settings.input_value() == "of=another"
    choose(page, "Reward", "own.py:broken")
    page.wait_for_function("settings => settings.value === ''", arg=settings.element_handle())
    settings.fill("of=the next")
    with page.expect_response("**/run/predict"):
        waiting.pop().continue_()
    page.wait_for_timeout(300)
    assert waiting == [] and settings.input_value() == "of=the next"


def test_users_at_once_and_a_stop_half_way(visit, folder):
    first, second, third = (visit("own.py:held") for _ in range(3))
    (folder / "hold").touch()
    for page in (first, second, third):
        steer(page)
    first.locator("figure.step").wait_for()
    status(second, "Waiting for its turn")
    status(third, "Waiting for its turn")
    second.close()  # while it waits
    third.click("#stop")  # before its turn
    first.click("#stop")  # half way
    status(first, "Stopping after this step")
    (folder / "hold").unlink()
    status(first, "Stopped after step 2 of 4")
    status(third, "Stopped")

    (folder / "hold").touch()
    steer(first)
    first.locator("figure.step").wait_for()
    steer(third)
    status(third, "Waiting for its turn")
    first.close()  # while it steers: the next one's turn comes
    (folder / "hold").unlink()
    status(third, "Done in")
    assert not list((folder / "runs").glob("*/parts/*"))
