"""The choice of the trained jump decides whether the reward is hacked: direct tuning of a small map of eight modes on a ring.

    steerfm bench hacking                    # 4 seeds, control 1 and 3: eight minutes on one core
    steerfm bench hacking --seeds 1 --steps 100

Reward r = x / 1.42 (standard deviation 1 on the ring). For each choice of trained jumps: the mean reward, the share of samples
within three standard deviations of a mode, and the effective number of modes, beside the exact tilt p exp(r / control). The
base map is trained first (half a minute) and stored. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from steerfm import GaussianMixture
from steerfm.finetuning import Direct, FineTuning, HyperNoise, Method, Tasks, chain, draw
from steerfm.flowmap import NeuralFlowMap
from steerfm.metrics import interval
from steerfm.networks import Mlp
from steerfm.randomness import global_stream
from steerfm.rewards import as_reward
from steerfm.training import FlowMapTraining
from steerfm.training.data import MixtureData
from steerfm.training.objectives import Trajectory, Triangle

STD, RADIUS = 0.2, 2.0


def at(m: float) -> Direct:
    """Return the default method with a fixed interior time m."""
    return Direct(jitter=0.0, power=math.log(m) / math.log(0.5))


ROWS: dict[str, Method] = {
    "the only jump": Direct(jumps=1),
    "last of two": Direct(trained=(-1,)),
    "both of two": Direct(trained=None),
    "first of two, m in .3 to .7 (default)": Direct(),
    "first of two, m = .3": at(0.3),
    "first of two, m = .5": at(0.5),
    "first of two, m = .7": at(0.7),
    "first of four, others frozen": Direct(jumps=4),
    "noise adapter": HyperNoise(jumps=2),
}


def reward(x: Tensor) -> Tensor:
    return x[:, 0] / 1.42


def ring() -> GaussianMixture:
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return GaussianMixture(RADIUS * torch.stack([angles.cos(), angles.sin()], 1), torch.full((8, 2), STD**2).double())


def trainer(steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def base_map(mixture: GaussianMixture, folder: Path, steps: int = 2500) -> NeuralFlowMap:
    """Load the map of the ring, or train it."""
    with global_stream(0, "weights"):
        flow_map = NeuralFlowMap(Mlp(2, width=128, depth=3), (2,), std=(RADIUS**2 / 2 + STD**2) ** 0.5)
    path = folder / f"ring-{steps}.safetensors"
    if path.is_file():
        return NeuralFlowMap.load(path)
    objective = {Trajectory(Triangle(terminal=0.3, full=0.2)): 0.5}
    module = FlowMapTraining(flow_map, objective, start=0.2, steps=steps, lr=2e-3, warmup=100, decay=0.5, ema=0.998)
    trainer(steps).fit(module, MixtureData(mixture, 256))
    module.averaged().save(path, {"name": "mlp", "dim": 2, "width": 128, "depth": 3}, {}, half=False)
    return NeuralFlowMap.load(path)


def describe(x: Tensor, mixture: GaussianMixture) -> tuple[float, float, float]:
    """Return mean reward, share of samples on a mode, and effective number of modes."""
    distance, nearest = torch.cdist(x.double(), mixture.means).min(1)
    on = distance < 3 * STD
    shares = nearest[on].bincount(minlength=8).double() / max(1, int(on.sum()))
    return reward(x).mean().item(), on.double().mean().item(), torch.special.entr(shares).sum().exp().item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench hacking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--controls", nargs="*", type=float, default=[1.0, 3.0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/hacking"))
    options = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    mixture, n = ring(), 4000
    flow_map = base_map(mixture, options.out)
    results: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    cells = [(row, control, seed) for row in options.rows for control in options.controls for seed in range(options.seeds)]
    for row, control, seed in track(cells, "tuning", transient=True):
        module = FineTuning(
            flow_map, as_reward(reward), ROWS[row], batch_size=256, control=control, scale=1.0, lr=1e-3, ema=0.98, warmup=10,
            steps=options.steps, seed=seed,
        )  # fmt: skip
        trainer(options.steps).fit(module, module.data())
        x = draw(module.law(), Tasks(), flow_map, [10_000 + seed], n)
        results.setdefault(row, {}).setdefault(f"{control:g}", []).append(describe(x, mixture))
    base = [describe(draw(chain(2)(flow_map), Tasks(), flow_map, [10_000 + i], n), mixture) for i in range(4)]
    table = Table(
        "trained", *(f"control {c:g}: {what}" for c in options.controls for what in ("reward", "on the data", "modes"))
    )
    table.add_row("base", *(f"{interval([k[i] for k in base])[0]:.2f}" for _ in options.controls for i in range(3)))
    exact = {}
    for control in options.controls:
        target, _ = mixture.tilt(linear=[1 / 1.42, 0.0], strength=1 / control)
        exact[f"{control:g}"] = describe(target.sample(20_000, torch.Generator().manual_seed(0)).float(), mixture)
    table.add_row("exact tilt", *(f"{value:.2f}" for c in options.controls for value in exact[f"{c:g}"]))
    means: dict[str, dict[str, list[float]]] = {}
    for row, columns in results.items():
        cells = []
        for control, values in columns.items():
            pairs = [interval([value[i] for value in values]) for i in range(3)]
            means.setdefault(row, {})[control] = [round(mean, 3) for mean, _ in pairs]
            cells += [f"{mean:.2f}±{half:.2f}" for mean, half in pairs]
        table.add_row(row, *cells)
    Console(width=130).print(table)
    print(json.dumps({"benchmark": "hacking", "seeds": options.seeds, "steps": options.steps, "exact": exact, "rows": means}))


if __name__ == "__main__":
    main()
