"""What a suite of `steerfm bench` says, read and checked: its methods, the keys of its problems, its differences and shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from steerfm.cli.config import BenchConfig, SteerConfig
from steerfm.cli.parts import build_method
from steerfm.cli.standings import BASELINE
from steerfm.trust import nearest
from steerfm.values import ConfigError


def as_keys(arguments: Sequence[str]) -> list[str]:
    """``--workers N`` and ``--workers=N`` as the key that they are."""
    words = iter(arguments)
    told = [f"{word}={next(words, '')}" if word == "--workers" else word for word in words]
    return [word.removeprefix("--") if word.startswith("--workers=") else word for word in told]


def methods_of(config: BenchConfig) -> dict[str, Any]:
    """Name -> configuration, in order; best-of-n of the same map is always there."""
    made: dict[str, Any] = {}
    for name, told in config.methods.items():
        made[name] = {"name": name} | ({"name": told} if isinstance(told, str) else dict(told or {}))
    unknown = [name for name in config.only if name not in made]
    if unknown:
        raise ConfigError(f"only={unknown[0]}: no such method{nearest(unknown[0], made)}; methods: {', '.join(made)}")
    made = {name: told for name, told in made.items() if not config.only or name in config.only}
    if not baseline(made):
        made = {BASELINE: {"name": BASELINE, "steps": 1}} | made
    for told in made.values():
        build_method(told)  # a wrong one is refused before the others are measured
    return made


def check_difference(pair: Sequence[str], names: Sequence[str]) -> None:
    """Refuse what are not two methods of the suite."""
    for name in pair:
        if name not in names:
            raise ConfigError(f"difference: no method {name!r}{nearest(name, names)}; methods: {', '.join(names)}")
    if pair and (len(pair) != 2 or pair[0] == pair[1]):
        raise ConfigError(f"difference=[{', '.join(pair)}]: give two methods, [A, B]: {', '.join(names)}")


def baseline(methods: Mapping[str, Any]) -> str | None:
    """The name under which a suite has best-of-n."""
    return next((name for name, told in methods.items() if told["name"] == BASELINE), None)


TAKEN = ("reward", "judge", "label", "prompt", "negative", "strength", "n", "batch_size")
"""Keys of a problem; the others of a steering are those of the suite, or of a method."""


def check_keys(problems: Mapping[str, Any]) -> None:
    """Refuse keys of a steering that would do nothing in a problem."""
    ours = {field.name for field in fields(SteerConfig)}
    for name, told in problems.items():
        for key in told:
            if key in ours and key not in TAKEN:
                raise ConfigError(f"problems.{name}.{key} does nothing: a problem takes {', '.join(TAKEN)}")


def share_of(share: str) -> tuple[int, int]:
    """ "2/4" -> (1, 4)."""
    part, _, parts = share.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"share={share}: give for instance 2/4, the second of four processes")
    return int(part) - 1, int(parts)
