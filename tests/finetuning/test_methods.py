"""What each method is said to compute, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steerfm import GaussianMixture
from steerfm.finetuning import DDPO, METHODS, Adjoint, FlowGRPO, Policy, Posterior, PosteriorFree, Tasks, Update, Weighted
from steerfm.finetuning.weighted import Anchored, largest_step
from steerfm.flowmap import Wrapped
from steerfm.interpolant import Interpolant, Trigonometric
from steerfm.rewards import as_reward
from steerfm.sampling import Noise
from steerfm.steering.weights import effective_sample_size
from steerfm.training.objectives import FlowMatching


def linear(x):
    return 0.8 * x[:, 0] - 0.5 * x[:, 1]


def update(tuned, reference, b=64, control=1.0, memory=None, step=0) -> Update:
    return Update(
        step, 10, tuned, tuned, reference, as_reward(linear), Tasks()[torch.zeros(b).long()], Tasks(), Noise(range(b)),
        torch.Generator().manual_seed(0), control, 1.0, {} if memory is None else memory,
    )  # fmt: skip


# --- adjoint ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [10, 40])
def test_the_tilted_velocity_is_the_minimum_of_adjoint_matching(steps):
    """Gaussian data and a linear reward, where the target is exact in any number of steps."""
    gm = GaussianMixture([[0.5, -1.0]], [[0.3, 0.6]])
    target, _ = gm.tilt(linear=[0.8, -0.5])
    losses = [Adjoint(steps=steps, trained=None).loss(update(m.flow_map(), gm.flow_map()))["loss"].item() for m in (target, gm)]
    assert losses[0] < 1e-6 * losses[1]


@pytest.mark.slow
def test_it_is_the_minimum_for_a_mixture_too_as_steps_grow():
    """Two modes: the adjoint is random, and its mean is the slope of the value; so the gradient vanishes, not the loss."""
    gm = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [[0.2, 0.2], [0.1, 0.3]])

    def bias(strength: float) -> Tensor:
        """Mean over samples of (D - target) weighted as in the loss: what a constant shift of the denoiser would learn."""
        target, _ = gm.tilt(linear=[0.8, -0.5], strength=strength)
        shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        up = update(Shifted(target.flow_map(), shift), gm.flow_map(), b=2000)
        return torch.autograd.grad(Adjoint(steps=40, trained=None).loss(up)["loss"], shift)[0].abs().max()

    assert bias(1.0) < 0.15 * bias(0.5) and bias(1.0) < 0.15 * bias(1.5)


class Shifted(Wrapped):
    """A map whose velocity is shifted by a constant."""

    def __init__(self, flow_map, shift):
        super().__init__(flow_map)
        self.shift = shift

    def average_velocity(self, x, s, t, cond):
        return super().average_velocity(x, s, t, cond) + self.shift


def test_another_tilt_is_not_the_minimum():
    gm = GaussianMixture([[0.5, -1.0]], [[0.3, 0.6]])
    base = gm.flow_map()
    losses = {}
    for strength in (0.5, 1.0, 2.0):
        target, _ = gm.tilt(linear=[0.8, -0.5], strength=strength)
        losses[strength] = Adjoint(steps=50, trained=None).loss(update(target.flow_map(), base))["loss"].item()
    assert losses[1.0] < 1e-6 * losses[0.5] and losses[1.0] < 1e-6 * losses[2.0]


# --- posterior -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "path"), [(Posterior(steps=8, draws=1), Trigonometric()), (PosteriorFree(steps=8, draws=2), Interpolant())]
)
def test_the_tilted_velocity_is_stationary(method, path):
    """Two modes and a strong tilt: the slope of the loss in a shift of the velocity is zero in the mean; at other tilts not."""
    gm = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [[0.2, 0.2], [0.1, 0.3]], interpolant=path)

    def score(strength: float) -> float:
        target, _ = gm.tilt(linear=[0.8, -0.5], strength=strength)
        slopes, memory = [], {"level": torch.tensor(0.3, dtype=torch.float64)}
        for seed in range(12):
            shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            up = update(Shifted(target.flow_map(), shift), gm.flow_map(), b=160, memory=dict(memory))
            up.noise = Noise(range(1000 * seed, 1000 * seed + 160))
            slopes.append(torch.autograd.grad(method.loss(up)["loss"], shift)[0])
        z = torch.stack(slopes).mean(0) / (torch.stack(slopes).std(0) / 12**0.5)
        return z.abs().max().item()

    assert score(1.0) < 4 and score(0.3) > 5 and score(1.8) > 5


def test_the_level_is_that_of_the_updates_before():
    gm = GaussianMixture([[0.5, -1.0]], [[0.3, 0.6]])
    memory: dict[str, Tensor] = {}
    first = Posterior(steps=1).loss(update(gm.flow_map(), gm.flow_map(), memory=memory))
    assert first["weight"].item() == pytest.approx(1.0) and first["loss"] > 0
    assert memory["level"].shape == () and memory["level"].isfinite()
    memory["level"] += 500.0  # weights far too small, no NaN
    assert Posterior(steps=1).loss(update(gm.flow_map(), gm.flow_map(), memory=memory))["loss"].isfinite()


# --- policy ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [Policy(group=8), FlowGRPO(group=8), DDPO(group=8)], ids=lambda m: type(m).__name__)
def test_the_ratio_is_one_before_the_first_update(method, random_map):
    flow_map = random_map(dim=2)
    terms = method.loss(update(flow_map, flow_map))
    assert terms["ratio"].item() < 1e-9 and terms["clipped"].item() == 0
    assert terms["control_cost"].item() == 0


def test_its_gradient_is_the_score_function_estimate(random_map):
    """One stochastic step: -mean A grad log pi, with the advantages within each group."""
    flow_map = random_map(dim=2).requires_grad_(True)
    method = Policy(steps=2, group=4)
    up = update(flow_map, flow_map, b=8, control=0.0)
    loss = method.loss(up)["loss"]
    x0, x1 = up.own["states"].unbind(1)
    step = method.transition.step(flow_map, x0, 0.0, 0.5, None)
    expected = -(up.own["advantage"] * step.log_prob(x1)).mean()
    for found, by_hand in zip(
        *(torch.autograd.grad(v, list(flow_map.parameters()), retain_graph=True) for v in (loss, expected))
    ):
        assert torch.allclose(found, by_hand, atol=1e-6)
    groups = up.own["advantage"].view(2, 4)
    assert torch.allclose(groups.mean(1), torch.zeros(2), atol=1e-6) and torch.allclose(groups.std(1), torch.ones(2), atol=1e-3)


def test_samples_are_reused_and_far_ratios_clipped(random_map, randomise):
    flow_map = random_map(dim=2)
    method = Policy(group=8, reuse=2)
    method.loss(first := update(flow_map, flow_map))
    states = first.own["states"].clone()
    other = random_map(dim=2)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    second = update(other, flow_map, memory=first.memory, step=1)
    second.own = first.own
    terms = method.loss(second)
    assert torch.equal(second.own["states"], states)
    assert terms["clipped"].item() > 0.1 and terms["control_cost"].item() > 0


def test_policies_need_noise():
    with pytest.raises(ValueError, match="stochastic"):
        Policy(transition="jump")
    with pytest.raises(ValueError, match="renoise"):
        Policy(transition="renoize")


# --- weighted --------------------------------------------------------------------------------------------------------
def test_steps_are_as_large_as_the_weights_allow():
    r = torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert largest_step(r, 0.1, 0.5) == 0.1
    step = largest_step(r, 10.0, 0.5)
    assert effective_sample_size(step * r).mean().item() == pytest.approx(0.5, abs=1e-6)
    assert step == pytest.approx(math.sqrt(math.log(2)), rel=0.1)  # Gaussian rewards: ESS = exp(-step^2)


def test_increments_add_up_to_the_strength(random_map):
    flow_map, memory = random_map(dim=2).float(), {}
    method = Weighted(rounds=5, samples=256, ess=0.3)
    for step in range(10):
        method.loss(update(flow_map, flow_map, control=4.0, memory=memory, step=step))  # mild: the ESS never binds
    assert float(memory["strength"]) == pytest.approx(0.25)
    assert int(memory["round"]) == 4


def test_the_anchor_is_what_the_velocity_has_moved(random_map):
    """Zero at the reference; elsewhere alpha |v - v_ref|^2 at the same noise and times as the fit."""
    flow_map, x1 = random_map(dim=2), torch.randn(256, 2, dtype=torch.float64)
    plain = FlowMatching()(flow_map, x1, None, torch.Generator().manual_seed(3))
    at_home = Anchored(flow_map, 5.0)(flow_map, x1, None, torch.Generator().manual_seed(3))
    assert torch.equal(plain, at_home)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    moved = Anchored(Shifted(flow_map, shift), 2.0)(flow_map, x1, None, torch.Generator().manual_seed(3))
    assert torch.allclose(moved - plain, torch.full((256,), 2.0 * 0.25 / 2, dtype=torch.float64))


def test_every_method_is_explained():
    for name, method in METHODS.items():
        made = method()
        assert (method.__doc__ or "").strip(), name
        for member in ("differentiates", "tilts", "group", "law_is_map", "law_is_velocity"):
            assert hasattr(made, member), (name, member)
