"""Grids of pictures, every pixel a square of whole screen pixels."""

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
"""Pixels between pictures, and around all."""
SMALLEST, READABLE = 8.0, 9.3 / 358 * 72 / DPI
"""Points of a text; points a pixel of width, so that a text is 9.3 pixels high where the grid is shrunk to a page of 390."""


def picture_grid(
    pictures: Tensor,
    path: str | Path,
    row_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    headings: Mapping[int, str] | None = None,
) -> Path:
    """Draw pictures in rows and columns, every pixel a square of whole screen pixels.

    Args:
        pictures: (rows, columns, c, h, w) in [0, 1], others are clipped, NaN is black. c = 1 is grey, 3 is colour; of any other
            number the channels stand side by side, in grey.
        path: of the png.
        row_labels: a label left of each row.
        captions: a text under each picture, [row][column]; may hold line breaks, long ones are wrapped.
        title: above the grid.
        headings: row -> a text above it, and a gap; a gap only, where the text is empty.

    Raises:
        ValueError: another shape of pictures, or labels and captions that do not fit it.
    """
    cells = enlarged(pictures, size=112)
    rows, columns, height, width = cells.shape[:4]
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows of pictures")
    if captions and [len(row) for row in captions] != [columns] * rows:
        raise ValueError(f"captions must be {rows} rows of {columns} texts, like the pictures")
    plan = _plan(cells.shape[:4], row_labels, captions, title, headings or {})
    width_, height_ = plan.left + plan.inner + MARGIN, plan.height
    canvas = np.full((height_, width_, 3), 255, np.uint8)
    fig = Figure(figsize=(width_ / DPI, height_ / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        style = {"color": INK, "parse_math": False, "linespacing": 1.15, "fontsize": plan.size} | style
        fig.text(x / width_, 1 - y / height_, text, **style)

    for i, y in enumerate(plan.tops):
        for j in range(columns):
            x = plan.left + j * (width + GAP)
            canvas[y : y + height, x : x + width] = cells[i, j]
            if plan.captions:
                write(x + width / 2, y + height + 4, plan.captions[i][j], ha="center", va="top")
        if plan.labels:
            write(plan.left - 12, y + height / 2, plan.labels[i], ha="right", va="center", multialignment="right")
    for y, text in plan.headings:
        write(MARGIN, y, text, ha="left", va="top", weight="bold")
    fig.figimage(canvas, origin="upper")
    return save_figure(fig, path)


@dataclass(frozen=True)
class Plan:
    """Where things are in a grid, in pixels, its texts, broken into lines, and their size in points.

    Attributes:
        left: of the first picture.
        inner: width of all pictures.
        height: of the whole.
        tops: of each row of pictures.
        headings: the title and those above rows, each with its top.
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
    shape: tuple[int, ...], labels: Sequence[str], captions: Sequence[Sequence[str]], title: str, above: Mapping[int, str]
) -> Plan:
    """Room for texts that can still be read where the grid is as wide as a phone: the wider it is, the larger they are."""
    rows, columns, height, width = shape
    inner = columns * (width + GAP) - GAP
    left, size, broken = MARGIN, SMALLEST, []
    for _ in range(4 if labels else 1):  # larger labels make it wider
        size = max(SMALLEST, READABLE * (left + inner + MARGIN))
        lines = max(2, int((height + GAP + (text_height(1, size) if captions else 0)) / text_height(1, size)))
        broken = [wrap(text, max(120, 0.26 * inner), size, lines=lines) for text in labels]
        left = MARGIN + (16 + int(max(text_width(label, size) for label in broken)) if labels else 0)
    size = max(SMALLEST, READABLE * (left + inner + MARGIN))
    texts = [[wrap(text, width + GAP - 2, size, lines=3) for text in row] for row in captions]
    below = 4 + text_height(max((text.count("\n") + 1 for row in texts for text in row), default=0), size)
    below = below + 4 if texts else GAP  # captions sit nearer to their own picture than to the next
    y, tops, headings = MARGIN, [], []

    def head(text: str) -> int:
        """Put a heading at y; how far down it goes."""
        text = wrap(text, inner + left - MARGIN, size * 1.1)
        headings.append((y, text))
        return text_height(text.count("\n") + 1, size) + 8

    y += head(title) if title else 0
    for row in range(rows):
        if row in above:
            y += 3 * GAP if row else 0
            y += head(above[row]) if above[row] else 0
        tops.append(y)
        y += height + below
    return Plan(size, left, inner, y + MARGIN - (4 if texts else GAP), tops, headings, broken, texts)


def levels(pictures: Tensor) -> np.ndarray:
    """Pictures (..., c, h, w) in [0, 1], others are clipped, as bytes (..., h, w, c) with c = 1 or 3; NaN is black, other
    channels stand side by side in grey."""
    return (_visible(pictures) * 255).round().byte().movedim(-3, -1).numpy()


def _visible(pictures: Tensor) -> Tensor:
    if pictures.shape[-3] not in (1, 3):
        pictures = pictures.movedim(-3, -2).flatten(-2).unsqueeze(-3)
    return pictures.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def enlarged(pictures: Tensor, size: int) -> np.ndarray:
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
