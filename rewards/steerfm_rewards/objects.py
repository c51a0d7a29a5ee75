"""Rules about the objects in a picture, checked with any detector: how many, of which colour, and where."""

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
"""Names of colours, with a typical (red, green, blue) of each, in [0, 1]."""
PLACES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Positions: the axis (0 horizontal, 1 vertical), and the sign of the offset from the other object."""
PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "knives": "knife"}
KEYS = ("class", "count", "least", "colour", "position")


@dataclass(frozen=True)
class Rule:
    """One condition on the objects in a picture.

    Attributes:
        label: class of the objects, singular and lower case.
        count: exact number of objects; None for at least ``least``.
        least: smallest number of objects.
        colour: colour of the objects, from `COLOURS`; None for any.
        place: position of the objects, "left of", "right of", "above" or "below" an object of class ``other``; None for any.
        other: class of the other object.
        other_colour: colour of the other object; None for any.
    """

    label: str
    count: int | None = None
    least: int = 1
    colour: str | None = None
    place: str | None = None
    other: str | None = None
    other_colour: str | None = None


@dataclass
class Detections:
    """The objects that a detector found in a picture.

    Attributes:
        picture: (c, h, w) in [0, 1].
        boxes: (n, 4) as left, top, right, bottom, in pixels.
        labels: n classes.
    """

    picture: Tensor
    boxes: Tensor
    labels: list[str]

    def holds(self, rule: Rule) -> bool:
        """Whether a rule holds."""
        boxes = self._all(rule.label, rule.colour)
        if rule.place is not None and rule.other is not None:
            axis, sign = PLACES[rule.place]
            others = self._all(rule.other, rule.other_colour)
            boxes = [box for box in boxes if any(_offset(box, other)[axis] * sign > 0.5 for other in others)]
        return len(boxes) == rule.count if rule.count is not None else len(boxes) >= rule.least

    def _all(self, label: str, colour: str | None) -> list[Tensor]:
        boxes = [box for box, name in zip(self.boxes, self.labels) if name == label]
        return boxes if colour is None else [box for box in boxes if self._colour(box) == colour]

    def _colour(self, box: Tensor) -> str:
        """Return the colour that is nearest to most pixels in the middle half of a box."""
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
    """Return the direction (right, down) from the centre of the other box, of length 1 at most; (0, 0) for the same position.

    As in GenEval (Ghosh et al. 2310.11513), a tenth of both sizes is subtracted first.
    """
    a, b = ((part[:2] + part[2:]) / 2 for part in (box, other))
    slack = 0.1 * ((box[2:] - box[:2]) + (other[2:] - other[:2]))
    offset = (a - b).sign() * ((a - b).abs() - slack).clamp_min(0)
    x, y = (offset / offset.norm().clamp_min(1e-9)).tolist()
    return x, y


class Objects(Reward):
    """Share of rules that hold for the objects that a detector finds: how many, of which colour, and where.

    Unit: share of rules; with strict=true, 1 if all rules hold and else 0. Gradient: none, it is a black box. Colours are read
    from the pixels in the middle of a box. (After GenEval, Ghosh et al. 2310.11513.)

    Args:
        detector: my_file.py:detect, pkg.mod:detect, or a function: pictures (b, c, h, w) to b dictionaries with boxes (n, 4)
            (left, top, right, bottom in pixels), labels (n texts) and scores (n).
        rules: a list of rules for all pictures, such as "two dogs", "a red car", "no cats", "at least 3 cups", "a dog left of a
            cat" or {class: dog, count: 2, colour: red, position: [left of, cat]}; a dictionary {prompt: list of rules}; or a
            file of GenEval's metadata, with a line {"prompt": ..., "include": [...], "exclude": [...]} for each prompt.
        strict: whether all rules must hold.
        threshold: smallest score of an object that counts.

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
            raise RewardError(f"reward 'objects': detector={detector!r} is no function of pictures: write def detect(images)")
        self.strict, self.threshold = strict, threshold
        self.rules, self.by_prompt = read_rules(rules)
        self.needs = frozenset({"prompts"} if self.by_prompt else ())

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """images (b, c, h, w), and prompts if rules depend on the prompt -> (b,)."""
        check_pictures(self.name, images)
        with torch.no_grad():
            answers = self.detector(images.detach())
        answers = list(answers) if isinstance(answers, list | tuple) else answers
        if not isinstance(answers, list) or len(answers) != len(images):
            what = f"{len(answers)} results" if isinstance(answers, list) else f"a {type(answers).__name__}"
            wrong = f"reward 'objects': its detector returned {what} for {len(images)} pictures"
            raise RewardError(f"{wrong}: return a list, one for each")
        values = []
        for row, (picture, answer) in enumerate(zip(images, answers)):
            rules = self.rules if prompts is None or not self.by_prompt else self._rules(prompts[row], row)
            detections = self._detections(picture, answer, row)
            holds = [detections.holds(rule) for rule in rules]
            values.append(float(all(holds)) if self.strict else sum(holds) / len(holds))
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _rules(self, prompt: str, row: int) -> Sequence[Rule]:
        if prompt not in self.by_prompt:
            raise RewardError(f"reward 'objects' has no rules for {prompt!r}: add them to rules=", row)
        return self.by_prompt[prompt]

    def _detections(self, picture: Tensor, answer: Any, row: int) -> Detections:
        wrong = "reward 'objects': its detector returned"
        if not isinstance(answer, Mapping) or not {"boxes", "labels", "scores"} <= set(answer):
            raise RewardError(f"{wrong} {_brief(answer)}: give {{'boxes': (n, 4), 'labels': n, 'scores': n}}", row)
        try:
            boxes = torch.as_tensor(answer["boxes"], dtype=torch.float32).cpu().reshape(-1, 4)
            scores = torch.as_tensor(answer["scores"], dtype=torch.float32).cpu().reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise RewardError(f"{wrong} boxes or scores that are no numbers: return boxes (n, 4), scores (n,)", row) from None
        labels = list(answer["labels"])
        if not len(boxes) == len(scores) == len(labels) or not all(isinstance(label, str) for label in labels):
            counts = f"{len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores"
            raise RewardError(f"{wrong} {counts}: return as many of each, and labels as texts", row)
        good = [i for i, score in enumerate(scores.tolist()) if score >= self.threshold]
        return Detections(picture.detach().cpu(), boxes[good], [singular(labels[i]) for i in good])


def _brief(value: Any) -> str:
    return (
        f"a dictionary with {', '.join(map(str, value)) or 'nothing'}" if isinstance(value, Mapping) else type(value).__name__
    )


# --- rules -----------------------------------------------------------------------------------------------------------
def singular(label: str) -> str:
    """Normalise a class name for comparison: lower case, last word singular."""
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
    """Read rules for all pictures, and rules by prompt; one of the two results is empty.

    Raises:
        RewardError: there are no rules, or one cannot be read.
    """
    if isinstance(rules, str | Path) and str(rules).endswith((".jsonl", ".json")):
        return [], _metadata(Path(rules))
    if isinstance(rules, Mapping) and "class" not in rules:
        result = {str(prompt): [read_rule(rule) for rule in _as_list(some)] for prompt, some in rules.items()}
        if not result or not all(result.values()):
            raise RewardError("reward 'objects' has no rules: rules=['two dogs']")
        return [], result
    result = [read_rule(rule) for rule in _as_list(rules)]
    if not result:
        raise RewardError("reward 'objects' has no rules: rules=['two dogs']")
    return result, {}


def _as_list(rules: Any) -> list[Any]:
    return list(rules) if isinstance(rules, Sequence) and not isinstance(rules, str) else [rules]


def read_rule(rule: Any) -> Rule:
    """Parse a rule from a text or a dictionary.

    Raises:
        RewardError: the rule cannot be read. The message names it and the valid forms.
    """
    if isinstance(rule, str):
        return _from_words(rule)
    if not isinstance(rule, Mapping):
        raise RewardError(f"reward 'objects' has the rule {rule!r}: give 'two dogs', or {{class: dog, count: 2}}")
    entries = {{"color": "colour"}.get(str(key), str(key)): value for key, value in rule.items()}
    if unknown := sorted(set(entries) - set(KEYS)):
        raise RewardError(f"reward 'objects': the rule {dict(rule)} has no key {unknown[0]!r}; keys: {', '.join(KEYS)}")
    label = entries.get("class")
    if not isinstance(label, str) or not label.strip():
        raise RewardError(f"reward 'objects': the rule {dict(rule)} names no class: give {{class: dog}}")
    for key in ("count", "least"):
        number = entries.get(key, 1)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise RewardError(f"reward 'objects': {key}={number!r} in the rule for {label!r}: give a whole number")
    colour = None if entries.get("colour") is None else str(entries["colour"]).lower().replace("gray", "grey")
    if colour is not None and colour not in COLOURS:
        raise RewardError(f"reward 'objects' knows no colour {colour!r}; colours: {', '.join(COLOURS)}")
    place = other = other_colour = None
    if (position := entries.get("position")) is not None:
        if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2 or position[0] not in PLACES:
            raise RewardError(f"reward 'objects' has the position {position!r}: give [{' | '.join(PLACES)}, other class]")
        place = position[0]
        other_colour, other = _colour_and_class(str(position[1]))
    return Rule(singular(label), entries.get("count"), entries.get("least", 1), colour, place, other, other_colour)


def _colour_and_class(words: str) -> tuple[str | None, str]:
    """Split a text into an optional colour and a class: "red dogs" becomes ("red", "dog")."""
    first, _, rest = words.strip().lower().replace("gray", "grey").partition(" ")
    return (first, singular(rest)) if rest and first in COLOURS else (None, singular(words))


def _from_words(text: str) -> Rule:
    """Parse "two dogs", "a red car", "no cats", "at least 3 cups" or "a dog to the left of a cat"."""
    words = " ".join(text.lower().strip(" .").split())
    position = None
    if match := re.fullmatch(r"(.+?) (?:is |are )?(?:to the )?(left of|right of|above|below) (?:an? |the )?(.+)", words):
        words, position = match[1], [match[2], match[3]]
    least = words.startswith("at least ")
    parts = words.removeprefix("at least ").split()
    number = None
    if parts and parts[0] in ("a", "an", "the"):
        parts = parts[1:]
    elif parts and (parts[0] in NUMBERS or parts[0].isdigit()):
        number = NUMBERS.get(parts[0], int(parts[0]) if parts[0].isdigit() else 0)
        parts = parts[1:]
    entries: dict[str, Any] = {} if number is None else {"least" if least else "count": number}
    if not parts:
        raise RewardError(f"reward 'objects' cannot read the rule {text!r}: write 'a red car' or 'a dog left of a cat'")
    entries["colour"], entries["class"] = _colour_and_class(" ".join(parts))
    return read_rule(entries | ({} if position is None else {"position": position}))


def _metadata(path: Path) -> dict[str, list[Rule]]:
    """Read rules by prompt from GenEval's metadata: objects to include, and counts from which there are too many."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        rules_by_prompt = {}
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
                entries = {"class": part["class"], "colour": part.get("color"), "least": count}
                if limits.get(part["class"]) == count:
                    entries["count"] = count
                if position is not None:
                    entries["position"] = [position[0], include[position[1]]["class"]]
                rules.append(read_rule(entries))
            rules_by_prompt[line["prompt"]] = rules
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"reward 'objects' cannot read the metadata {path}: {type(error).__name__}: {error}") from None
    if not rules_by_prompt or not all(rules_by_prompt.values()):
        raise RewardError(f"reward 'objects': {path} holds a prompt without rules, or no prompt")
    return rules_by_prompt
