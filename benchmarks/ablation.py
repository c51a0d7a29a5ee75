"""Which off-diagonal objectives make the best flow map? Short runs from the same velocity, measured in the same way.

    steerfm bench ablation --steps 300            # about four minutes per row on two cores

Every row starts from the velocity of ``--init`` without its jumps: u(x, s, t) ignores t - s, so that X_{s,t} is one Euler step.
Rows train for the same number of steps with different shares of the batch, then draw the same ``--samples`` seeds in 1, 2, 4
and 8 jumps and in 16 Euler steps. Finished rows are stored. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import steerfm
from steerfm import cli, zoo
from steerfm.checkpoints import read_weights, save_weights
from steerfm.networks import UNet

ROWS = {
    "none: flow matching only": {},
    "progressive 25%": {"progressive": 0.25},
    "lagrangian 25%": {"lagrangian": 0.25},
    "lagrangian 12.5%, progressive 25%": {"lagrangian": 0.125, "progressive": 0.25},
    "eulerian 25%": {"eulerian": 0.25},
    "meanflow 25%": {"meanflow": 0.25},
    "trajectory 75%": {"trajectory": 0.75},
    "trajectory 100%, frozen teacher": {"trajectory": 1.0},
}
NONE = dict.fromkeys(("progressive", "lagrangian", "eulerian", "meanflow", "trajectory"), 0.0)


def forget_jumps(model: str, path: Path) -> Path:
    """Save the model with a network that ignores t - s: it has the same velocity, and its jumps are Euler steps."""
    head, _ = read_weights(zoo.find(model), "flow_map")
    network = steerfm.load(model).network
    assert isinstance(network, UNet)
    first, f = network.condition.time[0], network.condition.frequencies
    assert isinstance(first, nn.Linear)
    with torch.no_grad():  # columns: s, t - s, sin(s w), sin((t - s) w), cos(s w), cos((t - s) w) for f frequencies w
        first.bias.add_(first.weight[:, 2 + 3 * f :].sum(1))
        for columns in (slice(1, 2), slice(2 + f, 2 + 2 * f), slice(2 + 3 * f, None)):
            first.weight[:, columns] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(network, path, head, half=False)
    return path


def run(name: str, folder: Path, start: str, options: argparse.Namespace) -> dict[str, float]:
    """Train and measure one row.

    Returns:
        Fréchet distances by sampler, in the features of the judge and, for 1 jump and 16 Euler steps, of the classifier;
        texture and the judge's accuracy for one jump.
    """
    shares = ", ".join(f"{key}: {value}" for key, value in {**NONE, **ROWS[name]}.items())
    teacher = start if "teacher" in name else "null"
    train = [
        "train", "--config", "fashion", f"init={start}", f"out={folder}", f"objective.shares={{{shares}}}", "objective.start=0",
        f"objective.teacher={teacher}", f"objective.guidance={options.guidance}", f"optimizer.steps={options.steps}",
        "optimizer.lr=0.001", "trainer.sample_every=0",
    ]  # fmt: skip
    model, out = folder / "fashion.safetensors", folder / "eval"
    measure = ["evaluate", f"model={model}", f"n={options.samples}", "euler=16", f"out={out}"]
    if cli.main(train) or cli.main(measure):
        raise SystemExit(f"{name} failed")
    samplers = json.loads((out / "result.json").read_text())["samplers"]
    by_judge = {sampler: values["spaces"]["fashion-judge"]["frechet"] for sampler, values in samplers.items()}
    by_classifier = {s: samplers[s]["spaces"]["fashion-classifier"]["frechet"] for s in ("1 jump", "16 Euler steps")}
    row = {sampler: round(value, 2) for sampler, value in by_judge.items()}
    row |= {f"{sampler}, by the classifier": round(value, 4) for sampler, value in by_classifier.items()}
    one = samplers["1 jump"]
    return row | {"texture, 1 jump": round(one["texture"], 2), "accuracy, 1 jump": round(one["accuracy"], 3)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", default="fashion", help="model whose velocity every row starts from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=1.2, help="classifier-free guidance to train into the velocity")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="rows to run (default all)")
    options = parser.parse_args(argv)
    start = str(forget_jumps(options.init, options.out / "start.safetensors"))
    results = {}
    for name in options.rows:
        folder = options.out / "".join(c if c.isalnum() else "_" for c in name)
        file = folder / f"row-{options.steps}-{options.samples}-{options.guidance:g}-{Path(options.init).stem}.json"
        if not file.is_file():
            file.write_text(json.dumps(run(name, folder, start, options)))
        results[name] = json.loads(file.read_text())
    columns = list(next(iter(results.values())))
    table = Table("share of the batch off the diagonal", *columns)
    for name, row in results.items():
        table.add_row(name, *(f"{row[column]:g}" for column in columns))
    Console().print(table)
    print(json.dumps({"benchmark": "ablation", "steps": options.steps, "samples": options.samples, "rows": results}))


if __name__ == "__main__":
    main()
