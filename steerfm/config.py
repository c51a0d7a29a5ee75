"""Typed configurations: dataclasses <- yaml <- dotted overrides. Only this file knows which name builds which class.

>>> config = load(TrainConfig, "fashion", ["optimizer.lr=5e-4"])      # a recipe in configs/train, a path, or None

Precedence: command line, then yaml, then the defaults below. An unknown key is an error that names the nearest one.

What is written behind ``key=`` is read by the type of its key. Where that is text (prompts, labels, names, paths, arguments
of a reward that are declared ``str``) it is taken as it stands: ``12:30``, ``no``, ``a dog #1`` and ``${HOME}`` are words.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from steerfm.values import (
    ConfigError,
    Raw,
    Words,
    bounds,
    choice,
    convert,
    count,
    finite,
    flow,
    members,
    natural,
    parse,
    positive,
    ranged,
    read_yaml,
    scalar,
    seed_field,
    share,
    shown,
    untyped,
    wanted,
    write_yaml,
)

Schema = TypeVar("Schema")


# --- what can be configured ------------------------------------------------------------------------------------------
@dataclass
class DataConfig:
    """name: a key of `data.DATA`; root: folder of the files, if not the usual one; augment: pixels of random shift."""

    name: str = "fashion"
    batch_size: int = count(128, "picture")
    root: str | None = None
    augment: int = natural(0)


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

    shares: dict[str, float] = field(default_factory=dict, metadata=bounds(least=0, most=1))
    start: float = share(0.1)
    terminal: float = share(0.2)
    full: float = share(0.1)
    gap: float = ranged(1.0, above=0, most=1)
    drop: float = share(0.1)
    guidance: float = finite(1.0)
    teacher: str | None = None
    uses: int = count(8, "use")
    keep: int = natural(0)
    smoothing: float = ranged(0.1, least=0, below=1)
    noise: float = natural(0.0)
    radius: float = natural(1.0)
    samples: str | None = None


@dataclass
class OptimizerConfig:
    """AdamW; steps: length of the run; warmup: steps; decay: share of the steps with falling rate; ema: decay."""

    lr: float = positive(1e-3)
    beta1: float = ranged(0.9, least=0, below=1)
    beta2: float = ranged(0.99, least=0, below=1)
    weight_decay: float = natural(0.0)
    steps: int = count(10_000, "step")
    warmup: int = natural(200)
    decay: float = share(0.3)
    ema: float = ranged(0.999, least=0, below=1)
    clip: float = natural(1.0)


DEVICES = (r"auto|-1|[1-9]\d*|\d+(,\d+)+", "auto, a number, or a list: 0,1")
"""What ``trainer.devices`` looks like, as an expression and in words."""


@dataclass
class LightningConfig:
    """Lightning's own keys, and how often to log and to save (in steps)."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    devices: str = field(default="auto", metadata={"form": DEVICES})
    strategy: str = "auto"
    precision: str = choice("32-true", "32", "16-mixed", "bf16-mixed")
    log_every: int = count(20, "step")
    save_every: int = count(200, "step")


@dataclass
class TrainerConfig(LightningConfig):
    """For training, also how often to validate and to draw samples (in steps)."""

    validate_every: int = count(1000, "step")
    sample_every: int = natural(1000)


@dataclass
class TrainConfig:
    """task: flow_map, classifier or contrastive; network: {name: a key of `networks.NETWORKS`, ...its arguments}, or for
    contrastive open_clip's model_cfg; text: encoder of the captions that a flow map is conditioned on, an open_clip model or
    minilm; init: a checkpoint (zoo name or path) to start from; out: run folder, default runs/train/<name>."""

    task: str = choice("flow_map", "classifier", "contrastive", what="task")
    name: str = "fashion"
    network: dict[str, Any] = field(default_factory=lambda: {"name": "unet"})
    text: str | None = None
    init: str | None = None
    seed: int = seed_field()
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
    prompt: Words = None
    n: int = count(16, "output")
    seeds: int = seed_field()
    steps: int = count(4, "step")
    guidance: float = finite(1.0)
    device: str = "auto"
    precision: str = choice("32", "bf16", what="precision")
    compile: bool = False
    out: str | None = None


@dataclass
class SteerConfig:
    """model: zoo name or path; reward: name, path.py:name or a list of weighted terms; method: a preset's name; label: class
    that the model is conditioned on, default none, or all in turn where the reward reads it; prompt: for models and rewards
    that read words: one, a list, or a file (see `steerfm.prompts`); n: outputs (of each prompt); strength: of the tilt p(x)
    exp(strength * reward); judge: held-out reward, or null; compile: the network, by torch.compile."""

    model: str = "fashion"
    reward: Any = field(default_factory=lambda: {"name": "classifier"})
    method: Any = field(default_factory=lambda: {"name": "funnel"})
    judge: Any = "auto"
    label: str | None = None
    prompt: Words = None
    n: int = count(16, "output")
    seeds: int = seed_field()
    strength: float = finite(10.0)
    guidance: float = finite(1.0)
    batch_size: int = count(16, "output")
    device: str = "auto"
    precision: str = choice("32", "bf16", what="precision")
    compile: bool = False
    lookaheads: bool = True
    out: str | None = None


@dataclass
class EvaluateConfig:
    """model: zoo name or path; prompt: for models that read words: prompts or a file of them, default the captions of the
    training data, or with held_out=true those of the concepts kept from it; n: samples; steps: numbers of jumps; euler: steps
    of the reference ODE solution."""

    model: str = "fashion"
    prompt: Words = None
    held_out: bool = False
    n: int = count(2_000, "samples", least=2)
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata=bounds(least=1, of="step"))
    euler: int = count(128, "step")
    seeds: int = seed_field()
    batch_size: int = count(500, "sample")
    device: str = "auto"
    out: str | None = None


@dataclass
class TuneOptimizerConfig(OptimizerConfig):
    """As for training, with a fine-tuning's defaults."""

    lr: float = positive(1e-3)
    steps: int = count(120, "step")
    warmup: int = natural(5)
    ema: float = ranged(0.95, least=0, below=1)


@dataclass
class TuneTrainerConfig(LightningConfig):
    """As for training, with a fine-tuning's defaults."""

    log_every: int = count(5, "step")
    save_every: int = count(20, "step")


@dataclass
class LoraConfig:
    """rank: of low-rank adapters, 0 to train all weights; alpha: their scale times the rank, default 2 rank; layers: ends of
    the names of the layers to adapt, default all convolutions and linear ones."""

    rank: int = natural(0)
    alpha: float | None = positive(None)
    layers: list[str] | None = None


@dataclass
class DistilConfig:
    """How what was learnt becomes one flow map: updates, their rate, its decay and EMA, samples in a pool, pools; trajectory:
    share of the rows that fit jumps. steps=0 leaves the network as it was tuned."""

    steps: int = natural(200)
    lr: float = positive(5e-4)
    decay: float = share(0.7)
    ema: float = ranged(0.99, least=0, below=1)
    batch_size: int = count(64, "sample")
    samples: int = count(1024, "sample")
    pools: int = count(2, "pool")
    trajectory: float = share(0.5)


@dataclass
class WatchConfig:
    """every: steps between judgements of n samples from these seeds; floor: share of the base's diversity and support that a
    model must keep; patience: judgements without a better one before the run stops, 0 for never; report: samples of the last
    table, from seeds that chose nothing, 0 for those that were watched."""

    every: int = count(5, "step")
    n: int = count(64, "samples", least=2)
    seeds: int = seed_field()
    floor: float = share(0.9)
    patience: int = natural(8)
    report: int = ranged(0, least=2, off=True)


@dataclass
class FinetuneConfig:
    """model: zoo name or path; reward, judge, prompt: as for steer; method: a name of `finetuning.METHODS`; label: a class, a
    list of them, all, or null for no class (all where the reward reads it); control: lambda, the pull towards the base, in
    spreads of the reward."""

    model: str = "fashion"
    reward: Any = field(default_factory=lambda: {"name": "classifier"})
    method: Any = field(default_factory=lambda: {"name": "direct"})
    judge: Any = "auto"
    label: str | list[str] | None = None
    prompt: Words = None
    control: float = natural(3.0)
    batch_size: int = count(8, "sample")
    seed: int = seed_field()
    out: str | None = None
    optimizer: TuneOptimizerConfig = field(default_factory=TuneOptimizerConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    trainer: TuneTrainerConfig = field(default_factory=TuneTrainerConfig)


NOTHING = "a suite needs problems and budgets"


@dataclass
class BenchConfig:
    """A sweep of models x problems x strengths x budgets x methods x seeds.

    models: zoo names or paths. problems: name -> {reward, judge, label, prompt, strength} as for steer. methods: name -> a
    preset, or {name: a preset or path.py:Class, ...its arguments}; only: the names of those to run, default all. budgets:
    network evaluations an output. strengths: of the tilt. seeds: repetitions, at least 4; n: outputs of each (of each
    prompt). share: 2/4 measures the second of four parts, for several processes on one folder.
    """

    models: list[str] = field(default_factory=lambda: ["fashion"])
    problems: dict[str, Any] = field(default_factory=dict, metadata={"of": SteerConfig})
    methods: dict[str, Any] = field(default_factory=dict, metadata={"of": "method"})
    only: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=lambda: [8, 32, 128], metadata=bounds(least=1, of="evaluation", empty=NOTHING))
    strengths: list[float] = field(default_factory=lambda: [10.0], metadata=bounds())
    seeds: int = ranged(4, least=1)
    n: int = count(8, "output")
    batch_size: int = count(16, "output")
    share: str = "1/1"
    device: str = "auto"
    out: str | None = None


NAMED = {"reward", "method", "judge"}
"""Keys that take a name and its arguments: ``reward=classifier reward.target=Bag``."""


# --- loading ---------------------------------------------------------------------------------------------------------
def load(
    schema: type[Schema],
    source: str | Mapping[str, Any] | DictConfig | None = None,
    overrides: Iterable[str] = (),
    kind: str = "",
) -> Schema:
    """A configuration from defaults, a yaml file or recipe, and ``key.sub=value`` overrides, in rising precedence.

    Args:
        schema: one of the dataclasses above.
        source: path of a yaml file, or the name of a recipe in ``configs/<kind>``; a dictionary or OmegaConf's, as an
            application with Hydra has it (``${...}`` in it is text, as in yaml); None for the defaults.
        overrides: strings ``key=value``; values are read by the type of the key, texts as they stand.
        kind: folder of the recipes, default from the schema's name.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, out of range, no such recipe.
    """
    layers: list[Mapping[str, Any]] = []
    if OmegaConf.is_config(source):
        source = OmegaConf.to_container(source, resolve=False)  # type: ignore[assignment]
    if isinstance(source, Mapping):
        layers.append(source)
    elif source is not None:
        path = find_recipe(source, kind or schema.__name__.removesuffix("Config").lower())
        content = read_yaml(path)
        content = {content: None} if isinstance(content, str) else content  # a key without a value
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold keys and values")
        layers.append(content)
    layers += [parse(override) for override in overrides]
    merged = asdict(schema())  # type: ignore[call-overload]
    for layer in layers:
        merged = _merge(merged, _checked(layer, schema))
    return make(schema, merged)


def make(schema: type[Schema], values: Mapping[str, Any], prefix: str = "") -> Schema:
    """A configuration from plain values, those that are missing by default.

    Raises:
        ConfigError: as `load`; keys are named after ``prefix``.
    """
    return schema(**_values(schema, _checked(values, schema, prefix), prefix))


def dump(config: Any) -> str:
    """The configuration as yaml."""
    return write_yaml(asdict(config))


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


def _section(schema: Any, values: Any, key: str) -> dict[str, Any]:
    """The values of some of the fields of a schema, under a key of a dictionary."""
    values = {} if values is None else _opened(values, key)
    return _values(schema, _checked(values, schema, f"{key}."), f"{key}.")


def _values(schema: Any, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of the fields of a schema that are given, each of its type and in its range."""
    hints = get_type_hints(schema)
    out: dict[str, Any] = {}
    for f in fields(schema):
        if f.name not in values:
            continue
        key, value, kind, of = f"{prefix}{f.name}", values[f.name], hints[f.name], f.metadata.get("of")
        if is_dataclass(kind):
            value = make(kind, value, f"{key}.")  # type: ignore[arg-type]
        elif f.name in NAMED:
            value = _named(value, f.name, key, schema)
        elif of == "method":
            value = {name: _named(told, of, f"{key}.{name}", schema, name) for name, told in value.items()}
            for name, told in value.items():
                if not (told is None or isinstance(told, str | Mapping)):
                    raise ConfigError(f"{key}.{name}={shown(told)}: give a method's name, or {{name: NAME, ...its arguments}}")
        elif of is not None:
            value = {name: _section(of, told, f"{key}.{name}") for name, told in value.items()}
        else:
            value = convert(value, kind, key, words=f.name == "prompt")
        if "range" in f.metadata:
            f.metadata["range"].check(value, key)
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            choices, what = f.metadata["choices"], f.metadata["what"]
            listed = f"{did_you_mean(str(value), choices)}; {what or f.name}s: {', '.join(choices)}"
            raise ConfigError(f"unknown {what} {value!r}{listed}" if what else f"{key}={value}{listed}")
        if "form" in f.metadata and not re.fullmatch(f.metadata["form"][0], str(value)):
            raise ConfigError(f"{key}={value}: give {f.metadata['form'][1]}")
        if schema is TrainConfig and f.name == "name" and (set(str(value)) & set('/\\:*?"<>|$') or not str(value).strip(". ")):
            raise ConfigError(f"{key}={value}: files are called after it: letters, digits, spaces and . _ - ( ) [ ]")
        out[f.name] = value
    return out


# --- names and their arguments ---------------------------------------------------------------------------------------
def _named(value: Any, what: str, key: str, schema: type, default: str = "") -> Any:
    """A `NAMED` key's value with its arguments as the named thing declares them.

    Args:
        what: reward, judge or method. default: name where the value has none.
    """
    if isinstance(value, list):
        return [_named(term, what, key, schema) for term in value]
    value = _opened(value, key)
    if not isinstance(value, Mapping):
        return untyped(value, key)
    name = value.get("name", default)
    name = str(name) if isinstance(name, Raw) else name
    arguments = {argument: item for argument, item in value.items() if argument != "name"}
    kinds: Mapping[str, Any] = {}
    if isinstance(name, str) and any(isinstance(item, Raw) or not isinstance(item, str) for item in arguments.values()):
        kinds = _declared(what, name, schema)
    read = {}
    for argument, item in arguments.items():
        kind, where = kinds.get(argument, Any), f"{key}.{argument}"
        if isinstance(item, Mapping) and "name" in item and what != "method":
            read[argument] = _named(item, "reward", where, schema)  # a reward of rewards
        elif isinstance(item, Mapping):
            read[argument] = untyped(item, where)
        else:
            read[argument] = convert(item, kind, where, words=members(kind) <= {str, type(None)})
    return ({"name": name} if "name" in value else {}) | read


def _opened(value: Any, key: str) -> Any:
    """What a name or a dictionary is on the command line: ``classifier``, ``{name: classifier, target: Bag}``."""
    return scalar(str(value), key) if isinstance(value, Raw) else value


def _declared(what: str, name: str, schema: type) -> dict[str, Any]:
    """The types of the arguments of a named reward or method, those that it declares; a default's, where there is no more.

    Nothing where there is no such reward or method: whoever builds it says so.
    """
    from steerfm import rewards

    try:
        target: Any = rewards.find(name, what) if what != "method" or ":" in name else _methods(schema).get(name)
        parameters = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):
        return {}
    function = target.__init__ if isinstance(target, type) else target
    scope = vars(inspect.getmodule(target)) if inspect.getmodule(target) else {}
    scope = {**scope, **getattr(function, "__globals__", {})}
    kinds: dict[str, Any] = {}
    for parameter in parameters:
        kind = parameter.annotation
        if isinstance(kind, str):
            try:
                kind = eval(kind, dict(scope))
            except Exception:  # a name that only a type checker sees
                kind = Any
        if kind is parameter.empty:
            kind = type(parameter.default) if type(parameter.default) in (str, int, float, bool) else Any
            kind = int | float if kind is int else kind
        kinds[parameter.name] = kind
    return kinds


def _methods(schema: type) -> Mapping[str, type]:
    if schema is FinetuneConfig:
        from steerfm.finetuning import METHODS as TUNING

        return TUNING
    from steerfm.steering import METHODS

    return METHODS


# --- layers ----------------------------------------------------------------------------------------------------------
def _merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries key by key, the layer first; a new name drops the arguments of the old one."""
    out = dict(base)
    for key, given in layer.items():
        old, value = out.get(key), given
        if key in NAMED and isinstance(value, Raw):
            value = scalar(str(value), key)
        if key in NAMED and isinstance(value, str) and value != "auto":
            value = {"name": value}
        fresh = key in NAMED and isinstance(value, Mapping) and "name" in value
        if isinstance(value, Mapping):
            value = _merge(old if isinstance(old, Mapping) and not fresh else {}, value)
        out[key] = value
    return out


def _checked(layer: Any, schema: Any, prefix: str = "") -> dict[str, Any]:
    """The layer, its keys known, with the dictionaries that stand on the command line read.

    Raises:
        ConfigError: an unknown key, or something else where there are keys.
    """
    if not isinstance(layer, Mapping):
        raise ConfigError(f"'{prefix.rstrip('.')}' holds keys of its own: {', '.join(f.name for f in fields(schema))}")
    known, hints, out = {f.name: f for f in fields(schema)}, get_type_hints(schema), {}
    for key, given in layer.items():
        value = given
        if key not in known:
            raise ConfigError(f"unknown key '{prefix}{key}'{did_you_mean(key, known)}; keys: {', '.join(known)}")
        kind = hints[key]
        if isinstance(value, Raw) and (is_dataclass(kind) or get_origin(kind) is dict):
            value = flow(str(value), f"{prefix}{key}") if value[:1] in "[{" else str(value)
        if is_dataclass(kind):
            value = _checked(value, kind, f"{prefix}{key}.")
        elif get_origin(kind) is dict and not isinstance(value, Mapping):
            raise ConfigError(f"{prefix}{key}={shown(value)}: {wanted({kind})}")
        out[key] = value
    return out


def sequence(value: Any) -> Sequence[Any]:
    """A list, whether or not one was given."""
    return value if isinstance(value, list | tuple) else [value]
