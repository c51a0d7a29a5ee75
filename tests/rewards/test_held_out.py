"""A judge that is the reward, is made of it, or shares weights with it is told from one that is held out."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steerfm
from steerfm import zoo
from steerfm.held_out import check_held_out, in_common
from steerfm.rewards import Reward, RewardError, as_reward


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 1))


class Scorer(Reward):
    """A network of one's own, as an attribute."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
        return self.net(images).squeeze(1)


class Hidden(Reward):
    """A network in a dictionary in a list, where torch does not see it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.kept = [{"net": net}]

    def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
        return self.kept[0]["net"](images).squeeze(1)


class Late(Reward):
    """A network that is loaded when it is asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.loads = seed, 0

    def late_networks(self):
        self.loads += 1
        return [network(self.seed)]

    def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
        return network(self.seed)(images).squeeze(1)


class Elsewhere(Reward):
    """A network that a server runs."""

    def __init__(self, url: str, question: str) -> None:
        super().__init__()
        self.url, self.question = url, question

    def late_networks(self):
        return [self.url]

    def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
        return images.mean((1, 2, 3))


SHARED = network(5)


def by_global(images: Tensor) -> Tensor:
    return helper(images)


def helper(images: Tensor) -> Tensor:
    return SHARED(images).squeeze(1)


def closing_over(net: nn.Module):
    def score(images: Tensor) -> Tensor:
        return net(images).squeeze(1)

    return score


def scored(net: nn.Module, images: Tensor) -> Tensor:
    return net(images).squeeze(1)


class Called:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, images: Tensor) -> Tensor:
        return self.net(images).squeeze(1)

    def method(self, images: Tensor) -> Tensor:
        return self.net(images).squeeze(1)


def ways(net: nn.Module) -> dict[str, Reward]:
    """Rewards that score by one network, each in its way."""
    return {
        "attribute": Scorer(net),
        "hidden": Hidden(net),
        "closure": as_reward(closing_over(net)),
        "partial": as_reward(_named(partial(scored, net))),
        "callable": as_reward(_named(Called(net))),
        "method": as_reward(Called(net).method),
        "sum": 0.3 * Scorer(net) + steerfm.reward("brightness"),
        "ensemble": steerfm.reward("ensemble", members=[Scorer(net), steerfm.reward("sharpness")]),
        "wrapper": steerfm.reward("normalised", reward=Scorer(net), std=2.0),
        "frames": steerfm.reward("frames", reward=Scorer(net)),
    }


def _named(function):
    def named(images: Tensor) -> Tensor:
        return function(images)

    return named


WAYS = list(ways(network()))


@pytest.mark.parametrize("other", WAYS)
@pytest.mark.parametrize("way", WAYS)
def test_one_network_is_seen_however_it_is_held(way: str, other: str):
    net = network()
    assert in_common(ways(net)[way], ways(net)[other])
    assert in_common(ways(net)[way], ways(network(1))[other]) is None
    assert in_common(ways(net)[way], ways(network(0, width=9))[other]) is None


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda net: copy.deepcopy(net).half(),
        lambda net: copy.deepcopy(net).bfloat16(),
        lambda net: nn.Sequential(nn.AvgPool2d(1), *copy.deepcopy(net)),  # under other names
    ],
    ids=["copy", "float16", "bfloat16", "renamed"],
)
def test_weights_of_equal_values_are_the_same(change):
    net = network()
    assert in_common(Scorer(net), Scorer(change(net))) == "shares weights with the reward"


def test_a_trunk_in_common_is_seen_under_heads_of_their_own():
    trunk = network()[:4]
    a, b = (Scorer(nn.Sequential(*copy.deepcopy(trunk), network(seed)[4])) for seed in (1, 2))
    assert in_common(a, b) == "shares weights with the reward"


def test_networks_that_never_met_are_held_out_though_they_begin_alike():
    """Norms and biases begin at ones and zeros, and tables of positions are computed."""

    def made(seed: int) -> nn.Module:
        net = network(seed, width=64)
        net.register_parameter("positions", nn.Parameter(torch.linspace(0, 1, 8).sin()))
        return net

    assert in_common(Scorer(made(0)), Scorer(made(1))) is None


def test_late_networks_are_loaded_only_where_there_is_something_to_compare():
    reward = Late(0)
    assert in_common(reward, steerfm.reward("brightness")) is None and reward.loads == 0
    assert in_common(reward, Scorer(network(1))) is None and reward.loads == 1
    assert in_common(reward, Late(0)) == "shares weights with the reward"
    assert in_common(Scorer(network(3)), steerfm.reward("normalised", reward=Late(3))) == "shares weights with the reward"
    assert in_common(Late(3), Late(4)) is None


def test_a_network_that_runs_elsewhere_is_one_whatever_it_is_asked():
    reward = Elsewhere("http://here", "is it red?")
    assert in_common(reward, Elsewhere("http://here", "is it blue?")) == "shares weights with the reward"
    assert in_common(reward, Elsewhere("http://there", "is it red?")) is None
    vlm = partial(steerfm.reward, "vlm", url="http://localhost:1/v1")
    assert in_common(vlm(model="a", question="red?"), vlm(model="a", question="blue?"))
    assert in_common(vlm(model="a", question="red?"), vlm(model="b", question="red?")) is None


def test_a_global_network_of_a_function_is_seen():
    assert in_common(as_reward(by_global), Scorer(SHARED)) == "shares weights with the reward"
    assert in_common(Scorer(SHARED), as_reward(by_global)) == "shares weights with the reward"


def test_shipped_classifiers(tmp_path: Path):
    bag, dress = (steerfm.reward("classifier", target=name) for name in ("Bag", "Dress"))
    assert in_common(bag, bag) == "is the reward itself"
    assert in_common(bag, dress) == "shares weights with the reward"
    assert in_common(bag, steerfm.reward("judge", target="Bag")) is None
    file = zoo.find("fashion-classifier")
    for path in (file, file.with_suffix(".json")):
        shutil.copy(path, tmp_path / f"mine{path.suffix}")
    assert in_common(bag, steerfm.reward("judge", target="Bag", model=tmp_path / "mine.safetensors"))
    assert in_common(steerfm.reward("judge", target="Bag"), 0.5 * bag + 2.0 * steerfm.reward("judge", target="Bag"))


@pytest.mark.slow
def test_shipped_rewards_of_words():
    clip, judge = steerfm.reward("clip"), steerfm.reward("emoji_judge")
    assert in_common(clip, judge) is None
    assert in_common(clip, steerfm.reward("clip", prompt="a heart", negative="blue")) == "shares weights with the reward"
    assert in_common(steerfm.reward("imagenet", target="wombat"), judge) == "shares weights with the reward"  # one trunk


# --- rewards without weights -----------------------------------------------------------------------------------------
def brightest(images: Tensor) -> Tensor:
    return images.amax((1, 2, 3))


def above(images: Tensor, floor: float = 0.5) -> Tensor:
    return (images > floor).float().mean((1, 2, 3))


def test_arithmetic_is_the_same_by_type_and_arguments():
    def jpeg(quality):
        return steerfm.reward("compressibility", quality=quality)

    assert in_common(jpeg(75), jpeg(75)) == "is the reward itself"
    assert in_common(jpeg(75), jpeg(30)) is None
    assert in_common(steerfm.reward("brightness"), steerfm.reward("sharpness")) is None
    assert in_common(steerfm.reward("brightness"), 3.0 * steerfm.reward("brightness")) == "is the reward itself"
    assert in_common(steerfm.reward("brightness"), steerfm.reward("normalised", reward="brightness", mean=1.0))
    assert in_common(as_reward(brightest), as_reward(brightest)) == "is the reward itself"
    assert in_common(steerfm.reward(above, floor=0.2), steerfm.reward(above, floor=0.2)) == "is the reward itself"
    assert in_common(steerfm.reward(above, floor=0.2), steerfm.reward(above, floor=0.3)) is None
    assert in_common(as_reward(brightest), as_reward(above)) is None


def test_pictures_that_are_asked_for_are_arguments():
    a, b = (torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    target = partial(steerfm.reward, "target_image")
    assert in_common(target(target=a), target(target=a.clone())) == "is the reward itself"
    assert in_common(target(target=a), target(target=b)) is None


def test_a_part_of_the_reward_is_no_judge_and_one_beside_a_judge_is_fine():
    reward = steerfm.reward("brightness") + 2.0 * steerfm.reward("sharpness")
    assert in_common(reward, steerfm.reward("sharpness")) == "is a part of the reward"
    assert in_common(reward, steerfm.reward("brightness") + steerfm.reward("symmetry")) is None


def test_a_function_of_ones_own_is_the_same_each_time_its_file_is_run(tmp_path: Path):
    text = "FLOOR = {}\n\n\ndef f(images):\n    return images.mean((1, 2, 3)) - FLOOR\n\n\ng = f\n"
    for name, floor in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        (tmp_path / f"{name}.py").write_text(text.format(floor))
    a, again, g, b, c = (steerfm.reward(f"{tmp_path}/{spec}") for spec in ("a.py:f", "a.py:f", "a.py:g", "b.py:f", "c.py:f"))
    for judge in (again, g):
        assert in_common(a, judge) == "is the reward itself"
    assert in_common(a, b) is None and in_common(a, c) is None


def test_a_class_of_ones_own_is_compared_by_its_arguments(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "import steerfm\n\nclass Level(steerfm.Reward):\n    def __init__(self, level=0.5):\n        super().__init__()\n"
        "        self.level = level\n\n    def score(self, images, prompts=None, labels=None):\n"
        "        return -(images.mean((1, 2, 3)) - self.level).square()\n"
    )
    made = partial(steerfm.reward, f"{tmp_path}/own.py:Level")
    assert in_common(made(level=0.2), made(level=0.2)) == "is the reward itself"
    assert in_common(made(level=0.2), made(level=0.7)) is None


def test_looking_changes_nothing():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    reward = Scorer(net)
    keys = set(vars(reward))
    with steerfm.cost.Ledger() as ledger:
        in_common(reward, Hidden(copy.deepcopy(net)))
    assert ledger.cost.reward_calls == 0 and set(vars(reward)) == keys
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_refusal_is_one_line_that_names_the_fix():
    with pytest.raises(RewardError, match=r"^judge=brightness: it is the reward itself.*judge=null") as error:
        check_held_out(steerfm.reward("brightness"), steerfm.reward("brightness"))
    assert "\n" not in str(error.value)
    check_held_out(steerfm.reward("brightness"), None)
    check_held_out(steerfm.reward("brightness"), steerfm.reward("sharpness"))
