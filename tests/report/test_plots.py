"""Plots draw what is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from steerfm.report.pictures import picture_grid
from steerfm.report.plots import cost_plot, curves_plot, is_straight, smooth
from steerfm.report.style import DPI, WIDTH
from steerfm.report.trace import trace_plot


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def trace() -> dict[str, torch.Tensor]:
    value = torch.rand(5, 4, 3)
    value[0], value[1, 0, 0] = float("nan"), -torch.inf
    return {
        "t": torch.linspace(0, 1, 5),
        "value": value,
        "ess": torch.rand(5, 4),
        "resampled": torch.rand(5, 4) < 0.5,
        "guidance_ratio": torch.rand(5, 4, 3),
        "lookaheads": torch.rand(5, 4, 1, 8, 8),
        "rewards": torch.rand(4, 3),
    }


@pytest.mark.parametrize(
    "keys", [(), ("t",), ("rewards",), ("lookaheads",), ("ess", "rewards"), ("t", "resampled"), "all"], ids=str
)
def test_trace_draws_what_is_there(tmp_path, keys):
    full = trace()
    part = full if keys == "all" else {key: full[key] for key in keys}
    assert read(trace_plot(part, tmp_path / "trace.png")).size > 100


def test_trace_skips_guidance_where_there_is_none(tmp_path):
    full = {key: value for key, value in trace().items() if key in ("t", "value")}
    plain = read(trace_plot(full, tmp_path / "a.png"))
    for empty in (torch.zeros(5, 4, 3), torch.full((5, 4, 3), float("nan"))):
        assert (read(trace_plot(full | {"guidance_ratio": empty}, tmp_path / "b.png")) == plain).all()


def test_trace_refuses_another_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"trace\['ess'\] has 4 steps, t has 5"):
        trace_plot(trace() | {"ess": torch.rand(4, 4)}, tmp_path / "trace.png")


def test_curves(tmp_path):
    steps = torch.arange(100)
    columns = {"loss": (steps, torch.exp(-steps / 10)), "bad": (steps, steps * float("nan")), "few": ([1, 2], [3, 4])}
    assert curves_plot(columns, tmp_path / "curves.png").stat().st_size > 1000
    assert np.allclose(smooth(np.ones(50)), 1)
    with pytest.raises(ValueError, match="no curves"):
        curves_plot({}, tmp_path / "curves.png")


def test_curves_that_say_nothing_are_left_out(tmp_path):
    steps = np.arange(0, 50, 5)
    loss, level, counter, seconds = np.exp(-steps / 20), 0 * steps, 64.0 * steps, steps + 0.3 * np.sin(steps)
    assert [is_straight(steps, curve) for curve in (loss, level, counter, seconds)] == [False, True, True, True]
    assert not is_straight([0, 1], [0, 1]) and not is_straight([], [])
    one = read(curves_plot({"loss": (steps, loss)}, tmp_path / "a.png"))
    two = read(curves_plot({"skipped": (steps, level), "loss": (steps, loss), "calls": (steps, counter)}, tmp_path / "b.png"))
    assert (one == two).all()
    assert curves_plot({"skipped": (steps, level)}, tmp_path / "c.png").stat().st_size > 1000


def test_cost_plot_draws_every_method_and_names_the_best(tmp_path):
    lines = {f"m{i}": [(8, i + 1.0, 0.1), (64, i + 0.5, 0.1)] for i in range(9)} | {"best_of_n": [(8, 20.0, 0.0)], "none": []}
    path = cost_plot(lines, tmp_path / "cost.png", "a target", "error", lower_is_better=True)
    assert read(path).shape[1] == round(WIDTH * DPI)
    with pytest.raises(ValueError, match="no lines"):
        cost_plot({"none": []}, tmp_path / "x.png", "a target", "error")


@pytest.mark.parametrize("words", range(8, 20))
def test_long_titles_and_headings_of_grids_end_before_the_edge(tmp_path, words):
    """They are bold, and wider than plain text of the same size."""
    text = "Below each picture: the judge's probability of the class. No method sees the judge, here or there. " * 2
    text = " ".join(text.split()[:words])
    pictures, labels = torch.zeros(2, 6, 1, 28, 28), ["base", "best of 16"]
    file = picture_grid(pictures, tmp_path / "a.png", labels, title=text, headings={1: text})
    assert (read(file)[:, -6:] > 250).all()


def test_a_curve_of_one_point_is_left_out(tmp_path):
    rising, alone = ([0, 1, 2], [1.0, 3.0, 2.0]), ([5], [1.0])
    both = read(curves_plot({"loss": rising, "watch": alone}, tmp_path / "a.png"))
    assert (both == read(curves_plot({"loss": rising}, tmp_path / "b.png"))).all()
    assert read(curves_plot({"watch": alone}, tmp_path / "c.png")).size  # better than nothing
