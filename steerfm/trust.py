"""Code by name: which imports a name such as ``my_file.py:red`` or ``my_package.rewards:Red`` may trigger.

A name can come from a configuration by somebody else, so it must not reach all of Python. See SECURITY.md for the rules.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from steerfm import shipped

OURS = ("steerfm", "steerfm_rewards")


class CodeError(ValueError):
    """An invalid name; the message is one line and names the fix."""


def load(spec: str, what: str) -> Any:
    """The object behind ``path/to/file.py:name`` or ``pkg.mod:name``; this runs the file or module.

    Args:
        spec: a user's file or module, or a module of an installed package for steerfm.
        what: kind of object, for the message: ``reward``, ``method``.

    Raises:
        CodeError: there is no such file, module or name, or the code belongs to Python or to a package that is not for steerfm.
    """
    place, _, attribute = spec.rpartition(":")
    module = _run_file(Path(place), what) if place.endswith(".py") else _import(place, what)
    value = None if attribute.startswith("__") else getattr(module, attribute, None)
    if value is None:
        names = [name for name, member in vars(module).items() if callable(member) and not name.startswith("_")]
        raise CodeError(f"{place} has no {attribute!r}{nearest(attribute, names)}")
    _check_origin(spec, value, what)
    return value


def is_own(spec: str) -> bool:
    """Whether a spec for `load` is a user's file or module, and not part of an installed package."""
    place = spec.rpartition(":")[0]
    return place.endswith(".py") or _whose(place) == "own"


def _run_file(path: Path, what: str) -> ModuleType:
    path = shipped.example(path)
    if not path.is_file():
        raise CodeError(f"no such {what} file: {path}")
    if _in_python(path) and not shipped.is_example(path):
        raise CodeError(f"{path} belongs to Python or to an installed package: give a file of your own, path/to/file.py:name")
    _add_folder(path)
    loader = importlib.util.spec_from_file_location(f"steerfm_user_{path.stem}", path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[loader.name] = module  # dataclasses and pickle look the module of a class up by name
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CodeError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    return module


# --- neighbours of a file --------------------------------------------------------------------------------------------
_FOLDERS: dict[str, frozenset[str]] = {}
"""Folders of the files that have run, each with the modules that were loaded before. The last folder is searched first, and all
of them after those of Python and of packages."""


def neighbours(path: Path) -> list[Path]:
    """The neighbouring files that a file imports, directly or indirectly, without running them."""
    files, rest = {path.resolve()}, [path.resolve()]
    while rest:
        for name in _imports(rest.pop()):
            for file in (path.resolve().parent / f"{name}.py", *sorted((path.resolve().parent / name).glob("*.py"))):
                if file.is_file() and file not in files:
                    files.add(file)
                    rest.append(file)
    return sorted(files - {path.resolve()})


def _imports(path: Path) -> set[str]:
    """First parts of the names that a file imports; empty if it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}


def _add_folder(path: Path) -> None:
    """Let a file import its neighbours. They are read again each time, as the file itself is, and never shadow a package."""
    folders = list(_FOLDERS.items())
    for name in [
        name for name in sys.modules if any(name not in before and _lies_in(name, place) for place, before in folders)
    ]:
        del sys.modules[name]
    folder = str(path.resolve().parent)
    if folder in sys.path and folder not in _FOLDERS:  # already on Python's path
        return
    others = {other: before for other, before in _FOLDERS.items() if other != folder}
    before = _FOLDERS.get(folder, frozenset(sys.modules))
    sys.path[:] = [place for place in sys.path if place != folder and place not in others] + [folder, *others]
    _FOLDERS.clear()
    _FOLDERS.update({folder: before} | others)
    importlib.invalidate_caches()


def _lies_in(name: str, folder: str) -> bool:
    """Whether a module is a file in the folder, or a package directly in it."""
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and top not in OURS and Path(file) in (Path(folder, f"{top}.py"), Path(folder, top, "__init__.py"))


def _import(name: str, what: str) -> ModuleType:
    whose = _whose(name)
    if whose == "python":
        raise CodeError(f"{name} belongs to Python itself and has no {what}: give a file of your own, path/to/file.py:name")
    if whose == "package" and not _is_for_steerfm(name):
        raise CodeError(
            f"{name} belongs to an installed package that is not made for steerfm and has no {what}: "
            "give a file of your own, path/to/file.py:name"
        )
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise CodeError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _check_origin(spec: str, value: Any, what: str) -> None:
    """Refuse an object that the file or module imported from a place that is not allowed."""
    while isinstance(value, partial):
        value = value.func
    if not isinstance(value, type | FunctionType | BuiltinFunctionType | MethodType):
        return  # an instance, made in the file or module
    origin = getattr(value, "__module__", None) or "builtins"
    if origin in sys.modules and getattr(sys.modules[origin], "__spec__", None) is None:
        return  # a script, or a synthetic module
    whose = "own" if origin.startswith("steerfm_user_") else _whose(origin)
    if whose == "python" or (whose == "package" and not _is_for_steerfm(origin)):
        raise CodeError(
            f"{spec} is {origin}.{getattr(value, '__name__', '')}, which is no {what}: write a function of your own"
        )


# --- owners of code --------------------------------------------------------------------------------------------------
def _whose(name: str) -> str:
    """The owner of a module, without importing it: ``python``, ``package``, ``own``, or ``nobody`` if there is none."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return "python"
    if top in OURS:
        return "package"
    try:
        spec = _spec(top) if top else None
    except (ValueError, ImportError):  # a script, or a synthetic module
        return "own"
    if spec is None:
        return "nobody"
    places = [Path(place) for place in (*(spec.submodule_search_locations or ()), spec.origin) if place]
    if any(_in(place, _packages()) or _in_packages(place) for place in places):
        return "package"
    return "python" if any(_in_python(place) for place in places) else "own"


def _spec(top: str) -> ModuleSpec | None:
    """The spec of a module. Python's own search by path comes first, since other finders may have side effects: that of
    setuptools turns itself off for pip."""
    module = sys.modules.get(top)
    return (PathFinder.find_spec(top) if module is None else None) or importlib.util.find_spec(top)


def _is_for_steerfm(name: str) -> bool:
    """Whether a module's package is steerfm, depends on it, or has entry points for it."""
    top = name.partition(".")[0]
    if top in OURS:
        return True
    folders = [Path(folder) for folder in sys.path]
    for package in _distributions(tuple((path, path.stat().st_mtime_ns) for path in folders if path.exists())).get(top, ()):
        about = distribution(package)
        needs = {re.split(r"[^\w.-]", need, maxsplit=1)[0].lower() for need in about.requires or ()}
        if "steerfm" in needs or any(point.group.startswith("steerfm.") for point in about.entry_points):
            return True
    return False


@cache
def _distributions(folders: tuple[tuple[Path, int], ...]) -> Mapping[str, list[str]]:
    """The packages of each module: a second to read, so only where the folders of ``sys.path``, or their times, are new."""
    return packages_distributions()


def _in_python(path: Path) -> bool:
    """Whether a file belongs to this Python, to its packages, or to another Python on this machine."""
    path = path.resolve()
    standard = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")]
    return _in_packages(path) or _in(path, [*standard, *_packages()]) or bool(re.search(r"/lib\d*/python3", path.as_posix()))


def _packages() -> list[Path]:
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages(), *user]
    return [Path(path).resolve() for path in paths]


def _in_packages(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts))


def _in(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)


def nearest(word: str, choices: Iterable[str]) -> str:
    """The text `` (did you mean 'x'?)`` for the nearest choice, or an empty text."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
