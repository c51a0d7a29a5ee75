"""`check_model` on networks of others: silent where their convention is named right, one sentence where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steerfm
from steerfm import GaussianMixture, VelocityModel
from steerfm.testing import ContractError, check_model

GM = GaussianMixture([[-1.0, 0.5], [1.2, 0.0]], [[0.3, 0.2], [0.2, 0.4]])


def alphas_cumprod() -> Tensor:
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def velocity(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    """dx/dt with the noise at t = 1."""
    return -GM.velocity(x, 1 - t)


def noise(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    """On the linear path, with the noise at t = 1."""
    return x - (1 - t).unsqueeze(1) * GM.velocity(x, 1 - t)


def denoiser(z: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
    t = 1 / (1 + sigma)
    return GM.denoise(z * t.unsqueeze(1), t)


def of_index(z: Tensor, index: Tensor, cond: object = None) -> Tensor:
    """Noise, on the path of alphas_cumprod."""
    square = alphas_cumprod()[index.round().long()].to(z)
    a, b = square.sqrt(), (1 - square).sqrt()
    x, t = z / (a + b).unsqueeze(1), a / (a + b)
    return x - t.unsqueeze(1) * GM.velocity(x, t)


class Ignorant(steerfm.FlowMap):
    """A velocity network, wrapped by hand, that says it jumps."""

    def average_velocity(self, x, s, t, cond):
        return GM.velocity(x, s).to(x.dtype)


def test_right_ones_are_silent():
    for fm in (
        VelocityModel(velocity, (2,)),
        VelocityModel(noise, (2,), "noise"),
        VelocityModel(denoiser, (2,), "data", "ve"),
        VelocityModel(of_index, (2,), "noise", "vp", alphas_cumprod=alphas_cumprod()),
        GM.flow_map(),
    ):
        check_model(fm)
    honest = Ignorant((2,))
    honest.capabilities = frozenset({"velocity"})
    check_model(honest)


@pytest.mark.parametrize(
    ("fm", "words"),
    [
        (VelocityModel(lambda x, t, c: -velocity(x, t), (2,)), "from the data to the noise: its sign is the other"),
        (VelocityModel(lambda z, i, c: -of_index(z, i), (2,), "noise", "vp", alphas_cumprod=alphas_cumprod()), "predicts="),
        (VelocityModel(noise, (2,), "noise", noise_at=0), "noise_at="),
        (VelocityModel(lambda x, t, c: x - noise(x, t), (2,), "data", noise_at=0), "noise_at="),
        (VelocityModel(of_index, (2,), "data", "vp", alphas_cumprod=alphas_cumprod()), "predicts="),
        (VelocityModel(lambda z, s, c: (z - denoiser(z, s)) / s.unsqueeze(1), (2,), "data", "ve"), "predicts="),
        (Ignorant((2,)), "does not look at the time that it jumps to: it is a velocity"),
    ],
)
def test_wrong_ones_are_named(fm, words):
    with pytest.raises(ContractError) as caught:
        check_model(fm)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_straight_map_may_leave_the_second_time_alone():
    class Straight(steerfm.FlowMap):
        """All data in one point."""

        def average_velocity(self, x, s, t, cond):
            return (1.0 - x) / (1 - s).clamp_min(1e-3).unsqueeze(1)

    check_model(Straight((2,)))


def test_networks_that_answer_in_another_shape_or_fail():
    wrong: list[tuple[Any, str]] = [
        (lambda x, t, c: x[:, :1], "answers states"),
        (lambda x, t, c: (x,), "return the tensor"),
        (lambda x, t, c: x @ torch.ones(3, 3), "RuntimeError"),
    ]
    for net, words in wrong:
        with pytest.raises(ContractError, match=words):
            check_model(VelocityModel(net, (2,)))
