"""`weighted`, `adjoint` and `posterior` reach the exact tilt of a 2-D mixture with a small map; `forward` raises its reward."""

from __future__ import annotations

import logging

import lightning as L
import pytest
import torch

from steerfm import GaussianMixture
from steerfm.finetuning import (
    AWM,
    NFT,
    Adjoint,
    Distil,
    FineTuning,
    Forward,
    Posterior,
    PosteriorFree,
    Refit,
    Tasks,
    Weighted,
    chain,
    draw,
)
from steerfm.flowmap import NeuralFlowMap
from steerfm.metrics import semigroup_error, sliced_wasserstein
from steerfm.networks import Mlp
from steerfm.rewards import as_reward
from steerfm.training import FlowMapTraining
from steerfm.training.data import MixtureData
from steerfm.training.objectives import Trajectory, Triangle

pytestmark = pytest.mark.slow

N, SEEDS = 3000, 4
MIXTURE = GaussianMixture([[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]], [[0.15, 0.3], [0.2, 0.1], [0.1, 0.2]], [0.5, 0.25, 0.25])
SLOPE = torch.tensor([0.9, 0.5], dtype=torch.float64)
TARGET, _ = MIXTURE.tilt(linear=SLOPE)


def reward(x):
    return x @ SLOPE.to(x)


def train(module, data, steps: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0,
    ).fit(module, data)  # fmt: skip


def distance(law, exact: GaussianMixture, flow_map) -> float:
    """Mean over seeds of the sliced W2 distance of two samples."""
    found = []
    for seed in range(SEEDS):
        x = draw(law, Tasks(), flow_map, [1000 + seed], N)
        found.append(sliced_wasserstein(x, exact.sample(N, torch.Generator().manual_seed(seed)).float()))
    return sum(found) / SEEDS


def floor(exact: GaussianMixture) -> float:
    """That of two exact samples."""
    draws = [[exact.sample(N, torch.Generator().manual_seed(100 * k + seed)) for k in (1, 2)] for seed in range(SEEDS)]
    return sum(sliced_wasserstein(a, b) for a, b in draws) / SEEDS


@pytest.fixture(scope="module")
def base() -> NeuralFlowMap:
    torch.manual_seed(0)
    steps, std = 1500, MIXTURE.sample(4000, torch.Generator().manual_seed(0)).std().item()
    flow_map = NeuralFlowMap(Mlp(2, width=64, depth=3), (2,), std=std)
    objective = {Trajectory(Triangle(terminal=0.3, full=0.2)): 0.4}
    module = FlowMapTraining(flow_map, objective, start=0.2, steps=steps, lr=3e-3, warmup=50, decay=0.6, ema=0.995)
    train(module, MixtureData(MIXTURE, 256), steps)
    averaged = module.averaged()
    averaged.network.requires_grad_(False)
    return averaged


def tuned(base, method, steps: int, **options) -> FineTuning:
    options = {"batch_size": 256, "control": 1.0, "scale": 1.0, "lr": 2e-3, "decay": 0.6, "ema": 0.99} | options
    module = FineTuning(base, as_reward(reward), method, steps=steps, **options)
    train(module, module.data(), steps)
    return module


@pytest.fixture(scope="module")
def allowed(base) -> float:
    """1.5 times what two exact samples are apart, and the base's own error."""
    return 1.5 * floor(TARGET) + distance(chain(4)(base), MIXTURE, base)


def test_the_untuned_base_is_far_from_the_target(base, allowed):
    assert distance(chain(4)(base), TARGET, base) > 5 * allowed


def test_weighted_refitting_reaches_the_tilt(base, allowed):
    module = tuned(base, Weighted(rounds=2, samples=8_000, refit=Refit(0.3, ode=4)), steps=500, decay=0.5)
    assert float(module.memory["strength"]) == pytest.approx(1.0)
    for jumps in (1, 2, 4):
        assert distance(chain(jumps)(module.averaged()), TARGET, base) < allowed, jumps


METHODS = {
    "adjoint": (Adjoint(steps=20, trained=6), {"steps": 250, "batch_size": 128}),
    "posterior": (Posterior(steps=6), {"steps": 250, "batch_size": 128}),
    "posterior, without the gradient": (PosteriorFree(steps=6), {"steps": 250, "batch_size": 128}),
}


@pytest.mark.parametrize("name", METHODS)
def test_tuning_of_the_velocity_reaches_the_tilt_and_then_its_jumps_do(base, allowed, name):
    method, options = METHODS[name]
    module = tuned(base, method, **options)
    assert distance(module.law(), TARGET, base) < allowed
    teacher = module.averaged()
    distilled = tuned(base, Distil(module.law(), teacher=teacher), steps=200, start=teacher)
    for jumps in (1, 2, 4):
        assert distance(chain(jumps)(distilled.averaged()), TARGET, base) < allowed, jumps


def mean_reward(law, flow_map) -> float:
    return reward(draw(law, Tasks(), flow_map, [77], N)).mean().item()


def test_tuning_on_the_forward_process_raises_the_reward_of_a_map_that_stays_one(base):
    """In one jump as in four, while the semigroup error is at most 2.5 times the base's: jumps lag a little behind."""
    before, kept = mean_reward(chain(4)(base), base), tuned(base, Forward(), steps=300).averaged()
    one, four = (mean_reward(chain(jumps)(kept), base) for jumps in (1, 4))
    assert min(one, four) > before + 0.4 and abs(one - four) < 0.15
    assert semigroup_error(kept, 2000) < 2.5 * semigroup_error(base, 2000)


@pytest.mark.parametrize("method", [NFT(), AWM()], ids=lambda m: type(m).__name__)
def test_velocities_tuned_on_the_forward_process_raise_the_reward(base, method):
    module = tuned(base, method, steps=200)
    assert mean_reward(module.law(), base) > mean_reward(chain(4)(base), base) + 0.3
