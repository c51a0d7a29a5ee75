"""Objectives on the exact map of a Gaussian, where every loss has a known value, and on random maps by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from kinds import a, sure

from steerfm.closed_form import GaussianMixture
from steerfm.flowmap import FlowMap, NeuralFlowMap
from steerfm.interpolant import Interpolant, Trigonometric, expand_time
from steerfm.networks import Mlp
from steerfm.training.objectives import (
    OFF_DIAGONAL,
    Eulerian,
    FlowMatching,
    Lagrangian,
    LogitNormal,
    MeanFlow,
    Posterior,
    PosteriorTrajectory,
    Progressive,
    Trajectory,
    Triangle,
)

MEAN, STD, DIM = 0.3, 0.7, 3
EVERY = [FlowMatching(), *(kind() for kind in OFF_DIAGONAL.values())]
PATHS = [Interpolant(), Trigonometric()]
paths = pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int, seed: int = 1) -> torch.Tensor:
    return MEAN + STD * torch.randn(n, DIM, generator=seeded(seed), dtype=torch.float64)


def exact_map(path: Interpolant | None = None) -> NeuralFlowMap:
    """The network starts at zero, so this is exactly the flow map of N(MEAN, STD^2)."""
    torch.manual_seed(0)
    return NeuralFlowMap(Mlp(DIM, width=16, depth=1), (DIM,), path, mean=MEAN, std=STD).double()


def at(s: float, t: float):
    """Pairs that are always (s, t), in float64."""
    return lambda n, _: (rows(s, n), rows(t, n))


def start(fm: NeuralFlowMap, x1: torch.Tensor, s: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(I_s, x_0) as an objective draws them when its pairs draw nothing."""
    x0 = torch.randn(x1.shape, generator=seeded(seed)).to(x1)
    return fm.interpolant.interpolate(x0, x1, s), x0


def rows(value: float, n: int) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def spread(path: Interpolant, t: float) -> float:
    """Standard deviation g_t of x_t."""
    return math.hypot(path.alpha(t) * STD, path.sigma(t))


def conditional_variance(path: Interpolant, t: float) -> float:
    """Var(alpha' x_1 + sigma' x_0 | x_t) per entry = (alpha' sigma - alpha sigma')^2 std^2 / g^2."""
    da, ds = path.derivatives(t)
    return (da * path.sigma(t) - path.alpha(t) * ds) ** 2 * STD**2 / spread(path, t) ** 2


# --- times -----------------------------------------------------------------------------------------------------------
def test_pairs_are_ordered_and_have_their_shares():
    n = 40_000
    s, t = Triangle(terminal=0.3, full=0.1)(n, seeded())
    assert (s <= t).all()
    assert s.min() >= 0
    assert t.max() <= 1
    full, ends = (s == 0) & (t == 1), t == 1
    assert full.float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)
    assert ends.float().mean().item() == pytest.approx(0.4, abs=4 * (0.24 / n) ** 0.5)


def test_pairs_are_uniform_on_the_triangle(z_score):
    s, t = Triangle(terminal=0.0, full=0.0)(40_000, seeded())
    assert z_score(s, 1 / 3).abs() < 4
    assert z_score(t, 2 / 3).abs() < 4
    assert z_score(s * t, 1 / 4).abs() < 4
    assert z_score(((t - s) < 0.5).double(), 0.75).abs() < 4


def test_a_gap_bounds_the_jumps_of_the_rest():
    s, t = Triangle(terminal=0.2, full=0.1, gap=0.25)(10_000, seeded())
    rest = t < 1
    assert (t - s)[rest].max() <= 0.25 + 1e-6
    assert ((t - s)[~rest] > 0.25).any()
    assert ((s == 0) & (t == 1)).float().mean().item() == pytest.approx(0.1, abs=0.015)


def test_logit_normal_times(z_score):
    t = LogitNormal(mean=0.4, std=1.2, uniform=0.0)(20_000, seeded())
    logits = torch.logit(t.double())
    assert z_score(logits, 0.4).abs() < 4
    assert z_score((logits - 0.4) ** 2, 1.44).abs() < 4
    flat = LogitNormal(uniform=1.0)(20_000, seeded())
    assert z_score(flat, 0.5).abs() < 4
    assert z_score((flat - 0.5) ** 2, 1 / 12).abs() < 4


# --- what all share --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", [o for o in EVERY if not isinstance(o, Trajectory)], ids=lambda o: type(o).__name__)
def test_one_loss_per_sample_and_reproducible(random_map, objective):
    fm, x1 = random_map(classes=2, posterior=isinstance(objective, Posterior | PosteriorTrajectory)), data(6)
    cond = torch.tensor([0, 1, 2, 0, 1, 2])
    losses = objective(fm, x1, cond, seeded())
    assert losses.shape == (6,)
    assert (losses > 0).all()
    assert torch.equal(objective(fm, x1, cond, seeded()), losses)
    assert not torch.equal(objective(fm, x1, cond, seeded(1)), losses)
    changed = objective(fm, x1, torch.tensor([0, 1, 2, 0, 1, 0]), seeded())
    torch.testing.assert_close(changed[:5], losses[:5])  # each sample has its own loss
    assert changed[5] != losses[5]


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_the_global_generator_is_left_alone(random_map, objective):
    fm, before = random_map(posterior=isinstance(objective, Posterior | PosteriorTrajectory)), torch.get_rng_state()
    objective(fm, data(4), None, seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_every_weight_gets_a_gradient(random_map, objective):
    fm = random_map(classes=2, posterior=isinstance(objective, Posterior | PosteriorTrajectory))
    objective(fm, data(8), torch.arange(8) % 3, seeded()).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in fm.parameters())


# --- on the exact map ------------------------------------------------------------------------------------------------
@paths
@pytest.mark.parametrize(
    "objective", [Lagrangian(), Progressive(), Progressive(midpoint=True), Eulerian()], ids=["L", "P", "P/2", "E"]
)
def test_self_distillation_vanishes_on_the_exact_map(path, objective):
    losses = objective(exact_map(path), data(64), None, seeded())
    assert losses.max() < 1e-20


@paths
@pytest.mark.parametrize("objective", [Lagrangian(), Progressive(), Eulerian()], ids=["L", "P", "E"])
def test_self_distillation_does_not_vanish_on_a_wrong_map(path, objective, random_map):
    assert objective(random_map(interpolant=path), data(64), None, seeded()).mean() > 1e-3


@paths
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_flow_matching_has_the_conditional_variance_as_its_minimum(path, t, z_score):
    losses = FlowMatching(lambda n, _: torch.full((n,), t))(exact_map(path), data(20_000), None, seeded())
    assert z_score(losses, conditional_variance(path, t)).abs() < 4


@paths
@pytest.mark.parametrize(("s", "t"), [(0.2, 0.9), (0.0, 1.0), (0.5, 0.5)])
def test_mean_flow_has_its_minimum_too(path, s, t, z_score):
    """The residual is D X_{s,t} (v - E v), so the loss is (g_t / g_s)^2 times the conditional variance at s."""
    losses = MeanFlow(at(s, t))(exact_map(path), data(20_000), None, seeded())
    expected = (spread(path, t) / spread(path, s)) ** 2 * conditional_variance(path, s)
    assert z_score(losses, expected).abs() < 4


@pytest.mark.parametrize("objective", [FlowMatching(), MeanFlow()], ids=["flow matching", "mean flow"])
def test_noisy_targets_have_no_gradient_on_average_at_the_exact_map(objective, z_score):
    fm, generator = exact_map(), seeded()
    last = a(Mlp, fm.network).outputs
    output = [last.weight, last.bias]  # the rest has no gradient: the output is zero
    gradients = []
    for i in range(40):
        losses = objective(fm, data(400, seed=i + 10), None, generator)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), output)]))
    assert z_score(torch.stack(gradients)).abs().max() < 4.3  # 51 entries
    shifted = NeuralFlowMap(fm.network, (DIM,), mean=MEAN + 0.3, std=STD)  # and the test can tell a wrong map
    gradients = []
    for i in range(20):
        losses = objective(shifted, data(200, seed=i + 10), None, generator)
        gradients.append(torch.autograd.grad(losses.mean(), output)[1])
    assert z_score(torch.stack(gradients)).abs().max() > 8


# --- on a random map, by finite differences --------------------------------------------------------------------------
def gradients_of(loss: torch.Tensor, fm: NeuralFlowMap) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(fm.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@paths
@pytest.mark.parametrize(("s", "t"), [(0.2, 0.7), (0.0, 1.0), (0.4, 0.4)])
def test_lagrangian_value_and_gradient(random_map, path, s, t):
    """Against d/dt X by central differences, both ends differentiable: the gradient must go through the tangent."""
    fm, x1, h = random_map(interpolant=path), data(16), 1e-5
    x, _ = start(fm, x1, s)

    def moved(t):
        return x + (t - s) * fm.average_velocity(x, rows(s, len(x)), rows(t, len(x)), None)

    velocity = fm.average_velocity(moved(t), rows(t, len(x)), rows(t, len(x)), None).detach()
    by_hand = ((moved(t + h) - moved(t - h)) / (2 * h) - velocity).square().mean(1)
    losses = Lagrangian(at(s, t))(fm, x1, None, seeded())
    torch.testing.assert_close(losses, by_hand, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients_of(losses.mean(), fm), gradients_of(by_hand.mean(), fm), rtol=1e-4, atol=1e-7)


def test_lagrangian_teacher_is_the_velocity_after_the_jump(random_map):
    """On the diagonal s = t the map moves nothing, and the loss is zero by itself."""
    losses = Lagrangian(at(0.6, 0.6))(random_map(), data(8), None, seeded())
    assert losses.max() < 1e-25


@paths
@pytest.mark.parametrize("midpoint", [False, True])
def test_progressive_is_the_semigroup_defect(random_map, path, midpoint):
    fm, x1, s, t = random_map(interpolant=path), data(16), 0.2, 0.9
    generator = seeded()
    x0 = torch.randn(x1.shape, generator=generator).to(x1)
    x = fm.interpolant.interpolate(x0, x1, s)
    share = torch.rand(len(x1), generator=generator).double()
    middle = s + (0.5 if midpoint else share) * (t - s)
    with torch.no_grad():
        two = fm.jump(fm.jump(x, s, middle), middle, t)
    by_hand = ((fm.jump(x, s, t) - two) / (t - s)).square().mean(1)
    losses = Progressive(at(s, t), midpoint)(fm, x1, None, seeded())
    torch.testing.assert_close(losses, by_hand, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradients_of(losses.mean(), fm), gradients_of(by_hand.mean(), fm), rtol=1e-8, atol=1e-12)


@paths
@pytest.mark.parametrize("kind", [Eulerian, MeanFlow])
@pytest.mark.parametrize(("s", "t"), [(0.2, 0.7), (0.0, 1.0)])
def test_eulerian_value_and_gradient(random_map, path, kind, s, t):
    """Against the derivative along (v, 1) by central differences; the target has no gradient."""
    fm, x1, h = random_map(interpolant=path), data(16), 1e-5
    x, x0 = start(fm, x1, s)
    with torch.no_grad():
        if kind is MeanFlow:
            v = fm.interpolant.conditional_velocity(x0, x1, s)
        else:
            v = fm.velocity(x, s)

        def u(e):
            return fm.average_velocity(x + e * v, rows(s + e, len(x)), rows(t, len(x)), None)

        target = v + (t - s) * (u(h) - u(-h)) / (2 * h)
    by_hand = (fm.average_velocity(x, rows(s, len(x)), rows(t, len(x)), None) - target).square().mean(1)
    losses = kind(at(s, t))(fm, x1, None, seeded())
    torch.testing.assert_close(losses, by_hand, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients_of(losses.mean(), fm), gradients_of(by_hand.mean(), fm), rtol=1e-5, atol=1e-8)


def test_mean_flow_aims_at_the_eulerian_target(z_score):
    """For a wrong network off the diagonal, the gradients agree on average where the velocity is the true one."""
    fm, s, t = exact_map(), 0.2, 0.8

    class Bent(torch.nn.Module):  # zero on the diagonal, where the map then has the Gaussian's own velocity
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, s, t, cond):
            return (t - s)[:, None] * (self.network(x, s, t, cond) + x.sin())

    last = a(Mlp, fm.network).outputs
    fm.network = Bent(fm.network)
    weights = [last.weight, last.bias]
    differences, size = [], 0.0
    for i in range(40):
        x1 = data(200, seed=i + 10)
        pair = [
            torch.cat([g.flatten() for g in torch.autograd.grad(kind(at(s, t))(fm, x1, None, seeded(i)).mean(), weights)])
            for kind in (MeanFlow, Eulerian)
        ]
        differences.append(pair[0] - pair[1])
        size = max(size, pair[1].abs().max().item())
    differences = torch.stack(differences)
    assert z_score(differences).abs().max() < 4.3
    assert size > 5 * differences.mean(0).abs().max()  # the gradients themselves are far from zero


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_pictures_have_their_mean_over_all_entries(objective, randomise):
    """Doubling a picture by an identical copy beside it changes no loss: mean, not sum, over entries."""

    class Pointwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        posterior = True

        def forward(self, x, s, t, cond, state=None, state_time=None):
            return self.weight * (x + (0 if state is None else state) + expand_time(t - s, x)).sin()

    fm = NeuralFlowMap(Pointwise(), (1, 4, 4), mean=MEAN, std=STD)
    x1 = torch.randn(2000, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    wide = NeuralFlowMap(fm.network, (1, 4, 8), mean=MEAN, std=STD)
    small = objective(fm, x1, None, seeded(1)).mean()
    large = objective(wide, torch.cat([x1, x1], -1), None, seeded(1)).mean()
    assert large.item() == pytest.approx(small.item(), rel=0.15)


# --- a tiny training -------------------------------------------------------------------------------------------------
def two_modes(n: int, generator: torch.Generator) -> torch.Tensor:
    side = torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
    return side * torch.tensor([1.5, 0.5]) + 0.3 * torch.randn(n, 2, generator=generator)


def trained(off_diagonal: bool) -> NeuralFlowMap:
    torch.manual_seed(0)
    sample = two_modes(4000, seeded(9))
    fm = NeuralFlowMap(Mlp(2, width=32, depth=2), (2,), mean=sample.mean().item(), std=sample.std().item())
    optimizer, generator = torch.optim.Adam(fm.parameters(), lr=5e-3), seeded()
    diagonal, distil = FlowMatching(), Lagrangian()
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (300 - step) / 100)
        x1 = two_modes(128, generator)
        loss = diagonal(fm, x1, None, generator).mean()
        if off_diagonal:
            loss = loss + distil(fm, x1[:64], None, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fm.requires_grad_(False)


def distance(fm: NeuralFlowMap, steps: int) -> float:
    """Wasserstein distance along the axis between the modes, of samples in a few jumps."""
    axis = torch.tensor([1.5, 0.5]) / 2.5**0.5
    x = torch.randn(4000, 2, generator=seeded(5))
    for i in range(steps):
        x = fm.jump(x, i / steps, (i + 1) / steps)
    return ((x @ axis).sort().values - (two_modes(4000, seeded(6)) @ axis).sort().values).abs().mean().item()


def semigroup_error(fm: NeuralFlowMap) -> float:
    x = torch.randn(4000, 2, generator=seeded(5))
    return (fm.lookahead(x, 0.0) - fm.lookahead(x, 0.0, hops=2)).square().sum(1).mean().item()


@pytest.mark.slow
def test_self_distillation_learns_the_flow_map():
    """Against the untrained map (one Gaussian) and against flow matching alone (no flow map off the diagonal)."""
    distilled, matched = trained(True), trained(False)
    untrained = NeuralFlowMap(Mlp(2), (2,), mean=0.0, std=distilled.std)
    assert semigroup_error(distilled) < 0.5 * semigroup_error(matched)
    for steps in (1, 2):
        assert distance(distilled, steps) < 0.6 * distance(untrained, steps)
        assert distance(distilled, steps) < distance(matched, steps)
    assert distance(matched, 50) < 0.3 * distance(untrained, 1)  # flow matching alone has learned the velocity


def test_guidance_pulls_the_target_of_labelled_rows_away_from_the_null_velocity():
    """w v + (1 - w) u(null) for labels, v for the null class; by hand with the same draws."""

    class ByLabel(FlowMap):
        def average_velocity(self, x, s, t, cond):
            return a(torch.Tensor, cond).to(x).unsqueeze(1) * x

    flow_map, null, w = ByLabel((2,)), 3, 1.5
    x1 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    cond = torch.arange(64) % 4
    times = lambda n, _: (torch.arange(n) + 0.5) / n  # noqa: E731
    losses = FlowMatching(times, w, torch.tensor([null]))(flow_map, x1, cond, torch.Generator().manual_seed(1))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1))
    t = ((torch.arange(64) + 0.5) / 64).unsqueeze(1)
    x, v = t * x1 + (1 - t) * x0, x1 - x0
    target = torch.where((cond == null).unsqueeze(1), v, w * v + (1 - w) * null * x)
    assert torch.allclose(losses, (cond.unsqueeze(1) * x - target).square().mean(1), atol=1e-5)
    plain = FlowMatching(times)(flow_map, x1, cond, torch.Generator().manual_seed(1))
    assert torch.equal(losses[cond == null], plain[cond == null]) and (losses != plain)[cond != null].all()
    with pytest.raises(ValueError, match="null condition"):
        FlowMatching(guidance=1.5)


# --- trajectories ----------------------------------------------------------------------------------------------------
class Recorded(FlowMap):
    """The exact map of a mixture, plus ``bend`` (t - s) off the diagonal; keeps the times it was asked for with a gradient."""

    def __init__(self, bend: float = 0.0) -> None:
        super().__init__((1,))
        self.map, self.bend, self.asked = MODES.flow_map(), bend, []

    def average_velocity(self, x, s, t, cond):
        if torch.is_grad_enabled():
            self.asked.append((s, t))
        return self.map.average_velocity(x, s, t, None) + self.bend * (t - s).unsqueeze(1)


MODES = GaussianMixture([[-1.5], [0.5], [1.5]], [[0.1], [0.2], [0.1]])


@pytest.mark.slow
def test_trajectories_are_those_of_the_exact_map_up_to_the_second_order_of_their_steps():
    x1 = torch.zeros(512, 1, dtype=torch.float64)
    loss = {steps: Trajectory(steps=steps)(Recorded(), x1, None, seeded()).mean().item() for steps in (16, 32, 64)}
    assert loss[64] < 2e-5 and loss[64] < loss[32] / 8 and loss[32] < loss[16] / 4


def test_a_frozen_teacher_is_followed_on_and_off_the_diagonal():
    student, x1 = Recorded(), torch.zeros(512, 1, dtype=torch.float64)
    teacher = Recorded()
    assert Trajectory(steps=64, diagonal=0.5, teacher=teacher)(student, x1, None, seeded()).mean() < 2e-5
    (pair,) = student.asked
    assert (pair[0] == pair[1]).any() and not teacher.asked  # the teacher never sees a gradient
    other = GaussianMixture([[1.0]], [[0.5]]).flow_map()
    assert Trajectory(steps=16, diagonal=0.5, teacher=other)(student, x1, None, seeded()).mean() > 0.1


def test_a_bent_map_is_seen_by_its_bend():
    flow_map, x1 = Recorded(0.5), torch.zeros(512, 1, dtype=torch.float64)
    losses = Trajectory(steps=64)(flow_map, x1, None, seeded())
    ((s, t),) = flow_map.asked
    assert (losses - (0.5 * (t - s)) ** 2).abs().mean() < 5e-3


def test_trajectories_end_where_their_shares_say():
    flow_map, x1 = Recorded(), torch.zeros(4000, 1, dtype=torch.float64)
    Trajectory(Triangle(terminal=0.3, full=0.2), steps=8, uses=100, diagonal=0.25)(flow_map, x1, None, seeded())
    ((s, t),) = flow_map.asked
    assert (s <= t).all() and (s >= 0).all() and (t <= 1).all()
    assert (s == t).double().mean() == pytest.approx(0.25 * 0.5 * 7 / 8, abs=0.03)
    assert ((s == 0) & (t == 1)).double().mean() == pytest.approx(0.2 + 0.3 / 8 + 0.5 / 64, abs=0.03)
    assert (t == 1).double().mean() == pytest.approx(0.5 + 0.5 / 8, abs=0.03)


def test_trajectories_leave_no_time_out():
    """Where no state is ever seen the velocity drifts while the jumps are trained, next to the data above all."""

    class Still(FlowMap):
        def average_velocity(self, x, s, t, cond):
            asked.append((s, t))
            return 0.0 * x

    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    flow_map, x1 = Still((1,)), torch.zeros(800, 1)
    objective = Trajectory(Triangle(terminal=0.0, full=0.0), steps=8, uses=800, diagonal=1.0)
    for seed in range(200):
        objective(flow_map, x1, None, seeded(seed))
    times = torch.cat([s[(s == t) & (s > 0)] for s, t in asked if len(s) == len(x1)])
    counts = torch.histc(times, 40, 0.0, 1.0)
    assert counts.min() > 0.15 * counts.median(), counts


def test_pairs_of_a_trajectory_share_its_condition():
    class Labelled(FlowMap):
        def average_velocity(self, x, s, t, cond):
            return a(torch.Tensor, cond).to(x).unsqueeze(1).expand_as(x)

    cond = torch.arange(12) % 5
    assert Trajectory(uses=3)(Labelled((2,)), torch.zeros(12, 2), cond, seeded()).max() < 1e-9


def test_kept_trajectories_are_drawn_from_and_the_oldest_forgotten():
    """Every third call follows one for each row; pairs agree with the condition of their own trajectory; 24 are kept."""

    class Labelled(FlowMap):
        calls = 0

        def average_velocity(self, x, s, t, cond):
            Labelled.calls += 1
            return a(torch.Tensor, cond).to(x).unsqueeze(1).expand_as(x)

    objective, flow_map = Trajectory(uses=3, keep=24, steps=2), Labelled((2,))
    for call in range(9):
        cond = torch.arange(12) + 12 * (call // 3)
        assert objective(flow_map, torch.zeros(12, 2), cond, seeded(call)).max() < 1e-9
    assert Labelled.calls == 9 + 3 * 2 * 2
    paths = sure(objective.pool.paths)
    assert sorted(a(torch.Tensor, paths.cond).tolist()) == list(range(12, 36))
    assert paths.states.shape == (3, 24, 2)
