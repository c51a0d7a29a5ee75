"""The gallery has every method, its commands can be read, and its pictures are there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image

from steerfm import cli, finetuning
from steerfm.steering import METHODS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "gallery.md").read_text()


@pytest.fixture(scope="module")
def gallery():
    return runpy.run_path(str(DOCS / "gallery.py"))


def test_the_page_is_current(gallery):
    assert gallery["page"]() == PAGE, "run python docs/gallery.py --page"


def test_every_method_is_there(gallery):
    headings = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    steered = [name for name in headings if not name.endswith(", fine-tuning")]
    assert sorted(steered) == sorted(set(METHODS) - {"steering"})  # which is the parts themselves
    tuned = {name.removesuffix(", fine-tuning") for name in headings} - set(steered)
    assert {gallery["family"](name) for name in finetuning.METHODS} == tuned
    assert [name for name in finetuning.METHODS if name not in tuned and f"`{name}`" not in PAGE] == []


@pytest.mark.slow
def test_its_commands_can_be_read(capsys, monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    commands = re.findall(r"```bash\n(.+)\n```", PAGE)
    assert len(commands) == len(re.findall(r"^### ", PAGE, re.MULTILINE))
    for command in commands:
        assert cli.main([*shlex.split(command)[1:], "--show"]) == 0, capsys.readouterr().err


def test_its_pictures_are_small_and_used():
    files = sorted((DOCS / "gallery").glob("*.png"))
    assert sum(file.stat().st_size for file in files) < 600_000
    assert {file.name for file in files} == set(re.findall(r"\(gallery/([\w-]+\.png)\)", PAGE))
    for file in files:
        with Image.open(file) as picture:
            assert picture.width <= 410  # four pictures, as wide as a phone
