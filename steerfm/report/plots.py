"""Plots of how a run went, and of methods against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import as_tensor

from steerfm.report.pictures import enlarged
from steerfm.report.style import BLUE, INK, ORANGE, SOFT, TEAL, array, prepare, save_figure


def trace_plot(trace: Mapping[str, Any], path: str | Path) -> Path:
    """Draw how a steered run went; only what ``trace`` holds is drawn.

    Lines are medians and bands the middle 80 % of all outputs and particles; values that are not finite are left out.

    Args:
        trace: tensors or arrays (T steps, n outputs, k particles):
            t (T,): times; default: the number of the step.
            value (T, n, k): value of every particle, higher is better.
            rewards (n, k): final rewards, drawn beside on their own axis.
            ess (T, n): effective sample size as a share of the particles, in (0, 1].
            resampled (T, n): bool, where an output was resampled.
            guidance_ratio (T, n, k): norm of the guidance over the norm of the drift; 0 or NaN where there is none.
            lookaheads (T, n, c, h, w): pictures in [0, 1]; those of the first three outputs are drawn.
        path: of the png.

    Raises:
        ValueError: an entry with another number of steps than ``t``.
    """
    data = {key: array(value) for key, value in trace.items() if value is not None}
    series = [key for key in ("value", "ess", "resampled", "guidance_ratio", "lookaheads") if key in data]
    steps = len(data["t"]) if "t" in data else len(data[series[0]]) if series else 0
    for key in series:
        if len(data[key]) != steps:
            raise ValueError(f"trace[{key!r}] has {len(data[key])} steps, t has {steps}")
    t, x_label = (data["t"], "time t") if "t" in data else (np.arange(steps), "step")
    guided = bool(np.nan_to_num(data.get("guidance_ratio", np.zeros(0)), posinf=0).any())
    present = {"value": True, "ess": True, "guidance_ratio": guided}
    panels = [key for key, show in present.items() if show and key in data and data[key].size]
    names = {
        "value": "value: median and middle 80 % of all particles",
        "ess": "effective sample size, share of the particles",
        "guidance_ratio": "norm of the guidance / norm of the drift",
    }
    rewards = data["rewards"][np.isfinite(data["rewards"])] if "rewards" in data else np.zeros(0)
    strip = _lookahead_strip(data["lookaheads"]) if data.get("lookaheads", np.zeros(0)).size else None

    width = 8.4
    heights = [1.9 if key == "value" else 1.5 for key in panels] or [1.9] * bool(len(rewards))
    if strip is not None:
        canvas, shown, rows = strip
        heights.append((width - 1.2) * canvas.shape[0] / canvas.shape[1] + 0.1)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    fig = Figure(figsize=(width, sum(heights) + 0.4 * len(heights) + 0.3), dpi=130, layout=layout)
    grid = fig.add_gridspec(max(1, len(heights)), 2, height_ratios=heights or None, width_ratios=[5, 1])
    first = None
    for row, key in enumerate(panels):
        ax = first = fig.add_subplot(grid[row, : 1 if len(rewards) else 2], sharex=first)
        prepare(ax, names[key])
        _band(ax, t, data[key], {"value": BLUE, "ess": TEAL, "guidance_ratio": ORANGE}[key])
        if key == "ess":
            _mark_resampling(ax, t, data[key], data.get("resampled"))
        elif key == "guidance_ratio":
            ax.set_ylim(bottom=0)
        if row == len(panels) - 1:
            ax.set_xlabel(x_label, fontsize=9, color=INK)
        else:
            ax.tick_params(labelbottom=False)
    if len(rewards):
        ax = fig.add_subplot(grid[: max(1, len(panels)), 1 if panels else slice(0, 2)])
        prepare(ax, "final reward")
        _dots(ax, rewards)
    if strip is not None:
        ax = fig.add_subplot(grid[-1, :])
        cell = (canvas.shape[0] / rows, canvas.shape[1] / len(shown))
        ax.imshow(canvas, interpolation="nearest")
        ax.set_title("look-ahead pictures", fontsize=9, color=INK, loc="left")
        ax.set_xticks(
            [(j + 0.5) * cell[1] for j in range(len(shown))], [f"{t[j]:.2f}" if "t" in data else str(j) for j in shown]
        )
        ax.set_yticks([(i + 0.5) * cell[0] for i in range(rows)], [f"output {i}" for i in range(rows)])
        ax.tick_params(length=0, labelsize=8, labelcolor=INK)
        ax.set_xlabel(x_label, fontsize=9, color=INK)
        ax.spines[:].set_visible(False)
    return save_figure(fig, path)


def curves_plot(columns: Mapping[str, tuple[Any, Any]], path: str | Path) -> Path:
    """Draw training curves as small multiples, one panel a name.

    Long curves are drawn twice: as they are, and smoothed. Positive curves whose trend spans more than a factor
    of 30 get a logarithmic axis.

    Args:
        columns: name -> (steps, values), both (m,); values that are not finite are left out.
        path: of the png.

    Raises:
        ValueError: no curves.
    """
    if not columns:
        raise ValueError("no curves to draw")
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    width, height = 3.4 * across + 0.15, 2.2 * down + 0.2
    fig = Figure(figsize=(width, height), dpi=130)
    edges = {"left": 0.6 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    fig.subplots_adjust(**edges, wspace=0.6 / 2.8, hspace=0.6 / 1.6)  # by hand: a layout engine takes seconds
    for i, (name, pair) in enumerate(columns.items()):
        ax = fig.add_subplot(down, across, i + 1)
        steps, values = (array(part).astype(float).ravel() for part in pair)
        keep = np.isfinite(values)
        steps, values = steps[keep], values[keep]
        prepare(ax, name)
        if len(values) > 40:
            ax.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
            trend = smooth(values)
            ax.plot(steps, trend, color=BLUE, linewidth=1.6)
        else:
            trend = values
            ax.plot(steps, values, color=BLUE, linewidth=1.6, marker="o", markersize=3)
        if len(values) and values.min() > 0 and trend.max() > 30 * trend.min():
            ax.set_yscale("log")
        ax.locator_params(axis="x", nbins=5)
        if i >= len(columns) - across:
            ax.set_xlabel("step", fontsize=9, color=INK)
    return save_figure(fig, path)


def cost_plot(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | Path,
    title: str,
    ylabel: str,
    lower_is_better: bool = False,
    baseline: str = "best_of_n",
) -> Path:
    """Draw what methods reach against what they cost: the baseline black, the best six at their largest cost coloured.

    Args:
        lines: method -> (evaluations, mean, half of its interval) by rising cost.
        path: of the png.
        lower_is_better: an error, on a logarithmic axis, rather than a reward.

    Raises:
        ValueError: no lines.
    """
    ranked = sorted((name for name in lines if lines[name]), key=lambda name: lines[name][-1][1], reverse=not lower_is_better)
    if not ranked:
        raise ValueError("no lines to draw")
    fig = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    ax = fig.add_subplot()
    prepare(ax, f"{title}; bars: 95%; grey: the other methods")
    for rank, name in enumerate(ranked):
        cost, mean, half = zip(*lines[name])
        shown = rank < 6 or name == baseline
        color = "black" if name == baseline else f"C{rank}" if shown else "0.8"
        label, order = (name, 3) if shown else (None, 1)
        ax.errorbar(cost, mean, half, marker="o", markersize=4, capsize=2, color=color, label=label, zorder=order)
    ax.set(xscale="log", yscale="log" if lower_is_better else "linear")
    ax.set_xlabel("evaluations an output", fontsize=9, color=INK)
    ax.set_ylabel(ylabel, fontsize=9, color=INK)
    ax.legend(fontsize=8, frameon=False)
    return save_figure(fig, path)


def jumps_plot(
    jumps: Sequence[int], lines: Mapping[str, tuple[Sequence[float], float, float | None]], path: str | Path, many: str
) -> Path:
    """Draw what is measured against the number of jumps, one panel a measure.

    Args:
        jumps: numbers of jumps, in any order.
        lines: measure -> (a value for each number of jumps, that of the reference sampler, that of the data or None).
        path: of the png.
        many: name of the reference sampler.

    Raises:
        ValueError: no lines.
    """
    if not lines:
        raise ValueError("no lines to draw")
    across = min(3, len(lines))
    down = -(-len(lines) // across)
    fig = Figure(figsize=(3.4 * across, 2.2 * down + 0.4), dpi=130, layout="constrained")
    order = sorted(range(len(jumps)), key=lambda i: jumps[i])
    for i, (name, (values, reference, data)) in enumerate(lines.items()):
        ax = fig.add_subplot(down, across, i + 1)
        prepare(ax, name)
        x = [jumps[j] for j in order]
        ax.plot(x, [values[j] for j in order], color=BLUE, linewidth=1.6, marker="o", markersize=4, label="jumps")
        ax.axhline(reference, color=ORANGE, linewidth=1.2, linestyle="--", label=many)
        if data is not None:
            ax.axhline(data, color=TEAL, linewidth=1.2, linestyle=":", label="data")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(value) for value in x])
        ax.minorticks_off()
        if i >= len(lines) - across:
            ax.set_xlabel("jumps", fontsize=9, color=INK)
        if i == 0:
            ax.legend(fontsize=8, frameon=False)
    return save_figure(fig, path)


def frontier_plot(
    points: Mapping[str, tuple[float, float]],
    paths: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Draw what is gained against what is given up: named points, and the way that runs took there.

    Args:
        points: name -> (x, y), numbered in the picture and named in its legend.
        paths: name -> (x, y) in order, drawn as lines with an open circle at their start.
        path: of the png.
    """
    fig = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    ax = fig.add_subplot()
    prepare(ax, "reward against divergence")
    for color, (name, line) in zip((SOFT, TEAL, BLUE, ORANGE, *(f"C{i}" for i in range(4, 10))), paths.items()):
        x, y = zip(*line)
        ax.plot(x, y, color=color, linewidth=1.2, marker=".", markersize=4, label=name, zorder=1)
        ax.plot(x[:1], y[:1], color=color, marker="o", markersize=7, markerfacecolor="white", zorder=1)
    for i, (name, (x, y)) in enumerate(points.items()):
        ax.plot([x], [y], linestyle="none", marker="o", markersize=7, color=f"C{i % 10}", label=f"{i + 1} {name}", zorder=3)
        ax.annotate(str(i + 1), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=INK)
    ax.set_xlabel(xlabel, fontsize=9, color=INK)
    ax.set_ylabel(ylabel, fontsize=9, color=INK)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return save_figure(fig, path)


def _lookahead_strip(lookaheads: np.ndarray, rows: int = 3, columns: int = 10) -> tuple[np.ndarray, list[int], int]:
    """One canvas (h, w, 3) of look-ahead pictures (T, n, c, h, w), the steps shown, and the number of rows."""
    shown = sorted({round(i) for i in np.linspace(0, len(lookaheads) - 1, columns)})
    cells = enlarged(as_tensor(lookaheads[shown, :rows]).transpose(0, 1), size=84)
    padded = np.pad(cells, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], constant_values=255)
    count, across, height, width = padded.shape[:4]
    return padded.transpose(0, 2, 1, 3, 4).reshape(count * height, across * width, 3), shown, count


def _band(ax: Any, x: np.ndarray, values: np.ndarray, color: str) -> None:
    """Median and middle 80 % over everything but the first axis of values (T, ...)."""
    rows = [row[np.isfinite(row)] for row in values.reshape(len(values), -1).astype(float)]
    low, middle, high = np.array([np.quantile(row, [0.1, 0.5, 0.9]) if len(row) else [np.nan] * 3 for row in rows]).T
    ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    ax.plot(x, middle, color=color, linewidth=1.8, marker="o", markersize=3)


def _mark_resampling(ax: Any, x: np.ndarray, ess: np.ndarray, resampled: np.ndarray | None) -> None:
    ax.set_ylim(0, 1.08)
    if resampled is None or not resampled.any():
        return
    step, output = np.nonzero(resampled)
    marks = ax.plot(x[step], ess[step, output], linestyle="none", marker="v", color=ORANGE, markersize=5, alpha=0.6, mew=0)
    legend = {"fontsize": 8, "frameon": False, "labelcolor": INK, "handletextpad": 0.1, "borderaxespad": 0}
    ax.legend(marks, ["resampled"], loc="lower right", bbox_to_anchor=(1, 1.02), **legend)


def _dots(ax: Any, values: np.ndarray) -> None:
    """Values as dots, spread sideways in a fixed pattern, with the median as a bar."""
    spread = (np.arange(len(values)) * 0.618) % 1 - 0.5
    ax.plot(spread, values, linestyle="none", marker="o", color=BLUE, alpha=0.45, markersize=4, mew=0)
    ax.hlines(np.median(values), -0.6, 0.6, color=INK, linewidth=1.6)
    ax.set_xlim(-0.9, 0.9)
    ax.set_xticks([])
    ax.locator_params(axis="y", nbins=5)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the curve, cut at its ends."""
    half = max(2, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
