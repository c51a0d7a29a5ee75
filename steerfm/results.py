"""What a run leaves behind: one folder with its configuration, numbers, samples, pictures and a page to look at.

    config.yaml  result.json  metrics.jsonl  samples.safetensors  grid.png  trace.png  report.html

Takes tensors, dictionaries and strings only, so that anything can write a run folder. Figures are built without pyplot:
no backend is chosen and no global style is touched.
"""

from __future__ import annotations

import base64
import html
import json
import math
import mimetypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, as_tensor, uint8
from torch.nn.functional import adaptive_avg_pool2d

from steerfm import files

INK, SOFT, LINE = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, TEAL = "#2563eb", "#ea580c", "#0d9488"
DPI = 100
RESULTS = ("*.safetensors", "result.json", "*.ckpt", "parts/*", "cells/*", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")
"""Files of a run folder that are worth something."""
NEUTRAL = {"out", "force"}
"""Keys of a configuration that do not make it another run."""
ANEW = "choose another out= or delete it, or start anew with force=true"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
"""Sizes of safetensors' types."""


# --- pictures --------------------------------------------------------------------------------------------------------
def picture_grid(
    pictures: Tensor,
    path: str | Path,
    row_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
) -> Path:
    """Draw pictures in rows and columns, every pixel a square of whole screen pixels.

    Args:
        pictures: (rows, columns, c, h, w) in [0, 1], others are clipped, NaN is black. c = 1 is grey, 3 is colour; of any other
            number the channels stand side by side, in grey.
        path: of the png.
        row_labels: a label left of each row.
        captions: a text under each picture, [row][column]; may hold line breaks, long ones are wrapped.
        title: above the grid.

    Raises:
        ValueError: another shape of pictures, or labels and captions that do not fit it.
    """
    cells = _cells(pictures, size=112)
    rows, columns, height, width = cells.shape[:4]
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows of pictures")
    if captions and [len(row) for row in captions] != [columns] * rows:
        raise ValueError(f"captions must be {rows} rows of {columns} texts, like the pictures")
    gap, margin, small, normal, large = 6, 14, 8.0, 9.0, 11.0
    labels = [_wrap(text, 180, normal) for text in row_labels]
    texts = [[_wrap(text, width + gap - 2, small, lines=3) for text in row] for row in captions]
    left = margin + (16 + int(max(_text_width(label, normal) for label in labels)) if labels else 0)
    below = 4 + _text_height(max((text.count("\n") + 1 for row in texts for text in row), default=0), small)
    below = below + 4 if texts else gap  # captions sit nearer to their own picture than to the next
    inner = columns * (width + gap) - gap
    heading = _wrap(title, inner + left - margin, large)
    top = margin + (_text_height(heading.count("\n") + 1, large) + 8 if title else 0)
    full = (left + inner + margin, top + rows * (height + below) + margin - (gap if not texts else 4))

    canvas = np.full((full[1], full[0], 3), 255, np.uint8)
    fig = Figure(figsize=(full[0] / DPI, full[1] / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        style = {"color": INK, "parse_math": False, "linespacing": 1.15} | style
        fig.text(x / full[0], 1 - y / full[1], text, fontsize=size, **style)

    for i in range(rows):
        y = top + i * (height + below)
        for j in range(columns):
            x = left + j * (width + gap)
            canvas[y : y + height, x : x + width] = cells[i, j]
            if texts:
                write(x + width / 2, y + height + 4, texts[i][j], small, ha="center", va="top")
        if labels:
            write(left - 12, y + height / 2, labels[i], normal, ha="right", va="center", multialignment="right")
    if title:
        write(margin, margin, heading, large, ha="left", va="top", weight="bold")
    fig.figimage(canvas, origin="upper")
    return _save(fig, path)


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
    data = {key: _array(value) for key, value in trace.items() if value is not None}
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
        _style(ax, names[key])
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
        _style(ax, "final reward")
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
    return _save(fig, path)


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
        steps, values = (_array(part).astype(float).ravel() for part in pair)
        keep = np.isfinite(values)
        steps, values = steps[keep], values[keep]
        _style(ax, name)
        if len(values) > 40:
            ax.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
            trend = _smooth(values)
            ax.plot(steps, trend, color=BLUE, linewidth=1.6)
        else:
            trend = values
            ax.plot(steps, values, color=BLUE, linewidth=1.6, marker="o", markersize=3)
        if len(values) and values.min() > 0 and trend.max() > 30 * trend.min():
            ax.set_yscale("log")
        ax.locator_params(axis="x", nbins=5)
        if i >= len(columns) - across:
            ax.set_xlabel("step", fontsize=9, color=INK)
    return _save(fig, path)


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
    _style(ax, f"{title}; bars: 95%; grey: the other methods")
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
    return _save(fig, path)


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
        _style(ax, name)
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
    return _save(fig, path)


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
    _style(ax, "reward against divergence")
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
    return _save(fig, path)


def levels(pictures: Tensor) -> np.ndarray:
    """Pictures (..., c, h, w) in [0, 1], others are clipped, as bytes (..., h, w, c) with c = 1 or 3; NaN is black, other
    channels stand side by side in grey."""
    return (_visible(pictures) * 255).round().byte().movedim(-3, -1).numpy()


def _visible(pictures: Tensor) -> Tensor:
    if pictures.shape[-3] not in (1, 3):
        pictures = pictures.movedim(-3, -2).flatten(-2).unsqueeze(-3)
    return pictures.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def _cells(pictures: Tensor, size: int) -> np.ndarray:
    """Pictures (rows, columns, c, h, w) in [0, 1] as (rows, columns, h', w', 3) uint8, about ``size`` pixels wide."""
    if pictures.ndim != 5 or not pictures.numel():
        raise ValueError(f"pictures must be (rows, columns, c, h, w), got {tuple(pictures.shape)}")
    pictures = _visible(pictures)
    height, width = pictures.shape[-2:]
    if width > 3 * size:  # large pictures are averaged down, so that a grid stays a file to mail
        small = (max(1, round(height * 3 * size / width)), 3 * size)
        pictures = adaptive_avg_pool2d(pictures.flatten(0, 1), small).unflatten(0, pictures.shape[:2])
    scale = max(1, round(size / width))
    cells = levels(pictures).repeat(scale, axis=2).repeat(scale, axis=3)
    return np.broadcast_to(cells, (*cells.shape[:4], 3))


def _lookahead_strip(lookaheads: np.ndarray, rows: int = 3, columns: int = 10) -> tuple[np.ndarray, list[int], int]:
    """One canvas (h, w, 3) of look-ahead pictures (T, n, c, h, w), the steps shown, and the number of rows."""
    shown = sorted({round(i) for i in np.linspace(0, len(lookaheads) - 1, columns)})
    cells = _cells(as_tensor(lookaheads[shown, :rows]).transpose(0, 1), size=84)
    padded = np.pad(cells, [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)], constant_values=255)
    count, across, height, width = padded.shape[:4]
    return padded.transpose(0, 2, 1, 3, 4).reshape(count * height, across * width, 3), shown, count


def _style(ax: Any, title: str) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(SOFT)
    ax.tick_params(which="both", labelsize=8, color=SOFT, labelcolor=INK)
    ax.grid(color=LINE, linewidth=0.7)
    ax.set_axisbelow(True)


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


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the curve, cut at its ends."""
    half = max(2, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _text_width(text: str, size: float) -> float:
    """Width in pixels of the longest line of a text set in ``size`` points."""
    font = FontProperties(size=size)
    lines = [line for line in text.split("\n") if line]
    widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in lines]
    return max(widths, default=0.0) * DPI / 72


def _text_height(lines: int, size: float) -> int:
    return math.ceil(lines * size * 1.35 * DPI / 72)


def _wrap(text: str, width: float, size: float, lines: int = 4) -> str:
    """Break a text into at most ``lines`` lines of ``width`` pixels; what is left over becomes an ellipsis."""
    broken: list[str] = []
    for paragraph in str(text).split("\n"):
        broken.append("")
        for piece in re.split(r"(?<=[\s(,/])", paragraph):  # breaks after spaces, and inside calls and paths
            if broken[-1] and _text_width((broken[-1] + piece).rstrip(), size) > width:
                broken.append("")
            broken[-1] += piece
    if len(broken) > lines:
        broken = [*broken[: lines - 1], broken[lines - 1].rstrip() + "…"]
    return "\n".join(_cut(line.rstrip(), width, size) for line in broken)


def _cut(line: str, width: float, size: float) -> str:
    while len(line) > 2 and _text_width(line, size) > width:
        line = line[:-2] + "…"
    return line


def _save(fig: Figure, path: str | Path) -> Path:
    path = Path(path)
    with files.whole(path) as temporary:
        fig.savefig(temporary, facecolor="white", format=path.suffix[1:] or "png")
    return path


def _array(value: Any) -> np.ndarray:
    """A tensor, array or list as an array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


# --- folders ---------------------------------------------------------------------------------------------------------
class RunFolder:
    """The folder of one run. Every file appears whole or not at all, so a kill loses at most the part in progress.

    One process writes it: with several ranks, rank 0.

    Args:
        path: of the folder; made if missing.
        config_yaml: the run's configuration, kept as config.yaml. It decides whether an existing folder is continued;
            its keys ``out`` and ``force`` are ignored, so that a folder can be moved.
            A run that has no result yet is replaced.
        resume: continue a folder that holds a run with the same configuration; False: such a folder is an error.
        inputs: what else makes the run: digests of the files that it reads, by name; kept as inputs.json.
        shared: several processes write the folder, each its own files: nobody is refused.
        force: start anew in a folder that holds another run, or this one and finished: what it wrote is deleted, nothing else.
            An unfinished run of the same configuration goes on.

    Raises:
        ValueError: the folder holds another configuration, a run of files that were edited since, a run although ``resume`` is
            False, or is no folder; another process writes it.
    """

    def __init__(
        self,
        path: str | Path,
        config_yaml: str,
        resume: bool = True,
        inputs: Mapping[str, str] | None = None,
        shared: bool = False,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another out=")
        self.path.mkdir(parents=True, exist_ok=True)
        if shared:
            files.sweep(self.path)
        else:
            files.claim(self.path)
        files.keep_list(self.path)
        config, known = self.path / "config.yaml", self.path / "inputs.json"
        if config.is_file():
            self._continue(config_yaml, resume, inputs or {}, force)
        if inputs is not None and not (config.is_file() and known.is_file()):
            files.write(known, json.dumps(dict(inputs), indent=1) + "\n")
        if not config.is_file():
            files.write(config, config_yaml)
        files.drop_cut_line(self.path / "metrics.jsonl")  # the step is logged again
        if (self.path / "result.json").is_file():
            self.clear_parts()

    def _continue(self, config_yaml: str, resume: bool, inputs: Mapping[str, str], force: bool) -> None:
        """Make room for a run in a folder that holds one, or refuse."""
        config = self.path / "config.yaml"
        before, now = _read_yaml(config.read_text(encoding="utf-8")), _read_yaml(config_yaml)
        different, changed, begun = _differences(before, now), edited(self.path, inputs), self._holds_results()
        own = isinstance(before, dict) and isinstance(now, dict) and before.keys() - NEUTRAL == now.keys() - NEUTRAL
        ours = own or (self.path / files.LIST).is_file()
        finished = any((self.path / name).is_file() for name in ("result.json", "summary.json"))
        if force and ours and (different or changed or finished):
            files.clear(self.path)
            return
        fix = ANEW if ours else "choose another out= or delete it"
        if not resume and (begun or not different):
            raise ValueError(f"{self.path} holds a run already; {fix}")
        if different and (begun or not own):
            names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            raise ValueError(f"{self.path} holds a run with another configuration (differs in: {names}); {fix}")
        if changed and begun:
            raise ValueError(f"{self.path}: {', '.join(changed)}: edited since this run began; {fix}")
        if different or changed:  # a run that failed before its first result is in nobody's way
            for log in self.path.rglob("metrics.jsonl"):
                log.unlink(missing_ok=True)
            config.unlink()

    def _holds_results(self) -> bool:
        """Whether there is something that a run could go on from, or that would be lost."""
        return any(next(self.path.glob(pattern), None) for pattern in RESULTS)

    def __fspath__(self) -> str:
        return str(self.path)

    # --- numbers -----------------------------------------------------------------------------------------------------
    def log(self, *, once: Sequence[str] = (), **numbers: Any) -> None:
        """Append one line to metrics.jsonl, in place of an earlier one with the same values of the keys ``once``."""
        line, file = _plain(numbers), self.path / "metrics.jsonl"
        rows = self.history() if once else []
        others = [row for row in rows if any(row.get(key) != line[key] for key in once)]
        if len(others) < len(rows):
            files.write(file, "".join(json.dumps(row) + "\n" for row in [*others, line]))
            return
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, allow_nan=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def save_result(self, result: Mapping[str, Any]) -> Path:
        """Write result.json: tensors become lists, floats get 7 digits, NaN and infinities become null."""
        text = json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False)
        return files.write(self.path / "result.json", (text + "\n").encode())

    def load_result(self) -> dict[str, Any] | None:
        """result.json, or None where the run is not finished."""
        file = self.path / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    # --- tensors -----------------------------------------------------------------------------------------------------
    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write ``name``.safetensors."""
        return files.write(self.path / f"{name}.safetensors", _pack(tensors))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read ``name``.safetensors, on the CPU.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or corrupt.
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
        try:
            return load(file.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt ({error}); delete it and run the same command again") from None

    # --- parts: batches of an unfinished run -------------------------------------------------------------------------
    def save_part(self, index: int, tensors: Mapping[str, Tensor], prefix: str = "part") -> Path:
        """Keep one batch of an unfinished run: parts/``prefix``-``index``.safetensors."""
        return files.write(self.part(index, prefix), _pack(tensors))

    def load_part(self, index: int, prefix: str = "part") -> dict[str, Tensor] | None:
        """The tensors of a part, or None where it is missing or corrupt and has to be done (again)."""
        try:
            return load(self.part(index, prefix).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def parts(self, prefix: str = "part") -> list[int]:
        """Indices of the parts that can be loaded, in order."""
        return [index for index in self._indices(prefix) if self.load_part(index, prefix) is not None]

    def merge_parts(
        self, name: str, keys: Sequence[str] = (), prefix: str = "part", told: Mapping[str, str] | None = None
    ) -> Path:
        """Write ``name``.safetensors: tensors of all parts, joined along their first axis, a part at a time in memory.

        Args:
            keys: names of the tensors; default those that all parts have.
            told: what the file says of itself beside them.
        """
        parts = [self.part(index, prefix) for index in self._indices(prefix)]
        facts: list[dict[str, tuple[str, list[int]]]] = []  # of each part, of each key: type and shape
        for file in parts:
            with safe_open(file, "pt") as tensors:
                views = {key: tensors.get_slice(key) for key in keys or tensors.keys()}
                facts.append({key: (view.get_dtype(), view.get_shape()) for key, view in views.items()})
        kinds = {key: kind for key, (kind, _) in facts[0].items() if all(key in part for part in facts)}
        keys = sorted(kinds, key=lambda key: (-BYTES[kinds[key]], key))  # large types first: each stays aligned
        header: dict[str, Any] = {"__metadata__": dict(told)} if told else {}
        end = 0
        for key in keys:
            shape = [sum(part[key][1][0] for part in facts), *facts[0][key][1][1:]]
            begin, end = end, end + math.prod(shape) * BYTES[kinds[key]]
            header[key] = {"dtype": kinds[key], "shape": shape, "data_offsets": [begin, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)

        def content() -> Iterator[bytes]:
            yield len(head).to_bytes(8, "little") + head
            for key in keys:
                for file in parts:
                    with safe_open(file, "pt") as tensors:
                        yield tensors.get_tensor(key).view(uint8).numpy().tobytes()

        return files.write(self.path / f"{name}.safetensors", content())

    def clear_parts(self) -> None:
        """Delete all parts: the run is finished."""
        parts = self.path / "parts"
        for file in parts.glob("*-[0-9]*.safetensors"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or somebody else's files are in it
            parts.rmdir()

    def _indices(self, prefix: str) -> list[int]:
        parts = (self.path / "parts").glob(f"{prefix}-*.safetensors")
        return sorted(int(end) for file in parts if (end := file.stem.removeprefix(f"{prefix}-")).isdigit())

    def part(self, index: int, prefix: str = "part") -> Path:
        """Where a part is, once it is there."""
        return self.path / "parts" / f"{prefix}-{index:05d}.safetensors"


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file.

    Raises:
        FileNotFoundError, ValueError: the file is missing, torn, or has no such tensor.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error})") from None


def edited(folder: Path, inputs: Mapping[str, str]) -> list[str]:
    """Names of the inputs that are no longer what the run of a folder began with."""
    try:
        before = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an earlier version, or one that was killed at its start
        return []
    return [name for name in inputs if name in before and before[name] != inputs[name]]


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    # clone: safetensors refuses tensors that share memory, such as expanded ones and views of one batch
    return save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def _plain(value: Any) -> Any:
    """Anything as what JSON holds: tensors and arrays as lists, floats with 7 digits, NaN and infinities as None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return str(value)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # differs from any configuration


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if prefix or key not in NEUTRAL]
        missing = object()
        return [name for key in keys for name in _differences(a.get(key, missing), b.get(key, missing), f"{prefix}{key}.")]
    return [] if a == b else [prefix.rstrip(".") or "everything"]


# --- pages -----------------------------------------------------------------------------------------------------------
def report(
    folder: str | Path | RunFolder,
    title: str,
    facts: Mapping[str, Any],
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = (),
    pictures: Sequence[tuple[str, str | Path]] = (),
) -> Path:
    """Write report.html: one page that needs no other file, so that it can be mailed.

    Args:
        folder: of the run; its config.yaml, where there is one, ends the page.
        title: heading.
        facts: name -> value; ``command`` is set as code.
        tables: (caption, header, rows).
        pictures: (caption, path); paths are relative to the folder, or to where the command runs.

    Raises:
        FileNotFoundError: a picture is missing.
    """
    folder = Path(folder)
    facts = dict(facts)
    parts = [f"<h1>{_escape(title)}</h1>"]
    if command := facts.pop("command", None):
        parts.append(f"<pre><code>{_escape(command)}</code></pre>")
    if facts:
        rows = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items())
        parts.append(f"<dl>{rows}</dl>")
    for caption, path in pictures:
        file = folder / path if (folder / path).is_file() else Path(path)
        kind = mimetypes.guess_type(file.name)[0] or "image/png"
        source = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        image = f'<img src="{source}" alt="{_escape(caption)}">'
        parts.append(f"<figure><figcaption>{_escape(caption)}</figcaption>{image}</figure>")
    for caption, header, rows in tables:
        head = _table_row("th", header)
        body = "".join(_table_row("td", row) for row in rows)
        table = f"<table><caption>{_escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
        parts.append(f'<div class="scroll">{table}</div>')
    if (config := folder / "config.yaml").is_file():
        content = _escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>Configuration</summary><pre><code>{content}</code></pre></details>")
    page = PAGE.substitute(title=_escape(title), style=STYLE, body="\n".join(parts))
    return files.write(folder / "report.html", page.encode())


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --back: #ffffff; --box: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #323f4b; --back: #161b22; --box: #1f2933; }
}
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
pre { background: var(--box); border-radius: 6px; padding: .75rem 1rem; overflow-x: auto; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 1.25rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.75rem 0; } figcaption, caption { color: var(--soft); text-align: left; padding-bottom: .4rem; }
img { max-width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
.scroll { overflow-x: auto; margin: 1.75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def model_card(name: str, card: Mapping[str, Any]) -> str:
    """README.md of a trained model, with the front matter that model hubs read.

    Args:
        name: of the model.
        card: any of description, command (how to train it again), usage (code), data, licence, recipe, metrics and
            more: texts, or dictionaries of names and values, which become tables.
    """
    card = dict(card)
    licence = str(card.get("licence", ""))
    identifier = (licence.split() or [""])[0].lower()
    front: dict[str, Any] = {"library_name": "steerfm", "tags": ["flow-map", "image-generation"]}
    if identifier:
        front["license"] = identifier if identifier in LICENCES else "other"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    if description := card.pop("description", ""):
        lines += [str(description).strip(), ""]
    order = ("usage", "data", "licence", "recipe", "command", "metrics")
    for key in [*(key for key in order if key in card), *(key for key in card if key not in order)]:
        lines += [f"## {str(key).replace('_', ' ').capitalize()}", ""]
        value = card[key]
        if isinstance(value, Mapping):
            cells = [[_format(cell).replace("|", "\\|").replace("\n", " ") for cell in item] for item in value.items()]
            lines += ["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in cells), ""]
        elif key in ("usage", "command"):
            lines += [f"```{'python' if key == 'usage' else 'bash'}", str(value).strip(), "```", ""]
        else:
            lines += [_format(value).strip(), ""]
    return "\n".join(lines)


LICENCES = {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"}


def _table_row(tag: str, cells: Sequence[Any]) -> str:
    return f"<tr>{''.join(_table_cell(tag, cell) for cell in cells)}</tr>"


def _table_cell(tag: str, cell: Any) -> str:
    number = isinstance(cell, int | float | np.number) and not isinstance(cell, bool)
    return f"<{tag}{' class=number' if number else ''}>{_escape(cell)}</{tag}>"


def _escape(value: Any) -> str:
    return html.escape(_format(value))


def _format(value: Any) -> str:
    """A value as a short text: four digits for numbers, lists and dictionaries in one line."""
    value = value if isinstance(value, str) else _plain(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 1e5 else str(value)
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format(item)}" for key, item in value.items())
    return "-" if value is None else str(value)
