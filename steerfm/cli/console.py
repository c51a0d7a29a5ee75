"""Console output: text, tables and progress bars."""

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
"""Prints text literally: brackets are no markup, and long lines are not broken, so that paths and commands can be pasted. Bold
text is a `Text`."""


class WholeWords(Table):
    """A table that never breaks a word.

    Columns are narrowed at spaces, the widest first. If that is not enough, lines are longer than the terminal.
    """

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
    """Return a table without borders."""
    return WholeWords(*columns, title=title or None, box=box.SIMPLE, title_justify="left", pad_edge=False)


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> None:
    """Print a table of texts."""
    table = make_table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def progress(what: str, total: int):
    """Show a progress bar if the output is a terminal; yields the function tick(count, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count, total: bar.update(task, completed=count, total=total)


def quiet_lightning() -> None:
    """Silence Lightning's tips and device lists, which bury the output of a run."""
    import lightning.pytorch  # noqa: F401  its import sets the log level

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
