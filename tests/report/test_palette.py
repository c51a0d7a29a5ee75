"""A method looks the same in every plot."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from steerfm import finetuning, steering
from steerfm.report.palette import FIXED, NAMES, look
from steerfm.report.plots import cost_plot

METHODS = [*steering.METHODS, *finetuning.METHODS]
SEES = {  # Viénot 1999, linear RGB: what is left without red, and without green
    "red": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "green": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def lab(colour: str, without: str | None) -> np.ndarray:
    """CIE Lab of a colour as a reader sees it to whom a cone is missing."""
    srgb = np.array(to_rgb(colour))
    rgb = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    if without:
        rgb = (np.array(SEES[without]) @ rgb).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_method_has_a_look_of_its_own():
    assert {*METHODS} <= {*NAMES, *FIXED} and len({*NAMES}) == len(NAMES)
    looks = [look(name) for name in [*NAMES, *FIXED]]
    assert len({(a.colour, a.marker) for a in looks}) == len(looks)


@pytest.mark.parametrize("without", [None, "red", "green"])
def test_methods_differ_for_those_who_miss_a_cone(without):
    """Two methods differ in the marker, or their colours are far apart."""
    for a, b in itertools.combinations(map(look, METHODS), 2):
        assert a.marker != b.marker or np.linalg.norm(lab(a.colour, without) - lab(b.colour, without)) > 10


@pytest.mark.parametrize("name", [*NAMES, *FIXED])
def test_colours_stand_out_from_white(name):
    assert lab(look(name).colour, None)[0] < 66


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("tuned, 4 jumps", "tuned"), ("base, 1 jump", "base"), ("unsteered, 4 jumps", "base"), ("steered (funnel)", "funnel"),
        ("base, 4 jumps, best of 16", "best_of_n"), ("best of 64, 1 jump", "best_of_n"), ("best of n", "best_of_n"),
        ("funnel: 8 particles", "funnel"), ("fmrg_j (16 steps)", "fmrg_j"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_method_leaves_its_colour(label, name):
    assert look(label).colour == look(name).colour


def test_variants_of_a_method_can_be_told_from_it_and_from_each_other():
    labels = ["feynman_kac", "feynman_kac, denoise", "feynman_kac, rollout", "feynman_kac (no guidance)"]
    assert len({look(label) for label in labels}) == len(labels)
    assert len({look(label).marker for label in labels if label != "feynman_kac"} & {look("feynman_kac").marker}) == 0


def test_own_labels_have_looks_of_their_own_that_no_method_has():
    labels = [f"mine {number}" for number in range(40)]
    taken = {(look(name).colour, look(name).marker) for name in [*NAMES, *FIXED]}
    looks = {label: look(label) for label in labels}
    assert not taken & {(a.colour, a.marker) for a in looks.values()}
    assert len(set(looks.values())) > 20  # 320 there are
    assert looks == {label: look(label) for label in reversed(labels)}


def drawn(monkeypatch, tmp_path, lines) -> dict[str, tuple[str, str]]:
    """Label -> (colour, marker) in the legend of a cost plot."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda fig, *_, **__: figures.append(fig))
    monkeypatch.setattr("steerfm.report.style.files.whole", lambda path: __import__("contextlib").nullcontext(path))
    cost_plot(lines, tmp_path / "x.png", "a problem", "reward")
    legend = figures[0].axes[0].get_legend() or figures[0].legends[0]
    found = {}
    for handle, text in zip(legend.legend_handles, legend.get_texts()):
        line = handle[0] if isinstance(handle, tuple) else getattr(handle, "lines", [handle])[0]
        found[text.get_text()] = (line.get_color(), line.get_marker())
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_plot_draws_a_method_as_any_other_plot_does(monkeypatch, tmp_path, seed):
    """Whatever the subset, the order and the rank."""
    stream = random.Random(seed)
    names = stream.sample([*METHODS, "my own", "another", "funnel, wide"], 6)
    lines = {name: [(8, stream.random(), 0.1), (64, stream.random(), 0.1)] for name in names}
    found = drawn(monkeypatch, tmp_path, lines)
    for name in names:
        assert found[name] == (look(name).colour, look(name).marker)
