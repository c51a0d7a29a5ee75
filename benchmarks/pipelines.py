"""The overhead of the diffusers adapter over the pipeline's own call, on the tiny pipelines of the tests.

    steerfm bench pipelines                # two minutes on an idle core

Draws two samples in four steps to latents, alternately by the pipeline and by `steerfm.sample`, and reports the median and the
quartiles of the ratios of consecutive times. The networks take about a millisecond, so the overhead weighs more than for a real
model. A ratio should be at most 1.05. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import steerfm
from steerfm.models import from_pipeline

GUIDANCE: dict[str, dict[str, Any]] = {
    "flux schnell": {}, "sd3": {"guidance": 1.0}, "sdxl lightning": {"guidance": 1.0}, "wan": {"guidance": 1.0}, "lcm": {},
    "sana-sprint": {}, "qwen": {"guidance": 1.0}, "anyflow r": {"guidance": 1.0},
}  # fmt: skip
BOUND, STEPS = 1.05, 4


def ratios(name: str, repeats: int) -> list[float]:
    """Return the times of the adapter relative to those of the pipeline, pair by pair."""
    from tests.models.pipelines import PIPELINES  # needs a checkout, and diffusers

    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    flow_map = from_pipeline(pipe, **GUIDANCE[name], **call)
    cond = flow_map.condition(None, 2)
    key = "true_cfg_scale" if name == "qwen" else "guidance_scale"
    call |= {key: 1.0} if GUIDANCE[name] else {}
    call |= {"intermediate_timesteps": None} if name == "sana-sprint" else {}
    out = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        pipe(**call, generator=generators, num_inference_steps=STEPS, output_type="latent", return_dict=False)
        middle = time.perf_counter()
        steerfm.sample(flow_map, 2, STEPS, seeds=0, cond=cond)
        if repeat:  # the first warms up
            out.append((time.perf_counter() - middle) / (middle - start))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench pipelines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=60, help="pairs of calls")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = Table("pipeline", "ours / its own", "quartiles", title=f"{STEPS} steps of two samples")
    rows = {}
    for name in GUIDANCE:
        low, median, high = statistics.quantiles(ratios(name, options.repeats), n=4)
        rows[name] = {"ratio": median, "low": low, "high": high}
        table.add_row(name, f"{median:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    print(json.dumps({"benchmark": "pipelines", "rows": rows, "within": all(row["ratio"] <= BOUND for row in rows.values())}))


if __name__ == "__main__":
    main()
