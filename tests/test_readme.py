"""The README's commands and snippets are run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import steerfm
from steerfm import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("steerfm")])
def test_commands(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("reward=examples", f"reward={ROOT / 'examples'}") for word in shlex.split(command)]
    try:
        code = cli.main(words[1:])
    except SystemExit as end:  # of --help
        code = end.code
    assert not code, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda snippet: snippet.splitlines()[0][:30])
def test_snippets(snippet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_recipes_of_contributing():
    """A reward, a look-ahead, a method, a model and data of one's own, each below 20 lines of code, run as they stand."""
    snippets = blocks("python", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(snippets) >= 6 and all(len([line for line in snippet.splitlines() if line.strip()]) < 20 for snippet in snippets)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "CONTRIBUTING.md", "exec"), names)
    assert names["result"].samples.shape[:2] == (2, 8)
    flow_map = steerfm.GaussianMixture([[0.0]], [[1.0]]).flow_map()
    assert steerfm.steer(flow_map, lambda x: x[:, 0], names["method"], n=2).log_z is not None


def test_make_targets_exist():
    assert "bench-check" not in (ROOT / ".ci" / "run").read_text()  # a busy machine would fail it
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"`?make ([a-z]+)", README)
    assert named and set(named) <= set(targets)


@pytest.mark.slow
def test_the_demo(tmp_path):
    """`make demo` after the install: its script, from another folder."""
    demo = ROOT / "examples" / "demo.py"
    done = subprocess.run([sys.executable, str(demo)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "demo" / "demo.png").is_file() and "particles" in done.stdout


def test_the_version_stands_in_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and "\nversion = " not in project
    assert f"version: {steerfm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflows_name_no_host():
    files = [file for pattern in (".github/**/*.yml", ".pre-commit-config.yaml") for file in ROOT.glob(pattern)]
    assert len(files) >= 5
    for file in files:
        assert "http" not in file.read_text() and "--index" not in file.read_text() and yaml.safe_load(file.read_text())
