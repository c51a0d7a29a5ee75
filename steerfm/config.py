"""Typed configurations: dataclasses <- yaml <- dotted overrides. Only this file knows which name builds which class.

>>> config = load(TrainConfig, "fashion", ["optimizer.lr=5e-4"])      # a recipe in configs/train, a path, or None

Precedence: command line, then yaml, then the defaults below. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and names the fix."""


# --- what can be configured ------------------------------------------------------------------------------------------
@dataclass
class DataConfig:
    """name: a key of `data.DATA`; root: folder of the files, if not the usual one; augment: pixels of random shift."""

    name: str = "fashion"
    batch_size: int = 128
    root: str | None = None
    augment: int = 0


@dataclass
class ObjectiveConfig:
    """Shares of the batch per off-diagonal objective (the rest is flow matching), and how pairs of times are drawn.

    shares: e.g. {lagrangian: 0.125, progressive: 0.25}; empty means {lagrangian: 0.25}. start: share of the steps with flow
    matching only; terminal, full, gap: see `objectives.Triangle`; teacher: checkpoint whose velocity `trajectory` follows,
    frozen (default: the map's own); uses, keep: see `objectives.Trajectory`; drop: probability of the null class; guidance:
    scale of the classifier-free guidance that is trained into the map (1: none), or the teacher's. smoothing, noise: of a
    classifier's labels and pictures. radius, samples: of a contrastive training with a teacher (an image_text_head), see
    `training.RobustTraining`; samples: the flow map that draws them.
    """

    shares: dict[str, float] = field(default_factory=dict)
    start: float = 0.1
    terminal: float = 0.2
    full: float = 0.1
    gap: float = 1.0
    drop: float = 0.1
    guidance: float = 1.0
    teacher: str | None = None
    uses: int = 8
    keep: int = 0
    smoothing: float = 0.1
    noise: float = 0.0
    radius: float = 1.0
    samples: str | None = None


@dataclass
class OptimizerConfig:
    """AdamW; steps: length of the run; warmup: steps; decay: share of the steps with falling rate; ema: decay."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    steps: int = 10_000
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    clip: float = 1.0


@dataclass
class LightningConfig:
    """Lightning's own keys, and how often to log and to save (in steps)."""

    accelerator: str = "auto"
    devices: str = "auto"
    strategy: str = "auto"
    precision: str = "32-true"
    log_every: int = 20
    save_every: int = 200


@dataclass
class TrainerConfig(LightningConfig):
    """For training, also how often to validate and to draw samples (in steps)."""

    validate_every: int = 1000
    sample_every: int = 1000


@dataclass
class TrainConfig:
    """task: flow_map, classifier or contrastive; network: {name: a key of `networks.NETWORKS`, ...its arguments}, or for
    contrastive open_clip's model_cfg; text: encoder of the captions that a flow map is conditioned on, an open_clip model or
    minilm; init: a checkpoint (zoo name or path) to start from; out: run folder, default runs/train/<name>."""

    task: str = "flow_map"
    name: str = "fashion"
    network: dict[str, Any] = field(default_factory=lambda: {"name": "unet"})
    text: str | None = None
    init: str | None = None
    seed: int = 0
    out: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass
class SampleConfig:
    """model: zoo name or path; label: class name or index, None for a mix of all; prompt: as for steer; n: samples (of each
    prompt); steps: jumps; guidance: scale of classifier-free guidance (1 is off); compile: the network, by torch.compile."""

    model: str = "fashion"
    label: str | None = None
    prompt: Any = None
    n: int = 16
    seeds: int = 0
    steps: int = 4
    guidance: float = 1.0
    device: str = "auto"
    precision: str = "32"
    compile: bool = False
    out: str | None = None


@dataclass
class SteerConfig:
    """model: zoo name or path; reward: name, path.py:name or a list of weighted terms; method: a preset's name; label: class
    that the model is conditioned on; prompt: for models and rewards that read words: one, a list, or a file (.txt, .jsonl);
    n: outputs (of each prompt); strength: of the tilt p(x) exp(strength * reward); judge: held-out reward, or null; compile:
    the network, by torch.compile."""

    model: str = "fashion"
    reward: Any = field(default_factory=lambda: {"name": "classifier"})
    method: Any = field(default_factory=lambda: {"name": "funnel"})
    judge: Any = "auto"
    label: str | None = None
    prompt: Any = None
    n: int = 16
    seeds: int = 0
    strength: float = 10.0
    guidance: float = 1.0
    batch_size: int = 16
    device: str = "auto"
    precision: str = "32"
    compile: bool = False
    lookaheads: bool = True
    out: str | None = None


@dataclass
class EvaluateConfig:
    """model: zoo name or path; prompt: for models that read words: prompts or a file of them, default the captions of the
    training data, or with held_out=true those of the concepts kept from it; n: samples; steps: numbers of jumps; euler: steps
    of the reference ODE solution."""

    model: str = "fashion"
    prompt: Any = None
    held_out: bool = False
    n: int = 2_000
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    euler: int = 128
    seeds: int = 0
    batch_size: int = 500
    device: str = "auto"
    out: str | None = None


@dataclass
class TuneOptimizerConfig(OptimizerConfig):
    """As for training, with a fine-tuning's defaults."""

    lr: float = 1e-3
    steps: int = 120
    warmup: int = 5
    ema: float = 0.95


@dataclass
class TuneTrainerConfig(LightningConfig):
    """As for training, with a fine-tuning's defaults."""

    log_every: int = 5
    save_every: int = 20


@dataclass
class LoraConfig:
    """rank: of low-rank adapters, 0 to train all weights; alpha: their scale times the rank, default 2 rank; layers: ends of
    the names of the layers to adapt, default all convolutions and linear ones."""

    rank: int = 0
    alpha: float | None = None
    layers: list[str] | None = None


@dataclass
class DistilConfig:
    """How what was learnt becomes one flow map: updates, their rate, its decay and EMA, samples in a pool, pools; trajectory:
    share of the rows that fit jumps. steps=0 leaves the network as it was tuned."""

    steps: int = 200
    lr: float = 5e-4
    decay: float = 0.7
    ema: float = 0.99
    batch_size: int = 64
    samples: int = 1024
    pools: int = 2
    trajectory: float = 0.5


@dataclass
class WatchConfig:
    """every: steps between judgements of n samples from these seeds; floor: share of the base's diversity and support that a
    model must keep; patience: judgements without a better one before the run stops, 0 for never; report: samples of the last
    table, from seeds that chose nothing, 0 for those that were watched."""

    every: int = 5
    n: int = 64
    seeds: int = 0
    floor: float = 0.9
    patience: int = 8
    report: int = 0


@dataclass
class FinetuneConfig:
    """model: zoo name or path; reward, judge, prompt: as for steer; method: a name of `finetuning.METHODS`; label: a class, a
    list of them, all, or null for no class; control: lambda, the pull towards the base, in spreads of the reward."""

    model: str = "fashion"
    reward: Any = field(default_factory=lambda: {"name": "classifier"})
    method: Any = field(default_factory=lambda: {"name": "direct"})
    judge: Any = "auto"
    label: Any = None
    prompt: Any = None
    control: float = 3.0
    batch_size: int = 8
    seed: int = 0
    out: str | None = None
    optimizer: TuneOptimizerConfig = field(default_factory=TuneOptimizerConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    trainer: TuneTrainerConfig = field(default_factory=TuneTrainerConfig)


@dataclass
class BenchConfig:
    """A sweep of models x problems x strengths x budgets x methods x seeds.

    models: zoo names or paths. problems: name -> {reward, judge, label, prompt, strength} as for steer. methods: name -> a
    preset, or {name: a preset or path.py:Class, ...its arguments}; only: the names of those to run, default all. budgets:
    network evaluations an output. strengths: of the tilt. seeds: repetitions, at least 4; n: outputs of each (of each
    prompt). share: 2/4 measures the second of four parts, for several processes on one folder.
    """

    models: list[str] = field(default_factory=lambda: ["fashion"])
    problems: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=lambda: [8, 32, 128])
    strengths: list[float] = field(default_factory=lambda: [10.0])
    seeds: int = 4
    n: int = 8
    batch_size: int = 16
    share: str = "1/1"
    device: str = "auto"
    out: str | None = None


NAMED = {"reward", "method", "judge"}
"""Keys that take a name and its arguments: ``reward=classifier reward.target=Bag``."""


# --- loading ---------------------------------------------------------------------------------------------------------
def load(schema: type[Schema], source: str | None = None, overrides: Iterable[str] = (), kind: str = "") -> Schema:
    """A configuration from defaults, a yaml file or recipe, and ``key.sub=value`` overrides, in rising precedence.

    Args:
        schema: one of the dataclasses above.
        source: path of a yaml file, or the name of a recipe in ``configs/<kind>``; None for the defaults.
        overrides: strings ``key=value``; values are parsed as yaml.
        kind: folder of the recipes, default from the schema's name.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, no such recipe.
    """
    layers: list[Mapping[str, Any]] = []
    if source is not None:
        path = find_recipe(source, kind or schema.__name__.removesuffix("Config").lower())
        try:
            content = OmegaConf.to_container(OmegaConf.load(path)) or {}
        except Exception as error:  # yaml's own errors have several lines
            raise ConfigError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold keys and values")
        layers.append({str(key): value for key, value in content.items()})
    layers += [_parse(override) for override in overrides]
    merged: Any = OmegaConf.structured(schema)
    for layer in map(_named, layers):
        _check_keys(layer, schema)
        try:
            for key in NAMED & layer.keys():  # a new name drops the old name's arguments
                if not isinstance(layer[key], Mapping) or "name" in layer[key] or not isinstance(merged[key], Mapping):
                    merged[key] = None
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            reason = " ".join(str(error).splitlines()[0].split())
            raise ConfigError(f"{reason} (key: {getattr(error, 'full_key', '') or next(iter(layer))})") from None
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:  # a value that points nowhere, such as ${name}
        raise ConfigError(" ".join(str(error).splitlines()[0].split())) from None


def dump(config: Any) -> str:
    """The configuration as yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def plain(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists."""
    return asdict(config)


def recipes(kind: str) -> dict[str, Path]:
    """The shipped recipes of a command, by name."""
    return {path.stem: path for path in sorted((shipped("configs") / kind).glob("*.yaml"))}


def find_recipe(source: str, kind: str) -> Path:
    """Path of a yaml file or of a shipped recipe.

    Raises:
        ConfigError: naming the recipes there are.
    """
    if Path(source).is_file():
        return Path(source)
    known = recipes(kind)
    if source in known:
        return known[source]
    raise ConfigError(f"no file or recipe {source!r}{did_you_mean(source, known)}; recipes: {', '.join(known) or 'none'}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest choice, or nothing."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def named(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a `NAMED` key's value.

    Raises:
        ConfigError: no name.
    """
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{what} needs a name: {what}=NAME")
    arguments = {str(key): item for key, item in value.items() if key != "name"}
    return value["name"], arguments


def build(kind: type, arguments: Mapping[str, Any], what: str) -> Any:
    """An instance of a dataclass from its arguments, with errors that name the nearest field.

    Raises:
        ConfigError: unknown argument or refused value.
    """
    known = [f.name for f in fields(kind) if f.init]
    for key in arguments:
        if key not in known:
            raise ConfigError(f"unknown key '{what}.{key}'{did_you_mean(key, known)}; keys: {', '.join(known)}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from None


def shipped(folder: str) -> Path:
    """A folder that ships with the library: inside an installed package, or at the top of a checkout."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parent.parent / folder


def _parse(override: str) -> dict[str, Any]:
    """``a.b=value`` -> {"a": {"b": value}}."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"cannot read {override!r}: overrides look like key=value or key.sub=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception:
        raise ConfigError(f"cannot read the value of {override!r}") from None
    nested: Any = value["value"]  # type: ignore[index]
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _named(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {k: {"name": v} if k in NAMED and isinstance(v, str) and v != "auto" else v for k, v in layer.items()}


def _check_keys(layer: Mapping[str, Any], schema: Any, prefix: str = "") -> None:
    known = {f.name: f for f in fields(schema)}
    for key, value in layer.items():
        if key not in known:
            raise ConfigError(f"unknown key '{prefix}{key}'{did_you_mean(key, known)}; keys: {', '.join(known)}")
        default = known[key].default_factory
        if isinstance(default, type) and is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ConfigError(f"'{prefix}{key}' holds keys of its own: {', '.join(f.name for f in fields(default))}")
            _check_keys(value, default, f"{prefix}{key}.")


def sequence(value: Any) -> Sequence[Any]:
    """A list, whether or not one was given."""
    return value if isinstance(value, list | tuple) else [value]
