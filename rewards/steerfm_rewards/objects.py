"""Rules about the objects of a picture, over any detector: how many, of which colour, and where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.rewards import Prompts, Reward, RewardError, find
from steerfm_rewards.checks import check_pictures

NUMBERS = {
    word: i for i, word in enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
NUMBERS |= {"zero": 0}
COLOURS = {
    "red": (0.85, 0.1, 0.1), "orange": (1.0, 0.55, 0.05), "yellow": (0.95, 0.9, 0.1), "green": (0.1, 0.65, 0.15),
    "blue": (0.1, 0.25, 0.85), "purple": (0.5, 0.1, 0.6), "pink": (1.0, 0.6, 0.75), "brown": (0.45, 0.27, 0.1),
    "black": (0.05, 0.05, 0.05), "white": (0.97, 0.97, 0.97), "grey": (0.5, 0.5, 0.5),
}  # fmt: skip
"""Names of colours, and a typical red, green and blue of each."""
PLACES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Positions: the axis (0 across, 1 down), and the sign of the offset from the other object."""
PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "knives": "knife"}
KEYS = ("class", "count", "least", "colour", "position")


@dataclass(frozen=True)
class Rule:
    """One thing that a picture should show.

    Attributes:
        label: class of the objects, singular and lower case.
        count: exactly so many; None for any number of at least ``least``.
        colour: that they have, of `COLOURS`; None for any.
        place, other: that one of them is "left of", "right of", "above" or "below" an object of that class,
        other_colour: which has this colour; None for any.
    """

    label: str
    count: int | None = None
    least: int = 1
    colour: str | None = None
    place: str | None = None
    other: str | None = None
    other_colour: str | None = None


@dataclass
class Seen:
    """What a detector saw in a picture (c, h, w): boxes (n, 4) as left, top, right, bottom in pixels, and n labels."""

    picture: Tensor
    boxes: Tensor
    labels: list[str]

    def holds(self, rule: Rule) -> bool:
        boxes = self._all(rule.label, rule.colour)
        if rule.place is not None and rule.other is not None:
            axis, sign = PLACES[rule.place]
            others = self._all(rule.other, rule.other_colour)
            boxes = [box for box in boxes if any(_offset(box, other)[axis] * sign > 0.5 for other in others)]
        return len(boxes) == rule.count if rule.count is not None else len(boxes) >= rule.least

    def _all(self, label: str, colour: str | None) -> list[Tensor]:
        boxes = [box for box, known in zip(self.boxes, self.labels) if known == label]
        return boxes if colour is None else [box for box in boxes if self._colour(box) == colour]

    def _colour(self, box: Tensor) -> str:
        """The name that fits most pixels in the middle half of a box."""
        left, top, right, bottom = box.tolist()
        (x, w), (y, h) = ((a + (b - a) / 4, (b - a) / 2) for a, b in ((left, right), (top, bottom)))
        y0, x0 = max(0, int(y)), max(0, int(x))
        inside = self.picture[:, y0 : max(y0 + 1, round(y + h)), x0 : max(x0 + 1, round(x + w))].flatten(1)
        inside = inside.expand(3, -1) if len(inside) == 1 else inside[:3]
        if not inside.numel():
            return ""
        near = torch.cdist(inside.T.float(), inside.new_tensor(list(COLOURS.values())).float()).argmin(1)
        return list(COLOURS)[int(near.bincount(minlength=len(COLOURS)).argmax())]


def _offset(box: Tensor, other: Tensor) -> tuple[float, float]:
    """Direction (across, down) from the other box's centre, of length 1 at most; (0, 0) where they share their place.

    As GenEval has it (Ghosh et al. 2310.11513): a tenth of both sizes is taken off first.
    """
    a, b = ((part[:2] + part[2:]) / 2 for part in (box, other))
    slack = 0.1 * ((box[2:] - box[:2]) + (other[2:] - other[:2]))
    offset = (a - b).sign() * ((a - b).abs() - slack).clamp_min(0)
    x, y = (offset / offset.norm().clamp_min(1e-9)).tolist()
    return x, y


class Objects(Reward):
    """Share of rules that hold for the objects that a detector sees: how many, of which colour, and where.

    Unit: share of rules, or with strict=true 1 where all hold and 0 elsewhere. Gradient: none, it is a black box. Colours are
    read from the pixels in the middle of a box. (After GenEval, Ghosh et al. 2310.11513.)

    Args:
        detector: my_file.py:detect, pkg.mod:detect, or a function: pictures (b, c, h, w) to b dictionaries with boxes (n, 4)
            (left, top, right, bottom in pixels), labels (n texts) and scores (n).
        rules: a list for all pictures, each "two dogs", "a red car", "no cats", "at least 3 cups", "a dog left of a cat", or
            {class: dog, count: 2, colour: red, position: [left of, cat]}; {prompt: its list} for the prompt of each; or a file
            of GenEval's metadata, a line {"prompt": ..., "include": [...], "exclude": [...]} for each prompt.
        strict: whether all rules must hold.
        threshold: least score of an object.

    >>> steerfm.reward("objects", detector="my_detector.py:detect", rules=["two dogs", "a red car"])
    """

    name, unit, range = "objects", "share of rules", (0.0, 1.0)
    differentiable = False

    def __init__(self, detector: str | Callable[..., Any], rules: Any, strict: bool = False, threshold: float = 0.3) -> None:
        super().__init__()
        self.detector = find(detector, "detector") if isinstance(detector, str) else detector
        if isinstance(self.detector, type):
            self.detector = self.detector()
        if not callable(self.detector):
            raise RewardError(f"reward 'objects': detector={detector!r} is no function of pictures: def detect(images)")
        self.strict, self.threshold = strict, threshold
        self.rules, self.by_prompt = read_rules(rules)
        self.needs = frozenset({"prompts"} if self.by_prompt else ())

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w), and prompts where rules are by prompt -> (b,)."""
        check_pictures(self.name, images)
        with torch.no_grad():
            answers = self.detector(images.detach())
        answers = list(answers) if isinstance(answers, list | tuple) else answers
        if not isinstance(answers, list) or len(answers) != len(images):
            got = f"{len(answers)} results" if isinstance(answers, list) else f"a {type(answers).__name__}"
            raise RewardError(f"reward 'objects': its detector returned {got} for {len(images)} pictures: a list, one for each")
        values = []
        for row, (picture, answer) in enumerate(zip(images, answers)):
            rules = self.rules if prompts is None or not self.by_prompt else self._rules(prompts[row], row)
            seen = self._seen(picture, answer, row)
            holds = [seen.holds(rule) for rule in rules]
            values.append(float(all(holds)) if self.strict else sum(holds) / len(holds))
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _rules(self, prompt: str, row: int) -> Sequence[Rule]:
        if prompt not in self.by_prompt:
            raise RewardError(f"reward 'objects' has no rules for {prompt!r}: add them to rules=", row)
        return self.by_prompt[prompt]

    def _seen(self, picture: Tensor, answer: Any, row: int) -> Seen:
        wrong = "reward 'objects': its detector returned"
        if not isinstance(answer, Mapping) or not {"boxes", "labels", "scores"} <= set(answer):
            raise RewardError(f"{wrong} {_brief(answer)}: give {{'boxes': (n, 4), 'labels': n, 'scores': n}}", row)
        try:
            boxes = torch.as_tensor(answer["boxes"], dtype=torch.float32).cpu().reshape(-1, 4)
            scores = torch.as_tensor(answer["scores"], dtype=torch.float32).cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise RewardError(f"{wrong} boxes or scores that are no numbers: boxes (n, 4), scores (n,)", row) from None
        labels = list(answer["labels"])
        if not len(boxes) == len(scores) == len(labels) or not all(isinstance(label, str) for label in labels):
            counts = f"{len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores"
            raise RewardError(f"{wrong} {counts}: as many of each, and labels as texts", row)
        good = [i for i, score in enumerate(scores.tolist()) if score >= self.threshold]
        return Seen(picture.detach().cpu(), boxes[good], [singular(labels[i]) for i in good])


def _brief(value: Any) -> str:
    return (
        f"a dictionary with {', '.join(map(str, value)) or 'nothing'}" if isinstance(value, Mapping) else type(value).__name__
    )


# --- rules -----------------------------------------------------------------------------------------------------------
def singular(label: str) -> str:
    """A class as rules and detectors are compared: lower case, its last word singular."""
    *first, word = label.strip().lower().split() or [""]
    if word in PLURALS:
        word = PLURALS[word]
    elif word.endswith("ies") and len(word) > 4:
        word = f"{word[:-3]}y"
    elif re.search(r"(s|x|ch|sh)es$", word):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return " ".join([*first, word])


def read_rules(rules: Any) -> tuple[list[Rule], dict[str, list[Rule]]]:
    """Rules for all pictures, and rules by prompt: one of the two is empty.

    Raises:
        RewardError: no rules, or one that cannot be read.
    """
    if isinstance(rules, str | Path) and str(rules).endswith((".jsonl", ".json")):
        return [], _metadata(Path(rules))
    if isinstance(rules, Mapping) and "class" not in rules:
        made = {str(prompt): [read_rule(rule) for rule in _listed(some)] for prompt, some in rules.items()}
        if not made or not all(made.values()):
            raise RewardError("reward 'objects' has no rules: rules=['two dogs']")
        return [], made
    made = [read_rule(rule) for rule in _listed(rules)]
    if not made:
        raise RewardError("reward 'objects' has no rules: rules=['two dogs']")
    return made, {}


def _listed(rules: Any) -> list[Any]:
    return list(rules) if isinstance(rules, Sequence) and not isinstance(rules, str) else [rules]


def read_rule(rule: Any) -> Rule:
    """A rule from its words or its dictionary.

    Raises:
        RewardError: naming the rule and what it may be.
    """
    if isinstance(rule, str):
        return _from_words(rule)
    if not isinstance(rule, Mapping):
        raise RewardError(f"reward 'objects' has the rule {rule!r}: 'two dogs', or {{class: dog, count: 2}}")
    told = {{"color": "colour"}.get(str(key), str(key)): value for key, value in rule.items()}
    if unknown := sorted(set(told) - set(KEYS)):
        raise RewardError(f"reward 'objects': the rule {dict(rule)} has no key {unknown[0]!r}; keys: {', '.join(KEYS)}")
    label = told.get("class")
    if not isinstance(label, str) or not label.strip():
        raise RewardError(f"reward 'objects': the rule {dict(rule)} names no class: {{class: dog}}")
    for key in ("count", "least"):
        number = told.get(key, 1)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise RewardError(f"reward 'objects': {key}={number!r} in the rule for {label!r}: give a whole number")
    colour = None if told.get("colour") is None else str(told["colour"]).lower().replace("gray", "grey")
    if colour is not None and colour not in COLOURS:
        raise RewardError(f"reward 'objects' knows no colour {colour!r}; colours: {', '.join(COLOURS)}")
    place = other = other_colour = None
    if (position := told.get("position")) is not None:
        if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2 or position[0] not in PLACES:
            raise RewardError(f"reward 'objects' has the position {position!r}: [{' | '.join(PLACES)}, class of the other]")
        place = position[0]
        other_colour, other = _coloured(str(position[1]))
    return Rule(singular(label), told.get("count"), told.get("least", 1), colour, place, other, other_colour)


def _coloured(words: str) -> tuple[str | None, str]:
    """The colour before a class, where there is one, and the class: "red dogs" is red, dog."""
    first, _, rest = words.strip().lower().replace("gray", "grey").partition(" ")
    return (first, singular(rest)) if rest and first in COLOURS else (None, singular(words))


def _from_words(text: str) -> Rule:
    """ "two dogs", "a red car", "no cats", "at least 3 cups", "a dog to the left of a cat"."""
    words = " ".join(text.lower().strip(" .").split())
    position = None
    if found := re.fullmatch(r"(.+?) (?:is |are )?(?:to the )?(left of|right of|above|below) (?:an? |the )?(.+)", words):
        words, position = found[1], [found[2], found[3]]
    least = words.startswith("at least ")
    parts = words.removeprefix("at least ").split()
    number = None
    if parts and parts[0] in ("a", "an", "the"):
        parts = parts[1:]
    elif parts and (parts[0] in NUMBERS or parts[0].isdigit()):
        number = NUMBERS.get(parts[0], int(parts[0]) if parts[0].isdigit() else 0)
        parts = parts[1:]
    told: dict[str, Any] = {} if number is None else {"least" if least else "count": number}
    if not parts:
        raise RewardError(f"reward 'objects' cannot read the rule {text!r}: 'two dogs', 'a red car', 'a dog left of a cat'")
    told["colour"], told["class"] = _coloured(" ".join(parts))
    return read_rule(told | ({} if position is None else {"position": position}))


def _metadata(path: Path) -> dict[str, list[Rule]]:
    """Rules by prompt from a file of GenEval's metadata: what to include, and from which number on it is too many."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        made = {}
        for line in lines:
            include, rules = line.get("include", []), []
            for part in line.get("exclude", []):
                if int(part.get("count", 1)) <= 1:
                    rules.append(Rule(singular(part["class"]), count=0))
            limits = {
                part["class"]: int(part["count"]) - 1 for part in line.get("exclude", []) if int(part.get("count", 1)) > 1
            }
            for part in include:
                count, position = int(part.get("count", 1)), part.get("position")
                told = {"class": part["class"], "colour": part.get("color"), "least": count}
                if limits.get(part["class"]) == count:
                    told["count"] = count
                if position is not None:
                    told["position"] = [position[0], include[position[1]]["class"]]
                rules.append(read_rule(told))
            made[line["prompt"]] = rules
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"reward 'objects' cannot read the metadata {path}: {type(error).__name__}: {error}") from None
    if not made or not all(made.values()):
        raise RewardError(f"reward 'objects': {path} holds a prompt without rules, or none at all")
    return made
