"""Rewards of the model's own space decode nothing; pictures, video and states in one sum; a picture reward meets a video."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from steerfm_rewards.frames import Frames
from torch import Tensor

import steerfm
from steerfm.cost import Ledger
from steerfm.flowmap import NeuralFlowMap
from steerfm.rewards import Reward, RewardError, WeightedSum, build
from steerfm.rows import Rows
from steerfm.steering.value import Problem
from steerfm.testing import ContractError, check_reward

frames = partial(steerfm.reward, Frames)


class Latent(steerfm.FlowMap):
    """States (2, 4, 4); their pictures are a squashed first channel. Counts decoded rows."""

    def __init__(self) -> None:
        super().__init__((2, 4, 4))
        self.decoded = 0

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: object) -> Tensor:
        return -0.5 * x

    def decode(self, z: Tensor) -> Tensor:
        self.decoded += len(z)
        steerfm.cost.count("decodes", len(z))
        return z[:, :1].sigmoid().repeat_interleave(2, 2)


class First(Reward):
    """Mean of the second channel of a state, which no picture shows."""

    name, unit, space = "first", "mean", "model"

    def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
        assert images.shape[1:] == (2, 4, 4)
        return images[:, 1].mean((1, 2))


class Bright(Reward):
    name, unit, range = "bright", "mean", (0.0, 1.0)

    def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
        assert images.shape[1:] == (1, 8, 4)
        return images.mean((1, 2, 3))


class Black(First):
    name, differentiable = "black", False


def tilt(images: Tensor) -> Tensor:
    return images[:, 1].mean((1, 2))


tilt.space = "model"  # type: ignore[attr-defined]

PURE = {
    "a class": First(),
    "a function": steerfm.reward(tilt),
    "a sum": 0.5 * First() + 2.0 * Black(),
    "normalised": steerfm.reward("normalised", reward=First(), mean=0.3, std=2.0),
    "an ensemble": steerfm.reward("ensemble", members=[First(), tilt]),
    "built": build([{"name": "normalised", "reward": First(), "weight": -1.5}, First()]),
}


def problem(reward: Reward, n: int = 3, micro_batch: int | None = None) -> Problem:
    flow_map = Latent()
    flow_map.micro_batch = micro_batch
    return Problem(flow_map, reward, torch.ones(n), Rows(n, groups=torch.arange(n)))


@pytest.mark.parametrize("reward", PURE.values(), ids=list(PURE))
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_states_are_scored_without_a_decode(reward, micro_batch):
    made, z = problem(reward, micro_batch=micro_batch), torch.randn(3, 2, 4, 4)
    with Ledger() as ledger:
        scores = made.score(z)
    assert made.flow_map.decoded == ledger.cost.decodes == 0 and ledger.cost.reward_calls == 3
    torch.testing.assert_close(scores.total, reward(z))
    torch.testing.assert_close(reward(z), reward.evaluate(torch.rand(3, 1, 8, 4), latents=z).total)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_sum_decodes_once_and_for_the_terms_that_need_pictures(micro_batch):
    total = 2.0 * First() + 3.0 * Bright() - 1.0 * First() + 1.0 * Bright()
    made, z = problem(total, micro_batch=micro_batch), torch.randn(3, 2, 4, 4, requires_grad=True)
    with Ledger() as ledger:
        scores = made.score(z)
        (gradient,) = torch.autograd.grad(scores.total.sum(), z)
    assert made.flow_map.decoded == ledger.cost.decodes == 3
    assert ledger.cost.reward_calls == ledger.cost.reward_backwards == 3
    bright = z[:, 0].sigmoid().mean((1, 2))
    torch.testing.assert_close(scores.total, z[:, 1].mean((1, 2)) + 4 * bright)
    (expected,) = torch.autograd.grad((z[:, 1].mean((1, 2)) + 4 * z[:, 0].sigmoid().mean((1, 2))).sum(), z)
    torch.testing.assert_close(gradient, expected)
    assert list(scores.components) == ["first", "bright", "first 2", "bright 2"]
    torch.testing.assert_close(total.evaluate(made.flow_map.decode(z), latents=z).total, scores.total)


@pytest.mark.parametrize("method", ["best_of_n", "feynman_kac", "fmrg_j"])
def test_steering_in_the_models_space_decodes_nothing(method):
    flow_map = Latent()
    result = steerfm.steer(flow_map, First(), method, n=2, seeds=0, strength=4.0)
    assert result.cost.decodes == flow_map.decoded == 0 and result.cost.reward_calls > 0
    torch.testing.assert_close(result.rewards, result.samples[:, :, 1].mean((2, 3)))


@pytest.mark.parametrize("method", ["best_of_n", "feynman_kac"])
def test_a_sum_with_a_weight_of_nothing_steers_as_its_other_term(method):
    alone = steerfm.steer(Latent(), First(), method, n=2, seeds=0, strength=4.0)
    both = steerfm.steer(Latent(), First() + 0.0 * Bright(), method, n=2, seeds=0, strength=4.0)
    assert torch.equal(alone.samples, both.samples) and set(both.components) == {"first", "bright"}
    assert alone.cost.decodes == 0 and both.cost.decodes == both.cost.reward_calls


def test_it_has_a_gradient_as_the_problem_sees_it():
    assert problem(First()).has_gradient() and problem(First() + Bright()).has_gradient()
    assert not problem(Black()).has_gradient() and not problem(Black() + Bright()).has_gradient()


@pytest.mark.parametrize("shape", [None, (2, 4, 4), (4, 3, 8, 8), (5,)])
def test_the_contract_takes_states_of_any_shape(shape):
    class Norm(Reward):
        name, unit, space = "norm", "squares", "model"

        def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
            return -images.flatten(1).square().mean(1)

    check_reward(Norm(), shape)

    class Batch(Norm):
        def score(self, images: Tensor, prompts=None, labels=None) -> Tensor:
            return super().score(images) - images.mean()

    with pytest.raises(ContractError, match="score every picture by itself"):
        check_reward(Batch(), shape)


def test_the_contract_names_a_space_that_there_is_none_of():
    class Wrong(First):
        space = "latent"

    with pytest.raises(ContractError, match=r"has space = 'latent': it must be one of 'pictures', 'video', 'model'"):
        check_reward(Wrong())
    with pytest.raises(RewardError, match="must be one of 'pictures', 'video', 'model'"):
        Wrong()(torch.rand(1, 2, 4, 4))
    with pytest.raises(ContractError, match="check its terms one by one"):
        check_reward(First() + Bright())


def test_states_are_finite_and_named():
    z = torch.randn(3, 2, 4, 4)
    z[1, 0, 2, 2] = math.nan
    with pytest.raises(RewardError, match=r"'first' takes finite samples.* for sample 1"):
        First()(z)
    z[1, 0, 2, 2], z[2, 1, 0, 0] = 0.0, math.inf  # where no picture shows it
    with pytest.raises(RewardError, match=r"takes finite samples.* for sample 2"):
        problem(First() + Bright()).score(z)
    with pytest.raises(RewardError, match=r"takes finite samples.* for sample 2"):
        problem(First() + Bright(), micro_batch=2).score(z)


def test_what_cannot_be_had_together_is_refused():
    with pytest.raises(RewardError, match="use a sum"):
        steerfm.reward("ensemble", members=[First(), Bright()])
    with pytest.raises(RewardError, match="use a sum"):
        steerfm.reward("normalised", reward=First() + Bright())
    with pytest.raises(RewardError, match=r"evaluate\(images, latents=states\) takes both"):
        (First() + Bright())(torch.rand(2, 1, 8, 4))
    with pytest.raises(RewardError, match="put reward=frames around those of pictures"):
        _ = Bright() + frames(reward=Bright())


# --- video -----------------------------------------------------------------------------------------------------------
def video(b: int = 3, f: int = 5) -> Tensor:
    return 0.05 + 0.9 * torch.rand(b, 3, f, 6, 6, generator=torch.Generator().manual_seed(b))


@pytest.mark.parametrize("name", ["brightness", "sharpness", "compressibility"])
def test_a_picture_reward_refuses_video_and_says_what_to_do(name):
    with pytest.raises(RewardError, match=r"reward=frames reward\.reward=NAME") as error:
        steerfm.reward(name)(video())
    assert "\n" not in str(error.value)
    with pytest.raises(RewardError, match="pictures: use it with a model of video"):
        frames(reward=name)(torch.rand(2, 3, 6, 6))


OVER = {"mean": lambda v: v.mean(1), "min": lambda v: v.amin(1), "max": lambda v: v.amax(1), "last": lambda v: v[:, -1]}


@pytest.mark.parametrize("over", list(OVER))
@pytest.mark.parametrize("every", [1, 2, 9])
@pytest.mark.parametrize("batch", [None, 2, 4])
def test_frames_are_scored_as_pictures(over, every, batch):
    calls: list[int] = []

    def red(images: Tensor, prompts: list[str], labels: Tensor) -> Tensor:
        calls.append(len(images))
        return images[:, 0].square().mean((1, 2)) + torch.tensor([len(prompt) for prompt in prompts]) * labels

    made, x = frames(reward=red, over=over, every=every, batch=batch), video().requires_grad_()
    context = {"prompts": ["a", "bb", "ccc"], "labels": torch.tensor([2, 0, 1])}
    value = made(x, **context)
    per = x[:, 0].square().mean((2, 3)) + torch.tensor([2.0, 0.0, 3.0])[:, None]
    expected = OVER[over](per if over == "last" else per[:, ::every])
    torch.testing.assert_close(value, expected)
    (gradient,), (wanted,) = (torch.autograd.grad(v.sum(), x) for v in (value, expected))
    torch.testing.assert_close(gradient, wanted)
    assert max(calls) <= (batch or 15) and sum(calls) == (3 if over == "last" else 3 * len(range(0, 5, every)))


def test_frames_take_the_parts_of_their_reward():
    calls: list[int] = []

    def red(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images[:, 0].mean((1, 2))

    red.batch_size = 4  # type: ignore[attr-defined]
    frames(reward=red)(video())
    assert calls == [4, 4, 4, 3]


def test_groups_compare_frames_of_one_moment():
    made, x, groups = frames(reward="diversity"), video(4, 3), torch.tensor([0, 1, 0, 1])
    assert made.groupwise
    each = [steerfm.reward("diversity").evaluate(x[:, :, i], groups=groups).total for i in range(3)]
    torch.testing.assert_close(made.evaluate(x, groups=groups).total, torch.stack(each).mean(0))


def test_frames_know_what_their_reward_is():
    assert not frames(reward="compressibility").differentiable
    assert frames(reward={"name": "clip"}).needs == {"prompts"}
    total = frames(reward="brightness") + 2.0 * frames(reward="sharpness", over="min")
    assert total.space == "video" and total(video()).shape == (3,)
    check_reward(frames(reward="brightness"))
    check_reward(frames(reward="compressibility", over="min"), (3, 3, 16, 16))
    check_reward(frames(reward="diversity"), (3, 2, 8, 8))


def test_a_reward_of_video_sees_it_whole():
    def motion(images: Tensor) -> Tensor:
        return images.diff(dim=2).square().mean((1, 2, 3, 4))

    motion.space = "video"  # type: ignore[attr-defined]
    made = steerfm.reward(motion)
    torch.testing.assert_close(made(video()), motion(video()))
    check_reward(made)
    check_reward(made, (1, 3, 8, 8))


def test_the_frame_that_fails_names_its_video():
    def odd(images: Tensor) -> Tensor:
        return torch.where(images[:, 0, 0, 0] > 0.99, math.nan, 1.0)

    x = video()
    x[2, 0, 1, 0, 0] = 1.0
    for batch in (None, 2):
        with pytest.raises(RewardError, match=r"for sample 2$"):
            frames(reward=odd, batch=batch)(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": "median"}, "over='median': give one of mean, min, max, last"),
        ({"every": 0}, "every=0: give a whole number"),
        ({"batch": 1.5}, "batch=1.5: give a whole number"),
        ({"reward": First()}, "'first' reads the model's space"),
        ({"reward": WeightedSum([(1.0, frames(reward="brightness"))])}, "reads video already"),
    ],
)
def test_wrong_arguments_of_frames(arguments, message):
    with pytest.raises(RewardError, match=message):
        frames(**({"reward": "brightness"} | arguments))


# --- tuning and the command line -------------------------------------------------------------------------------------
REWARDS = """
import torch

def second(images):  # of pictures in [0, 1] it would be 0
    return images.clamp_max(0).square().mean((1, 2, 3))

second.space = "model"
"""


def test_from_the_command_line_and_in_tuning(tmp_path, monkeypatch):
    from steerfm import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    common = ["model=fashion", "label=Bag", "n=2", "judge=brightness"]
    steer = ["steer", *common, "method=best_of_n", "method.particles=2", "out=run"]
    assert cli.main([*steer, "reward=mine.py:second"]) == 0
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["cost"]["decodes"] == 0 and told["reward_base"] > 0.1, told
    both = "reward=[{name: 'mine.py:second'}, {name: diversity, weight: 0.1}]"  # sees all outputs at once
    assert cli.main([*steer[:-1], "out=both", both]) == 0
    assert cli.main(["rewards", "mine.py:second", "--check"]) == 0


def test_tuning_scores_states(tmp_path):
    import lightning as L

    from steerfm.finetuning import METHODS, FineTuning

    flow_map = steerfm.load("fashion")
    assert isinstance(flow_map, NeuralFlowMap)
    seen: list[tuple[int, ...]] = []

    def near(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[1:]))
        assert float(images.detach().min()) < 0
        return -images.square().mean((1, 2, 3))

    near.space = "model"  # type: ignore[attr-defined]
    module = FineTuning(flow_map, steerfm.reward(near), METHODS["direct"](), batch_size=2, scale=1.0, steps=1)
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with Ledger() as ledger:
        trainer.fit(module, module.data())
    assert seen and set(seen) == {flow_map.shape} and ledger.cost.decodes == 0
