"""What outputs are asked for: rows, negatives, and a strength that is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from kinds import a, sure

import steerfm
from steerfm import FeynmanKac, FlowMap, GaussianMixture, Guided, cli
from steerfm.rewards import as_reward
from steerfm.rows import Rows, split_negative, with_negative


def rows() -> Rows:
    return Rows.of(torch.tensor([3, 1, 2]), ["a", "b", "c"])


def test_rows_are_taken_repeated_and_moved_together():
    twice = rows().repeat(2)
    assert (
        twice.n == 6 and twice.prompts == ["a", "a", "b", "b", "c", "c"] and sure(twice.labels).tolist() == [3, 3, 1, 1, 2, 2]
    )
    some = rows()[torch.tensor([2, 2, 0])]
    assert some.n == 3 and some.prompts == ["c", "c", "a"] and sure(some.labels).tolist() == [2, 2, 3]
    assert sure(some.labels).equal(a(torch.Tensor, some.cond))
    assert rows()[1:].prompts == ["b", "c"] and rows()[1:].n == 2
    assert Rows.of({"text": torch.zeros(2, 4)}).labels is None and Rows().n == 1
    with pytest.raises(ValueError, match="2 prompts for 3 conditions"):
        Rows.of(torch.arange(3), ["a", "b"])


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"text": x}], ids=["tensor", "mapping"])
def test_a_negative_comes_apart_as_it_was_put_together(form):
    cond, negative = form(torch.arange(3)), form(torch.arange(3) + 5)
    both = with_negative(cond, negative)
    for got, wanted in zip(split_negative(both), (cond, negative)):
        torch.testing.assert_close(got, wanted)
    assert split_negative(cond)[1] is None
    with pytest.raises(ValueError, match="negative= needs a condition of the same form"):
        with_negative(None, negative)


def test_a_negative_class_stands_in_place_of_none():
    flow_map = steerfm.load("fashion")
    guided = Guided(flow_map, 3.0)
    plain = steerfm.sample(guided, n=2, label="Bag")
    torch.testing.assert_close(
        steerfm.sample(guided, n=2, label="Bag", negative=a(torch.Tensor, flow_map.null).repeat(2)), plain
    )
    away = steerfm.sample(guided, n=2, label="Bag", negative="Shirt")
    assert (away - plain).abs().mean() > 0.01
    torch.testing.assert_close(away, steerfm.sample(Guided(flow_map, 3.0, torch.tensor([6])), n=2, label="Bag"))


def test_negatives_are_one_for_all_or_one_for_each():
    """Each row has its own, whatever the batch, the micro-batch and the selection do with it."""
    guided, method = Guided(steerfm.load("fashion"), 2.0), FeynmanKac(4, 3, threshold=1.0)
    many = steerfm.steer(guided, "brightness", method, n=3, label="Bag", negative=["Shirt", 3, "Coat"], strength=5.0)
    parts = steerfm.steer(
        guided, "brightness", method, n=3, label="Bag", negative=["Shirt", 3, "Coat"], strength=5.0, batch_size=2, micro_batch=3
    )
    torch.testing.assert_close(many.samples, parts.samples, rtol=1e-4, atol=1e-4)
    for i, name in enumerate(("Shirt", "Dress", "Coat")):
        one = steerfm.steer(guided, "brightness", method, n=1, seeds=i, label="Bag", negative=name, strength=5.0)
        torch.testing.assert_close(one.samples[0], many.samples[i], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="negative= needs classifier-free guidance"):
        steerfm.steer("fashion", "brightness", method, label="Bag", negative="Shirt")
    with pytest.raises(ValueError, match="unknown class 'Hat'"):
        steerfm.steer(guided, "brightness", method, label="Bag", negative="Hat")


def test_an_automatic_strength_is_two_spreads():
    """A normal reward of standard deviation 3 s: 2 / (3 s) tilts its mean by two of them."""
    mixture = GaussianMixture([[1.0]], [[0.25]])
    result = steerfm.steer(mixture.flow_map(), lambda x: 3 * x[:, 0], FeynmanKac(256, 6), n=8, strength="auto")
    strength = float(result.strength[0])
    assert strength == pytest.approx(2 / 1.5, rel=0.25) and (result.strength == strength).all()
    mean = (result.log_weights.exp() * result.rewards).sum(1).mean()
    assert float(mean) == pytest.approx(3 + strength * 1.5**2, rel=0.05)
    again = steerfm.steer(mixture.flow_map(), lambda x: 3 * x[:, 0], FeynmanKac(4, 2), n=2, seeds=9, strength="auto")
    assert float(again.strength[0]) == strength  # of map and reward, not of the seeds


@pytest.mark.parametrize(
    ("strength", "reward", "message"),
    [
        ("strong", lambda x: x[:, 0], "strength='strong': give a number, one per output, or 'auto'"),
        ("auto", lambda x: 0 * x[:, 0], "is 0 for all 64 plain samples: give a number"),
    ],
)
def test_a_strength_that_cannot_be_chosen_is_refused(strength, reward, message):
    with pytest.raises(ValueError, match=message):
        steerfm.steer(GaussianMixture([[1.0]], [[0.25]]).flow_map(), reward, FeynmanKac(4, 2), strength=strength)


@pytest.mark.slow
def test_the_command_takes_them_in_the_same_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["method.particles=4", "method.first=4", "method.steps=2"]
    asked = ["n=2", "label=[Bag,8]", "negative=[Shirt,Coat]", "guidance=3"]
    assert cli.main(["steer", "strength=auto", "out=a", *asked, *few]) == 0
    here = steerfm.SteeringResult.load("a")
    guided = Guided(steerfm.load("fashion"), 3.0)
    there = steerfm.steer(
        guided, "classifier", steerfm.Funnel(4, 2, first=4), n=2, label=["Bag", 8], negative=["Shirt", "Coat"], strength="auto"
    )
    torch.testing.assert_close(here.samples, there.samples, rtol=1e-4, atol=1e-4)
    assert f"auto: {here.strength[0]:.4g}" in (tmp_path / "a" / "report.html").read_text()
    assert cli.main(["sample", "n=2", "label=[Bag,8]", "negative=Shirt", "guidance=3", "out=s"]) == 0
    assert cli.main(["steer", "strength=much", "out=b"]) == 2 and not (tmp_path / "b").exists()
    assert cli.main(["steer", "negative=Shirt", "label=Bag", "out=c"]) == 2 and not (tmp_path / "c").exists()
    assert "give a number, or auto" in (told := capsys.readouterr().err) and "negative= needs classifier-free guidance" in told


def test_rows_are_of_one_kind_where_all_that_is_asked_is_the_same():
    cond = {"a": torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])}
    assert Rows(4, cond).kinds().tolist() == [0, 0, 1, 0]
    assert Rows(4, cond, prompts=["x", "y", "x", "x"]).kinds().tolist() == [0, 1, 2, 0]
    assert Rows(3).kinds().tolist() == [0, 0, 0]
    assert Rows(3, labels=torch.tensor([5, 2, 5])).kinds().tolist() == [0, 1, 0]


@pytest.mark.parametrize("std", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_an_automatic_strength_follows_the_spread_within_an_output(std, n):
    """Means of conditions that lie far apart are no spread that a tilt could use."""
    from steerfm.steering.strength import automatic

    class Shifted(FlowMap):
        def average_velocity(self, x, s, t, cond):
            mean, s = 100 * a(torch.Tensor, cond)[:, None], s.reshape(-1, 1)
            return mean + (std - 1) * (x - s * mean) / (1 + (std - 1) * s)

        def instantaneous_velocity(self, x, t, cond):
            return self.average_velocity(x, t, t, cond)

    rows = Rows(n, torch.arange(n, dtype=torch.float32))
    found = automatic(Shifted((1,)), as_reward(lambda x: x[:, 0]), rows, "auto")
    assert found == pytest.approx(2 / std, rel=0.3)


def test_an_automatic_strength_is_aimed_at_an_effective_sample_size():
    """Two times that of an ESS of 1/e: a heavy tail asks for less than two spreads of the reward; of a reward of two values,
    whose ESS never falls so low, two spreads."""
    from steerfm.steering.strength import one_spread

    r = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    normal = torch.special.ndtri((torch.arange(4000) + 0.5) / 4000).double()
    assert one_spread(normal) == pytest.approx(1, rel=0.01)
    heavy = normal.exp().pow(2)
    w = (one_spread(heavy) * heavy).softmax(0)
    assert float(1 / (w.square().sum() * 4000)) == pytest.approx(math.exp(-1), rel=1e-3)
    assert one_spread(heavy) < 1 / heavy.std()
    coin = (r > 0).double()
    assert one_spread(coin) == pytest.approx(1 / coin.std().item())
