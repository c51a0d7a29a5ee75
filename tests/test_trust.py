"""Configurations run nothing and read no environment variable; code by name comes from where the user says."""

from __future__ import annotations

import json
import pydoc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import steerfm
from steerfm import cli, registry, trust
from steerfm.cli import loading
from steerfm.cli.config import SteerConfig, TrainConfig
from steerfm.cli.parts import build_reward
from steerfm.cli.runs import inputs
from steerfm.rewards import RewardError
from steerfm.steering import METHOD
from steerfm.values import ConfigError

SECRET = "s3cret-of-the-environment"


# --- configurations --------------------------------------------------------------------------------------------------
CALLS = ["${oc.env:SECRET}", "a ${oc.env:SECRET} b", "${oc.env:SECRET,none}", "${ oc.env : SECRET}", "${oc.decode:'1'}",
         "${oc.select:model}", "${mine:3}", "${mine:}", "${${oc.env:SECRET}}", "${a.${oc.env:SECRET}}", "\\\\${oc.env:SECRET}",
         "${oc.dict.keys:reward}", "${model}${oc.env:SECRET}", "${oc.env:'SECRET'}"]  # fmt: skip


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "where", ["model: X", "reward: {name: clip, prompt: X}", "prompt: [a, X]", "judge: {name: clip, prompt: X}"]
)
def test_a_yaml_looks_nothing_up(tmp_path, call, where):
    """Words of OmegaConf, which read environment variables and run functions where it is used, stay words."""
    file = tmp_path / "run.yaml"
    file.write_text(where.replace("X", "'" + call.replace("'", "''") + "'"))
    made = loading.load(SteerConfig, str(file))
    assert call in json.dumps(loading.plain(made)).replace("\\\\", "\\")
    assert SECRET not in loading.dump(made) and loading.load(SteerConfig, dumped(tmp_path, made)) == made


def dumped(folder: Path, made: object) -> str:
    (folder / "dumped.yaml").write_text(loading.dump(made))
    return str(folder / "dumped.yaml")


@pytest.mark.parametrize("key", ["model", "reward.target", "label", "method", "judge"])
def test_nor_does_the_command_line(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for call in ("${oc.env:SECRET}", "x${oc.env:SECRET}", "${mine:1}"):
        assert cli.main(["steer", f"{key}={call}"]) == 2
    said = "".join(capsys.readouterr())
    assert SECRET not in said and said.count("error: ") == 3 and said.count("\n") == 3 and not list(tmp_path.iterdir())


def test_nor_does_a_run_folder(tmp_path):
    """`train` reads the config.yaml of the folder that it continues."""
    file = tmp_path / "config.yaml"
    file.write_text("init: ${oc.env:SECRET}\n")
    assert loading.load(TrainConfig, str(file)).init == "${oc.env:SECRET}"


# --- code ------------------------------------------------------------------------------------------------------------
HOSTILE = [
    {"name": "pydoc:pipepager", "cmd": "touch ran"}, {"name": "os:system"}, {"name": "posix:system"}, {"name": "nt:system"},
    {"name": "subprocess:run"}, {"name": "subprocess:Popen"}, {"name": "builtins:eval"}, {"name": "builtins:exec"},
    {"name": "functools:partial"}, {"name": "os.path:exists"}, {"name": "shutil:rmtree"}, {"name": "pickle:loads"},
    {"name": "importlib:import_module"}, {"name": "antigravity:geohash"}, {"name": "this:s"}, {"name": "webbrowser:open"},
    {"name": "idlelib.idle:x"}, {"name": "test.support:run"}, {"name": "_io:open"}, {"name": "ctypes:CDLL"},
    {"name": "torch:load"}, {"name": "torch:save", "f": "ran"}, {"name": "torch.hub:load", "model": "x"},
    {"name": "numpy:fromfile"}, {"name": "numpy:save", "arr": 1}, {"name": "torchvision.utils:save_image", "fp": "ran"},
    {"name": "torch.nn:Flatten"}, {"name": "omegaconf:OmegaConf"}, {"name": "yaml:unsafe_load"}, {"name": "pip:main"},
    {"name": "pytest:main"}, {"name": "matplotlib.pyplot:imsave", "arr": 1}, {"name": "PIL.Image:open"},
    {"name": "steerfm.report.pictures:picture_grid", "path": "ran"}, {"name": "steerfm.flowmap:save_weights", "path": "ran"},
    {"name": "steerfm_rewards.towers:efficientnet_lite"}, {"name": "steerfm_zoo.emoji.pictures:subprocess"},
    {"name": "steerfm.cli:main"},
    {"name": "steerfm:load"}, {"name": "steerfm:__getattr__"}, {"name": "steerfm.rewards:__loader__"}, {"name": ":eval"},
    {"name": ".os:system"}, {"name": f"{pydoc.__file__}:pipepager", "cmd": "touch ran"}, {"name": f"{torch.__file__}:load"},
    {"name": "/usr/lib/python3.99/pydoc.py:pipepager", "cmd": "touch ran"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: Path(value["name"]).name)
def test_a_configuration_cannot_name_what_is_no_reward(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for told in (value, [{"name": "brightness"}, value], {"name": "normalised", "reward": value}):
        with pytest.raises((RewardError, ConfigError)) as error:
            build_reward(told)(torch.rand(2, 1, 4, 4))
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    ran = {name.split(".")[0] for name in set(sys.modules) - before} & {"antigravity", "this", "pip", "test", "idlelib"}
    assert not ran, "refused before it is imported"


@pytest.mark.slow
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: Path(value["name"]).name)
def test_nor_what_is_no_method(value):
    with pytest.raises(ConfigError) as error:
        registry.build(value, METHOD)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: Path(value["name"]).name)
def test_nor_what_is_no_model(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        steerfm.load(value["name"])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_command_that_was_run_by_a_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text('reward: {name: "pydoc:pipepager", cmd: "touch ran"}\nlabel: Bag\nn: 1\n')
    assert cli.main(["steer", "--config", "run.yaml"]) == 2
    assert "pydoc belongs to Python itself" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert cli.main(["rewards", "os:system"]) == 2


OWN = """
import functools
import subprocess
from builtins import eval as evaluate
from os import system
from pydoc import pipepager
from shutil import rmtree
from numpy import save
from functools import partial
from torch import load
from steerfm_rewards.simple import Brightness

def red(images, power=1.0):
    return images[:, 0].mean((1, 2)) ** power

@functools.lru_cache
def cached(images):
    return red(images)

class Scorer:
    def __call__(self, pictures):
        return pictures.mean((1, 2, 3))

    def score(self, pictures):
        return self(pictures)

def nothing():
    return 3

def keywords(*, images):
    return images

squared, scorer, method, lazy = partial(red, power=2.0), Scorer(), Scorer().score, lambda x: x.mean((1, 2, 3))
shell = partial(system)
number = 3
"""
GOOD = ["red", "cached", "scorer", "method", "lazy", "squared", "Brightness"]
BAD = ["system", "pipepager", "rmtree", "save", "load", "partial", "shell", "evaluate", "functools", "subprocess", "Scorer",
       "nothing", "keywords", "number", "__builtins__", "__loader__", "__init__", "__setattr__", "__class__"]  # fmt: skip


@pytest.fixture(params=["file", "module", "package"])
def own(request, tmp_path, monkeypatch):
    """What a user's own code is called."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = {"file": "own_file.py", "module": "own_module.py", "package": "own_package/inner.py"}[request.param]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(OWN)
    yield {"file": str(tmp_path / name), "module": "own_module", "package": "own_package.inner"}[request.param]
    for module in [module for module in sys.modules if module.startswith("own_")]:
        del sys.modules[module]


@pytest.mark.parametrize("name", GOOD)
def test_own_code_is_a_reward(own, name):
    value = steerfm.reward(f"{own}:{name}")(torch.full((3, 1, 2, 2), 0.5))
    assert value.tolist() == [0.25 if name == "squared" else 0.5] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_what_own_code_has_from_elsewhere_is_none(own, name):
    with pytest.raises(RewardError) as error:
        steerfm.reward(f"{own}:{name}")
    assert "\n" not in str(error.value)


def test_a_module_that_ends_the_program_is_an_error(tmp_path):
    for number, text in enumerate(("raise SystemExit(0)", "import sys; sys.exit()")):
        (tmp_path / f"ends{number}.py").write_text(text)
        with pytest.raises(RewardError, match=r"cannot import .*SystemExit"):
            steerfm.reward(f"{tmp_path / f'ends{number}.py'}:red")


def test_python_finds_whose_code_it_is():
    whose = {name: trust._whose(name) for name in ("os", "json.tool", "torch.nn", "steerfm.cli", "no_such_module", __name__)}
    assert list(whose.values()) == ["python", "python", "package", "package", "nobody", "own"]


def installed(tmp_path, monkeypatch, depends: bool) -> None:
    folder = tmp_path / "site-packages"
    (folder / "other_rewards").mkdir(parents=True)
    (folder / "other_rewards" / "__init__.py").write_text(OWN.replace("Scorer", "Other") + "\nBright = Brightness()\n")
    about = folder / "other_rewards-1.0.dist-info"
    about.mkdir()
    needs = "Requires-Dist: steerfm >=0.1 ; extra == 'x'\n" if depends else "Requires-Dist: steerfmx\n"
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: other-rewards\nVersion: 1.0\n{needs}")
    (about / "top_level.txt").write_text("other_rewards\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("depends", [True, False])
def test_of_an_installed_package_only_rewards_can_be_named_and_only_if_it_is_made_for_this(tmp_path, monkeypatch, depends):
    installed(tmp_path, monkeypatch, depends)
    try:
        for name in ("red", "scorer", "lazy", "system"):
            with pytest.raises(RewardError):
                steerfm.reward(f"other_rewards:{name}")
        if depends:
            assert (
                steerfm.reward("other_rewards:Bright").name == steerfm.reward("other_rewards:Brightness").name == "brightness"
            )
        else:
            with pytest.raises(RewardError, match="not made for steerfm"):
                steerfm.reward("other_rewards:Bright")
            assert "other_rewards" not in sys.modules
    finally:
        sys.modules.pop("other_rewards", None)


@pytest.mark.slow
def test_a_package_that_is_installed_later_is_known(tmp_path, monkeypatch):
    """As in a notebook, with pip in one of its cells."""
    installed(tmp_path, monkeypatch, True)
    about = tmp_path / "site-packages" / "other_rewards-1.0.dist-info"
    about.rename(tmp_path / "about")
    assert not trust._is_for_steerfm("other_rewards")
    (tmp_path / "about").rename(about)
    assert trust._is_for_steerfm("other_rewards")


@pytest.mark.slow
def test_refusing_a_name_changes_nothing_for_others():
    """Setuptools' finder turns itself off where it is asked for pip: torch's compiler then cannot load it."""
    code = """
        import sys, steerfm
        for spec in ("pip:main", "torch:load", "os:system"):
            try:
                steerfm.reward(spec)
            except ValueError:
                pass
            else:
                raise SystemExit(f"{spec} was taken")
        import setuptools
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-500:]


# --- what lies beside a file -----------------------------------------------------------------------------------------
def place(folder: Path, shade: float, body: str = "from tints import red") -> str:
    """A reward file whose neighbour says by how much it shifts."""
    folder.mkdir()
    (folder / "tints.py").write_text(
        "from depths import SHADE\n\ndef red(images):\n    return images[:, 0].mean((1, 2)) + SHADE\n"
    )
    (folder / "depths.py").write_text(f"SHADE = {shade}\n")
    lazy = "    from tints import red\n" if not body else ""
    (folder / "mine.py").write_text(f"{body}\n\ndef mine(images):\n{lazy}    return red(images)\n")
    return f"{folder / 'mine.py'}:mine"


@pytest.mark.parametrize("body", ["from tints import red", "import tints\nred = tints.red", ""])
def test_a_reward_imports_the_file_beside_it_and_not_one_of_that_name_elsewhere(tmp_path, monkeypatch, body):
    monkeypatch.setattr(sys, "path", list(sys.path))
    black = torch.zeros(2, 3, 4, 4)
    for number, shade in enumerate((1.0, 2.0)):
        assert steerfm.reward(place(tmp_path / str(number), shade, body))(black).tolist() == [shade] * 2
    (tmp_path / "1" / "depths.py").write_text("SHADE = 3.25\n")  # edited: read anew
    assert steerfm.reward(f"{tmp_path / '1' / 'mine.py'}:mine")(black).tolist() == [3.25] * 2


def test_modules_that_were_there_before_stay(tmp_path, monkeypatch):
    """A folder of rewards may hold an environment, and this package."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trust, "_FOLDERS", {})
    root = Path(steerfm.__file__).parent.parent
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() != root])
    before = dict(sys.modules)
    for _ in range(2):
        trust._add_folder(root / "mine.py")
        steerfm.reward(place(tmp_path / str(_), 1.0))
    assert all(sys.modules[name] is module for name, module in before.items() if not name.startswith("steerfm_user_mine"))


def test_a_neighbour_stands_in_for_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = place(tmp_path / "own", 1.0)
    for name in ("torch", "json"):
        (tmp_path / "own" / f"{name}.py").write_text("raise RuntimeError('ran')\n")
    (tmp_path / "own" / "mine.py").write_text(
        "import json, torch\nfrom tints import red\ndef mine(images): return red(images)\n"
    )
    assert steerfm.reward(spec)(torch.ones(1, 3, 4, 4)).tolist() == [2.0]
    with pytest.raises(RewardError, match="which is no reward"):
        (tmp_path / "own" / "tints.py").write_text("from os import system as red\n")
        (tmp_path / "own" / "mine.py").write_text("from tints import red as mine\n")
        steerfm.reward(spec)


def test_a_run_is_also_what_lies_beside_its_reward(tmp_path):
    spec = place(tmp_path / "own", 1.0)
    before = inputs(SteerConfig(reward=spec))
    assert {Path(name).name for name in before} >= {"mine.py", "tints.py", "depths.py"}
    (tmp_path / "own" / "depths.py").write_text("SHADE = 2.5\n")
    after = inputs(SteerConfig(reward=spec))
    assert [Path(name).name for name in before if before[name] != after[name]] == ["depths.py"]
