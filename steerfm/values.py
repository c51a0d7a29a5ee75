"""Values of configurations, in yaml and on the command line, with checks of their types and ranges."""

from __future__ import annotations

import copy
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

Section = TypeVar("Section")

Words = str | list[str] | None
"""One text or several, never converted; on the command line ``[a, b]`` is a list of texts."""


class ConfigError(ValueError):
    """An invalid configuration; the message is one line and names the fix."""


# --- bounds ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Range:
    """The valid numbers of a key. A list of numbers must not be empty, and each number must be in the range.

    Attributes:
        least: lower bound, included.
        most: upper bound, included.
        above: lower bound, not included.
        below: upper bound, not included.
        of: name of the counted things, for the message.
        off: whether 0 is valid as well.
        empty: message for an empty list.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    of: str = ""
    off: bool = False
    empty: str = "name at least one"

    def check(self, value: Any, key: str) -> None:
        """Raise a ConfigError unless the number, or every number of a list or dictionary, is in the range."""
        if value == []:
            raise ConfigError(f"{key}=[]: {self.empty}")
        if isinstance(value, list | dict):
            for item in value.values() if isinstance(value, dict) else value:
                self.check(item, key)
            return
        if value is None or isinstance(value, str) or (self.off and value == 0):  # a text is a word that the type allows
            return
        if not math.isfinite(value):
            raise ConfigError(f"{key}={value}: must be finite")
        if not (self.least <= value <= self.most and self.above < value < self.below):
            raise ConfigError(f"{key}={value}: {self.words()}")

    def words(self) -> str:
        """The range in words, for a message."""
        if self.of:
            return f"at least one {self.of} is needed" if self.least == 1 else f"at least {self.least:g} {self.of} are needed"
        return f"must be {self.limits()}"

    def limits(self) -> str:
        """The range in words: "above 0 and at most 1"."""
        parts = [
            f"{word} {_bound(bound)}"
            for word, bound in {"above": self.above, "at least": self.least, "below": self.below, "at most": self.most}.items()
            if math.isfinite(bound)
        ]
        return f"{'0, or ' if self.off else ''}{' and '.join(parts)}"


def _bound(bound: float) -> str:
    return "2^64 - 1" if bound == 2**64 - 1 else f"{bound:g}"


def option(default: Any, doc: str, **metadata: Any) -> Any:
    """A key of a configuration.

    Args:
        default: its default; every configuration gets its own copy of lists and dictionaries.
        doc: its meaning, in one line, with the unit. `config.explain` adds type, range and default.
        metadata: further conditions, see `config.make`.
    """
    metadata = {"doc": doc, **metadata}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type[Section]) -> Section:
    """A section of keys under one name; its documentation is that of its class."""
    return field(default_factory=kind, metadata={"doc": kind.__doc__})


def ranged(default: Any, doc: str, **limits: Any) -> Any:
    """A key with a `Range`."""
    return option(default, doc, range=Range(**limits))


def count(default: int, of: str, doc: str, least: int = 1) -> Any:
    """A key that is a number of things, at least ``least``."""
    return ranged(default, doc, least=least, of=of)


def share(default: float, doc: str) -> Any:
    """A key from 0 to 1."""
    return ranged(default, doc, least=0, most=1)


def positive(default: float | None, doc: str) -> Any:
    """A key above 0."""
    return ranged(default, doc, above=0)


def natural(default: float, doc: str) -> Any:
    """A key of at least 0."""
    return ranged(default, doc, least=0)


def finite(default: float | None, doc: str) -> Any:
    """A key of any finite number."""
    return ranged(default, doc)


def choice(default: str, *others: str, doc: str, what: str = "") -> Any:
    """A key with one of a few values."""
    return option(default, doc, choices=(default, *others), what=what)


def seed_field(doc: str = "of all random numbers") -> Any:
    """The key of a seed: 0 to 2^64 - 1."""
    return ranged(0, doc, least=0, most=2**64 - 1)


# --- the command line ------------------------------------------------------------------------------------------------
class Raw(str):
    """The text after ``key=`` on the command line; the type of the key decides how to read it."""


def parse(override: str) -> dict[str, Any]:
    """``a.b=value`` -> {"a": {"b": Raw(value)}}."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"cannot read {override!r}: overrides look like key=value or key.sub=value")
    nested: Any = Raw(text)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def flow(text: str, key: str) -> Any:
    """A list or dictionary on the command line.

    Raises:
        ConfigError: it cannot be read, or a colon has no blank after it: that makes ``a:b`` a name without a value.
    """
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"cannot read the value of '{key}={text}'") from None
    entries = value.items() if isinstance(value, dict) else ()
    joined = [str(name) for name, entry in entries if entry is None and ":" in str(name)]
    if joined:
        raise ConfigError(f"{key}={text}: put a blank after the colon: {joined[0].replace(':', ': ', 1)}")
    return value


def scalar(text: str, key: str) -> Any:
    """The value of a key of unknown type: null, true, false, a number, [...], {...}, or else a text."""
    words = {"null": None, "true": True, "True": True, "false": False, "False": False}
    if text in words:
        return words[text]
    if NUMBER.fullmatch(text):
        return float(text) if set(text) & set(".eE") else int(text)
    if (text[:1], text[-1:]) in (("[", "]"), ("{", "}")):
        return flow(text, key)
    return text


NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
SWITCH = {word: on for on, words in {True: "true yes on 1", False: "false no off 0"}.items() for word in words.split()}


def text_list(text: str, key: str) -> list[str] | None:
    """The texts of ``[a, b]``; None if the whole is one text, without [ at the start and ] at the end.

    Commas separate the texts. A text with a comma or a quote, or with a space at either end, needs quotes, as in JSON.

    Raises:
        ConfigError: the list or a text is empty.
    """
    if not (len(text) > 1 and text[0] == "[" and text[-1] == "]"):
        return None
    try:
        items = json.loads(text)
        if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
            return items
    except ValueError:
        pass
    items, rest = [], text[1:-1].strip()
    while True:
        match = ITEM.match(rest)
        assert match is not None  # it matches anything up to a comma
        quoted = match[1] or match[2]
        items.append((quoted or match[3]).strip() if quoted is None else quoted[1:-1].replace(quoted[0] * 2, quoted[0]))
        if match.end() == len(rest) and not match[0].endswith(","):
            break
        rest = rest[match.end() :]
    if not all(items):
        raise ConfigError(f"{key}={text}: an empty list or text; a list is [a, b], and [{json.dumps(text)}] is one text")
    return items


ITEM = re.compile(r"""\s*(?:("(?:[^"]|"")*")|('(?:[^']|'')*')|([^,]*?))\s*(?:,|$)""")
"""One text of a list, with the comma after it."""


# --- by type ---------------------------------------------------------------------------------------------------------
def members(kind: Any) -> set[Any]:
    """The members of a union, or the one type."""
    return set(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else {kind}


def convert(value: Any, kind: Any, key: str, words: bool = False) -> Any:
    """Convert a value to the type of its key.

    Args:
        value: from yaml, from Python, or `Raw` from the command line.
        kind: a type or a union; Any, and classes without a written form, accept every value.
        key: name of the key, for errors.
        words: accept texts only: ``null`` on the command line is a word, and numbers in yaml are refused.

    Raises:
        ConfigError: the value has another type.
    """
    kinds = members(kind)
    lists = {get_args(one)[0]: one for one in kinds if get_origin(one) in (list, Sequence) and get_args(one)}
    none = type(None) in kinds
    if isinstance(value, Raw):
        text = str(value)
        if text == "null" and none and not words:
            return None
        if str in lists:
            items = text_list(text, key)
            value = items if items is not None else [text] if str not in kinds else text
        elif kinds <= {str, type(None)}:
            value = text
        elif bool in kinds and text.lower() in SWITCH:
            value = SWITCH[text.lower()]
        elif str not in kinds and kinds & {int, float} and (number := _number(text, int in kinds)) is not None:
            value = number
        else:
            value = scalar(text, key)
    if isinstance(value, str) and any(value in _words_of(one) for one in kinds):
        return str(value)
    types = {int, float, bool, str, type(None), *lists.values(), *(one for one in kinds if _words_of(one))}
    if isinstance(value, Mapping) and any(get_origin(one) is dict for one in kinds):
        item = next(get_args(one)[1] for one in kinds if get_origin(one) is dict)
        return {str(name): convert(entry, item, f"{key}.{name}") for name, entry in value.items()}
    if (value is None and none) or (isinstance(value, bool) and bool in kinds):
        return value
    if isinstance(value, str) and str in kinds:
        return _utf8(value, key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if int in kinds and (isinstance(value, int) or value.is_integer()):
            return int(value)
        if float in kinds:
            return float(value)
        if str in kinds and isinstance(value, int) and not words:
            return str(value)
    if lists and value is not None:
        if isinstance(value, list | tuple):
            if not value and str in kinds:
                raise ConfigError(f"{key}=[]: name at least one")
            (item,) = lists
            with_index = bool(kinds & {int, float})  # a message about a list of numbers names the entry
            return [convert(entry, item, f"{key}[{i}]" if with_index else key, words) for i, entry in enumerate(value)]
        if not kinds & {str, int, float}:
            (item,) = lists
            return [convert(value, item, key, words)]
    if not kinds <= types and not any(get_origin(one) is dict for one in kinds):
        return untyped(value, key)
    raise ConfigError(f"{key}={as_yaml(value)}: {advice(kinds)}")


def _number(text: str, whole: bool) -> int | float | None:
    for kind in (int, float) if whole else (float,):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def untyped(value: Any, key: str) -> Any:
    """A value of unknown type, with texts from the command line converted."""
    if isinstance(value, Raw):
        value = scalar(str(value), key)
    if isinstance(value, Mapping):
        return {str(name): untyped(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [untyped(item, key) for item in value]
    return _utf8(value, key) if isinstance(value, str) else value


def _utf8(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key}={text.encode(errors='replace').decode()}: not UTF-8 text") from None
    return text


def as_yaml(value: Any) -> str:
    """A value in the notation of yaml."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def advice(kinds: set[Any]) -> str:
    """The advice for a value of the wrong type."""
    if str in kinds:
        return "not a text: write it in quotes"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    single = " or ".join(name for one, name in names.items() if one in kinds and not (one is float and int in kinds))
    words = [word for one in kinds for word in _words_of(one)]
    if single or words:
        lists = ["a list of numbers"] if any(get_origin(one) in (list, Sequence) for one in kinds) else []
        return f"give {', or '.join(filter(None, [single, *words, *lists]))}"
    for one in kinds:
        if get_origin(one) in (list, Sequence):
            return "give a list of texts" if get_args(one)[0] is str else "give a list of numbers"
        if get_origin(one) is dict:
            return "give keys and values, {name: value}"
    return "give something else"


def _words_of(kind: Any) -> tuple[str, ...]:
    """The words of a type such as ``Literal["auto"]``; none for other types."""
    words = get_args(kind) if get_origin(kind) is Literal else ()
    return words if all(isinstance(word, str) for word in words) else ()


def _either(words: list[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def type_words(kind: Any, limits: Range | None = None) -> str:
    """A type in plain words, with the range of its numbers: "whole number, at least 1"; "list of texts, or null"."""
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    of = {key: f"{name}s" for key, name in names.items()}
    words = []
    for one in sorted(members(kind) - {type(None)}, key=lambda one: (one is not str, str(one))):
        if get_origin(one) in (list, Sequence):
            words.append(f"list of {of[get_args(one)[0]]}")
        elif get_origin(one) is dict:
            words.append(f"{{name: {names.get(get_args(one)[1], '...')}}}")
        elif _words_of(one):
            words += _words_of(one)
        else:
            words.append(names.get(one, "name, or {name: NAME, ...}"))
    text = _either(words)
    if limits is not None and math.isfinite(limits.least) and math.isfinite(limits.most):
        text += f", {limits.least:g} to {_bound(limits.most)}"
    elif limits is not None and limits.limits():
        text += f", {limits.limits()}"
    return f"{text}, or null" if type(None) in members(kind) else text


# --- yaml ------------------------------------------------------------------------------------------------------------
LEAVES = 100_000
"""Most values in a file: with anchors, a few lines can expand without end."""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


class Loader(yaml.SafeLoader):
    """Reads numbers as people write them (``1e-3``; ``007`` and ``12:30`` are texts). Keys are texts, and none occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) < len(node.value) or len(set(keys)) < len(keys):
            problem = "a key must be a text" if len(keys) < len(node.value) else "a key occurs twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class Dumper(yaml.SafeDumper):
    """Quotes every text that this or another reader would not read as a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("int", "float"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
for _reader in (Loader, Dumper):
    _reader.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    )
Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^[yYnN]$"), list("yYnN"))


def read_yaml(path: Path) -> Any:
    """The content of a yaml file; an empty dictionary for an empty file.

    Raises:
        ConfigError: the file is not valid yaml.
    """
    try:
        content = yaml.load(path.read_bytes(), Loader)
        if sum(1 for _ in islice(_leaves(content), LEAVES)) == LEAVES:
            raise ValueError(f"it expands to more than {LEAVES:,} values")
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # yaml's own errors have several lines
        raise ConfigError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from None
    return {} if content is None else content


def write_yaml(value: Any) -> str:
    """Write dictionaries, lists and scalars as yaml that every reader understands in the same way."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def line(value: Any) -> str:
    """A value in one line, as it can follow ``key=``."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf).split(
        "\n"
    )[0]
