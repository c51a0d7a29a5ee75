"""Tables of the README and docs/ from the committed results.

This regenerates every table between the lines ``<!-- table: NAME ... -->`` and ``<!-- end -->`` of a page from
`benchmarks/results`. A test fails if a page and the results differ.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steerfm.cli.standings import BASE, curves
from steerfm.report.plots import cost_plot

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("results/benchmarks", "results/methods", "emoji", "scaling")))
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
PLOTS = {  # (suite, problem) -> file and title
    ("fashion", "bright"): ("docs/frontier-bright.png", "a bright dress, from the model without a class"),
    ("fashion", "both"): ("docs/frontier-both.png", "sandal and bag at once, from the model without a class"),
    ("lookahead", "smooth"): ("docs/lookahead-smooth.png", "a smooth reward: a bright dress"),
    ("lookahead", "sharp"): ("docs/lookahead-sharp.png", "a sharp reward: a bag, from the model without a class"),
    ("lookahead", "black box"): ("docs/lookahead-black-box.png", "a black box: a shirt that compresses well"),
}


def main(arguments: list[str]) -> None:
    """Copy new results into the repository, if any are named, and write the tables."""
    parser = argparse.ArgumentParser("steerfm bench page", description=__doc__)
    parser.add_argument("suites", nargs="*", help="suites whose runs/bench/SUITE/summary.json becomes the committed result")
    for suite in parser.parse_args(arguments).suites:
        summary = json.loads(Path(f"runs/bench/{suite}/summary.json").read_text())
        summary["command"] = re.sub(r" out=\S+", "", summary["command"])  # the output folder does not matter
        head = summary | {"rows": [{k: _short(v) for k, v in row.items()} for row in summary["rows"]]}
        lines = ",\n".join(json.dumps(row) for row in head.pop("rows"))
        (RESULTS / f"{suite}.json").write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}]}}\n')
    for page in PAGES:
        file = ROOT / page
        text = file.read_text()
        if (new := render(text)) != text:
            file.write_text(new)
            print(f"written: {page}")
    for (suite, problem), (file, title) in PLOTS.items():
        if (RESULTS / f"{suite}.json").is_file():
            rows = [row for row in _suite(suite)["rows"] if row["problem"] == problem]
            cost_plot(curves(rows), ROOT / file, title, "held-out reward")


def render(text: str) -> str:
    """Return a page with its tables regenerated."""

    def table(match: re.Match[str]) -> str:
        name, *arguments = re.split(r"\s*;\s*", match[2])
        return f"{match[1]}{TABLES[name](*arguments)}\n{match[3]}"

    return BLOCK.sub(table, text)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _suite(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _problems(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[int], dict[tuple[str, int], dict[str, Any]]]]:
    """Yield (title, budgets, rows by (method, budget)) of each problem; plain samples have budget 0."""
    for key in dict.fromkeys((row["model"], row["problem"], row["strength"]) for row in rows):
        of = {(r["method"], r["budget"]): r for r in rows if (r["model"], r["problem"], r["strength"]) == key}
        yield f"*{key[1]}* ({key[0]}, strength {key[2]:g})", sorted({b for _, b in of} - {0}), of


def _best(of: dict[tuple[str, int], dict[str, Any]], budget: int) -> float:
    """Return the highest held-out reward of a problem at a budget."""
    return max(row["held_out"] for (_, cost), row in of.items() if cost == budget)


def machine(name: str) -> str:
    """Return a line about how a suite was run."""
    suite = _suite(name)
    minutes = sum(row["seconds"] * row["outputs"] for row in suite["rows"]) / 60
    return (
        f"`{suite['command']}`: {suite['seeds']} seeds of {suite['n']} outputs per problem, {minutes:.0f} minutes in methods; "
        f"{suite['machine']}, {suite['threads']} threads, torch {suite['torch']}, steerfm {suite['steerfm']}."
    )


def problems(name: str) -> str:
    """Return a table per problem: held-out rewards at every budget; cost and quality at the largest budget."""
    parts = [machine(name)]
    for title, budgets, of in _problems(_suite(name)["rows"]):
        base = of[BASE, 0]
        dearest = {method: row for (method, _), row in sorted(of.items(), key=lambda item: item[0][1]) if method != BASE}
        lines = []
        for method, last in sorted(dearest.items(), key=lambda item: -item[1]["held_out"]):
            cells = []
            for budget in budgets:
                row = of.get((method, budget))
                text = f"{row['held_out']:.3g} ± {(row['high'] - row['low']) / 2:.2g}" if row else ""
                cells.append(f"**{text}**" if row and row["held_out"] == _best(of, budget) else text)
            lines.append([method, *cells, f"{last['diversity']:.3g}", f"{last['distance']:.3g}", f"{last['seconds']:.2g}"])
        header = ["method", *map(str, budgets), "diversity", "distance", "s per output"]
        says = f"{title}; plain samples have {base['held_out']:.3g}, diversity {base['diversity']:.3g}"
        parts.append(f"{says}, distance {base['distance']:.3g}:\n\n{_markdown(header, lines)}")
    return "\n\n".join(parts)


def misses(name: str, *methods: str) -> str:
    """Return the mean gap of each method to the best method of the same problem and budget."""
    problems_ = list(_problems(_suite(name)["rows"]))
    budgets = problems_[0][1]
    lines = []
    for method in methods or dict.fromkeys(method for _, _, of in problems_ for method, budget in of if budget):
        cells = []
        for budget in budgets:
            gaps = [_best(of, budget) - of[method, budget]["held_out"] for _, _, of in problems_ if (method, budget) in of]
            cells.append(f"{sum(gaps) / len(gaps):.2f}" if len(gaps) == len(problems_) else "")
        lines.append([f"`{method}`", *cells])
    return _markdown(["network evaluations per output", *map(str, budgets)], lines)


def paired(name: str) -> str:
    """Return differences to plain samples and to best-of-n at the same cost, paired by seed."""
    parts = [machine(name)]
    for title, _, of in _problems(_suite(name)["rows"]):
        lines = []
        for (method, budget), row in of.items():
            if budget:
                over = [
                    f"{row[f'over_{other}']:+.4f} ± {row[f'over_{other}_half']:.4f}" if f"over_{other}" in row else ""
                    for other in ("unsteered", "best_of_n")
                ]
                lines.append([method, str(budget), f"{row['held_out']:.4f}", *over, f"{row['seconds']:.2g}"])
        header = ["method", "evaluations", "held out", "over plain samples", "over best-of-n of the same cost", "s per output"]
        parts.append(f"{title}; plain samples have {of[BASE, 0]['held_out']:.4f}:\n\n{_markdown(header, lines)}")
    return "\n\n".join(parts)


def speed() -> str:
    """Return wall times relative to the bare loop."""
    result = json.loads((RESULTS / "speed.json").read_text())
    overheads = result["overheads"].items()
    lines = [[name, f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"] for name, row in overheads]
    where = f"{result['particles']} rows, {result['steps']} steps, {result['threads']} threads, torch {result['torch']}"
    return f"{where}:\n\n{_markdown(['', 'ratio', 'quartiles'], lines)}"


def scan() -> str:
    """Return seconds by size, with the fitted line (least squares of relative errors)."""
    result = json.loads((RESULTS / "scaling.json").read_text())
    parts = [f"{result['device']}, {result['threads']} threads, torch {result['torch']}."]
    fits = []
    for name, points in result["scan"].items():
        sizes, seconds = np.array(points).T
        header = [name, *(f"{size:g}" for size in sizes)]
        parts.append(_markdown(header, [["seconds", *(f"{second:.3g}" for second in seconds)]]))
        if name != "micro-batch":  # a constant, not a line
            x = sizes**2 if name.startswith("side") else sizes
            (slope, start), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1) / seconds[:, None], np.ones_like(x))
            worst = np.abs((start + slope * x) / seconds - 1).max()
            unit = "pixel" if name.startswith("side") else name.removesuffix("s")
            fits.append([name, f"{1e3 * start:.1f}", f"{1e3 * slope:.3g} per {unit}", f"{worst:.0%}"])
    header = ["", "intercept (ms)", "slope (ms)", "largest residual"]
    return "\n\n".join([*parts, _markdown(header, fits)])


TABLES: dict[str, Callable[..., str]] = {f.__name__: f for f in (problems, misses, paired, speed, scan)}
