"""Which off-diagonal objectives make the best flow map? Short runs from the same checkpoint, measured alike.

    steerfm bench ablation --steps 500            # about ten minutes a row on two cores

Every row continues from ``--init`` for the same number of steps with other shares of the batch, then draws the same
``--samples`` seeds in 1, 2, 4 and 8 jumps and in 64 Euler steps. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from steerfm import cli

ROWS = {
    "flow matching only": {},
    "progressive 25%": {"progressive": 0.25},
    "lagrangian 25%": {"lagrangian": 0.25},
    "lagrangian 12.5%, progressive 25%": {"lagrangian": 0.125, "progressive": 0.25},
    "eulerian 25%": {"eulerian": 0.25},
    "meanflow 25%": {"meanflow": 0.25},
    "trajectory 75%": {"trajectory": 0.75},
    "trajectory 100%, frozen teacher": {"trajectory": 1.0},
}
NONE = dict.fromkeys(("progressive", "lagrangian", "eulerian", "meanflow", "trajectory"), 0.0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="fashion", help="checkpoint that every row starts from")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--guidance", type=float, default=1.2, help="that is trained into the velocity")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="rows to run (default all)")
    options = parser.parse_args(argv)
    results = {}
    for name in options.rows:
        folder = options.out / "".join(c if c.isalnum() else "_" for c in name)
        shares = ", ".join(f"{key}: {value}" for key, value in {**NONE, **ROWS[name]}.items())
        teacher = options.init if "teacher" in name else "null"
        started = time.perf_counter()
        train = [
            "train", "--config", "fashion", f"init={options.init}", f"out={folder}", f"objective.shares={{{shares}}}",
            "objective.start=0", f"objective.teacher={teacher}", f"objective.guidance={options.guidance}",
            f"optimizer.steps={options.steps}", "optimizer.lr=0.001",
        ]  # fmt: skip
        measure = [
            "evaluate",
            f"model={folder / 'fashion.safetensors'}",
            f"n={options.samples}",
            "euler=64",
            f"out={folder / 'eval'}",
        ]
        if cli.main(train) or cli.main(measure):
            raise SystemExit(f"{name} failed")
        found = json.loads((folder / "eval" / "result.json").read_text())
        results[name] = {sampler: round(row["frechet"], 4) for sampler, row in found["samplers"].items()}
        results[name]["minutes"] = round((time.perf_counter() - started) / 60, 1)
    columns = list(next(iter(results.values())))
    table = Table("shares of the batch", *columns)
    for name, row in results.items():
        table.add_row(name, *(f"{row[column]:g}" for column in columns))
    Console().print(table)
    print(json.dumps({"benchmark": "ablation", "steps": options.steps, "samples": options.samples, "rows": results}))


if __name__ == "__main__":
    main()
