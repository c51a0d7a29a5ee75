"""Grids of pictures, enlarged by whole numbers so that pixels stay sharp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from steerfm.report.lettering import DPI, text_height, text_width, wrap
from steerfm.report.style import INK, save_figure

GAP, MARGIN = 6, 14
"""Pixels between pictures, and around the grid."""
HEADING = "bold"
"""Weight of the title and of the headings."""
SMALLEST, PHONE, TEXT = 8.0, 358, 9.3
"""Smallest text size in points; width in pixels of a grid on a page 390 pixels wide, and height of its text there."""


def picture_grid(
    pictures: Tensor,
    path: str | Path,
    row_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    headings: Mapping[int, str] | None = None,
    columns: Sequence[str] = (),
    text: float = TEXT,
) -> Path:
    """Draw pictures in rows and columns, enlarged by whole numbers so that pixels stay sharp.

    Args:
        pictures: (rows, columns, c, h, w) in [0, 1]. Other values are clipped, and NaN becomes black. One channel is
            grey, three are colour; any other number of channels is drawn side by side, in grey.
        path: png file to write.
        row_labels: text to the left of each row.
        captions: text under each picture, as captions[row][column]. Long lines are wrapped.
        title: text above the grid.
        headings: row -> text above that row, with a gap; an empty text adds only the gap.
        columns: text above each column, on one line.
        text: height of the text in pixels where the grid is `PHONE` pixels wide.

    Returns:
        Path of the png.

    Raises:
        ValueError: pictures of another shape, or labels or captions that do not match it.
    """
    cells = enlarged(pictures, size=112)
    rows, number, height, width = cells.shape[:4]
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows of pictures")
    if captions and [len(row) for row in captions] != [number] * rows:
        raise ValueError(f"captions must be {rows} rows of {number} texts, like the pictures")
    if columns and len(columns) != number:
        raise ValueError(f"{len(columns)} column labels for {number} columns of pictures")
    plan = _plan(cells.shape[:4], row_labels, captions, title, headings or {}, bool(columns), text)
    width_, height_ = plan.left + plan.inner + MARGIN, plan.height
    canvas = np.full((height_, width_, 3), 255, np.uint8)
    fig = Figure(figsize=(width_ / DPI, height_ / DPI), dpi=DPI)

    def write(x: float, y: float, words: str, **style: Any) -> None:
        style = {"color": INK, "parse_math": False, "linespacing": 1.15, "fontsize": plan.size} | style
        fig.text(x / width_, 1 - y / height_, words, **style)

    for i, y in enumerate(plan.tops):
        for j in range(number):
            x = plan.left + j * (width + GAP)
            canvas[y : y + height, x : x + width] = cells[i, j]
            if plan.captions:
                write(x + width / 2, y + height + 4, plan.captions[i][j], ha="center", va="top")
        if plan.labels:
            write(plan.left - 12, y + height / 2, plan.labels[i], ha="right", va="center", multialignment="right")
    for y, heading in plan.headings:
        write(MARGIN, y, heading, ha="left", va="top", weight=HEADING)
    for j, label in enumerate(columns):
        write(plan.left + j * (width + GAP) + width / 2, plan.tops[0] - 4, label, ha="center", va="bottom")
    fig.figimage(canvas, origin="upper")
    return save_figure(fig, path)


@dataclass(frozen=True)
class Plan:
    """Layout of a grid. Positions are in pixels, and text is wrapped already.

    Attributes:
        size: text size in points.
        left: x of the first picture.
        inner: width of all pictures together.
        height: height of the grid.
        tops: y of each row of pictures.
        headings: (y, text) of the title and of the headings above rows.
        labels: text to the left of each row.
        captions: text under each picture, as captions[row][column].
    """

    size: float
    left: int
    inner: int
    height: int
    tops: list[int]
    headings: list[tuple[int, str]]
    labels: list[str]
    captions: list[list[str]]


def _plan(
    shape: tuple[int, ...], labels: Sequence[str], captions: Sequence[Sequence[str]], title: str, above: Mapping[int, str],
    has_columns: bool, high: float,
) -> Plan:  # fmt: skip
    """Lay out a grid. Text grows with the width of the grid, so that it stays legible when scaled down to a phone."""
    rows, columns, height, width = shape
    inner, readable = columns * (width + GAP) - GAP, high / PHONE * 72 / DPI  # points per pixel of width
    left, size, broken = MARGIN, SMALLEST, []
    for _ in range(4 if labels else 1):  # larger labels widen the grid, which enlarges the labels
        size = max(SMALLEST, readable * (left + inner + MARGIN))
        lines = max(2, int((height + GAP + (text_height(1, size) if captions else 0)) / text_height(1, size)))
        broken = [wrap(text, max(120, 0.26 * inner), size, lines=lines) for text in labels]
        left = MARGIN + (16 + int(max(text_width(label, size) for label in broken)) if labels else 0)
    size = max(SMALLEST, readable * (left + inner + MARGIN))
    texts = [[wrap(text, width + GAP - 2, size, lines=3) for text in row] for row in captions]
    below = 4 + text_height(max((text.count("\n") + 1 for row in texts for text in row), default=0), size)
    below = below + 4 if texts else GAP  # captions sit nearer to their own picture than to the next
    y, tops, headings = MARGIN, [], []

    def head(text: str) -> int:
        """Add a heading at y, and return its height."""
        text = wrap(text, inner + left - MARGIN, size, weight=HEADING)
        headings.append((y, text))
        return text_height(text.count("\n") + 1, size) + 8

    y += head(title) if title else 0
    y += text_height(1, size) if has_columns else 0
    for row in range(rows):
        if row in above:
            y += 3 * GAP if row else 0
            y += head(above[row]) if above[row] else 0
        tops.append(y)
        y += height + below
    return Plan(size, left, inner, y + MARGIN - (4 if texts else GAP), tops, headings, broken, texts)


def levels(pictures: Tensor) -> np.ndarray:
    """Convert pictures (..., c, h, w) in [0, 1] to uint8 (..., h, w, c) with c = 1 or 3.

    Other values are clipped, and NaN becomes black. Any other number of channels is drawn side by side, in grey.
    """
    return (_visible(pictures) * 255).round().byte().movedim(-3, -1).numpy()


def _visible(pictures: Tensor) -> Tensor:
    if pictures.shape[-3] not in (1, 3):
        pictures = pictures.movedim(-3, -2).flatten(-2).unsqueeze(-3)
    return pictures.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def enlarged(pictures: Tensor, size: int) -> np.ndarray:
    """Convert pictures (rows, columns, c, h, w) in [0, 1] to uint8 (rows, columns, h', w', 3), about ``size`` pixels wide."""
    if pictures.ndim != 5 or not pictures.numel():
        raise ValueError(f"pictures must be (rows, columns, c, h, w), got {tuple(pictures.shape)}")
    pictures = _visible(pictures)
    height, width = pictures.shape[-2:]
    if width > 3 * size:  # average large pictures down, so that the file stays small
        small = (max(1, round(height * 3 * size / width)), 3 * size)
        pictures = adaptive_avg_pool2d(pictures.flatten(0, 1), small).unflatten(0, pictures.shape[:2])
    scale = max(1, round(size / width))
    cells = levels(pictures).repeat(scale, axis=2).repeat(scale, axis=3)
    return np.broadcast_to(cells, (*cells.shape[:4], 3))
