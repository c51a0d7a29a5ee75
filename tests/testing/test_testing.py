"""`steerfm.testing` sees each way to break a contract, and says it in one sentence with its mending."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import sure
from torch import nn

import steerfm
from steerfm import cli
from steerfm.randomness import stream
from steerfm.steering import Outcome
from steerfm.testing import ContractError, check_data, check_method, check_model, check_reward
from steerfm.training.data import MixtureData, TensorBatches, endless


def said(check, *given: Any, **options: Any) -> str:
    """What a check says of what is broken: one sentence, which names a fix after a colon."""
    with pytest.raises(ContractError) as error:
        check(*given, **options)
    text = str(error.value)
    assert "\n" not in text and ": " in text and len(text) < 500 and isinstance(error.value, AssertionError)
    return text


# --- rewards ---------------------------------------------------------------------------------------------------------
class Good(steerfm.Reward):
    """Mean of the pixels."""

    range = (0.0, 1.0)

    def score(self, images, prompts=None, labels=None):
        return images.flatten(1).mean(1)


def broken(body: Callable[..., Any], **facts: Any) -> steerfm.Reward:
    """A reward of one line and some class facts."""
    return type("Broken", (Good,), {"score": body, **facts})()


class Callable_(Good):
    def __call__(self, images, prompts=None, labels=None):
        return self.score(images)


class Keeps(Good):
    def score(self, images, prompts=None, labels=None):
        self.last = images
        return images.flatten(1).mean(1)


class Learns(Good):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 1)


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0] / 2


def mean(images):
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 9, 5)])
def test_good_rewards_pass(shape):
    assert check_reward(Good(), shape) is None
    check_reward(lambda images: images.amax((1, 2, 3)), shape)
    check_reward(
        1.0 * Good() - 0.5 * steerfm.reward("sharpness") + 2 * broken(lambda self, images, **_: images.std((1, 2, 3))), shape
    )
    writes = broken(lambda self, images, **_: mean(images.mul_(0.5)))
    check_reward(writes, shape)  # it may write into its copy


def test_good_rewards_of_vectors_pass():
    check_reward(lambda x: x[:, 0] - x[:, 1] ** 2, (2,))


def test_arrays_and_lists_pass_as_black_boxes():
    def listed(images):
        return [float(image.mean()) for image in images.detach()]

    listed.differentiable = False  # type: ignore[attr-defined]
    check_reward(listed)
    check_reward(broken(lambda self, images, **_: images.numpy().mean((1, 2, 3)), differentiable=False))


BROKEN_REWARDS = {
    "a value of all": (broken(lambda self, images, **_: images.mean()), "one value per image"),
    "a column": (broken(lambda self, images, **_: mean(images)[:, None]), "one value per image"),
    "a map": (broken(lambda self, images, **_: images.mean(1)), "one value per image"),
    "NaN on black": (
        broken(lambda self, images, **_: images.square().sum((1, 2, 3)) / images.sum((1, 2, 3))),
        "nan for sample 0 of plain",
    ),
    "NaN": (broken(lambda self, images, **_: mean(images) * float("nan")), "nan"),
    "inf": (broken(lambda self, images, **_: 1 / (mean(images) * 0)), "inf"),
    "a text": (broken(lambda self, images, **_: "0.5"), "return 4 numbers"),
    "outside its range": (broken(lambda self, images, **_: 3 * mean(images)), "widen range"),
    "range upside down": (broken(mean, range=(1.0, 0.0)), "range"),
    "no name": (broken(lambda self, images, **_: mean(images), name=""), "name"),
    "an unknown need": (broken(lambda self, images, **_: mean(images), needs=frozenset({"captions"})), "needs"),
    "signed pictures, in words": (
        broken(lambda self, images, **_: mean(images) if images.min() < 0 else 1 / 0, range=(-1.0, 1.0)),
        "images = 2 * images - 1",
    ),
    "signed pictures, by a root": (
        broken(lambda self, images, **_: (-images.amin((1, 2, 3))).sqrt()),
        "images = 2 * images - 1",
    ),
    "takes signed pictures": (Callable_(), "leave __call__ to Reward"),
    "compares": (broken(lambda self, images, **_: mean(images) - mean(images).mean(), range=(-1.0, 1.0)), "groupwise = True"),
    "ranks": (
        broken(lambda self, images, **_: mean(images).argsort().argsort() / 4.0, differentiable=False),
        "groupwise = True",
    ),
    "reads other groups": (
        broken(lambda self, images, groups=None, **_: mean(images) - mean(images).mean(), groupwise=True, range=(-1.0, 1.0)),
        "groups",
    ),
    "torch's state": (broken(lambda self, images, **_: mean(images) * torch.rand(())), "global random state"),
    "numpy's state": (broken(lambda self, images, **_: mean(images) * np.random.rand()), "global random state"),
    "python's state": (broken(lambda self, images, **_: mean(images) * random.random()), "global random state"),
    "dropout": (broken(lambda self, images, **_: mean(nn.functional.dropout(images, 0.5)) / 2), "global random state"),
    "seeds": (
        broken(lambda self, images, **_: (torch.manual_seed(0), mean(images) * torch.rand(()))[1]),
        "global random state",
    ),
    "no gradient": (broken(lambda self, images, **_: mean(images.detach())), "differentiable = False"),
    "items": (broken(lambda self, images, **_: [float(image.mean()) for image in images.detach()]), "differentiable = False"),
    "numpy": (lambda images: images.numpy().mean((1, 2, 3)), "differentiable = False"),
    "rounds": (broken(lambda self, images, **_: mean((255 * images).round() / 255)), "differentiable = False"),
    "a gradient all the same": (broken(lambda self, images, **_: mean(images), differentiable=False), "differentiable = True"),
    "a root at grey": (broken(lambda self, images, **_: images.var((1, 2, 3)).sqrt()), "epsilon"),
    "half its gradient": (broken(lambda self, images, **_: mean(Half.apply(images))), "not that of its value"),
    "reads labels": (
        broken(lambda self, images, labels=None, **_: mean(images) / sure(labels).add(1)),
        "add what it reads to needs",
    ),
    "reads prompts": (
        broken(lambda self, images, prompts=None, **_: mean(images) / torch.tensor([len(p) for p in sure(prompts)])),
        "add what it reads to needs",
    ),
    "keeps": (Keeps(), "store nothing"),
    "weights": (Learns(), "requires_grad_(False)"),
    "raises": (broken(lambda self, images, **_: images[:, 7].mean((1, 2))), "images of shape"),
    "no reward": (3.5, "function of images"),
    "a class": (Good, "call the class"),
}
OF_ALL_SHAPES = set(BROKEN_REWARDS) - {"raises"}


@pytest.mark.parametrize("name", BROKEN_REWARDS)
def test_broken_rewards_fail(name):
    reward, fix = BROKEN_REWARDS[name]
    assert fix in said(check_reward, reward, (3, 16, 16))


def test_the_state_of_the_caller_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.is_grad_enabled()
    check_reward(Good())
    said(check_reward, BROKEN_REWARDS["seeds"][0])
    assert torch.get_rng_state().equal(before[0]) and torch.is_grad_enabled() == before[1]
    with torch.no_grad():  # gradients are asked for whatever the mode
        check_reward(Good())


# --- models ----------------------------------------------------------------------------------------------------------
class Shift(steerfm.FlowMap):
    """The exact map of N(mean, 1): u is the same everywhere."""

    def __init__(self, shape=(3,), classes=0):
        super().__init__(shape, class_names=tuple("abc"[:classes]))

    def average_velocity(self, x, s, t, cond):
        return 0.5 + 0.1 * x


def model(**members: Any):
    made = type("Broken", (Shift,), members)
    return made(members.get("of", (3,)), members.get("classes", 0))


def spread(t, x):
    return t.view(-1, *(1,) * (x.ndim - 1))


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4), (3, 6, 5)])
def test_good_models_pass(shape):
    assert check_model(model(of=shape)) is None
    check_model(model(of=shape, average_velocity=lambda self, x, s, t, cond: x * spread(1 - (s + t) / 2, x)))
    check_model(steerfm.GaussianMixture([[0.0, 1.0]], [[1.0, 0.5]]).flow_map())


BROKEN_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "moves at s = t": (
        {
            "jump": lambda self, x, s, t, cond=None: (
                x + self.average_velocity(x, torch.full((len(x),), 0.2), torch.ones(len(x)), cond)
            )
        },
        "same time",
    ),
    "scales at s = t": ({"jump": lambda self, x, s, t, cond=None: 1.01 * x}, "same time"),
    "one velocity for all": ({"average_velocity": lambda self, x, s, t, cond: x[0]}, "one row for each state"),
    "the first state's": ({"average_velocity": lambda self, x, s, t, cond: x[:1].expand_as(x)}, "row"),
    "the first time": ({"average_velocity": lambda self, x, s, t, cond: x * (1 - s[0])}, "a time for each row"),
    "mean of the batch": ({"average_velocity": lambda self, x, s, t, cond: x - x.mean(0)}, "no row may read another"),
    "does not take batches": ({"average_velocity": lambda self, x, s, t, cond: x * float(s)}, "fails with"),
    "NaN at the end": ({"average_velocity": lambda self, x, s, t, cond: x / spread(1 - s, x)}, "not finite"),
    "NaN on the diagonal": (
        {"average_velocity": lambda self, x, s, t, cond: (x * 0.1 * spread(t - s, x)) / spread(t - s, x)},
        "not finite",
    ),
    "another dtype": ({"average_velocity": lambda self, x, s, t, cond: x.double()}, "cast back"),
    "draws": ({"average_velocity": lambda self, x, s, t, cond: x + torch.randn(3)}, "draw nothing"),
    "seeds": ({"average_velocity": lambda self, x, s, t, cond: (torch.manual_seed(1), x)[1]}, "draw nothing"),
    "writes": ({"average_velocity": lambda self, x, s, t, cond: x.mul_(0.5)}, ""),
    "time backwards": ({"velocity": lambda self, x, t, cond=None: -self.average_velocity(x, t, t, cond)}, "noise at t = 0"),
    "not counted": (
        {
            "jump": lambda self, x, s, t, cond=None: (
                x + spread(torch.as_tensor(t - s).expand(len(x)), x) * self.average_velocity(x, s, t, cond)
            )
        },
        "counts 0",
    ),
    "no gradient": (
        {
            "average_velocity": lambda self, x, s, t, cond: x.detach(),
            "jump": lambda self, x, s, t, cond=None: steerfm.FlowMap.jump(self, x, s, t, cond).detach(),
        },
        "cuts the gradient",
    ),
    "decodes to -1..1": ({"of": (1, 4, 4), "decode": lambda self, z: (steerfm.FlowMap.decode(self, z), z)[1]}, "[0, 1]"),
    "decodes uncounted": ({"of": (1, 4, 4), "decode": lambda self, z: ((z + 1) / 2).clamp(0, 1)}, "counts 0 decodes"),
    "encodes otherwise": ({"of": (1, 4, 4), "encode": lambda self, pictures: pictures}, "inverse of decode"),
    "null of two rows": ({"classes": 3, "null": torch.tensor([3, 3])}, "one row"),
    "shape of a batch": ({"of": ()}, "super().__init__(shape)"),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models_fail(name):
    members, fix = BROKEN_MODELS[name]
    assert fix in said(check_model, model(**members))


def test_a_model_in_training_mode_fails():
    class Dropping(Shift):
        def __init__(self):
            super().__init__((8,))
            self.drop = nn.Dropout(0.5)

        def average_velocity(self, x, s, t, cond):
            return self.drop(x)

    assert "eval()" in said(check_model, Dropping())
    check_model(Dropping().eval())


def test_what_is_no_model_fails():
    assert "derive it from steerfm.FlowMap" in said(check_model, nn.Linear(2, 2))


# --- methods ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plain:
    """Best of n, written against the protocol; members are replaced to break it."""

    particles: int = 4

    def check(self, reward):
        pass

    def draw(self, problem, noise):
        return problem.flow_map.jump(noise.start(problem.flow_map), 0.0, 1.0, problem.cond)

    def run(self, problem, noise, n, lookaheads, tick):
        x = self.draw(problem, noise)
        scores = problem.score(x)
        tick(1, 1)
        return self.outcome(x, scores, n, problem)

    def outcome(self, x, scores, n, problem):
        rewards = scores.total.view(n, -1)
        weights = (problem.strength.view(n, -1) * rewards).log_softmax(1)
        zeros = torch.zeros(1, *rewards.shape)
        trace = steerfm.steering.Trace(torch.ones(1), torch.ones(1, n), torch.zeros(1, n).bool(), zeros.long(), zeros, zeros)
        components = {name: value.view(n, -1) for name, value in scores.components.items()}
        return Outcome(x.view(n, -1, *x.shape[1:]), rewards, components, weights, None, trace)


def method(**members: Any):
    given = {name: members.pop(name) for name in ("particles",) if name in members}
    return type("Broken", (Plain,), members)(**given)


def changed(**values: Any):
    """`outcome` with some of its fields replaced by functions of it."""

    def outcome(self, x, scores, n, problem):
        made = Plain.outcome(self, x, scores, n, problem)
        return replace(made, **{name: value(made) for name, value in values.items()})

    return outcome


def grows(self, budget):
    return replace(self, particles=budget + 1)


def within(self, budget):
    return replace(self, particles=budget)


def stubborn(self, budget):
    raise ValueError("no budget is enough")


def numbered(self, problem, noise):
    shape = (len(problem.strength), *problem.flow_map.shape)
    return torch.randn(shape, generator=stream(0)).to(problem.flow_map.dtype)


def from_the_clock(self, problem, noise):
    return Plain.draw(self, problem, noise) + torch.rand(())


def reading_others(self, problem, noise):
    x = Plain.draw(self, problem, noise)
    return x - x.mean(0)


def needing(self, problem, noise, n, lookaheads, tick):
    x = Plain.draw(self, problem, noise).requires_grad_()
    with torch.enable_grad():
        torch.autograd.grad(problem.score(x).total.sum(), x)
    return Plain.run(self, problem, noise, n, lookaheads, tick)


def silent(self, problem, noise, n, lookaheads, tick):
    return Plain.run(self, problem, noise, n, lookaheads, lambda done, steps: None)


def unfinished(self, problem, noise, n, lookaheads, tick):
    return Plain.run(self, problem, noise, n, lookaheads, lambda done, steps: tick(1, 2))


def always(self, reward):
    raise ValueError("no reward will do")


@pytest.mark.slow
def test_good_methods_pass():
    assert check_method(Plain()) is None
    check_method(method(within=within))
    check_method(steerfm.FeynmanKac(particles=4, steps=2))


BROKEN_METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "ignores seeds": ({"draw": numbered}, "the same samples for other seeds"),
    "global state": ({"draw": from_the_clock}, "noise that run is given"),
    "reads other outputs": ({"draw": reading_others}, "keep outputs separate"),
    "loses outputs": (
        {
            "outcome": changed(
                samples=lambda o: o.samples[:1],
                rewards=lambda o: o.rewards[:1],
                log_weights=lambda o: o.log_weights[:1],
                components=lambda o: {name: value[:1] for name, value in o.components.items()},
            )
        },
        "1 outputs instead of 3",
    ),
    "forgets the particles' axis": ({"outcome": changed(samples=lambda o: o.samples[:, 0])}, "(n, k, *shape)"),
    "rewards of others": ({"outcome": changed(rewards=lambda o: o.rewards.flip(1))}, "not those of its samples"),
    "rewards of one": ({"outcome": changed(rewards=lambda o: o.rewards[:, :1])}, "for each particle"),
    "weights unnormalised": ({"outcome": changed(log_weights=lambda o: o.log_weights + 2)}, "normalise"),
    "weights linear": ({"outcome": changed(log_weights=lambda o: o.log_weights.exp())}, "normalise"),
    "log_z of particles": ({"outcome": changed(log_z=lambda o: o.log_weights)}, "log_z"),
    "NaN": ({"draw": lambda self, problem, noise: Plain.draw(self, problem, noise) * float("nan")}, "finite"),
    "overspends": ({"within": grows}, "spends 5 network evaluations"),
    "no budget": ({"within": stubborn}, "refuses budgets"),
    "silent": ({"run": silent}, "call tick"),
    "never done": ({"run": unfinished}, "ends at step 1 of 2"),
    "a gradient of a black box": ({"run": needing}, "raise a ValueError in check"),
    "takes nothing": ({"check": always}, "no reward will do"),
    "no particles": ({"particles": 0}, "particles"),
    "half a particle": ({"particles": 1.5}, "particles"),
    "not runnable": ({"run": property(lambda self: self.nothing)}, "has no run"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN_METHODS)
def test_broken_methods_fail(name):
    members, fix = dict(BROKEN_METHODS[name][0]), BROKEN_METHODS[name][1]
    assert fix in said(check_method, method(**members))


def test_a_class_is_no_method():
    assert "check an object" in said(check_method, Plain)


# --- data ------------------------------------------------------------------------------------------------------------
class Squares(MixtureData):
    """Forty grey pictures of two classes."""

    shape, class_names, asked, licence = (1, 6, 6), ("dark", "light"), ("dark",), "public domain"

    def __init__(self):
        super().__init__(None, 4)

    def setup(self, stage):
        self.labels = torch.arange(40) % 2
        levels = (50 + 100 * self.labels + torch.arange(40)).to(torch.uint8)
        self.train = TensorBatches(levels.view(40, 1, 1, 1).expand(40, *self.shape), self.labels)

    def batch(self, step):
        return self.train[torch.randperm(40, generator=stream(self.seed, "data", step))[:4]]

    def val_dataloader(self):
        return [self.train[[0, 1, 2]]]


def data(**members: Any):
    return type("Broken", (Squares,), members)()


def altered(change):
    return lambda self, step: change(*Squares.batch(self, step))


def test_good_data_pass():
    assert check_data(Squares()) is None
    check_data(data(batch=altered(lambda x, labels: (x, ["a square"] * 4, labels)), class_names=()))
    check_data(MixtureData(steerfm.GaussianMixture([[0.0, 1.0]], [[1.0, 1.0]]), 8))


BROKEN_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "signed": ({"batch": altered(lambda x, labels: (2 * x - 1, labels))}, "[0, 1]"),
    "bytes": ({"batch": altered(lambda x, labels: ((255 * x).byte(), labels))}, "float (b, c, h, w)"),
    "no labels": ({"batch": altered(lambda x, labels: (x,))}, "tuple (x, labels)"),
    "a picture alone": ({"batch": altered(lambda x, labels: x)}, "tuple (x, labels)"),
    "labels of floats": ({"batch": altered(lambda x, labels: (x, labels.float()))}, "int64"),
    "too few labels": ({"batch": altered(lambda x, labels: (x, labels[:2]))}, "2 labels or captions for 4"),
    "a short batch": ({"batch": altered(lambda x, labels: (x[:3], labels[:3]))}, "batch is whole"),
    "labels from 1": ({"batch": altered(lambda x, labels: (x, labels + 1))}, "count from 0"),
    "NaN": ({"batch": altered(lambda x, labels: (x * float("nan"), labels))}, "NaN"),
    "another shape": (
        {"shape": (1, 8, 8), "batch": lambda self, step: (torch.ones(4, 1, 6, 6) * step / 9, torch.zeros(4).long())},
        "shape",
    ),
    "no licence": ({"licence": property(lambda self: self.nothing)}, "licence"),
    "global state": ({"batch": lambda self, step: self.train[torch.randperm(40)[:4]]}, "randomness.stream"),
    "one batch": ({"batch": lambda self, step: self.train[[0, 1, 2, 3]]}, "same batch"),
    "an epoch alone": ({"train_dataloader": lambda self: [self.batch(0)]}, "ends its training"),
    "another order": ({"train_dataloader": lambda self: endless(self, lambda i: self.batch(i + 1))}, "trains on another batch"),
    "no validation": ({"val_dataloader": lambda self: []}, "empty validation"),
    "no setup": ({"setup": lambda self, stage: Path("nowhere").read_text()}, "nowhere"),
}


@pytest.mark.parametrize("name", BROKEN_DATA)
def test_broken_data_fail(name):
    members, fix = BROKEN_DATA[name]
    assert fix in said(check_data, data(**members))


def test_what_is_no_data_fails():
    assert "LightningDataModule" in said(check_data, [1, 2])


# --- the package -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_is_there_from_steerfm_and_without_pytest():
    code = "import sys; sys.modules['pytest'] = None; import steerfm; print(steerfm.testing.check_reward.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "check_reward", done.stderr


# --- the command line ------------------------------------------------------------------------------------------------
def rewards(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(["rewards", *argv])
    return (code, *capsys.readouterr())


MINE = """
import beside

def warm(images, share=1.0):
    return share * images[:, 0].mean((1, 2)) - images[:, -1].mean((1, 2))

def wrong(images):
    return images.mean()
"""


def test_the_command_checks_a_reward_by_name_or_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE.replace("import beside", ""))
    for argv in (
        ["brightness", "--check"],
        ["classifier", "--check", "reward.target=Bag"],
        [f"{tmp_path}/mine.py:warm", "reward.share=2", "--check", "model=emoji"],
    ):
        code, out, err = rewards(capsys, *argv)
        assert code == 0 and "meets the contract" in out and len(out.splitlines()) > 9, err
    code, out, err = rewards(capsys, f"{tmp_path}/mine.py:wrong", "--check")
    assert code == 2 and "one value per image" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["--check"], "steerfm rewards NAME --check"),
        (["brightnes", "--check"], "did you mean 'brightness'"),
        (["brightness", "--check", "reward.targt=1"], "has no argument 'targt'"),
        (["target_image", "--check"], "missing its argument 'target'"),
        (["brightness", "--check", "n=3"], "a check takes reward.KEY=value"),
        (["brightness", "--check", "model=emojy"], "did you mean 'emoji'"),
        (["brightness", "reward.x=1"], "--check"),
    ],
)
def test_what_cannot_be_checked_is_one_line(argv, fix, capsys):
    code, _, err = rewards(capsys, *argv)
    assert code == 2 and fix in err and err.count("\n") == 1
