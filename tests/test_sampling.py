"""Sampling: noise that belongs to its output, kernels with the right law, marginals that are kept exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from steerfm.closed_form import GaussianMixture
from steerfm.cost import Ledger
from steerfm.flowmap import FlowMap
from steerfm.interpolant import Interpolant, Trigonometric
from steerfm.sampling import Noise, sample, seed_list, time_grid
from steerfm.transitions import TRANSITIONS, Auto, Bridge, Diffuse, Jump, Midpoint, Renoise, Step

LIKE = torch.empty(0)
PATHS = [Interpolant(), Trigonometric()]


# --- times and seeds -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_time_grid(steps, power):
    times = time_grid(steps, power)
    assert times[0] == 0
    assert times[-1] == 1
    assert len(times) == steps + 1
    assert all(s < t for s, t in zip(times, times[1:]))
    assert [t ** (1 / power) for t in times] == pytest.approx([i / steps for i in range(steps + 1)])


@pytest.mark.parametrize(("arguments", "message"), [((0,), "steps=0"), ((2, 0.0), "power=0"), ((2, math.nan), "power")])
def test_time_grid_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_grid(*arguments)


def test_seeds():
    assert seed_list(5, 3) == [5, 6, 7]
    assert seed_list([4, 4, 1], 3) == [4, 4, 1]
    assert seed_list(range(2), 2) == [0, 1]
    with pytest.raises(ValueError, match="2 seeds for n=3"):
        seed_list([1, 2], 3)
    with pytest.raises(ValueError, match="n=0"):
        seed_list(0, 0)


# --- noise -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
def test_noise_does_not_depend_on_the_batch(n, k, shape):
    whole = Noise(range(100, 164), k)
    part = Noise(range(100, 100 + n), k)
    for _ in range(2):
        rows, first = whole.normal(shape, LIKE), part.normal(shape, LIKE)
        assert first.shape == (n * k, *shape)
        assert torch.equal(first, rows[: n * k])
    assert torch.equal(part.uniform(5, LIKE.device), whole.uniform(5, LIKE.device)[:n])


def test_the_first_particle_is_the_plain_sample():
    one, many = Noise([3, 9]).normal((5,), LIKE), Noise([3, 9], k=4).normal((5,), LIKE).view(2, 4, 5)
    assert torch.equal(many[:, 0], one)
    assert many.flatten(0, 1).unique(dim=0).shape[0] == 8


def test_selection_has_a_stream_of_its_own():
    with_selection, without = Noise([0, 1], k=2), Noise([0, 1], k=2)
    with_selection.uniform(10, LIKE.device)
    assert torch.equal(with_selection.normal((4,), LIKE), without.normal((4,), LIKE))
    drawn = torch.Generator().manual_seed(0)
    assert not torch.equal(without.uniform(10, LIKE.device)[0], torch.rand(10, generator=drawn))


def test_noise_is_standard_normal(z_score):
    z = Noise(range(500), k=8).normal((10,), LIKE.double())
    assert z.dtype == torch.float64
    assert z_score(z).abs().max() < 4
    assert z_score(z**2, 1.0).abs().max() < 4
    neighbours = z.view(500, 8, 10)
    assert z_score(neighbours[:, 0] * neighbours[:, 1]).abs().max() < 4  # particles of one output
    assert z_score(neighbours[1:, 0] * neighbours[:-1, 0]).abs().max() < 4  # neighbouring seeds
    u = Noise(range(2000)).uniform(4, LIKE.device)
    assert z_score(u, 0.5).abs().max() < 4
    assert z_score((u - 0.5) ** 2, 1 / 12).abs().max() < 4


# --- kernels ---------------------------------------------------------------------------------------------------------
def test_the_density_of_a_step_is_a_gaussian(generator):
    mean, x = torch.randn(2, 6, 2, 3, generator=generator)
    step = Step(mean, 0.3)
    expected = Normal(mean.double(), 0.3).log_prob(x.double()).sum((1, 2))
    torch.testing.assert_close(step.log_prob(x), expected, rtol=1e-5, atol=1e-5)
    assert step.log_prob(x).shape == (6,)


def test_a_step_draws_from_its_density(generator, z_score):
    mean = torch.randn(3, generator=generator).expand(20_000, 3)
    step = Step(mean, 0.3)
    noise = torch.randn(mean.shape, generator=generator)
    x = step.sample(noise)
    torch.testing.assert_close(x, mean + 0.3 * noise)
    entropy = 3 * (0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.3))
    assert z_score(-step.log_prob(x), entropy).abs() < 4


def test_a_deterministic_step_has_no_density():
    mean = torch.ones(2, 3)
    assert torch.equal(Step(mean, 0.0).sample(None), mean)
    assert torch.equal(Step(mean, 0.0).sample(torch.randn(2, 3)), mean)
    with pytest.raises(ValueError, match="no density"):
        Step(mean, 0.0).log_prob(mean)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Jump(0), "hops=0"), (lambda: Renoise(1.5), "gamma=1.5"), (lambda: Renoise(-0.1), "gamma=-0.1"),
        (lambda: Renoise(0.5, "posterior"), "gamma=0.5.*endpoint=jump"), (lambda: Renoise(endpoint="denoised"), "denoised"),
        (lambda: Renoise(math.nan), "gamma=nan"), (lambda: Diffuse(-1), "epsilon=-1"),
        (lambda: Diffuse(math.nan), "epsilon=nan"), (lambda: Midpoint(-1), "churn=-1"),
        (lambda: Midpoint(math.nan), "churn=nan"),
    ],
)  # fmt: skip
def test_refused_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_which_transitions_are_stochastic():
    assert [t.stochastic for t in (Jump(), Jump(4), Renoise(0.0), Diffuse(0.0), Diffuse(0), Bridge(0.0), Midpoint(0))] == [
        False
    ] * 7
    assert [t.stochastic for t in (Renoise(), Renoise(0.1), Diffuse(), Diffuse(0.5), Diffuse(math.sin), Midpoint())] == [
        True
    ] * 6
    named = {"jump": Jump, "renoise": Renoise, "diffuse": Diffuse, "bridge": Bridge, "midpoint": Midpoint, "auto": Auto}
    assert named == TRANSITIONS and Auto().stochastic  # what a method does not know better for a map is renoised


@pytest.mark.parametrize(
    "transition", [Jump(), Jump(3), Renoise(), Renoise(0.5), Diffuse(), Diffuse(0.5), Midpoint(), Midpoint(2.0)], ids=repr
)
@pytest.mark.parametrize("path", PATHS)
def test_the_step_into_the_data_is_deterministic(random_map, transition, path):
    fm, x = random_map(interpolant=path), torch.randn(4, 3).double()
    step = transition.step(fm, x, 0.5, 1.0, None)
    assert step.std == 0
    if transition.stochastic:
        assert transition.step(fm, x, 0.5, 0.75, None).std > 0


@pytest.mark.parametrize("path", PATHS)
def test_kernels_are_their_definitions(random_map, path):
    fm, x, s, t = random_map(interpolant=path), torch.randn(4, 3).double(), 0.2, 0.6
    jumped = Jump().step(fm, x, s, t, None).mean
    torch.testing.assert_close(jumped, fm.jump(x, s, t))
    torch.testing.assert_close(Jump(2).step(fm, x, s, t, None).mean, fm.jump(fm.jump(x, s, 0.4), 0.4, t))
    torch.testing.assert_close(Renoise(0.0).step(fm, x, s, t, None).mean, jumped)
    assert Renoise(0.0).step(fm, x, s, t, None).std == 0

    step = Renoise(0.5).step(fm, x, s, t, None)
    scale = path.alpha(t) / path.alpha(0.8)
    torch.testing.assert_close(step.mean, scale * fm.jump(x, s, 0.8))
    assert step.std**2 == pytest.approx(path.sigma(t) ** 2 - (scale * path.sigma(0.8)) ** 2)

    for transition, epsilon in ((Diffuse(0.3), 0.3), (Diffuse(), path.sigma(s)), (Diffuse(lambda t: t + 1), 1.2)):
        step = transition.step(fm, x, s, t, None)
        torch.testing.assert_close(step.mean, x + (t - s) * (fm.velocity(x, s) + epsilon * fm.score(x, s)))
        assert step.std == pytest.approx(math.sqrt(2 * epsilon * (t - s)))


@pytest.mark.parametrize(("transition", "t"), [(Jump(), 1.0), (Renoise(), 0.5), (Renoise(), 1.0), (Renoise(0.5), 1.0)])
def test_an_endpoint_in_hand_saves_the_call(random_map, transition, t):
    fm, x = random_map(), torch.randn(4, 3).double()
    endpoint = fm.lookahead(x, 0.2)
    with Ledger() as ledger:
        step = transition.step(fm, x, 0.2, t, None, endpoint)
    assert ledger.cost.forwards == 0
    torch.testing.assert_close(step.mean, transition.step(fm, x, 0.2, t, None).mean)


@pytest.mark.parametrize(("transition", "t"), [(Jump(), 0.5), (Jump(2), 1.0), (Renoise(0.5), 0.5)])
def test_an_endpoint_is_not_used_where_it_does_not_fit(random_map, transition, t):
    fm, x = random_map(), torch.randn(4, 3).double()
    step = transition.step(fm, x, 0.2, t, None, torch.full_like(x, 99.0))
    torch.testing.assert_close(step.mean, transition.step(fm, x, 0.2, t, None).mean)


# --- plain sampling --------------------------------------------------------------------------------------------------
TRANSITION_CASES = [Jump(), Jump(2), Renoise(), Renoise(0.5), Diffuse(), Midpoint(), Midpoint(0.0)]


@pytest.mark.parametrize("transition", TRANSITION_CASES, ids=repr)
def test_a_sample_does_not_depend_on_its_batch(random_map, transition):
    fm = random_map(classes=2)
    cond = torch.arange(9) % 2

    def draw(batch_size):
        return sample(fm, 9, 3, seeds=4, cond=cond, transition=transition, batch_size=batch_size)

    whole = draw(None)
    assert whole.shape == (9, 3)
    for batch_size in (1, 2, 9, 50):
        torch.testing.assert_close(draw(batch_size), whole, rtol=1e-10, atol=1e-10)
    alone = sample(fm, 1, 3, seeds=[7], cond=cond[3:4], transition=transition)
    torch.testing.assert_close(alone[0], whole[3], rtol=1e-10, atol=1e-10)


def test_seeds_of_samples(random_map):
    fm = random_map()
    first = sample(fm, 3, seeds=5)
    assert torch.equal(sample(fm, 3, seeds=[5, 6, 7]), first)
    assert torch.equal(sample(fm, 3, seeds=5), first)
    torch.testing.assert_close(sample(fm, 2, seeds=[7, 5]), first[[2, 0]], rtol=1e-10, atol=1e-10)


def test_plain_sampling_is_a_chain_of_jumps(random_map):
    fm = random_map()
    x = Noise(range(4)).normal((3,), LIKE.double())
    for s, t in ((0.0, 0.25), (0.25, 1.0)):
        x = fm.jump(x, s, t)
    torch.testing.assert_close(sample(fm, 4, 2, power=2.0), x)


def test_samples_can_be_trained_on(random_map):
    x = sample(random_map(), 2)
    assert not x.is_inference()
    torch.nn.Parameter(torch.ones(3).double()).mul(x).sum().backward()


def test_costs_of_sampling(random_map):
    with Ledger() as ledger:
        sample(random_map(), 10, steps=4, transition=Jump(2), batch_size=3)
    assert ledger.cost.forwards == 10 * 4 * 2
    assert ledger.cost.backwards == 0


def test_conditions_of_samples(random_map):
    fm = random_map(classes=2, class_names=("Bag", "Coat"))
    rows = sample(fm, 3, cond=torch.tensor([1, 1, 1]))
    for cond in ("coat", 1, ["Coat", "Coat", 1]):
        assert torch.equal(sample(fm, 3, cond=cond), rows)
    assert not torch.equal(sample(fm, 3, cond="Bag"), rows)
    assert not torch.equal(sample(fm, 3), rows)
    for cond in (torch.tensor([1, 1]), torch.tensor(1)):
        with pytest.raises(ValueError, match="one row per output"):
            sample(fm, 3, cond=cond)
    with pytest.raises(ValueError, match="0 Bag, 1 Coat"):
        sample(fm, 3, cond="Boot")


# --- marginals -------------------------------------------------------------------------------------------------------
def plane(path: Interpolant) -> GaussianMixture:
    return GaussianMixture([[0.8, -0.5]], [[[0.9, 0.5], [0.5, 0.4]]], [1.0], path)


def line(path: Interpolant | None = None) -> GaussianMixture:
    return GaussianMixture([[-2.0], [0.5], [2.5]], [[0.16], [0.09], [0.25]], [0.5, 0.3, 0.2], path)


def chain(mixture: GaussianMixture, transition, steps: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """n rows through the transition on the exact map, all in one batch."""
    fm = mixture.flow_map()
    x = torch.randn(n, *fm.shape, generator=generator, dtype=torch.float64).to(fm.dtype)
    times = time_grid(steps)
    for s, t in zip(times, times[1:]):
        step = transition.step(fm, x, s, t, None)
        x = step.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x))
    return x.double()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
def test_renoising_keeps_a_gaussian(gamma, steps, path, generator, z_score):
    mixture = plane(path)
    x = chain(mixture, Renoise(gamma), steps, 20_000, generator)
    centred = x - mixture.mean().double()
    assert z_score(centred).abs().max() < 4
    assert z_score(centred[:, :, None] * centred[:, None, :], mixture.cov().double()).abs().max() < 4


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_renoising_keeps_a_mixture(gamma, steps, generator, z_score):
    mixture = line()
    x = chain(mixture, Renoise(gamma), steps, 4_000, generator)
    centred = x - mixture.mean().double()
    assert z_score(centred).abs().max() < 4
    assert z_score(centred**2, mixture.cov().double()[0]).abs().max() < 4
    edges = torch.tensor([-0.6, 1.5])
    cdf = (mixture.weights * Normal(mixture.means[:, 0], mixture.variances[:, 0].sqrt()).cdf(edges[:, None])).sum(1)
    assert z_score((x < edges).double(), cdf.double()).abs().max() < 4  # mode masses


def test_renoising_keeps_the_marginals_on_the_way(generator, z_score):
    """Not only at the end: after one step to t = 0.4 the law is p_0.4."""
    mixture = plane(Interpolant())
    fm = mixture.flow_map()
    x = torch.randn(20_000, 2, generator=generator)
    x = Renoise(0.7).step(fm, x, 0.0, 0.4, None).sample(torch.randn(x.shape, generator=generator))
    marginal = mixture.marginal(0.4)
    centred = x.double() - marginal.mean().double()
    assert z_score(centred).abs().max() < 4
    assert z_score(centred[:, :, None] * centred[:, None, :], marginal.cov().double()).abs().max() < 4


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.5, lambda t: 2 * (1 - t) ** 2], ids=["default", "0", "0.5", "callable"])
@pytest.mark.parametrize("path", PATHS, ids=["linear", "trigonometric"])
def test_diffusion_converges_to_a_gaussian(epsilon, path):
    """A step is affine in x for Gaussian data, so mean and variance follow in closed form: no Monte Carlo error."""
    fm = GaussianMixture(torch.tensor([[0.8]]).double(), [[0.3]], [1.0], path).double().flow_map()

    def moments(steps: int) -> torch.Tensor:
        mean, variance, times = torch.zeros(1).double(), torch.ones(1).double(), time_grid(steps)
        for s, t in zip(times, times[1:]):
            step = Diffuse(epsilon).step(fm, torch.tensor([[0.0], [1.0]]).double(), s, t, None)
            offset, slope = step.mean[0], step.mean[1] - step.mean[0]
            mean, variance = offset + slope * mean, slope**2 * variance + step.std**2
        return torch.cat([mean, variance])

    errors = [(moments(steps) - torch.tensor([0.8, 0.3])).abs().max().item() for steps in (16, 64, 256)]
    assert errors[2] < 0.01
    assert errors[0] / errors[1] > 2.5  # first order, about 4
    assert errors[1] / errors[2] > 2.5


class Velocity(FlowMap):
    """Only the diagonal of a mixture's flow map: all that a diffusion needs, without the quantiles."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__((1,))
        self.mixture = mixture

    def average_velocity(self, x, s, t, cond):
        assert torch.equal(s, t)
        return self.mixture.velocity(x, t)


def test_diffusion_finds_the_modes(generator):
    fm = Velocity(line())
    x = torch.randn(5_000, 1, generator=generator)
    times = time_grid(200)
    for s, t in zip(times, times[1:]):
        x = Diffuse().step(fm, x, s, t, None).sample(torch.randn(x.shape, generator=generator))
    masses = (x < torch.tensor([-0.6, 1.5])).double().mean(0)
    assert masses.tolist() == pytest.approx([0.5, 0.8], abs=0.03)  # 4 standard errors
    assert x.var().item() == pytest.approx(line().cov().item(), rel=0.05)
