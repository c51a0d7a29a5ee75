"""Adjoint matching: learn the velocity of the tilted law by a regression on the reward's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steerfm.finetuning.base import Law, Terms, Update, by_velocity, ode
from steerfm.flowmap import FlowMap
from steerfm.transitions import Bridge


@dataclass(frozen=True)
class Adjoint:
    """Lean adjoint matching on the memoryless process (Domingo-Enrich et al. 2409.08861, equations 38 to 40), in discrete time.

    The steps are those of DDPM, N(m(x), s^2 I), with the denoiser's mean. They are memoryless, so that the optimum tilts p
    exactly, and its velocity is that of the tilted law's own path. The adjoint goes backwards through the reference only,

        a_N = strength grad r(x_N),   a_k = (d m_ref / d x_k)^T a_{k+1}
        loss = sum_k w_k |D(x_k) - D_ref(x_k) - sigma_k^2 / alpha_k a_k|^2

    where w_k |D - D_ref|^2 is the divergence between a step and the reference's. It is exact as the number of steps grows. This
    trains a velocity; the jumps are distilled from it afterwards.

    Args:
        steps: of the process.
        trained: number of random steps to fit in an update; None for all.
        ode: steps of the ODE that samples the result.
    """

    steps: int = 20
    trained: int | None = 8
    ode: int = 32

    differentiates, tilts, group, law_is_map, law_is_velocity = True, True, 1, False, True

    def __post_init__(self) -> None:
        if self.steps < 2 or self.ode < 1 or (self.trained is not None and self.trained < 1):
            raise ValueError("steps must be at least 2, ode and trained at least 1")

    def loss(self, update: Update) -> Terms:
        move, times, problem = Bridge(1.0), update.tuned.grid(self.steps), update.problem
        cond = problem.cond
        states, x = [], update.normal()
        with torch.no_grad():
            for s, t in zip(times, times[1:]):
                states.append(x)
                step = move.step(update.tuned, x, s, t, cond)
                x = step.sample(update.normal() if step.std else None)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            r = problem.score(x).total
            (adjoint,) = torch.autograd.grad(update.strength * r.sum(), x)
        states_at, endpoints, weights = [], [], []
        path = update.tuned.interpolant
        for before_step, s, t in zip(reversed(states), reversed(times[:-1]), reversed(times[1:])):
            with torch.enable_grad():
                state = before_step.detach().requires_grad_()
                endpoint = update.reference.denoise(state, s, cond)
                step = move.step(update.reference, state, s, t, cond, endpoint)
                (before,) = torch.autograd.grad(step.mean, state, adjoint)
            if step.std:  # Tweedie: a slope a of the value moves the denoiser by sigma^2/alpha a; s = 0 uses the slope at t
                at, slope = (s, before) if s > 0 else (t, adjoint)
                states_at.append((state.detach(), s))
                endpoints.append(endpoint.detach() + path.sigma(at) ** 2 / path.alpha(at) * slope)
                _, share, std = move.coefficients(path, s, t)
                weights.append(share**2 / (2 * std**2))
            adjoint = before
        count = len(states_at) if self.trained is None else min(self.trained, len(states_at))
        selection = torch.randperm(len(states_at), generator=update.generator)[:count].tolist()
        b = len(x)
        xs = torch.cat([states_at[i][0] for i in selection])
        at = torch.tensor([states_at[i][1] for i in selection], device=xs.device, dtype=xs.dtype).repeat_interleave(b)
        weight = torch.tensor([weights[i] for i in selection], device=xs.device, dtype=xs.dtype).repeat_interleave(b)
        conditions = update.tasks[torch.arange(b).repeat(count)].problem(update.tuned, update.reward).cond
        miss = update.tuned.denoise(xs, at, conditions) - torch.cat([endpoints[i] for i in selection])
        losses = weight * miss.square().flatten(1).sum(1)
        return {"loss": losses.sum() / b * len(states_at) / count / x[0].numel(), "reward": r.detach().mean()}

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`."""
        return by_velocity(flow_map)

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return ode(tuned, self.ode)
