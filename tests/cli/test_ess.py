"""The effective sample size in words: one sentence, on the terminal, on the page and in a result's repr."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
import torch

import steerfm
from steerfm import cli
from steerfm.steering.weights import effective_sample_size, ess_in_words


@pytest.mark.parametrize(("strength", "is_low"), [(0, False), (100_000, True)])
def test_terminal_page_and_repr_say_the_same(tmp_path, monkeypatch, capsys, strength, is_low):
    monkeypatch.chdir(tmp_path)
    few = ["method=best_of_n", "method.particles=16", "method.steps=1", "n=3", "judge=null", f"strength={strength}"]
    assert cli.main(["steer", "reward=brightness", *few, "out=run"]) == 0
    result = steerfm.SteeringResult.load("run")
    words = ess_in_words(result.log_weights)
    shown, page = capsys.readouterr().out, html.unescape(Path("run/report.html").read_text())
    assert ("low ESS" in words) == is_low and words["ESS"].startswith(
        f"{effective_sample_size(result.log_weights).mean():.0%} of"
    )
    for name, sentence in words.items():
        assert f"{name}: {sentence}\n" in shown and f"<dt>{name}</dt><dd>{sentence}</dd>" in page and sentence in repr(result)
    assert ("lower the strength, or use more particles or steps" in shown) == is_low


@pytest.mark.parametrize("k", [1, 4, 64])
def test_advice_stands_where_few_carry_the_weight(k):
    even, one = torch.zeros(5, k), torch.zeros(5, k).index_fill(1, torch.tensor([0]), 100.0)
    assert ess_in_words(even) == {"ESS": "100% of the particles carry the weight at the end (mean over outputs; lowest 100%)"}
    assert ("low ESS" in ess_in_words(one)) == (k > 4)
