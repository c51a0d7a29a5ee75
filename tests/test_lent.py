"""A reward, a judge or a callback is lent its arguments and the process: what it does to them changes nothing for others."""

from __future__ import annotations

import random
import re
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from kinds import sure

import steerfm
from steerfm import GaussianMixture, rewards
from steerfm.cli import listing
from steerfm.finetuning.base import Tasks, ask_for_a_gradient, spread
from steerfm.finetuning.evaluation import Panel
from steerfm.flowmap import FlowMap
from steerfm.rewards import Reward, RewardError, WeightedSum, reward
from steerfm.steering import DPS, FMRGE, METHODS, BestOfN, FeynmanKac, Funnel

VECTORS = GaussianMixture(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.36, 0.5]])).flow_map()  # float32 and quick


class Pictures(FlowMap):
    """The exact map of independent normal pixels; decoded to [0, 1]."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__((channels, 4, 4), class_names=("cat", "dog"))
        self.register_buffer("scale", torch.tensor(0.3))

    def average_velocity(self, x, s, t, cond):
        return self.interpolant.gaussian_velocity(x, s.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1), 0.0, 0.3)


def total(images):
    return images.flatten(1).mean(1)


def spoil(images, prompts=None, labels=None):
    """Write into all that is given."""
    value = total(images) ** 2
    with torch.no_grad():
        images.mul_(0).add_(7)
    if prompts is not None:
        prompts[:] = ["spoilt"] * len(prompts)
        prompts.append("more")
    if labels is not None:
        labels.zero_()
    return value


def clean(images, prompts=None, labels=None):
    return total(images) ** 2


def read(images, prompts, labels):
    """Depends on everything that a reward is given."""
    return total(images) + labels.float() + torch.tensor([float(len(text)) for text in prompts])


class Whole(Reward):
    """Share of each picture's group, so that it sees which pictures came together."""

    groupwise = True

    def score(self, images, prompts=None, labels=None, groups=None):
        assert groups is not None
        value = total(images)
        means = torch.stack([value[groups == group].mean() for group in groups])
        groups.zero_()
        return (value - means).square()


def same(a, b):
    for name in ("samples", "rewards", "log_weights"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y in zip(a.components.values(), b.components.values()):
        assert torch.equal(x, y)


# --- arguments -------------------------------------------------------------------------------------------------------
def composed(kind, f):
    """A reward that looks at everything, joined with ``f``."""
    f, r = reward(f), reward(read)
    return {
        "alone": lambda: f,
        "first": lambda: 0.5 * f + r,
        "last": lambda: r + 0.5 * f,
        "nested": lambda: WeightedSum([(2.0, WeightedSum([(1.0, f), (0.5, r)])), (-1.0, r)]),
        "ensemble": lambda: reward("ensemble", members=[f, r, f]),
        "normalised": lambda: reward("normalised", reward=f + r, mean=0.3, std=2.0) + r,
        "groups": lambda: Whole() + f + Whole() + r,
    }[kind]()


@pytest.mark.parametrize("kind", ["alone", "first", "last", "nested", "ensemble", "normalised", "groups"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("flow_map", [VECTORS, Pictures()], ids=["vectors", "pictures"])
def test_a_reward_that_writes_into_its_arguments_changes_nothing(kind, gradient, flow_map):
    method = FMRGE(particles=3, steps=2) if gradient else FeynmanKac(particles=4, steps=2)
    told = {"prompts": ["a dog", "cat"], "labels": torch.tensor([1, 0])}
    mine = {"prompts": list(told["prompts"]), "labels": told["labels"].clone()}
    results = [steerfm.steer(flow_map, composed(kind, f), method, n=2, strength=2.0, **mine) for f in (clean, spoil)]
    same(*results)
    assert mine["prompts"] == told["prompts"] and torch.equal(mine["labels"], told["labels"])


@pytest.mark.parametrize("size", [None, 1, 2])
def test_the_pictures_and_texts_of_a_caller_stay(size):
    x, texts, labels = torch.rand(5, 1, 4, 4), ["a", "bb", "ccc", "d", "e"], torch.arange(5)
    before = x.clone()
    rw = reward(spoil)
    rw.batch_size = size
    assert torch.allclose(rw(x, texts, labels), total(before) ** 2)
    assert torch.equal(x, before) and texts == ["a", "bb", "ccc", "d", "e"] and labels.tolist() == [0, 1, 2, 3, 4]
    leaf = before.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clean)(leaf).sum(), leaf)
    assert gradient.abs().min() > 0


def test_a_value_that_lives_in_memory_used_again_is_copied():
    out = torch.empty(2)

    def again(images):
        return out.copy_(total(images))

    rw, x = reward(again), torch.rand(6, 1, 4, 4)
    rw.batch_size = 2
    assert torch.equal(rw(x), total(x))
    first = rw(x)
    rw(1 - x)
    assert torch.equal(first, total(x))


# --- the process -----------------------------------------------------------------------------------------------------
def meddle(*_):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    for draw in (lambda: np.random.rand(3), random.random, lambda: torch.rand(3)):
        draw()


def meddling(images):
    value = total(images)
    meddle()
    return value


def drawing(images):
    """A reward that draws from the three global generators."""
    return total(images) + torch.rand(len(images)) + random.random() + float(np.random.rand())


def state():
    words = np.random.get_state(legacy=False)["state"]
    numbers = torch.get_rng_state().tolist(), random.getstate(), words["key"].tolist(), words["pos"]
    return torch.get_default_dtype(), torch.is_grad_enabled(), *numbers


@pytest.fixture
def as_before():
    """Leaves the process as it was, whatever fails."""
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def fail_after(images):
    meddle()
    raise ValueError("no")


def test_the_process_is_as_before(as_before):
    x, before = torch.full((2, 1, 4, 4), 0.5), state()
    for method in (BestOfN(particles=2, steps=1), FMRGE(particles=2, steps=2)):
        steerfm.steer(Pictures(), reward(meddling) + drawing, method, progress=meddle)
        assert state() == before
    with pytest.raises(RewardError):
        reward(fail_after)(x)
    assert state() == before


def test_terms_do_not_meet_through_the_process(as_before):
    x = torch.rand(4, 1, 4, 4)
    for sum_ in (reward(meddling) + drawing, reward(drawing) + meddling, reward(drawing) + 0.0 * reward(drawing)):
        assert torch.equal(sum_.evaluate(x).components["drawing"], reward(drawing)(x))


def test_a_file_that_meddles_when_it_is_imported(as_before, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import random, numpy, torch\n"
        "torch.set_default_dtype(torch.float64); torch.manual_seed(0); numpy.random.seed(0); random.seed(0)\n"
        "def mean(images):\n    return images.mean((1, 2, 3))\n"
    )
    before = state()
    reward(f"{tmp_path}/mine.py:mean")
    assert state() == before


# --- facts of a member -----------------------------------------------------------------------------------------------
class Fact(Reward):
    needs, differentiable, batch_size, truth = frozenset({"labels"}), False, 2, torch.zeros(1, 4, 4)

    def __init__(self):
        super().__init__()
        self.seen = []

    def score(self, images, prompts=None, labels=None):
        self.seen.append(len(images))
        return total(images)


WRAPPED = {
    "sum": lambda r: reward(total) + r,
    "nested": lambda r: WeightedSum([(1.0, reward(total)), (2.0, 0.5 * r + reward(total))]),
    "scaled": lambda r: 3.0 * r,
    "ensemble": lambda r: reward("ensemble", members=[total, r]),
    "normalised": lambda r: reward("normalised", reward=r, mean=0.5, std=0.1),
    "sum of wrapped": lambda r: reward("normalised", reward=reward(total) + r) - total,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_facts_of_a_member_hold_for_the_whole(wrap):
    fact = Fact()
    whole = wrap(fact)
    assert not whole.differentiable and whole.needs == {"labels"} and whole.truth is fact.truth and not whole.groupwise
    whole(torch.rand(5, 1, 4, 4), labels=torch.arange(5))
    assert max(fact.seen) <= 2 and sum(fact.seen) == 5
    assert wrap(Whole()).groupwise


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize(
    "method", [BestOfN(particles=3, steps=1), FMRGE(particles=3, steps=2), Funnel(particles=2, first=3, steps=2)]
)
def test_a_groupwise_member_sees_its_groups_whatever_the_batch(wrap, method):
    def run(**sizes):
        return steerfm.steer(Pictures(), wrap(Whole()), method, n=4, strength=20.0, **sizes)

    whole = run()
    for sizes in ({"batch_size": 1}, {"batch_size": 3}, {"micro_batch": 2}, {"batch_size": 2, "micro_batch": 1}):
        part = run(**sizes)
        torch.testing.assert_close(part.rewards, whole.rewards, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(part.samples, whole.samples, atol=2e-5, rtol=1e-4)


# --- downwards -------------------------------------------------------------------------------------------------------
def bent(x):
    return x[:, 0] - 0.3 * x[:, 1] ** 2


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_negative_strength_is_the_negative_reward(name):
    down = steerfm.steer(VECTORS, bent, METHODS[name](), n=3, seeds=4, strength=-1.5)
    up = steerfm.steer(VECTORS, -reward(bent), METHODS[name](), n=3, seeds=4, strength=1.5)
    torch.testing.assert_close(down.samples, up.samples)
    torch.testing.assert_close(down.rewards, -up.rewards)
    torch.testing.assert_close(down.log_weights, up.log_weights)
    torch.testing.assert_close(down.best(), up.best())
    torch.testing.assert_close(bent(down.best()), down.rewards.amin(1))


def test_each_output_has_its_own_direction():
    result = steerfm.steer(VECTORS, bent, BestOfN(particles=8, steps=1), n=3, strength=[-1.0, 1.0, 0.0])
    torch.testing.assert_close(bent(result.best())[:2], torch.stack([result.rewards[0].min(), result.rewards[1].max()]))


# --- finite ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "whole",
    [
        lambda: 1e300 * reward(total),
        lambda: 3e38 * reward(lambda x: 9 + total(x)),
        lambda: WeightedSum([(1e38, reward(lambda x: 1e3 + total(x))), (1.0, reward(total))]),
        lambda: reward(total) + WeightedSum([(3e38, 7.0 * reward(lambda x: 1 + total(x)))]),
    ],
)
def test_a_sum_of_finite_terms_that_is_not_finite_is_named(whole):
    with pytest.raises(RewardError, match=r"reward '.*', a sum of finite terms, is inf for sample 0"):
        steerfm.steer(Pictures(), whole(), BestOfN(particles=2, steps=1))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strength", [1e300, -1e308])
def test_a_tilt_is_finite_or_refused(name, strength):
    def large(x):
        return 1e20 * (1 + x[:, 0].abs())

    with pytest.raises(RewardError, match=r"strength .*1e\+3.* reward 'large'.*sample"):
        steerfm.steer(VECTORS, large, METHODS[name](), n=2, strength=strength)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"tree_search"}))
@pytest.mark.parametrize("strength", [1e38, 1e300])
def test_a_strength_that_is_too_large_says_so(name, strength):
    """All that comes out is finite; what is refused is said to be the strength, and not a reward that is well."""

    def bounded(x):
        return bent(x).tanh()

    try:
        result = steerfm.steer(VECTORS, bounded, METHODS[name](), n=2, strength=strength)
    except RewardError as error:
        assert "strength" in str(error) and "sample" in str(error) and "'bounded' returned" not in str(error)
        return
    for value in (result.samples, result.rewards, result.log_weights):
        assert value.isfinite().all()


# --- nothing to learn ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e-20, 1234.567, -3e20])
def test_a_constant_reward_teaches_nothing(value):
    def constant(images):
        noise = 1 + torch.finfo(torch.float32).eps * (images.flatten(1)[:, 0] > 0.5)  # as rounding does
        return value * noise

    with pytest.raises(RewardError, match="nothing to learn"):
        spread(Pictures(), reward(constant), Tasks(), n=64)


@pytest.mark.parametrize(("offset", "size"), [(0.0, 1e-12), (5.0, 1e-3), (-1e4, 1.0)])
def test_a_small_spread_is_one(offset, size):
    found = spread(Pictures(), reward(lambda images: offset + size * total(images)), Tasks(), n=64)
    assert found == pytest.approx(size * spread(Pictures(), reward(total), Tasks(), n=64), rel=0.02)


# --- what a person wrote ---------------------------------------------------------------------------------------------
def three(images):
    r, g, b = images.unbind(1)
    return (r - (g + b) / 2).mean((1, 2))


class Raising(Reward):
    def score(self, images, prompts=None, labels=None):
        return {}["no such key"]


@pytest.mark.parametrize("wrap", [lambda r: r, *WRAPPED.values()])
@pytest.mark.parametrize(("broken", "name", "kind"), [(three, "three", "ValueError"), (Raising(), "raising", "KeyError")])
def test_an_exception_names_the_reward_its_line_and_the_pictures(wrap, broken, name, kind):
    with pytest.raises(RewardError) as error:
        wrap(reward(broken))(torch.rand(2, 1, 4, 4))
    text = str(error.value)
    assert f"reward '{name}' failed for images of shape (2, 1, 4, 4): {kind}" in text and "\n" not in text
    code = (broken.score if isinstance(broken, Reward) else broken).__code__
    assert f"{code.co_filename}, line {code.co_firstlineno + 1})" in text
    assert type(error.value.__cause__).__name__ == kind


@pytest.mark.parametrize("kind", ["tensor", "array", "list", "tuple", "list of tensors", "array of float64", "integers"])
def test_a_reward_returns_a_tensor_an_array_or_a_list(kind):
    x = torch.rand(4, 1, 4, 4)
    make = {
        "tensor": total,
        "array": lambda x: total(x).numpy(),
        "list": lambda x: total(x).tolist(),
        "tuple": lambda x: tuple(total(x).tolist()),
        "list of tensors": lambda x: list(total(x)),
        "array of float64": lambda x: total(x).numpy().astype("float64"),
        "integers": lambda x: [1, 2, 3, 4],
    }[kind]
    value = reward(make)(x)
    assert value.dtype == torch.float32 and value.shape == (4,)
    torch.testing.assert_close(value, torch.arange(1.0, 5.0) if kind == "integers" else total(x))


def test_a_list_of_tensors_keeps_its_gradient():
    x = torch.rand(4, 1, 4, 4, requires_grad=True)
    reward(lambda images: [image.sum() for image in images])(x).sum().backward()
    assert sure(x.grad).equal(torch.ones_like(x))


def numpy_mean(images):
    return images.numpy().mean(axis=tuple(range(1, images.ndim)))


def hidden_mean(images):
    return torch.from_numpy(images.detach().numpy()).mean(tuple(range(1, images.ndim)))


@pytest.mark.parametrize("blind", [numpy_mean, hidden_mean])
@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: reward(total) + r, lambda r: 2.0 * r])
def test_a_black_box_that_does_not_say_so(blind, wrap):
    """It is steered where the method allows; elsewhere it is refused with the fix. Never by the gradient of the other terms."""
    result = steerfm.steer(Pictures(), wrap(reward(blind)), n=1)
    assert result.rewards.isfinite().all()
    with pytest.raises(RewardError, match=r"reward '.*(numpy|hidden)_mean'.*(gradient-free|differentiable = False)") as error:
        steerfm.steer(Pictures(), wrap(reward(blind)), DPS(particles=1, steps=2))
    assert "\n" not in str(error.value)


# --- one meaning for weight ------------------------------------------------------------------------------------------
def test_a_weight_is_that_of_the_term():
    x = torch.rand(3, 3, 8, 8)
    value = reward("brightness")(x)
    for spec in ({"name": "brightness", "weight": -0.5}, [{"name": "brightness", "weight": -0.5}]):
        torch.testing.assert_close(rewards.build(spec)(x), -0.5 * value)
        torch.testing.assert_close(reward("normalised", reward=spec)(x), -0.5 * value)
    both = rewards.build([{"name": "brightness", "weight": 2}, {"name": "symmetry"}, total])
    torch.testing.assert_close(both(x), 2 * value + reward("symmetry")(x) + total(x))
    assert rewards.build("brightness").name == "brightness"


@pytest.mark.parametrize("weight", ["much", True, None, float("nan"), float("inf"), [1]])
def test_a_weight_that_is_none(weight):
    with pytest.raises(RewardError, match="weight of reward 'brightness'"):
        rewards.build({"name": "brightness", "weight": weight})


def test_clip_has_a_weight_of_its_negative_prompt():
    x, clip = (
        torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        {"name": "clip", "prompt": "a cat", "negative": "a dog"},
    )
    likes = [reward("clip", prompt=text)(x) for text in ("a cat", "a dog")]
    torch.testing.assert_close(
        rewards.build(clip | {"negative_weight": 0.25})(x), likes[0] - 0.25 * likes[1], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(rewards.build(clip | {"weight": 0.5})(x), 0.5 * (likes[0] - likes[1]), atol=1e-5, rtol=0)


# --- tuning, lists and counts ----------------------------------------------------------------------------------------
def tasks():
    return Tasks.of(torch.tensor([0, 1, 0, 1, 0, 1]))


def test_groups_of_a_tuning_are_what_is_asked_for():
    assert tasks().alike().tolist() == [0, 1, 0, 1, 0, 1] and Tasks().alike().tolist() == [0]
    assert Tasks(4, prompts=["a", "b", "a", "c"]).alike().tolist() == [0, 1, 0, 2]
    x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    rw = 2.0 * reward("diversity")
    got = tasks().problem(Pictures(), rw).score(x).total
    for rows in (torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])):
        torch.testing.assert_close(tasks()[rows].problem(Pictures(), rw).score(x[rows]).total, got[rows])


def test_a_panel_compares_all_its_pictures_whatever_their_number():
    n = 300  # more than go at a time
    many = Tasks(n, prompts=["a"] * n)
    panel = Panel(Pictures(), 1.0 * reward("diversity"), None, many, many, lambda x: x.flatten(1))
    x = torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(panel._score(panel.reward, x), reward("diversity")(Pictures().decode(x)))


@pytest.mark.parametrize("blind", [numpy_mean, hidden_mean])
def test_a_tuning_by_gradient_refuses_a_black_box_that_does_not_say_so(blind):
    one = Tasks().problem(Pictures(), reward(total) + reward(blind))
    with pytest.raises(RewardError, match="has no gradient: use weighted or policy") as error:
        ask_for_a_gradient(one)
    assert "\n" not in str(error.value)
    with pytest.raises(RewardError, match="reward 'three' failed"):
        ask_for_a_gradient(Tasks().problem(Pictures(), reward(three)))
    ask_for_a_gradient(Tasks().problem(Pictures(), reward(total)))


def test_a_broken_plug_in_is_named_and_the_others_are_listed(monkeypatch, capsys):
    points = [("mean", f"{__name__}:total"), ("lost", "no_such_module:Lost"), ("whole", f"{__name__}:Whole")]
    found = [EntryPoint(name, value, rewards.GROUP) for name, value in points]
    monkeypatch.setattr(rewards, "entry_points", lambda group: found)
    listing.list_rewards()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in ("mean", "whole", "lost", "broken", "no_such_module"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 2.0}, "n=2.0: give a whole number"),
        ({"n": True}, "n=True: give a whole number"),
        ({"seeds": None}, "seeds=None: give one integer"),
        ({"seeds": 1.5}, "seeds=1.5: give one integer"),
        ({"seeds": [0.5]}, "give one integer"),
        ({"batch_size": 0.5}, "batch_size=0.5: give a whole number"),
        ({"micro_batch": 2.5}, "micro_batch=2.5: give a whole number"),
        ({"cond": torch.tensor([-1, 99]), "n": 2}, "classes are 0 to 1, and 2 means none"),
        ({"cond": torch.tensor([3])}, "classes are 0 to 1"),
    ],
)
def test_counts_seeds_and_classes_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        steerfm.steer(Pictures(), total, BestOfN(particles=2, steps=1), **{"n": 1} | given)


@pytest.mark.parametrize("name", METHODS)
def test_particles_are_whole(name):
    with pytest.raises(ValueError, match=r"particles=(1|4)\.5"):
        steerfm.steer(Pictures(), total, steerfm.method(name, particles=4.5))


def test_the_label_after_the_last_class_and_numpy_integers_are_fine():
    numbers: dict[str, Any] = {"n": np.int64(2), "seeds": np.arange(2)}
    steerfm.steer(Pictures(), total, BestOfN(particles=2, steps=1), **numbers, cond=torch.tensor([0, 2]))
