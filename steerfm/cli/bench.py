"""`steerfm bench`: methods compared at equal cost over a sweep of cells, each kept as a file, and one table of all of them.

The rules of a fair comparison are not left to the suite: every method gets the steps and particles that one budget of network
evaluations buys, plain samples and best-of-n of the same map are always there, what counts is a reward that no method has
seen (where there is none, the reward itself, and the tables say so), at least four seeds are drawn, and diversity, distance to
the data and wall time stand beside the reward.
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
from steerfm.cli.loading import explain, find_recipe, kept, load, make, plain, recipes
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
from steerfm.cli.workers import device_of, launched, local_number, run_workers, share_out, threads
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
SCRIPTS = "the scripts behind the measured pages (exact, smc, finetune, ...) are no part of the package: run them in a checkout"


def bench(name: str | None, arguments: list[str], command: str = "") -> None:
    """List the benchmarks, or run one: a suite (a recipe or a yaml file), or a script with a ``main(arguments)``."""
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
        known = [*suites, *scripts]
        listed = f"{nearest(name, known)}; benchmarks: {', '.join(known)}"
        raise ConfigError(f"unknown benchmark {name!r}{listed}" + ("" if scripts else f"; {SCRIPTS}"))
    elif {"-h", "--help"} & set(arguments):
        path = find_recipe(name, "bench")
        print(f"{BenchConfig.__doc__}\n\n{explain(BenchConfig)}\n\n{path}:\n{path.read_text()}")
    else:
        sweep(load(BenchConfig, name, as_keys(arguments)), Path(name).stem, command)


# --- cells -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Yardstick:
    """What diversity and distance are measured in.

    Attributes:
        features: pictures or vectors to features (b, d).
        reference: mean and covariance of the data's, or None.
    """

    features: Callable[[Tensor], Tensor]
    reference: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, flow_map: FlowMap) -> Yardstick:
        """The first space that the map's card names; where it names none, the sample itself."""
        evaluator = Evaluator(flow_map, progress=progress)
        space = evaluator.first
        try:
            known = evaluator.reference(space)
        except FileNotFoundError:  # the data are not prepared
            known = None
        return cls(space.features, None if known is None else (known.mean, known.cov))


FACTS = ("evaluations", "forwards", "backwards", "reward_calls", "seconds")


@dataclass(frozen=True, eq=False)
class Problem:
    """A model and what its outputs are asked for.

    Attributes:
        name: of the problem in its suite.
        config: as for `steerfm steer`.
        reward: what methods see.
        judge: what counts; None where there is none, and then the reward itself does.
        outputs: what they are asked for, a row each.
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
        """One for all outputs, or for each. "auto" is worked out once, at no method's cost."""
        told = self.outputs.strengths(self.config.strength)
        if isinstance(told, str):
            return automatic(self.flow_map, self.reward, self.outputs.to(self.flow_map.device), told)
        return told

    @property
    def unsteered(self) -> str:
        """What plain samples are called: `BASE`, or how many steps the model takes by itself."""
        return f"unsteered, {in_steps(self.flow_map, self.flow_map.steps)}"

    @property
    def title(self) -> str:
        return f"{self.name}, {stem(self.config.model)}, strength {short(self.config.strength)}"

    def evaluations(self, method: Method) -> float:
        """Network evaluations of one output, by trying it."""
        row = self.outputs[:1]
        told = {"prompts": row.prompts, "labels": row.labels}
        strength = self.strengths[0] if isinstance(self.strengths, list) else self.strengths
        return steer(self.flow_map, self.reward, method, 1, 0, strength, row.cond, **told).cost.evaluations

    def measure(self, method: Method | None, seed: int) -> dict[str, Tensor]:
        """One cell: the best particle of each output by the reward, as the judge sees it; None draws plain samples."""
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
            told = {"prompts": want.prompts, "labels": want.labels}
            groups = torch.arange(want.n, device=pictures.device) // want.each
            judges = {"reward": self.reward} | ({"held_out": self.judge} if self.judge else {})
            scores = {name: judge.evaluate(pictures, **told, groups=groups, latents=x).total for name, judge in judges.items()}
            features = self.yardstick.features(pictures)
        facts = [cost.evaluations, cost.forwards, cost.backwards, cost.reward_calls, cost.seconds]
        found = {name: value.float().cpu().clone() for name, value in scores.items()}
        found |= {"features": features.half().cpu().clone(), "facts": torch.tensor(facts, dtype=torch.float64) / want.n}
        if pictures.ndim == 4:
            found["pictures"] = (pictures[:12].float().cpu() * 255).round().to(torch.uint8)
        return found


def within_budget(method: Any, evaluations: Callable[[Any], float], budget: int, steps: int | None = None) -> Any:
    """The method in its best shape for a budget; None where it cannot be that cheap.

    Args:
        method: that fits itself; or one of your own, which gets the particles that the budget buys, where it is a dataclass.
        evaluations: of one output, of a method.
        budget: the most of them.
        steps: that a suite asks for, in place of those of the method's shape.
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
    """What is measured at every seed: a problem, a budget, and a method by its name in the suite (`BASE` at budget 0)."""

    problem: Problem
    budget: int
    method: str

    @property
    def words(self) -> str:
        """What tables call the method."""
        return self.problem.unsteered if self.method == BASE else self.method


Cells = Mapping[Column, list[dict[str, Tensor]]]
"""What was measured, seed by seed; a method that cannot be so cheap has no cells."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a column at a seed, and the name of its file."""

    column: Column
    seed: int
    name: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The cells of a sweep, and where they are.

    Attributes:
        folder: of the run.
        methods: by name, as they are configured.
        columns: of the table.
        seeds: of each column.
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
        """Column by column."""
        told = self.methods
        return [Cell(c, seed, _file(c, told.get(c.method), seed)) for c in self.columns for seed in range(self.seeds)]

    def done(self) -> int:
        """How many cells have a file."""
        return sum((self.folder.path / f"{cell.name}.safetensors").is_file() for cell in self.cells)

    def load(self, cell: Cell) -> dict[str, Tensor] | None:
        """What was measured; None where nothing was."""
        try:
            tensors = self.folder.load_tensors(cell.name)
        except (FileNotFoundError, ValueError):
            return None
        if cell.column.problem.judge is None:
            tensors.pop("held_out", None)  # of a judge that was taken for one
        return tensors

    def measure(self, share: str, tick: Callable[[int, int], None], check: Callable[[], None] = lambda: None) -> None:
        """Measure what has no file yet and nobody else is at; returns once nobody is.

        Args:
            share: which part of the cells.
            tick: called with how many there are, and how many there will be.
            check: called
                before a cell; raises to end all.
        """
        part, parts = share_of(share)
        mine = [cell for number, cell in enumerate(self.cells) if number % parts == part]

        def make(number: int) -> None:
            check()
            if self.load(cell := mine[number]) is not None:
                return
            told = self.methods.get(cell.column.method)
            method = self.affordable(cell.column) if told else None
            measured = cell.column.problem.measure(method, cell.seed) if method or not told else {}
            self.folder.save_tensors(cell.name, measured)

        share_out(self.folder.path, [cell.name for cell in mine], make, tick)

    def affordable(self, column: Column) -> Method | None:
        """The method of a column in the shape that its budget buys, worked out once."""
        if column not in self._affordable:
            told = self.methods[column.method]
            self._affordable[column] = _affordable(build_method(told), column, told.get("steps", told.get("iterations")))
        return self._affordable[column]

    @cached_property
    def _affordable(self) -> dict[Column, Method | None]:
        return {}


def sweep(config: BenchConfig, suite: str, command: str = "") -> None:
    """Measure every cell that has no file yet, then write the table, the plots and the report of all of them. Any number of
    processes may do so at once with one folder, on any machines; ``config.workers`` starts some."""
    methods, problems = methods_of(config), _problems(config)
    check_difference(config.difference, [*dict.fromkeys(problem.unsteered for problem in problems), *methods])
    _, parts = share_of(config.share)
    several = launched()
    if config.force and (parts > 1 or several):
        which = f"share={config.share}" if parts > 1 else f"{several}={os.environ[several]}"
        raise ConfigError(f"force=true {which}: would delete what the other processes measure; start anew with one")
    folder = _folder(config, suite)
    files.write(folder.path / "suite.yaml", kept(replace(config, workers=1)))
    plan = Plan.of(config, folder, methods, problems)
    before = _made(folder)
    what = f"bench {suite}" if config.workers == 1 else f"bench {suite}, {config.workers} workers"
    with progress(what, len(plan.cells)) as tick:
        if config.workers > 1:
            told = replace(config, force=False, workers=1)
            calls = [replace(told, device=device_of(config.device, number)) for number in range(config.workers)]
            run_workers([("steerfm.cli.bench:work", (call, suite)) for call in calls], plan.done, len(plan.cells), tick)
        plan.measure(config.share, tick)
    measured = [plan.load(cell) for cell in plan.cells]
    if missing := measured.count(None):
        console.print(f"{missing} of {len(measured)} cells are left to other shares: {folder.path}")
        return
    cells: dict[Column, list[dict[str, Tensor]]] = {}
    for cell, tensors in zip(plan.cells, measured):
        if tensors:
            cells.setdefault(cell.column, []).append(tensors)
    of = _digest(plan, config)
    with files.Claims(folder.path) as claims, claims.of("tables", wait=True):
        if (made := _made(folder)) != before and made.get("of") == of:
            console.print(
                f"all {len(measured)} cells are measured; another process wrote the tables: {folder.path / 'report.html'}"
            )
            return
        files.sweep(folder.path)
        _write(config, suite, folder, cells, summary(cells, baseline(methods) or BASELINE), command, of)


def work(told: tuple[BenchConfig, str], check: Callable[[], None]) -> None:
    """What a worker does: it measures, and leaves the tables to others."""
    config, suite = told
    Plan.of(config, _folder(config, suite), methods_of(config), _problems(config)).measure(config.share, lambda *_: None, check)


def _folder(config: BenchConfig, suite: str) -> RunFolder:
    """One folder takes further methods, problems and budgets, and several processes."""
    return RunFolder(Path(config.out or f"runs/bench/{suite}"), f"suite: {suite}\n", shared=True, force=config.force)


def _made(folder: RunFolder) -> dict[str, Any]:
    """Which tables are there: when they were written, and of which cells."""
    file = folder.path / "summary.json"
    try:
        return {"at": file.stat().st_mtime_ns, "of": json.loads(file.read_text()).get("of")}
    except (OSError, ValueError):
        return {}


def _digest(plan: Plan, config: BenchConfig) -> str:
    """What tables depend on: their cells by name, and the difference that is asked for."""
    return hashlib.sha256(
        "\n".join([*(f"{cell.column.method} {cell.name}" for cell in plan.cells), *config.difference]).encode()
    ).hexdigest()[:20]


def _affordable(method: Method, column: Column, steps: int | None) -> Method | None:
    """What the column's budget buys; None also for a method that follows a gradient which the reward does not have, and where
    too few particles are left for its settings, such as one for a warm-up."""
    try:
        method.check(column.problem.reward)
    except RewardError:
        return None
    sized = within_budget(method, column.problem.evaluations, column.budget, steps)
    try:
        if sized is not None:
            sized.check(column.problem.reward)
    except ValueError:
        return None
    return sized


def _file(column: Column, method: Any, seed: int) -> str:
    """A name for a cell that changes with what its numbers depend on, files of one's own included, and with nothing else."""
    told = plain(column.problem.config) | {"budget": column.budget, "method": method, "seeds": seed}
    if column.method == BASE != column.problem.unsteered:
        told["unsteered"] = column.problem.unsteered
    for neutral in ("out", "force", "device", "lookaheads", "batch_size"):
        told.pop(neutral)
    text = json.dumps(told | {"steerfm": steerfm.__version__}, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    for _, held in sorted(contents(told).items()):
        digest.update(held.encode())
    return f"cells/{digest.hexdigest()[:20]}"


def inert(value: Any) -> Any:
    """A cell of a csv file that no spreadsheet takes for a formula; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _problems(config: BenchConfig) -> list[Problem]:
    """Every model with every problem and strength, checked before anything is measured."""
    if config.seeds < LEAST_SEEDS:
        raise ConfigError(f"seeds={config.seeds}: at least {LEAST_SEEDS} are needed to know how far to trust a difference")
    if not config.problems:
        raise ConfigError(NOTHING)
    check_keys(config.problems)
    made = []
    for model in config.models:
        flow_map = load_model(model, device_of(config.device, local_number()))
        yardstick = Yardstick.of(flow_map)
        for name, told in config.problems.items():
            for strength in config.strengths:
                here = {"model": model, "n": config.n, "batch_size": config.batch_size, "strength": strength}
                problem = make(SteerConfig, here | dict(told), f"problems.{name}.")
                reward = build_reward(problem.reward)
                judge = build_judge(problem, flow_map, reward).judge
                if judge is None:
                    console.print(f"problem {name!r}: {NOTHING_HELD_OUT}", markup=False)
                want = outputs_of(flow_map, problem.label, problem.prompt, problem.n, reward, problem.negative)
                check_needs((reward, judge), want.labels, want.prompts)
                want.strengths(problem.strength)
                made.append(Problem(name, problem, flow_map, yardstick, reward, judge, want))
    return made


# --- what the cells say ----------------------------------------------------------------------------------------------
def summary(cells: Cells, best_of_n: str = BASELINE) -> list[dict[str, Any]]:
    """One row a column: means over seeds, the bootstrap interval of what counts, its differences to best-of-n and to plain
    samples paired by seed and output, rank within the budget, and whether no row of the problem that costs no more is better
    (Pareto)."""
    rows = []
    for column, found in cells.items():
        problem, counts = column.problem, what_counts(found)
        held = torch.stack([cell[counts] for cell in found])
        low, high = bootstrap(held.mean(1))
        features = torch.cat([cell["features"].float() for cell in found])
        row = {
            "model": stem(problem.config.model), "problem": problem.name, "strength": problem.config.strength,
            "budget": column.budget, "method": column.words, "seeds": len(found), "outputs": held.numel(),
            **({"held_out": held.mean().item()} if counts == "held_out" else {}),
            "low": low, "high": high, "reward": torch.stack([cell["reward"] for cell in found]).mean().item(),
            "diversity": _diversity(features, problem.outputs.names * len(found)),
            "distance": _distance(features, problem.yardstick.reference),
            **dict(zip(FACTS, torch.stack([cell["facts"] for cell in found]).mean(0).tolist())),
        }  # fmt: skip
        others = {BASELINE: Column(problem, column.budget, best_of_n), "unsteered": Column(problem, 0, BASE)}
        for name, other in others.items():
            if other in cells and other != column:
                differences = held - torch.stack([cell[counts] for cell in cells[other]])
                row[f"over_{name}"], row[f"over_{name}_half"] = interval(differences.flatten())
        rows.append(row)
    for row, column in zip(rows, cells):
        of = [(r, c) for r, c in zip(rows, cells) if c.problem is column.problem]
        row["rank"] = 1 + sum(worth(r) > worth(row) for r, c in of if c.budget == column.budget)
        row["pareto"] = not any(worth(r) > worth(row) and r["evaluations"] <= row["evaluations"] for r, _ in of)
    return rows


def differences(cells: Cells, a: str, b: str) -> dict[Column, Difference]:
    """By how much the held-out reward (the reward, where there is no judge) of method ``a`` is above that of ``b``, output by
    output of the same seeds: for each problem and budget, by its column of ``a``; nothing where one of them has no cells."""
    out = {}
    for column in cells:
        one, other = (
            Column(column.problem, 0, BASE) if name == column.problem.unsteered else replace(column, method=name)
            for name in (a, b)
        )
        if column in (one, other) and column.budget and one in cells and other in cells:
            counts = what_counts([*cells[one], *cells[other]])
            held = (torch.stack([cell[counts] for cell in cells[of]]) for of in (one, other))
            out[replace(column, method=a)] = paired_difference(*held)
    return out


def _diversity(features: Tensor, names: Sequence[str]) -> float:
    """Mean distance between outputs that were asked for the same."""
    index: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        index.setdefault(name, []).append(row)
    found = [pairwise_diversity(features[rows]) for rows in index.values() if len(rows) > 1]
    return sum(found) / len(found) if found else float("nan")


def _distance(features: Tensor, reference: tuple[Tensor, Tensor] | None) -> float:
    """Fréchet distance to the data: biased upwards for so few, to be compared within one suite only."""
    return float("nan") if reference is None else frechet_distance(*feature_statistics(features), *reference)


def _write(
    config: BenchConfig, suite: str, folder: RunFolder, cells: Cells, rows: list[dict[str, Any]], command: str, of_cells: str
) -> None:
    """cells.csv (a line a cell), summary.json, a plot and pictures of each problem, report.html; prints the tables."""
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
        found = [(of.problem.title, of.budget, what_counts(cells[of]), d) for of, d in apart.items()]
        tables.insert(0, difference_table(config.difference, found))
    means = mean_ranks(rows)
    tables.append(("mean rank over problems and budgets", ["method", "rank"], [[n, f"{r:.2f}"] for n, r in means.items()]))
    told = {
        "suite": suite, "command": command, "n": config.n, "seeds": config.seeds, "threads": threads(config.workers),
        "machine": platform.machine(), "torch": torch.__version__, "steerfm": steerfm.__version__,
    }  # fmt: skip
    of = [{"of": config.difference, "problem": c.problem.title, "budget": c.budget, **asdict(d)} for c, d in apart.items()]
    whole = told | {"of": of_cells, "ranks": means, "rows": rows} | ({"differences": of} if of else {})
    files.write(folder.path / "summary.json", json.dumps(whole, indent=1))
    page = report(folder, f"Benchmark {suite}", told, tables, pictures)
    console.print(STAR)
    console.print("mean rank: " + ", ".join(f"{name} {rank:.1f}" for name, rank in means.items()))
    console.print(f"{sum(map(len, cells.values()))} cells: {folder.path / 'cells.csv'}, {folder.path / 'summary.json'}, {page}")


def _at(rows: Iterable[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The rows at a budget, and of plain samples."""
    return [row for row in rows if row["budget"] in (0, budget)]


def _write_cells(path: Path, cells: Cells, rows: list[dict[str, Any]]) -> None:
    """A line a cell, under the facts of its row."""
    facts = ["model", "problem", "strength", "budget", "method"]
    with files.whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*facts, "seed", "held_out", "reward", *FACTS])
        for row, measured in zip(rows, cells.values()):
            for seed, cell in enumerate(measured):
                held = [f"{cell['held_out'].mean().item():.6g}"] if "held_out" in cell else [""]
                numbers = [cell["reward"].mean().item(), *cell["facts"].tolist()]
                writer.writerow([*(inert(row[fact]) for fact in facts), seed, *held, *(f"{number:.6g}" for number in numbers)])
