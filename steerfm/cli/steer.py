"""`steerfm steer`: steer samples towards a reward, batch by batch, and write the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.capabilities import check_method
from steerfm.cli.config import SteerConfig
from steerfm.cli.console import console, print_table, progress
from steerfm.cli.outputs import Outputs, outputs_of
from steerfm.cli.parts import autocast, build_judge, build_method, build_reward, check_needs, fitting, load_model
from steerfm.cli.runs import FINISHED, grid_rows, run_folder, slug, stem
from steerfm.cli.spread import on_processes, share_weights
from steerfm.cost import Cost
from steerfm.flowmap import FlowMap
from steerfm.metrics import restoration
from steerfm.processes import alone, first, of_first
from steerfm.registry import split_spec
from steerfm.report.formats import short
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.report.run_folder import RunFolder, read_tensor
from steerfm.rewards import Reward
from steerfm.rows import take_rows
from steerfm.sampling import sample as draw
from steerfm.steering import Method, Sampler, SteeringResult, steer_batches
from steerfm.steering.diagnosis import Diagnosis
from steerfm.steering.outcome import Tick
from steerfm.steering.result import OVER_TIME
from steerfm.steering.result import facts as result_facts
from steerfm.steering.state import Callback
from steerfm.steering.steer import usual

SHOWN = 32
"""Largest number of prompts, and of outputs of each, that a run draws and traces."""
COLUMNS = 4
"""Pictures side by side: few enough that the text below them can be read on a phone."""


@dataclass(frozen=True)
class Watch:
    """Observers of a run. An exception of theirs ends the run; the same command continues it.

    Attributes:
        step: sees the `State` after each step of a method that walks from noise to data.
        tick: called with (steps done, steps in all), of any method.
        end: sees the collected results, after all files are written.
    """

    step: Callback
    tick: Tick
    end: Callable[[Steered], None]


def steer(config: SteerConfig, command: str = "") -> None:
    """Steer, and write the run folder: samples, result.json, grid.png, trace.png, report.html."""
    on_processes(work, config, command)


def work(config: SteerConfig, command: str, watch: Watch | None = None, default: str = "") -> None:
    """Run one process: all processes steer, and the first one writes.

    Args:
        config: what to steer, and how.
        command: the command line, for the page and result.json.
        watch: observers; the samples do not depend on them.
        default: run folder if ``config.out`` is null; "" for runs/steer/MODEL-REWARD-METHOD.
    """
    reward, method = build_reward(config.reward), build_method(config.method)
    method.check(reward)
    flow_map = load_model(config.model, config.device, config.guidance, config.compile, config.activation_checkpoints)
    if (instead := fitting(config, method, flow_map, usual)) is not None:
        config, method = replace(config, method=instead), build_method(instead)
    check_method(method, flow_map)
    share_weights(flow_map, config.trainer)
    default = default or f"runs/steer/{stem(config.model)}-{slug(config.reward)}-{slug(config.method)}"
    choice = build_judge(config, flow_map, reward)
    judge = choice.judge
    want = outputs_of(flow_map, config.label, config.prompt, config.n, reward, config.negative)
    check_needs((reward, judge), want.labels, want.prompts)
    seeds, strengths = want.seeds(config.seeds), want.strengths(config.strength)
    autocast(flow_map, config.precision)  # refuse all bad input before there is a folder
    folder = of_first(lambda: run_folder(config, default))
    if of_first(folder.load_result) is not None:
        console.print(FINISHED.format(folder.path), markup=False)
        return
    if choice.gap:
        console.print(choice.gap, markup=False)
    batches = steer_parts(config, folder, flow_map, want, reward, method, seeds, strengths, watch)
    if not first():
        for _ in batches:
            pass
        return
    if judge is not None:
        judge.to(flow_map.device)
    run = gather(batches, flow_map, want, reward, judge, autocast(flow_map, config.precision))
    finish(config, command, folder, flow_map, want, reward, judge, method, run)
    if watch is not None:
        watch.end(run)


def finish(
    config: SteerConfig, command: str, folder: RunFolder, flow_map: FlowMap, want: Outputs, reward: Reward,
    judge: Reward | None, method: Method, run: Steered,
) -> None:  # fmt: skip
    """Write the files of a run, and print its results."""
    folder.merge_parts("samples", metadata=result_facts(run.cost, flow_map))
    header, table = _compare(run, reward, judge)
    label = split_spec(config.method, "method")[0]
    trace = run.first.plot(folder.path / "trace.png", label, want.names, run.values["rewards"])
    pictures = [*_draw_steering(folder.path, run, reward.name, want), (OVER_TIME, trace)]
    facts = _facts(config, run, method)
    tables = [("mean rewards over outputs; for steered outputs, of the best particle", header, _by(label, table))]
    report(folder, f"{stem(config.model)} steered by {reward.name}", {"command": command} | facts, tables, pictures)
    folder.save_result({"command": command} | summary(run, want, reward, judge))  # last: it marks the run as finished
    folder.clear_parts()
    lines = [[value if isinstance(value, str) else f"{value:.4g}" for value in row] for row in table]
    print_table(header, lines, f"{want.n} outputs of {run.values['log_weights'].shape[1]} particles")
    for name in (*run.diagnosis.in_words(), "cost"):
        console.print(f"{name}: {facts[name]}")
    console.print(f"pictures, numbers and report.html in {folder.path}")


def steer_parts(
    config: SteerConfig,
    folder: RunFolder,
    flow_map: FlowMap,
    want: Outputs,
    reward: Reward,
    method: Method,
    seeds: list[int],
    strengths: float | list[float] | str,
    watch: Watch | None = None,
) -> Iterator[tuple[SteeringResult, Tensor]]:
    """Steer batch by batch.

    Each batch is written to the folder at once. Batches that a killed run has written are read instead, and so is the strength
    that it chose for "auto".

    Yields:
        The result of a batch, and plain samples (n, *shape) of the same seeds.
    """
    size, done = config.batch_size, set()
    batches = [slice(begin, min(begin + size, want.n)) for begin in range(0, want.n, size)]
    step = watch.step if watch is not None and isinstance(method, Sampler) else None
    fresh: Iterator[SteeringResult] | None = None  # starts at the first missing batch: "auto" costs calls
    with progress("steering", len(batches)) as tick:
        for index, rows in enumerate(batches):
            file = folder.part(index)
            part = _part(file, flow_map) if first() else None
            if of_first(lambda part=part: part is not None):
                done.add(index)
                if part is not None:
                    yield part
                continue
            fresh = fresh or steer_batches(
                flow_map, reward, method, want.n, seeds, of_first(lambda: _strengths(strengths, folder, len(batches))),
                want.cond, prompts=want.prompts, labels=want.labels, batch_size=size, micro_batch=config.micro_batch,
                lookaheads=config.lookaheads, progress=_ticks(tick, watch), skip=done, callback=step,
            )  # fmt: skip
            with autocast(flow_map, config.precision):
                result = next(fresh)
            if rows.start >= SHOWN:
                result.trace.lookaheads = None
            steps = method.steps if isinstance(method, Sampler) else flow_map.steps
            base = draw(flow_map, len(result), steps, seeds[rows], take_rows(want.cond, rows), batch_size=500).cpu()
            best = result.rewards.gather(1, result.best_index().unsqueeze(1))
            values = {"reward_mean": result.rewards.mean().item(), "reward_best": best.mean().item()}
            values["seconds"] = result.cost.seconds
            if first():
                folder.log(output=rows.stop, **values, once=("output",))  # before the part, so that no line is lost
                result.save(file, base=base)
            yield result, base


def _ticks(tick: Tick, watch: Watch | None) -> Tick:
    """Tick the bar of the terminal, and the observers."""

    def both(done: int, steps: int) -> None:
        tick(done, steps)
        if watch is not None:
            watch.tick(done, steps)

    return both


def _part(file: Path, flow_map: FlowMap) -> tuple[SteeringResult, Tensor] | None:
    """Read the part in a file; None if it is missing or corrupt."""
    try:
        return SteeringResult.load(file, flow_map), read_tensor(file, "base")
    except (FileNotFoundError, ValueError):
        return None


def _strengths(strengths: float | list[float] | str, folder: RunFolder, batches: int) -> float | list[float] | str:
    """Return the strengths of a run. For "auto", take the strength of the first batch of a killed run, if there is one."""
    if strengths == "auto":
        for index in range(batches):
            try:
                return read_tensor(folder.part(index), "strength")[0].item()
            except (FileNotFoundError, ValueError):  # missing or corrupt
                continue
    return strengths


@dataclass
class Steered:
    """The collected batches of a run.

    Attributes:
        values: numbers of all outputs or particles: rewards, log_weights, strength, component.*, and log_z if any.
        scores: rewards (n,) of "base" and "steered".
        held_out: rewards (n,) of the judge, of "base" and "steered"; empty without a judge.
        near: distances (n,) to a known truth by name, of "base" and "steered".
        pictures: pictures of the first outputs of the first prompts, of "base" and "steered".
        first: result of the first outputs.
        cost: cost of all outputs.
        diagnosis: diagnosis of the strength.
    """

    values: dict[str, Tensor]
    scores: dict[str, Tensor]
    held_out: dict[str, Tensor]
    near: dict[str, dict[str, Tensor]]
    pictures: dict[str, Tensor]
    first: SteeringResult
    cost: Cost
    diagnosis: Diagnosis


@dataclass
class Scores:
    """Scores of the plain and the best samples by the reward, the judge and a known truth, collected batch by batch.

    Attributes:
        outputs: conditions of the outputs.
        reward: the reward.
        judge: the held-out reward, or None.
        columns: "base" or "steered" -> name of a column -> its parts (b,).
    """

    outputs: Outputs
    reward: Reward
    judge: Reward | None
    columns: dict[str, dict[str, list[Tensor]]] = field(default_factory=lambda: {"base": {}, "steered": {}})

    @property
    def at_once(self) -> bool:
        """Whether all outputs must be scored together, because a reward compares pictures."""
        return self.reward.groupwise or (self.judge is not None and self.judge.groupwise)

    @property
    def looks(self) -> bool:
        """Whether pictures need scores besides the reward that a result holds."""
        return self.at_once or self.judge is not None or self.reward.truth is not None

    def add(self, name: str, key: str, value: Tensor) -> None:
        """Append a part to a column."""
        self.columns[name].setdefault(key, []).append(value.cpu())

    def score(self, name: str, x: Tensor, z: Tensor, rows: slice, rewards: Tensor | None = None) -> None:
        """Score pictures (b, c, h, w) of these rows.

        Args:
            name: "base" or "steered".
            x: the pictures.
            z: the same samples in the model's space.
            rows: rows of the outputs.
            rewards: their rewards (b,), if known already.
        """
        context: dict[str, Any] = {"prompts": self.outputs.prompts, "labels": self.outputs.labels}
        context = {key: None if value is None else value[rows] for key, value in context.items()}
        context |= {"groups": (torch.arange(self.outputs.n)[rows] // self.outputs.each).to(x.device), "latents": z}
        self.add(name, "reward", self.reward.evaluate(x, **context).total if rewards is None else rewards)
        if self.judge:
            self.add(name, "held out", self.judge.evaluate(x, **context).total)
        for key, value in ({} if self.reward.truth is None else restoration(x, self.reward.truth)).items():
            self.add(name, key, value)

    def joined(self) -> dict[str, dict[str, Tensor]]:
        """Return each column as {"base": (n,), "steered": (n,)}."""
        keys = self.columns["base"]
        return {key: {name: torch.cat(column[key]) for name, column in self.columns.items()} for key in keys}


def gather(
    batches: Iterable[tuple[SteeringResult, Tensor]], flow_map: FlowMap, want: Outputs, reward: Reward, judge: Reward | None,
    precision: torch.autocast,
) -> Steered:  # fmt: skip
    """Collect the batches, and score what the results do not hold: plain samples, and the judge's rewards.

    A reward that compares pictures scores all of them at once.
    """
    scores, values, first, cost, start = Scores(want, reward, judge), {}, [], Cost(), 0
    diagnoses: list[Diagnosis] = []
    looks: dict[str, list[Tensor]] = {"base": [], "steered": []}
    states: dict[str, list[Tensor]] = {"base": [], "steered": []}
    output = torch.arange(want.n)
    in_picture = (output % want.each < SHOWN) & (output // want.each < SHOWN)
    for result, base in batches:
        rows = slice(start, start := start + len(result))
        cost = cost + result.cost
        first += [result] if rows.start < SHOWN else []
        diagnoses.append(result.diagnosis)
        for name, value in _numbers(result).items():
            values.setdefault(name, []).append(value.cpu())
        with torch.inference_mode(), precision, alone():
            best = result.rewards.gather(1, result.best_index().unsqueeze(1)).squeeze(1)
            for name, z, rewards in (("base", base.to(flow_map.device), None), ("steered", result.best(), best)):
                if rewards is not None and not (scores.looks or in_picture[rows].any()):
                    scores.add(name, "reward", rewards)  # no picture is needed
                    continue
                x = flow_map.decode(z)
                looks[name].append(x if scores.at_once else x[in_picture[rows]])
                if scores.at_once:
                    states[name].append(z)
                else:
                    scores.score(name, x, z, rows, rewards)
    pictures = {name: torch.cat(parts) for name, parts in looks.items()}
    if scores.at_once:
        with torch.inference_mode(), precision, alone():
            for name, x in pictures.items():
                scores.score(name, x, torch.cat(states[name]), slice(0, want.n))
        pictures = {name: x[in_picture] for name, x in pictures.items()}
    near = scores.joined()
    return Steered(
        values={name: torch.cat(parts) for name, parts in values.items()},
        scores=near.pop("reward"), held_out=near.pop("held out", {}), near=near, pictures=pictures,
        first=SteeringResult.cat(first), cost=cost, diagnosis=Diagnosis.cat(diagnoses),
    )  # fmt: skip


def _numbers(result: SteeringResult) -> dict[str, Tensor]:
    """Return the numbers of a result's outputs and particles, by name."""
    of = {"rewards": result.rewards, "log_weights": result.log_weights, "log_z": result.log_z, "strength": result.strength}
    of |= {f"component.{name}": value for name, value in result.components.items()}
    return {name: value for name, value in of.items() if value is not None}


def summary(run: Steered, want: Outputs, reward: Reward, judge: Reward | None) -> dict[str, Any]:
    """Return the content of result.json: means over outputs, with particles weighted."""
    weights = run.values["log_weights"].exp()
    means = {
        name.removeprefix("component."): (weights * value).sum(1).mean()
        for name, value in run.values.items() if name == "rewards" or name.startswith("component.")
    }  # fmt: skip
    return {
        "reward": reward.name,
        "reward_base": run.scores["base"].mean(),
        "reward_best": run.scores["steered"].mean(),
        "reward_weighted": means.pop("rewards"),
        "held_out": {"name": judge.name, **{name: value.mean() for name, value in run.held_out.items()}} if judge else None,
        "prompts": _by_prompt(want, run.scores, run.held_out),
        **{key: {name: value.mean() for name, value in of.items()} for key, of in run.near.items()},
        "components": means,
        "log_z": run.values["log_z"].mean() if "log_z" in run.values else None,
        "strength": _one_or_all(run.values["strength"]),
        "ess": (1 / (weights.square().sum(1) * weights.shape[1])).mean(),
        "pareto_k": _known_mean(run.diagnosis.heavy),
        "cost": run.cost.as_dict(),
    }


def _known_mean(values: Tensor) -> Tensor | None:
    """Return the mean of the values that are not NaN; None if all are."""
    return None if values.isnan().all() else values.nanmean()


def _one_or_all(values: Tensor) -> Any:
    """Return the common value of all outputs (n,), or all values if they differ."""
    return values[0] if bool((values == values[0]).all()) else values


def _compare(run: Steered, reward: Reward, judge: Reward | None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return header and rows of the table: plain samples above the best ones, one column per score."""
    columns = [run.scores, *([run.held_out] if judge else []), *run.near.values()]
    rows = {"base": "base", "steered": "steered (best)"}
    table = [(label, *(column[name].mean().item() for column in columns)) for name, label in rows.items()]
    return ["", reward.name, *([f"held out: {judge.name}"] if judge else []), *run.near], table


def _by_prompt(want: Outputs, scores: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> list[dict[str, Any]] | None:
    """Return the mean rewards of each prompt, base and steered; None without prompts."""
    if want.prompts is None:
        return None
    out = []
    for start in range(0, want.n, want.each):
        rows = slice(start, start + want.each)
        means = {f"reward_{name}": value[rows].mean().item() for name, value in scores.items()}
        means |= {f"held_out_{name}": value[rows].mean().item() for name, value in held_out.items()}
        out.append({"prompt": want.names[start], **means})
    return out


def _by(method: str, table: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Insert the method into the names of rows, which then have its colour in the report."""
    return [(name.replace("steered (best)", f"steered ({method}), best"), *values) for name, *values in table]


def _facts(config: SteerConfig, run: Steered, method: Method) -> dict[str, str]:
    """Return the facts above the pictures of the page."""
    n, k = run.values["log_weights"].shape
    log_z = {"log Z": f"{run.values['log_z'].mean():.4g}, mean over outputs"} if "log_z" in run.values else {}
    return {
        "method": f"{split_spec(config.method, 'method')[0]}: {method!r}",
        "strength": f"auto: {short(run.first.strength[0])}" if config.strength == "auto" else short(config.strength),
        "outputs": f"{n} of {k} particles",
        **run.diagnosis.in_words(),
        **log_z,
        "cost": str(run.cost),
    }


def _draw_steering(folder: Path, run: Steered, name: str, want: Outputs) -> list[tuple[str, Path]]:
    """Draw grid.png, or grid-0.png, ... for several prompts: base above steered, with the reward under each picture."""
    if run.pictures["base"].ndim != 4:
        return []
    figures: list[tuple[str, Path]] = []
    starts = range(0, want.n, want.each)[:SHOWN]
    per = min(SHOWN, want.each)
    for number, start in enumerate(starts):
        grids, captions = [], []
        pairs = {}
        for kind in ("base", "steered"):
            values = [f"{value:.3g}" for value in run.scores[kind][start : start + per].tolist()]
            pairs[kind] = grid_rows(run.pictures[kind][number * per : (number + 1) * per].float().cpu(), values, COLUMNS)
        for row in range(len(pairs["base"][0])):
            grids += [pictures[row] for pictures, _ in pairs.values()]
            captions += [texts[row] for _, texts in pairs.values()]
        labels = [*pairs] * (len(grids) // 2)
        about = f"{want.names[start]}: " if want.prompts else ""
        file = folder / ("grid.png" if len(starts) == 1 else f"grid-{number}.png")
        gaps = {row: "" for row in range(2, len(grids), 2)}
        title = f"{about}{name} under each picture"
        picture_grid(torch.stack(grids), file, labels, captions, title, gaps)
        figures.append((f"{about}plain samples, and the best particle of each output, from the same seeds; {name} below", file))
    return figures
