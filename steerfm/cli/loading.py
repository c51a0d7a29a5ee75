"""Typed configurations: dataclasses <- yaml <- dotted overrides. Only this file knows which name builds which class.

>>> config = load(TrainConfig, "fashion", ["optimizer.lr=5e-4"])      # a recipe in configs/train, a path, or None

Precedence: command line, then yaml, then the defaults below. An unknown key is an error that names the nearest one.

What is written behind ``key=`` is read by the type of its key. Where that is text (prompts, labels, names, paths, arguments
of a reward that are declared ``str``) it is taken as it stands: ``12:30``, ``no``, ``a dog #1`` and ``${HOME}`` are words.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

if TYPE_CHECKING:
    from omegaconf import DictConfig

from steerfm.cli.config import NAMED, FinetuneConfig, SpreadConfig, TrainConfig, TuneTrainerConfig
from steerfm.shipped import folder
from steerfm.trust import nearest
from steerfm.values import (
    ConfigError,
    Raw,
    advice,
    as_yaml,
    convert,
    flow,
    line,
    members,
    parse,
    read_yaml,
    scalar,
    type_words,
    untyped,
    write_yaml,
)

Schema = TypeVar("Schema")


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
    defaults: Any = schema()
    merged = asdict(defaults)
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
    """The configuration as a run folder keeps it, as yaml: to load it again deletes nothing, and who shares the work is no part
    of it."""
    values = asdict(replace(config, force=False))
    trainer = getattr(config, "trainer", None)
    if isinstance(trainer, SpreadConfig):
        del values["trainer"]
        values.pop("activation_checkpoints", None)
    if isinstance(trainer, TuneTrainerConfig):
        usual = asdict(TuneTrainerConfig())
        values["trainer"] |= {name: usual[name] for name in ("devices", "strategy")}
        del values["trainer"]["num_nodes"], values["trainer"]["activation_checkpoints"]
    return write_yaml(values)


def plain(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists."""
    return asdict(config)


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any, Any]]:
    """(dotted name, field, type, default) of every key of a schema, those of its sections behind the section."""
    hints, defaults = get_type_hints(schema), schema()
    for f in fields(schema):
        kind = hints[f.name]
        yield f"{prefix}{f.name}", f, kind, getattr(defaults, f.name)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from keys(kind, f"{prefix}{f.name}.")


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
    return {path.stem: path for path in sorted((folder("configs") / kind).glob("*.yaml"))}


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
    raise ConfigError(f"no file or recipe {source!r}{nearest(source, known)}; recipes: {', '.join(known) or 'none'}")


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
        if isinstance(kind, type) and is_dataclass(kind):
            value = make(kind, value, f"{key}.")
        elif f.name in NAMED:
            value = _named(value, f.name, key, schema)
            if f.name == "model" and isinstance(value, Mapping) and value.keys() == {"name"}:
                value = value["name"]
        elif of == "method":
            value = {name: _named(told, of, f"{key}.{name}", schema, name) for name, told in value.items()}
            for name, told in value.items():
                if not (told is None or isinstance(told, str | Mapping)):
                    raise ConfigError(
                        f"{key}.{name}={as_yaml(told)}: give a method's name, or {{name: NAME, ...its arguments}}"
                    )
        elif of is not None:
            value = {name: _section(of, told, f"{key}.{name}") for name, told in value.items()}
        else:
            value = convert(value, kind, key, words=f.name == "prompt")
        if "range" in f.metadata:
            f.metadata["range"].check(value, key)
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            choices, what = f.metadata["choices"], f.metadata["what"]
            plural = re.sub("y$", "ie", what or f.name) + "s"
            listed = f"{nearest(str(value), choices)}; {plural}: {', '.join(choices)}"
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
        what: reward, judge or method.
        default: name where the value has none.
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
def _merge(base: Mapping[str, Any], layer: Mapping[str, Any], named: set[str] = NAMED) -> dict[str, Any]:
    """Dictionaries key by key, the layer first; a new name drops the arguments of the old one."""
    out = dict(base)
    for key, given in layer.items():
        old, value = out.get(key), given
        if key in named and isinstance(value, Raw):
            value = _model(str(value)) if key == "model" else scalar(str(value), key)
        if key in named and isinstance(value, str) and value != "auto":
            value = {"name": value}
        if key in named and isinstance(value, Mapping) and isinstance(old, str):
            old = {"name": old}
        fresh = key in named and isinstance(value, Mapping) and "name" in value
        if isinstance(value, Mapping):
            inner = named - {"model"} if key in named else named  # a reward's own model= is an argument
            value = _merge(old if isinstance(old, Mapping) and not fresh else {}, value, inner)
        out[key] = value
    return out


def _model(text: str) -> Any:
    """What names a model on the command line: a text whatever it looks like, but for {name: NAME, argument: value}."""
    try:
        value = flow(text, "model") if text[:1] == "{" else None
    except ConfigError:
        value = None
    return value if isinstance(value, Mapping) and "name" in value else {"name": text}


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
            raise ConfigError(f"unknown key '{prefix}{key}'{nearest(key, known)}; keys: {', '.join(known)}")
        kind = hints[key]
        if isinstance(value, Raw) and (is_dataclass(kind) or get_origin(kind) is dict):
            value = flow(str(value), f"{prefix}{key}") if value[:1] in "[{" else str(value)
        if is_dataclass(kind):
            value = _checked(value, kind, f"{prefix}{key}.")
        elif get_origin(kind) is dict and not isinstance(value, Mapping):
            raise ConfigError(f"{prefix}{key}={as_yaml(value)}: {advice({kind})}")
        out[key] = value
    return out


def sequence(value: Any) -> Sequence[Any]:
    """A list, whether or not one was given."""
    return value if isinstance(value, list | tuple) else [value]
