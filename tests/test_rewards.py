"""The contract of `steerfm.rewards`: what is checked, composed, counted and found."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from kinds import sure
from torch import Tensor, nn

from steerfm import rewards
from steerfm.cost import Ledger
from steerfm.rewards import FunctionReward, Reward, RewardError, WeightedSum, as_reward, reward


def pictures(b: int = 5, c: int = 1, side: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(b, c, side, side, generator=torch.Generator().manual_seed(seed))


def mean(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


class Scaled(Reward):
    """`mean` times a factor; remembers the sizes of the batches that it saw."""

    name = "scaled"

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor, self.seen = factor, []

    def score(self, images, prompts=None, labels=None):
        self.seen.append(len(images))
        return self.factor * mean(images)


class Blind(Scaled):
    name, differentiable = "blind", False


class Labelled(Reward):
    name, needs = "labelled", frozenset({"labels"})

    def score(self, images, prompts=None, labels=None):
        return sure(labels).float()


# --- what can be a reward --------------------------------------------------------------------------------------------
def test_a_function_is_a_reward():
    rw, x = reward(mean), pictures()
    assert isinstance(rw, FunctionReward) and rw.name == "mean" and rw.differentiable and not rw.needs
    torch.testing.assert_close(rw(x), mean(x))
    assert rw(x).shape == (5,) and rw(x).dtype == torch.float32


def test_a_function_gets_its_arguments_prompts_and_labels():
    def pick(images, labels, prompts=None, power=1.0):
        assert prompts == ["a"] * len(images)
        return labels.float() ** power

    rw, labels = reward(pick, power=2.0), torch.arange(5)
    assert rw.needs == {"labels"}  # prompts have a default
    torch.testing.assert_close(rw(pictures(), prompts=["a"] * 5, labels=labels), labels.float() ** 2)


def test_a_function_may_carry_facts():
    def fact(images):
        return mean(images)

    facts: Any = fact  # types know no attributes of functions
    facts.name, facts.differentiable, facts.batch_size = "my fact", False, 2
    rw = as_reward(fact)
    assert (rw.name, rw.differentiable, rw.batch_size) == ("my fact", False, 2)


def test_a_subclass_is_a_reward_and_its_name_defaults_to_its_class():
    class Warmth(Scaled):
        pass

    assert Warmth.name == "warmth" and Scaled.name == "scaled"
    torch.testing.assert_close(reward(Warmth, factor=3.0)(pictures()), 3 * mean(pictures()))
    built = Scaled()
    assert reward(built) is built and as_reward(built) is built


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_promoted_and_the_value_is_float32(dtype):
    seen = []
    value = reward(lambda images: seen.append(images.dtype) or mean(images))(pictures().to(dtype))
    assert value.dtype == torch.float32 and seen == [torch.promote_types(dtype, torch.float32)]


def test_vectors_have_no_range():
    torch.testing.assert_close(reward(lambda x: x.sum(1))(torch.full((3, 2), -7.0)), torch.full((3,), -14.0))


def test_an_empty_batch_has_empty_values():
    assert reward(mean)(pictures(0)).shape == (0,)


def test_a_reward_stays_in_evaluation_mode():
    class Dropped(Reward):
        def __init__(self):
            super().__init__()
            self.network = nn.Dropout(0.5).eval()

        def score(self, images, prompts=None, labels=None):
            return self.network(images).mean((1, 2, 3))

    rw = Dropped()
    nn.ModuleList([rw]).train()
    torch.testing.assert_close(rw(pictures()), mean(pictures()))


@pytest.mark.parametrize("thing", [3, None, "brightness", Scaled])
def test_other_things_are_refused(thing):
    with pytest.raises(RewardError, match="a reward is a function of images or a Reward"):
        as_reward(thing)


def test_a_class_that_is_no_reward_is_refused():
    with pytest.raises(RewardError, match="not a function or a Reward"):
        reward(dict)


# --- composition -----------------------------------------------------------------------------------------------------
def test_arithmetic_and_components():
    x, a, b = pictures(), Scaled(2.0), reward(lambda images: images.amax((1, 2, 3)))
    b.name = "top"
    total = 2 * (1.5 * a - b) + -a
    assert isinstance(total, WeightedSum) and [weight for weight, _ in total.terms] == [3.0, -2.0, -1.0]
    scores = total.evaluate(x)
    torch.testing.assert_close(scores.total, 3 * a(x) - 2 * b(x) - a(x))
    torch.testing.assert_close(scores.components, {"scaled": a(x), "top": b(x), "scaled 2": a(x)})
    torch.testing.assert_close(total(x), scores.total)


def test_functions_join_a_sum():
    torch.testing.assert_close((Scaled(1.0) + mean)(pictures()), 2 * mean(pictures()))


def test_equal_names_are_numbered():
    total = Scaled(1.0) + Scaled(2.0) + Scaled(3.0)
    components = total.evaluate(pictures()).components
    assert list(components) == ["scaled", "scaled 2", "scaled 3"]
    torch.testing.assert_close(components["scaled 3"], 3 * mean(pictures()))


def test_components_have_no_graph_and_the_total_has():
    scores = (Scaled() + Scaled()).evaluate(pictures().requires_grad_())
    assert scores.total.requires_grad and not any(value.requires_grad for value in scores.components.values())


def test_a_sum_with_a_black_box_is_a_black_box():
    total = Scaled() + Blind()
    assert not total.differentiable and not total(pictures().requires_grad_()).requires_grad


def test_a_sum_needs_what_its_terms_need():
    total = Scaled() + 0.5 * Labelled()
    assert total.needs == {"labels"}
    with pytest.raises(RewardError, match="needs labels"):
        total(pictures())
    torch.testing.assert_close(total(pictures(), labels=torch.arange(5)), 2 * mean(pictures()) + torch.arange(5) / 2)


def test_weights_are_finite():
    with pytest.raises(RewardError, match="weight of reward 'scaled' is nan"):
        _ = float("nan") * Scaled()


# --- micro-batches and costs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_micro_batches_change_nothing(size):
    x, rw = pictures().requires_grad_(), Scaled()
    rw.batch_size = size
    with Ledger() as ledger:
        value = rw(x)
        value.sum().backward()
    assert max(rw.seen) <= size and sum(rw.seen) == 5
    torch.testing.assert_close(value, Scaled()(x))
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 / 16))
    assert (ledger.cost.reward_calls, ledger.cost.reward_backwards) == (5, 5)


def test_micro_batches_split_prompts_and_labels():
    rw = reward(lambda images, prompts, labels: labels.float() + torch.tensor([float(p) for p in prompts]))
    rw.batch_size = 2
    value = rw(pictures(), prompts=["10", "20", "30", "40", "50"], labels=torch.arange(5))
    assert value.tolist() == [10, 21, 32, 43, 54]


def test_costs():
    x = pictures().requires_grad_()
    with Ledger() as ledger:
        Scaled()(x)  # no backward
        Scaled()(x).sum().backward()
        (Scaled() + Scaled())(x).sum().backward()  # a sum counts as one reward
        with torch.no_grad():
            Scaled()(x)
        Blind()(x)
    assert (ledger.cost.reward_calls, ledger.cost.reward_backwards) == (25, 10)


def test_a_black_box_keeps_no_graph():
    assert not Blind()(pictures().requires_grad_()).requires_grad
    assert Scaled()(pictures().requires_grad_()).requires_grad


# --- checks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda images: images.mean((2, 3)),
            "returned shape (5, 1) for 5 images: return one value per image, shape (5,)",
        ),
        (lambda images: images.mean(), "returned shape () for 5 images"),
        (lambda images: 1.0, "returned a float: return 5 numbers"),
        (lambda images: ["high"] * 5, "returned a list: return 5 numbers"),
        (lambda images: [0.0] * 4, "returned shape (4,) for 5 images"),
        (lambda images: images.numpy(), "returned shape (5, 1, 4, 4) for 5 images"),
        (lambda images: torch.tensor([0, 1, float("nan"), 3, float("inf")]), "returned nan for sample 2"),
        (lambda images: torch.tensor([0, 1, 2, -float("inf"), 4]), "returned -inf for sample 3"),
    ],
)
def test_wrong_values(function, message):
    function.name = "mine"
    with pytest.raises(RewardError, match=re.escape(f"reward 'mine' {message}")):
        reward(function)(pictures())


def test_the_bad_sample_is_named_across_micro_batches():
    rw = reward(lambda images: images.sum((1, 2, 3)).masked_fill(images[:, 0, 0, 0] == 1, float("nan")))
    rw.batch_size, x = 2, pictures() * 0.9
    x[3, 0, 0, 0] = 1
    with pytest.raises(RewardError, match="returned nan for sample 3"):
        rw(x)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures() * 2 - 1, "takes images in [0, 1]"),
        (pictures() * 255, "use FlowMap.decode"),
        (torch.full((2, 1, 4, 4), float("nan")), "takes images in [0, 1], got [nan, nan]"),
        (
            (pictures() * 255).to(torch.uint8),
            "takes float images (b, c, h, w) in [0, 1] or vectors (b, d), got torch.uint8",
        ),
        (pictures()[0], "got torch.float32 (1, 4, 4)"),
        ([1.0], "got list"),
    ],
)
def test_wrong_images(images, message):
    with pytest.raises(RewardError, match=re.escape(message)):
        Scaled()(images)


def test_rounding_is_not_out_of_range():
    Scaled()(pictures() * 1.0005)


def test_missing_and_mismatched_context():
    with pytest.raises(RewardError, match="reward 'labelled' needs labels: condition the model, or pass labels="):
        Labelled()(pictures())
    with pytest.raises(RewardError, match="got 4 labels for 5 images"):
        Labelled()(pictures(), labels=torch.arange(4))
    with pytest.raises(RewardError, match="got 2 prompts for 5 images"):
        Scaled()(pictures(), prompts=["a", "b"])
    prompted = reward(lambda images, prompts: mean(images))
    with pytest.raises(RewardError, match="needs prompts"):
        prompted(pictures())


def test_a_subclass_without_score_says_so():
    with pytest.raises(NotImplementedError, match="does not define score"):
        type("Empty", (Reward,), {})()(pictures())


# --- finding rewards -------------------------------------------------------------------------------------------------
FILE = """
from __future__ import annotations
from dataclasses import dataclass
from steerfm.rewards import Reward

def red(images, power=1.0):
    return images[:, 0].mean((1, 2)) ** power

@dataclass
class Plain:
    x: int = 0

class Tinted(Reward):
    def __init__(self, channel: int, weight: float = 1.0):
        super().__init__()
        self.channel, self.weight = channel, weight
    def score(self, images, prompts=None, labels=None):
        return self.weight * images[:, self.channel].mean((1, 2))

built = Tinted(0)
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A user's file, also importable as ``my_rewards``."""
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


@pytest.mark.parametrize("where", ["path", "module"])
def test_rewards_of_a_file_and_of_a_module(file, where):
    prefix, x = str(file) if where == "path" else "my_rewards", pictures(c=3)
    torch.testing.assert_close(reward(f"{prefix}:red", power=2.0)(x), x[:, 0].mean((1, 2)) ** 2)
    tinted = reward(f"{prefix}:Tinted", channel=2, weight=0.5)
    assert tinted.name == "tinted"
    torch.testing.assert_close(tinted(x), 0.5 * x[:, 2].mean((1, 2)))
    torch.testing.assert_close(reward(f"{prefix}:built")(x), x[:, 0].mean((1, 2)))


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("FILE:red", {"powr": 2}, "reward 'red' has no argument 'powr' (did you mean 'power'?); arguments: power"),
        ("FILE:Tinted", {"channel": 1, "wieght": 2}, "has no argument 'wieght' (did you mean 'weight'?)"),
        (
            "FILE:Tinted",
            {},
            "reward 'tinted' is missing its argument 'channel': pass channel=...; arguments: channel, weight",
        ),
        ("FILE:built", {"channel": 1}, "is already built and takes no arguments: channel"),
        ("FILE:number", {}, "is a int, not a function or a Reward"),
        ("FILE:Plain", {}, "is a type, not a function or a Reward"),
        ("FILE:rad", {}, "has no 'rad' (did you mean 'red'?)"),
        ("nowhere.py:red", {}, "no such reward file: nowhere.py"),
        ("no_such_package:red", {}, "cannot import no_such_package: ModuleNotFoundError"),
        ("steerfm_rewards.simple:Brightnes", {}, "has no 'Brightnes' (did you mean 'Brightness'?)"),
    ],
)
def test_what_cannot_be_found_is_explained_in_one_line(file, spec, arguments, message):
    with pytest.raises(RewardError, match=re.escape(message)) as error:
        reward(spec.replace("FILE", str(file)), **arguments)
    assert "\n" not in str(error.value)


def test_a_class_without_arguments_takes_none():
    with pytest.raises(RewardError, match="reward 'labelled' has no argument 'target'; arguments: none"):
        reward(Labelled, target="Bag")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(RewardError, match=r"cannot import .*broken.py: ModuleNotFoundError"):
        reward(f"{tmp_path / 'broken.py'}:red")


@pytest.fixture
def installed(monkeypatch):
    points = [("scaled", f"{__name__}:Scaled"), ("sharpness", "elsewhere:Sharp"), ("function", f"{__name__}:mean")]
    found = [EntryPoint(name, value, rewards.GROUP) for name, value in points]
    monkeypatch.setattr(rewards, "entry_points", lambda group: found if group == rewards.GROUP else [])


def test_entry_points(installed):
    assert list(rewards.available()) == ["function", "scaled", "sharpness"]
    torch.testing.assert_close(reward("scaled", factor=4.0)(pictures()), 4 * mean(pictures()))
    torch.testing.assert_close(reward("function")(pictures()), mean(pictures()))


def test_an_unknown_name_suggests_the_nearest(installed):
    with pytest.raises(RewardError, match=r"unknown reward 'sharpnes' \(did you mean 'sharpness'\?\); installed: function"):
        reward("sharpnes")
    with pytest.raises(RewardError, match=r"unknown reward 'xyz'; installed: .*your own: path/to/file.py:name"):
        reward("xyz")


def test_a_plug_in_that_cannot_be_imported_is_named(installed):
    with pytest.raises(RewardError, match=r"cannot import reward 'sharpness' \(elsewhere:Sharp\): ModuleNotFoundError"):
        reward("sharpness")
