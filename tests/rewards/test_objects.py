"""Rules about objects, with a detector of drawn squares."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from steerfm_rewards.objects import COLOURS, Objects, read_rule
from torch import Tensor

import steerfm
from steerfm.rewards import RewardError
from steerfm.testing import check_reward

objects = partial(steerfm.reward, Objects)
SIZES = {6: "dog", 4: "cat"}
"""What a square is, by its side in pixels."""


def draw(*squares: tuple[str, str, int, int]) -> Tensor:
    """(3, 32, 32), grey: a square of the side of its class and of a colour, with its left and top."""
    picture, side = torch.full((3, 32, 32), 0.5), {label: side for side, label in SIZES.items()}
    for label, colour, left, top in squares:
        size = side[label]
        picture[:, top : top + size, left : left + size] = torch.tensor(COLOURS[colour])[:, None, None]
    return picture


def detect(images: Tensor) -> list[dict[str, Any]]:
    """Squares on grey: what differs from grey and is connected along rows and columns of its bounding boxes."""
    found = []
    for picture in images:
        mask, boxes, labels = (picture - 0.5).abs().amax(0) > 0.03, [], []
        while bool(mask.any()):
            top, left = (int(value) for value in mask.nonzero()[0])
            side = int((~mask[top, left:]).long().argmax()) if not bool(mask[top, left:].all()) else 32 - left
            boxes.append([left, top, left + side, top + side])
            labels.append(SIZES.get(side, "thing"))
            mask[top : top + side, left : left + side] = False
        found.append({"boxes": boxes, "labels": labels, "scores": [0.9] * len(boxes)})
    return found


SCENE = draw(("dog", "red", 2, 12), ("dog", "blue", 20, 12), ("cat", "green", 12, 2))
TRUE = [
    "two dogs", "a dog", "at least 2 dogs", "at least one cat", "one cat", "a red dog", "one blue dog", "no cups",
    "a Green CAT", "zero red cats", "a red dog to the left of a cat", "a cat above a dog", "a dog below the cat",
    "a blue dog right of a red dog",
    {"class": "dogs", "count": 2}, {"class": "dog", "color": "red", "count": 1}, {"class": "cat", "least": 1},
    {"class": "dog", "colour": "blue", "position": ["right of", "cat"]}, {"class": "dog", "position": ["left of", "dog"]},
]  # fmt: skip
FALSE = [
    "three dogs", "one dog", "at least 3 dogs", "a cup", "no dogs", "a green dog", "two red dogs", "a red dog right of a cat",
    "a cat below a dog", "a cat left of a cup", "a dog right of a green dog",
    {"class": "cat", "count": 0}, {"class": "cat", "colour": "red"},
    {"class": "cat", "position": ["above", "cat"]}, {"class": "dog", "colour": "red", "position": ["right of", "dog"]},
]  # fmt: skip


@pytest.mark.parametrize("rule", TRUE, ids=str)
def test_rules_that_hold(rule):
    assert objects(detector=detect, rules=[rule])(SCENE[None]).tolist() == [1.0]


@pytest.mark.parametrize("rule", FALSE, ids=str)
def test_rules_that_do_not(rule):
    assert objects(detector=detect, rules=rule)(SCENE[None]).tolist() == [0.0]


def test_soft_is_the_share_of_rules_and_strict_all_of_them():
    rules, x = ["two dogs", "a red dog", "a cup"], torch.stack([SCENE, draw(("dog", "red", 2, 2)), draw()])
    torch.testing.assert_close(objects(detector=detect, rules=rules)(x), torch.tensor([2 / 3, 1 / 3, 0.0]))
    assert objects(detector=detect, rules=rules[:2], strict=True)(x).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("colour", list(COLOURS))
def test_colours_of_squares(colour):
    if colour == "grey":
        pytest.skip("the ground")
    x = draw(("dog", colour, 5, 5))[None]
    for other in COLOURS:
        assert float(objects(detector=detect, rules=[{"class": "dog", "colour": other}])(x)) == float(other == colour)


def test_positions_mirror():
    """Left of b is right of a, in every arrangement, and turned pictures turn the rules."""
    for left, top in [(2, 2), (20, 2), (2, 20), (20, 20), (12, 2), (2, 12)]:
        x = draw(("dog", "red", left, top), ("cat", "red", 13, 13))
        value = {place: float(objects(detector=detect, rules=[f"a dog {place} a cat"])(x[None])) for place in PLACES}
        back = {place: float(objects(detector=detect, rules=[f"a cat {place} a dog"])(x[None])) for place in PLACES}
        assert value["left of"] == back["right of"] and value["above"] == back["below"]
        assert value["left of"] == float(objects(detector=detect, rules=["a dog right of a cat"])(x.flip(2)[None]))
        assert value["above"] == float(objects(detector=detect, rules=["a dog below a cat"])(x.flip(1)[None]))
    assert sum(value.values()) >= 1


PLACES = ("left of", "right of", "above", "below")


def test_rules_by_prompt_and_from_metadata(tmp_path):
    x, prompts = torch.stack([SCENE, SCENE]), ["two dogs", "a red cat"]
    made = objects(detector=detect, rules={"two dogs": ["two dogs"], "a red cat": "a red cat"})
    assert made.needs == {"prompts"} and made(x, prompts=prompts).tolist() == [1.0, 0.0]
    lines = [
        {
            "tag": "counting",
            "prompt": "p",
            "include": [{"class": "dog", "count": 2}],
            "exclude": [{"class": "dog", "count": 3}],
        },
        {"prompt": "q", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}]},
        {"prompt": "r", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["below", 0]}]},
        {"prompt": "s", "include": [{"class": "cat", "count": 1, "color": "green"}, {"class": "cup", "count": 1}]},
    ]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    made = objects(detector=detect, rules=str(file))
    assert made(SCENE.expand(4, 3, 32, 32), prompts=list("pqrs")).tolist() == [1.0, 0.0, 1.0, 0.5]
    with pytest.raises(RewardError, match="no rules for 'z': add them to rules= for sample 1"):
        made(x, prompts=["p", "z"])


def test_weak_boxes_do_not_count_and_arrays_do():
    import numpy as np

    def weak(images: Tensor) -> list[dict]:
        boxes = np.array([[0, 0, 4, 4], [8, 8, 12, 12]])
        return [{"boxes": boxes, "labels": ["Sheep", "people"], "scores": np.array([0.9, 0.2])} for _ in images]

    x = torch.rand(1, 1, 16, 16)
    assert objects(detector=weak, rules=["a sheep", "no person"])(x).tolist() == [1.0]
    assert objects(detector=weak, rules=["one person"], threshold=0.1)(x).tolist() == [1.0]


def test_no_objects_is_an_answer():
    made = objects(
        detector=lambda images: [{"boxes": [], "labels": [], "scores": []} for _ in images], rules=["no dogs", "a dog"]
    )
    assert made(torch.rand(2, 3, 8, 8)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "has no rules"),
        ({}, "has no rules"),
        ([3], "has the rule 3"),
        ([{"count": 2}], "names no class"),
        ([{"class": "dog", "cuont": 2}], "no key 'cuont'; keys: class"),
        ([{"class": "dog", "count": -1}], "count=-1"),
        ([{"class": "dog", "count": True}], "count=True"),
        ([{"class": "dog", "color": "mauve"}], "knows no colour 'mauve'; colours: red"),
        ([{"class": "dog", "position": ["near", "cat"]}], r"position \['near', 'cat'\]: give \[left of"),
        (["two"], "cannot read the rule 'two'"),
        (["  "], "cannot read the rule"),
        ("nowhere.jsonl", "cannot read the metadata"),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(RewardError, match=message) as error:
        objects(detector=detect, rules=rules)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "a NoneType for 2 pictures"),
        ([{}], "1 results for 2 pictures"),
        ([{"boxes": [], "labels": []}] * 2, "a dictionary with boxes, labels: give .* for sample 0"),
        ([3, 3], "returned int: give"),
        ([{"boxes": [[0, 0, 1, 1]], "labels": [], "scores": [1]}] * 2, "1 boxes, 0 labels and 1 scores"),
        ([{"boxes": [[0, 0, 1, 1]], "labels": [7], "scores": [1]}] * 2, "labels as texts"),
        ([{"boxes": [["a"]], "labels": ["a"], "scores": [1]}] * 2, "no numbers"),
    ],
)
def test_wrong_detectors(answer, message):
    with pytest.raises(RewardError, match=message):
        objects(detector=lambda images: answer, rules=["a dog"])(torch.rand(2, 3, 8, 8))


def test_a_detector_in_a_file_and_the_contract(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def detect(images):\n"
        "    return [{'boxes': [[0, 0, 4, 4]], 'labels': ['dog'], 'scores': [float(x.mean() > 0.4)]} for x in images]\n"
    )
    made = objects(detector=f"{file}:detect", rules=["a dog", "no cats"])
    assert made(torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])).tolist() == [1.0, 0.5]
    check_reward(made)
    with pytest.raises(RewardError, match="nowhere"):
        objects(detector="nowhere.py:detect", rules=["a dog"])
    with pytest.raises(RewardError, match="is no function of pictures"):
        objects(detector=3, rules=["a dog"])


def test_words_and_dictionaries_are_the_same_rule():
    assert read_rule("two red buses") == read_rule({"class": "bus", "count": 2, "color": "red"})
    assert read_rule("a glass to the right of a knife") == read_rule({"class": "glass", "position": ["right of", "knives"]})
    assert read_rule("orange") == read_rule({"class": "orange"}) != read_rule("an orange orange")
