"""Fill in the table of docs/models.md: a row a pipeline, measured on your machine.

    python examples/real_models.py black-forest-labs/FLUX.1-schnell stabilityai/sd-turbo --reward brightness --out rows.md

Each pipeline is loaded, sampled and steered by the method that fits it; a row says what it can do, how long a picture takes and
how much memory it needs, and what the reward came to. A pipeline that fails is a row with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import steerfm
from steerfm.capabilities import in_words

HEADER = [
    "pipeline",
    "can do",
    "steps",
    "s a picture",
    "GiB to sample",
    "reward",
    "method",
    "steered",
    "s an output",
    "GiB to steer",
]


def measured(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what a call gives, its seconds, the GiB at its peak; 0 without a GPU)."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = call()
    if cuda:
        torch.cuda.synchronize()
    return out, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def row(name: str, options: argparse.Namespace) -> list[str]:
    """What is measured of one pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    flow_map = steerfm.load(f"diffusers:{name}", device, dtype=dtype, prompt=options.prompt, steps=options.steps)
    reward = steerfm.reward(options.reward)
    with torch.no_grad():
        z, seconds, memory = measured(lambda: steerfm.sample(flow_map, n=1))
        plain = float(reward(flow_map.decode(z), prompts=[options.prompt])[0])
    steered, steering, most = measured(lambda: steerfm.steer(flow_map, reward, n=1, strength="auto", micro_batch=options.rows))
    best = float(steered.rewards.max())
    steered.grid(options.out.with_name(f"{name.replace('/', '-')}.png"))
    facts = [in_words(flow_map), str(flow_map.steps), f"{seconds:.3g}", f"{memory:.3g}", f"{plain:.4g}"]
    return [name, *facts, f"{best:.4g}", f"{steering:.3g}", f"{most:.3g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="FOLDER_OR_HUB_ID", help="as steerfm.load takes it after diffusers:")
    parser.add_argument("--prompt", default="a red fox in the snow", help="what they are asked for")
    parser.add_argument("--reward", default="brightness", help="a name (steerfm rewards) or FILE.py:NAME")
    parser.add_argument("--steps", type=int, default=4, help="steps of a sample")
    parser.add_argument("--rows", type=int, default=4, help="rows of a network call, and of the decoder")
    parser.add_argument("--out", type=Path, default=Path("real_models.md"), help="file of the rows; pictures go beside it")
    options = parser.parse_args()
    lines = [f"| {' | '.join(HEADER)} |", f"| {' | '.join(['---'] * len(HEADER))} |"]
    for name in options.pipelines:
        try:
            cells = row(name, options)
        except Exception as error:  # the others go on
            cells = [name, f"{type(error).__name__}: {error}".splitlines()[0], *[""] * (len(HEADER) - 2)]
        lines.append(f"| {' | '.join(cells)} |")
        options.out.write_text("\n".join(lines) + "\n")  # nothing is lost where a later one ends the process
        print(lines[-1], flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
