"""Plot a steering run: value, effective sample size and guidance over time, final rewards, and look-ahead pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from torch import as_tensor

from steerfm.report.palette import COLOURS, LINES, OWN_MARKERS, Look, look
from steerfm.report.pictures import enlarged
from steerfm.report.style import INK, TEXT, WIDTH, add_key, array, mark, name_axes, new_figure, prepare, save_figure

TITLES = {
    "value": "value (tempered reward of the look-ahead)",
    "ess": "effective sample size, share of the particles",
    "guidance_ratio": "length of the guidance / length of the step",
}
"""Titles of the panels over time."""
GROUPS = 6
"""Largest number of prompts with a line of their own."""
RESAMPLED = {"marker": "v", "color": INK, "linestyle": "none", "markersize": 5, "mew": 0}


@dataclass(frozen=True)
class Group:
    """Outputs with the same condition.

    Attributes:
        name: prompt or class of the outputs.
        look: how they are drawn.
        rows: indices of the outputs; empty for all outputs.
    """

    name: str
    look: Look
    rows: np.ndarray


def trace_plot(trace: Mapping[str, Any], path: str | Path, method: str = "value", names: Sequence[str] = ()) -> Path:
    """Draw the course of a steering run. Every entry of ``trace`` is optional.

    Lines are medians, and bands the middle 80 % of particles. Values that are not finite are skipped. Outputs with different
    prompts have different rewards, so each of the first six prompts has a line of its own.

    Args:
        trace: tensors or arrays, for T steps, n outputs and k particles:
            t (T,): times; by default the number of the step.
            value (T, n, k): value of every particle, higher is better.
            rewards (m, k): final rewards, for m >= n outputs.
            ess (T, n): effective sample size as a share of the particles, in (0, 1].
            resampled (T, n): bool, whether the output was resampled.
            guidance_ratio (T, n, k): norm of the guidance divided by the norm of the drift; 0 or NaN without guidance.
            lookaheads (T, n, c, h, w): pictures in [0, 1]; only the first three outputs are drawn.
        path: png file to write.
        method: name of the method, which sets the colour of the lines.
        names: prompt or class of each of the m outputs.

    Returns:
        Path of the png.

    Raises:
        ValueError: an entry and ``t`` have different numbers of steps.
    """
    data = {key: array(value) for key, value in trace.items() if value is not None}
    t, x_label = _times(data)
    panels = [
        key for key in TITLES if data.get(key, np.zeros(0)).size and (key != "guidance_ratio" or _has_guidance(data[key]))
    ]
    groups = _groups(names, method)
    rewards = data.get("rewards", np.zeros(0))
    rewards = rewards if np.isfinite(rewards).any() else np.zeros(0)
    strip = _strip(data["lookaheads"]) if data.get("lookaheads", np.zeros(0)).size else None

    heights = [1.5 if key == "value" else 1.1 for key in panels]
    heights += [0.35 + 0.25 * len(groups)] if rewards.size else []
    heights += [(WIDTH - 0.9) * strip.canvas.shape[0] / strip.canvas.shape[1]] if strip else []
    fig = new_figure(sum(heights) + 0.5 * len(heights) + 0.3)
    grid = fig.add_gridspec(max(1, len(heights)), 1, height_ratios=heights or None)
    first = None
    for row, key in enumerate(panels):
        ax = first = fig.add_subplot(grid[row], sharex=first)
        prepare(ax, TITLES[key])
        _draw(ax, t, data[key], groups)
        if key == "ess":
            _mark_resampling(ax, t, data[key], data.get("resampled"))
        elif key == "guidance_ratio":
            ax.set_ylim(bottom=0)
        ax.tick_params(labelbottom=row == len(panels) - 1)
    if first is not None:
        name_axes(first, x_label)
    if rewards.size:
        _draw_rewards(fig.add_subplot(grid[len(panels)]), rewards, groups)
    if strip:
        _draw_strip(fig.add_subplot(grid[-1]), strip, [f"{t[j]:.2f}" if "t" in data else str(j) for j in strip.steps], x_label)
    _explain(fig, panels, rewards.size > 0, bool(data.get("resampled", np.zeros(0)).any()), groups, len({*names}))
    return save_figure(fig, path)


def _times(data: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Return the times of the steps, or their numbers without ``t``, and the label of the time axis."""
    series = [key for key in (*TITLES, "resampled", "lookaheads") if key in data]
    steps = len(data["t"]) if "t" in data else len(data[series[0]]) if series else 0
    for key in series:
        if len(data[key]) != steps:
            raise ValueError(f"trace[{key!r}] has {len(data[key])} steps, t has {steps}")
    return (data["t"], "time t, from noise (0) to data (1)") if "t" in data else (np.arange(steps), "step")


def _has_guidance(ratio: np.ndarray) -> bool:
    return bool(np.nan_to_num(ratio, posinf=0).any())


def _groups(names: Sequence[str], method: str) -> list[Group]:
    """Group outputs by name; a single group if all have the same name."""
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        return [Group("", look(method), np.arange(0))]  # no indices: all outputs
    requests = np.array(names)
    looks = [Look(COLOURS[i], OWN_MARKERS[i], LINES[i % len(LINES)]) for i in range(GROUPS)]  # all different
    return [Group(name, at, np.flatnonzero(requests == name)) for name, at in zip(different, looks)]


def _of(values: np.ndarray, rows: np.ndarray, axis: int) -> np.ndarray:
    """Select the values of these outputs along an axis; all values if ``rows`` is empty."""
    return values.take(rows[rows < values.shape[axis]], axis) if len(rows) else values


def _draw(ax: Any, x: np.ndarray, values: np.ndarray, groups: Sequence[Group]) -> None:
    """Draw the median and the middle 80 % of values (T, n, ...) at each step, one line per group."""
    for group in groups:
        mine = _of(values, group.rows, 1).reshape(len(values), -1).astype(float)
        rows = [row[np.isfinite(row)] for row in mine]
        low, middle, high = np.array([np.quantile(row, [0.1, 0.5, 0.9]) if len(row) else [np.nan] * 3 for row in rows]).T
        colour, plain = group.look.colour, len(groups) == 1
        ax.fill_between(x, low, high, color=colour, alpha=0.18 if plain else 0.08, linewidth=0)
        kind = {"linestyle": "-", "marker": "o", "markersize": 3} if plain else {"linestyle": group.look.line}
        kind |= {} if plain else {"marker": group.look.marker, "markersize": 4.5}
        ax.plot(x, middle, color=colour, linewidth=1.8, **kind)


def _mark_resampling(ax: Any, x: np.ndarray, ess: np.ndarray, resampled: np.ndarray | None) -> None:
    ax.set_ylim(0, 1.08)
    if resampled is not None and resampled.any():
        step, output = np.nonzero(resampled)
        ax.plot(x[step], ess[step, output], alpha=0.6, **RESAMPLED)


def _draw_rewards(ax: Any, rewards: np.ndarray, groups: Sequence[Group]) -> None:
    """Draw final rewards (m, k) as dots, one row per group, jittered in a fixed pattern, with the median as a bar."""
    prepare(ax, "final reward of every particle")
    for place, group in enumerate(groups):
        values = _of(rewards, group.rows, 0).astype(float)
        values = values[np.isfinite(values)]
        heights = place + 0.6 * ((np.arange(len(values)) * 0.618) % 1 - 0.5)
        look_ = {"marker": "o" if len(groups) == 1 else group.look.marker, "color": group.look.colour}
        ax.plot(values, heights, linestyle="none", alpha=0.5, markersize=5, mew=0, **look_)
        if len(values):
            ax.vlines(np.median(values), place - 0.4, place + 0.4, color=INK, linewidth=1.6)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_yticks([])


@dataclass(frozen=True)
class Strip:
    """Look-ahead pictures on one canvas.

    Attributes:
        canvas: (h, w, 3) uint8.
        steps: step of each column.
        rows: number of rows, one per output.
    """

    canvas: np.ndarray
    steps: list[int]
    rows: int


def _strip(lookaheads: np.ndarray, rows: int = 3, columns: int = 6) -> Strip:
    """Arrange look-ahead pictures (T, n, c, h, w) of the first outputs at evenly spaced steps."""
    steps = sorted({round(i) for i in np.linspace(0, len(lookaheads) - 1, columns)})
    cells = enlarged(as_tensor(lookaheads[steps, :rows]).transpose(0, 1), size=84)
    tiles = np.pad(cells, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], constant_values=255)
    count, across, height, width = tiles.shape[:4]
    return Strip(tiles.transpose(0, 2, 1, 3, 4).reshape(count * height, across * width, 3), steps, count)


def _draw_strip(ax: Any, strip: Strip, times: Sequence[str], x_label: str) -> None:
    prepare(ax, "look-ahead: the picture that the first particle would end in")
    cell = (strip.canvas.shape[0] / strip.rows, strip.canvas.shape[1] / len(strip.steps))
    ax.grid(visible=False)
    ax.imshow(strip.canvas, interpolation="nearest")
    ax.set_xticks([(j + 0.5) * cell[1] for j in range(len(times))], times)
    ax.set_yticks([(i + 0.5) * cell[0] for i in range(strip.rows)], [f"output {i}" for i in range(strip.rows)])
    ax.tick_params(length=0, labelsize=TEXT, labelcolor=INK)
    name_axes(ax, x_label)
    ax.spines[:].set_visible(False)


def _explain(fig: Any, panels: Sequence[str], rewards: bool, resampled: bool, groups: Sequence[Group], prompts: int) -> None:
    """Add the legend of lines, bands, triangles, dots and bars."""
    plain, tone = len(groups) == 1, groups[0].look
    marks = [] if plain else [mark(group.look, group.name) for group in groups]
    if panels:
        marks += [Line2D([], [], color=tone.colour if plain else INK, linewidth=1.8, label="median of the particles")]
        marks += [Line2D([], [], color=tone.colour if plain else INK, linewidth=7, alpha=0.18, label="their middle 80 %")]
    if resampled and "ess" in panels:
        marks.append(Line2D([], [], label="an output was resampled", **RESAMPLED))
    if rewards:
        colour = tone.colour if plain else INK
        dot = {"color": colour, "marker": "o", "linestyle": "none", "markersize": 5}
        marks.append(Line2D([], [], label="final reward of a particle", **dot))
        marks.append(Line2D([], [], color=INK, marker="|", linestyle="none", markersize=9, mew=1.6, label="median of these"))
    if marks:
        add_key(fig, marks, f"The first {GROUPS} of {prompts} prompts:" if prompts > GROUPS else "")
