"""Build objects from names and configurations, once, at the edge: all other modules take objects only.

>>> build("funnel", METHOD)                                   # a name
>>> build({"name": "funnel", "particles": 8}, METHOD)         # a name and arguments
>>> build("my_file.py:Mine", METHOD)                          # user code, or a package for steerfm
>>> build(Funnel(particles=8), METHOD)                        # an object is returned as it is

`part` builds the parts of a method; the metaclass `TakesNames` lets constructors accept such parts. Each `Kind` is defined next
to its classes: `steering.METHOD`, `finetuning.METHOD`, `zoo.MODEL`. For rewards, with weights and lists, see `rewards.build`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import nn

from steerfm import trust
from steerfm.randomness import untouched
from steerfm.values import ConfigError


@dataclass(frozen=True)
class Kind:
    """A kind of objects that have names.

    Attributes:
        what: its word in messages and configurations: "method".
        fits: whether an object, or the objects of a class, are of this kind.
        form: description for messages: "a FlowMap".
        listing: the command or call that lists the names: "steerfm.methods()".
        table: classes, or objects, by name.
    """

    what: str
    fits: Callable[[Any], bool]
    form: str
    listing: str
    table: Mapping[str, Any] = field(default_factory=dict)


def build(spec: Any, kind: Kind, arguments: Mapping[str, Any] | None = None) -> Any:
    """Build an object from a name.

    Args:
        spec: a name; {name: NAME, argument: value, ...}; FILE.py:NAME or package.module:NAME of a class, a function that
            makes an object, or an object; or an object.
        kind: the kind of the object.
        arguments: of the class or function, in addition to those in ``spec``.

    Raises:
        ConfigError: an unknown name or argument (the message suggests the nearest), an invalid value, or an object of another
            kind.
    """
    all_arguments = dict(arguments or {})
    if isinstance(spec, Mapping):
        spec, own = split_spec(spec, kind.what)
        all_arguments = own | all_arguments
    if not isinstance(spec, str):
        if isinstance(spec, type) and kind.fits(spec):
            raise ConfigError(f"{kind.what}={spec.__name__} is a class: call it, {spec.__name__}(...)")
        if not kind.fits(spec):
            forms = f"give a name ({kind.listing} lists them), {{name: NAME, ...}}, FILE.py:NAME or {kind.form}"
            raise ConfigError(f"{kind.what}={spec!r}: {forms}")
        target = spec
    else:
        target = find(spec, kind)
    if not isinstance(target, type) and kind.fits(target):
        if all_arguments:
            raise ConfigError(f"{kind.what} {spec!r} is an object and takes no arguments: {', '.join(all_arguments)}")
        return target
    out = make(target, all_arguments, kind.what)
    if not kind.fits(out):
        raise ConfigError(f"{kind.what} {spec!r} makes a {type(out).__name__}: {kind.form} is needed")
    return out


def find(name: str, kind: Kind) -> Any:
    """The class, function or object of a name, without calling it.

    Raises:
        ConfigError: there is none; the message suggests the nearest name.
    """
    if not is_code(name):
        if name in kind.table:
            return kind.table[name]
        choices = f"{kind.what}s: {', '.join(kind.table)}; your own: FILE.py:NAME"
        raise ConfigError(f"unknown {kind.what} {name!r}{trust.nearest(name, kind.table)}; {choices}")
    try:
        with untouched():
            target = trust.load(name, kind.what)
    except trust.CodeError as error:
        raise ConfigError(str(error)) from error.__cause__
    makes = callable(target) and not isinstance(target, type | nn.Module) and trust.is_own(name)  # user code only
    if not (kind.fits(target) or makes):
        raise ConfigError(f"{kind.what} {name!r} is not {kind.form}, and not your own function that makes one")
    return target


def is_code(name: str) -> bool:
    """Whether a name is FILE.py:NAME or package.module:NAME."""
    _, colon, attribute = name.rpartition(":")
    return bool(colon) and not {"/", "\\"} & set(attribute) and not attribute.endswith(".safetensors")


def split_spec(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a spec: a name, or {name: NAME, argument: value, ...}.

    Raises:
        ConfigError: there is no name.
    """
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{what} needs a name: {what}=NAME")
    return value["name"], {str(key): item for key, item in value.items() if key != "name"}


def make(target: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """Call a class or function.

    Raises:
        ConfigError: an unknown argument (the message suggests the nearest), an invalid value, or any other failure.
    """
    if isinstance(target, type) and is_dataclass(target):
        keys = [f.name for f in fields(target) if f.init]
    else:
        parameters = inspect.signature(target).parameters.values()
        keys = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            keys += arguments
    for key in arguments:
        if key not in keys:
            choices = f"keys: {', '.join(keys) or 'none'}"
            raise ConfigError(f"unknown key '{what}.{key}'{trust.nearest(key, keys)}; {choices}")
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
    except (OSError, ImportError):
        raise  # their messages name what is missing
    except Exception as error:  # from user code
        name = getattr(target, "__name__", type(target).__name__)
        raise ConfigError(f"{what}: {name} fails with {type(error).__name__}: {error}") from error


# --- parts -----------------------------------------------------------------------------------------------------------
def part(value: Any, table: Mapping[str, Any], what: str, default: Any = None) -> Any:
    """Build a part of a method.

    Args:
        value: its name; a dictionary of its arguments, with its ``name`` if it is not the default; or the part itself.
        table: parts, or their classes, by name.
        what: kind of part, for errors.
        default: the part that a dictionary without a name changes.

    Raises:
        ValueError: there is no such part or argument; the message lists them.
    """
    if isinstance(value, int | float | Sequence) and not isinstance(value, str):
        names = f" ({', '.join(table)})" if table else ""
        raise ValueError(f"{what}={value}: give a name{names} or a dictionary of arguments")
    if not isinstance(value, str | Mapping):
        return value
    arguments = {} if isinstance(value, str) else dict(value)
    name = value if isinstance(value, str) else arguments.pop("name", None)
    if name is not None and name not in table:
        raise ValueError(f"unknown {what} {name!r}; {what}s: {', '.join(table)}")
    base = default if name is None else table[name]
    if base is None:
        raise ValueError(f"{what}={value}: this method has none by default: give it a name, {what}.name={'|'.join(table)}")
    keys = [f.name for f in fields(base) if f.init] if is_dataclass(base) else []
    for key in arguments:
        if key not in keys:
            raise ValueError(f"{what} has no argument {key!r}; arguments: {', '.join(keys) or 'none'}")
    try:
        return base(**arguments) if isinstance(base, type) else replace(base, **arguments) if arguments else base
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def default(cls: type, name: str) -> Any:
    """The default of a field of a dataclass."""
    own = cls.__dataclass_fields__[name]
    return own.default if own.default_factory is MISSING else own.default_factory()


def usual(cls: Any, name: str) -> Any:
    """The default of an argument of a class with ``resolve``, as an object."""
    return cls.resolve({}).get(name, default(cls, name))


def brief(thing: Any, always: Sequence[str]) -> str:
    """A short repr for classes with ``resolve``: the settings in ``always``, and those that differ from the defaults."""
    settings = []
    for name in (each.name for each in fields(thing) if each.init):
        value = getattr(thing, name)
        if name in always or value != usual(type(thing), name):
            settings.append(f"{name}={getattr(value, '__name__', None) or repr(value)}")
    return f"{type(thing).__name__}({', '.join(settings)})"


def objects(
    cls: type,
    arguments: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, Any]],
    short: Mapping[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Any]:
    """The arguments of a class, with its defaults, and with objects in place of names of parts.

    Args:
        cls: a dataclass; a dictionary of arguments changes its default parts.
        arguments: by name.
        tables: parts by name, for each argument that takes one.
        short: conversions of short forms of parts, by argument, such as a number or the name of a scheme.
    """

    def resolve(key: str, value: Any, own: Any = None) -> Any:
        return part(short[key](value) if short and key in short else value, tables[key], key, own)

    usual = {key: resolve(key, default(cls, key)) for key in tables}
    return usual | {key: resolve(key, value, usual[key]) if key in tables else value for key, value in arguments.items()}


class Arguments(inspect.Signature):
    """A signature that prints one argument per line."""

    def __str__(self) -> str:
        lines, keyword = [], False
        for one in self.parameters.values():
            if one.kind is one.KEYWORD_ONLY and not keyword:
                lines, keyword = [*lines, "*"], True
            kind = "" if one.annotation is one.empty else f": {str(one.annotation).strip(chr(39))}"
            lines.append(
                f"{one.name}{kind}"
                + ("" if one.default is one.empty else f" = {getattr(one.default, '__name__', None) or repr(one.default)}")
            )
        return "".join(["(", *(f"\n    {line}," for line in lines), "\n)"])


CALLED_BY_STEER = {"check", "run", "sized", "least", "fit", "shape"}
"""Members of a method that users do not call: see `steering.Method` and `steerfm bench`."""


class Readable(type):
    """Metaclass of dataclasses with a short ``help``: the docstring, one argument per line, and only the class's own members.
    Completion of their objects is not affected."""

    def __dir__(cls) -> list[str]:
        kind: Any = cls
        own = {name for name in vars(cls) if not name.startswith("_")} - {each.name for each in fields(kind)}
        bases = {name for base in cls.__mro__[1:] for name, value in vars(base).items() if not isinstance(value, str)}
        return sorted(own - bases - CALLED_BY_STEER)

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``, in place of ``*args, **kwargs``."""
        kind: Any = cls
        of = {each.name: each for each in fields(kind) if each.init}
        whole = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return Arguments(
            [
                one.replace(default=default(kind, one.name))
                if one.name in of and of[one.name].default_factory is not MISSING
                else one
                for one in whole
            ]
        )


class TakesNames(Readable):
    """Metaclass whose constructors accept a part, its name, or a dictionary of its arguments.

    The class is a dataclass with a class method ``resolve``, which converts the arguments to those of ``__init__``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        kind: Any = cls
        names = [each.name for each in fields(kind) if each.init]
        first = [each.name for each in fields(kind) if each.init and not each.kw_only]
        positional = dict(zip(first, args))
        for key in kwargs:
            if key not in names:
                raise TypeError(f"{cls.__name__} takes no {key}{trust.nearest(key, names)}; it takes {', '.join(names)}")
        if len(args) > len(first) or positional.keys() & kwargs.keys():
            return super().__call__(*args, **kwargs)  # raises the error
        return super().__call__(**cls.resolve(positional | kwargs))

    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments
