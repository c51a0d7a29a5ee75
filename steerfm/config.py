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
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

if TYPE_CHECKING:
    from omegaconf import DictConfig

from steerfm.values import (
    ConfigError,
    Range,
    Raw,
    Words,
    choice,
    convert,
    count,
    finite,
    flow,
    line,
    members,
    natural,
    option,
    parse,
    positive,
    ranged,
    read_yaml,
    scalar,
    section,
    seed_field,
    share,
    shown,
    type_words,
    untyped,
    wanted,
    write_yaml,
)

Schema = TypeVar("Schema")


# --- what can be configured ------------------------------------------------------------------------------------------
@dataclass
class DataConfig:
    """What a network is trained on."""

    name: str = option("fashion", "data set: fashion or emoji")
    batch_size: int = count(128, "picture", "pictures a step")
    root: str | None = option(None, "folder of the data's files; null for the usual ones")
    augment: int = natural(0, "largest random shift of a picture, in pixels")


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


DEVICES = (r"auto|-1|[1-9]\d*|\d+(,\d+)+", "auto, a number, or a list: 0,1")
"""What ``trainer.devices`` looks like, as an expression and in words."""


@dataclass
class LightningConfig:
    """Lightning's own keys, and how often to log and to save."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps", "tpu", doc="where to train")
    devices: str = option("auto", "how many devices, or which", form=DEVICES)
    strategy: str = option("auto", "Lightning's strategy for several devices, such as ddp")
    precision: str = choice("32-true", "32", "16-mixed", "bf16-mixed", doc="precision of the network")
    log_every: int = count(20, "step", "steps between lines of the log")
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
    text: str | None = option(None, "encoder of the captions that a flow map is asked in: an open_clip model, or minilm")
    init: str | None = option(None, "checkpoint to start from, a shipped model or a path; null for random weights")
    seed: int = seed_field("seed of weights, batches, noise and dropout")
    out: str | None = option(None, "run folder; null for runs/train/NAME")
    force: bool = option(False, FORCE)
    data: DataConfig = section(DataConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    trainer: TrainerConfig = section(TrainerConfig)


MODEL = "a shipped flow map (steerfm models) or a path to a .safetensors file of your own"
CODE = "a shipped flow map (steerfm models), a path to a .safetensors file, or FILE.py:NAME for a map that code makes"
REWARD = "what to raise: a name (steerfm rewards), FILE.py:NAME, or a list of {name, weight, ...}; reward.KEY sets an argument"
JUDGE = "a second, held-out reward for the report, written as reward; auto for one that fits, null for none"
GUIDANCE = "scale of classifier-free guidance; 1 for none, above 1 for stronger"
COMPILE = "compile the network by torch.compile: the first calls take a minute, later ones less"
DEVICE = "auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps"
PRECISION = "precision of network and reward"


@dataclass
class SampleConfig:
    """Unsteered samples."""

    model: str = option("fashion", CODE)
    label: str | None = option(None, "class by name or index; null for a mix of all")
    prompt: Words = option(None, "what to ask a map of words for: a text, a list of texts, or a file of them")
    n: int = count(16, "output", "samples, of each prompt where there are several")
    seeds: int = seed_field("seed of the first sample; the next have seeds + 1, seeds + 2, ...")
    steps: int = count(4, "step", "jumps from noise to data; each is one network call a sample")
    guidance: float = finite(1.0, GUIDANCE)
    device: str = option("auto", DEVICE)
    precision: str = choice("32", "bf16", doc=PRECISION, what="precision")
    compile: bool = option(False, COMPILE)
    out: str | None = option(None, "run folder; null for runs/sample/MODEL")
    force: bool = option(False, FORCE)


@dataclass
class SteerConfig:
    """A steering: samples of p(x) exp(strength * reward(x))."""

    model: str = option("fashion", CODE)
    reward: Any = option({"name": "classifier"}, REWARD)
    method: Any = option(
        {"name": "funnel"}, "a name (steerfm methods) or FILE.py:CLASS; method.KEY sets an argument (steerfm methods NAME)"
    )
    judge: Any = option("auto", JUDGE)
    label: str | None = option(
        None, "class that the model is asked for, by name or index; null for none, or for all in turn where the reward reads it"
    )
    prompt: Words = option(None, "for models and rewards that read words: a text, a list of texts, or a file of them")
    n: int = count(16, "output", "outputs, of each prompt where there are several; each has particles of its own")
    seeds: int = seed_field("seed of the first output; the next have seeds + 1, seeds + 2, ...")
    strength: float = finite(10.0, "how hard to tilt, in 1 / units of the reward; 0 is the model itself")
    guidance: float = finite(1.0, GUIDANCE)
    batch_size: int = count(16, "output", "outputs at a time: memory grows with it, results do not depend on it")
    device: str = option("auto", DEVICE)
    precision: str = choice("32", "bf16", doc=PRECISION, what="precision")
    compile: bool = option(False, COMPILE)
    lookaheads: bool = option(True, "keep and draw the first particle's look-aheads over time")
    out: str | None = option(None, "run folder; null for runs/steer/MODEL-REWARD-METHOD")
    force: bool = option(False, FORCE)


@dataclass
class EvaluateConfig:
    """A measurement of a flow map."""

    model: str = option("fashion", CODE)
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
    """Lightning's own keys, and how often to log and to save."""

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
    seeds: int = seed_field("seed of the first of these samples; the next have seeds + 1, seeds + 2, ...")
    floor: float = share(0.9, "share of the base's diversity and support that a model must keep to be chosen")
    patience: int = natural(8, "judgements without a better one before the run stops; 0 for never")
    report: int = ranged(
        0, "samples of the last table, from seeds that chose nothing; 0 for those that were watched", least=2, off=True
    )


@dataclass
class FinetuneConfig:
    """A fine-tuning."""

    model: str = option("fashion", MODEL)
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
    budgets: list[int] = option(
        [8, 32, 128], "network evaluations an output", range=Range(least=1, of="evaluation", empty=NOTHING)
    )
    strengths: list[float] = option([10.0], "strengths of the tilt, in 1 / units of the reward", range=Range())
    seeds: int = ranged(4, "repetitions; intervals need at least 4", least=1)
    n: int = count(8, "output", "outputs of a repetition, of each prompt")
    batch_size: int = count(16, "output", "outputs at a time: memory grows with it, results do not depend on it")
    share: str = option("1/1", "which part to measure: 2/4 is the second of four, for several processes on one folder")
    device: str = option("auto", DEVICE)
    out: str | None = option(None, "run folder; null for runs/bench/NAME")
    force: bool = option(False, FORCE)


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
    omegaconf = sys.modules.get("omegaconf")  # it is slow to import, and who has something of it has it
    if omegaconf is not None and omegaconf.OmegaConf.is_config(source):
        source = omegaconf.OmegaConf.to_container(source, resolve=False)
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


def kept(config: Any) -> str:
    """The configuration as a run folder keeps it, as yaml: to load it again deletes nothing."""
    return dump(replace(config, force=False))


def plain(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists."""
    return asdict(config)


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any, Any]]:
    """(dotted name, field, type, default) of every key of a schema, those of its sections behind the section."""
    hints, defaults = get_type_hints(schema), schema()
    for f in fields(schema):
        yield f"{prefix}{f.name}", f, hints[f.name], getattr(defaults, f.name)
        if is_dataclass(hints[f.name]):
            yield from keys(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]


def explain(schema: type) -> str:
    """A line a key: name and default as they are written on the command line, type and range in words, and what it means."""
    rows = []
    for name, f, kind, default in keys(schema):
        if is_dataclass(kind):
            rows.append((f"{name}.", f.metadata["doc"].rstrip(".")))
        else:
            choices, form = f.metadata.get("choices"), f.metadata.get("form")
            words = " | ".join(choices) if choices else form[1] if form else type_words(kind, f.metadata.get("range"))
            rows.append((f"{name}={line(default)}", f"{f.metadata['doc']} ({words})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


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
