"""Names to objects: the same words in Python as in configurations, for maps, rewards and methods."""

from __future__ import annotations

import ast
import json
import operator
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import steerfm
from steerfm import cli, finetuning, registry, rewards, zoo
from steerfm.registry import make
from steerfm.steering import METHOD, METHODS
from steerfm.values import ConfigError

OWN = """
import torch, steerfm
from dataclasses import dataclass

def toy(modes=2):
    return steerfm.GaussianMixture([[-1.0 + 2 * i] for i in range(modes)], [[0.1]] * modes).flow_map()

toy_map = toy()
number = 3

def clothes():
    return steerfm.load("fashion")

def nothing():
    return 3

def first(x):
    return x.flatten(1)[:, 0]

@dataclass(frozen=True)
class Mine(steerfm.FeynmanKac):
    particles: int = 3

class Plain:
    particles, steps = 2, 4
    def __init__(self, steps=4): self.steps = steps
    def check(self, reward): pass
    def run(self, problem, noise, n, lookaheads, tick):
        return steerfm.BestOfN(particles=2, steps=self.steps).run(problem, noise, n, lookaheads, tick)

def made(particles=5, **more):
    return steerfm.BestOfN(particles=particles, **more)

ready = steerfm.BestOfN(particles=6)
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


@pytest.fixture(scope="module")
def fashion() -> steerfm.FlowMap:
    return steerfm.load("fashion")


# --- what a name builds ----------------------------------------------------------------------------------------------
@dataclass
class Widget:
    size: int
    colour: str = "red"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size must not be negative")


WIDGET = registry.Kind("widget", lambda thing: thing is Widget or isinstance(thing, Widget), "a Widget", "widgets()",
                       {"plain": Widget, "big": Widget(9), "made": lambda size=2: Widget(size)})  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "arguments", "expected"),
    [
        ("plain", {"size": 3}, Widget(3)), ({"name": "plain", "size": 3, "colour": "blue"}, {}, Widget(3, "blue")),
        ({"name": "plain", "size": 3}, {"size": 4}, Widget(4)), ("big", {}, Widget(9)), ("made", {}, Widget(2)),
        ({"name": "made", "size": 5}, {}, Widget(5)), (Widget(7), {}, Widget(7)),
    ],
)  # fmt: skip
def test_build(spec, arguments, expected):
    assert registry.build(spec, WIDGET, arguments) == expected


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("plan", {}, r"unknown widget 'plan' .did you mean 'plain'.*plain, big, made; your own: FILE\.py:NAME"),
        (3, {}, r"widget=3: give a name .widgets\(\) lists them., \{name: NAME, \.\.\.\}, FILE\.py:NAME or a Widget"),
        (None, {}, "widget=None: give a name"), (Widget, {}, r"widget=Widget is a class: call it, Widget\("),
        ({"size": 3}, {}, "widget needs a name"), ("big", {"size": 3}, "takes no arguments: size"),
        (Widget(1), {"size": 3}, "takes no arguments: size"),
        ({"name": "made", "sise": 3}, {}, r"unknown key 'widget\.sise' .did you mean 'size'"),
        ("nowhere.py:x", {}, "no such widget file: nowhere.py"),
    ],
)  # fmt: skip
def test_build_says_what_to_give(spec, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        registry.build(spec, WIDGET, arguments)
    assert "\n" not in str(error.value)


def test_make():
    assert make(Widget, {"size": 3, "colour": "blue"}, "widget") == Widget(3, "blue")
    assert make(lambda **more: more, {"anything": 1}, "widget") == {"anything": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 3, "color": "blue"}, r"unknown key 'widget\.color' .did you mean 'colour'.*keys: size, colour"),
        ({"size": -1}, "widget: size must not be negative"),
        ({}, "widget: .*size"),
        ({"size": "big"}, "widget: "),
    ],
)
def test_make_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(Widget, arguments, "widget")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("my.py:x", True), ("a/b.py:x", True), ("pkg.mod:Name", True), ("fashion", False), ("a/b.safetensors", False),
        (r"C:\models\x.safetensors", False), ("C:/models/x.safetensors", False), ("C:x.safetensors", False),
    ],
)  # fmt: skip
def test_what_is_code(name, code):
    assert registry.is_code(name) is code


# --- methods by name -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_name_and_by_class(name):
    assert steerfm.method(name) == METHODS[name]()
    assert getattr(steerfm, METHODS[name].__name__) is METHODS[name]
    assert METHODS[name].__name__ in dir(steerfm)


def test_the_arguments_of_a_method():
    assert steerfm.methods() == list(METHODS) and len(steerfm.methods()) > 28
    assert steerfm.method("fmrg_j", particles=8) == steerfm.FMRGJ(particles=8)
    assert steerfm.method({"name": "fmrg_j", "particles": 8}, steps=3) == steerfm.FMRGJ(particles=8, steps=3)
    scaled: Any = steerfm.method("fmrg_j", guidance={"scale": 2.0})
    assert scaled.guidance.scale == 2
    assert steerfm.method(steerfm.TDS()) == steerfm.TDS()
    for spec, arguments, words in [
        ("funel", {}, "did you mean 'funnel'"), ("funnel", {"particels": 8}, "did you mean 'particles'"),
        ("funnel", {"particles": 0}, "particles=0"), (3, {}, r"steerfm\.methods\(\)"), (steerfm.TDS, {}, r"TDS\("),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            steerfm.method(spec, **arguments)


def test_methods_of_ones_own(own):
    assert steerfm.method(f"{own}:Mine").particles == 3
    assert steerfm.method(f"{own}:Mine", particles=4).particles == 4
    assert steerfm.method({"name": f"{own}:made", "steps": 2}) == steerfm.BestOfN(particles=5, steps=2)
    assert steerfm.method(f"{own}:ready").particles == 6
    plain: Any = steerfm.method(f"{own}:Plain", steps=2)
    assert plain.steps == 2
    for name, words in [("number", "is not an object with the interface"), ("nothing", "makes a int"), ("Mine2", "'Mine'")]:
        with pytest.raises(ValueError, match=words):
            steerfm.method(f"{own}:{name}")
    with pytest.raises(ValueError, match="takes no arguments: steps"):
        steerfm.method(f"{own}:ready", steps=2)


# --- steer and sample by name ----------------------------------------------------------------------------------------
def test_steer_by_names_is_steer_by_objects(fashion):
    named = steerfm.steer("fashion", "brightness", "funnel", n=2, label="Bag", seeds=3)
    funnel, brightness = steerfm.Funnel(), steerfm.reward("brightness")
    objects = steerfm.steer(fashion, brightness, funnel, n=2, cond="Bag", seeds=3)
    assert torch.equal(named.samples, objects.samples) and torch.equal(named.log_weights, objects.log_weights)
    assert named.images().shape == (2, 16, 1, 28, 28)  # the map that was loaded goes with the result


@pytest.mark.slow
@pytest.mark.parametrize("flow_map", ["toy", "toy_map"])
@pytest.mark.parametrize("reward", ["first", {"name": "first", "weight": 2}, ["first", {"name": "first"}], "function"])
@pytest.mark.parametrize("method", ["Mine", "Plain", "made", {"name": "Mine", "particles": 2}, {"name": "best_of_n"}])
def test_all_that_can_be_named(own, flow_map, reward, method):
    def full(spec: Any) -> Any:
        if isinstance(spec, list):
            return [full(term) for term in spec]
        if isinstance(spec, dict):
            return spec | {"name": full(spec["name"])}
        return spec if spec == "best_of_n" else f"{own}:{spec}"

    wanted = (lambda x: x[:, 0]) if reward == "function" else full(reward)
    found = steerfm.steer(full(flow_map), wanted, full(method), seeds=5)
    weight = 2 if isinstance(reward, (dict, list)) else 1
    torch.testing.assert_close(found.rewards, weight * found.samples[..., 0].float())


def test_steps_and_sample_take_names_too(fashion, own):
    states = list(steerfm.steps("fashion", "brightness", {"name": "feynman_kac", "particles": 2, "steps": 2}, label="Bag"))
    assert len(states) == 2
    x = steerfm.sample("fashion", n=3, steps=2, label=["Bag", 1, "Dress"])
    assert torch.equal(x, steerfm.sample(fashion, n=3, steps=2, cond=torch.tensor([8, 1, 3])))
    guided = steerfm.Guided(fashion, 2.0)
    assert torch.equal(steerfm.sample(guided, label="Bag"), steerfm.sample(guided, 1, cond=torch.tensor([8])))
    assert torch.equal(steerfm.sample("fashion", steps=2, label="bag"), steerfm.sample(fashion, 1, 2, cond="Bag"))
    assert steerfm.sample(f"{own}:toy", n=4).shape == (4, 1)
    assert steerfm.sample(Path(zoo.find("fashion")), steps=1).shape == (1, 1, 28, 28)


def test_load(own, fashion):
    assert steerfm.load(fashion) is fashion
    assert steerfm.load(f"{own}:toy_map").shape == (1,)
    for spec, words in [
        ("fashon", r"did you mean 'fashion'.*FILE\.py:NAME"), (3, r"model=3: give a name .steerfm models"),
        (torch.nn.Linear(1, 1), "or a FlowMap"), (f"{own}:number", "is not a FlowMap"), (f"{own}:first", "model: .*'x'"),
        (f"{own}:nothing", "makes a int"), (f"{own}:Mine", "is not a FlowMap"), (f"{own}:tooy", "did you mean 'toy'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            steerfm.load(spec)
        assert "\n" not in str(error.value) or isinstance(spec, torch.nn.Module)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fashon", "brightness", "funnel"), "did you mean 'fashion'"),
        (("fashion", "brighness", "funnel"), "did you mean 'brightness'"),
        (("fashion", "brightness", "funel"), "did you mean 'funnel'"),
        (("fashion", "brightness", 3), r"method=3: give a name .steerfm\.methods"),
        (("fashion", "brightness", steerfm.TDS), r"TDS is a class: call it, TDS\("),
        (("fashion", 3, "funnel"), "a reward is a function of images"),
        (("fashion", {"name": "brightness", "regoin": "top"}, "funnel"), "has no argument 'regoin'"),
        (("fashion", "brightness", {"name": "funnel", "frist": 3}), "did you mean 'first'"),
        (("fashion", "brightness", {"first": 3}), "method needs a name"),
    ],
)
def test_a_wrong_name_says_which_is_meant(arguments, words):
    with pytest.raises(ValueError, match=words):
        steerfm.steer(*arguments)


# --- label= ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", ["Bag", "bag", 8, "8", ["Bag", "Dress"], (8, "Dress")])
def test_label_is_cond_by_name(fashion, label):
    options = {"n": 2, "strength": 3.0}
    method = steerfm.BestOfN(particles=2, steps=1)
    by_label = steerfm.steer(fashion, "classifier", method, label=label, **options)
    rows = torch.tensor([8, 3] if isinstance(label, (list, tuple)) else [8, 8])
    by_cond = steerfm.steer(fashion, "classifier", method, cond=rows, **options)
    assert torch.equal(by_label.samples, by_cond.samples)
    assert torch.equal(by_label.rewards, by_cond.rewards)  # the classifier reads the labels


@pytest.mark.parametrize("call", [lambda *a, **k: steerfm.steer(a[0], "brightness", "best_of_n", **k), steerfm.sample])
@pytest.mark.parametrize(
    ("label", "words"),
    [("Hat", "unknown class 'Hat'.*8 Bag"), (10, "unknown class 10"), (["Bag", "Dress"], "2 labels for n=3 outputs")],
)
def test_a_label_that_is_none(fashion, call, label, words):
    with pytest.raises(ValueError, match=words):
        call(fashion, n=3, label=label)
    with pytest.raises(ValueError, match="give one of them"):
        call(fashion, n=3, label="Bag", cond="Bag")


def test_a_label_where_there_are_no_classes():
    toy = steerfm.GaussianMixture([[0.0]], [[1.0]]).flow_map()
    with pytest.raises(ValueError, match="has no classes"):
        steerfm.sample(toy, label="Bag")
    with pytest.raises(ValueError, match=r"asked in words: cond='Bag'"):
        steerfm.sample("emoji", label="Bag")


# --- what steerfm holds ----------------------------------------------------------------------------------------------
def test_all_modules_are_reachable():
    code = "import sys, steerfm; names = dir(steerfm); print('torch' in sys.modules, 'ast' in sys.modules); print(*names)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].startswith("False")
    here = {module.name for module in iter_modules(steerfm.__path__) if not module.name.startswith("_")}
    assert here | set(steerfm.__all__) <= set(out[1].split())
    stub = ast.parse(Path(steerfm.__file__).with_suffix(".pyi").read_text())  # what type checkers and editors know
    lines = [line for line in stub.body if isinstance(line, ast.ImportFrom) and not line.module]
    assert {alias.name for line in lines for alias in line.names} == here
    for name in sorted(here):
        assert getattr(steerfm, name).__name__ == f"steerfm.{name}"
    for name in steerfm.__all__:
        assert getattr(steerfm, name).__name__ == name
    for name in ("__main__", "nothing", "__wrapped__"):
        assert not hasattr(steerfm, name)
    with pytest.raises(AttributeError, match=r"no attribute 'FeynmannKac' .did you mean 'FeynmanKac'"):
        operator.attrgetter("FeynmannKac")(steerfm)


# --- the command line ------------------------------------------------------------------------------------------------
def run(capsys, *argv: str) -> tuple[int, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.slow
def test_commands_take_a_map_that_code_makes(capsys, tmp_path, monkeypatch, own, fashion):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, "sample", "model=own.py:clothes", "n=2", "steps=1", "label=Bag", "out=a")
    assert code == 0, said
    drawn = load_file(tmp_path / "a" / "samples.safetensors")["samples"]
    assert torch.equal(drawn, steerfm.sample(fashion, n=2, steps=1, label="Bag"))
    assert "model own.py" in json.loads((tmp_path / "a" / "inputs.json").read_text())
    toy = ["model=own.py:toy", "reward=own.py:first", "n=2"]
    code, said = run(capsys, "steer", *toy, "method=own.py:Plain", "method.steps=2", "out=b")
    assert code == 0, said
    code, said = run(capsys, "sample", toy[0], "n=2", "out=c")
    assert code == 0, said
    for wrong, words in [("model=own.py:nothing", "makes a int"), ("model=own.py:toys", "did you mean 'toy'")]:
        code, said = run(capsys, "sample", wrong, "out=d")
        assert code == 2 and words in said and said.count("\n") == 1 and not (tmp_path / "d").exists()
    code, said = run(capsys, "finetune", "model=own.py:toy", "reward=own.py:first", "out=d")  # a mixture, which has no weights
    assert code == 2 and "cannot be fine-tuned" in said and said.count("\n") == 1 and not (tmp_path / "d").exists()


def test_tuning_methods_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "tune.py").write_text("from steerfm.finetuning import Direct\nclass Mine(Direct):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    built = registry.build({"name": "tune.py:Mine", "jumps": 3}, finetuning.METHOD)
    assert built.jumps == 3 and isinstance(built, finetuning.Direct)
    assert registry.build("draft_k", finetuning.METHOD) == finetuning.METHODS["draft_k"]()
    with pytest.raises(ConfigError, match="did you mean 'direct'"):
        registry.build("dirrect", finetuning.METHOD)
    with pytest.raises(ConfigError, match=r"is not an object with the interface of steerfm\.steering"):
        registry.find("tune.py:Direct", METHOD)


def test_a_method_of_steering_is_none_of_tuning():
    for name, kind in METHODS.items():
        assert METHOD.fits(kind) and METHOD.fits(kind()), name
        assert not finetuning.METHOD.fits(kind), name
    for name, kind in finetuning.METHODS.items():
        assert finetuning.METHOD.fits(kind) and not METHOD.fits(kind), name
    assert not METHOD.fits(rewards.Reward) and replace(METHOD, table={}).fits(steerfm.TDS())
