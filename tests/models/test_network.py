"""`VelocityModel` in every convention, against the mixture whose exact velocity, score or denoiser it wraps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
import torch
from kinds import a
from torch import Tensor, nn

import steerfm
from steerfm import GaussianMixture, Guided, VelocityModel
from steerfm.cost import Ledger
from steerfm.models import paths


def alphas_cumprod(steps: int = 1000) -> Tensor:
    """Stable Diffusion's: betas whose roots are even steps."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2).cumprod(0)


def mixture(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    means = torch.tensor([[-1.2, 0.3], [1.0, 1.0], [0.6, -0.9]], dtype=dtype)
    covs = torch.tensor([[[0.30, 0.1], [0.1, 0.2]], [[0.15, 0.0], [0.0, 0.4]], [[0.25, -0.1], [-0.1, 0.3]]], dtype=dtype)
    return GaussianMixture(means, covs, torch.tensor([0.4, 0.35, 0.25], dtype=dtype))


Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The network's time to a and b."""


def of_linear(noise_at: float) -> Weigh:
    return lambda t: (1 - t, t) if noise_at else (t, 1 - t)


def of_index(index: Tensor) -> tuple[Tensor, Tensor]:
    """log(a / b) linear between two indices."""
    square = alphas_cumprod()
    ratio = (square / (1 - square)).log().to(index)
    low = index.floor().clamp_max(998).long()
    square = torch.sigmoid(torch.lerp(ratio[low], ratio[low + 1], index - low))
    return square.sqrt(), (1 - square).sqrt()


def of_sigma(sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(sigma), sigma


class Exact(nn.Module):
    """A network that predicts exactly, in a convention of its own: the mixture's ends, from the path's definition."""

    def __init__(self, gm: GaussianMixture, predicts: str, weigh: Weigh, slope: tuple[float, float]) -> None:
        super().__init__()
        self.gm, self.predicts, self.weigh, self.slope = gm, predicts, weigh, slope
        self.calls = 0

    def forward(self, z: Tensor, time: Tensor, cond: object) -> Tensor:
        assert time.shape == (len(z),) and cond is None
        self.calls += 1
        a, b = (weight.unsqueeze(1) for weight in self.weigh(time))
        t = (a / (a + b)).squeeze(1)
        data = self.gm.denoise(z / (a + b), t)
        noise = -b * self.gm.score(z / (a + b), t) / (a + b)  # the score of z is that of x by a + b
        da, db = self.slope
        return {"data": data, "noise": noise, "v": a * noise - b * data, "velocity": da * data + db * noise}[self.predicts]


@dataclass
class Convention:
    predicts: str
    options: dict[str, object]
    weigh: Weigh
    slope: tuple[float, float] = (0.0, 0.0)

    def wrap(self, gm: GaussianMixture) -> VelocityModel:
        net = Exact(gm, self.predicts, self.weigh, self.slope)
        return VelocityModel(net, (2,), self.predicts, **self.options)  # type: ignore[arg-type]


CONVENTIONS = {
    **{
        f"linear {predicts}, noise at {end}": Convention(
            predicts, {"noise_at": end}, of_linear(end), (-1.0, 1.0) if end else (1.0, -1.0)
        )
        for predicts in ("velocity", "noise", "data", "v")
        for end in (0, 1)
    },
    **{
        f"vp {predicts}": Convention(predicts, {"path": "vp", "alphas_cumprod": alphas_cumprod()}, of_index)
        for predicts in ("noise", "data", "v")
    },
    **{
        f"ve {predicts}": Convention(predicts, {"path": "ve"}, of_sigma, (0.0, 1.0))
        for predicts in ("noise", "data", "v", "velocity")
    },
}


@pytest.fixture(params=CONVENTIONS)
def convention(request) -> Convention:
    return CONVENTIONS[request.param]


@pytest.fixture
def x() -> Tensor:
    return 1.5 * torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


TIMES = [0.07, 0.1, 0.25, 0.4, 0.5, 0.62, 0.75, 0.9, 0.96]


def test_velocity_denoiser_and_score_are_the_mixtures(convention, x):
    gm = mixture()
    fm = convention.wrap(gm)
    for t in [*TIMES, torch.linspace(0.065, 0.97, 16, dtype=torch.float64)]:
        torch.testing.assert_close(fm.velocity(x, t), gm.velocity(x, t), rtol=2e-5, atol=2e-5)  # an index is rounded
        torch.testing.assert_close(fm.denoise(x, t), gm.denoise(x, t), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(fm.score(x, t), gm.score(x, t), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if not name.startswith("vp")])
def test_without_an_index_they_are_so_to_rounding(name, x):
    gm, fm = mixture(), CONVENTIONS[name].wrap(mixture())
    for t in TIMES:
        torch.testing.assert_close(fm.velocity(x, t), gm.velocity(x, t), rtol=1e-10, atol=1e-10)


def test_in_single_precision(convention, x):
    gm, fm = mixture(torch.float32), convention.wrap(mixture(torch.float32))
    for t in TIMES:
        u = fm.velocity(x.float(), t)
        assert u.dtype == torch.float32
        torch.testing.assert_close(u, gm.velocity(x.float(), t), rtol=2e-4, atol=2e-4)


def test_gradients_are_the_mixtures(convention, x):
    gm, fm = mixture(), convention.wrap(mixture())
    for t in (0.1, 0.5, 0.9):
        own, exact = (partial(m.velocity, t=t) for m in (fm, gm))
        for answer in (
            lambda f: torch.autograd.functional.jacobian(lambda x: f(x).sum(0), x.clone()),
            lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        ):
            torch.testing.assert_close(answer(own), answer(exact), rtol=1e-4, atol=1e-4)


def test_it_is_finite_at_both_ends_with_its_gradient(convention, x):
    fm = convention.wrap(mixture())
    for t in (0.0, 1e-4, 0.9999, 1.0):
        leaf = x.clone().requires_grad_()
        u = fm.velocity(leaf, t)
        (gradient,) = torch.autograd.grad(u.sum(), leaf)
        assert u.isfinite().all() and gradient.isfinite().all()


def test_near_the_ends_it_is_near_the_mixtures(convention, x):
    """Where the network is not known the error is that of the time it is asked at in place of the true one: its SNR is small at
    the noise, and the noise that it sees is small at the data."""
    gm, fm = mixture(), convention.wrap(mixture())
    for t in (0.0, 0.01, 0.03):
        off = (fm.denoise(x, t) - gm.denoise(x, t)).abs().max()
        assert off < 1.5 * fm.first * x.abs().max() + 1e-9, t
    for t in (0.98, 0.995, 1.0):
        off = (fm.denoise(x, t) - gm.denoise(x, t)).abs().max()
        assert off < 15 * (1 - t) * (1 - fm.last) + 1e-6, t


def test_there_is_no_gap_in_time(convention, x):
    fm = convention.wrap(mixture())
    for edge in {fm.first, fm.last} - {0.0, 1.0}:
        low, high = (fm.velocity(x, edge + side) for side in (-1e-7, 1e-7))
        torch.testing.assert_close(low, high, rtol=1e-3, atol=1e-3)


def test_many_euler_steps_lead_where_the_flow_map_leads(convention):
    """From the same noise: first order in the step, up to what the ends of the span cost."""
    fm, target, off = convention.wrap(mixture()), exact_samples(), {}
    for steps in (16, 128):
        ends = steerfm.sample(fm, n=len(target), steps=steps, seeds=0)
        off[steps] = (ends - target).square().mean().sqrt().item()
    assert off[128] < 0.012
    assert off[128] < 0.4 * off[16]


@cache
def exact_samples() -> Tensor:
    return steerfm.sample(mixture().flow_map(), n=32, steps=1, seeds=0)


def test_a_jump_is_an_euler_step_and_one_call(convention, x):
    fm = convention.wrap(mixture())
    with Ledger() as ledger:
        jumped = fm.jump(x, 0.3, 0.8)
    assert ledger.cost.forwards == len(x) and fm.network.calls == 1
    torch.testing.assert_close(jumped, x + 0.5 * fm.velocity(x, 0.3))
    assert fm.capabilities == {"velocity"}


def test_a_span_keeps_the_network_from_times_it_never_saw(x):
    seen = []

    def net(z, t, cond):
        seen.append(t)
        return z * 0

    options = {"linear": (0.02, 0.9), "vp": (10, 900), "ve": (0.1, 20.0)}
    for path, span in options.items():
        alphas = alphas_cumprod() if path == "vp" else None
        fm = VelocityModel(net, (2,), "v", path, alphas_cumprod=alphas, span=span)
        for t in torch.linspace(0, 1, 33):
            fm.velocity(x, float(t))
        times = torch.cat(seen)
        assert times.min().item() == pytest.approx(span[0], rel=1e-5) and times.max().item() == pytest.approx(span[1], rel=1e-5)
        seen.clear()


def test_from_pure_noise_a_step_of_the_noisiest_time_is_ddims():
    """A VP model's pipeline starts at its noisiest index with plain noise: at t = 0 ours gives the network that very state."""
    seen = {}

    def net(z, t, cond):
        seen.update(z=z, t=t)
        return 0.3 * z

    fm = VelocityModel(net, (2,), "data", "vp", alphas_cumprod=alphas_cumprod())
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    ahead = fm.denoise(x, 0.0)
    assert seen["t"].equal(torch.full((5,), 999.0))
    torch.testing.assert_close(seen["z"], x)
    torch.testing.assert_close(ahead, 0.3 * x)
    torch.testing.assert_close(fm.jump(x, 0.0, 0.4), 0.6 * x + 0.4 * 0.3 * x)


def test_a_ve_model_starts_at_sigma_max_times_noise():
    seen = {}

    def net(z, t, cond):
        seen.update(z=z, t=t)
        return 0 * z

    fm = VelocityModel(net, (2,), "data", "ve", span=(0.002, 80.0))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    fm.velocity(x, 0.0)
    torch.testing.assert_close(seen["z"], 80 * x, rtol=1e-4, atol=0)
    torch.testing.assert_close(seen["t"], torch.full((5,), 80.0))


def test_a_scheduler_with_a_terminal_snr_of_zero():
    alphas = torch.cat([alphas_cumprod()[:-1], torch.zeros(1)])
    for predicts in ("v", "data"):
        net = Exact(mixture(), predicts, lambda i: paths_at(alphas, i), (0.0, 0.0))
        fm = VelocityModel(net, (2,), predicts, "vp", alphas_cumprod=alphas)
        x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(fm.denoise(x, 0.0), mixture().denoise(x, 0.0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fm.denoise(x, 0.5), mixture().denoise(x, 0.5), rtol=1e-4, atol=1e-4)


def paths_at(alphas: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    square = torch.as_tensor(np.interp(index.detach().numpy(), np.arange(len(alphas)), alphas.numpy()))
    return square.sqrt(), (1 - square).sqrt()


def test_a_path_of_ones_own(x):
    class Cosine:
        """a = sin(pi/2 s), b = cos(pi/2 s), time s."""

        first, last = 1e-4, 1 - 1e-4

        def own_time(self, t):
            return torch.atan2(t, 1 - t) * 2 / torch.pi

        def time_at(self, own):
            return float(paths.time_of(*(float(w) for w in self.of(torch.tensor(own)))))

        def of(self, s):
            return (s * torch.pi / 2).sin(), (s * torch.pi / 2).cos()

        def weights(self, t):
            return paths.Weights(*self.of(self.own_time(t)))

        def slope(self, t):
            a, b = self.weights(t)
            return paths.Weights(torch.pi / 2 * b, -torch.pi / 2 * a)

    gm = mixture()
    for predicts in ("velocity", "v", "noise"):

        class Net(Exact):
            def forward(self, z, time, cond):
                a, b = Cosine().of(time)
                self.slope = (torch.pi / 2 * b.unsqueeze(1), -torch.pi / 2 * a.unsqueeze(1))  # type: ignore[assignment]
                return super().forward(z, time, cond)

        fm = VelocityModel(Net(gm, predicts, Cosine().of, (0.0, 0.0)), (2,), predicts, Cosine())
        for t in TIMES:
            torch.testing.assert_close(fm.velocity(x, t), gm.velocity(x, t), rtol=1e-8, atol=1e-8)


# --- conditions, precision, weights ----------------------------------------------------------------------------------
class Labelled(nn.Module):
    """A velocity towards a point of its class, with a null class after the last; t = 1 is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Embedding.from_pretrained(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.5, 0.5]]), freeze=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        rows = self.points.weight[-1:] if cond is None else self.points(cond)
        return (x - rows) / t.clamp_min(1e-3).unsqueeze(1)


def test_classes_and_guidance():
    fm = VelocityModel(Labelled(), (2,), class_names=("right", "up"))
    x = steerfm.sample(fm, n=2, steps=8, label=["right", "up"])
    torch.testing.assert_close(x, torch.tensor([[2.0, 0.0], [0.0, 2.0]]), rtol=1e-4, atol=1e-4)
    guided = steerfm.sample(Guided(fm, 2.0), n=2, steps=8, label=["right", "up"])
    torch.testing.assert_close(guided, torch.tensor([[3.5, -0.5], [-0.5, 3.5]]), rtol=1e-4, atol=1e-4)
    own = VelocityModel(Labelled(), (2,), class_names=("right", "up"), null=torch.tensor([0]))
    away = steerfm.sample(Guided(own, 2.0), n=1, steps=8, label="up")
    torch.testing.assert_close(away, torch.tensor([[-2.0, 4.0]]), rtol=1e-4, atol=1e-4)
    assert VelocityModel(lambda x, t, c: x, (2,)).null is None


def test_dictionaries_of_conditions_reach_the_network_row_by_row():
    def net(x, t, cond):
        return x - cond["point"]

    fm = VelocityModel(net, (2,), null={"point": torch.zeros(1, 2)})
    rows = {"point": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    x = torch.zeros(2, 2)
    torch.testing.assert_close(fm.velocity(x, 0.5, rows), rows["point"])
    torch.testing.assert_close(Guided(fm, 3.0).velocity(x, 0.5, rows), 3 * rows["point"])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.seen += [x.dtype, t.dtype]
        return self.layer(torch.cat([x, t.to(x.dtype).unsqueeze(1)], 1))


def test_a_network_in_half_precision_gets_its_own_and_states_stay_single():
    net = Wide().bfloat16()
    fm = VelocityModel(net, (2,), "noise", "vp", alphas_cumprod=alphas_cumprod())
    u = fm.velocity(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), 0.0)
    assert net.seen == [torch.bfloat16, torch.float32] and u.dtype == torch.float32
    assert steerfm.sample(fm, n=2, steps=3).dtype == torch.float32


def test_a_function_that_computes_in_double_precision_is_taken_at_that():
    gm, x = mixture(), torch.randn(4, 2)
    fm = VelocityModel(lambda x, t, cond: -gm.velocity(x, 1 - t), (2,))
    torch.testing.assert_close(fm.velocity(x, 0.3), gm.velocity(x, 0.3).float(), rtol=1e-4, atol=1e-5)


def test_autocast_is_no_other_type():
    fm = VelocityModel(Wide(), (2,))
    with torch.autocast("cpu", torch.bfloat16):
        assert fm.velocity(torch.randn(4, 2), 0.3).dtype == torch.float32


def test_another_network_in_the_same_map():
    fm = VelocityModel(Wide(), (2,), class_names=("a",), null=torch.tensor([7]))
    other = fm.with_network(Wide())
    assert other is not fm and other.network is not fm.network and isinstance(other, VelocityModel)
    assert other.class_names == ("a",) and a(torch.Tensor, other.null).equal(torch.tensor([7]))
    assert [name for name, _ in fm.named_parameters()] == [name for name, _ in other.named_parameters()]


# --- one line each -----------------------------------------------------------------------------------------------------
def good(x: Tensor, t: Tensor, cond: object) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"net": "unet"}, "net='unet': give a module"),
        ({"net": nn.Identity}, r"Identity: this is a class, call it: Identity\(...\)"),
        ({"shape": 32}, "shape=32: give the shape"),
        ({"shape": ()}, "shape"),
        ({"shape": (3, 0)}, "shape"),
        ({"shape": (3, 32.0)}, "shape"),
        ({"shape": "3x32"}, "shape"),
        ({"predicts": "epsilon"}, "unknown predicts='epsilon': velocity, noise, data, v"),
        ({"predicts": "velocit"}, "did you mean 'velocity'"),
        ({"path": "vpp"}, "did you mean 'vp'"),
        ({"path": "edm"}, "linear, vp, ve"),
        ({"path": 3}, "path=3: give linear, vp or ve"),
        ({"path": "vp"}, 'path="vp" needs alphas_cumprod='),
        ({"alphas_cumprod": alphas_cumprod()}, 'alphas_cumprod= is only for path="vp"'),
        ({"path": "vee"}, "unknown path"),
        ({"path": "ve", "alphas_cumprod": alphas_cumprod()}, 'alphas_cumprod= is only for path="vp"'),
        ({"path": "vp", "alphas_cumprod": alphas_cumprod(), "noise_at": 0}, "noise_at=0 is only for"),
        ({"path": "ve", "noise_at": 0.0}, "noise_at=0.0 is only for"),
        ({"path": "vp", "alphas_cumprod": alphas_cumprod().flip(0)}, "flip"),
        ({"noise_at": 0.5}, "noise_at=0.5: on the linear path"),
        ({"noise_at": 1000}, "1000 \\* t"),
        ({"span": 80}, "span=80: give the smallest and the largest"),
        ({"span": (1.0, 0.0)}, "span"),
        ({"span": (0.0, 1000.0)}, "must be from 0 to 1"),
        ({"path": "ve", "span": (-1.0, 80.0)}, "sigma must be finite and at least 0"),
        ({"path": "vp", "alphas_cumprod": alphas_cumprod(), "span": (0, 1000)}, "must be from 0 to 999, the indices"),
        ({"predicts": "noise", "noise_at": 0, "span": (0.0, 0.005)}, "there is no time in it"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        VelocityModel(**({"net": good, "shape": (2,)} | arguments))
    assert "\n" not in str(caught.value)


class Output:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda x, t, c: torch.cat([x, x], 1), r"answers states \(2, 4, 8, 8\) with \(2, 8, 8, 8\).*\[:, :4\]"),
        (lambda x, t, c: x.mean(1), r"\(2, 8, 8\): return \(b, \*shape\)"),
        (lambda x, t, c: x[:1], "one row for each state"),
        (lambda x, t, c: x.sum(), r"with \(\): return \(b"),
        (lambda x, t, c: (x,), r"returns a tuple: return the tensor"),
        (lambda x, t, c: Output(x), r"returns a Output.*\.sample"),
        (lambda x, t, c: None, "returns a NoneType"),
        (lambda x, t, c: x.half(), r"answers torch.float32 with torch.float16: return torch.float32"),
        (lambda x, t, c: x.bfloat16(), "torch.bfloat16"),
        (lambda x, t, c: x.long(), "torch.int64"),
        (lambda x, t, c: x.to(torch.complex64), "complex64"),
    ],
)
def test_a_network_that_returns_something_else_is_one_line(net, words):
    for options in ({}, {"predicts": "noise", "path": "vp", "alphas_cumprod": alphas_cumprod()}):
        fm = VelocityModel(net, (4, 8, 8), **options)
        with pytest.raises(ValueError, match=words) as caught:
            fm.velocity(torch.zeros(2, 4, 8, 8), 0.5)
        assert "\n" not in str(caught.value)
