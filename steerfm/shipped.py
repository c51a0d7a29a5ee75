"""Files that ship with the code: recipes and prompts in configs, sample rewards in examples, and benchmarks in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """A shipped folder: in the installed package, or at the top of a checkout. It may not exist."""
    top = PACKAGE.parent
    in_checkout = (top / "pyproject.toml").is_file()  # elsewhere the neighbouring folders belong to other packages
    return top / name if in_checkout and not (PACKAGE / name).is_dir() else PACKAGE / name


def example(path: Path) -> Path:
    """The file itself, or, if it does not exist, the shipped file of that name: ``examples/my_reward.py``."""
    if path.is_file() or path.parts[:1] != ("examples",) or ".." in path.parts:
        return path
    ours = folder("examples").joinpath(*path.parts[1:])
    return ours if ours.is_file() else path


def is_example(path: Path) -> bool:
    """Whether a file is a shipped example."""
    return path.resolve().is_relative_to(folder("examples").resolve())
