"""The Reward contract: what a person writes, and everything the library does around it.

>>> def red(images):                             # a plain function is a reward: (b, c, h, w) in [0, 1] -> (b,)
...     return images[:, 0].mean((1, 2))
>>> rw = 1.0 * steerfm.reward(red) + 0.2 * steerfm.reward("sharpness")
>>> rw(images)                                   # checked, micro-batched, counted; (b,) float32, higher is better

Rewards are found by entry point (group ``steerfm.rewards``), by ``pkg.mod:Name`` or by ``path/to/file.py:name``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steerfm import trust
from steerfm.cost import count, count_backward

Prompts = Sequence[str] | None


class RewardError(ValueError):
    """A reward broke its contract; the message names the reward and the fix.

    Attributes:
        sample: number of the picture that it broke at, where it was one.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample

    def __str__(self) -> str:
        return super().__str__() + ("" if self.sample is None else f" for sample {self.sample}")


@dataclass
class Scores:
    """total: (b,) float32, what is optimised; components: raw value of every term by name, (b,) each, no graph."""

    total: Tensor
    components: dict[str, Tensor]

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Those of consecutive pictures as one."""
        components = {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components}
        return cls(torch.cat([part.total for part in parts]), components)

    def __getitem__(self, rows: Tensor | slice) -> Scores:
        """Of the given rows, without a graph."""
        return Scores(self.total[rows].detach(), {name: value[rows] for name, value in self.components.items()})


class Reward(nn.Module):
    """A scalar per picture, higher is better. Subclasses set the class facts and write `score`.

    Class facts:
        name: for logs and errors. unit: of the value, e.g. "log-probability". range: (lowest, highest) possible value.
        differentiable: whether gradients reach the pictures; a black box says False.
        needs: of {"labels", "prompts"}, what `score` cannot work without.
        batch_size: pictures per call of `score`; None for all at once.
        groupwise: whether a value depends on the other pictures of a group (the particles of an output): `score` then sees all
            pictures at once and takes ``groups`` (b,), the number of each one's group, or None for one group.
        truth: picture (c, h, w) in [0, 1] that was measured, where it is known: `steerfm steer` says how near samples come.

    Facts that depend on the arguments are set on the instance. A reward stays in evaluation mode, whatever is trained.
    """

    name: str = ""
    unit: ClassVar[str] = ""
    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    differentiable: bool = True
    needs: frozenset[str] = frozenset()
    batch_size: int | None = None
    groupwise: ClassVar[bool] = False
    truth: Tensor | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    def __init__(self) -> None:  # nn.Module's own takes anything, so that a misspelt argument would pass the check
        super().__init__()

    def train(self, mode: bool = True) -> Reward:
        return super().train(False)  # a reward inside a training module must not get dropout or batch statistics back

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """The hook that authors write: images (b, c, h, w) in [0, 1] or vectors (b, d), float32 or float64, to (b,)."""
        raise NotImplementedError(f"reward {self.name!r} does not define score(images)")

    def __call__(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """Checked value, (b,) float32 on the device of the images.

        Args:
            images: (b, c, h, w) in [0, 1], or (b, d) for maps of vectors.
            prompts: one string per row, where the reward reads prompts.
            labels: (b,) class indices, where the reward reads labels.

        Raises:
            RewardError: images out of shape or range; a missing need; a result that is not a finite tensor (b,).
        """
        return self.evaluate(images, prompts, labels).total

    def evaluate(
        self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None, groups: Tensor | None = None
    ) -> Scores:
        """As calling the reward, with the raw value of every component beside the total; groups: see ``groupwise``."""
        self._check_input(images, prompts, labels)
        count("reward_calls", len(images))
        images = images.to(torch.promote_types(images.dtype, torch.float32))  # half precision is too coarse for sums
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            scores = self._scores(images, prompts, labels, groups)
        count_backward("reward_backwards", len(images), scores.total)
        return scores

    def _scores(self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None) -> Scores:
        size = max(1, len(images)) if self.groupwise or not self.batch_size else self.batch_size
        context = {"groups": groups} if self.groupwise else {}
        parts = []
        for begin in range(0, len(images), size):
            rows = slice(begin, begin + size)
            part = self.score(
                images[rows],
                prompts=None if prompts is None else prompts[rows],
                labels=None if labels is None else labels[rows],
                **context,
            )
            parts.append(self._check_output(part, images[rows], begin))
        total = torch.cat(parts) if parts else torch.zeros(0, device=images.device)
        return Scores(total, {self.name: total.detach()})

    def _check_input(self, images: Tensor, prompts: Prompts, labels: Tensor | None) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim not in (2, 4):
            found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise RewardError(f"reward {self.name!r} takes float images (b, c, h, w) in [0, 1] or vectors (b, d), got {found}")
        if images.ndim == 4 and len(images):
            low, high = (float(bound) for bound in images.detach().aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):
                raise RewardError(
                    f"reward {self.name!r} takes images in [0, 1], got [{low:.3g}, {high:.3g}]: use FlowMap.decode"
                )
        for need, given in (("labels", labels), ("prompts", prompts)):
            if need in self.needs and given is None:
                raise RewardError(f"reward {self.name!r} needs {need}: condition the model, or pass {need}=")
            if given is not None and len(given) != len(images):
                raise RewardError(f"reward {self.name!r} got {len(given)} {need} for {len(images)} images")

    def _check_output(self, value: Any, images: Tensor, begin: int) -> Tensor:
        if not isinstance(value, Tensor):
            raise RewardError(
                f"reward {self.name!r} returned a {type(value).__name__}: return a tensor of shape ({len(images)},)"
            )
        if value.shape != (len(images),):
            raise RewardError(
                f"reward {self.name!r} returned shape {tuple(value.shape)} for {len(images)} images: "
                f"return one value per image, shape ({len(images)},)"
            )
        value = value.to(images.device, torch.float32)
        finite = torch.isfinite(value.detach())
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise RewardError(f"reward {self.name!r} returned {value[row].item()}", sample=begin + row)
        return value

    # --- composition ---------------------------------------------------------------------------------------------
    def __add__(self, other: Reward) -> WeightedSum:
        return WeightedSum([*_terms(self), *_terms(as_reward(other))])

    def __sub__(self, other: Reward) -> WeightedSum:
        return self + (-1.0) * as_reward(other)

    def __mul__(self, weight: float) -> WeightedSum:
        return WeightedSum([(float(weight) * w, reward) for w, reward in _terms(self)])

    __rmul__ = __mul__

    def __neg__(self) -> WeightedSum:
        return self * -1.0


class WeightedSum(Reward):
    """sum_i weight_i reward_i; keeps every component's raw value. Written ``1.0 * a + 0.2 * b``.

    Differentiable if every term is: part of a gradient is not the gradient. A call counts once, not once per term.

    Args:
        terms: (weight, reward) pairs. Components of equal names are numbered; the first known truth is the sum's.
    """

    def __init__(self, terms: Iterable[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights, self.rewards = [], nn.ModuleList()
        for weight, reward in terms:
            if not abs(weight) < float("inf"):
                raise RewardError(f"weight of reward {reward.name!r} is {weight}: must be finite")
            self.weights.append(float(weight))
            self.rewards.append(reward)
        self.name = " + ".join(f"{weight:g} {reward.name}" for weight, reward in self.terms)
        self.differentiable = all(reward.differentiable for _, reward in self.terms)
        self.needs = frozenset().union(*(reward.needs for _, reward in self.terms))
        self.truth = next((reward.truth for _, reward in self.terms if reward.truth is not None), None)

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        return list(zip(self.weights, self.rewards))  # type: ignore[arg-type]

    def _scores(self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None) -> Scores:
        total, components = torch.zeros(len(images), device=images.device), {}
        for weight, reward in self.terms:
            scores = reward._scores(images, prompts, labels, groups)
            total = total + weight * scores.total
            for name, value in scores.components.items():
                number = 2
                unique = name
                while unique in components:
                    unique, number = f"{name} {number}", number + 1
                components[unique] = value
        return Scores(total, components)


class FunctionReward(Reward):
    """A plain function f(images) -> (b,) as a reward; ``prompts`` and ``labels`` are passed if the function names them,
    and needed if it gives them no default.

    Args:
        function: may carry the attributes ``name``, ``differentiable``, ``batch_size`` of its own.
        arguments: bound to the function.
    """

    def __init__(self, function: Callable[..., Any], **arguments: Any) -> None:
        super().__init__()
        parameters = _after_images(function)
        context = {key: parameters.pop(key) for key in ("prompts", "labels") if key in parameters}
        self.name = getattr(function, "name", getattr(function, "__name__", type(function).__name__))
        check_arguments(self.name, parameters, arguments)
        self.differentiable = getattr(function, "differentiable", True)
        self.batch_size = getattr(function, "batch_size", None)
        self.function = partial(function, **arguments)
        self.passed = tuple(context)
        self.needs = frozenset(key for key, parameter in context.items() if parameter.default is parameter.empty)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        context = {"prompts": prompts, "labels": labels}
        return self.function(images, **{key: context[key] for key in self.passed})


def _after_images(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function after the one that takes the images."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise RewardError(f"{name!r} does not say which arguments it takes: wrap it, def reward(images): ...") from None
    first = next(iter(parameters.values()), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise RewardError(f"{name!r} is not a function of pictures: its first argument must take them, def {name}(images)")
    return dict(list(parameters.items())[1:])


def _terms(reward: Reward) -> list[tuple[float, Reward]]:
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]


# --- finding rewards -------------------------------------------------------------------------------------------------
GROUP = "steerfm.rewards"


def as_reward(reward: Any) -> Reward:
    """A Reward from a Reward or a plain function.

    Raises:
        RewardError: anything else.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise RewardError(
            f"a reward is a function of images or a Reward, got {reward!r}: call the class, or use steerfm.reward"
        )
    return FunctionReward(reward)


def reward(spec: str | Callable[..., Tensor] | Reward, **arguments: Any) -> Reward:
    """Find and build a reward.

    Args:
        spec: the name of an installed plug-in, ``pkg.mod:Name``, ``path/to/file.py:name``, a function or a Reward.
        arguments: of the reward's class or function.

    Raises:
        RewardError: unknown name or argument (with the nearest valid one), or a file that cannot be imported.
    """
    target = find(spec) if isinstance(spec, str) else spec
    if isinstance(target, Reward):
        if arguments:
            raise RewardError(f"reward {spec!r} is already built and takes no arguments: {', '.join(arguments)}")
        return target
    if isinstance(target, type) and issubclass(target, Reward):
        check_arguments(target.name, inspect.signature(target).parameters, arguments)
        return target(**arguments)
    if isinstance(target, type) or not callable(target):
        raise RewardError(f"reward {spec!r} is a {type(target).__name__}, not a function or a Reward")
    if isinstance(spec, str) and ":" in spec and not trust.is_own(spec):
        raise RewardError(f"reward {spec!r} is a function of an installed package: of those only a Reward can be named")
    return FunctionReward(target, **arguments)


def available() -> dict[str, EntryPoint]:
    """Installed reward plug-ins by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find(spec: str, what: str = "reward") -> Any:
    """The class or function behind a name, ``pkg.mod:Name`` or ``path/to/file.py:name``; ``what`` it is, for the message.

    Raises:
        RewardError: naming what was looked for and what there is.
    """
    if ":" not in spec:
        points = available()
        if spec in points:
            try:
                return points[spec].load()
            except Exception as error:
                where = points[spec].value
                raise RewardError(f"cannot import reward {spec!r} ({where}): {type(error).__name__}: {error}") from error
        raise RewardError(
            f"unknown reward {spec!r}{_nearest(spec, points)}; installed: {', '.join(points) or 'none'}; "
            "your own: path/to/file.py:name"
        )
    try:
        return trust.load(spec, what)
    except trust.CodeError as error:
        raise RewardError(str(error)) from error.__cause__


def check_arguments(name: str, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> None:
    """Compare arguments with a signature before the call.

    Raises:
        RewardError: an unknown argument (naming the nearest one), or a missing one.
    """
    kinds = {parameter.kind for parameter in parameters.values()}
    known = {
        key: parameter
        for key, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    listed = f"arguments: {', '.join(known) or 'none'}"
    for key in arguments:
        if key not in known and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise RewardError(f"reward {name!r} has no argument {key!r}{_nearest(key, known)}; {listed}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise RewardError(f"reward {name!r} is missing its argument {key!r}: pass {key}=...; {listed}")


def _nearest(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
