"""How plots look: colours, axes, and the file that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from steerfm import files

INK, SOFT, LINE = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, TEAL = "#2563eb", "#ea580c", "#0d9488"


def prepare(ax: Any, title: str) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(SOFT)
    ax.tick_params(which="both", labelsize=8, color=SOFT, labelcolor=INK)
    ax.grid(color=LINE, linewidth=0.7)
    ax.set_axisbelow(True)


def save_figure(fig: Figure, path: str | Path) -> Path:
    path = Path(path)
    with files.whole(path) as temporary:
        fig.savefig(temporary, facecolor="white", format=path.suffix[1:] or "png")
    return path


def array(value: Any) -> np.ndarray:
    """A tensor, array or list as an array."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)
