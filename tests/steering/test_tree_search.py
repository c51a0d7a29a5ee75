"""The tree and the rolling budget, against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from kinds import a, sure

import steerfm
from steerfm import GaussianMixture
from steerfm.rewards import Reward
from steerfm.steering.noise_search import Trials
from steerfm.steering.tree_search import BudgetForcing, Tree, TreeSearch

# one Gaussian, r = 1.2 x - .25 x^2: elementwise and exact
A, B = 1.2, 0.5
GAUSSIAN = GaussianMixture(torch.tensor([[0.5]]), torch.tensor([[0.36]]))
MAP = GAUSSIAN.flow_map()
TARGET, LOG_Z = GAUSSIAN.tilt([A], B)
METHODS = [TreeSearch(particles=24, steps=3), BudgetForcing(particles=2, steps=4, budget=18)]


class Rooted(TreeSearch):
    """A tree that gives its root's value as log Z, biased as that is: to see how far."""

    def _log_z(self, root):
        return root


def name(method):
    return type(method).__name__


def reward(x):
    return A * x[:, 0] - B / 2 * x[:, 0] ** 2


class BlackBox(Reward):
    differentiable = False

    def score(self, images, prompts=None, labels=None):
        return images[:, 0].round()


# --- the tree against closed forms -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method", [TreeSearch(particles=24, steps=1), Rooted(particles=128, steps=2, width=2)], ids=["one step", "two steps"]
)
def test_root_value_and_leaves_converge_to_the_tilt(method, z_score):
    result = steerfm.steer(MAP, reward, method, n=96, seeds=11)
    weights, x = result.log_weights.exp(), result.samples[..., 0].double()
    assert abs(z_score(sure(result.log_z).exp(), LOG_Z.exp())) < 4
    assert abs(z_score((weights * x).sum(1), TARGET.mean()[0])) < 4
    assert z_score(x.mean(1), TARGET.mean()[0]) < -6  # the weights do it


def test_deeper_trees_come_near():
    """Three steps still show their bias: a mean of values in place of their log mean exp would be 0.14 too low."""
    log_z = sure(steerfm.steer(MAP, reward, Rooted(particles=128, steps=3, width=2, gamma=0.6), n=64).log_z)
    assert abs(float(log_z.mean() - LOG_Z)) < 0.09 and float(log_z.std()) < 0.2


def test_bias_falls_with_the_particles():
    """Steep rewards are where adaptive growth hurts: log Z is too low, and less so for a larger tree."""
    _, log_z = GAUSSIAN.tilt([A], B, strength=3.0)
    bias = []
    for particles in (12, 160):
        result = steerfm.steer(MAP, reward, Rooted(particles=particles, steps=2), n=64, strength=3.0)
        bias.append(float(sure(result.log_z).mean() - log_z))
    assert bias[0] < -0.15 and abs(bias[1]) < 0.6 * abs(bias[0])


def test_one_step_is_plain_importance_sampling():
    result = steerfm.steer(MAP, reward, TreeSearch(particles=8, steps=1), n=3, strength=2.0)
    torch.testing.assert_close(result.log_weights, (2.0 * result.rewards.double()).log_softmax(1))
    log_z = torch.logsumexp(2.0 * result.rewards.double(), 1) - math.log(8)
    torch.testing.assert_close(result.log_z, log_z)
    # the nodes are fresh noise, one jump from the data
    first = steerfm.sample(MAP, 3, steps=1)
    assert torch.equal(result.samples[:, 0], first)


def test_constant_reward_gives_log_z_and_the_weights_of_the_tree():
    result = steerfm.steer(MAP, lambda x: 0.7 + 0.0 * x[:, 0], Rooted(particles=24, steps=3), n=4, strength=2.0)
    torch.testing.assert_close(result.log_z, torch.full((4,), 1.4).double(), atol=1e-6, rtol=0)
    inner = result.log_weights.isneginf()
    assert inner.any() and not inner.all(1).any()
    torch.testing.assert_close(result.log_weights.exp().sum(1), torch.ones(4).double())


def test_weights_by_hand():
    """Root with children 1, 2; node 1 with children 3, 4, 5: v_1 = log mean of its three, leaves weigh 1/2 and 1/6 each."""
    tree = Tree.of_roots(1, 6, torch.zeros(1, 1))
    root, first = torch.tensor([0]), torch.tensor([1])

    def found(*values):
        value = torch.tensor(values, dtype=torch.float64)
        return Trials(torch.zeros(len(value), 1), torch.zeros(len(value), 1), value, value, {})

    tree.add(1, root, found(1.0, 2.0))
    tree.back_up(torch.tensor([[0, 0, 0]]))
    torch.testing.assert_close(tree.value[0, 0].exp(), (torch.tensor(1.0).exp() + torch.tensor(2.0).exp()).double() / 2)
    tree.add(3, first, found(0.0, 3.0, 1.0))
    tree.back_up(torch.tensor([[0, 1, 1]]))
    e = torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64).exp()
    torch.testing.assert_close(tree.value[0, 1].exp(), e.mean())
    torch.testing.assert_close(tree.value[0, 0].exp(), (e.mean() + math.exp(2.0)) / 2)
    expected = torch.tensor([0.0, math.exp(2.0) / 2, *(e / 6)], dtype=torch.float64)
    torch.testing.assert_close(tree.log_weights(3)[0].exp(), expected)
    assert tree.visits[0].tolist() == [2, 1, 0, 0, 0, 0] and tree.level[0].tolist() == [0, 1, 1, 2, 2, 2]


def test_children_are_what_the_transition_gives():
    """With every draw the same noise, the tree's nodes are those of Renoise by hand."""
    seen = []

    class Spy(steerfm.flowmap.Wrapped):
        def jump(self, x, s, t, cond=None):
            seen.append((x.clone(), s, t))
            return super().jump(x, s, t, cond)

    steerfm.steer(Spy(MAP), reward, TreeSearch(particles=40, steps=2, gamma=1.0), n=1)
    states = torch.cat([x for x, _, _ in seen])[:, 0]
    times = torch.cat([s for _, s, _ in seen])
    assert set(times.tolist()) == {0.0, 0.5} and len(states) == 40
    # x' = X_{0,1}(x) / 2 + z / 2, so that 2 x' minus some node's look-ahead is standard normal
    ends, late = 0.5 + 0.6 * states[times == 0], states[times == 0.5]
    noise = (2 * late.unsqueeze(1) - ends).abs().amin(1)
    assert noise.max() < 4 and len(late) >= 8


def test_greedy_finds_more_and_gives_no_weights():
    runs = {
        greedy: steerfm.steer(MAP, lambda x: x[:, 0], TreeSearch(64, 4, greedy=greedy), n=24, strength=2.0)
        for greedy in (False, True)
    }
    assert runs[True].log_z is None and runs[True].log_weights.unique().numel() == 1
    assert runs[True].rewards.amax(1).mean() > runs[False].rewards.amax(1).mean()


# --- the budget ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [1, 4])
def test_budget_is_kept_for_every_particle(width):
    method = BudgetForcing(particles=3, steps=5, budget=32, width=width)
    for seed in range(3):
        cost = steerfm.steer(MAP, reward, method, n=1, seeds=seed).cost
        assert 3 * 8 < cost.forwards == cost.reward_calls == cost.decodes <= 3 * 32
    cost = steerfm.steer(MAP, lambda x: 0.0 * x[:, 0], method, n=2).cost
    assert cost.forwards == 2 * 3 * 32  # nothing ever beats a constant: all is spent
    cost = steerfm.steer(MAP, lambda x: 0.0 * x[:, 0], replace(method, gamma=0.5), n=2).cost
    assert cost.reward_calls == 2 * 3 * 32 and cost.forwards == 2 * cost.reward_calls


def test_unused_budget_rolls_over():
    """A reward that beats itself once: the step after it has the rest of its share too."""
    calls = []

    def rising(x):
        calls.append(len(x))
        return torch.full((len(x),), float(len(calls) == 5)) + 0.0 * x[:, 0]

    times = []

    class Spy(steerfm.flowmap.Wrapped):
        def jump(self, x, s, t, cond=None):
            times.append(float(a(torch.Tensor, s)[0]))
            return super().jump(x, s, t, cond)

    steerfm.steer(Spy(MAP), rising, BudgetForcing(steps=3, budget=12), n=1)
    # 4 noises; the first child at 1/3 wins and leaves 3; so 7 at 2/3
    assert [round(3 * t) for t in times] == [0] * 4 + [1] + [2] * 7


def test_returns_the_best_that_was_seen():
    seen = []

    def spy(x):
        seen.append(reward(x))
        return seen[-1]

    result = steerfm.steer(MAP, spy, BudgetForcing(steps=4, budget=24, width=3), n=1, strength=0.1)
    assert torch.equal(result.rewards[0, 0], torch.cat(seen).max())
    assert torch.equal(reward(result.samples[:, 0]), result.rewards[:, 0])
    lowest = steerfm.steer(MAP, reward, BudgetForcing(steps=4, budget=24), n=16, strength=-1.0)
    assert lowest.rewards.mean() < steerfm.steer(MAP, reward, BudgetForcing(steps=4, budget=24), n=16).rewards.mean() - 1


def test_one_step_is_best_of_n():
    result = steerfm.steer(
        GaussianMixture([[0.0]], [[1.0]]).flow_map(), lambda x: x[:, 0], BudgetForcing(steps=1, budget=16), n=300
    )
    best = result.rewards.double()
    assert abs(float(best.mean()) - 1.7660) < 4 * float(best.std()) / 300**0.5  # the highest of 16 standard normals


# --- the contract of both --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_outputs_are_independent(method):
    strength = torch.tensor([0.5, 2.0, 1.0, 3.0])
    result = steerfm.steer(MAP, reward, method, n=4, seeds=[4, 5, 6, 7], strength=strength)
    order = torch.tensor([2, 0, 3, 1])
    turned = steerfm.steer(MAP, reward, method, n=4, seeds=[6, 4, 7, 5], strength=strength[order])
    for other, rows in (
        (turned, order),
        (steerfm.steer(MAP, reward, method, n=4, seeds=[4, 5, 6, 7], strength=strength, batch_size=3), slice(None)),
        (steerfm.steer(MAP, reward, method, n=4, seeds=[4, 5, 6, 7], strength=strength, micro_batch=1), slice(None)),
    ):
        for field in ("samples", "rewards", "log_weights"):
            torch.testing.assert_close(getattr(other, field), getattr(result, field)[rows])
        torch.testing.assert_close(other.trace.value, result.trace.value[:, rows])
        assert other.cost.forwards == result.cost.forwards
    assert result.samples.std(1).min() > 0


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_trace_and_ticks(method):
    ticks = []
    result = steerfm.steer(MAP, reward, method, n=2, strength=2.0, lookaheads=True, progress=lambda *tick: ticks.append(tick))
    iterations = len(ticks)
    assert ticks == [(i + 1, iterations) for i in range(iterations)]
    assert result.trace.t[-1] == 1 and result.trace.value.shape == (iterations, 2, method.particles)
    torch.testing.assert_close(result.trace.value[-1], 2.0 * result.rewards.double())
    looks = sure(result.trace.lookaheads)
    if isinstance(method, BudgetForcing):
        assert (result.trace.value[1:] >= result.trace.value[:-1]).all() and result.log_z is None
        assert torch.equal(looks[-1], result.samples[:, 0])
    else:
        assert torch.equal(looks[-1], result.best())
    torch.testing.assert_close(torch.logsumexp(result.log_weights, 1), torch.zeros(2).double())


def test_the_trace_of_a_large_tree_stays_small():
    trace = steerfm.steer(MAP, reward, TreeSearch(particles=130, steps=2), n=1).trace
    assert trace.t.shape == (44,) and trace.value.shape == (44, 1, 130) and trace.value.isfinite().all()


def test_a_tree_costs_one_forward_a_node():
    for width, gamma in ((1, 1.0), (4, 1.0), (4, 0.5)):
        cost = steerfm.steer(MAP, reward, TreeSearch(particles=24, steps=3, width=width, gamma=gamma), n=3).cost
        assert cost.reward_calls == cost.decodes == 3 * 24 and cost.forwards == 3 * 24 * (2 if gamma < 1 else 1)
        assert cost.backwards == cost.reward_backwards == 0


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_black_boxes_are_welcome(method):
    result = steerfm.steer(MAP, BlackBox(), method, n=8, strength=2.0)
    assert result.rewards.amax(1).mean() >= 1


@pytest.mark.parametrize("method", [TreeSearch(12, 3, width=2), BudgetForcing(2, 3, budget=9, width=2)], ids=name)
def test_conditions_labels_and_prompts_follow_their_rows(method):
    class Conditional(steerfm.FlowMap):
        def __init__(self):
            super().__init__((2,), class_names=("a", "b", "c"))
            self.register_buffer("one", torch.ones(()))

        def average_velocity(self, x, s, t, cond):
            end = 100.0 * a(torch.Tensor, cond).view(-1, 1).to(x)  # of every jump to 1
            return (end - x) / (1 - s.view(-1, 1))

    class Reads(Reward):
        needs = frozenset({"labels", "prompts"})

        def score(self, images, prompts=None, labels=None):
            prompts, labels = sure(prompts), sure(labels)
            assert list(prompts) == [str(int(label)) for label in labels]
            return -(images.mean(1) - 100.0 * labels).abs() / 100

    result = steerfm.steer(Conditional(), Reads(), method, n=3, cond=torch.tensor([2, 0, 1]), prompts=["2", "0", "1"])
    ends = torch.tensor([200.0, 0.0, 100.0]).view(3, 1, 1).expand(3, method.particles, 2)
    torch.testing.assert_close(result.samples, ends, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: TreeSearch(particles=0), "particles=0"),
        (lambda: TreeSearch(steps=0), "steps=0"),
        (lambda: TreeSearch(particles=10, width=3), "width=3"),
        (lambda: TreeSearch(branching=0.0), "branching=0.0"),
        (lambda: TreeSearch(widening=1.0), "widening=1.0"),
        (lambda: TreeSearch(gamma=0.0), "gamma=0.0"),
        (lambda: BudgetForcing(particles=0), "particles=0"),
        (lambda: BudgetForcing(width=0), "width=0"),
        (lambda: BudgetForcing(steps=9, budget=8), "budget=8"),
        (lambda: BudgetForcing(gamma=1.5), "gamma=1.5"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_docstrings_say_what_is_sampled(method):
    assert "Samples:" in sure(type(method).__doc__)
