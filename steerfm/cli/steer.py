"""`steerfm steer`: samples towards a reward, a batch at a time, and the run folder that they leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.cli.config import SteerConfig
from steerfm.cli.console import console, make_table, progress
from steerfm.cli.outputs import Asked, asked, want_seeds
from steerfm.cli.parts import NO_JUDGE, autocast, build_judge, build_method, build_reward, check_needs, load_model
from steerfm.cli.runs import FINISHED, run_folder, slug, stem
from steerfm.cost import Cost
from steerfm.flowmap import (
    FlowMap,
    take_rows,
)  # fmt: skip
from steerfm.metrics import restoration
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.report.run_folder import RunFolder, read_tensor
from steerfm.report.trace import trace_plot
from steerfm.rewards import Reward
from steerfm.sampling import sample as draw
from steerfm.steering import Method, SteeringResult, steer_batches
from steerfm.steering.result import facts as result_facts

SHOWN = 32
"""Prompts, outputs of each, that a run draws; its trace is that of the first so many outputs."""


def steer(config: SteerConfig, command: str = "") -> None:
    """Steer, and write the run folder: samples, result.json, grid.png, trace.png, report.html."""
    default = f"runs/steer/{stem(config.model)}-{slug(config.reward)}-{slug(config.method)}"
    reward, method = build_reward(config.reward), build_method(config.method)
    method.check(reward)
    flow_map = load_model(config.model, config.device, config.guidance, config.compile)
    judge = build_judge(config, flow_map)
    want = asked(flow_map, config.label, config.prompt, config.n, reward)
    check_needs((reward, judge), want.labels, want.prompts)
    autocast(flow_map, config.precision)  # all that can be refused is refused before there is a folder
    folder = run_folder(config, default)
    if folder.load_result() is not None:
        console.print(FINISHED.format(folder.path), markup=False)
        return
    if judge is None and config.judge == "auto":
        console.print(NO_JUDGE)
    if judge is not None:
        judge.to(flow_map.device)
    batches = steered(config, folder, flow_map, want, reward, method)
    run = gather(batches, flow_map, want, reward, judge, autocast(flow_map, config.precision))
    log_weights, weights = run.values["log_weights"], run.values["log_weights"].exp()
    restored = {key: {name: value.mean() for name, value in of.items()} for key, of in run.near.items()}
    components = {k.removeprefix("component."): v for k, v in run.values.items() if k.startswith("component.")}
    summary = {
        "command": command,
        "reward": reward.name,
        "reward_base": run.scores["base"].mean(),
        "reward_best": run.scores["steered"].mean(),
        "reward_weighted": (weights * run.values["rewards"]).sum(1).mean(),
        "held_out": {"name": judge.name, **{name: value.mean() for name, value in run.held_out.items()}} if judge else None,
        "prompts": _by_prompt(want, run.scores, run.held_out),
        **restored,
        "components": {name: (weights * value).sum(1).mean() for name, value in components.items()},
        "log_z": run.values["log_z"].mean() if "log_z" in run.values else None,
        "ess": (1 / (weights.square().sum(1) * weights.shape[1])).mean(),
        "cost": run.cost.as_dict(),
    }
    folder.merge_parts("samples", told=result_facts(run.cost, flow_map))
    drawn = [
        *_draw_steering(folder.path, run.pictures, run.scores, reward.name, want), _draw_trace(folder.path, run),
    ]  # fmt: skip
    columns = [run.scores, *([run.held_out] if judge else []), *restored.values()]
    rows = {"base": "base", "steered": "steered (best)"}
    table = [(label, *(column[name].mean().item() for column in columns)) for name, label in rows.items()]
    header = ["", reward.name, *([f"held out: {judge.name}"] if judge else []), *restored]
    facts = {"command": command, "cost": str(run.cost)}
    report(
        folder, f"{config.model} steered by {reward.name}", facts, [("rewards, mean over outputs", header, table)],
        [(name, path) for name, path in drawn if path is not None],
    )  # fmt: skip
    folder.save_result(summary)  # last: its presence says that the run is finished
    folder.clear_parts()
    show = make_table(*header, title=f"{want.n} outputs of {log_weights.shape[1]} particles")
    for row in table:
        show.add_row(*[value if isinstance(value, str) else f"{value:.4g}" for value in row])
    console.print(show)
    console.print("cost: " + facts["cost"])
    console.print(f"pictures, numbers and report.html in {folder.path}")


def steered(
    config: SteerConfig, folder: RunFolder, flow_map: FlowMap, want: Asked, reward: Reward, method: Method
) -> Iterator[tuple[SteeringResult, Tensor]]:
    """A batch of outputs at a time: its result, and plain samples (n, *shape) of the same seeds. Both are a part of the folder
    as soon as they are there; those that a killed run left are read."""
    seeds, size, there = want_seeds(want, config.seeds), config.batch_size, set()
    batches = [slice(begin, min(begin + size, want.n)) for begin in range(0, want.n, size)]
    with progress("steering", len(batches)) as tick:
        fresh = steer_batches(
            flow_map, reward, method, want.n, seeds, config.strength, want.cond, prompts=want.prompts, labels=want.labels,
            batch_size=size, lookaheads=config.lookaheads, progress=tick, skip=there,
        )  # fmt: skip
        for index, rows in enumerate(batches):
            file = folder.part(index)
            try:
                result = SteeringResult.load(file, flow_map)
                base = read_tensor(file, "base")
                there.add(index)
            except (FileNotFoundError, ValueError):  # not there, or torn
                with autocast(flow_map, config.precision):
                    result = next(fresh)
                if rows.start >= SHOWN:
                    result.trace.lookaheads = None
                steps = getattr(method, "steps", 4)
                base = draw(flow_map, len(result), steps, seeds[rows], take_rows(want.cond, rows), batch_size=500).cpu()
                best = result.rewards.gather(1, result.best_index().unsqueeze(1))
                told = {"reward_mean": result.rewards.mean().item(), "reward_best": best.mean().item()}
                told["seconds"] = result.cost.seconds
                folder.log(output=rows.stop, **told, once=("output",))  # before the part: a line may come twice, not never
                result.save(file, base=base)
            yield result, base


@dataclass
class Steered:
    """What the batches of a run add up to.

    Attributes:
        values: per output or particle, all outputs: rewards, log_weights, component.*, and log_z where there is one.
        scores, held_out, near: {"base", "steered"} to the reward (n,), the judge's, and distances to a known truth.
        pictures: of the first outputs of the first prompts. first: the result of the first outputs. cost: of all.
    """

    values: dict[str, Tensor]
    scores: dict[str, Tensor]
    held_out: dict[str, Tensor]
    near: dict[str, dict[str, Tensor]]
    pictures: dict[str, Tensor]
    first: SteeringResult
    cost: Cost


def gather(
    batches: Iterable[tuple[SteeringResult, Tensor]], flow_map: FlowMap, want: Asked, reward: Reward, judge: Reward | None,
    precision: torch.autocast,
) -> Steered:  # fmt: skip
    """Add up the batches. What the results do not know is scored: plain samples, and what the judge says; a reward that
    compares pictures sees all of them at once."""
    values: dict[str, list[Tensor]] = {}
    looks: dict[str, list[Tensor]] = {"base": [], "steered": []}
    columns: dict[str, dict[str, list[Tensor]]] = {"base": {}, "steered": {}}
    first, cost, done, device = [], Cost(), 0, flow_map.device
    output, context = torch.arange(want.n), {"prompts": want.prompts, "labels": want.labels}
    at_once = reward.groupwise or (judge is not None and judge.groupwise)
    asked_for, drawn = output // want.each, (output % want.each < SHOWN) & (output // want.each < SHOWN)

    def add(name: str, key: str, value: Tensor) -> None:
        columns[name].setdefault(key, []).append(value.cpu())

    judged = at_once or judge is not None or reward.truth is not None

    def score(name: str, x: Tensor, rows: slice, known: Tensor | None = None) -> None:
        told = {key: None if value is None else value[rows] for key, value in context.items()}
        told["groups"] = asked_for[rows].to(device)
        add(name, "reward", reward.evaluate(x, **told).total if known is None else known)
        if judge:
            add(name, "held out", judge.evaluate(x, **told).total)
        for key, value in ({} if reward.truth is None else restoration(x, reward.truth)).items():
            add(name, key, value)

    for result, base in batches:
        rows = slice(done, done := done + len(result))
        cost = cost + result.cost
        first += [result] if rows.start < SHOWN else []
        of = {"rewards": result.rewards, "log_weights": result.log_weights, "log_z": result.log_z}
        of |= {f"component.{name}": value for name, value in result.components.items()}
        for name, value in of.items():
            if value is not None:
                values.setdefault(name, []).append(value.cpu())
        with torch.inference_mode(), precision:
            best = result.rewards.gather(1, result.best_index().unsqueeze(1)).squeeze(1)
            for name, z, known in (("base", base.to(device), None), ("steered", result.best(), best)):
                if known is not None and not (judged or drawn[rows].any()):
                    add(name, "reward", known)  # nobody looks at the pictures
                    continue
                x = flow_map.decode(z)
                looks[name].append(x if at_once else x[drawn[rows]])
                if not at_once:
                    score(name, x, rows, known)
    shown = {name: torch.cat(parts) for name, parts in looks.items()}
    if at_once:
        with torch.inference_mode(), precision:
            for name, x in shown.items():
                score(name, x, slice(0, want.n))
        shown = {name: x[drawn] for name, x in shown.items()}
    of = {name: {key: torch.cat(parts) for key, parts in column.items()} for name, column in columns.items()}
    keys = [key for key in of["base"] if key not in ("reward", "held out")]
    return Steered(
        {name: torch.cat(parts) for name, parts in values.items()},
        {name: column["reward"] for name, column in of.items()},
        {name: column["held out"] for name, column in of.items()} if judge else {},
        {key: {name: column[key] for name, column in of.items()} for key in keys},
        shown,
        SteeringResult.cat(first),
        cost,
    )


def _by_prompt(want: Asked, scores: Mapping[str, Tensor], held_out: Mapping[str, Tensor]) -> list[dict[str, Any]] | None:
    """Mean rewards of each prompt, base and steered."""
    if want.prompts is None:
        return None
    out = []
    for start in range(0, want.n, want.each):
        rows = slice(start, start + want.each)
        means = {f"reward_{name}": value[rows].mean().item() for name, value in scores.items()}
        means |= {f"held_out_{name}": value[rows].mean().item() for name, value in held_out.items()}
        out.append({"prompt": want.names[start], **means})
    return out


def _draw_steering(
    folder: Path, pictures: Mapping[str, Tensor], scores: Mapping[str, Tensor], name: str, want: Asked
) -> list[tuple[str, Path | None]]:
    """grid.png, or grid-0.png ... for several prompts: base above steered, the same seeds, the reward under each picture."""
    title = "the same seeds, base and steered; the reward under each picture"
    if next(iter(pictures.values())).ndim != 4:
        return [(title, None)]
    drawn: list[tuple[str, Path | None]] = []
    starts = range(0, want.n, want.each)[:SHOWN]
    columns, per = min(8, want.each), min(SHOWN, want.each)
    for number, start in enumerate(starts):
        grids, captions, labels = [], [], []
        for begin in range(0, per // columns * columns, columns):
            for kind in ("base", "steered"):
                first = number * per + begin
                grids.append(pictures[kind][first : first + columns].float().cpu())
                values = scores[kind][start + begin : start + begin + columns].tolist()
                captions.append([f"{value:.3g}" for value in values])
                labels.append(kind)
        asked_for = f"{want.names[start]}: {name}" if want.prompts else name
        file = folder / ("grid.png" if len(starts) == 1 else f"grid-{number}.png")
        said = f"{want.names[start]}: {title}" if want.prompts else title
        drawn.append((said, picture_grid(torch.stack(grids), file, labels, captions, title=asked_for)))
    return drawn


def _draw_trace(folder: Path, run: Steered) -> tuple[str, Path | None]:
    """trace.png: value, effective sample size, guidance and look-ahead pictures over time."""
    drawn: dict[str, Any] = vars(run.first.trace) | {"rewards": run.values["rewards"]}
    looks, flow_map = drawn.pop("lookaheads"), run.first.flow_map
    if looks is not None and flow_map is not None and len(flow_map.shape) == 3:
        drawn["lookaheads"] = flow_map.decode(looks.flatten(0, 1)).unflatten(0, looks.shape[:2])
    return "over time", trace_plot(drawn, folder / "trace.png")
