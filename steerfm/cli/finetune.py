"""`steerfm finetune`: fine-tune a flow map, and write the tuned map, a run folder and a report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from steerfm import files, registry, training, zoo
from steerfm.capabilities import can, in_steps
from steerfm.checkpoints import code_of, write_weights
from steerfm.cli.config import FinetuneConfig
from steerfm.cli.console import console, print_table, quiet_lightning
from steerfm.cli.loading import plain, sequence
from steerfm.cli.parts import (
    build_judge,
    build_method,
    build_reward,
    check_needs,
    check_trainer,
    fitting,
    save_memory,
    schedule,
)
from steerfm.cli.prompts import read_prompts
from steerfm.cli.runs import FINISHED, commit, run_folder, slug, stem
from steerfm.cli.spread import on_processes
from steerfm.cost import Cost
from steerfm.distributed import outside, size
from steerfm.finetuning import METHOD, Distil, FineTuning, HyperNoise, LoRA, Refit, Tasks, chain, check
from steerfm.finetuning.base import check_weights
from steerfm.finetuning.evaluation import Monitor, Panel, Reading, control_cost
from steerfm.finetuning.module import check_shares
from steerfm.flowmap import FlowMap
from steerfm.held_out import IN_WORDS
from steerfm.metrics import semigroup_error
from steerfm.metrics.evaluator import KEYS, Evaluator
from steerfm.models.diffusers import pipeline_map, save_lora
from steerfm.models.lora import factors, merged
from steerfm.models.moved_noise import KEY, MovedNoise
from steerfm.processes import alone, first, of_first, sharded
from steerfm.randomness import derive
from steerfm.report.formats import short
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.report.plots import curves_plot, frontier_plot
from steerfm.report.run_folder import RunFolder
from steerfm.rewards import Reward, RewardError
from steerfm.spread import shared_out
from steerfm.training.sharding import STRATEGY, check_shardable, put, whole_weights
from steerfm.values import ConfigError

JUMPS = (1, 2, 4, 8)
COLUMNS = 6
"""Samples of each sampler in a picture."""
PER_PROMPT = 8
"""Fewest outputs per prompt in an evaluation, because diversity is measured within a prompt."""


def finetune(config: FinetuneConfig, command: str = "") -> None:
    """Fine-tune a flow map on a reward. The same command continues a killed run, on any number of processes."""
    check_trainer(config.trainer, "auto", "ddp", STRATEGY)
    on_processes(work, config, command)


def work(config: FinetuneConfig, command: str) -> None:
    """Run the command in one process. All processes train and evaluate, and the first one writes."""
    quiet_lightning()
    base = zoo.load(config.model)
    try:
        check_weights(base)
        base.head()  # the head of the file that this run will write
    except ValueError as error:
        raise ConfigError(f"model={config.model}: {error}") from None
    reward, method = build_reward(config.reward), build_method(config.method, METHOD)
    if (instead := fitting(config, method, base, usual)) is not None:
        config, method = replace(config, method=instead), build_method(instead, METHOD)
    if config.label is None and "labels" in reward.needs and base.class_names:
        config = replace(config, label="all")
        console.print(f"label=all: reward {reward.name!r} reads the class of each picture; choose one class with label=NAME")
    held_out = build_judge(config, base, reward)
    judge = held_out.judge
    tasks = make_tasks(base, config.label, config.prompt)
    check_needs((reward, judge), tasks.labels, tasks.prompts)
    check(method, reward, config.control, base)
    share_out(config, method, base)
    lora = LoRA(**asdict(config.lora)) if config.lora.rank else None
    if lora is not None:
        lora.targets(base.body)
    default = f"runs/finetune/{stem(config.model)}-{slug(config.method)}-{slug(config.reward)}"
    folder = of_first(lambda: run_folder(config, default))
    if of_first(folder.load_result) is not None:
        of_first(lambda: drop_checkpoints(folder))
        console.print(FINISHED.format(folder.path), markup=False)
        return
    if held_out.gap:
        console.print(held_out.gap, markup=False)
    panel = build_panel(base, reward, judge, config, config.watch.n)
    before = panel.measure(chain()(shared_out(base)))
    options = {"tasks": tasks, "batch_size": config.batch_size, "control": config.control, "lora": lora, "seed": config.seed}
    module = FineTuning(base, reward, method, **options, **schedule(config.optimizer))
    modules, monitors = (
        {"tune": module},
        {"tune": run(module, panel, before, folder.path / "tune", config, config.watch.patience)},
    )
    # Only a map with jumps between any two times needs distillation, or a network that only moves the noise.
    apart = can(base, "two_time") or (isinstance(method, HyperNoise) and can(base, "velocity"))
    if config.distil.steps and apart and not method.law_is_map:
        modules["distil"] = distillation(module, lora, reward, config)
        monitors["distil"] = run(modules["distil"], panel, before, folder.path / "distil", config, patience=0)
    outcome = examine(config, panel, before, modules, monitors)
    if first():
        with alone():
            finish(config, command, folder, outcome)


def share_out(config: FinetuneConfig, method: Any, base: FlowMap) -> None:
    """Check that the work can be split among the processes, and set up the savings of memory that the user asked for."""
    for rows, group in ((config.batch_size, method.group), *([(config.distil.batch_size, 1)] if config.distil.steps else [])):
        check_shares(rows, group, size())
    if config.trainer.activation_checkpoints:
        save_memory(base)
    if config.trainer.strategy == STRATEGY:
        check_shardable(base)


def usual(base: FlowMap) -> dict[str, Any]:
    """Return the default method for a map that cannot make all jumps: it tunes the chain of steps of the map's sampler."""
    if can(base, "endpoint") or can(base, "velocity"):
        return {"name": "draft_k", "jumps": base.steps}
    return {"name": "direct", "jumps": 1, "trained": None}


def run(module: FineTuning, panel: Panel, base: Reading, folder: Path, config: FinetuneConfig, patience: int) -> Monitor:
    """Start or continue one training, then restore the best weights."""
    w, t = config.watch, config.trainer
    every = w.every if patience else max(1, module.steps // 4)
    monitor = Monitor(panel, base, folder, every, w.floor, patience)
    try:
        training.fit(
            module, module.data(), folder, accelerator=t.accelerator, devices="1" if t.devices == "auto" else t.devices,
            num_nodes=t.num_nodes or (outside() or (1, 1))[1], strategy=t.strategy, precision=t.precision,
            clip=config.optimizer.clip, log_every=t.log_every, validate_every=0, save_every=t.save_every,
            progress=console.is_terminal, callbacks=[monitor], logger=t.logger, settings=plain(config),
        )  # fmt: skip
    except RewardError as error:
        checkpoint = folder / "checkpoints" / "last.ckpt"
        where = (
            f"the run so far is in {checkpoint}; the same command continues it" if checkpoint.is_file() else "nothing was run"
        )
        raise type(error)(f"step {module.global_step + 1}: {error}; {where}") from error
    monitor.restore(module)
    training.check_trained(module)
    if monitor.reason:
        console.print(monitor.reason)
    return monitor


def distillation(module: FineTuning, lora: LoRA | None, reward: Reward, config: FinetuneConfig) -> FineTuning:
    """Return the module that distils the tuned sampler into one flow map, from its velocity if it is one, else its samples."""
    d, apart = config.distil, lora is not None or sharded(module.network)
    base = zoo.load(config.model) if apart else module.maps[1]
    velocity = module.averaged() if module.method.law_is_velocity else None
    method = Distil(module.law(), d.samples, d.pools, Refit(d.trajectory), velocity)
    options: dict[str, Any] = schedule(config.optimizer) | {"lr": d.lr, "steps": d.steps, "decay": d.decay, "ema": d.ema}
    start = velocity if lora is None else None
    if start is not None and apart:
        start = zoo.load(config.model)
        put(start.body, whole_weights(module.ema.state_dict()))
    return FineTuning(
        base, reward, method, module.tasks, d.batch_size, scale=1.0, lora=lora, start=start,
        seed=derive(config.seed, "distil"), **options,
    )  # fmt: skip


@dataclass
class Outcome:
    """Result of a fine-tuning.

    Attributes:
        base: the base map.
        tuned: the tuned map, with its adapters merged.
        network: the tuned network, with its adapters apart.
        modules: modules of the stages "tune" and, if it was needed, "distil".
        monitors: monitors of the same stages.
        panel: the evaluation.
        readings: metrics by sampler.
        before: metrics of the base at its usual number of jumps.
        consistency: semigroup errors of "base" and "tuned".
        control: control cost.
    """

    base: FlowMap
    tuned: FlowMap
    network: nn.Module
    modules: dict[str, FineTuning]
    monitors: dict[str, Monitor]
    panel: Panel
    readings: dict[str, Reading]
    before: Reading
    consistency: dict[str, float]
    control: float

    @property
    def last(self) -> FineTuning:
        """The module whose map is the result."""
        return list(self.modules.values())[-1]

    @property
    def cost(self) -> Cost:
        """Cost of all stages."""
        first, *others = (module.spent for module in self.modules.values())
        return sum(others, first)


def examine(
    config: FinetuneConfig, panel: Panel, before: Reading, modules: dict[str, FineTuning], monitors: dict[str, Monitor]
) -> Outcome:
    """Evaluate the base and the tuned map at several numbers of jumps, on new seeds if ``watch.report`` is set."""
    base, module, last = panel.base, modules["tune"], list(modules.values())[-1]
    if config.watch.report:
        fresh = build_panel(base, panel.reward, panel.judge, config, config.watch.report)
        panel = replace(fresh, seeds=panel.seeds + panel.tasks.n)
        before = panel.measure(chain()(shared_out(base)))
    averaged = entire(config, last)
    plain_weights = last.lora is None or pipeline_map(base) is not None  # a pipeline keeps its adapters apart
    tuned = averaged if plain_weights or sharded(averaged.body) else averaged.with_network(merged(averaged.body))
    eval_map = last.averaged() if sharded(last.network) else tuned
    if isinstance(module.method, HyperNoise) and last is module:
        tuned, eval_map = (module.method.whole(each, base, config.model) for each in (tuned, eval_map))
    tuned.body.requires_grad_(False)
    own, flow, jumpy = base.steps, can(base, "two_time"), can(tuned, "two_time")
    frozen, eval_map = shared_out(base), shared_out(eval_map)
    readings = {
        f"base, {in_steps(base, jumps)}": panel.measure(chain(jumps)(frozen)) for jumps in ((1,) if flow and own > 1 else ())
    }
    readings[f"base, {in_steps(base, own)}"] = before
    for jumps in sorted({1, own} if flow else {own}):
        readings[f"base, {in_steps(base, jumps)}, best of 16"] = panel.measure(chain(jumps)(frozen), 16)
    if not module.method.law_is_map:
        readings["as learnt"] = panel.measure(module.law())
    counts = sorted({*JUMPS, own}) if jumpy else [tuned.steps]
    readings |= {f"tuned, {in_steps(tuned, jumps)}": panel.measure(chain(jumps)(eval_map)) for jumps in counts}
    tasks, pair = panel.tasks, (("base", frozen), ("tuned", eval_map)) if jumpy else ()
    consistency = {name: semigroup_error(m, tasks.n, tasks.cond) for name, m in pair}
    control = control_cost(eval_map, frozen, tasks)
    return Outcome(base, tuned, averaged.body, modules, monitors, panel, readings, before, consistency, control)


def entire(config: FinetuneConfig, last: FineTuning) -> FlowMap:
    """Return the averaged map with whole weights. If they are sharded, only the first process gets them, in a new map."""
    if not sharded(last.network):
        return last.averaged()
    weights = whole_weights(last.ema.state_dict())
    if not first():
        return last.averaged()
    flow_map = zoo.load(config.model)
    if last.lora is not None:
        last.lora.inject(flow_map.body)
    put(flow_map.body, weights)
    return flow_map


def finish(config: FinetuneConfig, command: str, folder: RunFolder, run: Outcome) -> None:
    """Export the map, write the report, and print the result."""
    model = folder.path / f"{stem(config.model)}-tuned.safetensors"
    card = {key: run.base.card[key] for key in KEYS if key in run.base.card} | {
        "samples": f"its own, of {registry.split_spec(config.model, 'model')[0]}", "recipe": plain(config), "command": command,
        "commit": commit(), "metrics": run.readings[f"tuned, {in_steps(run.tuned, run.tuned.steps)}"].numbers(),
        "licence": run.base.card.get("licence", ""),
    }  # fmt: skip
    if run.last.lora is not None and pipeline_map(run.tuned) is not None:
        model = save_lora(run.tuned, folder.path / "adapter")
        head = {"kind": "adapter", "base": config.model, "card": card, **moves_noise(run.tuned)}
        files.write(model.with_suffix(".json"), json.dumps(head, indent=2) + "\n")
    else:
        run.tuned.save(model, card=card, origin=config.model)
        if run.last.lora is not None:
            save_adapter(run, folder.path / "adapter", config.model)
    for name, monitor in run.monitors.items():
        for row in monitor.rows:
            folder.log(stage=name, **row, once=("stage", "step"))
    judge_note = f"; held out: {run.panel.judge.name}" if run.panel.judge else "; no held-out reward"
    title = f"{stem(config.model)} fine-tuned for {run.panel.reward.name} by {slug(config.method)}{judge_note}"
    header, table = _table(run)
    method = registry.split_spec(config.method, "method")[0]
    pictures = draw_pictures(folder.path, run.readings, run.monitors, method)
    facts = _facts(run)
    tables = [(MEASURES, header, [(_by(name, method), *row) for name, *row in table])]
    report(folder, title, {"command": command} | facts, tables, pictures)
    folder.save_result({"command": command} | summary(run))
    drop_checkpoints(folder)
    print_table(header, [[str(value) for value in row] for row in table], title)
    console.print(", ".join(f"{key} {short(value)}" for key, value in facts.items()))
    if run.consistency and run.consistency["tuned"] > 1.5 * run.consistency["base"]:
        cure = "sample it in as many jumps as it was tuned for"
        if "distil" in run.modules:
            cure = "distil for longer, with a larger distil.steps="
        console.print(f"the tuned map's semigroup error is more than 1.5 times the base's: {cure}")
    outcome = "no checkpoint was better than the base: the base is kept" if run.monitors["tune"].kept_base else "the tuned map"
    console.print(f"{outcome}: steerfm sample model={model}; report.html and numbers in {folder.path}", markup=False)


def _reason(run: Outcome) -> str:
    return run.monitors["tune"].reason or "ran to its last step"


def _table(run: Outcome) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the header and rows of the table, one row per sampler."""
    rows = []
    for name, reading in run.readings.items():
        mean, half = reading.over(run.before)
        over = "" if reading is run.before else f"{mean:+.3f}±{half:.3f}"
        rows.append((name, *(round(value, 4) for value in reading.numbers().values()), over))
    names = [name.replace("_", " ") for name in run.before.numbers()]
    return ["", *names, f"{run.panel.counts.replace('_', ' ')}, over base in {in_steps(run.base, run.base.steps)}"], rows


def _facts(run: Outcome) -> dict[str, Any]:
    """Return the facts above the table."""
    return {
        "the run": _reason(run),
        **({"semigroup error": "{tuned:.4f} (base {base:.4f})".format(**run.consistency)} if run.consistency else {}),
        "control cost": run.control,
        "reward calls": run.modules["tune"].spent.reward_calls,
        "network evaluations": run.cost.evaluations,
        "seconds": run.cost.seconds,
    }


def summary(run: Outcome) -> dict[str, Any]:
    """Return the content of result.json."""
    readings = {}
    for name, reading in run.readings.items():
        mean, half = reading.over(run.before)
        readings[name] = reading.numbers() | {"over_base": mean, "over_base_half": half}
    parameters = list(run.last.network.parameters())
    cost = {name: run.modules[name].spent.as_dict() if name in run.modules else None for name in ("tune", "distil")}
    return {
        "stopped": _reason(run),
        "kept_step": run.monitors["tune"].best_step,
        "readings": readings,
        "semigroup_error": run.consistency,
        "control_cost": run.control,
        "cost": cost,
        "scale": run.modules["tune"].scale,
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
    }


def drop_checkpoints(folder: RunFolder) -> None:
    """Delete the checkpoints, which only a killed run needs; the averaged weights of every evaluation stay."""
    for name in ("tune", "distil"):
        shutil.rmtree(folder.path / name / "checkpoints", ignore_errors=True)


MEASURES = (
    "means on the same seeds; diversity: mean distance between samples of a class, relative to the base's; support: share of "
    "the samples within the base's support; distance: Fréchet distance to the base's samples"
)


def _by(name: str, method: str) -> str:
    """Insert the method into the name of a sampler or stage, which then has the method's colour in plots."""
    return f"{name} ({method})" if "," not in name and name != "base" else name.replace("tuned", f"tuned ({method})")


def draw_pictures(
    folder: Path, readings: dict[str, Reading], monitors: dict[str, Monitor], method: str
) -> list[tuple[str, Path]]:
    """Draw the frontier, the curves, the samples of all samplers, and samples over training.

    Returns:
        (caption, path) of each picture.
    """
    figures = []
    counts = monitors["tune"].panel.counts
    paths = {_by(name, method): [(row["distance"], row[counts]) for row in monitor.rows] for name, monitor in monitors.items()}
    points = {_by(name, method): (reading.distance, reading.counts) for name, reading in readings.items()}
    what = IN_WORDS[counts]
    frontier = frontier_plot(points, paths, folder / "frontier.png", "Fréchet distance to the base's samples", what)
    figures.append((f"{what} against distance: up is better, left is nearer to the base", frontier))
    if next(iter(readings.values())).pictures.ndim == 4:
        rows_by_name = {name: readings[name].pictures[:COLUMNS] for name in readings}
        grid = picture_grid(torch.stack(list(rows_by_name.values())), folder / "grid.png", list(rows_by_name))
        figures.append(("one row per sampler, with the same seeds and tasks", grid))
        files = sorted((folder / "tune" / "samples").glob("*.safetensors"))
        some = files[:: -(-len(files) // 8)]
        rows_by_name = {f"step {int(file.stem)}": load_file(file)["pictures"][:COLUMNS].float() for file in some}
        path = picture_grid(torch.stack(list(rows_by_name.values())), folder / "training.png", list(rows_by_name))
        figures.append(("over training, with the same seeds and tasks in every row", path))
    for name, monitor in monitors.items():
        rows = monitor.rows
        columns = {key: ([r["step"] for r in rows], [r[key] for r in rows]) for key in rows[0] if key not in ("step", "kept")}
        history = {key: pair for key, pair in training.history(folder / name).items() if key.startswith("train/")}
        columns |= {key: pair for key, pair in history.items() if key.removeprefix("train/") not in rows[0]}
        columns |= {"train/reward": history["train/reward"]} if "train/reward" in history else {}
        path = curves_plot(columns, folder / f"curves-{name}.png")
        figures.append((f"{name}: all logged numbers, of training batches where marked, else of the evaluation seeds", path))
    return figures


def save_adapter(run: Outcome, path: Path, model: Any) -> None:
    """Save only the adapters; `steerfm.load` adds them to their base."""
    head, code = (
        {"kind": "adapter", "base": model, **moves_noise(run.tuned)},
        code_of({"name": registry.split_spec(model, "model")[0]}),
    )
    write_weights(factors(run.network), path, head | ({"code": code} if code else {}))


def moves_noise(tuned: FlowMap) -> dict[str, Any]:
    """Return the entry that marks a file of adapters as a network that moves the noise."""
    return {KEY: tuned.jumps} if isinstance(tuned, MovedNoise) else {}


def make_tasks(base: FlowMap, label: Any, prompt: Any, n: int | None = None) -> Tasks:
    """Build the tasks of a model: one class, several, all, or none; or prompts.

    Args:
        base: the model.
        label: a class, a list of classes, "all", or None.
        prompt: prompts, as for `read_prompts`.
        n: number of rows, which take the tasks in turn. Only the first n / `PER_PROMPT` prompts are used. None for one row per
            task.

    Raises:
        ConfigError: a text-conditional model got a label, or another model several prompts.
    """
    texts = read_prompts(prompt)
    takes_text = isinstance(base.null, Mapping)
    if takes_text:
        if label is not None:
            raise ConfigError(f"label={label}: this model takes a prompt: prompt={label!r}")
        tasks = Tasks.of(base.condition(texts, len(texts)), texts) if texts else Tasks.of(None)
    elif len(texts) > 1:
        raise ConfigError(f"{len(texts)} prompts, but the model takes none: give one prompt, for the reward")
    elif label is None:
        tasks = Tasks.of(None, texts or None)
    else:
        labels: Sequence[Any] = range(len(base.class_names)) if label == "all" else sequence(label)
        tasks = Tasks.of(base.condition([str(item) for item in labels], len(labels)), texts * len(labels) or None)
    if n is None:
        return tasks
    most = max(1, n // PER_PROMPT) if takes_text else tasks.n
    return tasks[torch.arange(n) % min(tasks.n, most)]


def build_panel(base: FlowMap, reward: Reward, judge: Reward | None, config: FinetuneConfig, n: int) -> Panel:
    """Build the evaluation on n samples of a model, in the feature space that its card names."""
    tasks = make_tasks(base, config.label, config.prompt, n)
    least, each = (300, 50) if config.watch.base is None else (config.watch.base, 4)
    support = tasks[torch.arange(max(least, n)) % n]
    if base.class_names:
        support = make_tasks(base, "all", config.prompt, max(least, each * len(base.class_names)))
    space = Evaluator(base, "cpu").watch
    classes = space.classes if space.logits else None
    return Panel(base, reward, judge, tasks, support, space.features, classes, config.watch.seeds)
