"""`steerfm finetune`: from a typed configuration to a tuned map, a run folder and a report."""

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
"""Samples of a sampler that are drawn."""
PER_PROMPT = 8
"""Outputs of each prompt that a panel judges at least: diversity is that within a prompt."""


def finetune(config: FinetuneConfig, command: str = "") -> None:
    """Fine-tune a flow map towards a reward; the same command continues a killed run, on any number of processes."""
    check_trainer(config.trainer, "auto", "ddp", STRATEGY)
    on_processes(work, config, command)


def work(config: FinetuneConfig, command: str) -> None:
    """What one of the processes does: all tune and judge, and the first writes."""
    quiet_lightning()
    base = zoo.load(config.model)
    try:
        check_weights(base)
        base.head()  # of the file that is going to be written
    except ValueError as error:
        raise ConfigError(f"model={config.model}: {error}") from None
    reward, method = build_reward(config.reward), build_method(config.method, METHOD)
    if (instead := fitting(config, method, base, usual)) is not None:
        config, method = replace(config, method=instead), build_method(instead, METHOD)
    if config.label is None and "labels" in reward.needs and base.class_names:
        config = replace(config, label="all")
        console.print(f"label=all: reward {reward.name!r} reads the class of each picture; label=NAME for one")
    held = build_judge(config, base, reward)
    judge = held.judge
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
    if held.gap:
        console.print(held.gap, markup=False)
    panel = build_panel(base, reward, judge, config, config.watch.n)
    before = panel.measure(chain()(shared_out(base)))
    options = {"tasks": tasks, "batch_size": config.batch_size, "control": config.control, "lora": lora, "seed": config.seed}
    module = FineTuning(base, reward, method, **options, **schedule(config.optimizer))
    modules, monitors = (
        {"tune": module},
        {"tune": run(module, panel, before, folder.path / "tune", config, config.watch.patience)},
    )
    # a network without jumps between any two times is sampled as it was tuned, but for one that only moves the noise
    apart = can(base, "two_time") or (isinstance(method, HyperNoise) and can(base, "velocity"))
    if config.distil.steps and apart and not method.law_is_map:
        modules["distil"] = distilled(module, lora, reward, config)
        monitors["distil"] = run(modules["distil"], panel, before, folder.path / "distil", config, patience=0)
    outcome = examine(config, panel, before, modules, monitors)
    if first():
        with alone():
            finish(config, command, folder, outcome)


def share_out(config: FinetuneConfig, method: Any, base: FlowMap) -> None:
    """Refuse what cannot be shared out among the processes, before the work; and save memory where that is asked for."""
    for rows, group in ((config.batch_size, method.group), *([(config.distil.batch_size, 1)] if config.distil.steps else [])):
        check_shares(rows, group, size())
    if config.trainer.activation_checkpoints:
        save_memory(base)
    if config.trainer.strategy == STRATEGY:
        check_shardable(base)


def usual(base: FlowMap) -> dict[str, Any]:
    """The method where nobody names one, for a map that cannot make all jumps: the chain that it is sampled by is tuned."""
    if can(base, "endpoint") or can(base, "velocity"):
        return {"name": "draft_k", "jumps": base.steps}
    return {"name": "direct", "jumps": 1, "trained": None}


def run(module: FineTuning, panel: Panel, base: Reading, folder: Path, config: FinetuneConfig, patience: int) -> Monitor:
    """One training: continue or start it, then put the best weights back."""
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
        kept = folder / "checkpoints" / "last.ckpt"
        where = (
            f"the run up to there is kept in {kept}; the same command goes on from it" if kept.is_file() else "nothing was run"
        )
        raise type(error)(f"step {module.global_step + 1}: {error}; {where}") from error
    monitor.restore(module)
    training.check_trained(module)
    if monitor.reason:
        console.print(monitor.reason)
    return monitor


def distilled(module: FineTuning, lora: LoRA | None, reward: Reward, config: FinetuneConfig) -> FineTuning:
    """The module that fits one flow map to what was learnt: on its samples or, where that is a velocity, to the velocity."""
    d, apart = config.distil, lora is not None or sharded(module.network)
    base = zoo.load(config.model) if apart else module.maps[1]
    learnt = module.averaged() if module.method.law_is_velocity else None
    method = Distil(module.law(), d.samples, d.pools, Refit(d.trajectory), learnt)
    options: dict[str, Any] = schedule(config.optimizer) | {"lr": d.lr, "steps": d.steps, "decay": d.decay, "ema": d.ema}
    start = learnt if lora is None else None
    if start is not None and apart:
        start = zoo.load(config.model)
        put(start.body, whole_weights(module.ema.state_dict()))
    return FineTuning(
        base, reward, method, module.tasks, d.batch_size, scale=1.0, lora=lora, start=start,
        seed=derive(config.seed, "distil"), **options,
    )  # fmt: skip


@dataclass
class Outcome:
    """What a fine-tuning came to.

    Attributes:
        base, tuned: the maps; ``tuned`` is whole, adapters are merged into it.
        network: they are apart in it.
        modules, monitors: of the tuning, "tune", and of what made one flow map of it, "distil", where that was needed.
        panel: who judged.
        readings: by sampler.
        before: that of the base in its usual number of jumps.
        consistency: semigroup error of "base" and "tuned". moved: control cost.
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
    moved: float

    @property
    def last(self) -> FineTuning:
        """The module whose map is the result."""
        return list(self.modules.values())[-1]

    @property
    def spent(self) -> Cost:
        """The cost of all of it."""
        first, *others = (module.spent for module in self.modules.values())
        return sum(others, first)


def examine(
    config: FinetuneConfig, panel: Panel, before: Reading, modules: dict[str, FineTuning], monitors: dict[str, Monitor]
) -> Outcome:
    """Judge base and tuned map at several numbers of jumps, on seeds of their own where ``watch.report`` is set."""
    base, module, last = panel.base, modules["tune"], list(modules.values())[-1]
    if config.watch.report:
        fresh = build_panel(base, panel.reward, panel.judge, config, config.watch.report)
        panel = replace(fresh, seeds=panel.seeds + panel.tasks.n)
        before = panel.measure(chain()(shared_out(base)))
    averaged = entire(config, last)
    plain_weights = last.lora is None or pipeline_map(base) is not None  # adapters of a pipeline stay what they are
    tuned = averaged if plain_weights or sharded(averaged.body) else averaged.with_network(merged(averaged.body))
    learnt = last.averaged() if sharded(last.network) else tuned
    if isinstance(module.method, HyperNoise) and last is module:
        tuned, learnt = (module.method.whole(each, base, config.model) for each in (tuned, learnt))
    tuned.body.requires_grad_(False)
    own, flow, jumpy = base.steps, can(base, "two_time"), can(tuned, "two_time")
    frozen, learnt = shared_out(base), shared_out(learnt)
    readings = {
        f"base, {in_steps(base, jumps)}": panel.measure(chain(jumps)(frozen)) for jumps in ((1,) if flow and own > 1 else ())
    }
    readings[f"base, {in_steps(base, own)}"] = before
    for jumps in sorted({1, own} if flow else {own}):
        readings[f"base, {in_steps(base, jumps)}, best of 16"] = panel.measure(chain(jumps)(frozen), 16)
    if not module.method.law_is_map:
        readings["as learnt"] = panel.measure(module.law())
    counts = sorted({*JUMPS, own}) if jumpy else [tuned.steps]
    readings |= {f"tuned, {in_steps(tuned, jumps)}": panel.measure(chain(jumps)(learnt)) for jumps in counts}
    tasks, pair = panel.tasks, (("base", frozen), ("tuned", learnt)) if jumpy else ()
    consistency = {name: semigroup_error(m, tasks.n, tasks.cond) for name, m in pair}
    moved = control_cost(learnt, frozen, tasks)
    return Outcome(base, tuned, averaged.body, modules, monitors, panel, readings, before, consistency, moved)


def entire(config: FinetuneConfig, last: FineTuning) -> FlowMap:
    """The averaged map as files hold it: where weights are shared out, the first process gets them whole, in another map."""
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
    """Export the map, write the report, and say what came of it."""
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
    judged = f"; held out: {run.panel.judge.name}" if run.panel.judge else "; no held-out reward"
    title = f"{stem(config.model)} fine-tuned for {run.panel.reward.name} by {slug(config.method)}{judged}"
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
        console.print(
            "the tuned map's jumps disagree by more than 1.5 times what the base's do: fit it for longer, distil.steps=..."
        )
    outcome = "no checkpoint was better than the base: the base is kept" if run.monitors["tune"].kept_base else "the tuned map"
    console.print(f"{outcome}: steerfm sample model={model}; report.html and numbers in {folder.path}", markup=False)


def _stopped(run: Outcome) -> str:
    return run.monitors["tune"].reason or "ran to its last step"


def _table(run: Outcome) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(header, rows): a row a sampler."""
    rows = []
    for name, reading in run.readings.items():
        mean, half = reading.over(run.before)
        over = "" if reading is run.before else f"{mean:+.3f}±{half:.3f}"
        rows.append((name, *(round(value, 4) for value in reading.numbers().values()), over))
    names = [name.replace("_", " ") for name in run.before.numbers()]
    return ["", *names, f"{run.panel.counts.replace('_', ' ')}, over base in {in_steps(run.base, run.base.steps)}"], rows


def _facts(run: Outcome) -> dict[str, Any]:
    """What stands above the table."""
    return {
        "the run": _stopped(run),
        **({"semigroup error": "{tuned:.4f} (base {base:.4f})".format(**run.consistency)} if run.consistency else {}),
        "control cost": run.moved,
        "reward calls": run.modules["tune"].spent.reward_calls,
        "network evaluations": run.spent.evaluations,
        "seconds": run.spent.seconds,
    }


def summary(run: Outcome) -> dict[str, Any]:
    """The numbers of result.json."""
    readings = {}
    for name, reading in run.readings.items():
        mean, half = reading.over(run.before)
        readings[name] = reading.numbers() | {"over_base": mean, "over_base_half": half}
    parameters = list(run.last.network.parameters())
    cost = {name: run.modules[name].spent.as_dict() if name in run.modules else None for name in ("tune", "distil")}
    return {
        "stopped": _stopped(run),
        "kept_step": run.monitors["tune"].best_step,
        "readings": readings,
        "semigroup_error": run.consistency,
        "control_cost": run.moved,
        "cost": cost,
        "scale": run.modules["tune"].scale,
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
    }


def drop_checkpoints(folder: RunFolder) -> None:
    """Delete what only a killed run needs; the averaged weights of every judgement stay."""
    for name in ("tune", "distil"):
        shutil.rmtree(folder.path / name / "checkpoints", ignore_errors=True)


MEASURES = (
    "means on the same seeds; diversity: mean distance of two samples of a class, relative to the base's; support: share of "
    "the samples that lie among the base's; distance: Fréchet distance to the base's samples"
)


def _by(name: str, method: str) -> str:
    """The name of a reading or stage with the method in it, whose colour it then has in a plot."""
    return f"{name} ({method})" if "," not in name and name != "base" else name.replace("tuned", f"tuned ({method})")


def draw_pictures(
    folder: Path, readings: dict[str, Reading], monitors: dict[str, Monitor], method: str
) -> list[tuple[str, Path]]:
    """The frontier, the curves, samples before and after, and samples over training."""
    drawn = []
    counts = monitors["tune"].panel.counts
    paths = {_by(name, method): [(row["distance"], row[counts]) for row in monitor.rows] for name, monitor in monitors.items()}
    points = {_by(name, method): (reading.distance, reading.counts) for name, reading in readings.items()}
    what = IN_WORDS[counts]
    frontier = frontier_plot(points, paths, folder / "frontier.png", "Fréchet distance to the base's samples", what)
    drawn.append((f"{what} against distance: up is better, left is nearer to the base", frontier))
    if next(iter(readings.values())).pictures.ndim == 4:
        shown = {name: readings[name].pictures[:COLUMNS] for name in readings}
        grid = picture_grid(torch.stack(list(shown.values())), folder / "grid.png", list(shown))
        drawn.append(("a row a sampler, the same seeds and tasks in every row", grid))
        files = sorted((folder / "tune" / "samples").glob("*.safetensors"))
        some = files[:: -(-len(files) // 8)]
        shown = {f"step {int(file.stem)}": load_file(file)["pictures"][:COLUMNS].float() for file in some}
        path = picture_grid(torch.stack(list(shown.values())), folder / "training.png", list(shown))
        drawn.append(("over tuning, the same seeds and tasks in every row", path))
    for name, monitor in monitors.items():
        rows = monitor.rows
        columns = {key: ([r["step"] for r in rows], [r[key] for r in rows]) for key in rows[0] if key not in ("step", "kept")}
        logged = {key: pair for key, pair in training.history(folder / name).items() if key.startswith("train/")}
        columns |= {key: pair for key, pair in logged.items() if key.removeprefix("train/") not in rows[0]}
        columns |= {"train/reward": logged["train/reward"]} if "train/reward" in logged else {}
        path = curves_plot(columns, folder / f"curves-{name}.png")
        drawn.append((f"{name}: everything that was logged; of training batches where it says so, else on watched seeds", path))
    return drawn


def save_adapter(run: Outcome, path: Path, model: Any) -> None:
    """The adapters by themselves; `steerfm.load` puts them onto their base."""
    head, code = (
        {"kind": "adapter", "base": model, **moves_noise(run.tuned)},
        code_of({"name": registry.split_spec(model, "model")[0]}),
    )
    write_weights(factors(run.network), path, head | ({"code": code} if code else {}))


def moves_noise(tuned: FlowMap) -> dict[str, Any]:
    """What a file of adapters says where they move the noise, and are no weights of the map itself."""
    return {KEY: tuned.jumps} if isinstance(tuned, MovedNoise) else {}


def make_tasks(base: FlowMap, label: Any, prompt: Any, n: int | None = None) -> Tasks:
    """What the model is asked for: one class, several, all of them, or none; or prompts. ``n`` rows of it, in turn; of many
    prompts the first n / `PER_PROMPT`."""
    texts = read_prompts(prompt)
    worded = isinstance(base.null, Mapping)
    if worded:
        if label is not None:
            raise ConfigError(f"label={label}: this model is asked in words: prompt={label!r}")
        tasks = Tasks.of(base.condition(texts, len(texts)), texts) if texts else Tasks.of(None)
    elif len(texts) > 1:
        raise ConfigError(f"{len(texts)} prompts for a model that reads none: give one, for the reward")
    elif label is None:
        tasks = Tasks.of(None, texts or None)
    else:
        labels: Sequence[Any] = range(len(base.class_names)) if label == "all" else sequence(label)
        tasks = Tasks.of(base.condition([str(item) for item in labels], len(labels)), texts * len(labels) or None)
    if n is None:
        return tasks
    most = max(1, n // PER_PROMPT) if worded else tasks.n
    return tasks[torch.arange(n) % min(tasks.n, most)]


def build_panel(base: FlowMap, reward: Reward, judge: Reward | None, config: FinetuneConfig, n: int) -> Panel:
    """Judges of n samples of this model, in the space that its card names to watch it in."""
    tasks = make_tasks(base, config.label, config.prompt, n)
    least, each = (300, 50) if config.watch.base is None else (config.watch.base, 4)
    support = tasks[torch.arange(max(least, n)) % n]
    if base.class_names:
        support = make_tasks(base, "all", config.prompt, max(least, each * len(base.class_names)))
    space = Evaluator(base, "cpu").watch
    classes = space.classes if space.logits else None
    return Panel(base, reward, judge, tasks, support, space.features, classes, config.watch.seeds)
