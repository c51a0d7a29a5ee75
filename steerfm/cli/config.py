"""What can be configured: a schema a command, with a doc, a type and a range for each key."""

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
    """What a network is trained on."""

    name: str = option("fashion", "data set, as of steerfm data")
    batch_size: int = count(128, "picture", "pictures a step")
    root: str | None = option(None, "folder of the data's files; null for the usual ones")
    augment: int = natural(0, "largest random shift of a picture, in pixels")
    size: int | list[int] | None = ranged(
        None, "side of the pictures in pixels, of emoji or a folder, or for that [height, width]; null for 32", least=1
    )
    channels: int | None = ranged(
        None, "folder: 1 makes all pictures grey, 3 all colour; null for what they are, where all are alike", least=1, most=3
    )
    fit: str | None = option(
        None, "folder: crop cuts out the middle of a longer picture, pad puts white around it; null for crop"
    )
    flip: bool | None = option(None, "folder: mirror half of the pictures of a batch; null for false")
    held_out: float | None = ranged(
        None, "folder: share of the pictures that no step trains on, by what they show; null for 0.1", above=0, below=1
    )
    licence: str | None = option(None, "folder: licence of the pictures, for the model's card")


@dataclass
class ObjectiveConfig:
    """The losses of a training."""

    shares: dict[str, float] = option(
        {}, "share of the batch per off-diagonal objective, the rest is flow matching; {} is {lagrangian: 0.25}",
        range=Range(least=0, most=1),
    )  # fmt: skip
    start: float = share(0.1, "share of the steps, at the start, with flow matching only")
    terminal: float = share(0.2, "share of the pairs of times (s, t) with t = 1: the look-aheads")
    full: float = share(0.1, "share of the pairs of times that are (0, 1)")
    gap: float = ranged(1.0, "largest t - s of the other pairs", above=0, most=1)
    drop: float = share(0.1, "probability that the class or caption is left out, for classifier-free guidance")
    guidance: float = finite(1.0, "scale of the classifier-free guidance that is trained into the map; 1 for none")
    teacher: str | None = option(None, "checkpoint whose velocity, frozen, trajectory follows; null for the map's own")
    uses: int = count(8, "use", "pairs of times taken from each trajectory, in the mean")
    keep: int = natural(0, "trajectories kept to draw pairs from; 0 for those of this step only")
    smoothing: float = ranged(
        0.1, "label smoothing of a classifier: probability that is spread over all classes", least=0, below=1
    )
    noise: float = natural(0.0, "largest standard deviation of the noise on a classifier's pictures, in [0, 1]")
    radius: float = natural(1.0, "contrastive with a teacher: largest change of a picture, L2 norm over pixels in [0, 1]")
    samples: str | None = option(None, "contrastive with a teacher: flow map whose pictures are mixed in; null for none")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = positive(1e-3, "learning rate")
    beta1: float = ranged(0.9, "decay of the mean gradient", least=0, below=1)
    beta2: float = ranged(0.99, "decay of the mean squared gradient", least=0, below=1)
    weight_decay: float = natural(0.0, "share, times the learning rate, by which weights shrink a step")
    steps: int = count(10_000, "step", "length of the run, in steps")
    warmup: int = natural(200, "steps over which the learning rate rises from 0")
    decay: float = share(0.3, "share of the steps, at the end, over which the learning rate falls to 0")
    ema: float = ranged(0.999, "decay a step of the average of the weights, which is what is saved", least=0, below=1)
    clip: float = natural(1.0, "largest norm of the gradient; 0 for no limit")


DEVICES = (r"auto|-1|[1-9]\d*|\d+(,\d+)+", "auto, a number of at least 1, or a list: 0,1")
"""What ``trainer.devices`` looks like, as an expression and in words."""


@dataclass
class LightningConfig:
    """Lightning's own keys, and how often to log and to save."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps", "tpu", doc="where to train")
    devices: str = option("auto", "how many devices, or which", form=DEVICES)
    strategy: str = option(
        "auto", "Lightning's strategy for several devices, such as ddp; finetune: fsdp2 shares out the weights, too"
    )
    precision: str = choice("32-true", "32", "16-mixed", "bf16-mixed", doc="precision of the network")
    log_every: int = count(20, "step", "steps between lines of the log")
    logger: str = choice(
        "auto", "csv", "tensorboard", "wandb",
        doc="where else its curves go than metrics.jsonl: metrics.csv, tensorboard (auto: where installed), or wandb, offline "
        "unless WANDB_MODE=online",
    )  # fmt: skip
    save_every: int = count(200, "step", "steps between checkpoints, from which a killed run goes on")


@dataclass
class TrainerConfig(LightningConfig):
    """Lightning's own keys, and how often to log, to save, to validate and to draw samples."""

    validate_every: int = count(1000, "step", "steps between validations")
    sample_every: int = natural(1000, "steps between grids of samples; 0 for none")


FORCE = "start anew where out= holds another run or a finished one: what that wrote is deleted, nothing else"


@dataclass
class TrainConfig:
    """A training."""

    task: str = choice("flow_map", "classifier", "contrastive", doc="what to train", what="task")
    name: str = option("fashion", "name of the model: its files are called after it")
    network: dict[str, Any] = option(
        {"name": "unet"}, "name: unet, mlp, resnet ..., and its arguments; for contrastive open_clip's model_cfg"
    )
    text: str | None = option(None, "encoder of the captions that a flow map is asked in: a wrong name lists those there are")
    features: list[str] | None = option(
        None, "networks in whose features a flow map is measured: a classifier of yours, or FILE.py:NAME; its card names them"
    )
    judge: Any = option(None, "held-out reward of a flow map, written as reward; its card names it")
    init: str | None = option(None, "checkpoint to start from, a shipped model or a path; null for random weights")
    seed: int = seed_field("seed of weights, batches, noise and dropout")
    out: str | None = option(None, "run folder; null for runs/train/NAME")
    force: bool = option(False, FORCE)
    data: DataConfig = section(DataConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    trainer: TrainerConfig = section(TrainerConfig)


CODE = (
    "a shipped flow map (steerfm models), a path to a .safetensors file or to its run folder, diffusers:FOLDER_OR_HUB_ID, or "
    "FILE.py:NAME for a map that code makes; model.KEY sets an argument of the last two"
)
REWARD = "what to raise: a name (steerfm rewards), FILE.py:NAME, or a list of {name, weight, ...}; reward.KEY sets an argument"
JUDGE = "a second, held-out reward for the report, written as reward; auto for one that fits, null for none"
GUIDANCE = "scale of classifier-free guidance; 1 for none, above 1 for stronger"
NEGATIVE = "what guidance leads away from: a class or a text, or a list, one for each output; needs guidance"
COMPILE = "compile the network by torch.compile: the first calls take a minute, later ones less"
DEVICE = "auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps"
SEEDS = "seed of the first output, the next have seeds + 1, seeds + 2, ...; or one for each output, for all prompts the same"
PRECISION = "precision of network and reward"


DEVICES_HERE = "processes here, a device each: how many, or which GPUs; auto for as many as torchrun or srun started, else 1"
NODES = "machines; null for as many as torchrun or srun started, else 1"


BLOCKS = "compute the activations of a transformer's blocks again for gradients: less memory, a third more time, same numbers"


@dataclass
class SpreadConfig:
    """Processes that share a run; its samples do not depend on them (docs/scaling.md)."""

    devices: str = option("auto", DEVICES_HERE, form=DEVICES)
    num_nodes: int | None = ranged(None, NODES, least=1)
    strategy: str = choice("auto", "fsdp2", doc="fsdp2: the processes hold the model's weights together, if one has no room")


MICRO = "rows of a call of the network, the decoder and the reward; null for what the model takes: memory grows with it"


@dataclass
class SampleConfig:
    """Unsteered samples."""

    model: Any = option("fashion", CODE)
    label: Words = option(None, "class by name or index, or a list, one for each sample; null for a mix of all")
    prompt: Words = option(None, "what to ask a map of words for: a text, a list of texts, or a file of them")
    n: int = count(16, "output", "samples, of each prompt where there are several")
    seeds: int | list[int] = seed_field(SEEDS)
    steps: int | None = option(
        None,
        "steps from noise to data; each is one network call a sample; null for as many as the model usually takes, 4 for ours",
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
    """A steering: samples of p(x) exp(strength * reward(x))."""

    model: Any = option("fashion", CODE)
    reward: Any = option({"name": "classifier"}, REWARD)
    method: Any = option(
        {"name": "funnel"}, "a name (steerfm methods) or FILE.py:CLASS; method.KEY sets an argument (steerfm methods NAME)"
    )
    judge: Any = option("auto", JUDGE)
    label: Words = option(
        None,
        "class that the model is asked for, by name or index, or a list, one for each output; null for none, or for all in "
        "turn where the reward reads it",
    )
    prompt: Words = option(None, "for models and rewards that read words: a text, a list of texts, or a file of them")
    n: int = count(16, "output", "outputs, of each prompt where there are several; each has particles of its own")
    seeds: int | list[int] = seed_field(SEEDS)
    strength: float | list[float] | Literal["auto"] = finite(
        10.0,
        "how hard to tilt, in 1 / units of the reward; 0 is the model itself, auto two of its spreads; or one for each output",
    )
    guidance: float = finite(1.0, GUIDANCE)
    negative: Words = option(None, NEGATIVE)
    batch_size: int = count(16, "output", "outputs at a time: memory grows with it, results do not depend on it")
    device: str = option("auto", DEVICE)
    precision: str = choice("32", "bf16", doc=PRECISION, what="precision")
    compile: bool = option(False, COMPILE)
    activation_checkpoints: bool = option(False, BLOCKS)
    lookaheads: bool = option(True, "keep and draw the first particle's look-aheads over time")
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
    """A measurement of a flow map."""

    model: Any = option("fashion", CODE)
    prompt: Words = option(
        None, "for models that read words: prompts or a file of them; null for captions of the training data"
    )
    held_out: bool = option(False, "captions of the concepts that were kept from training instead")
    n: int = count(2_000, "samples", "samples of each number of jumps", least=2)
    steps: list[int] = option([1, 2, 4, 8], "numbers of jumps to measure", range=Range(least=1, of="step"))
    euler: int = count(128, "step", "Euler steps of the ODE that the jumps are compared with")
    seeds: int = seed_field("seed of the first sample; the next have seeds + 1, seeds + 2, ...")
    batch_size: int = count(500, "sample", "samples at a time")
    device: str = option("auto", DEVICE)
    out: str | None = option(None, "run folder; null for runs/evaluate/MODEL")
    force: bool = option(False, FORCE)


@dataclass
class TuneOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule."""

    lr: float = positive(1e-3, "learning rate")
    steps: int = count(120, "step", "length of the run, in steps")
    warmup: int = natural(5, "steps over which the learning rate rises from 0")
    ema: float = ranged(0.95, "decay a step of the average of the weights, which is what is saved", least=0, below=1)


@dataclass
class TuneTrainerConfig(LightningConfig):
    """Lightning's own keys, and how often to log and to save; a run does not depend on how many share it."""

    devices: str = option("auto", DEVICES_HERE, form=DEVICES)
    num_nodes: int | None = ranged(None, NODES, least=1)
    activation_checkpoints: bool = option(False, BLOCKS)
    log_every: int = count(5, "step", "steps between lines of the log")
    save_every: int = count(20, "step", "steps between checkpoints, from which a killed run goes on")


@dataclass
class LoraConfig:
    """Low-rank adapters."""

    rank: int = natural(0, "rank of the adapters; 0 to train all weights")
    alpha: float | None = positive(None, "scale of the adapters times the rank; null for 2 rank")
    layers: list[str] | None = option(
        None, "ends of the names of the layers to adapt; null for all convolutions and linear ones"
    )


@dataclass
class DistilConfig:
    """How what was learnt becomes one flow map."""

    steps: int = natural(200, "updates; 0 leaves the network as it was tuned")
    lr: float = positive(5e-4, "learning rate")
    decay: float = share(0.7, "share of the updates, at the end, over which the learning rate falls to 0")
    ema: float = ranged(0.99, "decay a step of the average of the weights", least=0, below=1)
    batch_size: int = count(64, "sample", "samples an update")
    samples: int = count(1024, "sample", "samples in a pool")
    pools: int = count(2, "pool", "pools, drawn one after the other")
    trajectory: float = share(0.5, "share of the rows that fit jumps; the others fit the velocity")


@dataclass
class WatchConfig:
    """How a fine-tuning is judged while it runs."""

    every: int = count(5, "step", "steps between judgements")
    n: int = count(64, "samples", "samples of each judgement", least=2)
    base: int | None = ranged(
        None, "samples of the base that support, diversity and distance are measured against, each a whole run of its network; "
        "null for 300 and 50 of a class; 6 will do for a trial, and watch.n, and 4 of a class, are drawn at least",
        least=6, of="samples",
    )  # fmt: skip
    seeds: int = seed_field("seed of the first of these samples; the next have seeds + 1, seeds + 2, ...")
    floor: float = share(0.9, "share of the base's diversity and support that a model must keep to be chosen")
    patience: int = natural(8, "judgements without a better one before the run stops; 0 for never")
    report: int = ranged(
        0, "samples of the last table, from seeds that chose nothing; 0 for those that were watched", least=2, off=True
    )


@dataclass
class FinetuneConfig:
    """A fine-tuning."""

    model: Any = option("fashion", CODE)
    reward: Any = option({"name": "classifier"}, REWARD)
    method: Any = option(
        {"name": "direct"}, "a name (steerfm methods) or FILE.py:CLASS; method.KEY sets an argument (steerfm methods NAME)"
    )
    judge: Any = option("auto", JUDGE)
    label: str | list[str] | None = option(
        None, "a class, a list of them, or all; null for no class (all where the reward reads it)"
    )
    prompt: Words = option(None, "for models and rewards that read words: a text, a list of texts, or a file of them")
    control: float = natural(3.0, "lambda, the pull towards the base, in spreads of the reward; smaller tunes harder")
    batch_size: int = count(8, "sample", "samples a step")
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
    """A sweep of models x problems x strengths x budgets x methods x seeds."""

    models: list[str] = option(["fashion"], CODE)
    problems: dict[str, Any] = option(
        {}, "name -> {reward, judge, label, prompt, strength}, as for steerfm steer", of=SteerConfig
    )
    methods: dict[str, Any] = option({}, "name -> a method's name or FILE.py:CLASS, or {name: ..., its arguments}", of="method")
    only: list[str] = option([], "names of the methods to run; [] for all")
    difference: list[str] = option([], "two of the methods, [A, B]: says how much better A is than B, and how sure that is")
    budgets: list[int] = option(
        [8, 32, 128], "network evaluations an output", range=Range(least=1, of="evaluation", empty=NOTHING)
    )
    strengths: list[float] = option([10.0], "strengths of the tilt, in 1 / units of the reward", range=Range())
    seeds: int = ranged(4, "repetitions; intervals need at least 4", least=1)
    n: int = count(8, "output", "outputs of a repetition, of each prompt")
    batch_size: int = count(16, "output", "outputs at a time: memory grows with it, results do not depend on it")
    share: str = option("1/1", "which part to measure: 2/4 is the second of four, for processes whose folder has no locks")
    workers: int = count(1, "worker", "processes that measure on this machine; --workers N is the same")
    device: str = option("auto", DEVICE)
    out: str | None = option(None, "run folder; null for runs/bench/NAME")
    force: bool = option(False, FORCE)


NAMED = {"model", "reward", "method", "judge"}
"""Keys that take a name and its arguments: ``reward=classifier reward.target=Bag``."""
