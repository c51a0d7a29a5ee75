"""What the commands print can be read and pasted: no word, number or path is broken, however narrow the terminal."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from steerfm.cli import console as printing

WORDS = [
    "0.1234±0.0567",
    "-1.5e-05",
    "best_of_n",
    "runs/steer/fashion-classifier-Bag-funnel/samples.safetensors",
    "of",
    "a",
    "0.97",
    "\u559c",
]


@pytest.fixture
def shown(monkeypatch):
    def shown(width: int, call) -> str:
        file = io.StringIO()
        soft = printing.console.soft_wrap
        console = Console(file=file, width=width, highlight=False, markup=False, emoji=False, soft_wrap=soft)
        monkeypatch.setattr(printing, "console", console)
        call()
        return file.getvalue()

    return shown


@pytest.mark.parametrize("width", [30, 60, 80, 120, 400])
@pytest.mark.parametrize("seed", range(6))
def test_no_word_of_a_table_is_broken(shown, width, seed):
    draw = random.Random(seed)
    columns = draw.randint(2, 7)
    rows = [[" ".join(draw.choices(WORDS, k=draw.randint(0, 6))) for _ in range(columns)] for _ in range(5)]
    rows = [[f"name{i}", *row[1:]] for i, row in enumerate(rows)]
    header = ["", *(draw.choice(["reward", "held out, over base in 4 jumps", "s"]) for _ in range(columns - 1))]
    text = shown(width, lambda: printing.print_table(header, rows, "a title"))
    given = sorted(word for line in [header, *rows] for cell in line for word in cell.split())
    lines = [line for line in text.splitlines() if set(line.strip()) - {"─"} and line.strip() != "a title"]
    assert sorted(word for line in lines for word in line.split()) == given
    longest = [max(len(word) for line in [header, *rows] for word in [*line[column].split(), ""]) for column in range(columns)]
    if sum(longest) + 3 * columns + sum(text.count("\u559c") > 0 for _ in longest) <= width:
        assert max(len(line.rstrip()) for line in lines) <= width


def test_a_line_is_not_broken_where_a_command_or_path_stands_in_it(shown):
    path = "/".join(["a folder with a long name"] * 20)
    assert shown(80, lambda: printing.console.print(f"report.html in {path}")) == f"report.html in {path}\n"
