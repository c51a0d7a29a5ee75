"""Plots can be read on a phone, and say what their marks are."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from kinds import sure
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from steerfm.report.page import STYLE
from steerfm.report.palette import NAMES
from steerfm.report.pictures import picture_grid
from steerfm.report.plots import cost_plot, curves_plot, frontier_plot, jumps_plot
from steerfm.report.style import number
from steerfm.report.trace import trace_plot

PHONE = 390 - 2 * 16  # a page leaves a rem on both sides


def steered(n: int, k: int = 5, steps: int = 12, size: int = 8) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=stream)  # noqa: E731
    t = torch.linspace(0, 1, steps)
    return {
        "t": t, "value": 1e4 * rand(steps, n, k), "ess": rand(steps, n), "resampled": rand(steps, n) < 0.3,
        "guidance_ratio": 1e-5 * rand(steps, n, k), "lookaheads": rand(steps, n, 3, size, size), "rewards": rand(n, k),
    }  # fmt: skip


def curve(values) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values)) * 1000, np.asarray(values, float)


CURVES = {
    "train/gradient_norm": curve(np.geomspace(4, 0.01, 300)), "tiny": curve([1e-7, 3e-7, 2e-7]), "large": curve([1e6, 3e8]),
    "held_out": curve([-1, -2]), "one": curve([1.0]), "narrow": curve([1000.01, 1000.02]),
    "long_name_of_a_number": curve([0, 1]),
}  # fmt: skip
COSTS = {name: [(8 * 4**i, 10.0 ** (place / 9 - i), 0.1) for i in range(4)] for place, name in enumerate(NAMES[:28])}
COSTS |= {"best_of_n": [(8, 3.0, 0.1), (512, 4.0, 0.2)], "unsteered, 4 jumps": [(4, 0.5, 0.1)], "my own": [(8, 1.0, 0.1)]}
POINTS = {"base, 4 jumps": (0.1, 0.2), "base, 4 jumps, best of 16": (2.0, 0.4), "tuned (direct), 4 jumps": (0.3, 0.1)}
PATHS = {"tuning (direct)": [(0.1, 0.2), (0.2, 0.3)], "distil": [(0.2, 0.3)]}
MEASURES = {"kernel distance": ([-5.4e-4, -7.6e-4, 1e-5, 0.0], -6e-5, 1.8e-4)}
MEASURES |= {f"Fréchet distance, {name}": ([3.0, 2.0, 4.0, 1.0], 0.5, 0.1 if name else None) for name in ("", "a", "judge's")}
PLOTS = {
    "trace": lambda path: trace_plot(steered(3), path, "das"),
    "trace of a sample": lambda path: trace_plot(steered(1, 1, 2), path),
    "trace of prompts": lambda path: trace_plot(
        steered(8), path, "das", [f"a prompt of many words, {i // 2}" for i in range(8)]
    ),
    "trace of too many prompts": lambda path: trace_plot(steered(9), path, names=[f"prompt {i}" for i in range(9)]),
    "curves": lambda path: curves_plot(CURVES, path),
    "a curve": lambda path: curves_plot({"loss": curve([1, 2])}, path),
    "cost": lambda path: cost_plot(COSTS, path, "a title that is long, " * 5, "held-out reward"),
    "error": lambda path: cost_plot(COSTS, path, "line", "distance to the exact target", lower_is_better=True),
    "cost of one": lambda path: cost_plot({"funnel": [(8, 4.0, 0.1)]}, path, "line", "reward", lower_is_better=True),
    "frontier": lambda path: frontier_plot(POINTS, PATHS, path, "Fréchet distance to the base's samples", "held-out reward"),
    "jumps": lambda path: jumps_plot([1, 4, 2, 8], MEASURES, path, "Euler, 64 steps"),
}


@pytest.fixture
def figure(monkeypatch):
    """Draws something and gives its figure."""
    figures: list[Figure] = []
    monkeypatch.setattr("steerfm.report.style.files.whole", contextlib.nullcontext)

    def render(fig, *_, **__):
        FigureCanvasAgg(fig).draw()
        figures.append(fig)

    monkeypatch.setattr(Figure, "savefig", render)
    return lambda draw: (draw("x.png"), figures.pop())[1]


def texts(fig: Figure) -> list[Text]:
    """All texts that can be seen."""
    return [text for text in fig.findobj(Text) if text.get_text().strip() and text.get_visible() and shown(text, fig)]


def shown(text: Text, fig: Figure) -> bool:
    """Ticks beyond the end of an axis are made and not drawn."""
    ticks = {label for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for label in every_label(axis)}
    axes: list[Any] = [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]  # their own list of ticks is not public
    return text not in ticks or text in {tick.label1 for axis in axes for tick in axis._update_ticks()}


def every_label(axis: Axis) -> list[Text]:
    return [label for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_texts_are_eleven_pixels_high_on_a_phone_and_inside(figure, name):
    fig = figure(PLOTS[name])
    width, height = fig.get_size_inches() * fig.dpi
    found = texts(fig)
    assert found
    for text in found:
        pixels = float(text.get_fontsize()) / 72 * fig.dpi * PHONE / width
        assert pixels >= 11, text.get_text()
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text.get_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_ticks_are_written_as_people_do_and_apart(figure, name):
    fig = figure(PLOTS[name])
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = [tick.label1 for tick in axis._update_ticks() if tick.label1.get_visible()]
            written = [label.get_text() for label in labels if label.get_text()]
            assert not [text for text in written if re.search(r"10\^|\u00d7|\$|e[+-]?\d", text)]
            assert len({*written}) == len(written) or len(written) < 2
            assert not axis.get_offset_text().get_text()
            boxes = [label.get_window_extent() for label in labels if label.get_text()]
            assert not any(box.overlaps(other.get_window_extent()) for box in boxes for other in fig.axes if other is not ax)
            assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_no_text_lies_on_another(figure, name):
    fig = figure(PLOTS[name])
    found = [text for text in texts(fig) if not text.get_text().isdigit()]  # numbers of points lie where the points do
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    for i, (first, a) in enumerate(boxes):
        for second, b in boxes[i + 1 :]:
            width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert width <= 1 or height <= 2, (first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_every_mark_is_in_the_key(figure, name):
    """Colour and marker of each line of each axes; the key says them, or the panel has nothing else in it."""
    fig = figure(PLOTS[name])
    handles = [h for key in fig.legends for h in key.legend_handles]
    said = {to_hex(h.get_color()) for h in handles}
    for ax in fig.axes:
        lines = [line for line in ax.lines if len(line.get_xdata()) and line.get_marker() not in ("_", "|")]
        alone = len({to_hex(line.get_color()) for line in lines}) == 1 and "curve" in name
        for line in lines:
            assert alone or to_hex(line.get_color()) in said, (ax.get_title(loc="left"), line.get_color())


@pytest.mark.parametrize("name", PLOTS)
def test_axes_say_what_they_show(figure, name):
    fig = figure(PLOTS[name])
    assert all(ax.get_title(loc="left") for ax in fig.axes)
    assert any(ax.get_xlabel() for ax in fig.axes)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1e-5, "0.00001"), (0.05, "0.05"), (512.0, "512"), (20000.0, "20,000"), (2.5e6, "2.5M")]
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize("columns", [1, 3, 8, 10])
@pytest.mark.parametrize("labels", [False, True])
def test_captions_of_a_grid_are_eleven_pixels_high_on_a_phone(figure, columns, labels):
    names = ["base, 4 jumps, best of 16", "weighted_diamond"] if labels else []
    captions = [[f"{-i / 7:.3g}" for i in range(columns)] for _ in range(2)]
    fig = figure(lambda path: picture_grid(torch.rand(2, columns, 1, 28, 28), path, names, captions, "a title of some words"))
    width, height = fig.get_size_inches() * fig.dpi
    least = 16 * float(sure(re.search(r"min-width: min\((\d+)rem", STYLE))[1])  # then it scrolls
    for text in texts(fig):
        assert float(text.get_fontsize()) / 72 * fig.dpi * min(1, least / width) >= 11, text.get_text()
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text.get_text()


def test_a_page_never_scrolls_sideways():
    """What is wider than the page scrolls by itself, or shrinks."""
    assert re.search(r"img \{[^}]*max-width: 100%", STYLE)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", STYLE) and re.search(r"pre \{[^}]*overflow-x: auto", STYLE)
