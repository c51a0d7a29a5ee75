"""The paths of other networks, and their conversion to ours, x = t data + (1 - t) noise.

Every Gaussian path is z = a data + b noise with a, b >= 0. Divided by a + b it is the linear one:

    x = z / (a + b) = t data + (1 - t) noise,      t = a / (a + b)

The two states differ by a factor, so E[data | .] and E[noise | .] are the same, and the velocity on the linear path is their
difference, u = E[data | x] - E[noise | x]. A network's prediction determines both, since a E[data | z] + b E[noise | z] = z. So
a change of path has three steps: from x to the state of the network (`from_linear`), from its prediction to both ends
(`ends_of_noise`, `ends_of_data`, `ends_of_v`, `ends_of_velocity`), and from these to u (`velocity`). An Euler step of u then
equals DDIM's step (Song et al. 2010.02502, equation 12) and Euler's step in sigma (Karras et al. 2206.00364, algorithm 1), up
to rounding.

Times and weights are floats or tensors that broadcast against the state; paths convert our times to their own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


class Weights(NamedTuple):
    """The weights a and b of data and noise in a state z; or their derivatives."""

    data: Any
    noise: Any


class Ends(NamedTuple):
    """E[data | z] and E[noise | z], each of the shape of z."""

    data: Tensor
    noise: Tensor


# --- between a path and the linear one -------------------------------------------------------------------------------
def time_of(a: Number, b: Number) -> Number:
    """Our time t = a / (a + b) of a state with these weights: there t / (1 - t) = a / b, the same root of the SNR."""
    return a / (a + b)


def to_linear(z: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """The state of the linear path, x = z / (a + b), at `time_of(a, b)`."""
    return z / (a + b)


def from_linear(x: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """The state z = (a + b) x of a path, from that of the linear path at `time_of(a, b)`."""
    return x * (a + b)


def spread(t: Tensor) -> Tensor:
    """Standard deviation c of x at our time t, for data of variance 1: c^2 = t^2 + (1 - t)^2."""
    return (t.square() + (1 - t).square()).sqrt()


# --- from a prediction to both ends ----------------------------------------------------------------------------------
def ends_of_noise(z: Tensor, noise: Tensor, at: Weights) -> Ends:
    """The ends from a prediction of E[noise | z]: E[data | z] = (z - b noise) / a, undefined for a = 0."""
    return Ends((z - at.noise * noise) / at.data, noise)


def ends_of_data(z: Tensor, data: Tensor, at: Weights) -> Ends:
    """The ends from a prediction of E[data | z]: E[noise | z] = (z - a data) / b, undefined for b = 0."""
    return Ends(data, (z - at.data * data) / at.noise)


def ends_of_v(z: Tensor, v: Tensor, at: Weights) -> Ends:
    """The ends from a prediction of v = a noise - b data (Salimans & Ho 2202.00512, there with a^2 + b^2 = 1).

    z and v are the ends rotated by an angle and scaled by r, r^2 = a^2 + b^2. The inverse is data = (a z - b v) / r^2 and
    noise = (b z + a v) / r^2, without a division by a or b.
    """
    square = at.data * at.data + at.noise * at.noise
    return Ends((at.data * z - at.noise * v) / square, (at.noise * z + at.data * v) / square)


def ends_of_velocity(z: Tensor, w: Tensor, at: Weights, slope: Weights) -> Ends:
    """The ends from a prediction of the path's own velocity, w = a' data + b' noise, with derivatives by its own time.

    With z = a data + b noise these are two equations; by Cramer's rule, and with d = a b' - b a', data = (b' z - b w) / d and
    noise = (a w - a' z) / d.
    """
    d = at.data * slope.noise - at.noise * slope.data
    return Ends((slope.noise * z - at.noise * w) / d, (at.data * w - slope.data * z) / d)


# --- from both ends to the velocity ----------------------------------------------------------------------------------
def velocity(x: Tensor, t: Tensor, ends: Ends, first: float = 0.0, last: float = 1.0) -> Tensor:
    """u(x, t, t) on the linear path: E[data | x] - E[noise | x].

    A network may not cover times near an end: sigma is bounded, or the last SNR is not 0. It is then called at its nearest
    valid time, and t data + (1 - t) noise = x stays true. Before ``first`` nearly all of x is noise, so the predicted data are
    used, and the noise follows as (x - t data) / (1 - t); after ``last`` it is the other way round. Both are continuous
    extensions of u, and finite at t = 0 and t = 1: an Euler step from pure noise leads to t data + (1 - t) x.

    Args:
        x: (b, *d).
        t: our times, which broadcast against x.
        ends: the prediction at t, or at the nearest valid time.
        first: first valid time of the network, at least 0.
        last: last valid time of the network, at most 1.
    """
    data, noise = ends
    if first > 0:
        noise = torch.where(t < first, (x - t * data) / (1 - t.clamp_max(first)), noise)
    if last < 1:
        data = torch.where(t > last, (x - (1 - t) * noise) / t.clamp_min(last), data)
    return data - noise


# --- paths -----------------------------------------------------------------------------------------------------------
@runtime_checkable
class Path(Protocol):
    """A path z = a data + b noise with the time of its networks: any object with these members.

    Attributes:
        first: first valid time of its networks, in our time.
        last: last valid time of its networks, in our time.
    """

    first: float
    last: float

    def own_time(self, t: Tensor) -> Tensor:
        """Convert our times, first <= t <= last, to those of the networks."""
        ...

    def time_at(self, own: float) -> float:
        """Convert a time of the networks to ours.

        Raises:
            ValueError: the path has no such time.
        """
        ...

    def weights(self, t: Tensor) -> Weights:
        """a and b at our times; a / (a + b) = t."""
        ...

    def slope(self, t: Tensor) -> Weights:
        """Derivatives of a and b by the networks' time, at our times."""
        ...


class Linear:
    """z = t data + (1 - t) noise, of flow matching: ours, or with its time the other way round.

    Args:
        noise_at: the networks' time of pure noise, 0 or 1; the data are at the other one.
    """

    first, last = 0.0, 1.0

    def __init__(self, noise_at: float = 0.0) -> None:
        if isinstance(noise_at, bool) or noise_at not in (0, 1):
            raise ValueError(
                f"noise_at={noise_at!r}: on the linear path the noise is at 0 or at 1; for a network with other times "
                "give a function, lambda x, t, cond: net(x, 1000 * t, cond)"
            )
        self.noise_at = float(noise_at)

    def own_time(self, t: Tensor) -> Tensor:
        return 1 - t if self.noise_at else t

    def time_at(self, own: float) -> float:
        if not 0 <= own <= 1:
            raise ValueError(f"time {own}: must be from 0 to 1 on the linear path")
        return 1 - own if self.noise_at else own

    def weights(self, t: Tensor) -> Weights:
        return Weights(t, 1 - t)

    def slope(self, t: Tensor) -> Weights:
        return Weights(-1.0, 1.0) if self.noise_at else Weights(1.0, -1.0)


class VariancePreserving:
    """z = a data + b noise with a^2 + b^2 = 1, of DDPM: a^2 is the product of 1 - beta up to an index, the networks' time.

    From t / (1 - t) = a / b and a^2 + b^2 = 1: a = t / c and b = (1 - t) / c with c = `spread(t)`. Between two
    indices log(a / b) is interpolated linearly.

    Args:
        alphas_cumprod: (n,) a^2 by index, falling from nearly 1 (data) to nearly 0 (noise).

    Raises:
        ValueError: the numbers are invalid.
    """

    def __init__(self, alphas_cumprod: Any) -> None:
        try:
            square = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"alphas_cumprod={alphas_cumprod!r}: give numbers, one for each index") from None
        if square.ndim != 1 or len(square) < 2:
            raise ValueError(f"alphas_cumprod has shape {tuple(square.shape)}: give one number for each index, (1000,)")
        if not bool(((square >= 0) & (square <= 1)).all()):
            raise ValueError("alphas_cumprod must be in [0, 1]: it is the product of 1 - beta, from index 0 on")
        if bool((square.diff() > 0).all()):
            raise ValueError("alphas_cumprod rises: index 0 is the data, so flip it, alphas_cumprod.flip(0)")
        if not bool((square.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall from each index to the next: it is the product of 1 - beta")
        square = square.clamp(2.0**-48, 1 - 2.0**-48)  # log(a / b) of pure noise or pure data is infinite
        if square[0] <= square[1] or square[-2] <= square[-1]:
            raise ValueError("alphas_cumprod has more than one index of pure noise or of pure data: remove all but one")
        self.log_ratios = ((square / (1 - square)).log() / 2).flip(0)  # rising
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.first, self.last = (float(torch.sigmoid(self.log_ratios[end])) for end in (0, -1))

    def _knots(self, like: Tensor) -> Tensor:
        key = like.device, like.dtype
        if key not in self._copies:
            self._copies[key] = self.log_ratios.to(like)
        return self._copies[key]

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log(a / b), and its place in `log_ratios`: the knots below and above, and the index of the upper one."""
        knots, ratio = self._knots(t), t.log() - (-t).log1p()
        above = torch.searchsorted(knots, ratio.detach().contiguous()).clamp(1, len(knots) - 1)
        return ratio, knots[above - 1], knots[above], above

    def own_time(self, t: Tensor) -> Tensor:
        """The index, fractional between two indices; rounded if it is nearly a whole number."""
        ratio, low, high, above = self._place(t)
        index = len(self.log_ratios) - above - ((ratio - low) / (high - low)).clamp(0, 1)
        whole = index.round()
        return torch.where((index - whole).abs() < 2e-4, whole, index)  # some networks look times up in a table

    def time_at(self, own: float) -> float:
        last = len(self.log_ratios) - 1
        if not 0 <= own <= last:
            raise ValueError(f"time {own}: must be from 0 to {last}, the indices of alphas_cumprod")
        low = min(int(own), last - 1)
        here, next_one = self.log_ratios[last - low], self.log_ratios[last - low - 1]
        return float(torch.sigmoid(torch.lerp(here, next_one, own - low)))

    def weights(self, t: Tensor) -> Weights:
        c = spread(t)
        return Weights(t / c, (1 - t) / c)

    def slope(self, t: Tensor) -> Weights:
        """With l = log(a / b): da/dl = a b^2 and db/dl = -a^2 b; and l falls by the distance of two knots in each index."""
        _, low, high, _ = self._place(t)
        a, b = self.weights(t)
        return Weights(-(high - low) * a * b * b, (high - low) * a * a * b)


class VarianceExploding:
    """z = data + sigma noise, of EDM and of score matching; sigma is the networks' time.

    From t / (1 - t) = a / b = 1 / sigma: sigma = (1 - t) / t and t = 1 / (1 + sigma).

    Args:
        sigma_min: smallest valid sigma of the networks, above 0; default that of EDM.
        sigma_max: largest valid sigma; default that of EDM.

    Raises:
        ValueError: the numbers are out of order.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"sigmas from {sigma_min} to {sigma_max}: give 0 < smallest < largest, such as span=(0.002, 80.0)")
        self.first, self.last = 1 / (1 + sigma_max), 1 / (1 + sigma_min)

    def own_time(self, t: Tensor) -> Tensor:
        return (1 - t) / t

    def time_at(self, own: float) -> float:
        if not 0 <= own < math.inf:
            raise ValueError(f"time {own}: sigma must be finite and at least 0")
        return 1 / (1 + own)

    def weights(self, t: Tensor) -> Weights:
        return Weights(torch.ones_like(t), (1 - t) / t)

    def slope(self, t: Tensor) -> Weights:
        return Weights(0.0, 1.0)


# --- EDM's scalings --------------------------------------------------------------------------------------------------
class Scalings(NamedTuple):
    """The scalings of a preconditioned network F: the denoiser is skip z + output F(input z, noise)."""

    skip: Tensor
    output: Tensor
    input: Tensor
    noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float = 0.5) -> Scalings:
    """EDM's (Karras et al. 2206.00364, table 1): F's input and target have variance 1 for data of deviation sigma_data.

    With r^2 = sigma^2 + sigma_data^2, the variance of z: input = 1 / r; skip = sigma_data^2 / r^2 is the best linear denoiser
    of z; output = sigma sigma_data / r is the deviation of the residual; and the noise input of F is log(sigma) / 4.
    """
    square = sigma**2 + sigma_data**2
    return Scalings(sigma_data**2 / square, sigma * sigma_data * square.rsqrt(), square.rsqrt(), sigma.log() / 4)
