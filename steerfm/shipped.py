"""What ships beside the code: recipes and prompts in configs, rewards to start from in examples, in a checkout benchmarks."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """A folder that ships: inside an installed package, or at the top of a checkout; it need not be there."""
    top = PACKAGE.parent
    in_checkout = (top / "pyproject.toml").is_file()  # elsewhere the folders beside the package are other people's
    return top / name if in_checkout and not (PACKAGE / name).is_dir() else PACKAGE / name


def example(path: Path) -> Path:
    """The file itself, or, where there is none, the one that ships by that name: ``examples/my_reward.py``."""
    if path.is_file() or path.parts[:1] != ("examples",) or ".." in path.parts:
        return path
    ours = folder("examples").joinpath(*path.parts[1:])
    return ours if ours.is_file() else path


def is_example(path: Path) -> bool:
    """Whether a file is one of those that ship."""
    return path.resolve().is_relative_to(folder("examples").resolve())
