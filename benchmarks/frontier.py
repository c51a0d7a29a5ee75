"""Reward against cost on pictures: every method at equal evaluations, judged by a reward it never saw.

    steerfm bench frontier                    # 16 methods, four problems, four budgets: about an hour on two cores
    steerfm bench frontier --budgets 8 32 --n 16 --methods best_of_n funnel

A budget is evaluations of the network an output (a backward pass counts two); a method gets the steps and particles that it
buys, and is left out where it cannot be that cheap. Of every output the best particle by the reward counts. Its held-out value
is the same reward with the judge in place of the classifier. Beside them: diversity (mean distance between outputs in the
classifier's features) and the Fréchet distance of all outputs to the test split (biased upwards for so few: compare within
a column only). Intervals are over outputs. Results are kept after every cell: a killed run continues. A summary says by how
much each method misses the best held-out value of its column, in the mean over problems.

Problems: `easy`, the label Shirt and the class Shirt; `far`, the null class steered to Bag; `both`, the null class towards
Sandal and Bag at once; `bright`, the null class towards a bright Dress.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import steerfm
from steerfm import steering, zoo
from steerfm.commands_bench import within_budget
from steerfm.metrics import feature_statistics, frechet_distance, interval, pairwise_diversity
from steerfm.results import cost_plot
from steerfm.steering import METHODS, Method

CONTENDERS: dict[str, Method] = {
    "funnel": steering.Funnel(),
    "best_of_n, 1 jump": steering.BestOfN(steps=1),
    "best_of_n": steering.BestOfN(),
    "multi_round": steering.MultiRound(),
    "feynman_kac": steering.FeynmanKac(),
    "feynman_kac, denoise": steering.FeynmanKac(lookahead="denoise"),
    "fk_steering": steering.FKSteering(),
    "das": steering.DAS(),
    "tds": steering.TDS(particles=4),
    "fmrg_j": steering.FMRGJ(),
    "fmrg_e": steering.FMRGE(),
    "dps": steering.DPS(),
    "svdd": steering.SVDD(),
    "rbf": steering.BudgetForcing(),
    "zero_order": steering.ZeroOrderSearch(),
    "reno": steering.ReNO(),
    "fmtt_search": steering.FMTTSearch(),
}


@dataclass(frozen=True)
class Problem:
    """A reward that is a weighted sum of class log-probabilities and of brightness; ``cond`` as in `steerfm.steer`."""

    classes: dict[str, float]
    brightness: float = 0.0
    cond: str | None = None
    strength: float = 10.0

    def reward(self, network: str) -> steerfm.Reward:
        """Judged by ``network``: the classifier, which is optimised, or the judge, which is not."""
        terms = [weight * steerfm.reward(network, target=name) for name, weight in self.classes.items()]
        if self.brightness:
            terms.append(self.brightness * steerfm.reward("brightness"))
        return sum(terms[1:], terms[0])


PROBLEMS = {
    "easy": Problem({"Shirt": 1.0}, cond="Shirt"),
    "far": Problem({"Bag": 1.0}),
    "both": Problem({"Sandal": 0.5, "Bag": 0.5}),
    "bright": Problem({"Dress": 1.0}, brightness=10.0),
}


def at_budget(method: Method, flow_map: Any, problem: Problem, budget: int) -> Method | None:
    """See `within_budget`."""
    reward = problem.reward("classifier")

    def evaluations(trial: Method) -> float:
        return steerfm.steer(flow_map, reward, trial, cond=problem.cond, strength=problem.strength).cost.evaluations

    return within_budget(method, evaluations, budget)


def measure(flow_map: Any, problem: Problem, method: Method, n: int) -> dict[str, Any]:
    """One cell: reward, held-out reward, diversity, distance to the data, and cost."""
    classifier, statistics = zoo.load_classifier("fashion-classifier")[0], zoo.statistics("fashion-classifier")
    reward, held_out = problem.reward("classifier"), problem.reward("judge")
    started = time.perf_counter()
    result = steerfm.steer(flow_map, reward, method, n=n, cond=problem.cond, strength=problem.strength, batch_size=8)
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        pictures = flow_map.decode(result.best())
        features = classifier.features(pictures)
        held = held_out(pictures)
    return {
        "reward": interval(result.rewards.max(1).values),
        "held_out": interval(held),
        "diversity": pairwise_diversity(features),
        "frechet": frechet_distance(*feature_statistics(features), statistics["test_mean"], statistics["test_cov"]),
        "cost": result.cost.evaluations / n,
        "particles": method.particles,
        "steps": getattr(method, "steps", getattr(method, "iterations", None)),
        "seconds": seconds / n,
    }


def show(problem: str, budget: int, rows: dict[str, dict[str, Any]]) -> None:
    table = Table("method", "held out", "reward", "diversity", "FD", "steps x particles", "cost", "s",
                  title=f"{problem}: {budget} evaluations an output")  # fmt: skip
    for method, row in sorted(rows.items(), key=lambda item: -item[1]["held_out"][0]):
        table.add_row(
            method, *(f"{row[key][0]:.3f}±{row[key][1]:.3f}" for key in ("held_out", "reward")), f"{row['diversity']:.2f}",
            f"{row['frechet']:.2f}", f"{row['steps']} x {row['particles']}", f"{row['cost']:.0f}", f"{row['seconds']:.2f}",
        )  # fmt: skip
    Console(width=130).print(table)


def summary(cells: dict[tuple[str, int, str], dict[str, Any] | None]) -> dict[str, dict[int, float]]:
    """Mean over problems of the best held-out value of the column minus the method's own: 0 is best everywhere."""
    misses: dict[str, dict[int, list[float]]] = {}
    for (problem, budget, method), cell in cells.items():
        if cell is not None:
            column = [c["held_out"][0] for (p, b, _), c in cells.items() if c is not None and (p, b) == (problem, budget)]
            misses.setdefault(method, {}).setdefault(budget, []).append(max(column) - cell["held_out"][0])
    return {m: {b: round(sum(found) / len(found), 3) for b, found in budgets.items()} for m, budgets in misses.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--budgets", nargs="*", type=int, default=[8, 32, 128, 512])
    parser.add_argument("--methods", nargs="*", default=list(CONTENDERS), help="contenders, or any preset by its name")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument(
        "--n", nargs="*", type=int, default=[24, 24, 24, 12], help="outputs a cell; one number, or one a budget"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/frontier"))
    options = parser.parse_args(argv)
    contenders = {name: method() for name, method in METHODS.items()} | CONTENDERS
    unknown = [name for name in options.methods if name not in contenders]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; methods: {', '.join(contenders)}")
    if len(options.n) not in (1, len(options.budgets)):
        parser.error(f"{len(options.n)} numbers of outputs for {len(options.budgets)} budgets: give one, or one a budget")
    outputs = dict(zip(options.budgets, options.n * len(options.budgets) if len(options.n) == 1 else options.n))
    flow_map = steerfm.load(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "frontier.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    cells: dict[tuple[str, int, str], dict[str, Any] | None] = {}
    wanted = [(p, b, m) for b in options.budgets for p in options.problems for m in options.methods]
    for name, budget, method_name in track(wanted, "methods at equal cost", transient=True):
        key = f"{name}/{budget}/{method_name}/{outputs[budget]}"
        if key not in kept:
            method = at_budget(contenders[method_name], flow_map, PROBLEMS[name], budget)
            kept[key] = None if method is None else measure(flow_map, PROBLEMS[name], method, outputs[budget])
            file.write_text(json.dumps(kept))
        cells[name, budget, method_name] = kept[key]
    for name in options.problems:
        for budget in options.budgets:
            rows = {m: cell for m in options.methods if (cell := cells[name, budget, m])}
            show(name, budget, rows)
        lines = {
            m: [(cell["cost"], *cell["held_out"]) for b in options.budgets if (cell := cells[name, b, m])]
            for m in options.methods
        }
        cost_plot({m: line for m, line in lines.items() if line}, options.out / f"{name}.png", name, "held-out reward")
    missed = summary(cells)
    table = Table("method", *(str(b) for b in options.budgets), title="below the best held-out value, mean over problems")
    for method_name, row in sorted(missed.items(), key=lambda item: sum(item[1].values()) / len(item[1])):
        table.add_row(method_name, *(f"{row[b]:.2f}" if b in row else "" for b in options.budgets))
    Console().print(table)
    print(f"plots and every cell: {file}")
    print(json.dumps({"benchmark": "frontier", "n": options.n, "below_best": missed}))


if __name__ == "__main__":
    main()
