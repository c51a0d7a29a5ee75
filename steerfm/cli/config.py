"""Schemas of the configurations, one per command: each key has a doc, a type and a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from steerfm.values import (
    Range,
    Words,
    choice,
    count,
    finite,
    natural,
    option,
    positive,
    ranged,
    section,
    seed_field,
    share,
)


@dataclass
class DataConfig:
    """Training data."""

    name: str = option("fashion", "data set, as for steerfm data")
    batch_size: int = count(128, "picture", "pictures per step")
    root: str | None = option(None, "data folder; null for the default one")
    augment: int = natural(0, "largest random shift of a picture, in pixels")
    size: int | list[int] | None = ranged(
        None, "emoji, folder: side of the pictures in pixels; folder: also [height, width]; null for 32", least=1
    )
    channels: int | None = ranged(
        None, "folder: 1 for grey, 3 for colour; null keeps the pictures as they are, if all are alike", least=1, most=3
    )
    fit: str | None = option(None, "folder: crop takes the middle of a picture, pad adds a white border; null for crop")
    flip: bool | None = option(None, "folder: mirror half of the pictures of each batch; null for false")
    held_out: float | None = ranged(
        None, "folder: share of the pictures held out from training, split by content; null for 0.1", above=0, below=1
    )
    licence: str | None = option(None, "folder: licence of the pictures, for the model's card")


@dataclass
class ObjectiveConfig:
    """Losses."""

    shares: dict[str, float] = option(
        {}, "share of the batch for each off-diagonal objective (trajectory, posterior, posterior_trajectory, lagrangian, "
        "progressive, eulerian, meanflow), the rest is flow matching; {} is {lagrangian: 0.25}",
        range=Range(least=0, most=1),
    )  # fmt: skip
    start: float = share(0.1, "share of the steps, at the start, that use flow matching only")
    terminal: float = share(0.2, "share of the time pairs (s, t) with t = 1, the look-aheads")
    full: float = share(0.1, "share of the time pairs that are (0, 1)")
    gap: float = ranged(1.0, "largest t - s of the other time pairs", above=0, most=1)
    diagonal: float = share(0.3, "trajectories: share of their pairs with t < 1 that fit the velocity instead, s = t")
    drop: float = share(0.1, "probability of dropping the class or caption, for classifier-free guidance")
    guidance: float = finite(1.0, "scale of classifier-free guidance to train into the map; 1 for none")
    teacher: str | None = option(
        None, "checkpoint of the frozen velocity of trajectory, posterior and posterior_trajectory; null for the map's own"
    )
    uses: int = count(8, "use", "mean number of time pairs per trajectory")
    keep: int = natural(0, "trajectories to store and draw pairs from, at least a batch; 0 for those of the current step only")
    smoothing: float = ranged(0.1, "label smoothing of a classifier: probability spread over all classes", least=0, below=1)
    noise: float = natural(0.0, "largest standard deviation of the noise added to a classifier's pictures, which are in [0, 1]")
    radius: float = natural(1.0, "contrastive with a teacher: largest L2 norm of the change of a picture, pixels in [0, 1]")
    samples: str | None = option(None, "contrastive with a teacher: flow map that generates extra pictures; null for none")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = positive(1e-3, "learning rate")
    beta1: float = ranged(0.9, "decay of the mean gradient", least=0, below=1)
    beta2: float = ranged(0.99, "decay of the mean squared gradient", least=0, below=1)
    weight_decay: float = natural(0.0, "weights shrink by this times the learning rate in each step")
    steps: int = count(10_000, "step", "number of steps")
    warmup: int = natural(200, "steps over which the learning rate rises from 0")
    decay: float = share(0.3, "share of the steps, at the end, over which the learning rate falls to 0")
    ema: float = ranged(0.999, "decay per step of the weight average, which is saved", least=0, below=1)
    clip: float = natural(1.0, "largest norm of the gradient; 0 for no limit")


DEVICES = (r"auto|-1|[1-9]\d*|\d+(,\d+)+", "auto, a number of at least 1, or a list: 0,1")
"""Form of ``trainer.devices``, as a regular expression and in words."""


@dataclass
class LightningConfig:
    """Lightning's keys, and how often to log and to save."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps", "tpu", doc="device to train on")
    devices: str = option("auto", "number of devices, or a list", form=DEVICES)
    strategy: str = option(
        "auto", "Lightning's strategy for several devices, such as ddp; finetune also takes fsdp2, which shards the weights"
    )
    precision: str = choice("32-true", "32", "16-mixed", "bf16-mixed", doc="precision of the network")
    log_every: int = count(20, "step", "steps between log lines")
    logger: str = choice(
        "auto", "csv", "tensorboard", "wandb",
        doc="where to write the curves besides metrics.jsonl: csv, tensorboard (auto: if installed), or wandb, offline "
        "unless WANDB_MODE=online",
    )  # fmt: skip
    save_every: int = count(200, "step", "steps between checkpoints, from which a killed run continues")


@dataclass
class TrainerConfig(LightningConfig):
    """Lightning's keys, and how often to log, to save, to validate and to draw samples."""

    validate_every: int = count(1000, "step", "steps between validations")
    sample_every: int = natural(1000, "steps between grids of samples; 0 for none")


FORCE = "start again if out= holds another run or a finished one; only the files of that run are deleted"


@dataclass
class TrainConfig:
    """Configuration of `steerfm train`."""

    task: str = choice("flow_map", "classifier", "contrastive", doc="what to train", what="task")
    name: str = option("fashion", "name of the model and of its files")
    network: dict[str, Any] = option(
        {"name": "unet"}, "name: unet, mlp, resnet ..., and its arguments; for contrastive, open_clip's model_cfg"
    )
    text: str | None = option(None, "text encoder of a text-conditional flow map; an unknown name lists the encoders")
    features: list[str] | None = option(
        None, "networks whose features measure a flow map: your own classifier, or FILE.py:NAME; its card names them"
    )
    judge: Any = option(None, "held-out reward of a flow map, in the form of reward; its card names it")
    init: str | None = option(None, "checkpoint to start from: a shipped model or a path; null for random weights")
    seed: int = seed_field("seed of weights, batches, noise and dropout")
    out: str | None = option(None, "run folder; null for runs/train/NAME")
    force: bool = option(False, FORCE)
    data: DataConfig = section(DataConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    trainer: TrainerConfig = section(TrainerConfig)


CODE = (
    "a shipped flow map (steerfm models), a path to a .safetensors file or to its run folder, diffusers:FOLDER_OR_HUB_ID, or "
    "FILE.py:NAME for a map built by code; model.KEY sets an argument of the last two"
)
REWARD = "what to raise: a name (steerfm rewards), FILE.py:NAME, or a list of {name, weight, ...}; reward.KEY sets an argument"
JUDGE = "held-out reward for the report, in the form of reward; auto for that of the model's card, null for none"
GUIDANCE = "scale of classifier-free guidance; 1 for none, above 1 for stronger"
NEGATIVE = "class or text that guidance leads away from, or a list with one for each output; needs guidance"
COMPILE = "compile the network with torch.compile: the first calls take a minute, later ones are faster"
DEVICE = "auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps"
SEEDS = "seed of the first output; the next have seeds + 1, seeds + 2, ...; or a list, one for each output of a prompt"
PRECISION = "precision of the network and the reward"


DEVICES_HERE = "processes on this machine, one device each: a number, or a list of GPUs; auto: as torchrun or srun says, else 1"
NODES = "number of machines; null: as torchrun or srun says, else 1"


BLOCKS = "recompute the activations of a transformer's blocks for gradients: less memory, a third more time, same numbers"


@dataclass
class SpreadConfig:
    """Processes that share a run. The samples do not depend on their number (docs/scaling.md)."""

    devices: str = option("auto", DEVICES_HERE, form=DEVICES)
    num_nodes: int | None = ranged(None, NODES, least=1)
    strategy: str = choice(
        "auto", "fsdp2", doc="fsdp2 shards the weights over the processes, for a model that does not fit one"
    )


MICRO = "rows per call of the network, the decoder and the reward; memory grows with it; null for the model's own number"


@dataclass
class SampleConfig:
    """Configuration of `steerfm sample`."""

    model: Any = option("fashion", CODE)
    label: Words = option(None, "class by name or index, or a list with one for each sample; null for a mix of all")
    prompt: Words = option(None, "prompt of a text-conditional map: a text, a list of texts, or a file of them")
    n: int = count(16, "output", "number of samples, per prompt")
    seeds: int | list[int] = seed_field(SEEDS)
    steps: int | None = option(
        None,
        "steps from noise to data, one network call per sample each; null for the model's own number, 4 for the shipped ones",
        range=Range(least=1, of="step"),
    )
    guidance: float = finite(1.0, GUIDANCE)
    negative: Words = option(None, NEGATIVE)
    device: str = option("auto", DEVICE)
    precision: str = choice("32", "bf16", doc=PRECISION, what="precision")
    compile: bool = option(False, COMPILE)
    out: str | None = option(None, "run folder; null for runs/sample/MODEL")
    force: bool = option(False, FORCE)
    trainer: SpreadConfig = section(SpreadConfig)


@dataclass
class SteerConfig:
    """Configuration of `steerfm steer`, which samples p(x) exp(strength * reward(x))."""

    model: Any = option("fashion", CODE)
    reward: Any = option({"name": "classifier"}, REWARD)
    method: Any = option(
        {"name": "funnel"}, "a name (steerfm methods) or FILE.py:CLASS; method.KEY sets an argument (steerfm methods NAME)"
    )
    judge: Any = option("auto", JUDGE)
    label: Words = option(
        None,
        "class by name or index, or a list with one for each output; null for none, or for all classes in turn if the reward "
        "reads labels",
    )
    prompt: Words = option(None, "prompt for models and rewards that take text: a text, a list of texts, or a file of them")
    n: int = count(16, "output", "number of outputs, per prompt; each has its own particles")
    seeds: int | list[int] = seed_field(SEEDS)
    strength: float | list[float] | Literal["auto"] = finite(
        10.0,
        "strength of the tilt, in 1 / units of the reward; 0 is the model itself, auto fits the reward; or one for each output",
    )
    guidance: float = finite(1.0, GUIDANCE)
    negative: Words = option(None, NEGATIVE)
    batch_size: int = count(16, "output", "outputs per batch; memory grows with it, results do not depend on it")
    device: str = option("auto", DEVICE)
    precision: str = choice("32", "bf16", doc=PRECISION, what="precision")
    compile: bool = option(False, COMPILE)
    activation_checkpoints: bool = option(False, BLOCKS)
    lookaheads: bool = option(True, "store and draw the first particle's look-aheads over time")
    micro_batch: int | None = ranged(None, MICRO, least=1)
    out: str | None = option(None, "run folder; null for runs/steer/MODEL-REWARD-METHOD")
    force: bool = option(False, FORCE)
    trainer: SpreadConfig = section(SpreadConfig)


OF_MODEL = "null for what configs/play says of the model"


@dataclass
class PlayConfig:
    """The playground: what its page begins with, and where it is."""

    model: Any = option("emoji", CODE)
    reward: Any = option(None, f"{REWARD}; {OF_MODEL}, or brightness")
    method: Any = option(None, "a name (steerfm methods) or FILE.py:CLASS; null for the usual one of the model")
    judge: Any = option("auto", JUDGE)
    label: str | None = option(None, f"class that the model is asked for, by name; {OF_MODEL}, or none")
    prompt: Words = option(None, f"for models and rewards that read words: a text or a list of texts; {OF_MODEL}, or none")
    n: int = ranged(4, "outputs, of each prompt where there are several", least=1, most=16)
    seeds: int = seed_field("seed of the first output, the next have seeds + 1, seeds + 2, ...")
    strength: float | Literal["auto"] | None = finite(
        None, f"how hard to tilt, in 1 / units of the reward, or auto; {OF_MODEL}, or auto"
    )
    guidance: float = finite(1.0, GUIDANCE)
    device: str = option("auto", DEVICE)
    out: str | None = option(None, "folder for the run folders; null for a temporary one, which is deleted at the end")
    host: str = option("127.0.0.1", "address of this machine to listen at; 0.0.0.0 lets the network in")
    port: int | None = ranged(None, "to listen at; null for the first free one from 7860 on", least=1, most=65_535)
    share: bool = option(False, "a public link for a week, through Gradio's servers: whoever has it can use the page")
    browser: bool = option(False, "open the page in the browser")


@dataclass
class EvaluateConfig:
    """Configuration of `steerfm evaluate`."""

    model: Any = option("fashion", CODE)
    prompt: Words = option(
        None, "prompts of a text-conditional model, or a file of them; null for captions of the training data"
    )
    held_out: bool = option(False, "use the captions of concepts held out from training instead")
    n: int = count(2_000, "samples", "samples for each number of jumps", least=2)
    steps: list[int] = option([1, 2, 4, 8], "numbers of jumps to measure", range=Range(least=1, of="step"))
    euler: int = count(128, "step", "Euler steps of the reference sampler")
    posteriors: int = natural(8, "states whose draws of posteriors are measured, where the model has them; 0 for none")
    seeds: int = seed_field("seed of the first sample; the next have seeds + 1, seeds + 2, ...")
    batch_size: int = count(500, "sample", "samples per batch")
    device: str = option("auto", DEVICE)
    out: str | None = option(None, "run folder; null for runs/evaluate/MODEL")
    force: bool = option(False, FORCE)


@dataclass
class TuneOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule."""

    lr: float = positive(1e-3, "learning rate")
    steps: int = count(120, "step", "number of steps")
    warmup: int = natural(5, "steps over which the learning rate rises from 0")
    ema: float = ranged(0.95, "decay per step of the weight average, which is saved", least=0, below=1)


@dataclass
class TuneTrainerConfig(LightningConfig):
    """Lightning's keys, and how often to log and to save. A run does not depend on the number of processes."""

    devices: str = option("auto", DEVICES_HERE, form=DEVICES)
    num_nodes: int | None = ranged(None, NODES, least=1)
    activation_checkpoints: bool = option(False, BLOCKS)
    log_every: int = count(5, "step", "steps between log lines")
    save_every: int = count(20, "step", "steps between checkpoints, from which a killed run continues")


@dataclass
class LoraConfig:
    """Low-rank adapters."""

    rank: int = natural(0, "rank of the adapters; 0 to train all weights")
    alpha: float | None = positive(None, "scale of the adapters times the rank; null for twice the rank")
    layers: list[str] | None = option(None, "name endings of the layers to adapt; null for all convolutions and linear layers")


@dataclass
class DistilConfig:
    """Distillation of the tuned sampler into one flow map."""

    steps: int = natural(200, "updates; 0 leaves the tuned network as it is")
    lr: float = positive(5e-4, "learning rate")
    decay: float = share(0.7, "share of the updates, at the end, over which the learning rate falls to 0")
    ema: float = ranged(0.99, "decay per step of the weight average", least=0, below=1)
    batch_size: int = count(64, "sample", "samples per update")
    samples: int = count(1024, "sample", "samples per pool")
    pools: int = count(2, "pool", "pools, drawn one after the other")
    trajectory: float = share(0.5, "share of the rows that fit jumps; the rest fit the velocity")


@dataclass
class WatchConfig:
    """Evaluation of the model during fine-tuning."""

    every: int = count(5, "step", "steps between evaluations")
    n: int = count(64, "samples", "samples per evaluation", least=2)
    base: int | None = ranged(
        None, "samples of the base as reference for support, diversity and distance, each a full run of its network; null for "
        "300 and 50 per class; 6 is enough for a trial; at least watch.n and 4 per class are drawn",
        least=6, of="samples",
    )  # fmt: skip
    seeds: int = seed_field("seed of the first of these samples; the next have seeds + 1, seeds + 2, ...")
    floor: float = share(0.9, "share of the base's diversity and support that the chosen checkpoint must keep")
    patience: int = natural(8, "evaluations without improvement before the run stops; 0 for never")
    report: int = ranged(0, "samples of the final table, from new seeds; 0 for the samples above", least=2, off=True)


@dataclass
class FinetuneConfig:
    """Configuration of `steerfm finetune`."""

    model: Any = option("fashion", CODE)
    reward: Any = option({"name": "classifier"}, REWARD)
    method: Any = option(
        {"name": "direct"}, "a name (steerfm methods) or FILE.py:CLASS; method.KEY sets an argument (steerfm methods NAME)"
    )
    judge: Any = option("auto", JUDGE)
    label: str | list[str] | None = option(
        None, "class, list of classes, or all; null for no class, or for all if the reward reads labels"
    )
    prompt: Words = option(None, "prompt for models and rewards that take text: a text, a list of texts, or a file of them")
    control: float = natural(3.0, "lambda, the pull towards the base, in spreads of the reward; smaller tunes harder")
    batch_size: int = count(8, "sample", "samples per step")
    seed: int = seed_field("seed of noise, tasks and batches")
    out: str | None = option(None, "run folder; null for runs/finetune/MODEL-METHOD-REWARD")
    force: bool = option(False, FORCE)
    optimizer: TuneOptimizerConfig = section(TuneOptimizerConfig)
    distil: DistilConfig = section(DistilConfig)
    lora: LoraConfig = section(LoraConfig)
    watch: WatchConfig = section(WatchConfig)
    trainer: TuneTrainerConfig = section(TuneTrainerConfig)


NOTHING = "a suite needs problems and budgets"


@dataclass
class BenchConfig:
    """Configuration of `steerfm bench`: a sweep of models x problems x strengths x budgets x methods x seeds."""

    models: list[str] = option(["fashion"], CODE)
    problems: dict[str, Any] = option(
        {}, "problems by name: {reward, judge, label, prompt, strength}, as for steerfm steer", of=SteerConfig
    )
    methods: dict[str, Any] = option({}, "methods by name: a method, FILE.py:CLASS, or {name: ..., arguments}", of="method")
    only: list[str] = option([], "names of the methods to run; [] for all")
    difference: list[str] = option([], "two methods, [A, B]: report the difference of A and B, with its interval")
    budgets: list[int] = option(
        [8, 32, 128], "network evaluations per output", range=Range(least=1, of="evaluation", empty=NOTHING)
    )
    strengths: list[float] = option([10.0], "strengths of the tilt, in 1 / units of the reward", range=Range())
    seeds: int = ranged(4, "repetitions; intervals need at least 4", least=1)
    n: int = count(8, "output", "outputs per repetition and prompt")
    batch_size: int = count(16, "output", "outputs per batch; memory grows with it, results do not depend on it")
    share: str = option("1/1", "part to measure: 2/4 is the second of four, for file systems without locks")
    workers: int = count(1, "worker", "worker processes on this machine; --workers N is the same")
    device: str = option("auto", DEVICE)
    out: str | None = option(None, "run folder; null for runs/bench/NAME")
    force: bool = option(False, FORCE)


NAME_KEYS = {"model", "reward", "method", "judge"}
"""Keys that take a name and its arguments: ``reward=classifier reward.target=Bag``."""
