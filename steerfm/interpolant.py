"""The probability path between noise and data, and every conversion along it.

One convention, used everywhere but in adapters: ``t = 0`` is noise, ``t = 1`` is data,

    x_t = alpha_t x_1 + sigma_t x_0,      x_0 ~ N(0, I).

>>> path = Interpolant()                      # the linear path: alpha = t, sigma = 1 - t
>>> x1 = path.denoise(x, velocity, t)         # E[x_1 | x_t = x] from the velocity b(x, t)

Times are floats, or tensors that broadcast against ``x``; `FlowMap` broadcasts them once.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from steerfm.checks import whole_numbers

Time = TypeVar("Time", float, Tensor)


def expand_time(t: float | Tensor, x: Tensor) -> Tensor:
    """Time as a tensor that broadcasts against ``x``: () or (b,) -> (b, 1, ..., 1).

    Args:
        t: a float, a scalar tensor or one time per row, shape (b,).
        x: (b, *d) a batch with the shape, dtype and device of the result.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.ndim == 0:
        return t.expand(x.shape[0]).view(-1, *[1] * (x.ndim - 1))
    if t.shape[0] != x.shape[0] or t.numel() != x.shape[0]:
        raise ValueError(f"time has shape {tuple(t.shape)} for a batch of {x.shape[0]}: give a float or one time per row")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def time_grid(steps: int, power: float = 1.0) -> list[float]:
    """Times 0 = t_0 < ... < t_steps = 1, t_i = (i / steps)^power; a power above 1 takes small steps near the noise.

    Raises:
        ValueError: steps below 1 or power not positive.
    """
    whole_numbers(steps=steps)
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    if not power > 0:
        raise ValueError(f"power={power}: must be positive")
    return [(i / steps) ** power for i in range(steps + 1)]


class Interpolant:
    """The linear path alpha = t, sigma = 1 - t (Lipman et al. 2210.02747; Liu et al. 2209.03003).

    Other paths override `alpha`, `sigma`, `slope` and `time_at`; everything else follows from these four.
    """

    def alpha(self, t: Time) -> Time:
        """Weight of the data at time t, in [0, 1]."""
        return t

    def sigma(self, t: Time) -> Time:
        """Weight (standard deviation) of the noise at time t, in [0, 1]."""
        return 1.0 - t

    def time_at(self, ratio: Time) -> Time:
        """The time t with alpha_t / sigma_t = ratio, the root of the signal-to-noise ratio, in [0, inf)."""
        return ratio / (1 + ratio)

    def sigma_at(self, ratio: Time) -> Time:
        """sigma of `time_at`, without the cancellation of 1 - t near the data."""
        return 1 / (1 + ratio)

    def joint(self, x: Tensor, outer: Any, z: Tensor, inner: Any) -> tuple[Tensor, Any]:
        """Two independent states of one x_1 as one state that says as much of it, and the time of that state.

        Squares of alpha/sigma add up, and with them as weights the whitened states do (GLASS, 2602.05993).

        Args:
            x: one state, divided by its sigma.
            outer: alpha/sigma of x, a float or what broadcasts against the states.
            z: the other state, divided by its sigma.
            inner: alpha/sigma of z.
        """
        ratio = (outer**2 + inner**2) ** 0.5
        time = self.time_at(ratio)
        if isinstance(ratio, Tensor):
            nothing = ratio == 0  # then all of it is noise
            weights = torch.where(nothing, 0.0, outer / ratio), torch.where(nothing, 1.0, inner / ratio)
        else:
            weights = (outer / ratio, inner / ratio) if ratio else (0.0, 1.0)
        return self.sigma_at(ratio) * (weights[0] * x + weights[1] * z), time

    def slope(self, s: Time, t: Time) -> tuple[Time, Time]:
        """Difference quotients ((alpha_t - alpha_s)/(t - s), (sigma_t - sigma_s)/(t - s)), exact as s -> t."""
        one = s * 0.0 + 1.0
        return one, -one

    def derivatives(self, t: Time) -> tuple[Time, Time]:
        """(d alpha/dt, d sigma/dt) at t."""
        return self.slope(t, t)

    # --- the four equivalent descriptions of a denoising network -------------------------------------------------
    def interpolate(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        """x_t = alpha_t x_1 + sigma_t x_0."""
        return self.alpha(t) * x1 + self.sigma(t) * x0

    def conditional_velocity(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        """d x_t / dt for a fixed pair: alpha'_t x_1 + sigma'_t x_0, the regression target of flow matching."""
        da, ds = self.derivatives(t)
        return da * x1 + ds * x0

    def denoise(self, x: Tensor, velocity: Tensor, t: Any, end: Any = None) -> Tensor:
        """Denoiser E[x_1 | x_t = x]; on the linear path x + (1 - t) b. Finite at both ends.

        With the average velocity from t to ``end``: the x_1 that, held fixed on the way, gives that velocity.
        """
        da, ds = self.slope(t, t if end is None else end)
        return (self.sigma(t) * velocity - ds * x) / (da * self.sigma(t) - self.alpha(t) * ds)

    def noise(self, x: Tensor, velocity: Tensor, t: Any) -> Tensor:
        """Noise E[x_0 | x_t = x]; on the linear path x - t b. Finite at both ends."""
        da, _ = self.derivatives(t)
        return (da * x - self.alpha(t) * velocity) / self._determinant(t)

    def score(self, x: Tensor, velocity: Tensor, t: Any) -> Tensor:
        """grad log p_t(x) = -E[x_0 | x_t = x] / sigma_t; infinite at t = 1."""
        return -self.noise(x, velocity, t) / self.sigma(t)

    def velocity_from_denoised(self, x: Tensor, x1: Tensor, t: Any, end: Any = None) -> Tensor:
        """b from the denoiser, or with ``end`` the average velocity to it with x_1 held fixed; infinite at t = 1."""
        da, ds = self.slope(t, t if end is None else end)
        return da * x1 + ds * (x - self.alpha(t) * x1) / self.sigma(t)

    def velocity_from_noise(self, x: Tensor, x0: Tensor, t: Any) -> Tensor:
        """b from the noise prediction; infinite at t = 0."""
        da, ds = self.derivatives(t)
        return da * (x - self.sigma(t) * x0) / self.alpha(t) + ds * x0

    def score_coefficient(self, t: Time) -> Time:
        """kappa_t = (sigma/alpha)(alpha' sigma - alpha sigma'), so that b = (alpha'/alpha) x + kappa score.

        The exact tilted velocity is b + kappa grad V (on the linear path kappa = (1 - t)/t); infinite at t = 0.
        """
        return self.sigma(t) / self.alpha(t) * self._determinant(t)

    def _determinant(self, t: Time) -> Time:
        da, ds = self.derivatives(t)
        return da * self.sigma(t) - self.alpha(t) * ds

    # --- the noising kernel --------------------------------------------------------------------------------------
    def renoise(self, r: Time, t: Time) -> tuple[Time, Time]:
        """(scale, std) of the forward kernel from time r back to t <= r: x_t = scale x_r + std z.

        scale = alpha_t / alpha_r and std^2 = sigma_t^2 - scale^2 sigma_r^2: if x_r ~ p_r then x_t ~ p_t exactly.
        """
        scale = self.alpha(t) / self.alpha(r)
        variance = self.sigma(t) ** 2 - (scale * self.sigma(r)) ** 2
        std: Any = variance.clamp_min(0.0).sqrt() if isinstance(variance, Tensor) else math.sqrt(max(variance, 0.0))
        return scale, std

    # --- the exact flow map of one isotropic Gaussian ------------------------------------------------------------
    def gaussian_velocity(self, x: Tensor, s: Tensor, t: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
        """Average velocity u(x, s, t) of the exact flow map when the data are N(mean, std^2 I).

        X_{s,t}(x) = alpha_t m + (g_t / g_s)(x - alpha_s m) with g^2 = alpha^2 std^2 + sigma^2. Written with difference
        quotients, so it is exact on the diagonal too.
        """
        da, ds = self.slope(s, t)
        a_s, a_t, s_s, s_t = self.alpha(s), self.alpha(t), self.sigma(s), self.sigma(t)
        g_s = torch.sqrt((a_s * std) ** 2 + s_s**2)
        g_t = torch.sqrt((a_t * std) ** 2 + s_t**2)
        stretch = (da * (a_s + a_t) * std**2 + ds * (s_s + s_t)) / (g_s * (g_s + g_t))
        return da * mean + stretch * (x - a_s * mean)


class Trigonometric(Interpolant):
    """The variance-preserving path alpha = sin(pi t / 2), sigma = cos(pi t / 2) (TrigFlow, Lu & Song 2410.11081)."""

    def alpha(self, t: Time) -> Time:
        return torch.sin(t * (math.pi / 2)) if isinstance(t, Tensor) else math.sin(t * math.pi / 2)

    def sigma(self, t: Time) -> Time:
        return torch.cos(t * (math.pi / 2)) if isinstance(t, Tensor) else math.cos(t * math.pi / 2)

    def time_at(self, ratio: Time) -> Time:
        if isinstance(ratio, Tensor):
            return torch.atan(ratio) * 2 / math.pi
        return math.atan(ratio) * 2 / math.pi

    def sigma_at(self, ratio: Time) -> Time:
        if isinstance(ratio, Tensor):
            return torch.rsqrt(1 + ratio * ratio)
        return 1 / math.hypot(1.0, ratio)

    def slope(self, s: Time, t: Time) -> tuple[Time, Time]:
        middle, half = (s + t) / 2, (t - s) / 2
        if isinstance(half, Tensor):
            ratio = torch.sinc(half / 2)  # sin(h pi/2) / (h pi/2)
        else:
            ratio = math.sin(half * math.pi / 2) / (half * math.pi / 2) if half else 1.0
        return math.pi / 2 * self.sigma(middle) * ratio, -math.pi / 2 * self.alpha(middle) * ratio
