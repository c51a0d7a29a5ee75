"""How many samples of the base a fine-tuning is measured against: a setting, since a large model takes long for them."""

from __future__ import annotations

import json

import pytest
import torch

import steerfm
from steerfm import cli
from steerfm.cli.config import FinetuneConfig, WatchConfig
from steerfm.cli.finetune import build_panel
from steerfm.finetuning.base import chain
from steerfm.rewards import as_reward

REWARD = as_reward(lambda x: x.flatten(1).mean(1))


def drawn(flow_map: steerfm.FlowMap, n: int, label: str | None = None, **watch: int) -> tuple[int, int]:
    """(samples of the base that are drawn to compare with, network calls that a judgement of n then takes)."""
    panel = build_panel(flow_map, REWARD, None, FinetuneConfig(label=label, watch=WatchConfig(**watch)), n)
    with steerfm.cost.Ledger() as ledger:
        panel.measure(chain(1)(flow_map))
    return panel.support.n, ledger.cost.evaluations


@pytest.mark.parametrize(
    ("n", "watch", "expected"),
    [(4, {}, 300), (400, {}, 400), (4, {"base": 6}, 6), (9, {"base": 6}, 9), (4, {"base": 500}, 500), (4, {"base": 40}, 40)],
)
def test_without_classes(n, watch, expected):
    flow_map = steerfm.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], [[0.2, 0.2], [0.2, 0.2]]).flow_map(steps=2)
    assert drawn(flow_map, n, **watch) == (expected, n + expected * flow_map.steps)


@pytest.mark.parametrize(("watch", "expected"), [({}, 500), ({"base": 6}, 40), ({"base": 60}, 60)])
def test_of_classes(watch, expected, monkeypatch):
    flow_map = steerfm.load("fashion")
    monkeypatch.setattr(flow_map, "average_velocity", lambda x, s, t, cond: torch.zeros_like(x))
    assert drawn(flow_map, 4, "Bag", **watch)[0] == expected


@pytest.mark.slow
def test_a_short_run_on_few_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["reward=brightness", "label=Bag", "judge=null", "optimizer.steps=1", "batch_size=2", "watch.n=4", "distil.steps=0"]
    assert cli.main(["finetune", *words, "watch.base=8", "out=run"]) == 0
    for reading in json.loads((tmp_path / "run" / "result.json").read_text())["readings"].values():
        assert 0 <= reading["support"] <= 1 and reading["reward"] > 0
    capsys.readouterr()
    assert cli.main(["finetune", *words, "watch.base=5", "out=other"]) == 2
    assert "watch.base=5" in capsys.readouterr().err
