"""Rewards that the first process computes for all, while each process trains on its own rows."""

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
    """The reward with group-wise and ``one_process`` terms computed by the first process for all rows."""
    return each_term(reward, lambda term: ByFirst(term) if by_one(term) else term)


class ByFirst(SameReward):
    """The same reward, computed by the first process: it receives the rows of all, and returns values and gradients."""

    def raw_scores(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Scores:
        if active() is None:
            return self.reward.raw_scores(images, prompts, labels, groups, latents)
        shapes = tell((len(images), None if prompts is None else list(prompts), None if labels is None else labels.cpu()))
        texts = None if prompts is None else [text for _, some, _ in shapes for text in some]
        classes = None if labels is None else torch.cat([some for *_, some in shapes])
        rows = Rows(sum(n for n, *_ in shapes), labels=classes, prompts=texts)
        alike = rows.kinds() if groups is not None else None

        def call(images: Tensor, latents: Tensor | None = None) -> Tensor:
            labels, groups = (None if value is None else value.to(images.device) for value in (classes, alike))
            return self.reward.raw_scores(images, texts, labels, groups, latents).total

        job = _Job(active(), [n for n, *_ in shapes], call)
        inputs = [images] if latents is None else [images, latents]
        with_gradient = self.differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        total: Any = _Values.apply(job, *inputs) if with_gradient else job.forward(inputs, [False] * len(inputs))
        return Scores(total, {self.name: total.detach()})


@dataclass
class _Job:
    """One call of the reward; its graph is in the first process."""

    group: Group | None
    rows: list[int]
    call: Callable[..., Tensor]
    graph: tuple[list[Tensor], Tensor] | None = None

    def forward(self, inputs: list[Tensor], needs_grad: list[bool]) -> Tensor:
        whole = [self._all(x) for x in inputs]
        return self._from_first(lambda: self._score(whole, needs_grad)).to(inputs[0].device)

    def backward(self, gradient: Tensor) -> list[Tensor]:
        whole = self._all(gradient)
        return [grad.to(gradient.device) for grad in self._from_first(lambda: self._gradients(whole), many=True)]

    def _score(self, inputs: list[Tensor], needs_grad: list[bool]) -> Tensor:
        inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs_grad)]
        with torch.set_grad_enabled(any(needs_grad)):
            out = self.call(*inputs)
        self.graph = ([x for x in inputs if x.requires_grad], out)
        return out.detach().cpu()

    def _gradients(self, gradient: Tensor) -> list[Tensor]:
        assert self.graph is not None
        inputs, out = self.graph
        self.graph = None
        grads = torch.autograd.grad(out, inputs, gradient, allow_unused=True)
        return [(torch.zeros_like(x) if grad is None else grad).cpu() for x, grad in zip(inputs, grads)]

    def _all(self, mine: Tensor) -> Tensor:
        """The rows of all processes, on the device of ``mine``."""
        with together(self.group):
            return torch.cat([rows.to(mine.device) for rows in tell(mine.detach().cpu())])

    def _from_first(self, make: Callable[[], Any], many: bool = False) -> Any:
        """This process's rows of a value that the first process computes."""
        with together(self.group):
            value = of_first(make)
        assert self.group is not None
        begin = sum(self.rows[: self.group.rank])
        mine = slice(begin, begin + self.rows[self.group.rank])
        return [each[mine] for each in value] if many else value[mine]


class _Values(torch.autograd.Function):
    """The values of a job, with their gradient."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *inputs: Tensor) -> Tensor:
        ctx.job, ctx.needs_grad = job, list(ctx.needs_input_grad[1:])
        return job.forward(list(inputs), ctx.needs_grad)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values = iter(ctx.job.backward(gradients[0]))
        return None, *(next(values) if need else None for need in ctx.needs_grad)
