"""`steerfm train`: train a network, and write its weights, card and curves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfm import encoders, files, plugins, registry, rewards, zoo
from steerfm.checkpoints import NETWORK_KIND, build_network, load_into, read_weights, save_weights
from steerfm.cli.config import TrainConfig
from steerfm.cli.console import console
from steerfm.cli.loading import config_yaml, load, plain, recipes
from steerfm.cli.parts import check_trainer, data_words, make_data, schedule
from steerfm.cli.runs import commit, inputs
from steerfm.flowmap import Guided, NeuralFlowMap
from steerfm.metrics import feature_statistics, jump_error, texture
from steerfm.metrics.evaluator import Specified
from steerfm.metrics.spaces import FEATURES
from steerfm.networks import NETWORKS, UNet, fit_posterior
from steerfm.randomness import derive, global_stream, stream
from steerfm.report.card import model_card
from steerfm.report.plots import curves_plot
from steerfm.report.run_folder import ANEW, changed_inputs
from steerfm.sampling import sample as draw
from steerfm.trust import nearest
from steerfm.values import ConfigError


def train(config: TrainConfig, command: str = "") -> None:
    """Train a flow map, a classifier or an image-text model.

    The same command continues a killed run, and may raise ``optimizer.steps``.
    """
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
    curves_text = f", curves in {folder / 'curves.png'}" if curves else "; too short for a log"
    console.print(f"trained {config.name}: {weights} and its .json{curves_text}", markup=False)


def _metrics(config: TrainConfig, data: Any, module: Any, trainer: Any) -> dict[str, float]:
    """Return the last validation metrics. For a flow map, add the error of one jump, which methods read from its card."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.task == "flow_map":
        from steerfm import training

        flow_map = module.averaged()
        metrics["jump error"] = jump_error(flow_map, *training.grid_rows(module, flow_map, data.asked))
    return metrics


def load_data(config: TrainConfig) -> Any:
    """Load the training data, and check all files that the training reads.

    Raises:
        ConfigError: there is no such data set, or files are missing. The message names all of them at once.
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
    _check_conditions(config, data)
    return data


def measured_with(config: TrainConfig, data: Any) -> dict[str, Any]:
    """Return the entries of the model's card for its data, features and judge.

    Features and judge may be left out if the shipped model of the same data names them.
    """
    if not isinstance(data, Specified):
        spec = {"features": config.features or [], "judge": config.judge}
        return {"data": config.data.name} | {key: value for key, value in spec.items() if value}
    return {"data": data.spec(), "features": config.features or [], "judge": config.judge}


def _check_conditions(config: TrainConfig, data: Any) -> None:
    """Check that the data have the classes or captions that the task needs.

    Raises:
        ConfigError: they do not. The message names the key.
    """
    if config.task != "flow_map" and (config.features or config.judge):
        raise ConfigError(f"features= and judge= measure a flow map, not a {config.task}: leave them out")
    labels, name = data.batch(0)[1], config.data.name
    captions = not isinstance(labels, Tensor) and any(labels)
    if config.task == "classifier" and not data.class_names:
        raise ConfigError(f"task=classifier: data {name!r} has no classes: put each class in a folder of its own")
    if config.task == "contrastive" and not captions:
        raise ConfigError(f"task=contrastive: data {name!r} has no captions")
    if config.task == "flow_map" and config.text is not None and not captions:
        has = "has classes: leave out text=" if data.class_names else "has no captions: leave out text=, or write captions"
        raise ConfigError(f"text={config.text}: data {name!r} {has}")
    if config.task == "flow_map" and config.text is None and captions:
        encoder_names = ", ".join(f"text={encoder_names}" for encoder_names in [*encoders.text_encoders(), *encoders.shipped()])
        raise ConfigError(f"data {name!r} has captions: choose their encoder with {encoder_names}")


def _save(
    config: TrainConfig, folder: Path, module: Any, architecture: dict[str, Any], data: Any, card: dict[str, Any]
) -> Path:
    """Write the averaged weights, the files that belong to them, and the card; return the file of the weights."""
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
    readable = {key: none[key] if key in none and not value else value for key, value in card.items()}
    files.write(folder / "README.md", model_card(config.name, readable))
    return weights


def _check_files(config: TrainConfig) -> None:
    """Raise FileNotFoundError if a model that the training reads is missing."""
    keys = {"init": config.init, "objective.teacher": config.objective.teacher, "network.text": config.network.get("text")}
    for name in config.features or ():
        if registry.is_code(name):
            registry.find(name, FEATURES)
        elif not zoo.find(name).with_suffix(".json").is_file():
            raise FileNotFoundError(
                f"features: no file {name}: train a classifier of the same data: steerfm train task=classifier"
            )
    if config.judge is not None:
        rewards.find(registry.split_spec(config.judge, "judge")[0], "judge")
    for key, file in keys.items():
        if not isinstance(file, str) or Path(file).exists():
            continue
        if (stage := Path(file).parent.name) in recipes("train"):
            raise FileNotFoundError(f"{key}: no file {file}: make it with 'steerfm train --config {stage}'")
        if config.task == "flow_map" and not zoo.find(file).is_file():
            raise FileNotFoundError(f"{key}: no file {file}: train it first, or start from a shipped model, {key}=fashion")


def training_module(config: TrainConfig, data: Any) -> tuple[Any, dict[str, Any]]:
    """Build the LightningModule of a task, and return it with the architecture of its network."""
    from steerfm import training
    from steerfm.training.objectives import FlowMatching

    o, options = config.objective, schedule(config.optimizer) | {"seed": config.seed}
    if config.task == "contrastive":
        return _contrastive(config, data, options)
    if config.task not in ("classifier", "flow_map"):
        raise ConfigError(f"unknown task {config.task!r}; tasks: flow_map, classifier, contrastive")
    text, class_names = None, _class_names(config, data)
    condition = {"classes": len(class_names)} if class_names or not _is_own(config) else {}
    if config.text is not None:
        text = encoders.TextEncoder.of(config.text)
        condition = {"text": text.width}
    architecture = {**config.network, **_of_pictures(config, data.shape), **condition}
    if not _is_own(config):
        check_network(config, architecture, data.shape)
    network = build_network(architecture)
    if config.task == "classifier":
        return training.ClassifierTraining(network, smoothing=o.smoothing, noise=o.noise, **options), architecture
    check_shares(config, network)
    if config.init:
        weights = read_weights(zoo.find(config.init), "flow_map")[1]
        load_into(network, fit_posterior(network, weights), config.init)
    pixels = data.train[0].float().div_(127.5).sub_(1)  # in place: four bytes a channel, once
    flow_map = NeuralFlowMap(
        network, data.shape, class_names=class_names, mean=pixels.mean().item(), std=pixels.std().item(), text=text
    )
    diagonal = FlowMatching(guidance=o.guidance, null=flow_map.null)
    module = training.FlowMapTraining(
        flow_map, off_diagonal(config, data.shape), diagonal, start=o.start, null=flow_map.null, drop=o.drop, **options
    )  # fmt: skip
    return module, architecture


BY_TEACHER = ("trajectory", "posterior", "posterior_trajectory")
"""Objectives that take a frozen velocity."""


def check_shares(config: TrainConfig, network: nn.Module) -> None:
    """Refuse objectives that there are not, or that the network cannot learn by, and settings that do not fit them."""
    from steerfm.training.objectives import OFF_DIAGONAL

    shares = config.objective.shares
    for name in shares:
        if name not in OFF_DIAGONAL:
            raise ConfigError(f"unknown objective {name!r}{nearest(name, OFF_DIAGONAL)}; objectives: {', '.join(OFF_DIAGONAL)}")
        if name.startswith("posterior") and not getattr(network, "posterior", False):
            raise ConfigError(f"the objective {name} trains a network that is given a state: network.posterior=true")
    if 0 < config.objective.keep < config.data.batch_size:
        raise ConfigError(f"objective.keep={config.objective.keep}: at least data.batch_size={config.data.batch_size}, or 0")
    if config.objective.terminal + config.objective.full > 1:
        o = config.objective
        raise ConfigError(f"objective.terminal={o.terminal:g}, objective.full={o.full:g}: shares, at most 1 together")
    if config.objective.teacher and not {*BY_TEACHER} & shares.keys():
        raise ConfigError(f"objective.teacher is only used by the objectives {', '.join(BY_TEACHER)}: give one a share")


def off_diagonal(config: TrainConfig, shape: Sequence[int]) -> dict[Any, float]:
    """Build the off-diagonal objectives, with their shares, for data of a shape."""
    from steerfm.training.objectives import OFF_DIAGONAL, Posterior, PosteriorTrajectory, Trajectory, Triangle

    o, teacher = config.objective, None
    if o.teacher:
        teacher = zoo.load(o.teacher)
        if tuple(teacher.shape) != tuple(shape):
            sizes = (" x ".join(map(str, sides)) for sides in (teacher.shape, shape))
            raise ConfigError("objective.teacher={}: it makes {}, and the data are {}".format(o.teacher, *sizes))
        teacher = teacher if o.guidance == 1 else Guided(teacher, o.guidance)
    pairs = Triangle(o.terminal, o.full, o.gap)
    pool: dict[str, Any] = {"uses": o.uses, "diagonal": o.diagonal, "teacher": teacher, "keep": o.keep}
    by_teacher = {
        "trajectory": Trajectory(pairs, **pool),
        "posterior": Posterior(pairs, teacher=teacher),
        "posterior_trajectory": PosteriorTrajectory(pairs, **pool),
    }
    shares = o.shares or {"lagrangian": 0.25}
    return {by_teacher.get(name) or OFF_DIAGONAL[name](pairs): share for name, share in shares.items()}


def _is_own(config: TrainConfig) -> bool:
    """Whether the network is the user's own code."""
    return registry.is_code(str(config.network.get("name")))


def _parameters(config: TrainConfig) -> Mapping[str, Any]:
    """Return the parameters of the network's constructor, by name."""
    name = str(config.network.get("name"))
    kind = registry.find(name, NETWORK_KIND) if _is_own(config) else NETWORKS.get(name)
    return {} if kind is None else signature(kind).parameters


def _class_names(config: TrainConfig, data: Any) -> Sequence[str]:
    """Return the classes that condition the network: those of the data, unless the user's own network takes none."""
    if not _is_own(config):
        return data.class_names
    parameters = _parameters(config)
    if data.class_names and "classes" not in parameters and config.text is None:
        console.print(f"{config.network['name']} has no argument classes=, so it is trained without classes", markup=False)
    return data.class_names if "classes" in parameters else ()


def _of_pictures(config: TrainConfig, shape: Sequence[int]) -> dict[str, int]:
    """Return the network's arguments that follow from the data: channels and side, where it takes them."""
    sizes, parameters = {"channels": shape[0], "side": shape[-1]}, _parameters(config)
    return {key: size for key, size in sizes.items() if key in parameters and key not in config.network}


def check_network(config: TrainConfig, architecture: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Check, without allocating its weights, that a network of the library takes the pictures.

    Raises:
        ConfigError: it does not. The message names the key.
    """
    channels = architecture.get("channels", shape[0])
    if channels != shape[0]:
        raise ConfigError(f"network.channels={channels}: the pictures have {shape[0]}: give network.channels={shape[0]}")
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
    """Build the training of an open_clip model, or of a head on two frozen towers."""
    from steerfm import training

    architecture = {key: value for key, value in config.network.items() if key != "name"}
    o = config.objective
    options = options | {"noise": o.noise}
    if config.network.get("name") == "image_text_head":
        head = plugins.image_text_head()(**architecture)
        return training.ContrastiveTraining(head, list, encoders.Cached(head.features), **options), architecture
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= architecture.keys():
        raise ConfigError(
            "task=contrastive: give network open_clip's embed_dim, vision_cfg and text_cfg, or name: image_text_head"
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
    """Draw ``n`` pictures each in one, two and four jumps of a flow map, for captions of the data; returns (3 n, c, h, w)."""
    flow_map, generator, parts = zoo.load(model), stream(seed, "captions"), []
    for part, jumps in enumerate((1, 2, 4)):
        cond = flow_map.condition(data.captions(n, generator), n)
        seeds = [derive(seed, "training pictures", part, i) for i in range(n)]
        parts.append(flow_map.decode(draw(flow_map, n, jumps, seeds, cond, batch_size=200)))
    return torch.cat(parts)


def _preprocess_cfg(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's ``preprocess_cfg`` for pictures normalised as (255 x - 127) / 128."""
    size = architecture["vision_cfg"]["image_size"]
    return {
        "size": [size, size],
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _training_folder(config: TrainConfig, data: Any) -> Path:
    """Open the run folder. A continued run may change its schedule, but not its network, task or data.

    Raises:
        ConfigError: another process is writing the folder, or it holds a run of another network, task or data set, or a run
            whose input files have changed.
    """
    folder = Path(config.out or f"runs/train/{config.name}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another out=")
    folder.mkdir(parents=True, exist_ok=True)
    files.claim(folder)
    files.keep_list(folder)
    digest = data.digest() if isinstance(data, Specified) else hashlib.sha256(data.train[0].numpy()).hexdigest()
    inputs_now = inputs(config) | {f"data {config.data.name}": digest}
    difference = _another_training(config, folder, inputs_now)
    if config.force and (difference or (folder / "README.md").is_file()):  # README.md is written last
        files.clear(folder)
    elif difference:
        raise ConfigError(f"{folder}{difference}; {ANEW}")
    has_checkpoint = any((folder / "checkpoints").glob("*.ckpt"))
    if not has_checkpoint:  # the log of a run that failed before its first checkpoint
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    if not has_checkpoint or not (folder / "inputs.json").is_file():
        files.write(folder / "inputs.json", json.dumps(inputs_now, indent=1) + "\n")
    files.write(folder / "config.yaml", config_yaml(config))
    return folder


def _another_training(config: TrainConfig, folder: Path, inputs_now: Mapping[str, str]) -> str:
    """Return how the training in a folder differs from this one; empty if it does not."""
    file = folder / "config.yaml"
    if not any((folder / "checkpoints").glob("*.ckpt")):
        return ""
    if stale := changed_inputs(folder, inputs_now):
        return f": {', '.join(stale)}: edited since this run began"
    before = load(TrainConfig, str(file)) if file.is_file() and file.stat().st_size else config
    for key in ("task", "network", "data.name"):
        old, new = (plain(c)["data"]["name"] if key == "data.name" else getattr(c, key) for c in (before, config))
        if old != new:
            return f" holds a run with another {key} ({old})"
    return ""


def _statistics(network: Any, test: Tensor, train: Tensor, rows: int = 2000) -> dict[str, Tensor]:
    """Compute the file of `zoo.statistics`: statistics of a classifier's features on pictures (n, c, h, w) uint8."""
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
