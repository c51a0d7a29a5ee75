"""Tables of the README and docs/ from the committed results.

Between the lines ``<!-- table: NAME ... -->`` and ``<!-- end -->`` of a page stands a table of what `benchmarks/results` holds;
this writes them anew. A test fails where a page says something else than the results.
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
    """Take new results into the repository, if any are named, and write the tables."""
    parser = argparse.ArgumentParser("steerfm bench page", description=__doc__)
    parser.add_argument("suites", nargs="*", help="suites whose runs/bench/SUITE/summary.json becomes the committed result")
    for suite in parser.parse_args(arguments).suites:
        found = json.loads(Path(f"runs/bench/{suite}/summary.json").read_text())
        found["command"] = re.sub(r" out=\S+", "", found["command"])  # where it was kept is nobody's business
        kept = found | {"rows": [{k: _short(v) for k, v in row.items()} for row in found["rows"]]}
        lines = ",\n".join(json.dumps(row) for row in kept.pop("rows"))
        (RESULTS / f"{suite}.json").write_text(json.dumps(kept)[:-1] + f', "rows": [\n{lines}]}}\n')
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
    """A page with its tables written anew."""

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
    """(title, budgets, (method, budget) -> row) of each problem; plain samples are at budget 0."""
    for key in dict.fromkeys((row["model"], row["problem"], row["strength"]) for row in rows):
        of = {(r["method"], r["budget"]): r for r in rows if (r["model"], r["problem"], r["strength"]) == key}
        yield f"*{key[1]}* ({key[0]}, strength {key[2]:g})", sorted({b for _, b in of} - {0}), of


def _best(of: dict[tuple[str, int], dict[str, Any]], budget: int) -> float:
    """The highest held-out reward of a problem at a budget."""
    return max(row["held_out"] for (_, cost), row in of.items() if cost == budget)


def machine(name: str) -> str:
    """How a suite was run, in a line."""
    told = _suite(name)
    minutes = sum(row["seconds"] * row["outputs"] for row in told["rows"]) / 60
    return (
        f"`{told['command']}`: {told['seeds']} seeds of {told['n']} outputs a problem, {minutes:.0f} minutes in methods; "
        f"{told['machine']}, {told['threads']} threads, torch {told['torch']}, steerfm {told['steerfm']}."
    )


def problems(name: str) -> str:
    """The held-out reward of every method at every budget, a table a problem; cost and quality at the largest budget."""
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
        header = ["method", *map(str, budgets), "diversity", "distance", "s an output"]
        says = f"{title}; plain samples have {base['held_out']:.3g}, diversity {base['diversity']:.3g}"
        parts.append(f"{says}, distance {base['distance']:.3g}:\n\n{_markdown(header, lines)}")
    return "\n\n".join(parts)


def misses(name: str, *methods: str) -> str:
    """How far each method stays below the best of its problem and budget, in the mean over the problems that all ran."""
    found = list(_problems(_suite(name)["rows"]))
    budgets = found[0][1]
    lines = []
    for method in methods or dict.fromkeys(method for _, _, of in found for method, budget in of if budget):
        cells = []
        for budget in budgets:
            gaps = [_best(of, budget) - of[method, budget]["held_out"] for _, _, of in found if (method, budget) in of]
            cells.append(f"{sum(gaps) / len(gaps):.2f}" if len(gaps) == len(found) else "")
        lines.append([f"`{method}`", *cells])
    return _markdown(["network calls an output", *map(str, budgets)], lines)


def paired(name: str) -> str:
    """Differences to plain samples and to best-of-n of the same cost, over outputs of the same seed."""
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
        header = ["method", "calls", "held out", "over plain samples", "over best-of-n of the same cost", "s an output"]
        parts.append(f"{title}; plain samples have {of[BASE, 0]['held_out']:.4f}:\n\n{_markdown(header, lines)}")
    return "\n\n".join(parts)


def speed() -> str:
    """Wall time over that of the bare loop."""
    told = json.loads((RESULTS / "speed.json").read_text())
    lines = [[name, f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"] for name, row in told["overheads"].items()]
    where = f"{told['particles']} rows, {told['steps']} steps, {told['threads']} threads, torch {told['torch']}"
    return f"{where}:\n\n{_markdown(['', 'ratio', 'quartiles'], lines)}"


def scan() -> str:
    """Seconds against sizes, with the line through them (least squares of relative errors)."""
    told = json.loads((RESULTS / "scaling.json").read_text())
    parts = [f"{told['device']}, {told['threads']} threads, torch {told['torch']}."]
    fits = []
    for name, points in told["scan"].items():
        sizes, seconds = np.array(points).T
        header = [name, *(f"{size:g}" for size in sizes)]
        parts.append(_markdown(header, [["seconds", *(f"{second:.3g}" for second in seconds)]]))
        if name != "micro-batch":  # a constant, not a line
            x = sizes**2 if name.startswith("side") else sizes
            (slope, start), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1) / seconds[:, None], np.ones_like(x))
            worst = np.abs((start + slope * x) / seconds - 1).max()
            unit = "pixel" if name.startswith("side") else name.removesuffix("s")
            fits.append([name, f"{1e3 * start:.1f}", f"{1e3 * slope:.3g} per {unit}", f"{worst:.0%}"])
    header = ["", "at none, ms", "slope, ms", "furthest point from the line"]
    return "\n\n".join([*parts, _markdown(header, fits)])


TABLES: dict[str, Callable[..., str]] = {f.__name__: f for f in (problems, misses, paired, speed, scan)}
