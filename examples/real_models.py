"""Fill in the table of docs/models.md, one row per pipeline, measured on your machine.

    python examples/real_models.py black-forest-labs/FLUX.1-schnell stabilityai/sd-turbo --reward brightness --out rows.md

Each pipeline is loaded, sampled, and steered by the method that fits it. A row shows what the pipeline can do, its time per
picture, memory and reward. If a pipeline fails, its row shows the reason, and the script continues with the next one.
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
    "s per output",
    "GiB to steer",
]


def measure(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return (result of a call, its seconds, its peak memory in GiB; 0 without a GPU)."""
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
    """Measure one pipeline, and return its row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    flow_map = steerfm.load(f"diffusers:{name}", device, dtype=dtype, prompt=options.prompt, steps=options.steps)
    reward = steerfm.reward(options.reward)
    with torch.no_grad():
        z, seconds, memory = measure(lambda: steerfm.sample(flow_map, n=1))
        plain = float(reward(flow_map.decode(z), prompts=[options.prompt])[0])
    result, steering, most = measure(lambda: steerfm.steer(flow_map, reward, n=1, strength="auto", micro_batch=options.rows))
    best = float(result.rewards.max())
    result.grid(options.out.with_name(f"{name.replace('/', '-')}.png"))
    facts = [in_words(flow_map), str(flow_map.steps), f"{seconds:.3g}", f"{memory:.3g}", f"{plain:.4g}"]
    return [name, *facts, f"{best:.4g}", f"{steering:.3g}", f"{most:.3g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="FOLDER_OR_HUB_ID", help="as steerfm.load takes it after diffusers:")
    parser.add_argument("--prompt", default="a red fox in the snow", help="prompt of the pictures")
    parser.add_argument("--reward", default="brightness", help="a name (steerfm rewards) or FILE.py:NAME")
    parser.add_argument("--steps", type=int, default=4, help="steps per sample")
    parser.add_argument("--rows", type=int, default=4, help="rows per call of the network and of the decoder")
    parser.add_argument("--out", type=Path, default=Path("real_models.md"), help="file for the rows; pictures go beside it")
    options = parser.parse_args()
    lines = [f"| {' | '.join(HEADER)} |", f"| {' | '.join(['---'] * len(HEADER))} |"]
    for name in options.pipelines:
        try:
            cells = row(name, options)
        except Exception as error:  # continue with the others
            cells = [name, f"{type(error).__name__}: {error}".splitlines()[0], *[""] * (len(HEADER) - 2)]
        lines.append(f"| {' | '.join(cells)} |")
        options.out.write_text("\n".join(lines) + "\n")  # save what is done, in case a later one ends the process
        print(lines[-1], flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
