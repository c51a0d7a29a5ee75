"""Every key of every preset changes what runs, or is refused before it runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace

import pytest
import torch

import steerfm
from steerfm import GaussianMixture
from steerfm.rewards import RewardError
from steerfm.steering import DPS, FMRGJ, METHODS, TDS, BestOfN, FeynmanKac, Funnel, MultiRound, Resample, Steering, TopK

MAP = GaussianMixture([[-2.0, 0.0], [0.5, 1.0], [2.5, -1.0]], [[0.3, 0.3]] * 3).flow_map(steps=2)
OTHERS = {
    "lookahead": ["denoise", "renoise", "jump"],
    "guidance": ["endpoint", "map"],
    "tempering": ["none", 2.0, "linear"],
    "transition": ["renoise", "jump", "diffuse"],
    "correction": ["none", "twisted"],
    "resampling": ["multinomial", TopK(2)],
    "threshold": [0.01, 0.99],
    "power": [2.0],
    "recurrence": [3],
    "stop": [0.4],
    "particles": [12],
    "steps": [3],
    "potential": ["max"],
    "children": [8],
    "soft": [True],
    "calls": [16],
}
SHAPES = {"calls": {"particles": 1, "steps": 4, "first": 13}}
"""Other keys of the method on which a key is tried: a budget is that of its own shape."""


def bowl(x):
    return x[:, 0] - 0.1 * x[:, 1] ** 2


def draw(method):
    """What comes out, and what comes out of the reward as a black box, for which some keys are, where the method takes one."""
    results = [steerfm.steer(MAP, bowl, method, n=3, seeds=3, strength=3.0)]
    with suppress(RewardError):
        results.append(steerfm.steer(MAP, lambda x: bowl(x).detach(), method, n=3, seeds=3, strength=3.0))
    return [
        each for result in results
        for each in (result.samples, result.log_weights, result.trace.t, torch.tensor(result.cost.forwards))
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, Steering)])
def test_every_key_changes_the_run_or_is_refused(name):
    plain = METHODS[name]()
    usual = draw(plain)
    for field in fields(plain):
        method = replace(plain, **SHAPES.get(field.name, {}))
        if not field.init:
            with pytest.raises((TypeError, ValueError)):
                METHODS[name](**{field.name: None})
            continue
        before = usual if method == plain else draw(method)
        now, same, changed = getattr(method, field.name), 0, False
        for other in OTHERS.get(field.name) or [now + 1 if isinstance(now, int) else now * 0.5]:
            try:
                if (changed_method := replace(method, **{field.name: other})) == method:
                    continue
                after = draw(changed_method)
            except ValueError:
                continue
            if changed := any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after)):
                break
            same += 1
        assert changed or not same, f"{name}.{field.name} is taken, and nothing changes"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FeynmanKac(stop=0.5), "stop=0.5 does nothing in this FeynmanKac: nothing is guided"),
        (MultiRound(tempering="none"), "tempering=.* does nothing in this MultiRound"),
        (FeynmanKac(transition="jump", resampling="ssp"), "resampling=.* does nothing .* copied before steps with noise"),
        (FMRGJ(warmup=2), "warmup=2 does nothing with one particle"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        steerfm.steer(MAP, lambda x: x[:, 0], method)


def test_a_threshold_is_that_of_the_selection():
    assert FeynmanKac(threshold=0.9).resampling == Resample(threshold=0.9)
    assert replace(TDS(), threshold=0.3).resampling == Resample(threshold=0.3)
    assert replace(FeynmanKac(threshold=0.9), resampling=Resample("ssp", 0.2)).resampling == Resample("ssp", 0.2)
    assert Funnel(threshold=0.9).parts.selection.then == Resample(threshold=0.9)
    for method in (DPS, MultiRound):
        with pytest.raises(TypeError, match=f"{method.__name__} takes no threshold; it takes particles, steps, "):
            method(threshold=0.9)
    with pytest.raises(ValueError, match=r"threshold=0\.9: this method does not resample"):
        BestOfN(threshold=0.9)


def test_a_search_with_nothing_to_select_is_refused():
    """Its selection asks before steps with noise only."""
    with pytest.raises(ValueError, match=r"transition=Jump.* does nothing in this MultiRound: TopK"):
        steerfm.steer(MAP, lambda x: x[:, 0], MultiRound(transition="jump"))


def test_an_optional_gradient_goes_with_its_settings():
    """A black box takes the guidance of the default away, and what was set of it does not stand in the way."""
    reward = steerfm.reward(lambda x: x.detach()[:, 0])
    assert steerfm.steer(MAP, reward, Funnel(stop=0.5), n=1).rewards.isfinite().all()


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        (FeynmanKac(), "FeynmanKac(particles=16, steps=8)"),
        (FeynmanKac(threshold=0.9, guidance="endpoint"), "FeynmanKac(particles=16, steps=8, guidance=EndpointGradient("),
        (TDS(particles=4), "TDS(particles=4, steps=16)"),
        (FeynmanKac(tempering="none"), "tempering=untempered"),
        (TDS(threshold=0.2), "resampling=Resample(scheme='systematic', threshold=0.2)"),
    ],
)
def test_a_method_shows_what_is_not_as_usual(method, shown):
    assert shown in repr(method) and len(repr(method)) < 250
