"""Where the methods on the forward process come to rest, against closed forms: exact maps and ratings that are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steerfm import GaussianMixture
from steerfm.finetuning import AWM, NFT, Forward, MeanFlowNFT, Tasks, Update
from steerfm.finetuning.forward import Pairs, contrast
from steerfm.flowmap import FlowMap, Wrapped
from steerfm.interpolant import Interpolant, Trigonometric, expand_time
from steerfm.rewards import as_reward
from steerfm.sampling import Noise

MEANS, COVS, WEIGHTS = [[-1.0, 0.0], [1.0, 0.5]], [[0.2, 0.2], [0.1, 0.3]], [0.6, 0.4]
RATINGS = torch.tensor([-0.5, 0.8], dtype=torch.float64)
"""Of the samples of each mode."""
B, SEEDS = 800, 12


def mixture(weights=WEIGHTS, path: Interpolant | None = None) -> GaussianMixture:
    return GaussianMixture(MEANS, COVS, torch.as_tensor(weights) / torch.as_tensor(weights).sum(), interpolant=path)


def modes(seed: int) -> tuple[Tensor, Tensor]:
    """Samples of the mixture, and the ratings of their modes."""
    generator = torch.Generator().manual_seed(seed)
    counts = [round(B * weight) for weight in WEIGHTS]
    parts = [GaussianMixture([m], [c]).sample(n, generator) for m, c, n in zip(MEANS, COVS, counts)]
    order = torch.randperm(B, generator=generator)
    return torch.cat(parts)[order], RATINGS.repeat_interleave(torch.tensor(counts))[order]


def update(tuned: FlowMap, old: FlowMap, reference: FlowMap, of: tuple[Tensor, Tensor], control: float, seed: int) -> Update:
    """The second update of its samples, which are given with their ratings."""
    x1, rating = of
    up = Update(
        1, 10, tuned, old, reference, as_reward(lambda x: x[:, 0]), Tasks()[torch.zeros(len(x1)).long()], Tasks(),
        Noise(range(10_000 * seed, 10_000 * seed + len(x1))), torch.Generator().manual_seed(seed), control, 1.0,
        {"reward": torch.tensor(0.0)},
    )  # fmt: skip
    up.own |= {"x1": x1, "rating": rating}
    return up


class Bent(Wrapped):
    """A map whose velocity, mean or not, is bent by a parameter times some features of state and times."""

    def __init__(self, flow_map: FlowMap, bend: Tensor) -> None:
        super().__init__(flow_map)
        self.bend = bend

    def _bent(self, u: Tensor, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        features = torch.stack([torch.ones_like(s), s, t - s, (t > s).to(x), x[:, 0], x[:, 0] * s], 1)
        return u + features @ self.bend

    def average_velocity(self, x, s, t, cond):
        return self._bent(self.flow_map.average_velocity(x, s, t, cond), x, s, t)

    def instantaneous_velocity(self, x, t, cond):
        return self._bent(self.flow_map.instantaneous_velocity(x, t, cond), x, t, t)


class ByVelocity(FlowMap):
    """A velocity given by a function."""

    def __init__(self, velocity, path: Interpolant) -> None:
        super().__init__((2,), path)
        self.field = velocity

    def average_velocity(self, x, s, t, cond):
        return self.field(x, s)


def score(method, tuned: FlowMap, old: FlowMap, reference: FlowMap, draw, control: float = 0.0) -> float:
    """The largest z-score, over seeds, of the slope of the loss in the features of `Bent`: small where it is stationary."""
    slopes = []
    for seed in range(SEEDS):
        bend = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
        up = update(Bent(tuned, bend), old, reference, draw(seed), control, seed)
        slopes.append(torch.autograd.grad(method.loss(up)["loss"], bend)[0])
    slopes = torch.stack(slopes)
    moving = slopes.std(0) > 1e-12  # those of t - s do not, where only velocities are tuned
    return (slopes.mean(0) / (slopes.std(0) / SEEDS**0.5))[moving].abs().max().item()


class Integrated(ByVelocity):
    """The flow map of a velocity, by eight steps of Runge and Kutta."""

    def average_velocity(self, x, s, t, cond):
        u = torch.zeros_like(x)
        for i in range(8):
            y, now, gap = x + expand_time((t - s), x) * u, s + (t - s) * i / 8, (t - s) / 8
            k = [self.field(y, now)]
            for part in (0.5, 0.5, 1.0):
                k.append(self.field(y + expand_time(part * gap, x) * k[-1], now + part * gap))
            u = u + (k[0] + 2 * k[1] + 2 * k[2] + k[3]) / 48
        return u


def theorem(old: GaussianMixture, good: GaussianMixture, beta: float):
    """v_old + (2 / beta) alpha (v_good - v_old), alpha = E[o | x] (2509.16117, theorem 3.2)."""
    mean = ((1 + RATINGS) / 2 * torch.tensor(WEIGHTS)).sum()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha = mean * (good.log_prob(x, t) - old.log_prob(x, t)).exp()
        return old.velocity(x, t) + 2 / beta * alpha.unsqueeze(1) * (good.velocity(x, t) - old.velocity(x, t))

    return velocity


# --- one round: fixed samples of the old law ---------------------------------------------------------------------------
@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()], ids=["linear", "trigonometric"])
def test_nft_rests_where_its_theorem_says(path):
    beta, old, good = 0.7, mixture(path=path), mixture(torch.tensor(WEIGHTS) * (1 + RATINGS), path)
    new = ByVelocity(theorem(old, good, beta), path)
    fixed = old.flow_map()
    assert score(NFT(beta=beta), new, fixed, fixed, modes) < 4.5
    assert score(NFT(beta=beta), fixed, fixed, fixed, modes) > 15
    assert score(NFT(beta=1.3 * beta), new, fixed, fixed, modes) > 8


@pytest.mark.parametrize("trust", [1.0, 2.5])
def test_awm_rests_at_the_velocity_of_the_reweighted_law(trust):
    old = mixture()
    fixed = old.flow_map()
    reweighted = mixture(torch.tensor(WEIGHTS) * (trust + RATINGS)).flow_map()
    assert score(AWM(trust=trust), reweighted, fixed, fixed, modes) < 4.5
    assert score(AWM(trust=trust), fixed, fixed, fixed, modes) > 15
    assert score(AWM(trust=trust + 0.5), reweighted, fixed, fixed, modes) > 8


GAUSSIAN, SLOPE = GaussianMixture([[0.5, -1.0]], [[[0.3, 0.1], [0.1, 0.6]]]), torch.tensor([0.8, -0.5], dtype=torch.float64)


def linear(gm: GaussianMixture):
    """Samples of a Gaussian, rated by a linear reward that no range cuts off."""

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        x1 = gm.sample(B, torch.Generator().manual_seed(seed))
        return x1, (x1 - gm.mean()) @ SLOPE

    return draw


def test_jumps_rest_at_those_of_the_tilted_law():
    """A Gaussian and a linear reward: a round is the tilt of strength 1 / beta, for velocity and jumps alike."""
    old, draw = GAUSSIAN.flow_map(), linear(GAUSSIAN)
    maps = {strength: GAUSSIAN.tilt(linear=SLOPE, strength=strength)[0].flow_map() for strength in (0.5, 0.7)}
    method = Forward(beta=2.0)
    assert score(method, maps[0.5], old, old, draw) < 4.5
    assert score(method, maps[0.7], old, old, draw) > 8 and score(method, old, old, old, draw) > 15


@pytest.mark.slow
def test_jumps_rest_at_those_of_the_velocity_at_rest():
    """Two modes: the map of the ODE of the theorem's velocity."""
    beta, old, good = 0.7, mixture(), mixture(torch.tensor(WEIGHTS) * (1 + RATINGS))
    fixed, new = old.flow_map(16), Integrated(theorem(old, good, beta), Interpolant())
    apart = Forward(beta=beta, diagonal=0.0)
    assert score(apart, new, fixed, fixed, modes) < 4.5
    assert score(apart, fixed, fixed, fixed, modes) > 8
    assert score(MeanFlowNFT(beta=beta, diagonal=0.0), new, fixed, fixed, modes) > 5


def test_one_derivative_for_all_leaves_the_velocity_right_and_the_jumps_not():
    """Shared, a jump changes by dX/dx Cov(A, v | x_s) / beta at its start: the mean over it is another number."""
    old, draw = GAUSSIAN.flow_map(), linear(GAUSSIAN)
    tilted = GAUSSIAN.tilt(linear=SLOPE, strength=0.5)[0]
    apart, diagonal = (Forward(beta=2.0, shared=True, diagonal=share, terminal=0.0) for share in (0.0, 1.0))
    assert score(diagonal, tilted.flow_map(), old, old, draw) < 4.5
    assert score(apart, tilted.flow_map(), old, old, draw) > 8

    class Start(FlowMap):
        def average_velocity(self, x, s, t, cond):
            change = tilted.velocity(x, s) - GAUSSIAN.velocity(x, s)
            stretched = torch.func.jvp(lambda x: old.average_velocity(x, s, t, None), (x,), (change,))[1]
            return old.average_velocity(x, s, t, None) + change + expand_time(t - s, x) * stretched

    assert score(apart, Start((2,)), old, old, draw) < 4.5


# --- at rest: samples of the tuned law itself ---------------------------------------------------------------------------
@pytest.mark.parametrize("method", [NFT(beta=0.4), AWM(trust=3.0), Forward(beta=0.4)], ids=lambda m: type(m).__name__)
def test_all_come_to_rest_at_the_tilt_of_a_gaussian(method):
    """Of the rating, with strength 1 / control, whatever the step; with another control not."""
    tilted = GAUSSIAN.tilt(linear=SLOPE, strength=0.5)[0]
    there, base, draw = tilted.flow_map(), GAUSSIAN.flow_map(), linear(tilted)
    assert score(method, there, there, base, draw, control=2.0) < 4.5
    assert score(method, there, there, base, draw, control=1.4) > 8


# --- jumps -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [Interpolant(), Trigonometric()], ids=["linear", "trigonometric"])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_velocity_that_exact_jumps_imply_is_the_velocity(dim, path):
    """u - (t - s) du/ds = b along the path, for all pairs, the ends among them; against a standing state it is dX/dx b."""
    gm = GaussianMixture([mean[:dim] for mean in MEANS], [cov[:dim] for cov in COVS], WEIGHTS, interpolant=path)
    generator = torch.Generator().manual_seed(0)
    s, t = torch.rand(2, 120, generator=generator, dtype=torch.float64).sort(0).values
    s[:10], t[:20], t[20:30] = 0.0, 1.0, s[20:30]
    s[30:40] = t[30:40] - 1e-4
    x = path.interpolate(torch.randn(120, dim, generator=generator).double(), gm.sample(120, generator), s.unsqueeze(1))
    flow_map, b = gm.flow_map(64), gm.velocity(x, s)
    at = Pairs(x, s, t, None)
    inside = (s > 1e-3) & (t - s > 1e-3) | (s == t)
    for along in (None, b):
        implied = at.average(flow_map) - at.lag(flow_map, 1e-3, along)
        assert (implied - b)[inside].abs().max() < 2e-3
        assert (implied - b).abs().max() < 2e-2  # one-sided at the ends
    carried = torch.func.jvp(lambda x: flow_map.average_velocity(x, s, t, None), (x,), (b,))[1]
    stretched = b + (t - s).unsqueeze(1) * carried
    assert (at.average(flow_map) - at.lag(flow_map, 1e-3, torch.zeros_like(b)) - stretched)[inside].abs().max() < 2e-3


def test_pairs_have_the_shares_that_are_asked_for_in_every_group(random_map):
    flow_map, kinds = random_map(dim=2), []
    for seed in range(40):
        up = update(flow_map, flow_map, flow_map, (torch.zeros(64, 2), torch.zeros(64)), 0.0, seed)
        s, t, x0 = Forward(group=16).pairs(up)
        assert x0.shape == (64, 2) and bool(((s >= 0) & (s <= t) & (t <= 1)).all())
        diagonal, terminal = (s == t).view(4, 16), ((t == 1) & (s < t)).view(4, 16)
        assert (diagonal.sum(1) - 8).abs().max() <= 1 and (terminal.sum(1) - 4).abs().max() <= 1
        kinds.append(diagonal.flatten())
    assert (torch.stack(kinds).double().mean(0) - 0.5).abs().max() < 0.35  # no row is always of one kind


def test_a_network_is_not_asked_for_derivatives_that_it_does_not_need(random_map):
    flow_map = random_map(dim=2)
    seen: list[int] = []

    class Counted(Wrapped):
        def average_velocity(self, x, s, t, cond):
            assert bool(((s >= 0) & (s <= t)).all())
            seen.append(len(x))
            return super().average_velocity(x, s, t, cond)

    for method, calls in (
        (Forward(diagonal=1.0, terminal=0.0), [64] * 3),
        (Forward(diagonal=0.5), [32, 64] * 3 + [64] * 3),  # a velocity and two ends of each jump, then all pairs
        (MeanFlowNFT(diagonal=0.5), [64] * 4),
    ):
        seen.clear()
        one = Counted(flow_map)
        method.loss(update(one, one, one, (torch.randn(64, 2).double(), torch.zeros(64)), 1.0, 0))
        assert seen == calls, method


# --- what they have in common -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("good", [1.0, 0.5])
def test_nft_is_flow_matching_where_all_is_good_and_rests_where_all_is_the_same(random_map, good):
    """o = 1: |v_theta - v|^2; o = 1/2: |v_old - v|^2 + |v_theta - v_old|^2, with no slope at v_old."""
    flow_map, old = random_map(dim=2).requires_grad_(True), random_map(dim=2)
    x1 = torch.randn(64, 2, dtype=torch.float64)
    up = update(flow_map, old, old, (x1, torch.full((64,), 2 * good - 1, dtype=torch.float64)), 0.0, 0)
    loss = NFT().loss(up)["loss"]
    slopes = torch.autograd.grad(loss, list(flow_map.parameters()), allow_unused=True)
    if good == 0.5:
        assert all(slope is None or slope.abs().max() < 1e-12 for slope in slopes)
        return
    t, x0 = NFT().draws(up)
    x = torch.lerp(x0, x1, t[0].unsqueeze(1))
    plain = (flow_map.velocity(x, t[0]) - (x1 - x0)).square().mean()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_minimum_of_the_contrast():
    """A quadratic in the change, with its minimum at rating (v - v_old) / beta, whatever the rating."""
    old, v = (torch.randn(5, 3, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    rating = torch.linspace(-1, 1, 5).double()
    change = (rating.unsqueeze(1) * (v - old) / 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(contrast(change, old, v, rating, 0.3).sum(), change)
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("method", [Forward(group=8), NFT(group=8), AWM(group=8)], ids=lambda m: type(m).__name__)
def test_samples_are_rated_once_and_used_again(method, random_map):
    """Within their group, in units of the spread of the batch, cut off at the range."""
    flow_map, calls = random_map(dim=2), []

    def reward(x):
        calls.append(len(x))
        return 3.0 * x[:, 0] + torch.arange(len(x)).div(8, rounding_mode="floor").to(x)

    up = update(flow_map, flow_map, flow_map, (torch.zeros(64, 2), torch.zeros(64)), 1.0, 0)
    up.step, up.reward, up.own, up.memory = 0, as_reward(reward), {}, {}
    first = method.loss(up)
    x1, rating = up.own["x1"], up.own["rating"]
    calls.clear()
    r = reward(x1).view(8, 8).double()
    by_hand = ((r - r.mean(1, keepdim=True)) / r.std() / 2).clamp(-1, 1).flatten()
    assert torch.allclose(rating.double(), by_hand, atol=1e-4) and rating.abs().max() <= 1
    assert first["reward"].item() == pytest.approx(r.mean().item(), rel=1e-5)
    up.step = 1
    again = method.loss(up)
    assert torch.equal(up.own["x1"], x1) and calls == [64]
    assert again["loss"] != first["loss"] and again["control_cost"].item() == 0


def test_arguments_are_checked():
    nan, inf = float("nan"), float("inf")
    of_all: list[dict[str, Any]] = [{"group": 1}, {"group": 2.5}, {"range": 0.0}, {"range": inf}, {"reuse": 0}]
    wrong: dict[type, list[dict[str, Any]]] = {
        Forward: [
            *of_all,
            {"beta": 0.0},
            {"step": 0.5},
            {"diagonal": 0.9},
            {"jumps": 0},
            {"diagonal": nan},
            {"terminal": nan},
            {"terminal": -0.1},
            {"beta": inf},
            {"beta": 1e-300},
        ],
        NFT: [*of_all, {"beta": -1.0}, {"beta": inf}, {"ode": 0}],
        AWM: [*of_all, {"trust": -0.5}, {"trust": inf}, {"ode": 0}],
    }
    for method, settings in wrong.items():
        for setting in settings:
            with pytest.raises(ValueError, match=next(iter(setting))):
                method(**setting)
