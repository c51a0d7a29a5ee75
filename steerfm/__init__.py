"""steerfm: reward-guided steering and fine-tuning of flow maps.

>>> import steerfm
>>> fm = steerfm.load("fashion")
>>> rw = steerfm.reward("classifier", target="Bag")
>>> res = steerfm.steer(fm, rw, steerfm.FeynmanKac(particles=16, steps=8), n=4, seeds=0, strength=5.0)
>>> res.best().shape
torch.Size([4, 1, 28, 28])
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Names and modules are imported on first use, so that ``steerfm --help`` does not wait for torch."""
    if name == "__all__":
        return sorted(_names())
    if not name.startswith("_"):
        if name in _names():
            return getattr(import_module(_names()[name]), name)
        if name in _modules():
            return import_module(f"steerfm.{name}")
    raise AttributeError(f"module 'steerfm' has no attribute {name!r}{_near(name)}")


def __dir__() -> list[str]:
    return ["__all__", "__version__", *sorted({*_names(), *_modules()})]


@cache
def _names() -> dict[str, str]:
    """Public names, each with its module, from the one table of them: the stub beside this file."""
    import ast  # as little as can be is imported before it is needed
    from pathlib import Path

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
    lines = [line for line in stub.body if isinstance(line, ast.ImportFrom) and line.module]
    return {alias.name: str(line.module) for line in lines for alias in line.names}


@cache
def _modules() -> list[str]:
    from pkgutil import iter_modules

    return [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]


def _near(name: str) -> str:
    from difflib import get_close_matches

    near = [] if name.startswith("_") else get_close_matches(name, [*_names(), *_modules()], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
