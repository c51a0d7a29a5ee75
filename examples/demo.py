"""Steer the shipped model towards a class and towards a hand-written reward, with four methods at equal cost.

    python examples/demo.py                  # about a minute on two cores; writes runs/demo/

Methods: best of 16 samples; guidance by FMRG-J; particles by Funnel, the default. All cost the same: 64 network evaluations per
output, with a backward pass counted as two. The judge is a held-out reward: a high reward with a low judge is a hacked one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import steerfm
from steerfm.metrics import pairwise_diversity
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid

N, COLUMNS, SEED, OUT = 8, 6, 0, Path("runs/demo")
EXAMPLE = f"{Path(__file__).parent / 'my_reward.py'}:striped"
METHODS = {
    "base": steerfm.BestOfN(particles=1, steps=4),
    "best of 16": steerfm.BestOfN(particles=16, steps=4),
    "guidance": steerfm.FMRGJ.within(64),
    "particles": steerfm.Funnel.within(64),
}


def main() -> None:
    console, model = Console(highlight=False), steerfm.load("fashion")
    tasks = [  # title, reward, strength, condition, held-out reward
        ("towards the class Bag, from no class", steerfm.reward("classifier", target="Bag"), 10.0, None, "Bag"),
        ("stripes on a Dress (examples/my_reward.py)", steerfm.reward(EXAMPLE), 120.0, "Dress", "Dress"),
    ]
    grids, captions, labels, tables = [], [], [], []
    for title, reward, strength, cond, target in tasks:
        judge = steerfm.reward("judge", target=target)
        header = ["method", f"reward: {reward.name}", f"held out: is a {target}", "diversity", "evaluations", "seconds"]
        rows = []
        for name, method in METHODS.items():
            result = steerfm.steer(model, reward, method, n=N, seeds=SEED, strength=strength, cond=cond)
            best = model.decode(result.best())
            with torch.no_grad():
                values, held_out = reward(best), judge(best).exp()
            cost = result.cost.evaluations / N
            rows.append(
                (name, f"{values.mean():.3f}", f"{held_out.mean():.2f}", f"{pairwise_diversity(best.flatten(1)):.2f}",
                 f"{cost:.0f}", f"{result.cost.seconds:.1f}")
            )  # fmt: skip
            grids.append(best)
            captions.append([f"{value:.2f}" for value in held_out.tolist()])
            labels.append(name)
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        tables.append((title, header, rows))
    columns = torch.stack(grids)[:, :COLUMNS]
    path = picture_grid(
        columns, OUT / "demo.png", labels, [row[:COLUMNS] for row in captions],
        title="Below each picture: the judge's probability of the class. No method sees the judge.",
        headings={0: "Towards the class Bag", len(METHODS): "Stripes on a Dress"},
    )  # fmt: skip
    page = report(OUT, "steerfm demo", {"command": "make demo"}, tables, [("the same seeds in every row", path)])
    console.print(f"pictures: {path}\npage:     {page}")


if __name__ == "__main__":
    main()
