"""The command line: ``steerfm train|sample|steer|evaluate|models|rewards``; each command is a few lines over the library."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steerfm import config as configs
from steerfm.config import ConfigError


def train(config: configs.TrainConfig) -> None:
    """Train a flow map or a classifier; the same command continues a killed run."""
    import torch

    from steerfm import training
    from steerfm.data import DATA
    from steerfm.flowmap import NeuralFlowMap, build_network
    from steerfm.objectives import OFF_DIAGONAL, Triangle

    torch.manual_seed(config.seed)  # initial weights; all later noise has its own generator
    folder = Path(config.out or f"runs/train/{config.name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configs.dump(config))
    data_class = DATA[config.data.name]
    data = data_class(config.data.batch_size, config.data.root, config.data.augment, config.seed)
    data.setup()
    classes = len(data.class_names)
    network = build_network({**config.network, "classes": classes})
    if torch.cuda.is_available() or config.network["name"] != "mlp":
        network = network.to(memory_format=torch.channels_last)
    o, t = config.objective, config.trainer
    options = {
        "lr": config.optimizer.lr,
        "betas": (config.optimizer.beta1, config.optimizer.beta2),
        "weight_decay": config.optimizer.weight_decay,
        "steps": config.optimizer.steps,
        "warmup": config.optimizer.warmup,
        "decay": config.optimizer.decay,
        "ema": config.optimizer.ema,
        "seed": config.seed,
    }
    if config.task == "classifier":
        module = training.ClassifierTraining(network, smoothing=o.smoothing, noise=o.noise, **options)
    else:
        pixels = data.train[0].float() / 127.5 - 1
        flow_map = NeuralFlowMap(
            network, data.shape, class_names=data.class_names, mean=pixels.mean().item(), std=pixels.std().item()
        )
        pairs = Triangle(o.terminal, o.full, o.gap)
        objectives = {OFF_DIAGONAL[name](pairs): share for name, share in o.shares.items()}
        module = training.FlowMapTraining(
            flow_map, objectives, start=o.start, null_label=classes, drop=o.drop, **options
        )
    trainer = training.fit(
        module, data, folder, t.accelerator, t.devices, t.strategy, t.precision, config.optimizer.clip,
        t.log_every, t.validate_every, t.sample_every, t.save_every, progress=sys.stdout.isatty(),
    )  # fmt: skip


COMMANDS = {"train": (train, configs.TrainConfig)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="steerfm")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    command, schema = COMMANDS[arguments.command]
    try:
        command(configs.load(schema, arguments.config, arguments.overrides))
    except (ConfigError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
