"""Tables and pictures of a sweep of `steerfm bench`, one set per problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.cli.console import print_table
from steerfm.held_out import IN_WORDS
from steerfm.metrics import Difference

BASE, BASELINE = "unsteered, 4 jumps", "best_of_n"
"""Plain samples of a model of four jumps (for other models see `Problem.unsteered`), and the baseline of all methods."""
COLUMNS = 6
"""Number of outputs of each method in a picture."""
HEADER = ["method", "held out", "95%", "over best_of_n", "over unsteered", "reward", "diversity", "distance", "calls", "s"]
SHORT = [0, 1, 3, 5, 6, 8, 9]
"""The columns that fit a terminal; the report shows all."""
ALONE, SHORT_ALONE = ["method", "reward", *HEADER[2:5], *HEADER[6:]], [0, 1, 2, 3, 5, 7, 8]
"""The same without a judge."""
NOTHING_HELD_OUT = "no judge: methods are ranked by the reward itself, nothing is held out"
STAR = "* no other row is better at the same or lower cost"


def what_counts(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the key that cells or rows are ranked by: "held_out", or "reward" if there is no judge."""
    return "held_out" if all("held_out" in one for one in cells) else "reward"


def worth(row: Mapping[str, Any]) -> float:
    """Return the mean that a row is ranked by."""
    return row[what_counts([row])]


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Return method -> (evaluations, mean, half-width of its interval) from the rows of a `summary`, for `cost_plot`."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        lines.setdefault(row["method"], []).append((row["evaluations"], worth(row), (row["high"] - row["low"]) / 2))
    return lines


Table = tuple[str, list[str], list[list[str]]]
"""Title, header and lines."""


def table(title: str, budget: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Print and return the table of a problem at a budget, the best method first."""
    lines = [_line(row) for row in sorted(rows, key=lambda row: -worth(row))]
    alone = what_counts(rows) == "reward"
    header, some, also = (ALONE, SHORT_ALONE, f"; {NOTHING_HELD_OUT}") if alone else (HEADER, SHORT, "")
    columns = [[line[i] for i in some] for line in lines]
    print_table([header[i] for i in some], columns, f"{title}: {budget} network evaluations per output{also}")
    return f"{title}: {budget} evaluations{also}. {STAR}", header, lines


def difference_table(pair: Sequence[str], differences: Sequence[tuple[str, int, str, Difference]]) -> Table:
    """Print and return the table of differences between two methods.

    Args:
        pair: names of the methods.
        differences: (problem, budget, key that counts, difference) of each line.
    """
    a, b = pair
    header = ["problem", "calls", "difference", "95%", "of", "better"]
    lines = [
        [problem, str(budget), f"{d.mean:+.3f}", d.limits, IN_WORDS[counts], d.better(a, b)]
        for problem, budget, counts, d in differences
    ]
    pairs = next((f", {d.pairs} pairs of the same seed" for *_, d in differences), ": they share no budget")
    kinds = {counts for _, _, counts, _ in differences}
    title = f"{IN_WORDS['reward' if kinds == {'reward'} else 'held_out']} of {a} over {b}{pairs}"
    if len(kinds) == 1:
        header, lines = [name for name in header if name != "of"], [[*line[:4], line[5]] for line in lines]
    print_table(header, lines, title)
    return title, header, lines


def draw(
    title: str, rows: Sequence[Mapping[str, Any]], first: Mapping[str, Mapping[str, Tensor]], budget: int, path: Path
) -> list[tuple[str, Path]]:
    """Draw PATH.png, the result against cost, and PATH-pictures.png, the outputs of the first seed at a budget.

    Args:
        title: title of the problem.
        rows: all rows of the problem.
        first: cells of the first seed at the budget, by method.
        budget: network evaluations per output.
        path: path of the pictures, without a suffix.

    Returns:
        (caption, path) of each picture.
    """
    from steerfm.report.pictures import picture_grid  # matplotlib: workers that draw nothing need not import it
    from steerfm.report.plots import cost_plot

    counts = what_counts(rows)
    what = IN_WORDS[counts]
    plot = cost_plot(curves(rows), path.with_name(f"{path.name}.png"), title, what)
    figures = [(f"{title}: {what} against cost", plot)]
    if all("pictures" in cell for cell in first.values()):
        grid = torch.stack([cell["pictures"][:COLUMNS] for cell in first.values()]).float() / 255
        captions = [[f"{value:.2f}" for value in cell[counts][: grid.shape[1]].tolist()] for cell in first.values()]
        file = picture_grid(grid, path.with_name(f"{path.name}-pictures.png"), list(first), captions, title)
        figures.append((f"{title}: outputs of seed 0 at {budget} evaluations, {what} below", file))
    return figures


def mean_ranks(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean rank of each method, the best first."""
    ranks: dict[str, list[int]] = {}
    for row in rows:
        if row["budget"]:
            ranks.setdefault(row["method"], []).append(row["rank"])
    means = {name: sum(of) / len(of) for name, of in ranks.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def _line(row: Mapping[str, Any]) -> list[str]:
    """Format a row of the tables; a star marks the Pareto frontier of the problem."""

    def over(name: str) -> str:
        return f"{row[f'over_{name}']:+.3f}±{row[f'over_{name}_half']:.3f}" if f"over_{name}" in row else ""

    reward = [f"{row['reward']:.3f}"] if "held_out" in row else []  # otherwise the reward is the first column already
    return [
        row["method"] + (" *" if row["pareto"] else ""), f"{worth(row):.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
        over(BASELINE), over("unsteered"), *reward, f"{row['diversity']:.3f}", f"{row['distance']:.3f}",
        f"{row['evaluations']:.0f}", f"{row['seconds']:.2f}",
    ]  # fmt: skip
