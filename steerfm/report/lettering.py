"""Measure and wrap the text in figures."""

from __future__ import annotations

import math
import re

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

DPI = 100


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width in pixels of the longest line of a text of ``size`` points; ``weight`` is normal or bold."""
    font = FontProperties(size=size, weight=weight)
    lines = [line for line in text.split("\n") if line]
    widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in lines]
    return max(widths, default=0.0) * DPI / 72


def text_height(lines: int, size: float) -> int:
    return math.ceil(lines * size * 1.35 * DPI / 72)


def wrap(text: str, width: float, size: float, lines: int = 4, weight: str = "normal") -> str:
    """Wrap a text to at most ``lines`` lines of ``width`` pixels; an ellipsis replaces the rest."""
    broken: list[str] = []
    for paragraph in str(text).split("\n"):
        broken.append("")
        for piece in re.split(r"(?<=[\s(,/_])", paragraph):  # break after spaces, and inside calls, paths and names
            if broken[-1] and text_width((broken[-1] + piece).rstrip(), size, weight) > width:
                broken.append("")
            broken[-1] += piece
    if len(broken) > lines:
        broken = [*broken[: lines - 1], broken[lines - 1].rstrip() + "…"]
    return "\n".join(_truncate(line.rstrip(), width, size, weight) for line in broken)


def _truncate(line: str, width: float, size: float, weight: str) -> str:
    while len(line) > 2 and text_width(line, size, weight) > width:
        line = line[:-2] + "…"
    return line
