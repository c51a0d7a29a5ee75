"""What the commands print: texts, tables, bars of progress."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, markup=False, emoji=False)
"""Prints texts as they are: a name in brackets is no style. What is to be bold is a `Text`."""


def make_table(*columns: str, title: str = "") -> Table:
    """A table without frames; the first column is in one line, and where there is no room for the others they go on below."""
    table = Table(*columns, title=title or None, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"  # a figure that is cut is lost
    return table


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
