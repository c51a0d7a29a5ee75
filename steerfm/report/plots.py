"""Plots of training curves, of methods against cost, and of a map against its number of jumps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steerfm.report.palette import look, subject
from steerfm.report.style import (
    DPI,
    INK,
    TEXT,
    WIDTH,
    add_key,
    array,
    count_by_factors,
    mark,
    name_axes,
    new_figure,
    prepare,
    save_figure,
)

OTHERS = "#c9ced6"
"""Colour of the lines that the legend does not name."""
LABELLED_METHODS = 6
"""Number of methods that the legend of a cost plot names, besides the baseline and the default."""
DEFAULT = "funnel"


def curves_plot(columns: Mapping[str, tuple[Any, Any]], path: str | Path) -> Path:
    """Draw training curves, one panel each.

    A long curve is drawn twice: raw and smoothed. A positive curve gets a logarithmic axis if its trend spans more than a
    factor of 30. Curves that are flat or straight, as counters are, or have one point only, say nothing and are left out.

    Args:
        columns: name -> (steps, values), both (m,). Values that are not finite are skipped.
        path: png file to write.

    Returns:
        Path of the png.

    Raises:
        ValueError: there are no curves.
    """
    if not columns:
        raise ValueError("no curves to draw")
    curves = {name: pair for name, pair in columns.items() if np.isfinite(array(pair[1]).astype(float)).sum() > 1} or columns
    columns = {name: pair for name, pair in curves.items() if not is_straight(*pair)} or curves
    fig, panels = _panels(len(columns), 1.75)
    long = False
    for ax, (name, pair) in zip(panels, columns.items()):
        steps, values = (array(part).astype(float).ravel() for part in pair)
        keep = np.isfinite(values)
        long |= _curve(ax, readable(name), steps[keep], values[keep])
    for ax in panels[-2:]:
        name_axes(ax, "step")
    if long:
        tone = look("value").colour
        trend = Line2D([], [], color=tone, linewidth=1.6, label="mean over a twentieth")
        marks = [Line2D([], [], color=tone, alpha=0.3, linewidth=0.8, label="as logged"), trend]
        _key_below(fig, marks)
    return save_figure(fig, path)


def is_straight(steps: Any, values: Any) -> bool:
    """Whether a curve of at least three points is a line, level or not, to 2% of its range."""
    steps, values = (array(part).astype(float).ravel() for part in (steps, values))
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if len(values) < 3 or steps[0] == steps[-1]:
        return False
    line = np.interp(steps, steps[[0, -1]], values[[0, -1]])
    return bool(np.abs(values - line).max() <= 0.02 * np.ptp(values))


def _curve(ax: Any, title: str, steps: np.ndarray, values: np.ndarray) -> bool:
    """Draw one curve; return whether it was long enough to be smoothed."""
    tone, long = look("value").colour, len(values) > 40
    trend = smooth(values) if long else values
    wide = len(values) > 0 and values.min() > 0 and trend.max() > 30 * trend.min()
    title, factor = (f"{title} (log scale)", 1) if wide else in_parts(title, values)
    values, trend = factor * values, factor * trend
    prepare(ax, title, WIDTH / 2 - GUTTER)
    if long:
        ax.plot(steps, values, color=tone, alpha=0.3, linewidth=0.8)
    ax.plot(steps, trend, color=tone, linewidth=1.6, marker="" if long else "o", markersize=3)
    ax.locator_params(axis="x", nbins=3)
    if wide:
        count_by_factors(ax.yaxis, values)
    return long


def in_parts(title: str, values: Any) -> tuple[str, float]:
    """Choose a unit in which small values have few digits; return the title with that unit, and the factor to multiply by."""
    largest = max((abs(float(value)) for value in values), default=0.0)
    for unit, factor in (("thousandths", 1e3), ("millionths", 1e6), ("billionths", 1e9)):
        if largest < 5e-3 <= largest * factor:
            return f"{title}, in {unit}", factor
    return title, 1


def readable(name: str) -> str:
    """Return the name of a logged number in words: ``train/gradient_norm`` becomes "gradient norm, training"."""
    where, _, what = name.rpartition("/")
    words = what.replace("_", " ")
    return f"{words}, {where.replace('train', 'training', 1)}" if where else words


def cost_plot(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | Path,
    title: str,
    ylabel: str,
    lower_is_better: bool = False,
    baseline: str = "best_of_n",
) -> Path:
    """Draw the result of each method against its cost.

    The legend names the baseline, the default method and the six methods that are best at their largest cost. The others are
    grey.

    Args:
        lines: method -> (evaluations, mean, half-width of its interval), by rising cost.
        path: png file to write.
        title: title of the plot.
        ylabel: name of the result.
        lower_is_better: whether the result is an error, on a logarithmic axis, rather than a reward.
        baseline: name of the baseline in ``lines``.

    Returns:
        Path of the png.

    Raises:
        ValueError: there are no lines.
    """
    order = sorted((name for name in lines if lines[name]), key=lambda name: lines[name][-1][1], reverse=not lower_is_better)
    if not order:
        raise ValueError("no lines to draw")
    best = set(order[:LABELLED_METHODS])
    in_legend = [name for name in order if name in best or subject(name) in (baseline, "base", DEFAULT) or name == baseline]
    fig = new_figure(3.6)
    ax = fig.add_subplot()
    prepare(ax, title)
    for name in order:
        cost, mean, half = zip(*lines[name])
        at = look(name)
        kind = {"color": at.colour, "marker": at.marker, "linestyle": at.line, "linewidth": 1.8, "markersize": 5.5, "zorder": 3}
        if name not in in_legend:
            kind = {"color": OTHERS, "marker": "", "linewidth": 1.0, "zorder": 1}
        ax.errorbar(cost, mean, half, capsize=2, elinewidth=1, **kind)
    points = [point for name in order for point in lines[name]]
    count_by_factors(ax.xaxis, [cost for cost, _, _ in points])
    if lower_is_better:
        count_by_factors(ax.yaxis, [mean for _, mean, _ in points])
    better = "lower is better, log scale" if lower_is_better else "higher is better"
    name_axes(ax, "network evaluations per output (log scale)", f"{ylabel}\n({better})")
    marks = [mark(look(name), name) for name in in_legend]
    if others := len(order) - len(in_legend):
        marks.append(Line2D([], [], color=OTHERS, linewidth=1.0, label=f"{others} other{'s' if others > 1 else ''}"))
    add_key(fig, marks, "Bars are 95% intervals. Methods, the best at their largest cost first:")
    return save_figure(fig, path)


def jumps_plot(
    jumps: Sequence[int],
    lines: Mapping[str, tuple[Sequence[float], float, float | None]],
    path: str | Path,
    many: str,
    step: str = "jump",
) -> Path:
    """Draw each metric against the number of jumps, one panel each.

    Args:
        jumps: numbers of jumps, in any order.
        lines: metric -> (its values, one for each number of jumps; its value for the reference sampler; its value for the data,
            or None).
        path: png file to write.
        many: name of the reference sampler.
        step: word for one jump.

    Returns:
        Path of the png.

    Raises:
        ValueError: there are no lines.
    """
    if not lines:
        raise ValueError("no lines to draw")
    fig, panels = _panels(len(lines), 1.75)
    order = sorted(range(len(jumps)), key=lambda i: jumps[i])
    x = [jumps[i] for i in order]
    map_, reference_, data_ = look("value").colour, look("base").colour, look("data").colour
    for ax, (name, (values, reference, data)) in zip(panels, lines.items()):
        title, factor = in_parts(name, [*values, reference, *([] if data is None else [data])])
        prepare(ax, title, WIDTH / 2 - GUTTER)
        ax.plot(x, [factor * values[i] for i in order], color=map_, linewidth=1.6, marker="o", markersize=4)
        ax.axhline(factor * reference, color=reference_, linewidth=1.4, linestyle="--")
        if data is not None:
            ax.axhline(factor * data, color=data_, linewidth=1.6, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(value) for value in x])
        ax.minorticks_off()
    for ax in panels[-2:]:
        name_axes(ax, f"{step}s")
    marks = [
        Line2D([], [], color=map_, marker="o", markersize=4, label=f"the map, by its {step}s"),
        Line2D([], [], color=reference_, linestyle="--", label=many),
    ]
    if any(data is not None for _, _, data in lines.values()):
        marks.append(Line2D([], [], color=data_, linestyle=":", label="the data"))
    _key_below(fig, marks)
    return save_figure(fig, path)


def frontier_plot(
    points: Mapping[str, tuple[float, float]],
    paths: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Draw a trade-off: points, and the paths that runs took to them.

    Args:
        points: name -> (x, y); the points are numbered in the plot and in the legend.
        paths: name -> (x, y) in order. A path is drawn as a line with an open marker at its start; a path of one point as that
            point.
        path: png file to write.
        xlabel: name of the x axis.
        ylabel: name of the y axis.

    Returns:
        Path of the png.
    """
    fig = new_figure(3.6)
    ax = fig.add_subplot()
    prepare(ax, f"{ylabel} against {xlabel}")
    marks = []
    for name, line in paths.items():
        at, (x, y) = look(name), zip(*line)
        style, face = (at.line, "white") if len(line) > 1 else ("none", at.colour)
        ax.plot(x, y, color=at.colour, linestyle=style, linewidth=1.2, marker=".", markersize=4, zorder=1)
        ax.plot(x[:1], y[:1], color=at.colour, marker=at.marker, markersize=7, markerfacecolor=face, zorder=2)
        marks.append(mark(at, name, width=1.2, markersize=7, linestyle=style, markerfacecolor=face))
    for i, (name, (x, y)) in enumerate(points.items()):
        at = look(name)
        ax.plot([x], [y], linestyle="none", marker=at.marker, markersize=8, color=at.colour, zorder=3)
        ax.annotate(str(i + 1), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=TEXT, color=INK)
        marks.append(mark(at, f"{i + 1} {name}", linestyle="none", size=8))
    name_axes(ax, xlabel, ylabel)
    began = any(len(line) > 1 for line in paths.values())
    add_key(fig, marks, "Open markers show where a run started, and dots its course." if began else "")
    return save_figure(fig, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth values (m,) by a centred moving average over about a twentieth of the curve, with shorter windows at its ends."""
    half = max(2, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


# --- small multiples -------------------------------------------------------------------------------------------------
GUTTER, FOOT = 0.84, 0.75
"""Inches to the left of a panel, for ticks, and below all panels, for the axis label and the legend."""


def _panels(count: int, each: float) -> tuple[Figure, list[Any]]:
    """Return a figure with ``count`` panels, two in a row, each ``each`` inches high without its title.

    Positions are computed here because a layout engine takes seconds for many panels.
    """
    across = min(2, count)
    down = -(-count // across)
    height = down * (each + 0.75) + FOOT
    fig = Figure(figsize=(WIDTH, height), dpi=DPI)
    wide = (WIDTH - 0.1 - GUTTER * across) / across
    axes = []
    for i in range(count):
        row, column = divmod(i, across)
        x, top = GUTTER - 0.01 + column * (wide + GUTTER), 0.45 + row * (each + 0.75)
        axes.append(fig.add_axes((x / WIDTH, 1 - (top + each) / height, wide / WIDTH, each / height)))
    return fig, axes


def _key_below(fig: Figure, marks: Sequence[Line2D]) -> None:
    fig.legend(
        handles=list(marks), loc="lower left", ncols=3, fontsize=TEXT, frameon=False, labelcolor=INK, columnspacing=1.0,
        handlelength=1.6, handletextpad=0.5,
    )  # fmt: skip
