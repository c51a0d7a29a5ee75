"""`steerfm data`: prepare and check a data set."""

from __future__ import annotations

from steerfm.cli.console import console, make_table, progress
from steerfm.cli.parts import data_set


def prepare_data(name: str, size: int, root: str | None) -> None:
    """Prepare and check a data set, and say what there is of it and under which licence."""
    with progress("preparing", 1) as tick:
        table, lines = data_set(name).prepare(root, size, tick)
    if table:
        show = make_table(*table[0])
        for row in table[1:]:
            show.add_row(*row)
        console.print(show)
    for line in lines:
        console.print(line)
