"""Typed configurations: dataclasses <- yaml <- dotted overrides.

>>> config = load(TrainConfig, "fashion", ["optimizer.lr=5e-4"])      # a recipe in configs/train, a path, or None

The command line takes precedence over yaml, and yaml over the defaults. The error for an unknown key suggests the nearest one.

The value after ``key=`` is parsed by the type of the key. A text (prompts, labels, names, paths, arguments of a reward that are
declared ``str``) is used literally: ``12:30``, ``no``, ``a dog #1`` and ``${HOME}`` are words.
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

from steerfm.cli.config import NAME_KEYS, FinetuneConfig, SpreadConfig, TrainConfig, TuneTrainerConfig
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
    """Load a configuration from defaults, a yaml file or recipe, and ``key.sub=value`` overrides, in rising precedence.

    Args:
        schema: a dataclass of `steerfm.cli.config`.
        source: path of a yaml file, name of a recipe in ``configs/<kind>``, a dictionary, or an OmegaConf object, for
            example from Hydra (``${...}`` in it is text, as in yaml); None for the defaults.
        overrides: strings ``key=value``. Values are parsed by the type of the key, and texts are used literally.
        kind: folder of the recipes; by default from the name of the schema.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of range, or there is no such recipe.
    """
    layers: list[Mapping[str, Any]] = []
    omegaconf = sys.modules.get("omegaconf")  # slow to import; whoever passes an object of it has imported it
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
        merged = _merge(merged, _validate(layer, schema))
    return make(schema, merged)


def make(schema: type[Schema], values: Mapping[str, Any], prefix: str = "") -> Schema:
    """Build a configuration from a dictionary; missing values are the defaults.

    Raises:
        ConfigError: as for `load`; ``prefix`` stands before the keys in the message.
    """
    return schema(**_values(schema, _validate(values, schema, prefix), prefix))


def dump(config: Any) -> str:
    """Return a configuration as yaml."""
    return write_yaml(asdict(config))


def config_yaml(config: Any) -> str:
    """Return a configuration as the yaml that a run folder stores.

    It leaves out ``force``, so that loading it again deletes nothing, and the number of processes.
    """
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
    """Return a configuration as plain dictionaries and lists."""
    return asdict(config)


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any, Any]]:
    """Yield (dotted name, field, type, default) of every key of a schema, with the keys of a section after the section."""
    hints, defaults = get_type_hints(schema), schema()
    for f in fields(schema):
        kind = hints[f.name]
        yield f"{prefix}{f.name}", f, kind, getattr(defaults, f.name)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from keys(kind, f"{prefix}{f.name}.")


def explain(schema: type) -> str:
    """Return one line per key: name and default as on the command line, meaning, and type and range in words."""
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
    """Return the shipped recipes of a command, by name."""
    return {path.stem: path for path in sorted((folder("configs") / kind).glob("*.yaml"))}


def find_recipe(source: str, kind: str) -> Path:
    """Return the path of a yaml file or of a shipped recipe.

    Raises:
        ConfigError: there is neither. The message lists the recipes.
    """
    if Path(source).is_file():
        return Path(source)
    names = recipes(kind)
    if source in names:
        return names[source]
    raise ConfigError(f"no file or recipe {source!r}{nearest(source, names)}; recipes: {', '.join(names) or 'none'}")


def _section(schema: Any, values: Any, key: str) -> dict[str, Any]:
    """Convert the values under a key of a dictionary to the types of a schema."""
    values = {} if values is None else _parse_mapping(values, key)
    return _values(schema, _validate(values, schema, f"{key}."), f"{key}.")


def _values(schema: Any, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert the values that are present to the types of their fields, and check their ranges."""
    hints = get_type_hints(schema)
    out: dict[str, Any] = {}
    for f in fields(schema):
        if f.name not in values:
            continue
        key, value, kind, of = f"{prefix}{f.name}", values[f.name], hints[f.name], f.metadata.get("of")
        if isinstance(kind, type) and is_dataclass(kind):
            value = make(kind, value, f"{key}.")
        elif f.name in NAME_KEYS:
            value = _with_arguments(value, f.name, key, schema)
            if f.name == "model" and isinstance(value, Mapping) and value.keys() == {"name"}:
                value = value["name"]
        elif of == "method":
            value = {name: _with_arguments(entry, of, f"{key}.{name}", schema, name) for name, entry in value.items()}
            for name, entry in value.items():
                if not (entry is None or isinstance(entry, str | Mapping)):
                    raise ConfigError(
                        f"{key}.{name}={as_yaml(entry)}: give a method's name, or {{name: NAME, ...its arguments}}"
                    )
        elif of is not None:
            value = {name: _section(of, entry, f"{key}.{name}") for name, entry in value.items()}
        else:
            value = convert(value, kind, key, words=f.name == "prompt")
        if "range" in f.metadata:
            f.metadata["range"].check(value, key)
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            choices, what = f.metadata["choices"], f.metadata["what"]
            plural = re.sub("y$", "ie", what or f.name) + "s"
            choices_text = f"{nearest(str(value), choices)}; {plural}: {', '.join(choices)}"
            raise ConfigError(f"unknown {what} {value!r}{choices_text}" if what else f"{key}={value}{choices_text}")
        if "form" in f.metadata and not re.fullmatch(f.metadata["form"][0], str(value)):
            raise ConfigError(f"{key}={value}: give {f.metadata['form'][1]}")
        if schema is TrainConfig and f.name == "name" and (set(str(value)) & set('/\\:*?"<>|$') or not str(value).strip(". ")):
            raise ConfigError(f"{key}={value}: use letters, digits, spaces and . _ - ( ) [ ], because files are named after it")
        out[f.name] = value
    return out


# --- names and their arguments ---------------------------------------------------------------------------------------
def _with_arguments(value: Any, what: str, key: str, schema: type, default: str = "") -> Any:
    """Convert the arguments of a named reward, judge, method or model to the types that it declares.

    Args:
        value: a name, a dictionary of a name and arguments, or a list of such terms.
        what: reward, judge, method or model.
        key: dotted key of the value, for messages.
        schema: schema of the configuration.
        default: name if the value has none.
    """
    if isinstance(value, list):
        return [_with_arguments(term, what, key, schema) for term in value]
    value = _parse_mapping(value, key)
    if not isinstance(value, Mapping):
        return untyped(value, key)
    name = value.get("name", default)
    name = str(name) if isinstance(name, Raw) else name
    arguments = {argument: item for argument, item in value.items() if argument != "name"}
    kinds: Mapping[str, Any] = {}
    if isinstance(name, str) and any(isinstance(item, Raw) or not isinstance(item, str) for item in arguments.values()):
        kinds = _argument_types(what, name, schema)
    typed_values = {}
    for argument, item in arguments.items():
        kind, where = kinds.get(argument, Any), f"{key}.{argument}"
        if isinstance(item, Mapping) and "name" in item and what != "method":
            typed_values[argument] = _with_arguments(item, "reward", where, schema)  # a reward of rewards
        elif isinstance(item, Mapping):
            typed_values[argument] = untyped(item, where)
        else:
            typed_values[argument] = convert(item, kind, where, words=members(kind) <= {str, type(None)})
    return ({"name": name} if "name" in value else {}) | typed_values


def _parse_mapping(value: Any, key: str) -> Any:
    """Parse a name or a dictionary from the command line: ``classifier``, ``{name: classifier, target: Bag}``."""
    return scalar(str(value), key) if isinstance(value, Raw) else value


def _argument_types(what: str, name: str, schema: type) -> dict[str, Any]:
    """Return the declared types of the arguments of a reward or method; without annotations, the types of the defaults.

    Empty if there is no such reward or method: building it raises the error.
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
def _merge(base: Mapping[str, Any], layer: Mapping[str, Any], name_keys: set[str] = NAME_KEYS) -> dict[str, Any]:
    """Merge a layer into a dictionary, key by key. A new name drops the arguments of the old one."""
    out = dict(base)
    for key, item in layer.items():
        old, value = out.get(key), item
        if key in name_keys and isinstance(value, Raw):
            value = _model(str(value)) if key == "model" else scalar(str(value), key)
        if key in name_keys and isinstance(value, str) and value != "auto":
            value = {"name": value}
        if key in name_keys and isinstance(value, Mapping) and isinstance(old, str):
            old = {"name": old}
        fresh = key in name_keys and isinstance(value, Mapping) and "name" in value
        if isinstance(value, Mapping):
            inner = name_keys - {"model"} if key in name_keys else name_keys  # a reward's own model= is an argument
            value = _merge(old if isinstance(old, Mapping) and not fresh else {}, value, inner)
        out[key] = value
    return out


def _model(text: str) -> Any:
    """Parse a model from the command line: a text, however it looks, except {name: NAME, argument: value}."""
    try:
        value = flow(text, "model") if text[:1] == "{" else None
    except ConfigError:
        value = None
    return value if isinstance(value, Mapping) and "name" in value else {"name": text}


def _validate(layer: Any, schema: Any, prefix: str = "") -> dict[str, Any]:
    """Check the keys of a layer, and parse dictionaries from the command line.

    Raises:
        ConfigError: a key is unknown, or a section is not a dictionary.
    """
    if not isinstance(layer, Mapping):
        raise ConfigError(f"'{prefix.rstrip('.')}' is a section with the keys {', '.join(f.name for f in fields(schema))}")
    fields_by_name, hints, out = {f.name: f for f in fields(schema)}, get_type_hints(schema), {}
    for key, item in layer.items():
        value = item
        if key not in fields_by_name:
            raise ConfigError(f"unknown key '{prefix}{key}'{nearest(key, fields_by_name)}; keys: {', '.join(fields_by_name)}")
        kind = hints[key]
        if isinstance(value, Raw) and (is_dataclass(kind) or get_origin(kind) is dict):
            value = flow(str(value), f"{prefix}{key}") if value[:1] in "[{" else str(value)
        if is_dataclass(kind):
            value = _validate(value, kind, f"{prefix}{key}.")
        elif get_origin(kind) is dict and not isinstance(value, Mapping):
            raise ConfigError(f"{prefix}{key}={as_yaml(value)}: {advice({kind})}")
        out[key] = value
    return out


def sequence(value: Any) -> Sequence[Any]:
    """Return a list or tuple as it is, and any other value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]
