"""The networks: safe under forward-mode AD, zero at the start, each row on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steerfm.networks import NETWORKS, ConvNet, Mlp, ResNet, UNet

# name: (arguments, shape of a row)
SMALL = {
    "mlp": ({"dim": 3, "width": 16, "depth": 2, "classes": 4}, (3,)),
    "unet": ({"channels": 2, "widths": (8, 16), "classes": 4}, (2, 8, 8)),
    "resnet": ({"channels": 2, "widths": (8, 16), "classes": 4}, (2, 8, 8)),
    "convnet": ({"channels": 2, "widths": (4, 8), "side": 8, "hidden": 16, "classes": 4}, (2, 8, 8)),
}
FLOWS = ["mlp", "unet"]


def build(name: str, **options) -> tuple[nn.Module, tuple[int, ...]]:
    arguments, shape = SMALL[name]
    torch.manual_seed(0)
    return NETWORKS[name](**(arguments | options)).double().eval(), shape


def batch(shape: tuple[int, ...], n: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    s, t = torch.rand(2, n, generator=generator, dtype=torch.float64).sort(0).values
    return x, s, t, torch.arange(n) % 4


def test_every_network_has_a_small_version_here():
    assert SMALL.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_builds_and_keeps_its_shapes(name, randomise):
    network, shape = build(name)
    x, s, t, labels = batch(shape)
    if name in FLOWS:
        assert (network(x, s, t, labels) == 0).all()  # at the start
        assert randomise(network)(x, s, t, labels).shape == x.shape
    else:
        assert isinstance(network, ConvNet | ResNet) and network(x).shape == (3, 4)
        assert network.features(x).shape == (3, network.num_features)
        torch.testing.assert_close(network(x), network.head(network.features(x)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_does_not_see_its_batch(name, randomise):
    network, shape = build(name)
    randomise(network)
    rows = batch(shape, 5)
    arguments = rows if name in FLOWS else rows[:1]
    together = network(*arguments)
    assert together.std(0).min() > 0
    for i in range(5):
        torch.testing.assert_close(network(*(a[i : i + 1] for a in arguments))[0], together[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_no_condition_is_the_null_class(name, randomise):
    network, shape = build(name)
    randomise(network)
    x, s, t, labels = batch(shape)
    null = network(x, s, t, torch.full((3,), 4))
    torch.testing.assert_close(network(x, s, t, None), null)
    assert (network(x, s, t, labels) - null).abs().amax(tuple(range(1, x.ndim))).min() > 1e-4


@pytest.mark.parametrize("name", FLOWS)
def test_unconditional_networks_refuse_labels(name):
    network, shape = build(name, classes=0)
    x, s, t, labels = batch(shape)
    assert network(x, s, t).shape == x.shape
    with pytest.raises(ValueError, match="unconditional"):
        network(x, s, t, labels)


@pytest.mark.parametrize("name", FLOWS)
def test_both_times_matter(name, randomise):
    network, shape = build(name)
    randomise(network)
    x, s, t, labels = batch(shape)
    u = network(x, s, t, labels)
    assert (network(x, s + 0.1, t, labels) - u).abs().max() > 1e-4
    assert (network(x, s, t + 0.1, labels) - u).abs().max() > 1e-4


@pytest.mark.parametrize("name", FLOWS)
def test_forward_derivatives_equal_finite_differences(name, randomise):
    network, shape = build(name)
    randomise(network)
    x, s, t, labels = batch(shape)
    v, h = torch.randn_like(x), 1e-5
    one = torch.ones_like(t)
    _, du_dt = torch.func.jvp(lambda t: network(x, s, t, labels), (t,), (one,))[:2]
    torch.testing.assert_close(
        du_dt, (network(x, s, t + h, labels) - network(x, s, t - h, labels)) / (2 * h), rtol=1e-5, atol=1e-8
    )
    _, along = torch.func.jvp(lambda x, s: network(x, s, t, labels), (x, s), (v, one))[:2]
    numeric = (network(x + h * v, s + h, t, labels) - network(x - h * v, s - h, t, labels)) / (2 * h)
    torch.testing.assert_close(along, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["unet", "resnet"])
def test_forward_derivatives_in_channels_last_are_those_in_any_format(name, randomise):
    """Training keeps its networks in channels-last, where torch's group norm before 2.14 has no forward derivative."""
    network, shape = build(name)
    randomise(network)
    x, s, t, labels = batch(shape)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def tangent(x: torch.Tensor) -> torch.Tensor:
        call = (lambda x: network(x, s, t, labels)) if name in FLOWS else network
        return torch.func.jvp(call, (x,), (v,))[1]

    usual = tangent(x)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert usual.abs().max() > 0.01
    for pictures in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(tangent(pictures), usual, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_backward_through_the_tangent(name, randomise):
    """The gradient of |d u/d t|^2 along a random direction of weights, against a finite difference."""
    network, shape = build(name)
    randomise(network)
    x, s, t, labels = batch(shape)

    def loss() -> torch.Tensor:
        _, du = torch.func.jvp(lambda t: network(x, s, t, labels), (t,), (torch.ones_like(t),))[:2]
        return du.square().sum()

    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions) if g is not None)
    ends, h = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):  # to +h, then to -h
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=sign * h)
            ends.append(loss().item())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_embeddings_are_slow():
    """|d u/d t| stays near |u|: an embedding with high frequencies would make self-distillation stiff."""
    torch.manual_seed(0)
    network = Mlp(4, width=64, depth=2)
    nn.init.normal_(network.outputs.weight, std=0.1)
    t = torch.linspace(0, 1, 101)
    x = torch.randn(1, 4).expand(101, 4)
    u, du = torch.func.jvp(lambda t: network(x, torch.zeros(101), t), (t,), (torch.ones(101),))[:2]
    assert du.norm(dim=1).mean() < 10 * u.norm(dim=1).mean()


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (7, 7)])
def test_pictures_that_cannot_be_halved_are_refused(size):
    network, _ = build("unet")
    with pytest.raises(ValueError, match="divisible by 4"):
        network(torch.zeros(1, 2, *size, dtype=torch.float64), *torch.zeros(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"patch": 1}, {"widths": (8,)}, {"attention": False}, {"blocks": 2}])
def test_unet_variants(options, randomise):
    network, shape = build("unet", **options)
    x, s, t, labels = batch(shape)
    u = randomise(network)(x, s, t, labels)
    assert u.shape == x.shape
    assert u.isfinite().all()


def test_every_weight_of_the_unet_is_used(randomise):
    network = randomise(UNet(1, widths=(8, 16), classes=2)).double()
    x, s, t, _ = batch((1, 8, 8))
    network(x, s, t, torch.tensor([0, 1, 2])).square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_dropout_only_while_training():
    network, shape = build("resnet", dropout=0.5)
    x = batch(shape)[0]
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.equal(network(x), network(x))
