"""What the commands print: texts, tables, bars of progress."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import contextmanager
from operator import gt

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
"""Prints texts as they are: a name in brackets is no style, and a path or command that is broken cannot be pasted. What is to
be bold is a `Text`."""


class WholeWords(Table):
    """A table that breaks no word: columns become narrower where there are spaces, the widest first; where that is not enough,
    the lines are longer than the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[str(cell) for cell in (column.header, *column.cells)] for column in self.columns]
        least = [max(cell_len(word) for cell in column for word in ("", *cell.split())) for column in cells]
        widths = [max(map(cell_len, column)) for column in cells]
        frame = 3 * len(cells)
        while sum(widths) + frame > options.max_width and any(map(gt, widths, least)):
            widths[max(range(len(cells)), key=lambda i: (widths[i] > least[i], widths[i]))] -= 1
        for column, width in zip(self.columns, widths):
            column.width = width
        yield from super().__rich_console__(console, options.update_width(max(options.max_width, sum(widths) + frame)))


def make_table(*columns: str, title: str = "") -> Table:
    """A table without frames."""
    return WholeWords(*columns, title=title or None, box=box.SIMPLE, title_justify="left", pad_edge=False)


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> None:
    """Print a table of texts."""
    table = make_table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def progress(what: str, total: int):
    """One bar, on a terminal only; yields tick(done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def quiet_lightning() -> None:
    """Lightning's tips and lists of devices hide what a run has to say."""
    import lightning.pytorch  # noqa: F401  sets its own level

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
