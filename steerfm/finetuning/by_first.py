"""Rewards that one process makes for all, while each of them tunes on rows of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm.processes import Group, active, of_first, tell, together
from steerfm.rewards import Reward
from steerfm.rows import Rows
from steerfm.scores import Prompts, Scores
from steerfm.spread import SameReward, by_one, each_term


def by_first(reward: Reward) -> Reward:
    """The reward with each term that compares pictures, or that one process makes, made by the first process for all rows."""
    return each_term(reward, lambda term: ByFirst(term) if by_one(term) else term)


class ByFirst(SameReward):
    """The same reward, made by the first process: the rows of all are brought there, and values and gradients back."""

    def raw_scores(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Scores:
        if active() is None:
            return self.reward.raw_scores(images, prompts, labels, groups, latents)
        said = tell((len(images), None if prompts is None else list(prompts), None if labels is None else labels.cpu()))
        texts = None if prompts is None else [text for _, some, _ in said for text in some]
        classes = None if labels is None else torch.cat([some for *_, some in said])
        rows = Rows(sum(n for n, *_ in said), labels=classes, prompts=texts)
        alike = rows.kinds() if groups is not None else None

        def call(images: Tensor, latents: Tensor | None = None) -> Tensor:
            labels, groups = (None if value is None else value.to(images.device) for value in (classes, alike))
            return self.reward.raw_scores(images, texts, labels, groups, latents).total

        job = _Job(active(), [n for n, *_ in said], call)
        given = [images] if latents is None else [images, latents]
        seen = self.differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in given)
        total: Any = _Values.apply(job, *given) if seen else job.forward(given, [False] * len(given))
        return Scores(total, {self.name: total.detach()})


@dataclass
class _Job:
    """One call of the reward: its graph is in the first process."""

    group: Group | None
    rows: list[int]
    call: Callable[..., Tensor]
    graph: tuple[list[Tensor], Tensor] | None = None

    def forward(self, inputs: list[Tensor], wanted: list[bool]) -> Tensor:
        given = [self._all(x) for x in inputs]
        return self._told(lambda: self._score(given, wanted)).to(inputs[0].device)

    def backward(self, gradient: Tensor) -> list[Tensor]:
        whole = self._all(gradient)
        return [grad.to(gradient.device) for grad in self._told(lambda: self._gradients(whole), many=True)]

    def _score(self, given: list[Tensor], wanted: list[bool]) -> Tensor:
        given = [x.requires_grad_(want) for x, want in zip(given, wanted)]
        with torch.set_grad_enabled(any(wanted)):
            out = self.call(*given)
        self.graph = ([x for x in given if x.requires_grad], out)
        return out.detach().cpu()

    def _gradients(self, gradient: Tensor) -> list[Tensor]:
        assert self.graph is not None
        given, out = self.graph
        self.graph = None
        grads = torch.autograd.grad(out, given, gradient, allow_unused=True)
        return [(torch.zeros_like(x) if grad is None else grad).cpu() for x, grad in zip(given, grads)]

    def _all(self, mine: Tensor) -> Tensor:
        """The rows of all processes, where the first has its own."""
        with together(self.group):
            return torch.cat([told.to(mine.device) for told in tell(mine.detach().cpu())])

    def _told(self, make: Callable[[], Any], many: bool = False) -> Any:
        """Rows that the first process makes: those of this one."""
        with together(self.group):
            value = of_first(make)
        assert self.group is not None
        begin = sum(self.rows[: self.group.rank])
        mine = slice(begin, begin + self.rows[self.group.rank])
        return [each[mine] for each in value] if many else value[mine]


class _Values(torch.autograd.Function):
    """The values of a job, with its gradient."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *inputs: Tensor) -> Tensor:
        ctx.job, ctx.wanted = job, list(ctx.needs_input_grad[1:])
        return job.forward(list(inputs), ctx.wanted)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made = iter(ctx.job.backward(gradients[0]))
        return None, *(next(made) if want else None for want in ctx.wanted)
