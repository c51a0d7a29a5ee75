"""Every method on exactly known targets, at equal cost: which methods sample the tilted density, and how well.

    steerfm bench exact                      # all methods, six targets, three budgets, eight seeds: 15 minutes on two cores
    steerfm bench exact --quick              # two targets, one budget: a minute and a half
    steerfm bench exact --methods best_of_n feynman_kac --cases ring
    steerfm bench exact --claims             # z-scores of log Z and mean reward: 20 minutes

A method gets as many particles as the budget buys (network evaluations per output; a backward pass counts two). Errors compare
the weighted particles of one output with samples of the exact target; intervals are over the seeds. Writes `exact.json` and a
plot of error against cost for every target; prints a table, then one JSON line. Results are stored after every cell, so a
killed run continues.

Targets: `line`, three modes, r = 1.2 x - .15 x^2; `ring`, eight modes (std .3) on a circle of radius 4, r = -x^2 1[x < 0];
`cycloid`, the same ring, r = -((rho - 4 (1 + .08 cos 12 phi)) / .2)^2 / 2; `grid`, nine modes (variance .3) at 0 and +-4,
r = -x^2/100 - y^2; `high`, three modes in 16 dimensions, r = x_1 - |x|^2 / 8; `inverse`, a mixture in 8 dimensions with
three noisy linear measurements (std .5).

`--claims` tests the methods that claim to sample, on concentrated targets: are their estimates right? Each cell has 200
outputs, at 512 and 2,048 evaluations. It shows the mean of Z / exact Z, which is 1 for an unbiased estimate, with its z-score
and the spread of one output (above 1 the mean depends on few outputs, and its z-score means little); and the weighted mean
reward, which has a bias of order 1 / particles, with its z-score. Methods on the ancestral chain are compared with that chain,
weighted at its end. Targets: `grid`; `ring`, eight modes of std .1, r = 1.5 x; `sharp`, the nine modes, r = 2 x + 3 y - x^2/2 -
y^2; `deep`, 16 dimensions, r = x_1 - |x|^2 / 8; `rare`, the same, r = 5 x_1 - |x|^2 / 8, where plain importance weights have an
ESS of 0.8%. Writes `claims.json`.
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
from steerfm.cli.bench import within_budget as fit_budget
from steerfm.metrics import interval, mmd, sliced_wasserstein, wasserstein_1d
from steerfm.report.plots import cost_plot
from steerfm.steering import METHODS, BestOfN, BudgetForcing, FeynmanKac, Method, TreeSearch
from steerfm.steering.noise_search import NoiseSearch


# --- targets ---------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """A target q proportional to p_1 exp(r).

    Attributes:
        mixture: p_1.
        reward: r.
        target: exact samples of q, (m, d).
        log_z: log of the normalising constant.
    """

    mixture: GaussianMixture
    reward: Callable[[Tensor], Tensor]
    target: Tensor
    log_z: float


def tilted(mixture: GaussianMixture, linear: Tensor, quadratic: Tensor, m: int = 4000) -> Case:
    """Build the case r = a'x - x'Bx/2, whose target is known in closed form."""
    target, log_z = mixture.tilt(linear, quadratic)

    def reward(x: Tensor) -> Tensor:
        return x @ linear.to(x) - ((x @ quadratic.to(x)) * x).sum(1) / 2

    return Case(mixture, reward, target.sample(m, torch.Generator().manual_seed(0)), log_z.item())


def quadrature(mixture: GaussianMixture, reward: Callable[[Tensor], Tensor], side: float, m: int = 4000) -> Case:
    """Build the case of any reward in the plane, with the target on a grid of 800 x 800 cells over [-side, side]^2."""
    cells = 800
    edge = 2 * side / cells
    centre = (torch.arange(cells, dtype=torch.float64) + 0.5) * edge - side
    points = torch.cartesian_prod(centre, centre)
    log_q = torch.cat([mixture.log_prob(part) + reward(part) for part in points.split(40_000)])
    generator = torch.Generator().manual_seed(0)
    centres = points[torch.multinomial(log_q.softmax(0), m, replacement=True, generator=generator)]
    jitter = (torch.rand(m, 2, generator=generator, dtype=torch.float64) - 0.5) * edge
    return Case(mixture, reward, centres + jitter, log_q.logsumexp(0).item() + 2 * math.log(edge))


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
    """Build the inverse problem: log N(y; A x, .25 I) is A'y/.25 . x - x' (A'A/.25) x / 2, up to a constant."""
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
def within_budget(method: Any, case: Case, flow_map: Any, budget: int) -> Any:
    """Fit a method to ``budget`` evaluations per output; None if even its smallest size costs more."""
    if isinstance(method, TreeSearch | BudgetForcing):  # by default these grow one child at a time
        method = replace(method, width=max(1, budget // 64))
    steps = method.iterations if isinstance(method, NoiseSearch) else method.steps
    return fit_budget(
        method, lambda candidate: steerfm.steer(flow_map, case.reward, candidate, n=1).cost.evaluations, budget, steps
    )


def measure(case: Case, method: Method, flow_map: Any, seeds: int) -> dict[str, list[float]]:
    """Return, for every seed, errors of distance, log Z, mode masses and mean reward; ESS, surviving ancestors and cost."""
    start = time.perf_counter()
    result = steerfm.steer(flow_map, case.reward, method, n=seeds)
    seconds = (time.perf_counter() - start) / seeds
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
        masses = torch.zeros(len(means), dtype=torch.float64).index_add(0, torch.cdist(x, means).argmin(1), w)
        record("mass", (masses - mass).abs().sum() / 2)
        record("reward", (w * result.rewards[i]).sum() - reward_mean)
        record("ess", 1 / (w.square().sum() * len(w)))
        record("unique", result.trace.unique()[i] / len(w))
        if result.log_z is not None:
            record("log_z", result.log_z[i] - case.log_z)
    record("cost", result.cost.evaluations / seeds)
    record("particles", method.particles)
    record("seconds", seconds)
    return rows


# --- tables ----------------------------------------------------------------------------------------------------------
def show(name: str, budget: int, results: dict[str, dict[int, dict[str, list[float]]]]) -> None:
    table = Table("method", "distance", "mmd", "log Z", "mass", "reward", "ESS", "unique", "particles", "cost", "ms",
                  title=f"{name}: errors at {budget} evaluations per output")  # fmt: skip
    rows = sorted((interval(cells[budget]["distance"])[0], m) for m, cells in results.items() if budget in cells)
    for _, method in rows:
        cell = results[method][budget]
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


# --- claims ----------------------------------------------------------------------------------------------------------
def hard(mixture: GaussianMixture, linear: Sequence[float], quadratic: Sequence[float]) -> tuple[Case, float]:
    """Build the case r = a'x - x'Bx/2 with diagonal B, and return it with the exact mean reward."""
    a, b = torch.tensor(linear, dtype=torch.float64), torch.tensor(quadratic, dtype=torch.float64)
    q, _ = mixture.tilt(a, b.diag())
    mean = a @ q.mean() - (b * (q.cov().diagonal() + q.mean() ** 2)).sum() / 2
    return tilted(mixture, a, b.diag(), 1), float(mean)


def hard_cases() -> dict[str, tuple[Case, float]]:
    axis = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
    nine = GaussianMixture(torch.cartesian_prod(axis, axis), torch.full((9, 2), 0.3).double())
    deep = GaussianMixture(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).double(), torch.full((3, 16), 0.2))
    rest = [0.0] * 15
    return {
        "grid": hard(nine, [0.0, 0.0], [0.02, 2.0]),
        "ring": hard(ring(0.1), [1.5, 0.0], [0.0, 0.0]),
        "sharp": hard(nine, [2.0, 3.0], [1.0, 2.0]),
        "deep": hard(deep, [1.0, *rest], [0.25] * 16),
        "rare": hard(deep, [5.0, *rest], [0.25] * 16),
    }


CLAIMS: dict[str, Method] = {
    **{name: method() for name, method in METHODS.items() if "Samples: yes" in (method.__doc__ or "")},
    **{name: METHODS[name]() for name in ("fmtt", "tree_search")},  # these claim it only in a limit
    "feynman_kac, twisted": FeynmanKac(correction="twisted"),
    "feynman_kac, map": FeynmanKac(guidance="map"),
    "feynman_kac, residual": FeynmanKac(resampling="residual", threshold=0.9),
    "feynman_kac, ssp": FeynmanKac(resampling="ssp", threshold=0.9),
}
ANCESTRAL = ("fk_steering", "tds", "das")


def of_the_chain(case: Case, flow_map: Any, steps: int) -> tuple[float, float, float, float]:
    """Return (log Z, its error, mean reward, its error) of the tilted ancestral chain, from a million weighted samples."""
    result = steerfm.steer(flow_map, case.reward, BestOfN(5000, steps, transition="bridge"), n=200, seeds=10**6, batch_size=40)
    assert result.log_z is not None
    share = (result.log_z.double() - case.log_z).exp()
    weighted = (share.unsqueeze(1) * result.log_weights.exp() * result.rewards).sum(1).double()
    z = share.mean()
    reward = weighted.mean() / z
    error = (weighted - reward * share).std() / z / math.sqrt(len(share))
    return math.log(z) + case.log_z, float(share.std() / z / math.sqrt(len(share))), float(reward), float(error)


def claim(
    case: Case, method: Method, flow_map: Any, n: int, truth: tuple[float, float, float, float]
) -> dict[str, float | None]:
    """Measure one cell: Z / exact Z with its z-score and spread, and the error of the mean reward with its z-score."""
    log_z, log_z_error, reward, reward_error = truth
    result = steerfm.steer(flow_map, case.reward, method, n=n, batch_size=100)
    means = (result.log_weights.exp() * result.rewards).sum(1).double()
    cell: dict[str, float | None] = {
        "particles": method.particles,
        "cost": result.cost.evaluations / n,
        "reward": float(means.mean()) - reward,
        "reward_z": (float(means.mean()) - reward) / math.hypot(float(means.std()) / math.sqrt(n), reward_error),
        "ess": float((1 / result.log_weights.exp().square().sum(1)).mean()),
        "z": None,
    }
    if result.log_z is not None:
        share = (result.log_z.double() - log_z).exp()
        error = math.hypot(float(share.std()) / math.sqrt(n), log_z_error)
        cell |= {
            "z": float(share.mean()),
            "z_z": (float(share.mean()) - 1) / error,
            "spread": float(share.std() / share.mean()),
        }
    return cell


def check_claims(options: argparse.Namespace, file: Path) -> None:
    """Measure the cells of `--claims` that are not in the file yet; print a table and a JSON line."""
    cells: dict[str, dict[str, float | None] | None] = json.loads(file.read_text()) if file.is_file() else {}
    n, budgets, cases = options.seeds or 200, options.budgets or [512, 2048], hard_cases()
    names = options.cases or list(cases)
    methods = {name: method for name, method in CLAIMS.items() if name.split(",")[0] in options.methods}
    for name in track(names, "claims on exact targets", transient=True):
        case, reward = cases[name]
        flow_map, exact = case.mixture.flow_map(steps=6), (case.log_z, 0.0, reward, 0.0)
        chains: dict[int, tuple[float, float, float, float]] = {}
        for label, method in methods.items():
            for budget in budgets:
                if (key := f"{name}/{budget}/{label}/{n}") in cells:
                    continue
                truth, steps = exact, getattr(method, "steps", 0)
                if label in ANCESTRAL:
                    truth = chains[steps] = chains.get(steps) or of_the_chain(case, flow_map, steps)
                affordable = within_budget(method, case, flow_map, budget)
                cells[key] = None if affordable is None else claim(case, affordable, flow_map, n, truth)
                file.write_text(json.dumps(cells))
    for budget in budgets:
        table = Table("method", *names, title=f"{budget} evaluations: Z / Z exact (z; spread) | reward (z)")
        for label in methods:
            table.add_row(label, *(cell_text(cells[f"{name}/{budget}/{label}/{n}"]) for name in names))
        Console(width=190).print(table)
    print(json.dumps({"benchmark": "claims", "outputs": n, "file": str(file)}))


def cell_text(cell: dict[str, float | None] | None) -> str:
    if cell is None:
        return ""
    log_z = "-" if cell["z"] is None else f"{cell['z']:.2f} ({cell['z_z']:+.1f}; {cell['spread']:.2f})"
    return f"{log_z} | {cell['reward']:+.3f} ({cell['reward_z']:+.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="steerfm bench exact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two targets, one budget, four seeds")
    parser.add_argument("--claims", action="store_true", help="z-scores of log Z and mean reward on concentrated targets")
    parser.add_argument(
        "--cases", nargs="*", default=None, choices=[*CASES, *(name for name in hard_cases() if name not in CASES)]
    )
    parser.add_argument("--methods", nargs="*", default=[name for name in METHODS if name != "steering"])
    parser.add_argument("--budgets", nargs="*", type=int, default=None, help="evaluations per output")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/exact"))
    options = parser.parse_args(argv)
    names = options.cases or (["line", "grid"] if options.quick else list(CASES))
    budgets = sorted(options.budgets or ([256] if options.quick else [128, 512, 2048]))
    seeds = options.seeds or (4 if options.quick else 8)
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; methods: {', '.join(METHODS)}")
    case_names = list(hard_cases() if options.claims else CASES)
    if unknown := [name for name in names if name not in case_names] if options.cases else []:
        parser.error(f"no case {', '.join(unknown)} here; cases: {', '.join(case_names)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.claims:
        return check_claims(options, options.out / "claims.json")
    file = options.out / "exact.json"
    cache: dict[str, dict[str, list[float]] | None] = json.loads(file.read_text()) if file.is_file() else {}
    results: dict[str, dict[str, dict[int, dict[str, list[float]]]]] = {}
    cells = [(case, method) for case in names for method in options.methods]
    targets = {name: CASES[name]() for name in names}
    for case_name, method_name in track(cells, "methods on exact targets", transient=True):
        case = targets[case_name]
        flow_map = case.mixture.flow_map(steps=6)
        by_budget = results.setdefault(case_name, {}).setdefault(method_name, {})
        for budget in budgets:
            key = f"{case_name}/{budget}/{method_name}/{seeds}"
            if key not in cache:
                method = within_budget(METHODS[method_name](), case, flow_map, budget)
                cache[key] = None if method is None else measure(case, method, flow_map, seeds)
                file.write_text(json.dumps(cache))
            if cell := cache[key]:
                by_budget[budget] = cell
        if not by_budget:
            del results[case_name][method_name]
    for name, by_method in results.items():
        show(name, budgets[-1], by_method)
        lines = {
            m: [(c["cost"][0], *interval(c["distance"])) for _, c in sorted(cells.items())] for m, cells in by_method.items()
        }
        path, title = options.out / f"{name}.png", f"{name}: sliced W2 (W1 on the line)"
        cost_plot(lines, path, title, "distance to the exact target", lower_is_better=True)
    line = {
        case: {m: {b: round(interval(cell["distance"])[0], 4) for b, cell in cells.items()} for m, cells in by_method.items()}
        for case, by_method in results.items()
    }
    print(f"plots and every seed: {file}")
    print(json.dumps({"benchmark": "exact", "seeds": seeds, "distance": line}))


if __name__ == "__main__":
    main()
