"""Grids of pictures, every pixel a square of whole screen pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from steerfm.report.lettering import DPI, text_height, text_width, wrap
from steerfm.report.style import INK, save_figure


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
    cells = enlarged(pictures, size=112)
    rows, columns, height, width = cells.shape[:4]
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows of pictures")
    if captions and [len(row) for row in captions] != [columns] * rows:
        raise ValueError(f"captions must be {rows} rows of {columns} texts, like the pictures")
    gap, margin, small, normal, large = 6, 14, 8.0, 9.0, 11.0
    labels = [wrap(text, 180, normal) for text in row_labels]
    texts = [[wrap(text, width + gap - 2, small, lines=3) for text in row] for row in captions]
    left = margin + (16 + int(max(text_width(label, normal) for label in labels)) if labels else 0)
    below = 4 + text_height(max((text.count("\n") + 1 for row in texts for text in row), default=0), small)
    below = below + 4 if texts else gap  # captions sit nearer to their own picture than to the next
    inner = columns * (width + gap) - gap
    heading = wrap(title, inner + left - margin, large)
    top = margin + (text_height(heading.count("\n") + 1, large) + 8 if title else 0)
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
    return save_figure(fig, path)


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
