"""Steering by words: does the reward `clip` raise what the held-out judge says, prompt by prompt and seed by seed?

    steerfm bench words                                  # 40 prompts, 8 seeds, 16 network calls an output: half an hour
    steerfm bench words --seeds 2 --methods funnel       # quicker

Half of the prompts name concepts that the model was trained on, half of them were held out. Differences are paired (the same
prompt and seed, unsteered in four jumps); intervals are over all pairs. At equal cost `best_of_n` is what a method has to beat.
Every cell is a file: a killed run continues. Needs the packages of the judge (pip install steerfm[judge]). Prints a table, then
one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

import steerfm
from steerfm import steering
from steerfm.metrics import interval
from steerfm.results import picture_grid

SEEN = (
    "blue heart", "grinning face", "dog face", "pizza", "airplane", "tulip", "blue book", "soccer ball", "house", "sunflower",
    "spouting whale", "rocket", "birthday cake", "banana", "snowman", "guitar", "umbrella", "alien", "green apple",
    "fire engine",
)  # fmt: skip
METHODS = {
    "best_of_n": lambda budget: steering.BestOfN(steps=1, particles=budget),
    "best_of_n, 4 jumps": lambda budget: steering.BestOfN(steps=4, particles=max(1, budget // 4)),
    "funnel": steering.Funnel.within,
    "feynman_kac": lambda budget: steering.FeynmanKac(steps=4, particles=max(2, budget // 4)),
    "fmrg_e": lambda budget: steering.FMRGE(steps=max(2, budget // 2)),
}


def held_out() -> list[str]:
    """Twenty captions that nothing was trained on: those of the prepared data, else of this list."""
    from steerfm import emoji

    try:
        data = emoji.load()
    except FileNotFoundError:
        return []
    return [name for name, held in zip(data.names, data.held_out.tolist()) if held][::10][:20]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench words", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budget", type=int, default=16, help="network calls an output")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--strength", type=float, default=100.0)
    parser.add_argument("--prompts", nargs="*", help="in place of the forty")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/words"))
    options = parser.parse_args(argv)
    prompts = options.prompts or [*SEEN, *held_out()]
    flow_map = steerfm.load(options.model)
    reward, judge = steerfm.reward("clip"), steerfm.reward("emoji_judge")
    asked = [prompt for prompt in prompts for _ in range(options.seeds)]
    seeds = list(range(options.seeds)) * len(prompts)
    options.out.mkdir(parents=True, exist_ok=True)

    def cell(name: str) -> dict[str, torch.Tensor]:
        file = (
            options.out
            / f"{name.replace(', ', '-').replace(' ', '')}-{options.budget}-{options.seeds}-{len(prompts)}.safetensors"
        )
        if not file.is_file():
            if name == "base":
                x = steerfm.sample(flow_map, len(asked), 4, seeds, flow_map.condition(asked, len(asked)), batch_size=256)
                cost = 4.0
            else:
                method = METHODS[name](options.budget)
                result = steerfm.steer(flow_map, reward, method, len(asked), seeds, options.strength, asked, batch_size=32)
                x, cost = result.best(), result.cost.evaluations / len(asked)
            with torch.inference_mode():
                pictures = flow_map.decode(x).clone()
                found = {"clip": reward(pictures, prompts=asked), "judge": judge(pictures, prompts=asked)}
            save_file({"pictures": pictures, "cost": torch.tensor(cost), **{k: v.clone() for k, v in found.items()}}, file)
        return load_file(file)

    cells = {name: cell(name) for name in track(["base", *options.methods], "steering by words", transient=True)}
    base = cells["base"]
    table = Table("method", "calls", "clip", "judge", "judge - base", "judge - best_of_n", "seen", "held out",
                  title=f"{len(prompts)} prompts, {options.seeds} seeds; differences are paired")  # fmt: skip
    numbers = {}
    half = min(len(SEEN), len(prompts)) * options.seeds
    for name, row in cells.items():
        gain = row["judge"] - base["judge"]
        columns = {"judge - base": gain, "seen": gain[:half], "held out": gain[half:]}
        if "best_of_n" in cells:
            columns["judge - best_of_n"] = row["judge"] - cells["best_of_n"]["judge"]
        told = {key: interval(value) for key, value in columns.items() if len(value)}
        numbers[name] = {"clip": row["clip"].mean().item(), "judge": row["judge"].mean().item(), **told}
        said = {key: f"{mean:+.3f} ± {width:.3f}" for key, (mean, width) in told.items()}
        table.add_row(
            name, f"{row['cost'].item():.0f}", f"{numbers[name]['clip']:.3f}", f"{numbers[name]['judge']:.3f}",
            *(said.get(key, "") for key in ("judge - base", "judge - best_of_n", "seen", "held out")),
        )  # fmt: skip
    Console(width=140).print(table)
    shown = list(cells)
    first = torch.arange(0, len(asked), options.seeds)[:: max(1, len(prompts) // 12)][:12]
    grid = torch.stack([cells[name]["pictures"][first] for name in shown])
    captions = [[asked[i] if row == 0 else f"{cells[name]['judge'][i]:.2f}" for i in first] for row, name in enumerate(shown)]
    picture = picture_grid(grid, options.out / "words.png", shown, captions, title="the judge's cosine under each picture")
    print(f"pictures: {picture}")
    print(json.dumps({"benchmark": "words", "budget": options.budget, "seeds": options.seeds, "methods": numbers}))


if __name__ == "__main__":
    main()
