"""One evaluator: what a model's card names, and nothing of others, serves bench, evaluate and finetune."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from kinds import classifier

import steerfm
from steerfm import cli, zoo
from steerfm.checkpoints import build_network, save_weights
from steerfm.cli.bench import Yardstick
from steerfm.cli.config import FinetuneConfig
from steerfm.cli.finetune import build_panel
from steerfm.flowmap import Guided, NeuralFlowMap
from steerfm.metrics.evaluator import Evaluator
from steerfm.rewards import Reward

NAMES = ["fashion-classifier", "fashion-judge"]


@pytest.fixture(scope="module")
def fashion():
    return steerfm.load("fashion")


@pytest.fixture
def pictures():
    return torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def panel_of(flow_map):
    return build_panel(flow_map, steerfm.reward("brightness"), None, FinetuneConfig(label="Bag"), 4)


# --- shipped models ------------------------------------------------------------------------------------------------------
def test_every_shipped_map_names_what_it_is_measured_with():
    for name, head in zoo.models().items():
        if head["kind"] == "flow_map":
            assert {"data", "features", "judge", "watch"} <= head["card"].keys(), name
            assert head["card"]["watch"] in head["card"]["features"]


def test_the_card_decides_for_all_commands(fashion, pictures):
    evaluator = Evaluator(fashion)
    features = classifier(NAMES[0]).features
    assert list(evaluator.spaces) == NAMES and evaluator.judged is evaluator.spaces[NAMES[1]] and not evaluator.gaps
    assert torch.equal(Yardstick.of(fashion).features(pictures), features(pictures))
    panel = panel_of(fashion)
    assert torch.equal(panel.features(pictures), features(pictures))
    assert panel.classes is not None
    assert torch.equal(panel.classes(pictures), zoo.load_classifier(NAMES[0])[0](pictures).argmax(1))


def test_what_is_made_of_a_map_is_measured_like_it(fashion):
    for made in (Guided(fashion, 1.5), fashion.with_network(fashion.network)):  # as a tuned or adapted map is made
        assert list(Evaluator(made).spaces) == NAMES


def test_a_map_of_words_is_watched_by_what_does_not_judge_it():
    emoji = steerfm.load("emoji")
    evaluator = Evaluator(emoji)
    assert evaluator.watch.name == "emoji-clip" and evaluator.watch.text is not None
    judge = evaluator.judge(None, labels=False, prompts=True)
    assert judge is None or judge.name == "emoji_judge"
    assert evaluator.judge(None, labels=False, prompts=False) is None  # nothing is asked for


# --- the judge -----------------------------------------------------------------------------------------------------------
def test_the_judge_judges_the_class_that_a_reward_is_for(fashion, pictures):
    evaluator = Evaluator(fashion)
    for target in ("Bag", "shirt", 3):
        judge = evaluator.judge(steerfm.reward("classifier", target=target), labels=False, prompts=False)
        assert judge is not None and judge.name == "judge"
        assert torch.equal(judge(pictures), steerfm.reward("judge", target=target)(pictures))


def test_the_judge_judges_the_class_that_is_asked_for(fashion, pictures):
    evaluator = Evaluator(fashion)
    judge = evaluator.judge(steerfm.reward("brightness"), labels=True, prompts=False)
    assert judge is not None and judge.needs == {"labels"}
    assert evaluator.judge(steerfm.reward("brightness"), labels=False, prompts=False) is None
    assert evaluator.judge(steerfm.reward("brightness"), labels=False, prompts=True) is None  # it reads no words


def test_a_judge_whose_packages_are_missing_is_none(fashion, monkeypatch):
    class Far(Reward):
        name, packages = "far", ("no_such_package_at_all",)

        def score(self, images, prompts=None, labels=None):
            return images.flatten(1).mean(1)

    fashion = Guided(fashion, 1.0)
    fashion.card = {"judge": {"name": "far"}}
    monkeypatch.setattr("steerfm.rewards.available", lambda: {"far": None})
    monkeypatch.setattr("steerfm.rewards.find", lambda spec: Far)
    assert Evaluator(fashion).judge(None, labels=False, prompts=False) is None
    monkeypatch.setattr(Far, "packages", ())
    assert isinstance(Evaluator(fashion).judge(None, labels=False, prompts=False), Far)


# --- models of one's own -------------------------------------------------------------------------------------------------
@pytest.fixture(params=[{}, {"data": "mine"}, {"data": None}, {"data": "Fashion"}, {"licence": "MIT"}, None, "text"], ids=str)
def own(request, tmp_path):
    """A map of 28 x 28 grey pictures whose card does not say Fashion-MNIST."""
    path = zoo.find("fashion")
    shutil.copy(path, tmp_path / "own.safetensors")
    head = json.loads(path.with_suffix(".json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(head | {"card": request.param}))
    return steerfm.load(tmp_path / "own.safetensors")


def test_a_shape_alone_makes_no_clothes(own, pictures):
    """Own pictures of the same shape are compared by their pixels; no shipped classifier or judge knows them."""
    evaluator = Evaluator(own)
    assert not evaluator.spaces and evaluator.judged is None and not evaluator.gaps
    assert evaluator.judge(steerfm.reward("classifier", target="Bag"), labels=True, prompts=False) is None
    yardstick, panel = Yardstick.of(own), panel_of(own)
    assert yardstick.reference is None and torch.equal(yardstick.features(pictures), pictures.flatten(1))
    assert panel.classes is None and torch.equal(panel.features(pictures), pictures.flatten(1))


@pytest.mark.parametrize(
    ("shape", "names"),
    [((1, 28, 28), ("a", "b", "c")), ((1, 28, 28), tuple("abcdefghij")), ((3, 32, 32), ("a", "b", "c")), ((2,), ("a",))],
)
@pytest.mark.parametrize(
    "card", [{"data": "fashion"}, {"data": "emoji"}, {"data": "fashion", "judge": {"name": "judge"}}], ids=str
)
def test_other_classes_are_other_data(randomise, shape, names, card):
    """Whatever the shape and whatever the card says: the shipped judge knows nothing of somebody's own classes."""
    spec = {"name": "mlp", "dim": 2, "width": 8, "depth": 1} if len(shape) == 1 else {"name": "unet", "channels": shape[0]}
    network = randomise(build_network({**spec, "classes": len(names)} | ({} if len(shape) == 1 else {"widths": [8, 16]})))
    flow_map = NeuralFlowMap(network, shape, class_names=names)
    flow_map.card = card
    evaluator = Evaluator(flow_map)
    assert not evaluator.spaces and evaluator.watch.name == evaluator.first.name == "samples"
    assert evaluator.judge(steerfm.reward("classifier", target="Bag"), labels=True, prompts=False) is None
    assert evaluator.reference(evaluator.first) is None


@pytest.fixture
def mine(tmp_path, randomise):
    """A map of 12 x 12 pictures of three classes with a classifier, a function of features and a judge of its own."""
    names = ("cat", "dog", "owl")
    spec = {"name": "unet", "channels": 1, "widths": [8, 16], "patch": 1, "classes": 3}
    eyes = {"name": "resnet", "channels": 1, "widths": [8, 8], "classes": 3}
    torch.manual_seed(0)
    head = {"kind": "classifier", "network": eyes, "shape": [1, 12, 12], "class_names": list(names), "card": {}}
    for file in ("eyes", "other"):
        save_weights(build_network(eyes), tmp_path / f"{file}.safetensors", head)
    (tmp_path / "mine.py").write_text("def edges(pictures):\n    return pictures.diff(dim=-1).flatten(1)\n")
    card = {
        "data": "pets", "features": ["eyes.safetensors", "mine.py:edges"], "watch": "mine.py:edges",
        "judge": {"name": "judge", "model": "other.safetensors"},
    }  # fmt: skip
    flow_map = NeuralFlowMap(randomise(build_network(spec)), (1, 12, 12), class_names=names)
    return flow_map.save(tmp_path / "mine.safetensors", spec, card)


def test_a_card_of_ones_own_names_files_beside_it(mine, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    flow_map = steerfm.load(mine)
    evaluator, pictures = Evaluator(flow_map), torch.rand(2, 1, 12, 12)
    assert [len(space.features(pictures)) for space in evaluator.spaces.values()] == [2, 2]
    assert torch.equal(evaluator.watch.features(pictures), pictures.diff(dim=-1).flatten(1))
    assert evaluator.first.class_names == ("cat", "dog", "owl") and evaluator.reference(evaluator.first) is None
    judge = evaluator.judge(steerfm.reward("brightness"), labels=True, prompts=False)
    assert judge is not None
    labels = torch.tensor([2, 0])
    told = steerfm.reward("judge", model=tmp_path / "other.safetensors")(pictures, labels=labels)
    assert torch.equal(judge(pictures, labels=labels), told)
    target = steerfm.reward("classifier", model=tmp_path / "eyes.safetensors", target="owl")
    judge = evaluator.judge(target, labels=False, prompts=False)
    assert judge is not None and torch.equal(judge(pictures), told) == bool((labels == 2).all())
    assert evaluator.judge(steerfm.reward("classifier", target="Bag"), labels=False, prompts=False) is None


def test_commands_measure_with_what_an_own_card_names(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "model=mine.safetensors", "n=12", "steps=[1]", "euler=2", "out=run"]) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    row = found["samplers"]["1 jump"]
    assert row["spaces"] == {} and 0 <= row["accuracy"] <= 1  # no statistics of its data ship, so no distances
    told = ["model=mine.safetensors", "reward=brightness", "label=owl", "method=best_of_n", "method.particles=2", "n=2"]
    assert cli.main(["steer", *told, "out=steered"]) == 0
    assert "held_out" in (tmp_path / "steered" / "result.json").read_text()
    assert "no held-out reward" not in capsys.readouterr().out


def test_what_a_card_names_and_is_not_there_is_an_error(mine, tmp_path):
    head = json.loads(mine.with_suffix(".json").read_text())
    head["card"]["features"] = ["gone.safetensors"]
    mine.with_suffix(".json").write_text(json.dumps(head))
    with pytest.raises((ValueError, FileNotFoundError), match="gone"):
        _ = Evaluator(steerfm.load(mine)).spaces


def test_a_card_without_features_of_shipped_data_has_the_shipped_ones():
    """As `steerfm train` writes it."""
    flow_map = NeuralFlowMap(build_network({"name": "unet", "channels": 1, "widths": [8]}), (1, 28, 28))
    flow_map.data = "fashion"
    assert list(Evaluator(flow_map).spaces) == NAMES and flow_map.data == "fashion"
