"""The ground truth: Gaussian mixtures, for which everything that steering approximates is known exactly.

If the data are sum_k w_k N(m_k, S_k) and x_t = alpha_t x_1 + sigma_t x_0, then with C_k = alpha_t^2 S_k + sigma_t^2 I

    p_t        = sum_k w_k N(alpha_t m_k, C_k)
    p(x_1 | x) = sum_k r_k(x) N(m_k + alpha_t S_k C_k^-1 (x - alpha_t m_k), sigma_t^2 S_k C_k^-1)

where r_k(x) is the share of component k in p_t(x). Velocity, score and denoiser follow; a tilt by a linear or quadratic
reward gives another mixture; and the flow map is closed form for one Gaussian and for any mixture in one dimension.

>>> gm = GaussianMixture(means=[[-2.0], [2.0]], covs=[[0.2], [0.3]], weights=[0.7, 0.3])
>>> target, log_z = gm.tilt(linear=[1.0], strength=2.0)       # q ∝ p_1 exp(2 x), log E exp(2 x)
>>> x1 = gm.flow_map().lookahead(x, 0.3)                      # exact X_{0.3,1}(x)

Source: Bayes' rule for Gaussians (e.g. Bishop 2006, section 2.3.3), used as a reference for guided sampling by Cardoso
et al. 2308.07983. No formula divides by t or 1 - t: all hold at both ends.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.flowmap import FlowMap
from steerfm.interpolant import Interpolant, expand_time
from steerfm.rows import Condition

Array = Any
"""Whatever `torch.as_tensor` takes: a tensor, nested lists, a numpy array, a number."""

# Butcher's sixth-order Runge-Kutta method ("On Runge-Kutta processes of high order", 1964).
NODES = (0, 1 / 3, 2 / 3, 1 / 3, 1 / 2, 1 / 2, 1)
COUPLINGS = (
    (),
    (1 / 3,),
    (0, 2 / 3),
    (1 / 12, 1 / 3, -1 / 12),
    (-1 / 16, 9 / 8, -3 / 16, -3 / 8),
    (0, 9 / 8, -3 / 8, -3 / 4, 1 / 2),
    (9 / 44, -9 / 11, 63 / 44, 18 / 11, 0, -16 / 11),
)
WEIGHTS = (11 / 120, 0, 27 / 40, 27 / 40, -4 / 15, -4 / 15, 11 / 120)


@dataclass
class MixtureBatch:
    """One Gaussian mixture per row, such as the posterior p(x_1 | x_t) of a batch of points.

    Attributes:
        means: (b, k, d).
        factors: square roots L of the covariances, S = L L': standard deviations (b, k, d) if the components are
            diagonal, else (b, k, d, d). Zero factors are point masses, as in the posterior at t = 1.
        log_weights: (b, k), normalised.
    """

    means: Tensor
    factors: Tensor
    log_weights: Tensor

    @property
    def weights(self) -> Tensor:
        """(b, k), summing to 1."""
        return self.log_weights.exp()

    @property
    def covs(self) -> Tensor:
        """Variances (b, k, d) if the components are diagonal, else covariances (b, k, d, d)."""
        return self.factors**2 if self.diagonal else self.factors @ self.factors.mT

    @property
    def diagonal(self) -> bool:
        """Whether `factors` and `covs` hold diagonals only."""
        return self.factors.ndim == 3

    def mean(self) -> Tensor:
        """(b, d)."""
        return torch.einsum("bk,bkd->bd", self.weights, self.means)

    def cov(self) -> Tensor:
        """(b, d, d): the mean of the covariances plus the covariance of the means."""
        covs = torch.diag_embed(self.covs) if self.diagonal else self.covs
        centred = self.means - self.mean().unsqueeze(1)
        return torch.einsum("bk,bkij->bij", self.weights, covs + centred.unsqueeze(-1) * centred.unsqueeze(-2))

    def sample(self, generator: torch.Generator | None = None, n: int = 1) -> Tensor:
        """``n`` exact samples per row, (b, n, d), drawn on the generator's device (the CPU by default)."""
        device = generator.device if generator else torch.device("cpu")
        index = torch.multinomial(self.weights.detach().to(device), n, replacement=True, generator=generator)
        z = torch.randn(*index.shape, self.means.shape[-1], dtype=self.means.dtype, device=device, generator=generator)
        index, z = index.to(self.means.device), z.to(self.means.device)
        row = torch.arange(len(index), device=index.device).unsqueeze(1)
        return self.means[row, index] + _apply(self.factors[row, index], z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at z: (b, d) -> (b,), or (b, n, d) -> (b, n).

        Raises:
            ValueError: at t = 1, where the posterior is a point mass.
        """
        points = z.unsqueeze(1) if z.ndim == 2 else z  # (b, n, d)
        centred = points.unsqueeze(2) - self.means.unsqueeze(1)  # (b, n, k, d)
        log_det = self.factors.abs().log().sum(-1) if self.diagonal else torch.linalg.slogdet(self.factors).logabsdet
        if not log_det.isfinite().all():
            raise ValueError("the posterior at t = 1 is a point mass and has no density: ask for t < 1")
        inverse = 1 / self.factors if self.diagonal else torch.linalg.inv(self.factors)
        white = _apply(inverse.unsqueeze(1), centred)
        log_joint = (self.log_weights - log_det).unsqueeze(1) + _log_normal(white).sum(-1)
        return log_joint.logsumexp(-1).reshape(z.shape[:-1])

    def tilt(
        self, linear: Array | None = None, quadratic: Array | None = None, strength: float | Tensor = 1.0
    ) -> tuple[MixtureBatch, Tensor]:
        """The law ∝ p exp(strength r) with r(x) = a'x - x'Bx/2, and log E_p exp(strength r).

        Per component, with K = I + L'BL and g = a - B m: the covariance becomes L K^-1 L', the mean moves by
        L K^-1 L' g and the log-weight by r(m) - log det(K)/2 + g' L K^-1 L' g / 2. Neither S^-1 nor B^-1 is needed, so
        point masses and B = 0 need no special case.

        Args:
            linear: a, (d,).
            quadratic: B, a symmetric (d, d), the diagonal (d,) or a number. None is zero.
            strength: multiplies the reward.

        Returns:
            The tilted mixtures and log_z, (b,).

        Raises:
            ValueError: wrong shapes, or exp(strength r) grows faster than the mixture decays.
        """
        a, B = _reward(linear, quadratic, strength, self.means)
        if self.diagonal and B.ndim == 1:
            g = a - self.means * B
            K = 1 + B * self.factors**2
            normalisable, half_log_det = (K > 0).all(), K.log().sum(-1) / 2
            factors = self.factors * K.rsqrt()
            move = factors * g
        else:
            L = torch.diag_embed(self.factors) if self.diagonal else self.factors
            B = torch.diag(B) if B.ndim == 1 else B
            g = a - self.means @ B
            root, info = torch.linalg.cholesky_ex(torch.eye(len(a)).to(L) + L.mT @ B @ L)
            normalisable, half_log_det = (info == 0).all(), root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            factors = torch.linalg.solve_triangular(root, L.mT, upper=False).mT
            move = _apply(factors.mT, g)
        if not normalisable:
            fix = "give a quadratic with larger eigenvalues, or a smaller strength"
            raise ValueError(f"the tilt is not normalisable, exp(strength * r) outgrows the mixture: {fix}")
        log_joint = self.log_weights + ((self.means * (a + g)).sum(-1) + move.square().sum(-1)) / 2 - half_log_det
        log_z = log_joint.logsumexp(-1)
        return MixtureBatch(self.means + _apply(factors, move), factors, log_joint - log_z.unsqueeze(-1)), log_z


class GaussianMixture(nn.Module):
    """Data distributed as a Gaussian mixture, and everything exact about the path from noise to them.

    A module without parameters: ``.to(dtype or device)`` works, and no gradient flows to its arguments. Times are
    floats or (b,), points are (b, d), results have the points' rows and the mixture's dtype.

    Args:
        means: (k, d).
        covs: diagonal VARIANCES (k, d), or covariances (k, d, d); the number of dimensions decides.
        weights: (k,), not negative; normalised here. Default: equal.
        interpolant: the path; default linear.

    The dtype is that of ``means`` if it is a floating-point tensor, else float64.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, negative weights or a zero sum, covariances that
            are not symmetric and positive definite.
    """

    means: Tensor
    covs: Tensor
    log_weights: Tensor
    variances: Tensor  # (k, d), eigenvalues of the covariances
    axes: Tensor | None  # (k, d, d), their eigenvectors in columns; None for diagonal covariances

    def __init__(self, means: Array, covs: Array, weights: Array | None = None, interpolant: Interpolant | None = None) -> None:
        super().__init__()
        floating = isinstance(means, Tensor) and means.is_floating_point()
        means = torch.as_tensor(means, dtype=None if floating else torch.float64).detach().clone()
        if means.ndim != 2 or means.numel() == 0:
            raise ValueError(f"means has shape {tuple(means.shape)}, expected (k, d); in one dimension [[m_1], [m_2]]")
        k, d = means.shape
        covs = torch.as_tensor(covs, dtype=means.dtype, device=means.device).detach().clone()
        if covs.shape not in ((k, d), (k, d, d)):
            shapes = f"variances {(k, d)} or covariances {(k, d, d)}"
            raise ValueError(f"covs has shape {tuple(covs.shape)}, expected {shapes}")
        weights = means.new_ones(k) if weights is None else weights
        weights = torch.as_tensor(weights, dtype=means.dtype, device=means.device).detach()
        if weights.shape != (k,):
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected ({k},): one per component")
        for name, value in {"means": means, "covs": covs, "weights": weights}.items():
            if not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity: remove those components")
        if (weights < 0).any() or weights.sum() == 0:
            raise ValueError(f"weights {weights.tolist()} must not be negative or all zero: they are probabilities")
        variances, axes = covs, None
        if covs.ndim == 3:
            if not torch.allclose(covs, covs.mT, rtol=1e-4, atol=1e-5 * covs.abs().max().item()):
                raise ValueError("covs is not symmetric: pass (S + S.mT) / 2, or a factor's product L @ L.mT")
            covs = (covs + covs.mT) / 2
            variances, axes = (part.to(means.dtype) for part in torch.linalg.eigh(covs.double()))
        if not (variances > 0).all():
            lowest = variances.min().item()
            raise ValueError(f"covs is not positive definite (lowest eigenvalue {lowest:.3g}): add a positive diagonal")
        self.interpolant = interpolant or Interpolant()
        buffers = {"means": means, "covs": covs, "variances": variances, "axes": axes}
        for name, value in (buffers | {"log_weights": (weights / weights.sum()).log()}).items():
            self.register_buffer(name, value)

    @property
    def weights(self) -> Tensor:
        """(k,), summing to 1."""
        return self.log_weights.exp()

    # --- the law of the data -------------------------------------------------------------------------------------
    def mean(self) -> Tensor:
        """E[x_1], (d,)."""
        return self._batch().mean()[0]

    def cov(self) -> Tensor:
        """Covariance of x_1, (d, d)."""
        return self._batch().cov()[0]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact samples of p_1, (n, d), drawn on the generator's device (the CPU by default)."""
        return self._batch().sample(generator, n)[0]

    def tilt(
        self, linear: Array | None = None, quadratic: Array | None = None, strength: float | Tensor = 1.0
    ) -> tuple[GaussianMixture, Tensor]:
        """The target q ∝ p_1 exp(strength r) for r(x) = a'x - x'Bx/2, and log_z = log E_{p_1} exp(strength r), ().

        Arguments and errors as in `MixtureBatch.tilt`.
        """
        tilted, log_z = self._batch().tilt(linear, quadratic, strength)
        return self._replace(tilted.means[0], tilted.covs[0], tilted.log_weights[0]), log_z[0]

    # --- the path ------------------------------------------------------------------------------------------------
    def marginal(self, t: float) -> GaussianMixture:
        """p_t, the law of x_t."""
        a, noise = self.interpolant.alpha(t), self.interpolant.sigma(t) ** 2
        eye = 1.0 if self.axes is None else torch.eye(self.means.shape[1]).to(self.means)
        return self._replace(a * self.means, a**2 * self.covs + noise * eye, self.log_weights)

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """log p_t(x), (b,)."""
        return self._components(x, t)[-1].logsumexp(-1)

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """grad log p_t(x), (b, d); finite at t = 1 too, unlike `FlowMap.score`."""
        _, y, c, log_joint = self._components(x, t)
        return self._average(log_joint, 0.0, -y / c)

    def denoise(self, x: Tensor, t: float | Tensor) -> Tensor:
        """D_t(x) = E[x_1 | x_t = x], (b, d)."""
        t, y, c, log_joint = self._components(x, t)
        return self._average(log_joint, 1.0, self.interpolant.alpha(t) * self.variances / c * y)

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """b(x, t) = alpha' E[x_1 | x_t = x] + sigma' E[x_0 | x_t = x], (b, d)."""
        t, y, c, log_joint = self._components(x, t)
        da, ds = self.interpolant.derivatives(t)
        slope = da * self.interpolant.alpha(t) * self.variances + ds * self.interpolant.sigma(t)
        return self._average(log_joint, da, slope / c * y)

    def posterior(self, x: Tensor, t: float | Tensor) -> MixtureBatch:
        """p(x_1 | x_t = x), one mixture per row of x (b, d)."""
        t, y, c, log_joint = self._components(x, t)
        alpha, sigma = self.interpolant.alpha(t), self.interpolant.sigma(t)
        means = self.means + self._turn(alpha * self.variances / c * y)
        factors = sigma * (self.variances / c).sqrt()  # not the root of sigma^2, whose derivative is infinite at t = 1
        factors = factors if self.axes is None else self.axes * factors.unsqueeze(-2)
        return MixtureBatch(means, factors, log_joint.log_softmax(-1))

    def value(
        self,
        x: Tensor,
        t: float | Tensor,
        linear: Array | None = None,
        quadratic: Array | None = None,
        strength: float | Tensor = 1.0,
    ) -> Tensor:
        """V_t(x) = log E[exp(strength r(x_1)) | x_t = x], (b,), for r(x) = a'x - x'Bx/2 as in `tilt`.

        log_z at t = 0 for every x, strength r(x) at t = 1, differentiable in x.
        """
        return self.posterior(x, t).tilt(linear, quadratic, strength)[1]

    def value_gradient(
        self,
        x: Tensor,
        t: float | Tensor,
        linear: Array | None = None,
        quadratic: Array | None = None,
        strength: float | Tensor = 1.0,
    ) -> Tensor:
        """grad V_t(x), (b, d)."""
        return torch.func.grad(lambda x: self.value(x, t, linear, quadratic, strength).sum())(x)

    def flow_map(self, steps: int = 64) -> MixtureFlowMap:
        """The flow map X_{s,t} of the path, on a copy of this mixture.

        Args:
            steps: Runge-Kutta steps of a jump from 0 to 1 if there is no closed form (k > 1 and d > 1); shorter
                jumps take proportionally fewer. With 64 the worst error is about 1e-7 for modes 20 standard deviations apart.
        """
        return MixtureFlowMap(self, steps)

    # --- helpers -------------------------------------------------------------------------------------------------
    def _components(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t (b, 1, 1); in each component's axes x - alpha m and the variances of p_t (b, k, d); log w_k p_k (b, k)."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, {self.means.shape[1]}): one point per row")
        x = x.to(self.means.dtype)
        t = expand_time(t, x).unsqueeze(-1)
        alpha, sigma = self.interpolant.alpha(t), self.interpolant.sigma(t)
        y, c = x.unsqueeze(1) - alpha * self.means, alpha**2 * self.variances + sigma**2
        if self.axes is not None:
            y = torch.einsum("kij,bki->bkj", self.axes, y)
        return t, y, c, self.log_weights + (_log_normal(y * c.rsqrt()) - c.log() / 2).sum(-1)

    def _turn(self, y: Tensor) -> Tensor:
        """(b, k, d) from each component's own axes to the space's."""
        return y if self.axes is None else torch.einsum("kij,bkj->bki", self.axes, y)

    def _average(self, log_joint: Tensor, scale: float | Tensor, y: Tensor) -> Tensor:
        """sum_k r_k (scale m_k + y_k), with y in each component's own axes: (b, d)."""
        return torch.einsum("bk,bkd->bd", log_joint.softmax(-1), scale * self.means + self._turn(y))

    def _batch(self) -> MixtureBatch:
        """p_1 as a batch of one."""
        factors = self.variances.sqrt()
        factors = factors if self.axes is None else self.axes * factors.unsqueeze(-2)
        return MixtureBatch(self.means[None], factors[None], self.log_weights[None])

    def _replace(self, means: Tensor, covs: Tensor, log_weights: Tensor) -> GaussianMixture:
        """Another mixture on the same path. Its weights stay logarithms, since they underflow under a strong tilt."""
        mixture = GaussianMixture(means, covs, interpolant=self.interpolant)
        mixture.log_weights = log_weights.detach().clone()
        return mixture


class MixtureFlowMap(FlowMap):
    """The flow map of a `GaussianMixture`: exact for k = 1 or d = 1, else Runge-Kutta on the exact velocity.

    Differentiable in x, s and t, also by `torch.func.jvp`.

    Args:
        mixture: the mixture, of which the map makes a copy.
        steps: Runge-Kutta steps of a jump from 0 to 1; shorter jumps take proportionally fewer.
    """

    def __init__(self, mixture: GaussianMixture, steps: int = 64) -> None:
        super().__init__((mixture.means.shape[1],), mixture.interpolant)
        if steps < 1:
            raise ValueError(f"steps={steps}: Runge-Kutta needs at least one step")
        self.mixture, self.steps = copy.deepcopy(mixture), steps
        self.widest = torch.linalg.eigvalsh(mixture.cov()).max().sqrt().item()
        self.narrowest = mixture.variances.min().sqrt().item()

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """u(x, s, t): x (b, d); s, t (b,). Returns (b, d)."""
        self._check_unconditional(cond)
        components, d = self.mixture.means.shape
        x, s, t = x.to(self.dtype), s.to(self.dtype).unsqueeze(-1), t.to(self.dtype).unsqueeze(-1)
        if components == 1:
            return self._gaussian(x, s, t)
        return self._quantile(x, s, t) if d == 1 else self._runge_kutta(x, s, t)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self._check_unconditional(cond)
        return self.mixture.velocity(x.to(self.dtype), t.to(self.dtype))

    def _check_unconditional(self, cond: Condition) -> None:
        if cond is not None:
            raise ValueError("a Gaussian mixture is unconditional: pass cond=None")

    def _gaussian(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """One Gaussian: C_s and C_t share their eigenvectors, so each axis has a separate map."""
        mean, std = self.mixture.means[0], self.mixture.variances[0].sqrt()
        if self.mixture.axes is None:
            return self.interpolant.gaussian_velocity(x, s, t, mean, std)
        axes = self.mixture.axes[0]
        return self.interpolant.gaussian_velocity(x @ axes, s, t, mean @ axes, std) @ axes.mT

    def _quantile(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """A mixture in one dimension: mass does not cross, so X_{s,t} = F_t^-1 o F_s.

        If the gap t - s is too small for a division, one Runge-Kutta step is exact up to rounding.
        """
        near = (t - s).abs() < 1e-4
        u_near = self._runge_kutta(x, s, torch.where(near, t, s))
        gap = torch.where(near, 1.0, t - s).double()
        u_far = (self._transport(x.double(), s.double(), t.double()) - x.double()) / gap
        return torch.where(near, u_near, u_far.to(u_near.dtype))

    def _transport(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """The root y of F_t(y) = F_s(x), (b, 1) in float64, by bisection and Newton steps on

            h(y) = log sum_k w_k (Phi(z_k(y)) or Phi(-z_k(x))) - log sum_k w_k (Phi(z_k(x)) or Phi(-z_k(y))).

        Each component takes the tail that is the smaller one at x, so nothing cancels: neither beyond the outer modes
        nor in a gap between two, where F itself is flat to rounding.
        """
        m, variance = self.mixture.means.mT.double(), self.mixture.variances.mT.double()  # (1, k)
        log_w = self.mixture.log_weights.double()
        path = self.interpolant
        g_s, g_t = ((path.alpha(r) ** 2 * variance + path.sigma(r) ** 2).sqrt() for r in (s, t))  # (b, k)
        z_x = (x - path.alpha(s) * m) / g_s
        lower = z_x.detach() <= 0
        side = torch.where(lower, 1.0, -1.0).to(x)
        tail_x = log_w + torch.special.log_ndtr(side * z_x)

        def h(y: Tensor, tail_x: Tensor, centre: Tensor, g_t: Tensor) -> tuple[Tensor, Tensor]:
            z = (y - centre) / g_t
            tail_y = log_w + torch.special.log_ndtr(side * z)
            up = torch.where(lower, tail_y, tail_x).logsumexp(-1, keepdim=True)
            down = torch.where(lower, tail_x, tail_y).logsumexp(-1, keepdim=True)
            log_slope = (log_w + _log_normal(z) - g_t.log() - torch.where(lower, up, down)).logsumexp(-1, keepdim=True)
            return up - down, log_slope.exp().clamp_min(torch.finfo(x.dtype).tiny)

        centre = path.alpha(t) * m
        fixed = tail_x.detach(), centre.detach(), g_t.detach()
        # The mixture's quantile is between those of its components, at scores between those of x.
        low, high = (fixed[1] + fixed[2] * z.unsqueeze(-1) for z in z_x.detach().aminmax(dim=-1))
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
        y, narrowest = (low + high) / 2, fixed[2].amin(-1, keepdim=True)
        settled = torch.zeros_like(y, dtype=torch.bool)  # per row, so that rows stay independent
        with torch.no_grad():
            for i in range(28):  # halving, then Newton steps as long as they stay in the bracket
                residual, slope = h(y, *fixed)
                low, high = torch.where(residual < 0, y, low), torch.where(residual < 0, high, y)
                newton = y - residual / slope
                inside = (newton >= low) & (newton <= high) & (i >= 16)
                near = inside & ((newton - y).abs() < 1e-9 * narrowest)  # the error is squared in every step
                y = torch.where(settled, y, torch.where(inside, newton, (low + high) / 2))
                settled = settled | near
                if i >= 16 and bool(settled.all()):
                    break
        # Implicit Newton steps keep the value and attach derivatives: one step the first, two steps up to the third.
        for _ in range(2):
            residual, slope = h(y, tail_x, centre, g_t)
            y = y - (residual - residual.detach()) / slope
        return y

    def _runge_kutta(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Butcher's sixth-order method. The average of the slopes is u itself, so nothing is divided by t - s."""
        y, u, gap = x, torch.zeros_like(x), t - s
        for start, end in pairwise(self._fractions(s.detach(), t.detach())):
            h, k = gap * (end - start), []
            for node, row in zip(NODES, COUPLINGS):
                stage = y + h * sum(a * k_j for a, k_j in zip(row, k) if a)
                k.append(self.mixture.velocity(stage, (s + gap * start + h * node).squeeze(-1)))
            slope = sum(weight * k_j for weight, k_j in zip(WEIGHTS, k) if weight)
            y, u = y + h * slope, u + (end - start) * slope
        return u

    def _fractions(self, s: Tensor, t: Tensor) -> Tensor:
        """The ends of the steps, as fractions of the way from s to t: (steps + 1, b, 1), from 0 to 1.

        Even steps of log((1 + p snr)/(1 + q snr)), snr = t/(1 - t): the log-SNR while the modes form, between the time
        when the widest scale shows through the noise and the time when the narrowest does; finite at both ends.
        """
        p, q = 2 * self.widest, self.narrowest / 2
        start, end = (((1 - r + p * r) / (1 - r + q * r)).log() for r in (s, t))
        share = ((end - start).abs().max() / math.log(p / q)).item() if len(s) else 0.0
        steps = max(math.ceil(self.steps * share - 1e-3), 1)
        even = torch.linspace(0, 1, steps + 1, dtype=s.dtype, device=s.device).view(-1, 1, 1)
        e = (start + (end - start) * even).exp()
        time = (e - 1) / (e - 1 + p - q * e)
        gap = time[-1] - time[0]
        short = gap.abs() < 1e-3  # rounding errors would show, and the grid does not matter for short jumps
        return torch.where(short, even, (time - time[0]) / torch.where(short, 1.0, gap))


def _apply(factor: Tensor, z: Tensor) -> Tensor:
    """factor @ z, where a factor with the shape of z is a diagonal."""
    return factor * z if factor.ndim == z.ndim else (factor @ z.unsqueeze(-1)).squeeze(-1)


def _log_normal(z: Tensor) -> Tensor:
    """Log density of N(0, 1), elementwise."""
    return -z.square() / 2 - math.log(2 * math.pi) / 2


def _reward(linear: Array | None, quadratic: Array | None, strength: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """strength * (a, B) in the dtype of ``like`` (..., d): a (d,), B (d,) or (d, d).

    Raises:
        ValueError: shapes, or a B that is not symmetric.
    """
    d = like.shape[-1]
    a, B = (torch.as_tensor(0.0 if v is None else v, dtype=like.dtype, device=like.device) for v in (linear, quadratic))
    if isinstance(strength, Tensor) and strength.ndim:
        raise ValueError(f"strength has shape {tuple(strength.shape)}, expected one number")
    if linear is not None and a.shape != (d,):
        raise ValueError(f"linear has shape {tuple(a.shape)}, expected ({d},)")
    if B.shape not in ((), (d,), (d, d)):
        raise ValueError(f"quadratic has shape {tuple(B.shape)}, expected {(d, d)}, the diagonal ({d},) or a number")
    if B.ndim == 2 and not torch.allclose(B, B.mT):
        raise ValueError("quadratic is not symmetric: pass (B + B.mT) / 2, which is the same reward")
    return strength * a.expand(d), strength * (B if B.ndim == 2 else B.expand(d))
