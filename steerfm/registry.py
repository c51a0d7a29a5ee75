"""Names to objects, once, at the edge: what is behind this module takes objects only.

>>> build("funnel", METHOD)                                   # a name
>>> build({"name": "funnel", "particles": 8}, METHOD)         # a name and arguments
>>> build("my_file.py:Mine", METHOD)                          # code of one's own, or of a package that is made for steerfm
>>> build(Funnel(particles=8), METHOD)                        # an object stays as it is

`part` does so for the parts of a method, and `Named` is what constructors that take them have. A `Kind` stands beside what it
names: `steering.METHOD`, `finetuning.METHOD`, `zoo.MODEL`. Rewards can also be weighted and
listed: `rewards.build`.
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
    """A kind of things that have names.

    Attributes:
        what: it is called in messages and in configurations: "method".
        fits: whether an object, or the objects of a class, are of this kind.
        form: what they are, for messages: "a FlowMap".
        listed: what lists the names: "steerfm.methods()".
        named: classes, or objects, by name.
    """

    what: str
    fits: Callable[[Any], bool]
    form: str
    listed: str
    named: Mapping[str, Any] = field(default_factory=dict)


def build(spec: Any, kind: Kind, arguments: Mapping[str, Any] | None = None) -> Any:
    """The object that a name stands for.

    Args:
        spec: a name; {name: NAME, argument: value, ...}; FILE.py:NAME or package.module:NAME, of a class, a function that
            makes an object, or an object; or an object.
        kind: what it is to be.
        arguments: of the class or function, beside those of ``spec``.

    Raises:
        ConfigError: no such name or argument (with the nearest), a value that is refused, an object of another kind.
    """
    given = dict(arguments or {})
    if isinstance(spec, Mapping):
        spec, own = named(spec, kind.what)
        given = own | given
    if not isinstance(spec, str):
        if isinstance(spec, type) and kind.fits(spec):
            raise ConfigError(f"{kind.what}={spec.__name__} is a class: call it, {spec.__name__}(...)")
        if not kind.fits(spec):
            forms = f"give a name ({kind.listed} lists them), {{name: NAME, ...}}, FILE.py:NAME or {kind.form}"
            raise ConfigError(f"{kind.what}={spec!r}: {forms}")
        target = spec
    else:
        target = find(spec, kind)
    if not isinstance(target, type) and kind.fits(target):
        if given:
            raise ConfigError(f"{kind.what} {spec!r} is an object already, and takes no arguments: {', '.join(given)}")
        return target
    made = make(target, given, kind.what)
    if not kind.fits(made):
        raise ConfigError(f"{kind.what} {spec!r} makes a {type(made).__name__}: {kind.form} is needed")
    return made


def find(name: str, kind: Kind) -> Any:
    """What a name stands for: a class, a function that makes an object, or an object; nothing is made.

    Raises:
        ConfigError: there is none; with the nearest.
    """
    if not is_code(name):
        if name in kind.named:
            return kind.named[name]
        known = f"{kind.what}s: {', '.join(kind.named)}; your own: FILE.py:NAME"
        raise ConfigError(f"unknown {kind.what} {name!r}{trust.nearest(name, kind.named)}; {known}")
    try:
        with untouched():
            target = trust.load(name, kind.what)
    except trust.CodeError as error:
        raise ConfigError(str(error)) from error.__cause__
    makes = callable(target) and not isinstance(target, type | nn.Module) and trust.is_own(name)  # of packages only what fits
    if not (kind.fits(target) or makes):
        raise ConfigError(f"{kind.what} {name!r} is not {kind.form}, nor a function of yours that makes one")
    return target


def is_code(name: str) -> bool:
    """Whether a name is FILE.py:NAME or package.module:NAME."""
    _, colon, attribute = name.rpartition(":")
    return bool(colon) and not {"/", "\\"} & set(attribute) and not attribute.endswith(".safetensors")


def named(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a name or of {name: NAME, argument: value, ...}.

    Raises:
        ConfigError: no name.
    """
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{what} needs a name: {what}=NAME")
    return value["name"], {str(key): item for key, item in value.items() if key != "name"}


def make(target: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """What a class or function makes of its arguments.

    Raises:
        ConfigError: unknown argument (with the nearest), refused value, or whatever else it fails with.
    """
    if isinstance(target, type) and is_dataclass(target):
        known = [f.name for f in fields(target) if f.init]
    else:
        parameters = inspect.signature(target).parameters.values()
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            known += arguments
    for key in arguments:
        if key not in known:
            listed = f"keys: {', '.join(known) or 'none'}"
            raise ConfigError(f"unknown key '{what}.{key}'{trust.nearest(key, known)}; {listed}")
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
    except (OSError, ImportError):
        raise  # they say themselves what is missing
    except Exception as error:  # of code of one's own
        name = getattr(target, "__name__", type(target).__name__)
        raise ConfigError(f"{what}: {name} fails with {type(error).__name__}: {error}") from error


# --- parts -----------------------------------------------------------------------------------------------------------
def part(value: Any, table: Mapping[str, Any], what: str, default: Any = None) -> Any:
    """A part of a method.

    Args:
        value: its name; a dictionary of its arguments, with its ``name`` if it is not the default; or the part itself.
        table: parts by name, or their classes.
        what: it is, for errors.
        default: the part whose arguments a dictionary without a name changes.

    Raises:
        ValueError: no such part or argument; with those that there are.
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
    made = default if name is None else table[name]
    if made is None:
        raise ValueError(f"{what}={value}: this method has none by default: give it a name, {what}.name={'|'.join(table)}")
    known = [f.name for f in fields(made) if f.init] if is_dataclass(made) else []
    for key in arguments:
        if key not in known:
            raise ValueError(f"{what} has no argument {key!r}; arguments: {', '.join(known) or 'none'}")
    try:
        return made(**arguments) if isinstance(made, type) else replace(made, **arguments) if arguments else made
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def default(cls: type, name: str) -> Any:
    """The default of a field of a dataclass."""
    own = cls.__dataclass_fields__[name]
    return own.default if own.default_factory is MISSING else own.default_factory()


def objects(
    cls: type,
    given: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, Any]],
    short: Mapping[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Any]:
    """The arguments of a class with objects in place of names of parts, its defaults among them.

    Args:
        cls: a dataclass, whose own parts a dictionary of arguments changes.
        given: arguments by name.
        tables: what names stand for, by argument.
        short: what may stand for a part beside that, by argument: a number, the name of a scheme.
    """

    def resolved(key: str, value: Any, own: Any = None) -> Any:
        return part(short[key](value) if short and key in short else value, tables[key], key, own)

    usual = {key: resolved(key, default(cls, key)) for key in tables}
    return usual | {key: resolved(key, value, usual[key]) if key in tables else value for key, value in given.items()}


class Arguments(inspect.Signature):
    """A signature that prints an argument a line."""

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
"""Methods of a method that nobody calls by hand: `steering.Method` and `steerfm bench` say what they do."""


class Readable(type):
    """Dataclasses whose ``help`` is a screen: the docstring, an argument a line, and what the class adds to those that it is
    made from. Its objects complete as any others do."""

    def __dir__(cls) -> list[str]:
        made: Any = cls
        own = {name for name in vars(cls) if not name.startswith("_")} - {each.name for each in fields(made)}
        inherited = {name for base in cls.__mro__[1:] for name, value in vars(base).items() if not isinstance(value, str)}
        return sorted(own - inherited - CALLED_BY_STEER)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of ``__init__``, which is more than ``*args, **kwargs``."""
        made: Any = cls
        of = {each.name: each for each in fields(made) if each.init}
        whole = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return Arguments(
            [
                one.replace(default=default(made, one.name))
                if one.name in of and of[one.name].default_factory is not MISSING
                else one
                for one in whole
            ]
        )


class Named(Readable):
    """Constructors that take a part, its name, or a dictionary of its arguments; behind them there are objects only.

    A class of this kind is a dataclass with a class method ``resolve``, from the arguments as given to those of ``__init__``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = cls
        names = [each.name for each in fields(made) if each.init]
        first = [each.name for each in fields(made) if each.init and not each.kw_only]
        positional = dict(zip(first, args))
        for key in kwargs:
            if key not in names:
                raise TypeError(f"{cls.__name__} takes no {key}{trust.nearest(key, names)}; it takes {', '.join(names)}")
        if len(args) > len(first) or positional.keys() & kwargs.keys():
            return super().__call__(*args, **kwargs)  # which says what is wrong
        return super().__call__(**cls.resolve(positional | kwargs))

    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        return given
