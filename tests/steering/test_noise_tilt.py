"""The gradient in the noise of a step: the mean stays, the noise is noise, and the reward goes up."""

import math
from typing import Any

import pytest
import torch
from kinds import sure

import steerfm
from steerfm import GaussianMixture
from steerfm.steering import NoiseGradient, NoiseTilt
from steerfm.steering.guidance import GUIDANCES, white
from steerfm.steering.value import Evaluation

SHAPES = [(1,), (2,), (7,), (40, 8), (1, 28, 28), (3, 16, 16)]
MAP = GaussianMixture([[-1.0, 0.0, 0.5], [1.0, 0.5, 0.0]], [[0.2, 0.3, 0.2], [0.2, 0.2, 0.4]]).flow_map()


def slope(x):
    return x[:, 0] - 0.5 * x[:, 2]


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


# --- whitening -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_stays_nearly_as_it_is(shape):
    z = normal((200, *shape))
    w = white(z)
    assert w.shape == z.shape and cosine(z, w).min() > 0.99 and cosine(z, w).mean() > 0.999
    assert (w.flatten(1).square().mean(1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_is_odd_and_knows_no_scale(shape):
    x = normal((5, *shape)) ** 3 + 0.2
    w = white(x)
    for scale in (1e-6, 3.0, 1e6):
        torch.testing.assert_close(white(scale * x), w, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(white(-x), -w, atol=1e-5, rtol=1e-5)
    assert torch.equal(white(0 * x), torch.zeros_like(x)) and white(1e-35 * x).isfinite().all()


def structured():
    ramp = torch.linspace(-1, 1, 28)
    spot = torch.zeros(28, 28)
    spot[3, 5] = 1.0
    return torch.stack(
        [torch.ones(28, 28), ramp.expand(28, 28), torch.outer(ramp, ramp), spot, torch.sin(9 * ramp).expand(28, 28)]
    )


def test_structure_that_noise_has_not_is_taken_off():
    """No value and no frequency is larger than one row of noise in 10,000 has; what is left points the same way."""
    x = structured().unsqueeze(1)
    w, rare = white(x), 1e-4 / 784
    spectrum = torch.fft.fft2(x * 28 / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1), norm="ortho").abs()
    assert w.abs().amax() <= -torch.special.ndtri(torch.tensor(rare / 2)) + 1e-3
    assert torch.fft.fft2(w, norm="ortho").abs().amax() <= math.sqrt(-math.log(rare)) + 1e-2 < spectrum[:-2].amax()
    assert (cosine(x, w) > 0.2).all()


# --- the noise of a step ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_tilted_noise_is_as_long_as_noise(share):
    n, gradient = 400, structured().unsqueeze(1)
    for row in gradient:
        direction, zero = row.expand(n, 1, 28, 28), torch.zeros(n)
        z = normal((n, 1, 28, 28), 1)
        tilted = NoiseGradient(share=share).tilted(Evaluation(zero, zero, zero, direction=direction), z)
        squares = tilted.flatten(1).square().mean(1)
        spread = (2 / 784) ** 0.5  # of the mean square of noise; less where the gradient stands for a part of it
        assert abs(squares.mean() - 1) < 0.03 and squares.std() < 1.2 * spread
        # the gradient's own part is there, and the rest is that of the draw
        along = (tilted * white(direction)).flatten(1).mean(1).mean()
        assert along > 0.9 * share**0.5 * white(direction)[0].square().mean()


def test_without_a_gradient_the_noise_is_that_of_the_seed():
    """A constant reward, and strength 0, leave samples as plain ones of the same steps; rows do not see each other."""
    plain = steerfm.sample(MAP, 3, steps=4, seeds=0, transition=steerfm.Renoise())
    method = NoiseTilt(steps=4)
    constant = steerfm.steer(MAP, lambda x: 0.7 + 0.0 * x[:, 0], method, n=3)
    assert torch.equal(constant.samples[:, 0], plain)
    mixed = steerfm.steer(MAP, slope, method, n=3, strength=[0.0, 2.0, 0.0]).samples[:, 0]
    assert torch.equal(mixed[::2], plain[::2]) and not torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("through", [False, True])
def test_only_the_noise_is_touched(through):
    """One step to t = 1/2 by hand: x = mean + std (sqrt(share) w + sqrt(1 - share) z), with w of length sqrt(d)."""
    share, seen = 0.36, []
    method = NoiseTilt(steps=2, guidance=NoiseGradient(share, through))
    plain = NoiseTilt(steps=2, guidance=None)
    for each in (method, plain):
        seen.append(next(steerfm.steps(MAP, slope, each, n=4, strength=1.0)).x)
    x0 = steerfm.sampling.Noise([0, 1, 2, 3]).start(MAP)
    mean, std = 0.5 * MAP.lookahead(x0, 0.0), 0.5
    z = (seen[1] - mean) / std
    x = x0.requires_grad_()
    (gradient,) = torch.autograd.grad(slope(MAP.lookahead(x, 0.0)).sum(), x)
    gradient = gradient if through else torch.tensor([[1.0, 0.0, -0.5]]).expand(4, 3)
    w = 3**0.5 * gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(seen[0], mean + std * (share**0.5 * w + (1 - share) ** 0.5 * z), atol=1e-4, rtol=1e-4)


def test_the_reward_goes_up_and_down():
    n = 200
    rewards = {s: steerfm.steer(MAP, slope, NoiseTilt(steps=4), n=n, strength=s).rewards.mean() for s in (-1.0, 0.0, 1.0)}
    assert rewards[-1.0] < rewards[0.0] - 0.3 and rewards[1.0] > rewards[0.0] + 0.3
    # neither the reward's scale nor the strength is seen
    a = steerfm.steer(MAP, slope, NoiseTilt(steps=4), n=3, strength=1.0).samples
    b = steerfm.steer(MAP, lambda x: 50 * slope(x), NoiseTilt(steps=4), n=3, strength=3.0).samples
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_steps_without_noise_cost_no_gradient():
    cost = steerfm.steer(MAP, slope, NoiseTilt(particles=2, steps=5, guidance={"through": True}), n=3).cost
    assert cost.forwards == 3 * 2 * 5 and cost.backwards == cost.reward_backwards == 3 * 2 * 4
    cost = steerfm.steer(MAP, slope, NoiseTilt(particles=2, steps=5), n=3).cost
    assert cost.forwards == 3 * 2 * 5 and cost.backwards == 0 and cost.reward_backwards == 3 * 2 * 4


def test_the_trace_tells_how_much_the_noise_moves_a_step():
    trace = steerfm.steer(MAP, slope, NoiseTilt(steps=4), n=3, strength=1.0).trace
    assert (trace.guidance_ratio[:-1] > 0).all() and (trace.guidance_ratio[-1] == 0).all()
    assert (sure(trace.gradient_norm)[:-1] > 0).all()


# --- beside other parts ----------------------------------------------------------------------------------------------
def test_what_it_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"share=0.0: of the noise's variance, in \(0, 1\]"):
        NoiseGradient(share=0.0)
    with pytest.raises(ValueError, match="needs steps with noise: use transition=renoise"):
        NoiseTilt(transition="jump")
    for correction in ("twisted", "marginal"):
        with pytest.raises(ValueError, match="no weight for tilted noise: use correction none"):
            steerfm.FeynmanKac(guidance="noise", correction=correction)
    with pytest.raises(steerfm.RewardError, match="black box"):
        NoiseTilt().check(BlackBox())


class BlackBox(steerfm.Reward):
    differentiable = False

    def score(self, images, prompts=None, labels=None):
        return images[:, 0].round()


@pytest.mark.parametrize("transition", ["renoise", "diffuse", "midpoint", "bridge"])
def test_any_search_may_tilt_its_noise(transition):
    parts: Any = {"transition": transition, "lookahead": "denoise" if transition == "bridge" else "jump"}
    tilted = steerfm.Steering(8, 4, guidance="noise", correction="none", resampling=None, **parts)
    plain = steerfm.Steering(8, 4, correction="none", resampling=None, **parts)
    high, low = (steerfm.steer(MAP, slope, each, n=40, strength=1.0).rewards.mean() for each in (tilted, plain))
    assert high > low + 0.2


def test_guidances_by_name():
    assert GUIDANCES["noise"] == NoiseGradient() == NoiseTilt().guidance
    assert steerfm.method("noise_tilt", guidance={"share": 0.3}) == NoiseTilt(guidance=NoiseGradient(share=0.3))
