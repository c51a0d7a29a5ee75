"""`steerfm train`: from a typed configuration to a trained network, its card and its curves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm import encoders, files, plugins, registry, rewards, zoo
from steerfm.checkpoints import NETWORK_KIND, build_network, load_into, read_weights, save_weights
from steerfm.cli.config import TrainConfig
from steerfm.cli.console import console
from steerfm.cli.loading import kept, load, plain, recipes
from steerfm.cli.parts import check_trainer, data_words, make_data, schedule
from steerfm.cli.runs import commit, inputs
from steerfm.flowmap import Guided, NeuralFlowMap
from steerfm.metrics import feature_statistics, jump_error, texture
from steerfm.metrics.evaluator import Specified
from steerfm.metrics.spaces import FEATURES
from steerfm.networks import NETWORKS, UNet
from steerfm.randomness import derive, global_stream, stream
from steerfm.report.card import model_card
from steerfm.report.plots import curves_plot
from steerfm.report.run_folder import ANEW, changed_inputs
from steerfm.sampling import sample as draw
from steerfm.trust import nearest
from steerfm.values import ConfigError


def train(config: TrainConfig, command: str = "") -> None:
    """Train a flow map, a classifier or an image-text model; the same command continues a killed run, with more steps if
    asked."""
    from steerfm import training

    check_trainer(config.trainer, "auto", "ddp")
    data = load_data(config)
    with global_stream(config.seed, "weights"):
        module, architecture = training_module(config, data)
    module.network.to(memory_format=torch.channels_last)
    folder = _training_folder(config, data)
    t = config.trainer
    grids = [training.SampleGrid(folder / "samples", t.sample_every, data.asked)] if config.task == "flow_map" else []
    trainer = training.fit(
        module, data, folder, accelerator=t.accelerator, devices=t.devices, strategy=t.strategy, precision=t.precision,
        clip=config.optimizer.clip, log_every=t.log_every, validate_every=t.validate_every, save_every=t.save_every,
        progress=console.is_terminal, callbacks=grids, logger=t.logger, settings=plain(config),
    )  # fmt: skip
    training.check_trained(module)
    if not trainer.is_global_zero:
        return
    card = {
        **measured_with(config, data),
        "licence": data.licence,
        "recipe": plain(config),
        "command": command or "steerfm train",
        "commit": commit(),
        "metrics": {name: round(value, 5) for name, value in _metrics(config, data, module, trainer).items()},
    }
    weights = _save(config, folder, module, architecture, data, card)
    curves = training.history(folder)
    if curves:
        curves_plot(curves, folder / "curves.png")
    said = f", curves in {folder / 'curves.png'}" if curves else "; too short for a log"
    console.print(f"trained {config.name}: {weights} and its .json{said}", markup=False)


def _metrics(config: TrainConfig, data: Any, module: Any, trainer: Any) -> dict[str, float]:
    """What was measured last, and of a flow map how far one jump may be relied on, which methods read from its card."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.task == "flow_map":
        from steerfm import training

        flow_map = module.averaged()
        metrics["jump error"] = jump_error(flow_map, *training.grid_rows(module, flow_map, data.asked))
    return metrics


def load_data(config: TrainConfig) -> Any:
    """The data of a training, ready; with all that the training reads, so that all that is missing is named at once.

    Raises:
        ConfigError: no such data, or files that are missing.
    """
    data = make_data(config.data, config.seed)
    missing = []
    for check in (lambda: _check_files(config), data.setup):
        try:
            with data_words():
                check()
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise ConfigError("; ".join(missing))
    _check_asked(config, data)
    return data


def measured_with(config: TrainConfig, data: Any) -> dict[str, Any]:
    """What the card of a model says of its data and of what it is measured with; nothing of that where others know it: the
    shipped model of the same data does."""
    if not isinstance(data, Specified):
        named = {"features": config.features or [], "judge": config.judge}
        return {"data": config.data.name} | {key: value for key, value in named.items() if value}
    return {"data": data.spec(), "features": config.features or [], "judge": config.judge}


def _check_asked(config: TrainConfig, data: Any) -> None:
    """Refuse a task that has no use for what the data say of their pictures: classes, captions or nothing.

    Raises:
        ConfigError: naming the key.
    """
    if config.task != "flow_map" and (config.features or config.judge):
        raise ConfigError(f"features= and judge= are what a flow map is measured with, not a {config.task}")
    said, name = data.batch(0)[1], config.data.name
    captions = not isinstance(said, Tensor) and any(said)
    if config.task == "classifier" and not data.class_names:
        raise ConfigError(f"task=classifier: data {name!r} has no classes: it needs a folder for each class")
    if config.task == "contrastive" and not captions:
        raise ConfigError(f"task=contrastive: data {name!r} has no captions")
    if config.task == "flow_map" and config.text is not None and not captions:
        has = "has classes: leave text= away" if data.class_names else "has no captions: leave text= away, or write some"
        raise ConfigError(f"text={config.text}: data {name!r} {has}")
    if config.task == "flow_map" and config.text is None and captions:
        known = ", ".join(f"text={known}" for known in [*encoders.text_encoders(), *encoders.shipped()])
        raise ConfigError(f"data {name!r} has captions: text= names the encoder that reads them: {known}")


def _save(
    config: TrainConfig, folder: Path, module: Any, architecture: dict[str, Any], data: Any, card: dict[str, Any]
) -> Path:
    """Write the averaged weights, what belongs beside them, and the card; returns the file of the weights."""
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
        statistics = _statistics(module.ema, data.test[0], data.train[0][some])
        files.write_tensors(folder / f"{config.name}-statistics.safetensors", statistics)
    else:
        module.averaged().save(weights, architecture, card)
    none = {"features": "none: distances to the data are not measured", "judge": "none"}
    shown = {key: none[key] if key in none and not value else value for key, value in card.items()}
    files.write(folder / "README.md", model_card(config.name, shown))
    return weights


def _check_files(config: TrainConfig) -> None:
    """Raise FileNotFoundError where a model to start from is not there."""
    keys = {"init": config.init, "objective.teacher": config.objective.teacher, "network.text": config.network.get("text")}
    for name in config.features or ():
        if registry.is_code(name):
            registry.find(name, FEATURES)
        elif not zoo.find(name).with_suffix(".json").is_file():
            raise FileNotFoundError(
                f"features: no file {name}: a classifier of the same data is one: steerfm train task=classifier"
            )
    if config.judge is not None:
        rewards.find(registry.split_spec(config.judge, "judge")[0], "judge")
    for key, file in keys.items():
        if not isinstance(file, str) or Path(file).exists():
            continue
        if (stage := Path(file).parent.name) in recipes("train"):
            raise FileNotFoundError(f"{key}: no file {file}: 'steerfm train --config {stage}' makes it")
        if config.task == "flow_map" and not zoo.find(file).is_file():
            raise FileNotFoundError(f"{key}: no file {file}: train it first, or start from a shipped model, {key}=fashion")


def training_module(config: TrainConfig, data: Any) -> tuple[Any, dict[str, Any]]:
    """The LightningModule of a task and the architecture of its network, from its configuration."""
    from steerfm import training
    from steerfm.training.objectives import OFF_DIAGONAL, FlowMatching, Trajectory, Triangle

    o, options = config.objective, schedule(config.optimizer) | {"seed": config.seed}
    if config.task == "contrastive":
        return _contrastive(config, data, options)
    if config.task not in ("classifier", "flow_map"):
        raise ConfigError(f"unknown task {config.task!r}; tasks: flow_map, classifier, contrastive")
    text, class_names = None, _told(config, data)
    asked = {"classes": len(class_names)} if class_names or not _own(config) else {}
    if config.text is not None:
        text = encoders.TextEncoder.of(config.text)
        asked = {"text": text.width}
    architecture = {**config.network, **_of_pictures(config, data.shape), **asked}
    if not _own(config):
        check_network(config, architecture, data.shape)
    network = build_network(architecture)
    if config.task == "classifier":
        return training.ClassifierTraining(network, smoothing=o.smoothing, noise=o.noise, **options), architecture
    shares = o.shares or {"lagrangian": 0.25}
    for name in shares:
        if name not in OFF_DIAGONAL:
            raise ConfigError(f"unknown objective {name!r}{nearest(name, OFF_DIAGONAL)}; objectives: {', '.join(OFF_DIAGONAL)}")
    if config.init:
        load_into(network, read_weights(zoo.find(config.init), "flow_map")[1], config.init)
    pixels = data.train[0].float().div_(127.5).sub_(1)  # in place: four bytes a channel, once
    flow_map = NeuralFlowMap(
        network, data.shape, class_names=class_names, mean=pixels.mean().item(), std=pixels.std().item(), text=text
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


def _own(config: TrainConfig) -> bool:
    """Whether the network is code of one's own."""
    return registry.is_code(str(config.network.get("name")))


def _taken(config: TrainConfig) -> Mapping[str, Any]:
    """The arguments that the network takes, by name."""
    name = str(config.network.get("name"))
    kind = registry.find(name, NETWORK_KIND) if _own(config) else NETWORKS.get(name)
    return {} if kind is None else signature(kind).parameters


def _told(config: TrainConfig, data: Any) -> Sequence[str]:
    """The classes that the network is told: those of the data, unless it is one's own and takes none."""
    if not _own(config):
        return data.class_names
    taken = _taken(config)
    if data.class_names and "classes" not in taken and config.text is None:
        console.print(f"{config.network['name']} takes no classes=, their number: it is trained without them", markup=False)
    return data.class_names if "classes" in taken else ()


def _of_pictures(config: TrainConfig, shape: Sequence[int]) -> dict[str, int]:
    """What the network has to know of its pictures, which a configuration need not say."""
    known, taken = {"channels": shape[0], "side": shape[-1]}, _taken(config)
    return {key: size for key, size in known.items() if key in taken and key not in config.network}


def check_network(config: TrainConfig, architecture: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Refuse a network of ours that cannot take the pictures, before it has any memory.

    Raises:
        ConfigError: naming the key.
    """
    channels = architecture.get("channels", shape[0])
    if channels != shape[0]:
        raise ConfigError(f"network.channels={channels}: the pictures have {shape[0]}: network.channels={shape[0]}")
    with torch.device("meta"):
        plan = build_network(architecture).to("meta")
        x, t = torch.empty(2, *shape), torch.empty(2)
        try:
            plan(x) if config.task == "classifier" else plan(x, t, t, None)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            fix = "take fewer network.widths"
            if isinstance(plan, UNet) and config.data.name == plugins.FOLDER.name:
                sides = [max(1, round(side / plan.factor)) * plan.factor for side in shape[1:]]
                fix = f"data.size={sides[0] if sides[0] == sides[1] else sides}, or {fix}"
            raise ConfigError(f"the network takes no pictures of shape {list(shape)} ({reason}): {fix}") from None


def _contrastive(config: TrainConfig, data: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The training of an open_clip model, or of a head between two frozen towers."""
    from steerfm import training

    architecture = {key: value for key, value in config.network.items() if key != "name"}
    o = config.objective
    options = options | {"noise": o.noise}
    if config.network.get("name") == "image_text_head":
        head = plugins.image_text_head()(**architecture)
        return training.ContrastiveTraining(head, list, encoders.Cached(head.features), **options), architecture
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
    teacher = encoders.Cached(zoo.load_image_text_head(o.teacher).encode_image)
    samples = _captioned_samples(o.samples, data, config.seed) if o.samples else None
    return training.RobustTraining(network, words, prepare, teacher, o.radius, samples, **options), architecture


def _captioned_samples(model: str, data: Any, seed: int, n: int = 1200) -> Tensor:
    """``n`` pictures (3 n, c, h, w) each in one, two and four jumps of a flow map, asked for captions of the data."""
    flow_map, generator, parts = zoo.load(model), stream(seed, "captions"), []
    for part, jumps in enumerate((1, 2, 4)):
        cond = flow_map.condition(data.captions(n, generator), n)
        seeds = [derive(seed, "training pictures", part, i) for i in range(n)]
        parts.append(flow_map.decode(draw(flow_map, n, jumps, seeds, cond, batch_size=200)))
    return torch.cat(parts)


def _preprocess_cfg(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` of a model that is trained here: pictures as (255 x - 127) / 128."""
    size = architecture["vision_cfg"]["image_size"]
    return {
        "size": [size, size],
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _training_folder(config: TrainConfig, data: Any) -> Path:
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
    digest = data.digest() if isinstance(data, Specified) else hashlib.sha256(data.train[0].numpy()).hexdigest()
    told = inputs(config) | {f"data {config.data.name}": digest}
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
    files.write(folder / "config.yaml", kept(config))
    return folder


def _another_training(config: TrainConfig, folder: Path, told: Mapping[str, str]) -> str:
    """In what a folder holds another training; nothing where it does not."""
    file = folder / "config.yaml"
    if not any((folder / "checkpoints").glob("*.ckpt")):
        return ""
    if changed := changed_inputs(folder, told):
        return f": {', '.join(changed)}: edited since this run began"
    before = load(TrainConfig, str(file)) if file.is_file() and file.stat().st_size else config
    for key in ("task", "network", "data.name"):
        old, new = (plain(c)["data"]["name"] if key == "data.name" else getattr(c, key) for c in (before, config))
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
