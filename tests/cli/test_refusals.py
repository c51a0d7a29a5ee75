"""Refused before the work: numbers out of range, arguments that nothing takes; and what has to work instead."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
import torch
from rich.table import Table

import steerfm
from steerfm import cli, finetuning
from steerfm.cli import listing
from steerfm.cli.config import (
    BenchConfig,
    EvaluateConfig,
    FinetuneConfig,
    SampleConfig,
    SteerConfig,
    TrainConfig,
)
from steerfm.cli.console import console, make_table, progress
from steerfm.cli.loading import load
from steerfm.cli.parts import build_method
from steerfm.cli.train import check_shares, off_diagonal
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.networks import UNet
from steerfm.registry import Kind
from steerfm.report.pictures import picture_grid
from steerfm.steering import METHOD, METHODS, EndpointGradient, Jump
from steerfm.values import ConfigError

SCHEMAS = [TrainConfig, SampleConfig, SteerConfig, EvaluateConfig, FinetuneConfig, BenchConfig]
TINY = ["method=best_of_n", "method.particles=2", "method.steps=1", "n=1"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


def numbers(schema, prefix: str = "") -> list[tuple[str, object, object]]:
    """(key, type, range) of every number of a schema."""
    out = []
    for f in fields(schema):
        kind = get_type_hints(schema)[f.name]
        if is_dataclass(kind):
            out += numbers(kind, f"{prefix}{f.name}.")
        elif "int" in str(kind) or "float" in str(kind):
            out.append((f"{prefix}{f.name}", kind, f.metadata.get("range")))
    return out


NUMBERS = [pytest.param(schema, *row, id=f"{schema.__name__}.{row[0]}") for schema in SCHEMAS for row in numbers(schema)]


@pytest.mark.parametrize(("schema", "key", "kind", "range_"), NUMBERS)
def test_every_number_has_a_range_and_nothing_else_is_taken(schema, key, kind, range_):
    assert range_ is not None
    entry = "{lagrangian: %s}" if "dict" in str(kind) else "%s"
    for wrong in ("nan", "inf", "-inf", "words", "true", "[a]", "{a: b}", "1e400"):
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as error:
            load(schema, None, [f"{key}={entry % wrong}"])
        assert "\n" not in str(error.value)
    if "float" not in str(kind):
        with pytest.raises(ConfigError, match=r"whole number|list of numbers"):
            load(schema, None, [f"{key}=1.5"])
    for value in (0, -1):
        inside = range_.least <= value <= range_.most and range_.above < value < range_.below
        inside = inside or (range_.off and value == 0)
        if inside:
            load(schema, None, [f"{key}={entry % value}"])
        else:
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
                load(schema, None, [f"{key}={entry % value}"])


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("finetune", "watch.report=1"), ("finetune", "watch.n=1"), ("finetune", "watch.n=0"), ("finetune", "watch.every=0"),
        ("finetune", "trainer.log_every=0"), ("finetune", "trainer.save_every=0"), ("finetune", "label=[]"),
        ("finetune", "optimizer.steps=0"), ("finetune", "optimizer.steps=-1"), ("finetune", "batch_size=0"),
        ("finetune", "distil.batch_size=0"), ("finetune", "distil.pools=0"), ("finetune", "lora.rank=-1"),
        ("finetune", "trainer.precision=16-true"), ("finetune", "trainer.precision=bf16-true"), ("finetune", "control=-1"),
        ("finetune", "trainer.precision=64-true"), ("finetune", "label=Hat"), ("finetune", "reward=clip"),
        ("finetune", "prompt=x.txt"),
        ("steer", "n=0"), ("steer", "batch_size=0"), ("steer", "seeds=-1"), ("steer", "guidance=nan"), ("steer", "reward=clip"),
        ("steer", "method.guidance.scael=1"), ("steer", "method.transition=3"), ("steer", "prompt=x.csv"),
        ("sample", "steps=0"), ("sample", "n=-1"), ("evaluate", "n=1"), ("evaluate", "steps=[]"), ("evaluate", "euler=0"),
        ("evaluate", "steps=[1,0]"), ("train", "optimizer.steps=0"), ("train", "data.batch_size=0"),
        ("finetune", "trainer.devices=inf"), ("finetune", "trainer.devices=0"),
        ("train", "trainer.precision=64-true"), ("train", "trainer.log_every=0"), ("train", "name=.."), ("train", "name=a/b"),
    ],
)  # fmt: skip
def test_refused_before_there_is_a_folder(capsys, tmp_path, monkeypatch, command, wrong):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, command, wrong, "out=run")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert wrong.split("=")[0].split(".")[-1] in err or "needs prompts" in err or "Hat" in err or "guidance" in err


# --- methods and their parts -----------------------------------------------------------------------------------------
def method(*overrides: str, schema: type[SteerConfig | FinetuneConfig] = SteerConfig, kind: Kind = METHOD) -> Any:
    return build_method(load(schema, None, list(overrides)).method, kind)


def test_arguments_of_a_part():
    assert method("method.guidance.scale=.5").guidance == EndpointGradient(scale=0.5, cap=0.5, required=False, dimension=12)
    assert method("method=fmrg_j", "method.guidance.scale=2").guidance.scale == 2
    assert method("method=fmrg_j", "method.guidance.scale=2").guidance.normalised  # the method's own, but for the scale
    assert method("method={name: fmtt, guidance: {cap: null}}").guidance.cap is None
    assert method("method.lookahead={name: jump, hops: 2}").lookahead == Jump(hops=2)
    assert method("method=feynman_kac", "method.guidance.name=map", "method.guidance.scale=3").guidance.scale == 3
    assert method("method=feynman_kac", "method.resampling.scheme=ssp", "method.threshold=.25").resampling.threshold == 0.25
    assert method("method=feynman_kac", "method.tempering.p=2").tempering.p == 2
    assert steerfm.FeynmanKac(guidance={"name": "map", "scale": 3}).guidance.scale == 3  # and in Python
    tuned = method("method=weighted", "method.refit.anchor=2", schema=FinetuneConfig, kind=finetuning.METHOD)
    assert tuned.refit.anchor == 2 and tuned.refit.trajectory == 0.5


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["method.guidance.scael=1"], "guidance has no argument 'scael'; arguments: scale"),
        (["method=feynman_kac", "method.guidance.scale=1"], "guidance.name=map"),
        (["method.guidance.name=mapp"], "unknown guidance 'mapp'; guidances: map"),
        (["method.lookahead=3"], "lookahead"),
        (["method.guidance=[map]"], "give a name"),
        (["method.transition=null"], "transition=None"),
        (["method.particles=1.5"], "whole number"),
        (["method.particles=many"], "whole number"),
        (["method.power=no"], "give a number"),
        (["method=random_search", "method.radius=1"], "unknown key 'method.radius'"),
        (["method=beam", "method.resampling=ssp"], "unknown key 'method.resampling'"),
        (["method=fk_steering", "method.correction=none"], "unknown key 'method.correction'"),
    ],
)
def test_what_a_method_does_not_take_is_refused_in_one_line(overrides, fix):
    with pytest.raises(ConfigError, match=fix) as error:
        method(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_every_argument_that_is_listed(name, capsys):
    listing.list_methods(name)
    listed = [line.split(" = ")[0].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  method.")]
    made = METHODS[name]()
    assert listed
    for key in listed:
        field = key.removeprefix("method.")
        METHODS[name](**{field: getattr(made, field)})


# --- models ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory, randomise):
    def model(channels: int, classes: int = 0, data: str = "") -> str:
        architecture: dict[str, Any] = {"channels": channels, "widths": [8], "attention": False}
        architecture |= {"classes": classes} if classes else {}
        network = randomise(UNet(**architecture))
        flow_map = NeuralFlowMap(network, (channels, 28, 28), class_names=[f"class {i}" for i in range(classes)])
        path = tmp_path_factory.mktemp("models") / f"own-{channels}-{classes}"
        return str(flow_map.save(path, {"name": "unet", **architecture}, {"data": data}, half=False))

    return model


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_any_number_of_channels_is_drawn(capsys, tmp_path, monkeypatch, model, channels):
    monkeypatch.chdir(tmp_path)
    own = model(channels)
    code, _, err = run(capsys, "steer", f"model={own}", "reward=brightness", *TINY, "out=a")
    assert code == 0 and (tmp_path / "a" / "grid.png").is_file(), err
    code, _, err = run(capsys, "sample", f"model={own}", "n=2", "out=b")
    assert code == 0 and (tmp_path / "b" / "grid.png").is_file(), err


def test_channels_stand_side_by_side(tmp_path):
    grey = torch.rand(1, 2, 1, 8, 8)
    beside = torch.cat([grey, 1 - grey], 4)
    one = picture_grid(beside, tmp_path / "a.png").read_bytes()
    assert picture_grid(torch.cat([grey, 1 - grey], 2), tmp_path / "b.png").read_bytes() == one


def test_own_classes_are_not_judged_as_clothes(capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    own = model(1, 3)
    code, out, err = run(capsys, "steer", f"model={own}", "reward=brightness", "label=class 1", *TINY, "out=a")
    assert code == 0 and "held out" not in out and "no held-out reward" in out, err
    assert json.loads((tmp_path / "a" / "result.json").read_text())["held_out"] is None
    code, out, err = run(capsys, "steer", "reward=brightness", "label=Bag", *TINY, "out=b")
    assert code == 0 and "held out: judge" in out, err


class Doubling(FlowMap):
    """A map without parameters and buffers."""

    def average_velocity(self, x, s, t, cond):
        return x


def test_a_map_without_parameters():
    flow_map = Doubling((2,))
    assert flow_map.device.type == "cpu" and flow_map.dtype == torch.get_default_dtype()
    assert steerfm.sample(flow_map, n=3, steps=2, seeds=0).shape == (3, 2)
    assert steerfm.steer(flow_map, lambda x: x[:, 0], n=2).samples.shape[0] == 2


def test_steer_runs_with_its_own_defaults(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "steer", *TINY[:-1], "n=12", "out=a")
    assert code == 0 and "held out: judge" in out, err


@pytest.mark.slow
def test_fine_tuning_takes_an_adapter_and_its_own_defaults(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast = [
        "batch_size=4", "watch.n=8", "watch.base=8", "watch.every=2", "optimizer.steps=2", "distil.steps=2", "distil.samples=8",
        "distil.batch_size=8", "lora.rank=2",
    ]  # fmt: skip
    code, out, err = run(capsys, "finetune", *fast, "out=a")
    assert code == 0 and "label=all" in out, err
    code, _, err = run(capsys, "finetune", *fast, "reward=brightness", "model=a/adapter.safetensors", "out=b")
    assert code == 0, err
    before, after = steerfm.load("a/adapter.safetensors"), steerfm.load("b/adapter-tuned.safetensors")
    for name in ("b/adapter-tuned.safetensors", "b/adapter.safetensors"):  # the base of both is the adapter
        base = steerfm.load(name).with_strength(0.0)
        for key, value in base.body.state_dict().items():
            torch.testing.assert_close(value, before.body.state_dict()[key], atol=2e-3, rtol=2e-3)
    assert after.shape == before.shape


# --- names in brackets -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["quality [/10]", "[bold]s", "[red]x[/red]", "a [link=x]", ":heart: [", "\\[x]"])
def test_names_in_brackets_are_printed_as_they_are(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", 500)
    console.print(name)
    assert capsys.readouterr().out == f"{name}\n"
    table = make_table(name, "x", title=name)
    table.add_row(name, name)
    assert isinstance(table, Table)
    console.print(table)
    assert capsys.readouterr().out.count(name) == 4
    with progress(name, 1) as tick:
        tick(1, 1)
    (tmp_path / "mine.py").write_text(f"def mine(images):\n    return images.mean((1, 2, 3))\n\nmine.name = {name!r}\n")
    code, out, err = run(capsys, "steer", "reward=mine.py:mine", *TINY, "out=o/" + name.replace("/", "|"))
    assert code == 0 and name in out and name.replace("/", "|") in out, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.keep=3"], "objective.keep=3: at least data.batch_size=64, or 0"),
        (
            ["objective.terminal=0.8", "objective.full=0.8"],
            "objective.terminal=0.8, objective.full=0.8: shares, at most 1 together",
        ),
        (["objective.shares={posterior_trajectory: 0.5}"], "network.posterior=true"),
        (["objective.shares={lagrangian: 0.5}", "objective.teacher=fashion"], "objective.teacher is only used by"),
    ],
)
def test_objectives_that_cannot_be_are_refused(words, said):
    config = load(TrainConfig, None, ["data.batch_size=64", *words])
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_shares(config, UNet(1, (8, 8)))


def test_a_teacher_of_other_pictures_is_named():
    config = load(TrainConfig, None, ["objective.shares={trajectory: 0.5}", "objective.teacher=emoji"])
    with pytest.raises(ConfigError, match=r"objective\.teacher=emoji: it makes 3 x 32 x 32, and the data are 1 x 28 x 28"):
        off_diagonal(config, (1, 28, 28))
