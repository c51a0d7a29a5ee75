"""Policy gradients for any reward: the transitions of a sampler are Gaussian, so their log-probabilities are exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerfm.capabilities import Choosy, can, needs
from steerfm.finetuning.base import ONE_JUMP, Law, Terms, Update, chain
from steerfm.flowmap import FlowMap
from steerfm.registry import TakesNames, objects
from steerfm.transitions import TRANSITIONS, Bridge, Diffuse, Renoise, Transition


@dataclass(frozen=True)
class Policy(metaclass=TakesNames):
    """GRPO on a few stochastic transitions of the flow map (Flow-Map GRPO, 2607.00535).

        -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A) + control * KL(pi | pi_ref),      rho = pi(x'|x) / pi_old(x'|x)

    The advantage A is the reward, standardised over the samples of the same task. `Renoise` preserves the marginals of an exact
    map in any number of steps, so four are enough. The last step is deterministic and has no probability, so it is not trained
    directly.

    Args:
        steps: transitions from noise to data; all but the last are trained.
        transition: the sampler; any stochastic one, or its name.
        group: samples per task to compare with each other.
        clip: eps.
        reuse: updates per set of samples; with 1 the ratio is always 1.
        within: divide by the standard deviation within the group (GRPO), or over the batch.
    """

    steps: int = 4
    transition: Transition = field(default_factory=Renoise)
    group: int = 16
    clip: float = 0.2
    reuse: int = 2
    within: bool = True

    differentiates, tilts, law_is_map, law_is_velocity = False, False, False, False

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with objects in place of names."""
        return objects(cls, arguments, {"transition": TRANSITIONS})

    def __post_init__(self) -> None:
        if not self.transition.stochastic:
            raise ValueError("policy gradients need a stochastic transition: renoise, diffuse or bridge")
        if self.steps < 2 or self.group < 2 or self.reuse < 1 or not self.clip > 0:
            raise ValueError("steps and group must be at least 2, reuse at least 1, clip positive")

    def loss(self, update: Update) -> Terms:
        if update.step % self.reuse == 0:
            self._rollout(update)
        states, old, advantage = (update.own[name].to(update.tuned.device) for name in ("states", "log_p", "advantage"))
        states, old = states.transpose(0, 1), old.t()
        cond, times = update.problem.cond, update.tuned.grid(self.steps)
        gain, divergence = states.new_zeros(()), states.new_zeros(())
        ratios: list[Tensor] = []
        for i, (s, t) in enumerate(zip(times[:-1], times[1:-1])):
            step = self.transition.step(update.tuned, states[i], s, t, cond)
            with torch.no_grad():
                reference = self.transition.step(update.reference, states[i], s, t, cond).mean
            ratio = (step.log_prob(states[i + 1]) - old[i]).exp().float()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = gain + torch.minimum(ratio * advantage, clipped * advantage).mean()
            distance = (step.mean - reference).square().flatten(1).sum(1)
            divergence = divergence + distance.mean() / (2 * step.std**2)
            ratios.append(ratio.detach())
        off = (update.all_rows(torch.stack(ratios, 1)) - 1).abs()
        return {
            "loss": -gain + update.control * divergence,
            "reward": update.memory["reward"].to(gain),
            "control_cost": divergence,
            "clipped": (off > self.clip).float().mean(),
            "ratio": off.max(),
        }

    @torch.no_grad()
    def _rollout(self, update: Update) -> None:
        """States before each transition and after the last stochastic one, their log-probabilities, and advantages."""
        problem, times = update.problem, update.tuned.grid(self.steps)
        x = update.normal()
        states, log_p = [x], []
        for s, t in zip(times, times[1:]):
            step = self.transition.step(update.tuned, x, s, t, problem.cond)
            x = step.sample(update.normal() if step.std else None)
            if step.std:
                log_p.append(step.log_prob(x))
                states.append(x)
        r = update.all_rows(problem.score(x).total)
        advantage = advantages(r, self.group, self.within)[update.part(len(r))]
        update.own |= {"states": torch.stack(states, 1), "log_p": torch.stack(log_p, 1), "advantage": advantage}
        update.memory |= {"reward": r.mean()}

    def law(self, tuned: FlowMap, reference: FlowMap) -> Law:
        return chain(self.steps, self.transition)(tuned)

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """See `Choosy`."""
        if not (can(flow_map, "endpoint") or can(flow_map, "velocity")):
            return needs("endpoint", ONE_JUMP)
        if not isinstance(self.transition, Choosy) or self.transition == flow_map.transition:
            return ""
        why = self.transition.lacks(flow_map, flow_map.grid(self.steps))
        return why and f"its transition {type(self.transition).__name__} {why}"


def advantages(r: Tensor, group: int, within: bool = True) -> Tensor:
    """Rewards (b,) minus their group's mean, divided by the standard deviation within the group or of all rewards.

    Args:
        r: (b,) rewards; consecutive ``group`` rows are a group.
        group: group size.
        within: use the standard deviation within the group.
    """
    groups = r.view(-1, group)
    spread = groups.std(1, keepdim=True) if within else groups.std()
    return ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()


@dataclass(frozen=True)
class FlowGRPO(Policy):
    """Flow-GRPO (Liu et al. 2505.05470): `Policy` on the stochastic Euler steps of the velocity; 10 in training."""

    steps: int = 10
    transition: Transition = field(default_factory=Diffuse)


@dataclass(frozen=True)
class DDPO(Policy):
    """DDPO (Black et al. 2305.13301, section 4.3): DDPM's ancestral steps, advantages over the batch, a narrow clip."""

    steps: int = 20
    transition: Transition = field(default_factory=Bridge)
    clip: float = 1e-2
    within: bool = False
