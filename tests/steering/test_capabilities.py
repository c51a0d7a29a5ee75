"""What a map can do, what methods need, and that nothing runs which would be wrong."""

import pytest
import torch

import steerfm
from steerfm.capabilities import ENDPOINT, GENERATOR, KINDS, TWO_TIME, VELOCITY, can, closed, in_words
from steerfm.flowmap import FlowMap, Guided, Microbatched, Wrapped
from steerfm.steering import Steering
from steerfm.steering.lookahead import Denoise, Jump, Posterior, Rollout
from steerfm.steering.steer import steer_batches
from steerfm.transitions import Bridge, Diffuse, Midpoint, Renoise
from steerfm.transitions import Jump as JumpTransition

LINE = steerfm.GaussianMixture(means=[[-2.0], [0.5], [2.5]], covs=[[0.16], [0.09], [0.25]], weights=[0.5, 0.3, 0.2])
TARGET, LOG_Z = LINE.tilt(linear=[1.2], quadratic=[[0.3]])
MEAN = float(LINE.weights @ LINE.means[:, 0])
VARIANCE = float(LINE.weights @ (torch.tensor([0.16, 0.09, 0.25]).double() + LINE.means[:, 0] ** 2)) - MEAN**2
CAPABILITIES = {"two_time": TWO_TIME, "endpoint": ENDPOINT, "velocity": VELOCITY, "generator": GENERATOR}


def reward(x):
    return 1.2 * x[:, 0] - 0.15 * x[:, 0] ** 2


class Strict(FlowMap):
    """The map of the mixture, which stops a run that asks for something that it cannot do."""

    def __init__(self, capabilities):
        super().__init__((1,))
        self.capabilities, self.exact = capabilities, LINE.flow_map(steps=16)

    def average_velocity(self, x, s, t, cond):
        if can(self, "velocity") and not can(self, "two_time"):
            return self.instantaneous_velocity(x, s, cond)  # an Euler step
        assert can(self, "two_time") or bool((t == 1).all()), "a jump to a time before the data"
        assert can(self, "endpoint") or bool((s == 0).all()), "a jump from a time after the noise"
        return self.exact.average_velocity(x, s, t, cond)

    def instantaneous_velocity(self, x, t, cond):
        assert can(self, "velocity"), "a velocity"
        return LINE.velocity(x, t).to(x)


def small(name):
    """A method by name, in a small shape."""
    method = steerfm.method(name)
    few = {"steps": 2, "particles": 4, "iterations": 2, "first": 4, "budget": 8, "keep": 2, "every": 1}
    return steerfm.method(name, **{key: value for key, value in few.items() if hasattr(method, key)})


# --- the words -------------------------------------------------------------------------------------------------------
def test_capabilities_bring_what_they_imply():
    assert closed({"endpoint"}) == {"endpoint", "generator"}
    assert closed(["two_time"]) == {"two_time", "endpoint", "velocity", "generator"} == TWO_TIME
    assert closed("velocity") == {"velocity"}
    assert closed({"generator", "posterior"}) == {"generator", "posterior"}
    with pytest.raises(ValueError, match="unknown capability 'jumps'; capabilities: two_time"):
        closed({"jumps"})


@pytest.mark.parametrize("name", KINDS)
def test_a_map_says_in_words_what_it_can_do(name):
    assert len(in_words(Strict(KINDS[name])).split(" and ")) == 1
    assert " and " in in_words(Strict({"velocity", "posterior"}))


def test_shipped_maps_can_do_everything():
    assert steerfm.load("emoji").capabilities == TWO_TIME
    assert steerfm.load("fashion").capabilities == TWO_TIME | {"posterior"}


def test_wrapped_maps_keep_what_they_can_do():
    class Own(Strict):
        def grid(self, steps):
            return [0.0, *[0.9] * (steps > 1), 1.0]

    inner = Own(VELOCITY)
    inner.transition, inner.steps = Bridge(), 7
    inner.class_names = ("a", "b")
    for outer in (Microbatched(inner, 3), Guided(inner, 2.0), Wrapped(inner), Microbatched(Guided(inner, 2.0), 5)):
        assert (outer.capabilities, outer.transition, outer.steps) == (VELOCITY, Bridge(), 7)
        assert outer.grid(2) == [0.0, 0.9, 1.0]


# --- methods ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", steerfm.methods())
def test_a_method_runs_right_or_is_refused_with_what_works(name, capability):
    flow_map, method = Strict(CAPABILITIES[capability]), small(name)
    try:
        result = steerfm.steer(flow_map, reward, method, n=2)
    except ValueError as error:
        assert capability != "two_time"
        assert type(method).__name__ in str(error), error
        assert "take" in str(error), error
        assert "\n" not in str(error)
        with pytest.raises(ValueError, match="does not fit this model"):  # before any work
            steer_batches(flow_map, reward, method, n=2)
    else:
        assert torch.isfinite(result.samples).all()


@pytest.mark.parametrize(
    ("capability", "parts"),
    [
        ("velocity", {"lookahead": Denoise(), "transition": Bridge()}),
        ("velocity", {"lookahead": Rollout(), "transition": Midpoint()}),
        ("velocity", {"lookahead": Posterior(), "transition": Diffuse()}),
        ("endpoint", {"lookahead": Jump(), "transition": Renoise()}),
    ],
)
@pytest.mark.parametrize("name", ["feynman_kac", "funnel", "tds", "das", "fk_steering", "multi_round", "beam", "svdd", "code"])
def test_what_a_refusal_names_works(name, capability, parts):
    flow_map, method = Strict(CAPABILITIES[capability]), small(name)
    shape = {key: getattr(method, key) for key in ("steps", "particles", "first", "keep", "every") if hasattr(method, key)}
    mended = steerfm.method(name, **shape, **parts)
    assert torch.isfinite(steerfm.steer(flow_map, reward, mended, n=2).samples).all()


@pytest.mark.parametrize(
    ("capability", "parts", "words"),
    [
        ("velocity", {"lookahead": Jump()}, "lookahead=denoise"),
        ("velocity", {"lookahead": Jump(hops=2)}, "lookahead=denoise"),
        ("velocity", {"transition": Renoise()}, "transition=midpoint, bridge or diffuse"),
        ("velocity", {"transition": Renoise(0.3)}, "transition=midpoint, bridge or diffuse"),
        ("endpoint", {"transition": JumpTransition()}, "transition=renoise"),
        ("endpoint", {"transition": Diffuse()}, "transition=renoise"),
        ("endpoint", {"transition": Bridge()}, "transition=renoise"),
        ("endpoint", {"transition": Midpoint()}, "transition=renoise"),
        ("endpoint", {"transition": Renoise(0.5)}, "gamma=1"),
        ("endpoint", {"lookahead": Jump(hops=2)}, "hops=1"),
        ("endpoint", {"lookahead": Denoise()}, "lookahead=jump"),
        ("endpoint", {"lookahead": Rollout()}, "lookahead=jump"),
        ("endpoint", {"lookahead": Posterior()}, "lookahead=jump"),
        ("generator", {"steps": 2}, "steps=1"),
    ],
)
def test_each_part_says_what_it_needs(capability, parts, words):
    fitting = {
        "velocity": {"lookahead": Denoise(), "transition": Bridge()},
        "endpoint": {"lookahead": Jump(), "transition": Renoise()},
        "generator": {"lookahead": Jump(), "transition": JumpTransition(), "steps": 1},
    }[capability]
    flow_map, common = Strict(CAPABILITIES[capability]), {"steps": 3, "particles": 2, "resampling": None}
    assert not Steering(**{**common, **fitting}).lacks(flow_map)
    with pytest.raises(ValueError, match=words):
        steerfm.steer(flow_map, reward, Steering(**{**common, **fitting, **parts}))


def test_a_velocity_given_as_a_flow_map_was_wrong_without_a_word():
    """Seen by a user: a tilt mean of 1.08 where 2.03 is right."""
    with pytest.raises(ValueError, match="FeynmanKac does not fit this model, which has only a velocity"):
        steerfm.steer(Strict(VELOCITY), reward, steerfm.FeynmanKac(particles=64, steps=4), n=2)


def test_parts_of_ones_own_need_not_say_anything():
    class Mine:
        def endpoints(self, flow_map, x, t, cond, noise=None):
            return steerfm.steering.Endpoints(flow_map.denoise(x, t, cond).unsqueeze(1))

    result = steerfm.steer(Strict(VELOCITY), reward, steerfm.FeynmanKac(4, 3, lookahead=Mine(), transition=Bridge()), n=2)
    assert torch.isfinite(result.samples).all()


# --- the default -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_default_method_samples_the_tilt_whatever_the_map_can_do(capability):
    flow_map = Strict(CAPABILITIES[capability])
    result = steerfm.steer(flow_map, reward, n=50, seeds=1)
    mean = (result.log_weights.exp() * result.samples[..., 0]).sum(1)
    right = float(TARGET.weights @ TARGET.means[:, 0])
    assert right == pytest.approx(2.026, abs=2e-3)
    assert abs(mean.mean() - right) < 3 * mean.std() / 50**0.5 + 0.01
    assert result.log_z is not None
    z = (result.log_z - LOG_Z).exp()
    assert abs(z.mean() - 1) < 3 * z.std() / 50**0.5 + 0.01


@pytest.mark.parametrize(("capability", "name"), [("endpoint", "Renoise"), ("velocity", "Jump"), ("generator", "Jump")])
def test_plain_samples_are_drawn_as_the_map_can(capability, name):
    flow_map = Strict(CAPABILITIES[capability])
    flow_map.steps = 1 if capability == "generator" else 16
    x = steerfm.sample(flow_map, n=4000, seeds=3)
    assert abs(x.mean() - MEAN) < 5 * x.std() / 4000**0.5 + 0.02
    with pytest.raises(ValueError, match="this model has only"):
        wrong = Bridge() if capability != "velocity" else Renoise()
        steerfm.sample(flow_map, n=2, steps=4, transition=wrong)


def test_a_generator_in_several_steps_is_refused():
    with pytest.raises(ValueError, match="take steps=1"):
        steerfm.sample(Strict(GENERATOR), n=2, steps=4)


def test_a_maps_own_transition_is_right_for_it():
    flow_map = Strict(ENDPOINT)
    flow_map.transition = Renoise(0.5)
    flow_map.average_velocity = flow_map.exact.average_velocity
    assert torch.isfinite(steerfm.sample(flow_map, n=4)).all()
    torch.testing.assert_close(steerfm.sample(flow_map, n=4), steerfm.sample(flow_map, n=4, transition=Renoise(0.5)))


# --- the grid --------------------------------------------------------------------------------------------------------
class Shifted(Strict):
    """A grid with a shift, as pipelines have it."""

    asked: tuple[float, ...] = ()

    def grid(self, steps):
        return [t / (3 - 2 * t) for t in super().grid(steps)]

    def average_velocity(self, x, s, t, cond):
        self.asked = (*self.asked, float(s[0]))
        return self.exact.average_velocity(x, s, t, cond)


def test_samples_and_methods_follow_the_grid_of_the_map():
    flow_map = Shifted(TWO_TIME)
    steerfm.sample(flow_map, n=2, steps=3)
    assert flow_map.asked == pytest.approx(flow_map.grid(3)[:-1])
    result = steerfm.steer(flow_map, reward, steerfm.FeynmanKac(particles=2, steps=3))
    assert result.trace.t.tolist() == pytest.approx(flow_map.grid(3)[1:])
    squared = steerfm.steer(flow_map, reward, steerfm.FeynmanKac(particles=2, steps=3, power=2.0))
    assert squared.trace.t.tolist() == pytest.approx([t**2 for t in flow_map.grid(3)[1:]])
    given = steerfm.steer(flow_map, reward, steerfm.FeynmanKac(particles=2, steps=3), times=[0.0, 0.4, 1.0])
    assert given.trace.t.tolist() == pytest.approx([0.4, 1.0])
    flow_map.asked = ()
    steerfm.steer(flow_map, reward, steerfm.method("tree_search", particles=16, steps=3))
    assert sorted(set(flow_map.asked)) == pytest.approx(flow_map.grid(3)[:-1])


# --- midpoint steps --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("transition", "order"), [(Midpoint(0.0), 2), (JumpTransition(), 1)])
def test_the_order_of_the_ode_steps(transition, order):
    flow_map, exact = Strict(VELOCITY), LINE.flow_map(steps=256)
    right = steerfm.sample(exact, n=256, steps=1)
    errors = [(steerfm.sample(flow_map, n=256, steps=k, transition=transition) - right).abs().median() for k in (16, 32, 64)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.6 * 2**order < coarse / fine < 1.7 * 2**order


@pytest.mark.slow
@pytest.mark.parametrize("churn", [0.5, 1.0, 3.0])
def test_midpoint_steps_keep_the_marginals(churn):
    """In 24 steps mean and variance are those of the data, where as many ancestral steps are off."""
    x = steerfm.sample(Strict(VELOCITY), n=20000, steps=24, transition=Midpoint(churn), seeds=7)
    assert abs(x.mean() - MEAN) < 4 * x.std() / 20000**0.5
    assert x.var() == pytest.approx(VARIANCE, rel=0.03)


def test_a_midpoint_step_shares_the_call_of_the_denoiser():
    flow_map = Strict(VELOCITY)
    x = torch.randn(5, 1)
    denoised = flow_map.denoise(x, 0.3)
    with steerfm.Ledger() as ledger:
        shared = Midpoint().step(flow_map, x, 0.3, 0.5, None, denoised)
    assert ledger.cost.forwards == 5
    alone = Midpoint().step(flow_map, x, 0.3, 0.5, None)
    torch.testing.assert_close(shared.mean, alone.mean, atol=1e-5, rtol=1e-5)
    assert shared.std == alone.std > 0


# --- in parts --------------------------------------------------------------------------------------------------------
class Counting(Strict):
    """How many rows each call of the decoder gets."""

    rows: tuple[int, ...] = ()

    def decode(self, z):
        self.rows = (*self.rows, len(z))
        return super().decode(z)


@pytest.mark.parametrize("name", steerfm.methods())
def test_no_call_of_the_decoder_gets_more_rows_than_micro_batch(name):
    whole, parts = Counting(TWO_TIME), Counting(TWO_TIME)
    want = steerfm.steer(whole, reward, small(name), n=3, lookaheads=True)
    made = steerfm.steer(parts, reward, small(name), n=3, lookaheads=True, micro_batch=2)
    assert max(whole.rows) > 2 >= max(parts.rows)
    assert sum(whole.rows) == sum(parts.rows) == want.cost.decodes == made.cost.decodes
    assert want.cost.reward_calls == made.cost.reward_calls
    torch.testing.assert_close(made.samples, want.samples, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.rewards, want.rewards, atol=1e-5, rtol=1e-5)
    parts.rows = ()
    made.images()
    assert max(parts.rows) <= 2
    parts.rows = ()
    made.images(batch_size=1)
    assert max(parts.rows) == 1
    with pytest.raises(ValueError, match="batch_size=0"):
        made.images(batch_size=0)


def test_a_broken_reward_names_the_sample_also_in_parts():
    def broken(x):
        return torch.where(torch.arange(len(x)) == 1, float("nan"), x[:, 0]) if len(x) == 2 else x[:, 0]

    with pytest.raises(steerfm.RewardError, match="sample") as caught:
        steerfm.steer(Strict(TWO_TIME), broken, steerfm.BestOfN(particles=5, steps=1), micro_batch=2)
    assert caught.value.sample == 1


def test_a_reward_that_compares_samples_sees_all_of_them():
    seen = []

    class Group(steerfm.Reward):
        name, groupwise = "group", True

        def score(self, images, prompts=None, labels=None, groups=None):
            seen.append(len(images))
            return images[:, 0]

    steerfm.steer(Strict(TWO_TIME), Group(), steerfm.BestOfN(particles=6, steps=1), n=2, micro_batch=4)
    assert max(seen) >= 6
