"""The tables and pictures of a sweep of `steerfm bench`: what its rows say, problem by problem."""

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
"""Plain samples, of a model of four jumps (of others `Problem.unsteered` says it), and what every method is compared with."""
COLUMNS = 6
"""Outputs of each method that are drawn."""
HEADER = ["method", "held out", "95%", "over best_of_n", "over unsteered", "reward", "diversity", "distance", "calls", "s"]
SHORT = [0, 1, 3, 5, 6, 8, 9]
"""The columns that fit a terminal; the report has all."""
ALONE, SHORT_ALONE = ["method", "reward", *HEADER[2:5], *HEADER[6:]], [0, 1, 2, 3, 5, 7, 8]
"""The same where there is no judge."""
NOTHING_HELD_OUT = "no judge: the reward itself counts, nothing is held out"
STAR = "* marks a row than which none is better at the same cost or less"


def what_counts(found: Sequence[Mapping[str, Any]]) -> str:
    """Of cells or rows: "held_out", or "reward" where there is no judge."""
    return "held_out" if all("held_out" in one for one in found) else "reward"


def worth(row: Mapping[str, Any]) -> float:
    """The mean of what counts."""
    return row[what_counts([row])]


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Method -> (evaluations, what counts, half of its interval) of the rows of a `summary`, for `cost_plot`."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append((row["evaluations"], worth(row), (row["high"] - row["low"]) / 2))
    return found


Table = tuple[str, list[str], list[list[str]]]
"""Title, header and lines."""


def table(title: str, budget: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    """That of the rows of a problem at a budget, the best method first; prints it."""
    lines = [_line(row) for row in sorted(rows, key=lambda row: -worth(row))]
    alone = what_counts(rows) == "reward"
    header, some, also = (ALONE, SHORT_ALONE, f"; {NOTHING_HELD_OUT}") if alone else (HEADER, SHORT, "")
    shown = [[line[i] for i in some] for line in lines]
    print_table([header[i] for i in some], shown, f"{title}: {budget} network evaluations an output{also}")
    return f"{title}: {budget} evaluations{also}. {STAR}", header, lines


def difference_table(pair: Sequence[str], found: Sequence[tuple[str, int, str, Difference]]) -> Table:
    """How two methods differ, from (problem, budget, what counts, difference); prints it."""
    a, b = pair
    header = ["problem", "calls", "difference", "95%", "of", "better"]
    lines = [
        [problem, str(budget), f"{d.mean:+.3f}", d.limits, IN_WORDS[counts], d.better(a, b)]
        for problem, budget, counts, d in found
    ]
    pairs = next((f", {d.pairs} pairs of the same seed" for *_, d in found), ": they share no budget")
    kinds = {counts for _, _, counts, _ in found}
    title = f"{IN_WORDS['reward' if kinds == {'reward'} else 'held_out']} of {a} over {b}{pairs}"
    if len(kinds) == 1:
        header, lines = [name for name in header if name != "of"], [[*line[:4], line[5]] for line in lines]
    print_table(header, lines, title)
    return title, header, lines


def draw(
    title: str, rows: Sequence[Mapping[str, Any]], first: Mapping[str, Mapping[str, Tensor]], budget: int, path: Path
) -> list[tuple[str, Path]]:
    """PATH.png, what counts by cost, and PATH-pictures.png, the outputs of the first seed at a budget.

    Args:
        title: of the problem.
        rows: all of it.
        first: the cells of the first seed at the budget, by method.
    """
    from steerfm.report.pictures import picture_grid  # matplotlib, which workers that draw nothing need not import
    from steerfm.report.plots import cost_plot

    counts = what_counts(rows)
    what = IN_WORDS[counts]
    plot = cost_plot(curves(rows), path.with_name(f"{path.name}.png"), title, what)
    drawn = [(f"{title}: {what} against cost", plot)]
    if all("pictures" in cell for cell in first.values()):
        grid = torch.stack([cell["pictures"][:COLUMNS] for cell in first.values()]).float() / 255
        captions = [[f"{value:.2f}" for value in cell[counts][: grid.shape[1]].tolist()] for cell in first.values()]
        file = picture_grid(grid, path.with_name(f"{path.name}-pictures.png"), list(first), captions, title)
        drawn.append((f"{title}: outputs of seed 0 at {budget} evaluations, {what} below", file))
    return drawn


def mean_ranks(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Method -> its rank in the mean, the best first."""
    ranks: dict[str, list[int]] = {}
    for row in rows:
        if row["budget"]:
            ranks.setdefault(row["method"], []).append(row["rank"])
    means = {name: sum(of) / len(of) for name, of in ranks.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def _line(row: Mapping[str, Any]) -> list[str]:
    """A row of the printed tables; a star marks the Pareto frontier of its problem."""

    def over(name: str) -> str:
        return f"{row[f'over_{name}']:+.3f}±{row[f'over_{name}_half']:.3f}" if f"over_{name}" in row else ""

    reward = [f"{row['reward']:.3f}"] if "held_out" in row else []  # else it is what counts already
    return [
        row["method"] + (" *" if row["pareto"] else ""), f"{worth(row):.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
        over(BASELINE), over("unsteered"), *reward, f"{row['diversity']:.3f}", f"{row['distance']:.3f}",
        f"{row['evaluations']:.0f}", f"{row['seconds']:.2f}",
    ]  # fmt: skip
