"""Reward against cost on pictures: every method at equal evaluations, judged by a reward it never saw.

    steerfm bench frontier                    # 14 methods, three problems, four budgets: about an hour on two cores
    steerfm bench frontier --budgets 8 32 --methods best_of_n feynman_kac --n 16

A budget is evaluations of the network an output (a backward pass counts two); a method gets the steps and particles that it
buys, and is left out where it cannot be that cheap. Of every output the best particle by the reward counts. Beside the reward:
the held-out judge (its accuracy on the wanted class, and the mean log-probability), diversity (mean distance between outputs in
the classifier's features) and the Fréchet distance of all outputs to the test split (biased upwards for so few: compare within
a column only). Intervals are over outputs. Results are kept after every cell: a killed run continues.

Problems: `far`, the null class steered to Bag; `both`, the null class towards Sandal and Bag at once; `bright`, the class Dress
made brighter, where the judge watches the dress.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import steerfm
from steerfm import zoo
from steerfm.metrics import feature_statistics, frechet_distance, interval, pairwise_diversity
from steerfm.results import cost_plot
from steerfm.steering import METHODS, Method

CHOSEN = (
    "best_of_n", "multi_round", "feynman_kac", "fk_steering", "das", "tds", "fmrg_j", "fmrg_e", "dps", "svdd", "rbf",
    "zero_order", "reno", "fmtt_search",
)  # fmt: skip


def classes(*names: str) -> steerfm.Reward:
    """The mean log-probability of the classes."""
    terms = [steerfm.reward("classifier", target=name) * (1 / len(names)) for name in names]
    return sum(terms[1:], terms[0])


PROBLEMS: dict[str, dict[str, Any]] = {
    "far": {"reward": lambda: classes("Bag"), "judged": ("Bag",), "cond": None, "strength": 10.0},
    "both": {"reward": lambda: classes("Sandal", "Bag"), "judged": ("Sandal", "Bag"), "cond": None, "strength": 10.0},
    "bright": {"reward": lambda: steerfm.reward("brightness"), "judged": ("Dress",), "cond": "Dress", "strength": 40.0},
}


def at_budget(method: Method, flow_map: Any, problem: dict[str, Any], reward: Any, budget: int) -> Method | None:
    """The method with as many steps as leave it at least its least particles, then as many particles as the rest buys."""
    names = {field.name for field in fields(method)}  # type: ignore[arg-type]
    unit = int(getattr(method, "children", 1))
    if "budget" in names:
        return replace(method, budget=max(budget, method.steps)) if budget >= method.steps else None  # type: ignore
    length = "steps" if "steps" in names else "iterations"
    least = unit if getattr(method, "particles", 1) > 1 else 1
    least = max(least, 4) if least > 1 or getattr(method, "resampling", None) is not None else 1
    size = getattr(method, length)
    while size >= 1:
        trial = replace(method, **{length: size}, particles=max(least, unit))  # type: ignore[arg-type]
        result = steerfm.steer(flow_map, reward, trial, n=1, cond=problem["cond"], strength=problem["strength"])
        each = result.cost.evaluations / trial.particles
        particles = int(budget / each) // unit * unit
        if particles >= least:
            return replace(trial, particles=particles)  # type: ignore[type-var]
        size //= 2
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--budgets", nargs="*", type=int, default=[8, 32, 128, 512])
    parser.add_argument("--methods", nargs="*", default=list(CHOSEN))
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--n", type=int, default=32, help="outputs a cell")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/frontier"))
    options = parser.parse_args(argv)
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; methods: {', '.join(METHODS)}")
    flow_map = steerfm.load(options.model)
    classifier, names, _ = zoo.load_classifier("fashion-classifier")
    judge = zoo.load_classifier("fashion-judge")[0]
    statistics = zoo.statistics("fashion-classifier")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "frontier.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    cells = [(p, b, m) for p in options.problems for b in options.budgets for m in options.methods]
    for problem_name, budget, method_name in track(cells, "methods at equal cost", transient=True):
        key = f"{problem_name}/{budget}/{method_name}/{options.n}"
        if key in found:
            continue
        problem = PROBLEMS[problem_name]
        reward = problem["reward"]()
        method = at_budget(METHODS[method_name](), flow_map, problem, reward, budget)
        if method is None:
            found[key] = None
        else:
            started = time.perf_counter()
            result = steerfm.steer(
                flow_map, reward, method, n=options.n, cond=problem["cond"], strength=problem["strength"], batch_size=8
            )
            seconds = time.perf_counter() - started
            with torch.inference_mode():
                pictures = flow_map.decode(result.best())
                log_p = judge(pictures).log_softmax(1)
                features = classifier.features(pictures)
            wanted = [names.index(name) for name in problem["judged"]]
            right = torch.stack([log_p.argmax(1) == index for index in wanted]).any(0)
            found[key] = {
                "reward": interval(result.rewards.max(1).values),
                "judge": interval(log_p[:, wanted].mean(1)),
                "accuracy": right.double().mean().item(),
                "diversity": pairwise_diversity(features),
                "frechet": frechet_distance(*feature_statistics(features), statistics["test_mean"], statistics["test_cov"]),
                "cost": result.cost.evaluations / options.n,
                "particles": method.particles,
                "steps": getattr(method, "steps", getattr(method, "iterations", None)),
                "seconds": seconds / options.n,
            }
        file.write_text(json.dumps(found))
    for problem_name in options.problems:
        for budget in options.budgets:
            rows = {m: found[f"{problem_name}/{budget}/{m}/{options.n}"] for m in options.methods}
            show(problem_name, budget, {m: row for m, row in rows.items() if row})
        lines = {
            m: [
                (cell["cost"], *cell["judge"])
                for b in options.budgets
                if (cell := found[f"{problem_name}/{b}/{m}/{options.n}"])
            ]
            for m in options.methods
        }
        cost_plot(lines, options.out / f"{problem_name}.png", problem_name, "held-out judge, log-probability")
    print(f"plots and every cell: {options.out}")
    print(json.dumps({"benchmark": "frontier", "n": options.n, "cells": found}))


def show(problem: str, budget: int, rows: dict[str, dict[str, Any]]) -> None:
    table = Table("method", "reward", "judge log p", "judge accuracy", "diversity", "FD", "steps x particles", "cost", "s",
                  title=f"{problem}: {budget} evaluations an output")  # fmt: skip
    for method, row in sorted(rows.items(), key=lambda item: -item[1]["judge"][0]):
        table.add_row(
            method, *(f"{row[key][0]:.3f}±{row[key][1]:.3f}" for key in ("reward", "judge")), f"{row['accuracy']:.2f}",
            f"{row['diversity']:.2f}", f"{row['frechet']:.2f}", f"{row['steps']} x {row['particles']}", f"{row['cost']:.0f}",
            f"{row['seconds']:.2f}",
        )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
