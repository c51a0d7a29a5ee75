"""Every method on targets that are known exactly, at equal cost: which ones sample the tilt, and how well.

    steerfm bench exact                      # all methods, six targets, three budgets, eight seeds: 15 minutes on two cores
    steerfm bench exact --quick              # two targets, one budget: a minute and a half
    steerfm bench exact --methods best_of_n feynman_kac --cases ring

A method gets as many particles as the budget buys (evaluations of the network an output; a backward pass counts two). Errors
are those of the weighted particles of one output, against samples of the exact target; intervals are over the seeds. Writes
`exact.json` and a plot of error against cost for every target; prints a table, then one JSON line. Results are kept after every
cell: a killed run continues.

Targets: `line`, three modes, r = 1.2 x - .15 x^2; `ring`, eight modes (std .3) on a circle of radius 4, r = -x^2 1[x < 0];
`cycloid`, the same ring, r = -((rho - 4 (1 + .08 cos 12 phi)) / .2)^2 / 2; `grid`, nine modes (variance .3) at 0 and +-4,
r = -x^2/100 - y^2; `high`, three modes in 16 dimensions, r = x_1 - |x|^2 / 8; `inverse`, a mixture in 8 dimensions seen through
three noisy linear measurements (std .5).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import steerfm
from steerfm import GaussianMixture
from steerfm.metrics import interval, mmd, sliced_wasserstein, wasserstein_1d
from steerfm.results import cost_plot
from steerfm.steering import METHODS, Funnel, Method


# --- targets ---------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """A target q proportional to p_1 exp(r): the mixture, the reward, exact samples of q (m, d), and log Z."""

    mixture: GaussianMixture
    reward: Callable[[Tensor], Tensor]
    target: Tensor
    log_z: float


def tilted(mixture: GaussianMixture, linear: Tensor, quadratic: Tensor, m: int = 4000) -> Case:
    """r = a'x - x'Bx/2: the target in closed form."""
    target, log_z = mixture.tilt(linear, quadratic)

    def reward(x: Tensor) -> Tensor:
        return x @ linear.to(x) - ((x @ quadratic.to(x)) * x).sum(1) / 2

    return Case(mixture, reward, target.sample(m, torch.Generator().manual_seed(0)), log_z.item())


def quadrature(mixture: GaussianMixture, reward: Callable[[Tensor], Tensor], side: float, m: int = 4000) -> Case:
    """Any reward in the plane: the target on a grid of 800 x 800 cells over [-side, side]^2."""
    cells = 800
    edge = 2 * side / cells
    centre = (torch.arange(cells, dtype=torch.float64) + 0.5) * edge - side
    points = torch.cartesian_prod(centre, centre)
    log_q = torch.cat([mixture.log_prob(part) + reward(part) for part in points.split(40_000)])
    generator = torch.Generator().manual_seed(0)
    chosen = points[torch.multinomial(log_q.softmax(0), m, replacement=True, generator=generator)]
    jitter = (torch.rand(m, 2, generator=generator, dtype=torch.float64) - 0.5) * edge
    return Case(mixture, reward, chosen + jitter, log_q.logsumexp(0).item() + 2 * math.log(edge))


def ring(spread: float = 0.3) -> GaussianMixture:
    phi = torch.arange(8, dtype=torch.float64) * math.pi / 4 + math.pi / 8
    return GaussianMixture(4 * torch.stack([phi.cos(), phi.sin()], 1), torch.full((8, 2), spread**2).double())


def cycloid(x: Tensor) -> Tensor:
    rho, phi = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    return -(((rho - 4 * (1 + 0.08 * torch.cos(12 * phi))) / 0.2) ** 2) / 2


def line() -> Case:
    mixture = GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2])
    return tilted(mixture, torch.tensor([1.2]), torch.tensor([[0.3]]))


def grid() -> Case:
    at = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
    mixture = GaussianMixture(torch.cartesian_prod(at, at), torch.full((9, 2), 0.3).double())
    return tilted(mixture, torch.zeros(2), torch.diag(torch.tensor([0.02, 2.0])))


def high() -> Case:
    means = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).double()
    mixture = GaussianMixture(means, torch.full((3, 16), 0.2), [0.5, 0.3, 0.2])
    return tilted(mixture, torch.eye(16)[0], torch.eye(16) / 4)


def inverse() -> Case:
    """log N(y; A x, .25 I) up to a constant is A'y/.25 . x - x' (A'A/.25) x / 2."""
    generator = torch.Generator().manual_seed(2)
    means, A = (torch.randn(rows, 8, generator=generator).double() for rows in (4, 3))
    A = A / math.sqrt(8)
    mixture = GaussianMixture(means, torch.full((4, 8), 0.3))
    y = A @ means[1] + 0.5 * torch.randn(3, generator=generator)
    return tilted(mixture, A.T @ y / 0.25, A.T @ A / 0.25)


CASES: dict[str, Callable[[], Case]] = {
    "line": line,
    "ring": lambda: quadrature(ring(), lambda x: -(x[:, 0].clamp_max(0) ** 2), 6.0),
    "cycloid": lambda: quadrature(ring(), cycloid, 6.0),
    "grid": grid,
    "high": high,
    "inverse": inverse,
}


# --- one cell --------------------------------------------------------------------------------------------------------
def within_budget(method: Method, case: Case, flow_map: Any, budget: int) -> Method | None:
    """The method with the particles that ``budget`` evaluations an output buy; None where it cannot be that cheap."""
    unit = int(getattr(method, "children", 1))
    if isinstance(method, Funnel):
        return method.sized(budget)
    if hasattr(method, "width"):  # what grows one child at a time by itself grows up to 64 times here
        method = replace(method, width=max(1, budget // 64))  # type: ignore[type-var]
        unit = 1 if hasattr(method, "budget") else method.width  # type: ignore[attr-defined]
    if hasattr(method, "budget"):
        return replace(method, budget=budget)  # type: ignore[type-var]
    trial = replace(method, particles=4 * unit)  # type: ignore[type-var]
    each = steerfm.steer(flow_map, case.reward, trial, n=1).cost.evaluations / (4 * unit)
    groups = int(budget / each) // unit
    return replace(method, particles=groups * unit) if groups else None  # type: ignore[type-var]


def measure(case: Case, method: Method, flow_map: Any, seeds: int) -> dict[str, list[float]]:
    """Errors of every seed: distances to the target, log Z, mode masses, mean reward; ESS, first particles left, cost."""
    started = time.perf_counter()
    result = steerfm.steer(flow_map, case.reward, method, n=seeds)
    seconds = (time.perf_counter() - started) / seeds
    weights = result.log_weights.exp()
    rows: dict[str, list[float]] = {}

    def record(name: str, value: Any) -> None:
        rows.setdefault(name, []).append(float(value))

    means = case.mixture.means
    nearest = torch.cdist(case.target, means).argmin(1)
    mass = torch.bincount(nearest, minlength=len(means)) / len(nearest)
    reward_mean = case.reward(case.target).mean()
    for i in range(seeds):
        x, w = result.samples[i].double(), weights[i]
        if x.shape[1] == 1:
            record("distance", wasserstein_1d(x, case.target, w, order=1.0))
        else:
            record("distance", sliced_wasserstein(x, case.target, 64, weights_a=w))
        if len(x) > 1 and (w > 1e-12).sum() > 1:
            record("mmd", mmd(x[:2000], case.target[:1500], [0.5, 1.0, 2.0], w[:2000]))
        found = torch.zeros(len(means), dtype=torch.float64).index_add(0, torch.cdist(x, means).argmin(1), w)
        record("mass", (found - mass).abs().sum() / 2)
        record("reward", (w * result.rewards[i]).sum() - reward_mean)
        record("ess", 1 / (w.square().sum() * len(w)))
        record("unique", result.trace.unique()[i] / len(w))
        if result.log_z is not None:
            record("log_z", result.log_z[i] - case.log_z)
    record("cost", result.cost.evaluations / seeds)
    record("particles", method.particles)
    record("seconds", seconds)
    return rows


# --- the page --------------------------------------------------------------------------------------------------------
def show(name: str, budget: int, found: dict[str, dict[int, dict[str, list[float]]]]) -> None:
    table = Table("method", "distance", "mmd", "log Z", "mass", "reward", "ESS", "unique", "particles", "cost", "ms",
                  title=f"{name}: errors at {budget} evaluations an output")  # fmt: skip
    rows = sorted((interval(cells[budget]["distance"])[0], m) for m, cells in found.items() if budget in cells)
    for _, method in rows:
        cell = found[method][budget]
        mean = {key: interval(values) for key, values in cell.items()}
        numbers = [
            f"{mean[key][0]:.3f}±{mean[key][1]:.3f}" if key in mean else ""
            for key in ("distance", "mmd", "log_z", "mass", "reward")
        ]
        table.add_row(
            method, *numbers, f"{mean['ess'][0]:.2f}", f"{mean['unique'][0]:.2f}", f"{mean['particles'][0]:.0f}",
            f"{mean['cost'][0]:.0f}", f"{1000 * mean['seconds'][0]:.0f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench exact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two targets, one budget, four seeds")
    parser.add_argument("--cases", nargs="*", default=None, choices=list(CASES))
    parser.add_argument("--methods", nargs="*", default=[name for name in METHODS if name != "steering"])
    parser.add_argument("--budgets", nargs="*", type=int, default=None, help="evaluations an output")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/exact"))
    options = parser.parse_args(argv)
    names = options.cases or (["line", "grid"] if options.quick else list(CASES))
    budgets = sorted(options.budgets or ([256] if options.quick else [128, 512, 2048]))
    seeds = options.seeds or (4 if options.quick else 8)
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; methods: {', '.join(METHODS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "exact.json"
    kept: dict[str, dict[str, list[float]] | None] = json.loads(file.read_text()) if file.is_file() else {}
    results: dict[str, dict[str, dict[int, dict[str, list[float]]]]] = {}
    cells = [(case, method) for case in names for method in options.methods]
    made = {name: CASES[name]() for name in names}
    for case_name, method_name in track(cells, "methods on exact targets", transient=True):
        case = made[case_name]
        flow_map = case.mixture.flow_map(steps=6)
        found = results.setdefault(case_name, {}).setdefault(method_name, {})
        for budget in budgets:
            key = f"{case_name}/{budget}/{method_name}/{seeds}"
            if key not in kept:
                method = within_budget(METHODS[method_name](), case, flow_map, budget)
                kept[key] = None if method is None else measure(case, method, flow_map, seeds)
                file.write_text(json.dumps(kept))
            if cell := kept[key]:
                found[budget] = cell
        if not found:
            del results[case_name][method_name]
    for name, found in results.items():
        show(name, budgets[-1], found)
        lines = {m: [(c["cost"][0], *interval(c["distance"])) for _, c in sorted(cells.items())] for m, cells in found.items()}
        path, title = options.out / f"{name}.png", f"{name}: sliced W2 (W1 on the line)"
        cost_plot(lines, path, title, "distance to the exact target", lower_is_better=True)
    line = {
        case: {
            method: {b: round(interval(cell["distance"])[0], 4) for b, cell in cells.items()} for method, cells in found.items()
        }
        for case, found in results.items()
    }
    print(f"plots and every seed: {file}")
    print(json.dumps({"benchmark": "exact", "seeds": seeds, "distance": line}))


if __name__ == "__main__":
    main()
