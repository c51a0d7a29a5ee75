"""What keeps the code readable: sizes, no cycles, no private names across files, a core that knows no data set."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "steerfm").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, IGNORES = 500, 50, 10
OTHERS = {"_apply", "_modules", "_defaults", "_disable_adapters", "_exit"}
"""Private names of torch, torchmetrics, peft and os, which have no public ones."""


def docstrings(tree: ast.AST) -> set[int]:
    """Lines of docstrings, and of tables: literals that are assigned in a module."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            text = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
            table = isinstance(part, ast.Assign | ast.AnnAssign) and isinstance(part.value, ast.Dict | ast.List | ast.Tuple)
            if text or (table and isinstance(node, ast.Module)):
                lines |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return lines


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(file): file for file in FILES}


def test_files_and_functions_fit_on_a_few_screens():
    long = []
    for file in FILES:
        tree, text = parsed(file), file.read_text()
        prose = docstrings(tree)
        if (size := len(text.splitlines()) - len(prose)) > LONGEST_FILE:
            long.append(f"{file.name}: {size} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) - docstrings(node)
                if len(lines) > LONGEST_FUNCTION:
                    long.append(f"{file.name}: {node.name} has {len(lines)} lines")
    assert not long


def test_no_private_name_crosses_a_file():
    """Neither imported, nor as an attribute of another file's objects."""
    crossing = []
    for file in FILES:
        tree, text = parsed(file), file.read_text()
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        defined |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steerfm"):
                crossing += [f"{file.name}: {alias.name}" for alias in node.names if re.match("_[^_]", alias.name)]
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in defined | OTHERS:
                crossing.append(f"{file.name}: {ast.unparse(node)}")
        assert "object.__setattr__" not in text, file
    assert not crossing


def imports(file: Path) -> set[str]:
    """Modules of steerfm that a file needs to be imported itself, those for type checkers included."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If):
                visit(node.body + node.orelse)
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names if alias.name in MODULES)
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found.update(inner & MODULES.keys() or {str(node.module)})

    visit(parsed(file).body)
    return found - {name(file)}


def test_there_is_no_circle_of_imports():
    """A package's own `__init__` collects its files: it counts as what it is imported as, not as the files' parent."""
    needs = {module: imports(file) for module, file in MODULES.items()}
    left = dict(needs)
    while left:
        free = [module for module, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {', '.join(sorted(left))}"
        for module in free:
            del left[module]


def test_types_are_mended_and_not_ignored():
    found = [
        f"{file.name}: {line.strip()}" for file in FILES for line in file.read_text().splitlines() if "type: ignore" in line
    ]
    assert len(found) <= IGNORES, "\n".join(found)


def test_files_of_tests_differ_in_name():
    """pytest imports them by name, whatever their folder."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
