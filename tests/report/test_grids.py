"""Grids of pictures."""

from __future__ import annotations

import time

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from steerfm.report.pictures import picture_grid


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_grid_pixels_are_exact_squares(tmp_path):
    pictures = torch.rand(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    image = read(picture_grid(pictures, tmp_path / "new" / "grid.png"))
    assert image.shape == (2 * 112 + 6 + 28, 3 * 112 + 2 * 6 + 28, 3)
    cell = image[14 : 14 + 112, 14 : 14 + 112]
    expected = (pictures[0, 0, 0] * 255).round().byte().numpy().repeat(4, 0).repeat(4, 1)
    assert (cell == expected[..., None]).all()


def test_grid_with_all_texts_is_fast_and_leaves_no_style(tmp_path):
    before = dict(matplotlib.rcParams)
    pictures = torch.rand(8, 8, 3, 28, 28)
    captions = [[f"class {i}{j}\n{i / 9:.3f}" for j in range(8)] for i in range(8)]
    labels = ["a method(with=many, long=arguments, one=2)", *["$x_1"] * 7]  # not mathematics
    started = time.process_time()
    path = picture_grid(pictures, tmp_path / "grid.png", labels, captions, "title " * 60)
    assert time.process_time() - started < 3  # about 0.4 s; one axes a picture took many times that
    assert path.stat().st_size < 4e6
    assert dict(matplotlib.rcParams) == before


def test_grid_scales_large_pictures_down_and_clips(tmp_path):
    pictures = torch.full((1, 2, 3, 800, 600), 7.0)
    pictures[0, 1] = float("nan")
    image = read(picture_grid(pictures, tmp_path / "grid.png"))
    assert image.shape[:2] == (448 + 28, 2 * 336 + 6 + 28)
    assert (image[100, 100] == 255).all() and (image[100, 500] == 0).all()


def test_grid_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="pictures must be"):
        picture_grid(torch.rand(2, 1, 8, 8), tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        picture_grid(torch.rand(2, 2, 1, 8, 8), tmp_path / "x.png", row_labels=["a"])
    with pytest.raises(ValueError, match="captions must be 2 rows of 2"):
        picture_grid(torch.rand(2, 2, 1, 8, 8), tmp_path / "x.png", captions=[["a", "b"], ["c"]])


def test_headings_stand_above_their_rows_and_keep_them_apart(tmp_path):
    pictures = torch.zeros(4, 2, 1, 28, 28)
    plain = read(picture_grid(pictures, tmp_path / "a.png"))
    gap = read(picture_grid(pictures, tmp_path / "b.png", headings={2: ""}))
    named = read(picture_grid(pictures, tmp_path / "c.png", headings={0: "first", 2: "second"}))

    def white(image) -> list[int]:
        """Heights of the bands without a picture."""
        dark = (image[:, 14 + 56] == 0).all(-1).astype(int)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], dark, [0]])))
        return [int(b - a) for a, b in zip([0, *edges[1::2]], [*edges[::2], len(dark)])]

    assert white(plain) == [14, 6, 6, 6, 14]
    assert white(gap) == [14, 6, 24, 6, 14]
    above, first, between, second, below = white(named)
    assert first == second == 6 and below == 14 and above > 25 and between > 40
