"""The frontier of reward against divergence of every fine-tuning method, compared with best-of-n and steering of the base.

    steerfm bench finetune                                   # from no class to Bag: five methods, one control each
    steerfm bench finetune --task compressible --methods weighted policy
    steerfm bench finetune --methods direct & steerfm bench finetune --methods weighted   # share the work, then run all

Every cell is a run of `steerfm finetune` in a folder of its own; a killed run continues, and a finished one is not repeated. A
row is the mean over `--seeds` training seeds, with the standard deviation; each run is judged on 64 samples of seeds that were
used neither in training nor in choosing the checkpoint. Prints a table, writes `<task>.png` and `<task>.json`, then prints one
JSON line: two hours on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

import steerfm
from steerfm import cli
from steerfm.cli.config import FinetuneConfig
from steerfm.cli.finetune import build_panel
from steerfm.cli.loading import load
from steerfm.cli.parts import build_judge, build_reward
from steerfm.finetuning import chain
from steerfm.report.plots import frontier_plot

TASKS: dict[str, list[str]] = {
    "bag": ["reward=classifier", "reward.target=Bag"],
    "classes": ["reward=classifier", "label=all"],
    "compressible": ["reward=compressibility", "label=Shirt", "judge={name: judge, target: Shirt}"],
    "bright": [
        "reward=[{name: classifier, target: Dress}, {name: brightness, weight: 10}]",
        "judge={name: judge, target: Dress}",
    ],
}
METHODS: dict[str, tuple[list[str], list[float]]] = {
    "direct": ([], [3]),
    "weighted": ([], [0.2]),
    "policy": ([], [0.01]),
    "adjoint": ([], [0.1]),
    "noise": ([], [100]),
}


REPORT = ["watch.report=64"]


def run(method: str, control: float, seed: int, task: str, folder: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Run one cell, and return its result.json."""
    out = folder / task / f"{method}-{control:g}-{seed}"
    if not (out / "result.json").is_file():
        keys = [*TASKS[task], *METHODS[method][0], *REPORT, f"control={control}", f"seed={seed}", f"out={out}", *extra]
        if cli.main(["finetune", "--config", method, *keys]):
            raise SystemExit(f"{method} at control {control} failed")
    return json.loads((out / "result.json").read_text())


def summary(values: Sequence[float]) -> str:
    """Format the mean, and the standard deviation over the seeds."""
    deviation = f"±{stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{deviation}"


def references(task: str, folder: Path, extra: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure the base, its best of n, and the default steering, on the seeds of the final tables; cached in a file."""
    file = folder / task / "base.json"
    if file.is_file():
        return json.loads(file.read_text())
    config = load(FinetuneConfig, None, [*TASKS[task], *extra], kind="finetune")
    base = steerfm.load(config.model)
    reward = build_reward(config.reward)
    panel = build_panel(base, reward, build_judge(config, base, reward).judge, config, config.watch.n)  # type: ignore[arg-type]
    panel = replace(panel, seeds=panel.seeds + panel.tasks.n)  # the seeds of the final tables
    rows = {
        f"base, {jumps} jump{'s' * (jumps > 1)}": panel.measure(chain(jumps)(base)).numbers() | {"cost": jumps}
        for jumps in (1, 4)
    }
    for k in (4, 16, 64):
        rows[f"best of {k}, 1 jump"] = panel.measure(chain(1)(base), k).numbers() | {"cost": k}
    rows["best of 16, 4 jumps"] = panel.measure(chain(4)(base), 16).numbers() | {"cost": 64}

    def funnel(noise, cond):
        method = steerfm.Funnel.within(64)
        n = len(noise.seeds)
        return steerfm.steer(base, reward, method, n=n, seeds=noise.seeds, strength=10.0, cond=cond).best()

    rows["steered (funnel)"] = panel.measure(funnel).numbers() | {"cost": 64}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="bag", choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--controls", nargs="*", type=float, help="instead of each method's own")
    parser.add_argument("--seeds", type=int, default=4, help="training seeds of each cell")
    parser.add_argument("--extra", nargs="*", default=[], help="further keys of steerfm finetune, such as optimizer.steps=50")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/finetune"))
    options = parser.parse_args(argv)
    base = references(options.task, options.out, options.extra)
    columns = ("held_out", "reward", "diversity", "support", "distance")
    table = Table(
        "model", "calls", *columns, "control cost", "semigroup", "reward calls", "evaluations", "s",
        title=f"{options.task}: held out is the judge's; calls: network evaluations per sample",
    )  # fmt: skip
    for name, row in base.items():
        table.add_row(name, f"{row['cost']:g}", *(f"{row[column]:.3f}" for column in columns))
    points = {name: (row["diversity"], row["held_out"]) for name, row in base.items()}
    lines, rows = {}, {}
    for method in options.methods:
        for control in options.controls or METHODS[method][1]:
            cells = [run(method, control, seed, options.task, options.out, options.extra) for seed in range(options.seeds)]
            names = [name for name in ("as learnt", "tuned, 1 jump", "tuned, 4 jumps") if name in cells[0]["readings"]]
            for name in names:
                what = name.removeprefix("tuned, ")
                readings = {column: [cell["readings"][name][column] for cell in cells] for column in columns}
                rows[f"{method} {control:g}, {what}"] = readings
                facts = ("", "", "", "", "")
                if what == "4 jumps":
                    costs = [cell["cost"]["tune"] for cell in cells]
                    semigroup = [cell["semigroup_error"]["tuned"] / cell["semigroup_error"]["base"] for cell in cells]
                    facts = (
                        f"{mean(cell['control_cost'] for cell in cells):.3f}", f"{mean(semigroup):.2f}x",
                        f"{mean(cost['reward_calls'] for cost in costs):,.0f}",
                        f"{mean(cost['forwards'] + 2 * cost['backwards'] for cost in costs):,.0f}",
                        f"{mean(cost['seconds'] for cost in costs):.0f}",
                    )  # fmt: skip
                    lines.setdefault(method, []).append((mean(readings["diversity"]), mean(readings["held_out"])))
                calls = {"1 jump": "1", "4 jumps": "4"}.get(what, "")
                table.add_row(f"{method} {control:g}, {what}", calls, *(summary(readings[c]) for c in columns), *facts)
    Console(width=170).print(table)
    picture = options.out / f"{options.task}.png"
    frontier_plot(points, lines, picture, "diversity within classes, relative to the base", "held-out reward")
    numbers = {"benchmark": "finetune", "task": options.task, "seeds": options.seeds, "base": base, "tuned": rows}
    (options.out / f"{options.task}.json").write_text(json.dumps(numbers, indent=1))
    print(f"frontier: {picture}")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
