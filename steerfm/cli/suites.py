"""Read and check a suite of `steerfm bench`: its methods, the keys of its problems, its difference and share."""

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
    """Convert ``--workers N`` and ``--workers=N`` to the key ``workers=N``."""
    words = iter(arguments)
    keys = [f"{word}={next(words, '')}" if word == "--workers" else word for word in words]
    return [word.removeprefix("--") if word.startswith("--workers=") else word for word in keys]


def methods_of(config: BenchConfig) -> dict[str, Any]:
    """Return the configuration of each method by name, in order. Best-of-n of the same map is always included."""
    methods: dict[str, Any] = {}
    for name, spec in config.methods.items():
        methods[name] = {"name": name} | ({"name": spec} if isinstance(spec, str) else dict(spec or {}))
    unknown = [name for name in config.only if name not in methods]
    if unknown:
        raise ConfigError(f"only={unknown[0]}: no such method{nearest(unknown[0], methods)}; methods: {', '.join(methods)}")
    methods = {name: spec for name, spec in methods.items() if not config.only or name in config.only}
    if not baseline(methods):
        methods = {BASELINE: {"name": BASELINE, "steps": 1}} | methods
    for spec in methods.values():
        build_method(spec)  # refuse an invalid method before anything is measured
    return methods


def check_difference(pair: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError unless ``pair`` is empty or names two methods of the suite."""
    for name in pair:
        if name not in names:
            raise ConfigError(f"difference: no method {name!r}{nearest(name, names)}; methods: {', '.join(names)}")
    if pair and (len(pair) != 2 or pair[0] == pair[1]):
        raise ConfigError(f"difference=[{', '.join(pair)}]: give two methods, [A, B]: {', '.join(names)}")


def baseline(methods: Mapping[str, Any]) -> str | None:
    """Return the name that a suite gives to best-of-n, or None."""
    return next((name for name, spec in methods.items() if spec["name"] == BASELINE), None)


TAKEN = ("reward", "judge", "label", "prompt", "negative", "strength", "n", "batch_size")
"""Keys of a problem. The other keys of `steerfm steer` are set by the suite or by a method."""


def check_keys(problems: Mapping[str, Any]) -> None:
    """Raise ConfigError for keys of `steerfm steer` that have no effect in a problem."""
    ours = {field.name for field in fields(SteerConfig)}
    for name, problem in problems.items():
        for key in problem:
            if key in ours and key not in TAKEN:
                raise ConfigError(f"problems.{name}.{key} does nothing: a problem takes {', '.join(TAKEN)}")


def share_of(share: str) -> tuple[int, int]:
    """Parse a share: "2/4" becomes (1, 4), the second of four parts.

    Raises:
        ConfigError: the share is not of this form.
    """
    part, _, parts = share.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"share={share}: give for example 2/4, the second of four processes")
    return int(part) - 1, int(parts)
