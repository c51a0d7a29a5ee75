"""The lists fit a terminal of 80 columns, and name what explains more."""

from __future__ import annotations

import pytest

from steerfm import cli, zoo
from steerfm.cli.console import console


@pytest.mark.parametrize(("what", "lines"), [("models", 25), ("rewards", 115), ("methods", 130), ("bench", 60)])
def test_a_list_fits_a_terminal(capsys, monkeypatch, what, lines):
    monkeypatch.setattr(console, "_width", 80)
    assert cli.main([what]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= lines and max(len(line.rstrip()) for line in shown if "steerfm " not in line) <= 80


def test_every_model_shows_its_card(capsys):
    for name, head in zoo.models().items():
        assert cli.main(["models", name]) == 0
        shown = capsys.readouterr().out
        assert name in shown and head["kind"] in shown and all(key.split("/")[-1] in shown for key in head["card"]["metrics"])
    assert cli.main(["models", "fashoin"]) == 2
    assert "did you mean 'fashion'" in capsys.readouterr().err
