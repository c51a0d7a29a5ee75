"""Many seeds begin and few end: who goes on, where a look is paid for, and that paths are those of their seeds."""

from typing import Any

import pytest
import torch
from kinds import check_outputs_are_independent

import steerfm
from steerfm import GaussianMixture
from steerfm.flowmap import Wrapped
from steerfm.sampling import Noise
from steerfm.steering import Drafts, Endpoints, Prune, SeedPruning
from steerfm.steering.selection import Candidates, Window, ranking

MAP = GaussianMixture([[-1.0, 0.0, 0.5], [1.0, 0.5, 0.0]], [[0.2, 0.3, 0.2], [0.2, 0.2, 0.4]]).flow_map()


def wave(x):
    return torch.sin(3 * x[:, 0]) + 0.3 * x[:, 1] - 0.1 * x[:, 2] ** 2


def seeds_of(n, first):
    """The noise that outputs begin with, (n, first, 3)."""
    return Noise(range(n), first).start(MAP).unflatten(0, (n, first))


def best(values, keep):
    return values.argsort(dim=1, descending=True)[:, :keep].sort(1).values


def rows(x, index):
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


# --- who goes on -----------------------------------------------------------------------------------------------------
def test_drafts_are_the_best_jumps_sampled_from_their_own_noise():
    n, first, keep, steps = 5, 12, 3, 4
    result = steerfm.steer(MAP, wave, Drafts(keep, steps, first=first), n=n, strength=2.0)
    x0 = seeds_of(n, first)
    drafts = wave(MAP.lookahead(x0.flatten(0, 1), 0.0)).view(n, first)
    x = rows(x0, best(drafts, keep)).flatten(0, 1)
    for i in range(steps):
        x = MAP.jump(x, i / steps, (i + 1) / steps)
    torch.testing.assert_close(result.samples.flatten(0, 1), x, atol=1e-5, rtol=1e-5)
    assert result.log_z is None and result.log_weights.unique().numel() == 1


def test_seeds_are_pruned_by_the_denoiser_as_published():
    """Eight on Euler's path, the better four after a quarter of the steps, the better two after half."""
    n, steps = 4, 8
    parts: Any = {"lookahead": "denoise", "transition": {"name": "bridge", "eta": 0.0}}
    result = steerfm.steer(MAP, wave, SeedPruning(2, steps, first=8, at=(0.25, 0.5), **parts), n=n)
    x = seeds_of(n, 8)
    for i in range(steps):
        t, h = i / steps, 1 / steps
        if i in (2, 4):
            values = wave(MAP.denoise(x.flatten(0, 1), t)).view(n, -1)
            x = rows(x, best(values, x.shape[1] // 2))
        flat = x.flatten(0, 1)
        x = (flat + h * MAP.velocity(flat, t)).view_as(x)  # of a straight path, DDIM's step is Euler's
    torch.testing.assert_close(result.samples, x, atol=1e-4, rtol=1e-4)
    assert result.cost.forwards == n * (8 * 2 + 8 + 4 + 4 + 2 * 3)  # looks at 2 and 4 are shared with the step


@pytest.mark.parametrize("strength", [1.5, -1.5])
def test_the_best_go_on_and_go_up(strength):
    n = 60
    few = steerfm.steer(MAP, wave, Drafts(2, 2, first=2), n=n, strength=strength).rewards
    many = steerfm.steer(MAP, wave, Drafts(2, 2, first=32), n=n, strength=strength).rewards
    pruned = steerfm.steer(MAP, wave, SeedPruning(2, 4, first=32), n=n, strength=strength).rewards
    assert (strength * (many - few)).mean() > 0.5 and (strength * (pruned - few)).mean() > 0.5


def test_where_nothing_is_told_apart_the_first_seeds_go_on():
    for method in (Drafts(2, 3, first=9), SeedPruning(2, 3, first=9)):
        for constant, strength in ((lambda x: 0.7 + 0.0 * x[:, 0], 2.0), (wave, 0.0)):
            result = steerfm.steer(MAP, constant, method, n=3, strength=strength)
            plain = seeds_of(3, 9)[:, :2].flatten(0, 1)
            for i in range(3):
                plain = MAP.jump(plain, i / 3, (i + 1) / 3)
            torch.testing.assert_close(result.samples.flatten(0, 1), plain, atol=1e-5, rtol=1e-5)
            assert torch.equal(result.samples[:, 0], steerfm.sample(MAP, 3, steps=3))


# --- what it costs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("first", "keep", "steps"), [(48, 4, 4), (10, 10, 3), (7, 2, 1)])
def test_a_draft_costs_a_jump(first, keep, steps):
    cost = steerfm.steer(MAP, wave, Drafts(keep, steps, first=first), n=2).cost
    looked = first if first > keep else 0  # nobody looks where nobody is left out
    walks = steps > 1 or not looked  # one step is the look itself
    assert cost.forwards == 2 * (looked + keep * steps * walks)
    assert cost.reward_calls == 2 * (looked + keep * walks) and cost.backwards == 0


def test_looks_are_made_where_seeds_are_pruned_only():
    seen = []

    class Spy(Wrapped):
        def jump(self, x, s, t, cond=None):
            seen.append((len(x), float(s), float(t)))
            return super().jump(x, s, t, cond)

    steerfm.steer(Spy(MAP), wave, SeedPruning(1, 4, first=16, at=(0.0, 0.5)), n=1)
    assert seen == [(16, 0, 1), (4, 0, 0.25), (4, 0.25, 0.5), (4, 0.5, 1), (1, 0.5, 0.75), (1, 0.75, 1)]


def test_one_step_prunes_too():
    method = SeedPruning(2, 1, first=12, at=(0.0, 0.25, 0.5))
    result = steerfm.steer(MAP, wave, method, n=3)
    assert result.samples.shape == (3, 2, 3)
    drafts = wave(MAP.lookahead(seeds_of(3, 12).flatten(0, 1), 0.0)).view(3, 12)
    torch.testing.assert_close(result.rewards.sort(1).values, drafts.topk(2, 1).values.sort(1).values.to(result.rewards))


@pytest.mark.parametrize("at", [(0.0, 0.5), (0.0, 0.25), (0.25, 0.5, 0.75), (0.0, 0.0, 0.25)])
def test_the_trace_is_that_of_the_paths_that_end(at):
    """Also where seeds are pruned before the first step and after it: who they were, and what looks said of them."""
    n, first, steps = 4, 20, 4
    result = steerfm.steer(MAP, wave, SeedPruning(2, steps, first=first, at=at), n=n, strength=2.0)
    trace = result.trace
    assert trace.value.shape == trace.ancestors.shape == trace.guidance_ratio.shape == (steps, n, 2)
    x = rows(seeds_of(n, first), trace.ancestors[0]).flatten(0, 1)
    assert (trace.ancestors[1:] == torch.arange(2)).all() and (trace.unique() == 2).all()
    looked = [round(share * steps) for share in at]
    for i in range(steps):
        x = MAP.jump(x, i / steps, (i + 1) / steps)
        value = 2.0 * wave(MAP.lookahead(x, (i + 1) / steps)).view(n, 2) if i + 1 < steps else 2.0 * result.rewards
        expected = value if i + 1 in looked or i + 1 == steps else torch.zeros(n, 2)
        torch.testing.assert_close(trace.value[i], expected.double(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.samples.flatten(0, 1), x, atol=1e-5, rtol=1e-5)


# --- parts -----------------------------------------------------------------------------------------------------------
def test_a_cheaper_map_drafts():
    asked = []

    class Cheap:
        def __init__(self, flow_map):
            self.flow_map = flow_map

        def endpoints(self, flow_map, x, t, cond, noise=None):
            asked.append((len(x), t))
            return Endpoints(self.flow_map.lookahead(x, t, cond).unsqueeze(1))

    other = GaussianMixture([[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]).flow_map()
    result = steerfm.steer(MAP, wave, Drafts(2, 3, first=10, lookahead=Cheap(other)), n=2)
    assert asked == [(20, 0.0)] and result.samples.shape == (2, 2, 3)
    x0 = seeds_of(2, 10)
    x = rows(x0, best(wave(x0.flatten(0, 1)).view(2, 10), 2)).flatten(0, 1)  # that map's jump is the identity
    for i in range(3):
        x = MAP.jump(x, i / 3, (i + 1) / 3)
    torch.testing.assert_close(result.samples.flatten(0, 1), x, atol=1e-5, rtol=1e-5)


def test_prune_in_any_method():
    """Of a walk that draws noise: 8, then 4 and 2; the trace has the others as missing."""
    method = steerfm.Steering(8, 4, correction="none", resampling=Prune((1, 2), (4, 2)))
    result = steerfm.steer(MAP, wave, method, n=3, strength=1.0)
    assert result.samples.shape == (3, 2, 3)
    assert [(row >= 0).sum(1).tolist() for row in result.trace.ancestors] == [[4] * 3, [2] * 3, [2] * 3, [2] * 3]
    assert result.cost.forwards == 3 * (8 + 8 + 4 + 2)


def test_prune_by_hand():
    tilt = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0]])
    candidates = Candidates(torch.zeros(2, 4), tilt, torch.zeros(2, 4), step=3, t=0.5)
    prune = Prune((1, 3, 5), (4, 2, 1))
    selected = prune.select(candidates)
    assert selected.ancestors.tolist() == [[1, 3], [0, 1]] and selected.resampled.all()
    assert [prune.leaves(step, 0.0, 6) for step in range(7)] == [6, 4, 4, 2, 2, 1, 1]
    assert not ranking(prune, 0, 6) and ranking(prune, 1, 6) and not ranking(prune, 2, 4)
    assert ranking(Window(prune, 2), 1, 6) and not ranking(None, 0, 6)
    with pytest.raises(ValueError, match=r"at=\[0, 1\], keep=\[2\]: give a number of particles for each step"):
        Prune((0, 1), (2,))
    with pytest.raises(ValueError, match="keep=0"):
        Prune((0,), (0,))


@pytest.mark.parametrize(
    "method", [Drafts(2, 3, first=8), SeedPruning(2, 4, first=8)], ids=lambda method: type(method).__name__
)
def test_outputs_are_independent(method):
    check_outputs_are_independent(MAP, wave, method, torch.tensor([0.5, 2.0, -1.0, 3.0]), rows=3, nan=True)


def test_a_size_keeps_the_number_of_seeds_for_each_that_ends():
    for kind in (Drafts, SeedPruning):
        method = kind(2, first=10)
        made = method.within(200)
        assert made.first == 5 * made.particles and made.at == method.at


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"first": 1}, "first=1: must be at least particles=4"),
        ({"first": 2.5}, "first=2.5: give a whole number"),
        ({"at": ()}, r"at=\[\]: ascending shares of the steps"),
        ({"at": (0.5, 0.2)}, r"at=\[0.5, 0.2\]: ascending shares"),
        ({"at": (1.0,)}, r"at=\[1.0\]: ascending shares of the steps, in \[0, 1\)"),
        ({"lookahead": None}, "ranks look-aheads"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        Drafts(**{"particles": 4} | given)
