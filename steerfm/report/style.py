"""The style of all plots: sizes, axes, ticks and legend.

A plot is narrow and as tall as it needs, so that its text is at least 11 pixels high on a page 390 pixels wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from steerfm import files
from steerfm.report.lettering import wrap
from steerfm.report.palette import Look

INK, SOFT, LINE = "#1f2933", "#7b8794", "#e4e7eb"
WIDTH, TEXT, DPI = 4.25, 9.5, 160
"""Width in inches; text size in points; pixels per inch. On a page of 390 pixels a plot has 358, and text is 11.1 high."""
ROW = 0.2
"""Height of a line of text, in inches."""


def new_figure(height: float) -> Figure:
    """Return a figure of width `WIDTH`, with room around its axes for labels and legend."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def prepare(ax: Any, title: str, width: float = WIDTH - 1) -> None:
    """Style axes: light lines, and a title on the left, wrapped to ``width`` inches."""
    text = wrap(title, width * 100, TEXT, lines=3)  # lettering assumes 100 pixels per inch
    ax.set_title(text, fontsize=TEXT, color=INK, loc="left", y=1.0, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(SOFT)
    ax.tick_params(which="both", labelsize=TEXT, color=SOFT, labelcolor=INK)
    ax.grid(color=LINE, linewidth=0.7)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):
        count_up(axis)


def name_axes(ax: Any, x: str = "", y: str = "") -> None:
    """Label the axes."""
    for label, write in ((x, ax.set_xlabel), (y, ax.set_ylabel)):
        if label:
            write(label, fontsize=TEXT, color=INK)


def count_up(axis: Axis, ticks: int = 5) -> None:
    """Make an axis linear, with plain numbers as ticks."""
    axis.set_major_formatter(PlainTicks(useOffset=False))
    axis.set_major_locator(MaxNLocator(ticks))


class PlainTicks(ScalarFormatter):
    """Format the ticks of one axis with as many digits as are needed to distinguish them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_scientific(False)
        self.largest = 0.0

    def set_locs(self, locs: Any) -> None:
        super().set_locs(locs)
        self.largest = max((abs(float(x)) for x in locs), default=0.0)

    def __call__(self, x: float, pos: int | None = None) -> str:
        plain = self.largest > 0 and (x == 0 or 1e-3 <= self.largest < 1e5)
        return super().__call__(x, pos) if plain else number(x)


def count_by_factors(axis: Axis, values: Any) -> None:
    """Make an axis over positive ``values`` logarithmic, with plain numbers as ticks."""
    values = np.asarray(values, float)
    span = np.log10(values.max() / values.min()) if len(values) and values.min() > 0 else 0.0
    steps = (1, 2, 3, 5) if span < 0.7 else (1, 2, 5) if span < 1.6 else (1, 3) if span < 2.5 else (1,)
    axis.axes.set(xscale="log") if axis is axis.axes.xaxis else axis.axes.set(yscale="log")
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.grid(which="minor", visible=False)


def number(value: float) -> str:
    """Format a number for an axis without powers of ten: 0.00002, 20,000, 1.5M."""
    if abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1e4 else format(Decimal(f"{value:.4g}"), "f")
    factor, unit = next((factor, unit) for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= factor)
    return f"{value / factor:.4g}{unit}" if abs(value) < 1e13 else f"{value:.1e}"


def mark(look: Look, label: str = "", width: float = 1.8, size: float = 5.5, **more: Any) -> Line2D:
    """Return the line and marker of a look, for a legend."""
    kind = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "linewidth": width, "markersize": size}
    return Line2D([], [], label=label, **kind | more)


def add_key(fig: Figure, marks: Sequence[Artist], note: str = "", columns: int = 2) -> None:
    """Add a legend below a figure, with ``note`` as its title, and make the figure taller by its height."""
    labels = [wrap(str(artist.get_label()), 100 * (WIDTH / columns - 0.5), TEXT, lines=2) for artist in marks]
    note = wrap(note, 100 * (WIDTH - 0.2), TEXT, lines=4)
    rows = -(-len(marks) // columns) * max((label.count("\n") + 1 for label in labels), default=0)
    width, height = fig.get_size_inches()
    fig.set_size_inches(width, height + ROW * (rows + (note.count("\n") + 1 if note else 0)) + 0.1)
    key = fig.legend(
        handles=marks, labels=labels, title=note or None, loc="outside lower left", ncols=columns, fontsize=TEXT,
        title_fontsize=TEXT, alignment="left", frameon=False, labelcolor=INK, columnspacing=1.0, handletextpad=0.6,
        borderaxespad=0.0, labelspacing=0.35,
    )  # fmt: skip
    key.get_title().set_color(INK)
    for text in (key.get_title(), *key.get_texts()):
        text.set_parse_math(False)


def save_figure(fig: Figure, path: str | Path) -> Path:
    """Write a figure to a file, atomically."""
    path = Path(path)
    with files.whole(path) as temporary:
        fig.savefig(temporary, facecolor="white", format=path.suffix[1:] or "png")
    return path


def array(value: Any) -> np.ndarray:
    """Convert a tensor, array or list to an array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)
