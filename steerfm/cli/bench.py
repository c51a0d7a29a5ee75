"""`steerfm bench`: compare methods at equal cost over a sweep of cells, each stored in a file, and tabulate them.

The rules of a fair comparison are fixed. Every method gets the steps and particles that one budget of network evaluations buys.
Plain samples and best-of-n of the same map are always included. Methods are ranked by a reward that none of them sees; if there
is none, by the reward itself, and the tables say so. There are at least four seeds. Diversity, distance to the data and wall
time are shown beside the reward.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import platform
import re
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerfm
from steerfm import files, shipped
from steerfm.capabilities import in_steps
from steerfm.cli.config import NOTHING, BenchConfig, SteerConfig
from steerfm.cli.console import console, print_table, progress, quiet_lightning
from steerfm.cli.loading import config_yaml, explain, find_recipe, load, make, plain, recipes
from steerfm.cli.outputs import Outputs, outputs_of
from steerfm.cli.parts import build_judge, build_method, build_reward, check_needs, load_model
from steerfm.cli.runs import contents, stem
from steerfm.cli.standings import (
    BASE,
    BASELINE,
    NOTHING_HELD_OUT,
    STAR,
    difference_table,
    mean_ranks,
    table,
    what_counts,
    worth,
)
from steerfm.cli.standings import draw as draw_standings
from steerfm.cli.suites import TAKEN, as_keys, baseline, check_difference, check_keys, methods_of, share_of
from steerfm.cli.workers import device_of, launcher, local_number, run_workers, share_out, threads
from steerfm.cost import Ledger
from steerfm.flowmap import FlowMap
from steerfm.metrics import (
    Difference,
    bootstrap,
    feature_statistics,
    frechet_distance,
    interval,
    paired_difference,
    pairwise_diversity,
)
from steerfm.metrics.evaluator import Evaluator
from steerfm.report.formats import short
from steerfm.report.page import report
from steerfm.report.run_folder import RunFolder
from steerfm.rewards import Reward, RewardError
from steerfm.sampling import sample as draw
from steerfm.steering import Method, steer
from steerfm.steering.outcome import Fits
from steerfm.steering.size import Sized
from steerfm.steering.strength import automatic
from steerfm.trust import nearest
from steerfm.values import ConfigError

__all__ = ["TAKEN", "bench", "inert", "summary", "sweep", "within_budget", "work"]
LEAST_SEEDS = 4
SCRIPTS = "the scripts behind the pages of results (exact, smc, ...) are not part of the package: run them in a checkout"


def bench(name: str | None, arguments: list[str], command: str = "") -> None:
    """List the benchmarks, or run one: a suite (a recipe or a yaml file), or a script with a function ``main(arguments)``."""
    scripts = {path.stem: path for path in sorted(shipped.folder("benchmarks").glob("*.py"))}
    suites = recipes("bench")
    if name is None:
        rows = [(key, path.read_text().split("\n")[0].lstrip("# ")) for key, path in suites.items()]
        rows += [(key, (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]) for key, path in scripts.items()]
        print_table(("benchmark", "what"), rows)
        if not scripts:
            console.print(SCRIPTS)
    elif name in scripts:
        quiet_lightning()
        runpy.run_path(str(scripts[name]))["main"](arguments)
    elif name not in suites and not Path(name).is_file():
        names = [*suites, *scripts]
        suggestion = f"{nearest(name, names)}; benchmarks: {', '.join(names)}"
        raise ConfigError(f"unknown benchmark {name!r}{suggestion}" + ("" if scripts else f"; {SCRIPTS}"))
    elif {"-h", "--help"} & set(arguments):
        path = find_recipe(name, "bench")
        print(f"{BenchConfig.__doc__}\n\n{explain(BenchConfig)}\n\n{path}:\n{path.read_text()}")
    else:
        sweep(load(BenchConfig, name, as_keys(arguments)), Path(name).stem, command)


# --- cells -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Yardstick:
    """The feature space of diversity and distance.

    Attributes:
        features: maps pictures or vectors to features (b, d).
        reference: mean (d,) and covariance (d, d) of the data's features, or None.
    """

    features: Callable[[Tensor], Tensor]
    reference: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, flow_map: FlowMap) -> Yardstick:
        """Return the first space that the map's card names, or by default the samples themselves."""
        evaluator = Evaluator(flow_map, progress=progress)
        space = evaluator.first
        try:
            reference = evaluator.reference(space)
        except FileNotFoundError:  # the data are not prepared
            reference = None
        return cls(space.features, None if reference is None else (reference.mean, reference.cov))


FACTS = ("evaluations", "forwards", "backwards", "reward_calls", "seconds")


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, a reward, and the outputs to draw.

    Attributes:
        name: name of the problem in its suite.
        config: configuration as for `steerfm steer`.
        flow_map: the model.
        yardstick: feature space of diversity and distance.
        reward: the reward that methods see.
        judge: the held-out reward that ranks methods; None to rank them by the reward itself.
        outputs: conditions of the outputs, one row each.
    """

    name: str
    config: SteerConfig
    flow_map: FlowMap
    yardstick: Yardstick
    reward: Reward
    judge: Reward | None
    outputs: Outputs

    @cached_property
    def strengths(self) -> float | list[float]:
        """Strength of all outputs, or of each. "auto" is computed once, and its cost is not counted for any method."""
        strength = self.outputs.strengths(self.config.strength)
        if isinstance(strength, str):
            return automatic(self.flow_map, self.reward, self.outputs.to(self.flow_map.device), strength)
        return strength

    @property
    def unsteered(self) -> str:
        """Name of plain samples in tables: `BASE`, or the same with the model's own number of steps."""
        return f"unsteered, {in_steps(self.flow_map, self.flow_map.steps)}"

    @property
    def title(self) -> str:
        return f"{self.name}, {stem(self.config.model)}, strength {short(self.config.strength)}"

    def evaluations(self, method: Method) -> float:
        """Measure the network evaluations of one output by drawing it."""
        row = self.outputs[:1]
        context = {"prompts": row.prompts, "labels": row.labels}
        strength = self.strengths[0] if isinstance(self.strengths, list) else self.strengths
        return steer(self.flow_map, self.reward, method, 1, 0, strength, row.cond, **context).cost.evaluations

    def measure(self, method: Method | None, seed: int) -> dict[str, Tensor]:
        """Measure one cell: score the particle of each output with the highest reward by the judge.

        Args:
            method: the method; None for plain samples.
            seed: number of the repetition.

        Returns:
            Scores (n,), features (n, d), facts (`FACTS` per output), and the first pictures.
        """
        want, size, strengths = self.outputs, self.config.batch_size, self.strengths
        seeds = want.seeds(seed * self.config.n)
        with Ledger() as ledger:
            if method is None:
                x = draw(self.flow_map, want.n, self.flow_map.steps, seeds, want.cond, batch_size=max(size, 100))
            else:
                x = steer(
                    self.flow_map, self.reward, method, want.n, seeds, strengths, want.cond,
                    prompts=want.prompts, labels=want.labels, batch_size=size,
                ).best()  # fmt: skip
        cost = ledger.cost
        with torch.inference_mode():
            pictures = self.flow_map.decode(x)
            context = {"prompts": want.prompts, "labels": want.labels}
            groups = torch.arange(want.n, device=pictures.device) // want.each
            judges = {"reward": self.reward} | ({"held_out": self.judge} if self.judge else {})
            context |= {"groups": groups, "latents": x}
            scores = {name: judge.evaluate(pictures, **context).total for name, judge in judges.items()}
            features = self.yardstick.features(pictures)
        facts = [cost.evaluations, cost.forwards, cost.backwards, cost.reward_calls, cost.seconds]
        tensors = {name: value.float().cpu().clone() for name, value in scores.items()}
        tensors |= {"features": features.half().cpu().clone(), "facts": torch.tensor(facts, dtype=torch.float64) / want.n}
        if pictures.ndim == 4:
            tensors["pictures"] = (pictures[:12].float().cpu() * 255).round().to(torch.uint8)
        return tensors


def within_budget(method: Any, evaluations: Callable[[Any], float], budget: int, steps: int | None = None) -> Any:
    """Fit a method to a budget.

    Args:
        method: a method. One without its own rule gets the particles that the budget buys, if it is a dataclass.
        evaluations: returns the network evaluations of one output of a method.
        budget: most network evaluations per output.
        steps: number of steps that the suite sets; None for the method's own choice.

    Returns:
        The method at the best size for the budget, or None if even its smallest size costs more.
    """
    try:
        if isinstance(method, Sized):
            return method.within(budget, evaluations, steps)
        if isinstance(method, Fits):
            return method.within(budget)
    except ValueError:
        return None
    each = evaluations(method) / method.particles
    if is_dataclass(type(method)) and "particles" in {field.name for field in fields(method)}:
        return replace(method, particles=int(budget / each)) if each <= budget else None
    return method if each * method.particles <= budget else None


# --- the sweep -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A problem, a budget, and a method by its name in the suite (`BASE` has budget 0); measured at every seed."""

    problem: Problem
    budget: int
    method: str

    @property
    def words(self) -> str:
        """Name of the method in tables."""
        return self.problem.unsteered if self.method == BASE else self.method


Cells = Mapping[Column, list[dict[str, Tensor]]]
"""Measurements, seed by seed. A method that does not fit its budget has none."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a column at a seed, with the name of its file."""

    column: Column
    seed: int
    name: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The cells of a sweep and their folder.

    Attributes:
        folder: the run folder.
        methods: configuration of each method by name.
        columns: columns of the sweep.
        seeds: number of seeds of each column.
    """

    folder: RunFolder
    methods: Mapping[str, Any]
    columns: Sequence[Column]
    seeds: int

    @classmethod
    def of(cls, config: BenchConfig, folder: RunFolder, methods: Mapping[str, Any], problems: Sequence[Problem]) -> Plan:
        columns = [
            column
            for problem in problems
            for column in (
                Column(problem, 0, BASE), *(Column(problem, budget, name) for budget in config.budgets for name in methods),
            )
        ]  # fmt: skip
        return cls(folder, methods, columns, config.seeds)

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, column by column."""
        methods = self.methods
        return [Cell(c, seed, _file(c, methods.get(c.method), seed)) for c in self.columns for seed in range(self.seeds)]

    def count(self) -> int:
        """Count the cells that have a file."""
        return sum((self.folder.path / f"{cell.name}.safetensors").is_file() for cell in self.cells)

    def load(self, cell: Cell) -> dict[str, Tensor] | None:
        """Read the measurement of a cell; None if there is none."""
        try:
            tensors = self.folder.load_tensors(cell.name)
        except (FileNotFoundError, ValueError):
            return None
        if cell.column.problem.judge is None:
            tensors.pop("held_out", None)  # a file may hold the scores of a judge that was not held out
        return tensors

    def measure(self, share: str, tick: Callable[[int, int], None], check: Callable[[], None] = lambda: None) -> None:
        """Measure all cells that have no file, together with any other processes; returns when all are measured.

        Args:
            share: part of the cells to measure, such as "2/4".
            tick: called with the number of finished cells, and of all cells.
            check: called before each cell; may raise to stop.
        """
        part, parts = share_of(share)
        mine = [cell for number, cell in enumerate(self.cells) if number % parts == part]

        def make(number: int) -> None:
            check()
            if self.load(cell := mine[number]) is not None:
                return
            settings = self.methods.get(cell.column.method)
            method = self.affordable(cell.column) if settings else None
            tensors = cell.column.problem.measure(method, cell.seed) if method or not settings else {}
            self.folder.save_tensors(cell.name, tensors)

        share_out(self.folder.path, [cell.name for cell in mine], make, tick)

    def affordable(self, column: Column) -> Method | None:
        """Return the method of a column at the size that its budget buys; None if it does not fit."""
        if column not in self._affordable:
            settings = self.methods[column.method]
            steps = settings.get("steps", settings.get("iterations"))
            self._affordable[column] = _affordable(build_method(settings), column, steps)
        return self._affordable[column]

    @cached_property
    def _affordable(self) -> dict[Column, Method | None]:
        return {}


def sweep(config: BenchConfig, suite: str, command: str = "") -> None:
    """Measure every cell that has no file, then write the tables, the plots and the report.

    Any number of processes, on any machines, may share one folder; ``config.workers`` of them are started here.
    """
    methods, problems = methods_of(config), _problems(config)
    check_difference(config.difference, [*dict.fromkeys(problem.unsteered for problem in problems), *methods])
    _, parts = share_of(config.share)
    variable = launcher()
    if config.force and (parts > 1 or variable):
        which = f"share={config.share}" if parts > 1 else f"{variable}={os.environ[variable]}"
        raise ConfigError(f"force=true {which}: this would delete the cells of the other processes; use one process")
    folder = _folder(config, suite)
    files.write(folder.path / "suite.yaml", config_yaml(replace(config, workers=1)))
    plan = Plan.of(config, folder, methods, problems)
    before = _tables_written(folder)
    what = f"bench {suite}" if config.workers == 1 else f"bench {suite}, {config.workers} workers"
    with progress(what, len(plan.cells)) as tick:
        if config.workers > 1:
            worker_config = replace(config, force=False, workers=1)
            calls = [replace(worker_config, device=device_of(config.device, number)) for number in range(config.workers)]
            run_workers([("steerfm.cli.bench:work", (call, suite)) for call in calls], plan.count, len(plan.cells), tick)
        plan.measure(config.share, tick)
    results = [plan.load(cell) for cell in plan.cells]
    if missing := results.count(None):
        console.print(f"{missing} of {len(results)} cells are left to other shares: {folder.path}")
        return
    cells: dict[Column, list[dict[str, Tensor]]] = {}
    for cell, tensors in zip(plan.cells, results):
        if tensors:
            cells.setdefault(cell.column, []).append(tensors)
    of = _digest(plan, config)
    with files.Claims(folder.path) as claims, claims.of("tables", wait=True):
        if (now := _tables_written(folder)) != before and now.get("of") == of:
            console.print(
                f"all {len(results)} cells are measured; another process wrote the tables: {folder.path / 'report.html'}"
            )
            return
        files.sweep(folder.path)
        _write(config, suite, folder, cells, summary(cells, baseline(methods) or BASELINE), command, of)


def work(task: tuple[BenchConfig, str], check: Callable[[], None]) -> None:
    """Entry point of a worker, which measures cells and writes no tables."""
    config, suite = task
    Plan.of(config, _folder(config, suite), methods_of(config), _problems(config)).measure(config.share, lambda *_: None, check)


def _folder(config: BenchConfig, suite: str) -> RunFolder:
    """Open the folder of a sweep. It can take further methods, problems and budgets, and several processes at once."""
    return RunFolder(Path(config.out or f"runs/bench/{suite}"), f"suite: {suite}\n", shared=True, force=config.force)


def _tables_written(folder: RunFolder) -> dict[str, Any]:
    """Return when the tables in a folder were written, and the digest of their cells; empty without tables."""
    file = folder.path / "summary.json"
    try:
        return {"at": file.stat().st_mtime_ns, "of": json.loads(file.read_text()).get("of")}
    except (OSError, ValueError):
        return {}


def _digest(plan: Plan, config: BenchConfig) -> str:
    """Return a digest of what the tables depend on: the names of the cells, and the pair of the difference."""
    return hashlib.sha256(
        "\n".join([*(f"{cell.column.method} {cell.name}" for cell in plan.cells), *config.difference]).encode()
    ).hexdigest()[:20]


def _affordable(method: Method, column: Column, steps: int | None) -> Method | None:
    """Fit a method to the budget of a column.

    Returns:
        The method, or None if it does not fit the budget, if it needs a gradient that the reward does not have, or if the
        budget buys too few particles for its settings.
    """
    try:
        method.check(column.problem.reward)
    except RewardError:
        return None
    affordable = within_budget(method, column.problem.evaluations, column.budget, steps)
    try:
        if affordable is not None:
            affordable.check(column.problem.reward)
    except ValueError:
        return None
    return affordable


def _file(column: Column, method: Any, seed: int) -> str:
    """Name the file of a cell by a digest of all that its numbers depend on, including the user's files."""
    settings = plain(column.problem.config) | {"budget": column.budget, "method": method, "seeds": seed}
    if column.method == BASE != column.problem.unsteered:
        settings["unsteered"] = column.problem.unsteered
    for neutral in ("out", "force", "device", "lookaheads", "batch_size"):
        settings.pop(neutral)
    text = json.dumps(settings | {"steerfm": steerfm.__version__}, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    for _, file_digest in sorted(contents(settings).items()):
        digest.update(file_digest.encode())
    return f"cells/{digest.hexdigest()[:20]}"


def inert(value: Any) -> Any:
    """Escape a csv value that a spreadsheet would read as a formula; numbers are unchanged."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _problems(config: BenchConfig) -> list[Problem]:
    """Build every combination of model, problem and strength, and check them before anything is measured."""
    if config.seeds < LEAST_SEEDS:
        raise ConfigError(f"seeds={config.seeds}: give at least {LEAST_SEEDS}, which an interval needs")
    if not config.problems:
        raise ConfigError(NOTHING)
    check_keys(config.problems)
    problems = []
    for model in config.models:
        flow_map = load_model(model, device_of(config.device, local_number()))
        yardstick = Yardstick.of(flow_map)
        for name, keys in config.problems.items():
            for strength in config.strengths:
                here = {"model": model, "n": config.n, "batch_size": config.batch_size, "strength": strength}
                problem = make(SteerConfig, here | dict(keys), f"problems.{name}.")
                reward = build_reward(problem.reward)
                judge = build_judge(problem, flow_map, reward).judge
                if judge is None:
                    console.print(f"problem {name!r}: {NOTHING_HELD_OUT}", markup=False)
                want = outputs_of(flow_map, problem.label, problem.prompt, problem.n, reward, problem.negative)
                check_needs((reward, judge), want.labels, want.prompts)
                want.strengths(problem.strength)
                problems.append(Problem(name, problem, flow_map, yardstick, reward, judge, want))
    return problems


# --- tables ----------------------------------------------------------------------------------------------------------
def summary(cells: Cells, best_of_n: str = BASELINE) -> list[dict[str, Any]]:
    """Summarise the cells, one row per column.

    A row holds means over seeds; the bootstrap interval of the score that counts; its differences to best-of-n and to plain
    samples, paired by seed and output; the rank within the budget; and ``pareto``, whether no row of the problem has a higher
    score at the same or lower cost.

    Args:
        cells: measurements of each column.
        best_of_n: name of best-of-n in the suite.
    """
    rows = []
    for column, repetitions in cells.items():
        problem, counts = column.problem, what_counts(repetitions)
        scores = torch.stack([cell[counts] for cell in repetitions])
        low, high = bootstrap(scores.mean(1))
        features = torch.cat([cell["features"].float() for cell in repetitions])
        row = {
            "model": stem(problem.config.model), "problem": problem.name, "strength": problem.config.strength,
            "budget": column.budget, "method": column.words, "seeds": len(repetitions), "outputs": scores.numel(),
            **({"held_out": scores.mean().item()} if counts == "held_out" else {}),
            "low": low, "high": high, "reward": torch.stack([cell["reward"] for cell in repetitions]).mean().item(),
            "diversity": _diversity(features, problem.outputs.names * len(repetitions)),
            "distance": _distance(features, problem.yardstick.reference),
            **dict(zip(FACTS, torch.stack([cell["facts"] for cell in repetitions]).mean(0).tolist())),
        }  # fmt: skip
        others = {BASELINE: Column(problem, column.budget, best_of_n), "unsteered": Column(problem, 0, BASE)}
        for name, other in others.items():
            if other in cells and other != column:
                differences = scores - torch.stack([cell[counts] for cell in cells[other]])
                row[f"over_{name}"], row[f"over_{name}_half"] = interval(differences.flatten())
        rows.append(row)
    for row, column in zip(rows, cells):
        of = [(r, c) for r, c in zip(rows, cells) if c.problem is column.problem]
        row["rank"] = 1 + sum(worth(r) > worth(row) for r, c in of if c.budget == column.budget)
        row["pareto"] = not any(worth(r) > worth(row) and r["evaluations"] <= row["evaluations"] for r, _ in of)
    return rows


def differences(cells: Cells, a: str, b: str) -> dict[Column, Difference]:
    """Compare two methods on the same seeds and outputs, by the held-out reward or, without a judge, by the reward.

    Returns:
        The difference a - b for each problem and budget where both have cells, by the column of ``a``.
    """
    out = {}
    for column in cells:
        one, other = (
            Column(column.problem, 0, BASE) if name == column.problem.unsteered else replace(column, method=name)
            for name in (a, b)
        )
        if column in (one, other) and column.budget and one in cells and other in cells:
            counts = what_counts([*cells[one], *cells[other]])
            scores = (torch.stack([cell[counts] for cell in cells[of]]) for of in (one, other))
            out[replace(column, method=a)] = paired_difference(*scores)
    return out


def _diversity(features: Tensor, names: Sequence[str]) -> float:
    """Return the mean distance between outputs with the same condition."""
    index: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        index.setdefault(name, []).append(row)
    distances = [pairwise_diversity(features[rows]) for rows in index.values() if len(rows) > 1]
    return sum(distances) / len(distances) if distances else float("nan")


def _distance(features: Tensor, reference: tuple[Tensor, Tensor] | None) -> float:
    """Return the Fréchet distance to the data. For few samples it is biased upwards: compare it only within one suite."""
    return float("nan") if reference is None else frechet_distance(*feature_statistics(features), *reference)


def _write(
    config: BenchConfig, suite: str, folder: RunFolder, cells: Cells, rows: list[dict[str, Any]], command: str, of_cells: str
) -> None:
    """Write cells.csv, summary.json, the plots and pictures of each problem, and report.html; print the tables."""
    _write_cells(folder.path / "cells.csv", cells, rows)
    tables, pictures, names = [], [], []
    for problem in dict.fromkeys(column.problem for column in cells):
        of = [row for row, column in zip(rows, cells) if column.problem is problem]
        tables += [table(problem.title, budget, _at(of, budget)) for budget in config.budgets]
        name = re.sub(r"[^\w.+=-]+", "-", problem.title.replace("strength ", "")).strip("-.") or "problem"
        name = name if name not in names else f"{name}-{len(names)}"  # "a b" and "a/b" are two problems
        names.append(name)
        last = config.budgets[-1]
        first = {column.words: cells[column][0] for column in cells if column.problem is problem and column.budget in (0, last)}
        pictures += draw_standings(problem.title, of, first, last, folder.path / name)
    apart = differences(cells, *config.difference) if config.difference else {}
    if config.difference:
        lines = [(of.problem.title, of.budget, what_counts(cells[of]), d) for of, d in apart.items()]
        tables.insert(0, difference_table(config.difference, lines))
    means = mean_ranks(rows)
    tables.append(("mean rank over problems and budgets", ["method", "rank"], [[n, f"{r:.2f}"] for n, r in means.items()]))
    facts = {
        "suite": suite, "command": command, "n": config.n, "seeds": config.seeds, "threads": threads(config.workers),
        "machine": platform.machine(), "torch": torch.__version__, "steerfm": steerfm.__version__,
    }  # fmt: skip
    of = [{"of": config.difference, "problem": c.problem.title, "budget": c.budget, **asdict(d)} for c, d in apart.items()]
    whole = facts | {"of": of_cells, "ranks": means, "rows": rows} | ({"differences": of} if of else {})
    files.write(folder.path / "summary.json", json.dumps(whole, indent=1))
    page = report(folder, f"Benchmark {suite}", facts, tables, pictures)
    console.print(STAR)
    console.print("mean rank: " + ", ".join(f"{name} {rank:.1f}" for name, rank in means.items()))
    console.print(f"{sum(map(len, cells.values()))} cells: {folder.path / 'cells.csv'}, {folder.path / 'summary.json'}, {page}")


def _at(rows: Iterable[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Return the rows at a budget, and those of plain samples."""
    return [row for row in rows if row["budget"] in (0, budget)]


def _write_cells(path: Path, cells: Cells, rows: list[dict[str, Any]]) -> None:
    """Write cells.csv: one line per cell, with the facts of its row."""
    facts = ["model", "problem", "strength", "budget", "method"]
    with files.whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*facts, "seed", "held_out", "reward", *FACTS])
        for row, repetitions in zip(rows, cells.values()):
            for seed, cell in enumerate(repetitions):
                held_out = [f"{cell['held_out'].mean().item():.6g}"] if "held_out" in cell else [""]
                numbers = [cell["reward"].mean().item(), *cell["facts"].tolist()]
                own = (inert(row[fact]) for fact in facts)
                writer.writerow([*own, seed, *held_out, *(f"{number:.6g}" for number in numbers)])
