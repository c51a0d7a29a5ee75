"""Steering step by step: states, callbacks that end a run, noise and pictures to begin with, times of one's own."""

from __future__ import annotations

import pytest
import torch
from kinds import sure

import steerfm
from steerfm import GaussianMixture
from steerfm.steering import METHODS, TDS, BestOfN, FeynmanKac, FreeDoM, Funnel, MultiRound, ReNO, Steering, TreeSearch, steps

GRID = GaussianMixture([[-2.0, 0.0], [0.5, 1.0], [2.5, -1.0]], [[0.3, 0.3]] * 3)
MAP = GRID.flow_map(steps=2)


def reward(x):
    return x[:, 0]


WALKS = [name for name, method in METHODS.items() if isinstance(method(), Steering)]


@pytest.mark.parametrize("name", WALKS)
def test_steps_end_where_steer_does(name):
    method = METHODS[name]()
    result = steerfm.steer(MAP, reward, method, n=3, seeds=5, strength=2.0)
    states = list(steps(MAP, reward, method, n=3, seeds=5, strength=2.0))
    last = states[-1]
    assert torch.equal(last.x.view(result.samples.shape), result.samples)
    assert torch.equal(last.log_weights, result.log_weights)
    assert torch.equal(torch.tensor([state.t for state in states]), result.trace.t)
    assert torch.equal(torch.stack([state.ess for state in states]), result.trace.ess)


def test_a_state_shows_itself():
    for state in steps(MAP, reward, FeynmanKac(particles=4, steps=3), n=2):
        assert state.lookahead_images().shape == state.images().shape == (2, 4, 2)
        assert state.ess.shape == (2,) and state.log_weights.shape == (2, 4)
        expected = MAP.lookahead(state.x, state.t).view(2, 4, 2) if state.t < 1 else state.images()
        torch.testing.assert_close(state.lookahead_images(), expected)
    blind = next(steps(MAP, reward, BestOfN(particles=4, steps=3), n=2))  # did not look
    torch.testing.assert_close(blind.lookahead_images(), MAP.lookahead(blind.x, blind.t).view(2, 4, 2))


def test_a_state_can_be_stepped_by_hand():
    method = FeynmanKac(particles=4, steps=3)
    states = list(steps(MAP, reward, method, n=2))
    again = method.step(states[0])
    assert again.t == states[1].t and again.done == 2


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_callback_sees_every_state_and_changes_nothing(batch_size):
    seen = []

    def look(state):
        torch.manual_seed(0)
        seen.append((state.t, state.ess.clone()))

    method = TDS(particles=4, steps=4)
    plain = steerfm.steer(MAP, reward, method, n=2)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    result = steerfm.steer(MAP, reward, method, n=2, callback=look, batch_size=batch_size)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(result.samples, plain.samples) and torch.equal(
        result.log_z or torch.zeros(1), plain.log_z or torch.zeros(1)
    )
    assert [t for t, _ in seen] == [0.25, 0.5, 0.75, 1.0] * (1 if batch_size is None else 2)


@pytest.mark.parametrize("method", [FeynmanKac(64, 8), Funnel(32, 6), TDS(64, 8), FreeDoM(steps=4), MultiRound(16, 8)])
def test_a_callback_can_end_the_run_with_a_jump(method):
    result = steerfm.steer(MAP, reward, method, n=200, callback=lambda state: state.t >= 0.5)
    assert (float(result.trace.t[-1]) == 1.0 and float(result.trace.t[-2]) == 0.5) or isinstance(method, FreeDoM)
    assert len(result.trace.t) < method.steps * method.recurrence + 1 and result.rewards.isfinite().all()
    torch.testing.assert_close(result.rewards, result.samples[..., 0].float())


class EndAt:
    """Ends the run of each batch, one after the other, at a time of its own."""

    def __init__(self, ends):
        self.ends, self.batch, self.last = ends, 0, 0.0

    def __call__(self, state):
        self.batch += state.t < self.last
        self.last = state.t
        return state.t >= self.ends[self.batch]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [[0.25, 0.75], [0.75, 0.25], [0.25, 2.0, 0.5], [2.0, 0.125, 2.0]])
@pytest.mark.parametrize("method", [FeynmanKac(particles=4, steps=8), TDS(particles=3, steps=8)])
def test_batches_that_end_at_different_times_are_one_result(ends, method, tmp_path):
    """The work is done: what came of it is joined, and each record stands at its own time."""
    n = len(ends)
    result = steerfm.steer(MAP, reward, method, n=n, seeds=5, batch_size=1, callback=EndAt(ends), lookaheads=True)
    alone = [steerfm.steer(MAP, reward, method, 1, 5 + i, callback=EndAt([ends[i]]), lookaheads=True) for i in range(n)]
    times = sorted({time for one in alone for time in one.trace.t.tolist()})
    assert result.trace.t.tolist() == times
    for i, one in enumerate(alone):
        for name in ("samples", "rewards", "log_weights"):
            assert torch.equal(getattr(result, name)[i], getattr(one, name)[0])
        there = torch.tensor([time in one.trace.t.tolist() for time in times])
        for name in ("ess", "value", "resampled", "ancestors", "lookaheads"):
            assert torch.equal(getattr(result.trace, name)[there, i], getattr(one.trace, name)[:, 0])
        assert result.trace.ess[~there, i].isnan().all() and result.trace.value[~there, i].isnan().all()
        assert not result.trace.resampled[~there, i].any() and sure(result.trace.lookaheads).isfinite().all()
        assert torch.equal(result.trace.origins()[-1, i], one.trace.origins()[-1, 0])
        assert torch.equal(result.trace.unique()[i], one.trace.unique()[0])
    assert "nan" not in repr(result.trace)
    result.save(tmp_path)
    assert torch.equal(steerfm.SteeringResult.load(tmp_path).trace.t, result.trace.t)
    assert result.plot(tmp_path / "trace.png").stat().st_size


def test_traces_of_as_many_steps_at_other_times_are_told_apart():
    parts = [steerfm.steer(MAP, reward, FeynmanKac(4, 2), times=[0.0, time, 1.0]) for time in (0.5, 0.25)]
    joined = steerfm.SteeringResult.cat(parts)
    assert joined.trace.t.tolist() == [0.25, 0.5, 1.0]
    assert joined.trace.ess.isnan().tolist() == [[True, False], [False, True], [False, False]]
    assert torch.equal(joined.trace.ess[2], torch.cat([part.trace.ess[1] for part in parts]))


@pytest.mark.slow
def test_an_ended_run_still_samples_the_tilt():
    """A jump is a transition like any other: exp(log_z) stays unbiased, and the weighted mean right."""
    target, log_z = GRID.tilt([1.0, 0.0], [0.0, 0.0])
    result = steerfm.steer(GRID.flow_map(steps=6), reward, FeynmanKac(64, 8), n=300, callback=lambda state: state.t >= 0.6)
    assert result.log_z is not None
    share = (result.log_z - log_z).exp()
    assert abs(float(share.mean() - 1)) < 4 * float(share.std()) / 300**0.5
    mean = (share.unsqueeze(1) * result.log_weights.exp() * result.rewards).sum(1)
    assert abs(float(mean.mean() - target.mean()[0])) < 4 * float(mean.std()) / 300**0.5


# --- where it begins -------------------------------------------------------------------------------------------------
def test_x0_is_the_noise():
    x0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    result = steerfm.steer(MAP, reward, BestOfN(particles=1, steps=2), n=3, x0=x0)
    expected = MAP.jump(MAP.jump(x0, 0.0, 0.5), 0.5, 1.0)
    torch.testing.assert_close(result.samples[:, 0], expected)
    own = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    result = steerfm.steer(MAP, reward, BestOfN(particles=4, steps=1), n=3, x0=own, batch_size=2)
    torch.testing.assert_close(result.samples, MAP.jump(own.flatten(0, 1), 0.0, 1.0).view(3, 4, 2))


def test_noise_of_the_seeds_given_as_x0_is_the_same_run():
    from steerfm.sampling import Noise

    method = FeynmanKac(particles=4, steps=3, transition="jump", resampling=None)
    x0 = Noise(range(3), 4).start(MAP).view(3, 4, 2)
    plain = steerfm.steer(MAP, reward, method, n=3)
    assert torch.equal(plain.samples, steerfm.steer(MAP, reward, method, n=3, x0=x0).samples)


def test_a_late_start_keeps_the_picture_and_an_early_one_does_not():
    pictures = torch.tensor([[-2.0, 0.0], [0.5, 1.0], [2.5, -1.0]])

    def distance(t):
        result = steerfm.steer(MAP, reward, BestOfN(particles=64, steps=4), n=3, start=(pictures, t))
        assert result.trace.t[0] > t and result.trace.t[-1] == 1
        return float((result.samples - pictures.unsqueeze(1)).norm(dim=2).mean())

    assert distance(0.95) < 0.2 < distance(0.6) < distance(0.0)


@pytest.mark.slow
def test_a_start_samples_the_tilt_of_what_it_leads_to():
    """From x_t with weights exp(r): the tilted mean of a posterior, by a chain that forgets nothing."""
    gaussian = GaussianMixture([[0.5, -1.0]], [[0.36, 0.5]])
    given = {"start": (torch.zeros(1, 2), 0.3), "strength": 1.5}
    result = steerfm.steer(gaussian.flow_map(steps=6), reward, FeynmanKac(256, 6), n=200, **given)
    plain = steerfm.steer(gaussian.flow_map(steps=6), reward, BestOfN(20_000, 6, transition="renoise"), n=20, **given)
    assert result.log_z is not None and plain.log_z is not None
    error = (result.log_z.exp().std() / 200**0.5 / plain.log_z.exp().mean()).hypot(plain.log_z.exp().std() / 20**0.5)
    assert abs(float(result.log_z.exp().mean() / plain.log_z.exp().mean() - 1)) < 4 * float(error)


def test_times_of_ones_own():
    result = steerfm.steer(MAP, reward, FeynmanKac(particles=4), n=2, times=[0, 0.1, 0.7, 1])
    torch.testing.assert_close(result.trace.t, torch.tensor([0.1, 0.7, 1.0]))
    late = steerfm.steer(MAP, reward, FeynmanKac(particles=4), n=2, start=(torch.zeros(2), 0.5), times=(0.5, 0.9, 1.0))
    torch.testing.assert_close(late.trace.t, torch.tensor([0.9, 1.0]))
    own = steerfm.steer(MAP, reward, FeynmanKac(4, 4), n=2)
    same = steerfm.steer(MAP, reward, FeynmanKac(4, 9), n=2, times=[0, 0.25, 0.5, 0.75, 1])
    assert torch.equal(own.samples, same.samples)


X = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x0": torch.zeros(3, 2)}, r"x0 has shape \(3, 2\) for n=2 outputs"),
        ({"x0": torch.zeros(2, 3)}, "x0 has shape"),
        ({"x0": torch.zeros(2, 3, 2)}, "3 particles per output in x0, but the method has 4"),
        ({"x0": torch.full((2, 2), torch.nan)}, "x0 is not finite"),
        ({"x0": X, "start": (X, 0.5)}, "x0 and start: give only one of them"),
        ({"start": X[:, :1]}, "start"),
        ({"start": (X, 1.0)}, r"a time in \[0, 1\)"),
        ({"start": (X, -0.1)}, r"a time in \[0, 1\)"),
        ({"times": [0, 0.5]}, "ascending times from 0 to 1"),
        ({"times": [0, 0.5, 0.5, 1]}, "ascending times"),
        ({"times": []}, "ascending times"),
        ({"times": [0, 1], "start": (X, 0.5)}, "ascending times from 0.5 to 1"),
    ],
)
def test_what_nothing_can_begin_with_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        steerfm.steer(MAP, reward, FeynmanKac(particles=4, steps=2), n=2, **given)


@pytest.mark.parametrize("method", [ReNO(), TreeSearch()])
@pytest.mark.parametrize("given", [{"x0": X}, {"times": [0, 1]}, {"callback": print}])
def test_methods_that_do_not_walk_say_so(method, given):
    with pytest.raises(ValueError, match="does not walk from noise to data"):
        steerfm.steer(MAP, reward, method, n=2, **given)
    with pytest.raises(ValueError, match="does not walk"):
        steps(MAP, reward, method, n=2)
