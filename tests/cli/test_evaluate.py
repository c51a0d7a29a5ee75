"""`steerfm evaluate`: feature spaces, texture, floors, and what is said of models that no shipped network knows."""

from __future__ import annotations

import json
import math

import pytest
import torch
from kinds import a, classifier
from PIL import Image
from steerfm_zoo.emoji import pictures as emoji

import steerfm
from steerfm import cli, zoo
from steerfm.checkpoints import build_network
from steerfm.cli import evaluate as evaluation
from steerfm.cli.config import EvaluateConfig
from steerfm.cli.evaluate import evaluate, examine, in_order
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.metrics import cubic, discrepancy, feature_statistics, frechet_distance, texture
from steerfm.metrics.evaluator import Evaluator
from steerfm.metrics.spaces import Reference

SPACES = ("fashion-classifier", "fashion-judge")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(["evaluate", *argv])
    return code, *capsys.readouterr()


class Scaling(FlowMap):
    """The exact map of dx/dt = a x: samples are noise times exp(a), in any number of jumps; Euler steps are short of it."""

    def __init__(self, shape: tuple[int, ...], a: float, class_names: tuple[str, ...] = ()) -> None:
        super().__init__(shape, class_names=class_names)
        self.a = a
        self.register_buffer("place", torch.zeros(()))

    def average_velocity(self, x, s, t, cond):
        h = (t - s).view(-1, *[1] * (x.ndim - 1))
        return x * torch.where(h == 0, torch.as_tensor(self.a), torch.expm1(self.a * h) / torch.where(h == 0, 1.0, h))


def measure(monkeypatch, tmp_path, flow_map: FlowMap, **options) -> dict:
    monkeypatch.setattr(evaluation, "load_model", lambda name, device: flow_map)
    out = tmp_path / "run"
    evaluate(EvaluateConfig(model="mine", out=str(out), **options))
    return json.loads((out / "result.json").read_text())


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fashion_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    assert cli.main(["evaluate", "n=300", "steps=[1,4]", "euler=3", "batch_size=110", "posteriors=0", f"out={out}"]) == 0
    return out


@pytest.mark.slow
def test_every_sampler_is_measured_in_two_spaces_one_of_them_the_judges(fashion_run):
    found = json.loads((fashion_run / "result.json").read_text())
    assert list(found["samplers"]) == ["1 jump", "4 jumps", "3 Euler steps"]
    for row in found["samplers"].values():
        assert tuple(row["spaces"]) == SPACES
        assert all(math.isfinite(value) for space in row["spaces"].values() for value in space.values())
        assert row["frechet"] == row["spaces"]["fashion-classifier"]["frechet"]
        assert 0.1 < row["texture"] < 1 and 0.5 < row["accuracy"] <= 1
    one, four, euler = found["samplers"].values()
    assert one["spaces"]["fashion-judge"]["frechet"] > 1.3 * four["spaces"]["fashion-judge"]["frechet"]  # not so by the other
    assert one["texture"] < four["texture"] and one["to_euler"] > 0 == euler["to_euler"]
    assert tuple(found["data"]) == SPACES and all(space["n"] == 300 for space in found["data"].values())
    assert found["gaps"] == []
    page = (fashion_run / "report.html").read_text()
    for words in (*SPACES, "Fréchet distance", "kernel distance", "texture", "data, 300"):
        assert words in page
    assert Image.open(fashion_run / "jumps.png").convert("RGB").width > 600


@pytest.mark.slow
def test_the_numbers_are_those_of_the_samples(fashion_run):
    """From the samples themselves, by the functions: no batch is lost, no space mixed up with another."""
    found = json.loads((fashion_run / "result.json").read_text())["samplers"]["4 jumps"]
    flow_map = steerfm.load("fashion")
    labels = a(torch.Tensor, examine(flow_map, EvaluateConfig(n=300)).cond)
    with torch.inference_mode():
        pictures = flow_map.decode(
            torch.cat(
                [steerfm.sample(flow_map, len(part), 4, int(part[0]), labels[part]) for part in torch.arange(300).split(110)]
            )
        )
        for name, space in found["spaces"].items():
            features, data = classifier(name).features(pictures), zoo.statistics(name)
            expected = frechet_distance(*feature_statistics(features), data["test_mean"], data["test_cov"])
            assert space["frechet"] == pytest.approx(expected, rel=1e-3)
            assert space["kernel"] == pytest.approx(discrepancy(features.double(), data["test_rows"], cubic), abs=1e-5)
            assert found["texture"] == pytest.approx(float(texture(pictures).mean() / data["test_texture"]), rel=1e-3)


def test_classes_are_drawn_like_the_datas():
    """Independent draws: classes in turn would make an unbiased distance too low."""
    labels = a(torch.Tensor, examine(steerfm.load("fashion"), EvaluateConfig(n=2000)).cond)
    counts = labels.bincount(minlength=10)
    chi = float(((counts - 200) ** 2 / 200).sum())
    assert 1.2 < chi < 30  # 9 degrees of freedom
    assert 0.05 < float((labels[1:] == labels[:-1]).float().mean()) < 0.15


# --- the floor -----------------------------------------------------------------------------------------------------------
def test_the_floor_is_data_against_the_other_data():
    known = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    space = Reference.of(known)
    floor = space.floor(20)
    part, rest = space.rows[:20], space.rows[20:]
    assert floor["n"] == 20
    assert floor["frechet"] == pytest.approx(frechet_distance(*feature_statistics(part), *feature_statistics(rest)))
    assert floor["kernel"] == pytest.approx(discrepancy(space.rows[:30], space.rows[30:], cubic))
    assert space.floor(1000)["n"] == 30  # halves at most
    assert space.rows.sum(0).tolist() == pytest.approx(known.sum(0).tolist())


@pytest.mark.parametrize("name", SPACES)
def test_the_shipped_rows_give_a_floor_for_as_many_samples(name):
    """Data of the size of the samples are the least that they can reach; more than the rows there are not."""
    space = Reference.from_file(name)
    assert space is not None
    few, many = space.floor(500), space.floor(2000)
    assert (few["n"], many["n"], space.floor(50_000)["n"]) == (500, 2000, 2000)
    assert few["frechet"] > 1.5 * many["frechet"] > 0
    assert abs(many["kernel"]) < 0.002


# --- texture -------------------------------------------------------------------------------------------------------------
def test_texture_and_the_way_off_euler_of_a_map_in_closed_form(monkeypatch, tmp_path):
    a = -1.5
    found = measure(monkeypatch, tmp_path, Scaling((1, 12, 12), a), n=400, steps=[1, 3], euler=40, batch_size=150)
    euler = (1 + a / 40) ** 40
    for name, scale in {"1 jump": math.exp(a), "3 jumps": math.exp(a), "40 Euler steps": euler}.items():
        row = found["samplers"][name]
        assert row["texture"] == pytest.approx(8 / 9 * (scale / 2) ** 2, rel=0.03)  # pictures are half of [-1, 1]
        assert row["to_euler"] == pytest.approx(abs(scale - euler) / 2, rel=0.02, abs=1e-6)
        assert row["spaces"] == {}
    assert found["texture_of_data"] is None


# --- models of one's own -------------------------------------------------------------------------------------------------
ARCHITECTURES = {
    "clothes-like": ((1, 28, 28), ("a", "b", "c"), {"name": "unet", "channels": 1, "widths": [8, 16], "blocks": 1}),
    "ten classes": ((1, 28, 28), tuple("abcdefghij"), {"name": "unet", "channels": 1, "widths": [8, 16], "blocks": 1}),
    "two channels": ((2, 8, 8), (), {"name": "unet", "channels": 2, "widths": [8, 16], "blocks": 1}),
    "vectors": ((2,), ("a", "b", "c"), {"name": "mlp", "dim": 2, "width": 8, "depth": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("card", [{}, {"data": "mine"}, {"data": "fashion"}], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_own_model_is_measured_as_far_as_it_can_be(capsys, tmp_path, monkeypatch, randomise, kind, card):
    """Other classes or shapes are other data, also where the card names shipped ones."""
    monkeypatch.chdir(tmp_path)
    shape, names, architecture = ARCHITECTURES[kind]
    architecture = architecture | {"classes": len(names)}
    flow_map = NeuralFlowMap(randomise(build_network(architecture)), shape, class_names=names)
    flow_map.save(tmp_path / "own.safetensors", architecture, card)
    code, out, err = run(capsys, "model=own.safetensors", "n=40", "steps=[1,2]", "euler=4", "batch_size=25", "out=run")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(found["gaps"]) == 1 and "own.safetensors" in found["gaps"][0] and "no distances to the data" in out
    assert found["semigroup error"] > 0 and found["diagonal error"] > 0 and found["data"] == {}
    for name, row in found["samplers"].items():
        assert row["spaces"] == {} and not {"frechet", "accuracy"} & row.keys() and row["diversity"] > 0
        assert (row["to_euler"] > 0) == (name != "4 Euler steps") and ("texture" in row) == (len(shape) == 3)


def test_a_model_of_shipped_data_without_classes_has_distances_and_no_accuracy(monkeypatch, tmp_path):
    flow_map = Scaling((1, 28, 28), -0.5)
    flow_map.data = "fashion"
    found = measure(monkeypatch, tmp_path, flow_map, n=30, steps=[1], euler=2)
    row = found["samplers"]["1 jump"]
    assert tuple(row["spaces"]) == SPACES and "accuracy" not in row and row["texture"] > 1 and not found["gaps"]


# --- refusals and kills --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", ["n=1", "n=0", "steps=[]", "steps=[2,0]", "euler=0", "batch_size=0"])
def test_what_cannot_be_measured_is_refused_before_the_work(capsys, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, wrong, "out=run")
    assert code == 2 and err.count("\n") == 1 and "at least" in err and not (tmp_path / "run").exists()


def test_a_run_that_was_cut_between_samplers_continues_to_the_same_numbers(monkeypatch, tmp_path):
    """What is held against the Euler steps also goes on from their part."""
    options = {"n": 50, "steps": [1, 2], "euler": 3, "batch_size": 30}
    flow_map = Scaling((1, 8, 8), -1.0)
    whole = measure(monkeypatch, tmp_path / "whole", flow_map, **options)
    plan, calls = evaluation._plan, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plan(*args)

    monkeypatch.setattr(evaluation, "_plan", cut)
    with pytest.raises(KeyboardInterrupt):
        measure(monkeypatch, tmp_path / "cut", flow_map, **options)
    again = measure(monkeypatch, tmp_path / "cut", flow_map, **options)
    assert len(calls) == 4
    for found in (whole, again):
        for row in found["samplers"].values():
            row.pop("seconds")
    assert again["samplers"] == whole["samplers"] and again["samplers"]["2 jumps"]["to_euler"] > 0


# --- words ---------------------------------------------------------------------------------------------------------------
def judge_of_words():
    return Evaluator(steerfm.load("emoji")).judge(None, labels=False, prompts=True)


def missing_package(name):
    raise ImportError("pip install something")


@pytest.mark.slow
@pytest.mark.parametrize("judge", [True, False])
def test_a_map_of_words_is_measured_by_the_judge_where_it_is_installed_and_by_the_clip(monkeypatch, tmp_path, capsys, judge):
    if judge and judge_of_words() is None:
        pytest.skip("needs what emoji_judge needs")
    if not judge:
        monkeypatch.setattr(zoo, "load_image_text_head", missing_package)
    monkeypatch.setenv("STEERFM_DATA", str(tmp_path))
    (tmp_path / "emoji").mkdir()
    pictures = torch.randint(0, 256, (36, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    names = [f"thing {i}" for i in range(12)]
    concept, style = torch.arange(36) // 3, torch.arange(36) % 3
    data = emoji.Emoji(pictures, concept, style, torch.zeros(36).long(), names, [[] for _ in names], torch.arange(12) > 9)
    monkeypatch.setattr(emoji, "load", lambda *args: data)
    assert cli.main(["evaluate", "model=emoji", "n=6", "steps=[1]", "euler=2", f"out={tmp_path / 'run'}"]) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    spaces = ["emoji-judge", "emoji-clip"] if judge else ["emoji-clip"]
    row = found["samplers"]["1 jump"]
    assert list(row["spaces"]) == list(found["data"]) == spaces and bool(found["gaps"]) != judge
    assert ("judge" in row) == judge and "R@1 of 10" in row
    assert found["texture_of_data"] == pytest.approx(float(texture(pictures[:30].float() / 255).mean()))
    assert 0 < row["texture"] < 1  # the data are noise
    assert found["data"]["emoji-clip"]["n"] == 6


def test_numbers_are_in_order_however_they_were_read():
    """A part that is read again after a kill is sorted by name: the first space would be another one."""
    names = ["b/frechet", "b/kernel", "a/frechet", "a/kernel", "accuracy", "seconds", "texture", "to_euler"]
    numbers = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    for order in (names, sorted(names), names[::-1]):
        found = in_order({name: numbers[name] for name in order}, dict.fromkeys("ba"))  # type: ignore[arg-type]
        assert list(found.items()) == [(name, float(i)) for i, name in enumerate(names)]
