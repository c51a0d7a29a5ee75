"""The installed package: what is in it, and that recipes and examples work from it, in any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steerfm import cli, shipped

TOP = Path(__file__).parent.parent.parent


def wheel() -> dict[str, str]:
    """Folders beside the packages that go into the wheel, and where to."""
    if sys.version_info < (3, 11):
        pytest.skip("needs tomllib")
    import tomllib

    return tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Runs a command in an empty folder, from a package that is laid out as the wheel is."""
    site, empty = tmp_path / "lib" / "site-packages", tmp_path / "empty"
    empty.mkdir()
    (site / "steerfm").mkdir(parents=True)
    (site / "benchmarks").mkdir()  # somebody else's
    (site / "benchmarks" / "theirs.py").write_text("")
    for part in (TOP / "steerfm").iterdir():
        if part.suffix != ".pyc":
            (site / "steerfm" / part.name).symlink_to(part)
    for path in (site / "steerfm").glob("*.py"):  # a module lies where it is imported from
        target = path.resolve()
        path.unlink()
        shutil.copy(target, path)
    for source, target in wheel().items():
        shutil.copytree(TOP / source, site / target)
    others = os.pathsep.join(path for path in sys.path if path and Path(path).resolve() != TOP)

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{others}"}
        whole = [sys.executable, "-m", "steerfm", *command]
        return subprocess.run(whole, cwd=empty, env=environment, capture_output=True, text=True, check=False)

    return run


def test_recipes_and_examples_are_in_the_wheel_and_benchmarks_are_not():
    assert wheel() == {"configs": "steerfm/configs", "examples": "steerfm/examples"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["--config", "stripes", "method.steps=2"], ["reward=examples/my_reward.py:striped", "method=best_of_n", "label=Dress"]],
)
def test_examples_that_ship_work_from_an_empty_folder(installed, tmp_path, command):
    ran = installed("steer", *command, "n=1", "out=run")
    assert ran.returncode == 0, ran.stderr
    inputs = json.loads((tmp_path / "empty" / "run" / "inputs.json").read_text())
    assert any(name.endswith("examples/my_reward.py") and "site-packages" in name for name in inputs)


@pytest.mark.slow
def test_scripts_of_the_checkout_say_where_they_run(installed):
    for name in ("exact", "theirs"):
        ran = installed("bench", name)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "run them in a checkout" in ran.stderr
    listed = installed("bench").stdout
    assert "quick" in listed and "theirs" not in listed and "run them in a checkout" in " ".join(listed.split())


def test_an_own_file_comes_before_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("examples") / "my_reward.py"
    assert shipped.is_example(shipped.example(own))
    own.parent.mkdir()
    own.write_text("")
    assert shipped.example(own) == own and not shipped.is_example(own)


@pytest.mark.parametrize("name", ["examples/../pyproject.py:x", "examples/no_such.py:x", "other/my_reward.py:striped"])
def test_nothing_else_is_looked_for_among_the_examples(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["steer", f"reward={name}", "out=run"]) == 2
    assert f"no such reward file: {name.partition(':')[0]}" in capsys.readouterr().err
