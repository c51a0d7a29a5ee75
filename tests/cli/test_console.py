"""What is printed."""

from __future__ import annotations

import pytest

from steerfm.cli.console import console, print_table


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_word_or_figure_is_broken(monkeypatch, capsys, width):
    """Columns that have no room go on below; all is there once, and the first column with each part."""
    monkeypatch.setattr(console, "_width", width)
    header = ["", "reward", "held out", "diversity", "support", "distance", "held out, over base in 4 jumps", "path"]
    rows = [
        [f"base, {n} jumps, best of 16", "-0.3071", "-0.3314", "1.0123", "0.9219", f"{n}.16", f"-0.0{n}1±0.151", "runs/a/b.png"]
        for n in (1, 4)
    ]
    print_table(header, rows, "a title")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for row in rows:
        line = [line for line in printed.splitlines() if line.strip().startswith(row[0])]
        assert sum(len(piece.replace(row[0], "").split()) for piece in line) == len(row) - 1
        assert all(any(f" {cell}" in piece for piece in line) for cell in row[1:])
    assert printed.count("a title") == 1 and all(word in printed.split() for name in header for word in name.split())
