"""`steerfm data`: prepare and check a data set."""

from __future__ import annotations

from steerfm.cli.console import console, make_table, progress
from steerfm.cli.parts import data_set


def prepare_data(name: str, size: int, root: str | None) -> None:
    """Prepare and check a data set, and print its size and licence.

    Args:
        name: of the data set.
        size: side of the pictures, in pixels.
        root: data folder; None for the default.
    """
    with progress("preparing", 1) as tick:
        table, lines = data_set(name).prepare(root, size, tick)
    if table:
        show = make_table(*table[0])
        for row in table[1:]:
            show.add_row(*row)
        console.print(show)
    for line in lines:
        console.print(line)
