"""The Reward contract: the hook that users write, and everything that the library does around it.

>>> def red(images):                             # a plain function is a reward: (b, c, h, w) in [0, 1] -> (b,)
...     return images[:, 0].mean((1, 2))
>>> rw = 1.0 * steerfm.reward(red) + 0.2 * steerfm.reward("sharpness")
>>> rw(images)                                   # checked, micro-batched, counted; (b,) float32, higher is better

Rewards can be named by entry point (group ``steerfm.rewards``), by ``pkg.mod:Name`` or by ``path/to/file.py:name``.
"""

from __future__ import annotations

import inspect
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from steerfm import trust
from steerfm.cost import count, count_backward
from steerfm.randomness import untouched
from steerfm.rows import cuts
from steerfm.scores import MODEL, PICTURES, Prompts, RewardError, Scores, as_numbers, check_finite, check_samples


class Reward(nn.Module):
    """A scalar per picture, higher is better. Subclasses set the class attributes and implement `score`.

    Attributes:
        name: for logs and errors.
        unit: of the value, e.g. "log-probability".
        range: (lowest, highest) possible value.
        differentiable: whether gradients reach the pictures; False for a black box.
        needs: required inputs of `score`, a subset of {"labels", "prompts"}.
        batch_size: pictures per call of `score`; None for all at once.
        groupwise: whether a value depends on the other pictures of a group (the particles of an output). `score` then receives
            all pictures at once and takes ``groups`` (b,), the group number of each picture, or None for one group.
        space: input of `score`: "pictures" (or the vectors of a map of vectors), "video" (b, c, f, h, w), or "model": samples
            in the model's space, of any shape, without decoding.
        packages: modules that must be installed before the first call, in addition to those of steerfm.
        elsewhere: whether another machine computes the values. Such a reward implements `send` in place of `score`, and the
            network works on while the run waits for the values.
        one_process: whether only the first of several processes (`steerfm.distributed`) computes it, for all; in a
            configuration ``one_process=true``. For a network too large to copy, or a server that only one process can reach.
        truth: (c, h, w) in [0, 1], the true picture behind a measurement, if known; `steerfm steer` reports the distance to it.

    Attributes that depend on the arguments are set on the instance. A reward always stays in evaluation mode. `score` gets
    copies of its inputs, and its changes to torch's defaults and to global random states are undone, so it may write to all of
    them. It draws the same random numbers in every call, unless it has its own generator.
    """

    name: str = ""
    unit: ClassVar[str] = ""
    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    differentiable: bool = True
    needs: frozenset[str] = frozenset()
    batch_size: int | None = None
    groupwise: bool = False
    elsewhere: bool = False
    one_process: bool = False
    space: str = PICTURES
    packages: ClassVar[tuple[str, ...]] = ()
    truth: Tensor | None = None
    _fits: int | None = None  # pictures per call that fit in memory

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    def __init__(self) -> None:  # that of nn.Module accepts anything, and a misspelt argument would pass the check
        super().__init__()

    def train(self, mode: bool = True) -> Reward:
        return super().train(False)  # also inside a module in training mode

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """The hook to implement.

        Args:
            images: (b, c, h, w) in [0, 1], or vectors (b, d); float32 or float64.
            prompts: b texts, or None.
            labels: (b,) class indices, or None.

        Returns:
            Values (b,).
        """
        if self.elsewhere:
            return self.send(images, prompts, labels)()
        raise NotImplementedError(f"reward {self.name!r} does not define score(images)")

    def send(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Callable[[], Tensor]:
        """The hook of a reward that is ``elsewhere``: start the scoring, and return a function that waits for it."""
        raise NotImplementedError(f"reward {self.name!r} is elsewhere and does not define send(images)")

    def late_networks(self) -> Sequence[nn.Module | str]:
        """Networks of the reward that are not its attributes; this call loads them. A network elsewhere is a text with its
        place and name. A judge with one of them is not held out (`steerfm.held_out`)."""
        return ()

    def __call__(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        """Checked value, (b,) float32 on the device of the images.

        Args:
            images: depends on ``space``: (b, c, h, w) in [0, 1], or (b, d) for maps of vectors; video; or states.
            prompts: one string per row, if the reward reads prompts.
            labels: (b,) class indices, if the reward reads labels.

        Raises:
            RewardError: images of wrong shape or range; a missing input; an exception, with its file and line; a result that
                is not (b,) finite numbers.
        """
        return self.evaluate(images, prompts, labels).total

    def evaluate(
        self,
        images: Tensor,
        prompts: Prompts = None,
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> Scores:
        """As a call of the reward, but with the raw value of every component as well.

        Args:
            images: as for a call.
            prompts: as for a call.
            labels: as for a call.
            groups: see ``groupwise``.
            latents: (b, ...) the same samples in the model's space. Rewards of that space read them in place of images; sums
                of both kinds need both.
        """
        return self.promise(images, prompts, labels, groups, latents)()

    def promise(
        self,
        images: Tensor,
        prompts: Prompts = None,
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> Callable[[], Scores]:
        """Start `evaluate`, and return a function that waits for the result. Only rewards that are ``elsewhere`` run on; others
        finish here.
        """
        if self.space == MODEL and latents is not None:
            images = latents
        self._check_input(images, latents, prompts, labels)
        count("reward_calls", len(images))
        images, latents = _wide(images), _wide(latents) if latents is not None and MODEL in self.spaces else None
        graph = torch.is_grad_enabled() and self.differentiable
        with torch.set_grad_enabled(graph):
            wait = self.begin(images, prompts, labels, groups, latents)

        def finish() -> Scores:
            with torch.set_grad_enabled(graph):
                scores = wait()
            count_backward("reward_backwards", len(images), scores.total)
            return scores

        if self.elsewhere:
            return finish
        scores = finish()
        return lambda: scores

    @property
    def spaces(self) -> frozenset[str]:
        """The space that it reads; for a sum the spaces of all its terms."""
        return frozenset({self.space})

    def raw_scores(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Scores:
        if self.elsewhere:
            return self.begin(images, prompts, labels, groups, latents)()
        images, size = self._own(images, latents)
        size, begin, parts = min(size, self._fits or size), 0, []
        while begin < len(images):
            rows = slice(begin, begin + size)
            contexts = [None if context is None else context[rows] for context in (prompts, labels, groups)]
            try:
                parts.append(self._score_part(images[rows], *contexts, begin))  # type: ignore[arg-type]
            except torch.OutOfMemoryError:
                if self.groupwise or size == 1:
                    raise
                self._fits = size = -(-min(size, len(images)) // 2)
                warnings.warn(f"out of memory: reward {self.name!r} continues with {size} pictures per call", stacklevel=2)
                continue
            begin += size
        return self._join(parts, images)

    def begin(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Callable[[], Scores]:
        """Start `raw_scores`, and return a function that waits for them."""
        if not self.elsewhere:
            scores = self.raw_scores(images, prompts, labels, groups, latents)
            return lambda: scores
        images, size = self._own(images, latents)
        waits = []
        for rows in cuts(len(images), size):
            contexts = [None if context is None else context[rows] for context in (prompts, labels, groups)]
            waits.append(self._send_part(images[rows], *contexts, rows.start))  # type: ignore[arg-type]
        return lambda: self._join([wait() for wait in waits], images)

    def _own(self, images: Tensor, latents: Tensor | None) -> tuple[Tensor, int]:
        """The input that it reads, and its rows per call."""
        images = images if self.space != MODEL or latents is None else latents
        return images, max(1, len(images)) if self.groupwise or not self.batch_size else self.batch_size

    def _join(self, parts: Sequence[Tensor], images: Tensor) -> Scores:
        total = torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.float32, device=images.device)
        return Scores(total, {self.name: total.detach()})

    def _score_part(self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, begin: int) -> Tensor:
        """Values of some pictures, checked.

        Args:
            images: as in `score`.
            prompts: as in `score`.
            labels: as in `score`.
            groups: as in `evaluate`.
            begin: number of the first picture, for errors.
        """
        value = self._call(self._bind(self.score, images, prompts, labels, groups), images, begin)
        return self._check_output(value, images, begin)

    def _send_part(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, begin: int
    ) -> Callable[[], Tensor]:
        """As `_score_part`, for a reward that is elsewhere: returns a function that waits for the values."""
        wait = self._call(self._bind(self.send, images, prompts, labels, groups), images, begin)
        return lambda: self._check_output(self._call(wait, images, begin), images, begin)

    def _bind(
        self, hook: Callable[..., Any], images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None
    ) -> Callable[[], Any]:
        """A hook of the user, bound to copies of its arguments."""
        context = {"groups": None if groups is None else groups.clone()} if self.groupwise else {}
        texts, classes = None if prompts is None else list(prompts), None if labels is None else labels.clone()
        return partial(hook, images.clone(), prompts=texts, labels=classes, **context)

    def _call(self, call: Callable[[], Any], images: Tensor, begin: int) -> Any:
        """Call the user's code; an exception becomes a `RewardError` that names the reward and the picture."""
        try:
            with untouched():
                return call()
        except torch.OutOfMemoryError:
            raise
        except RewardError as error:
            error.sample = None if error.sample is None else error.sample + begin
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError) and type(self).score is Reward.score:
                raise
            raise RewardError(self._failure(error, images)) from error

    def _failure(self, error: Exception, images: Tensor) -> str:
        """One line with the error in `score` and its place."""
        frames, file = traceback.extract_tb(error.__traceback__), self._file()
        frame = ([frame for frame in frames if frame.filename == file] or frames)[-1]
        text = textwrap.shorten(" ".join(str(error).split()), 300, placeholder=" ...")
        fix = "; if it has no gradient, set differentiable = False" if images.requires_grad and "grad" in text else ""
        return (
            f"reward {self.name!r} failed for images of shape {tuple(images.shape)}: {type(error).__name__}: {text} "
            f"({frame.filename}, line {frame.lineno}){fix}"
        )

    def _file(self) -> str | None:
        """The file of the user's code."""
        return (type(self).send if self.elsewhere else type(self).score).__code__.co_filename

    def _check_input(self, images: Any, latents: Any, prompts: Prompts, labels: Tensor | None) -> None:
        check_samples(self.name, self.space, images)
        if MODEL in self.spaces and self.space != MODEL:
            if latents is None:
                fix = "evaluate(images, latents=states) takes both"
                raise RewardError(f"reward {self.name!r} reads {self.space} and the model's space: {fix}")
            check_samples(self.name, MODEL, latents)
        for need, value in (("labels", labels), ("prompts", prompts)):
            if need in self.needs and value is None:
                raise RewardError(f"reward {self.name!r} needs {need}: condition the model, or pass {need}=")
            if value is not None and len(value) != len(images):
                raise RewardError(f"reward {self.name!r} got {len(value)} {need} for {len(images)} images")

    def _check_output(self, value: Any, images: Tensor, begin: int) -> Tensor:
        if isinstance(value, list | tuple | np.ndarray):
            value = as_numbers(value)
        if not isinstance(value, Tensor) or value.is_complex():
            raise RewardError(
                f"reward {self.name!r} returned a {type(value).__name__}: return {len(images)} numbers, "
                f"a tensor, an array or a list of shape ({len(images)},)"
            )
        if value.shape != (len(images),):
            raise RewardError(
                f"reward {self.name!r} returned shape {tuple(value.shape)} for {len(images)} images: "
                f"return one value per image, shape ({len(images)},)"
            )
        value = value.to(images.device, torch.float32, copy=True)  # the user's code may reuse the memory
        check_finite(value, f"reward {self.name!r} returned", begin)
        return value

    def take_facts(self, members: Sequence[Reward]) -> None:
        """Set the attributes of a reward that consists of others.

        Raises:
            RewardError: the members read spaces that cannot be combined.
        """
        spaces = frozenset().union(*(member.spaces for member in members))
        readable = sorted(spaces - {MODEL})
        if len(readable) > 1:
            raise RewardError(
                f"rewards of {' and of '.join(readable)} cannot be combined: put reward=frames around those of pictures"
            )
        self.space = readable[0] if readable else MODEL if spaces else PICTURES
        if self.spaces != spaces and members:
            raise RewardError(f"rewards of {readable[0]} and of the model's space cannot be combined here: use a sum, a + b")
        self.differentiable = all(member.differentiable for member in members)
        self.needs = frozenset().union(*(member.needs for member in members))
        self.groupwise = any(member.groupwise for member in members)
        self.one_process = any(member.one_process for member in members)
        self.truth = next((member.truth for member in members if member.truth is not None), None)
        self.batch_size = min((member.batch_size for member in members if member.batch_size), default=None)

    def __repr__(self) -> str:  # nn.Module would print all submodules
        reads = "" if self.space == PICTURES else f"reads {self.space}" if self.space != MODEL else "reads the model's space"
        facts = [
            self.unit,
            reads,
            "" if self.differentiable else "a black box",
            *(f"needs {need}" for need in sorted(self.needs)),
        ]
        text = ", ".join(fact for fact in facts if fact)
        return f"<{type(self).__name__} {self.name!r}{': ' if text else ''}{text}>"

    # --- composition ---------------------------------------------------------------------------------------------
    def __add__(self, other: Reward | Callable[..., Any]) -> WeightedSum:
        return WeightedSum([*_terms(self), *_terms(as_reward(other))])

    def __sub__(self, other: Reward | Callable[..., Any]) -> WeightedSum:
        return self + (-1.0) * as_reward(other)

    def __mul__(self, weight: float) -> WeightedSum:
        return WeightedSum([(float(weight) * w, reward) for w, reward in _terms(self)])

    __rmul__ = __mul__

    def __neg__(self) -> WeightedSum:
        return self * -1.0


class WeightedSum(Reward):
    """sum_i weight_i reward_i; keeps every component's raw value. Written ``1.0 * a + 0.2 * b``.

    It is differentiable only if every term is. A call counts as one reward call, not one per term.

    Args:
        terms: (weight, reward) pairs. Components with equal names are numbered; ``truth`` is that of the first term with one.
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
        self.take_facts([reward for _, reward in self.terms])
        self.elsewhere = any(reward.elsewhere for reward in self.rewards)  # type: ignore[union-attr]

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        return list(zip(self.weights, self.rewards))  # type: ignore[arg-type]

    @property
    def spaces(self) -> frozenset[str]:
        return frozenset().union(*(reward.spaces for _, reward in self.terms)) or frozenset({PICTURES})

    def raw_scores(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Scores:
        return self.begin(images, prompts, labels, groups, latents)()

    def begin(
        self, images: Tensor, prompts: Prompts, labels: Tensor | None, groups: Tensor | None, latents: Tensor | None = None
    ) -> Callable[[], Scores]:
        """See `Reward.begin`: terms that are elsewhere start first and are awaited last."""
        inputs = (images, prompts, labels, groups, latents)
        waits = {number: reward.begin(*inputs) for number, (_, reward) in enumerate(self.terms) if reward.elsewhere}
        scores_here = {
            number: reward.raw_scores(*inputs) for number, (_, reward) in enumerate(self.terms) if not reward.elsewhere
        }
        if not waits:
            scores = self._add_up(scores_here, images, latents)
            return lambda: scores
        return lambda: self._add_up(scores_here | {number: wait() for number, wait in waits.items()}, images, latents)

    def _add_up(self, parts: Mapping[int, Scores], images: Tensor, latents: Tensor | None) -> Scores:
        """The weighted sum of the scores of all terms.

        Args:
            parts: the scores of each term, by its number.
            images: as in `evaluate`.
            latents: as in `evaluate`.
        """
        total, components = torch.zeros(len(images), dtype=torch.float32, device=images.device), {}
        for number, (weight, reward) in enumerate(self.terms):
            scores = parts[number]
            source = images if reward.space != MODEL or latents is None else latents
            if source.requires_grad and torch.is_grad_enabled() and not scores.total.requires_grad:
                raise RewardError(
                    f"reward {reward.name!r} has no gradient, but is a term of a sum: set its differentiable = False"
                )
            total = total + weight * scores.total
            for name, value in scores.components.items():
                copy = 2
                unique = name
                while unique in components:
                    unique, copy = f"{name} {copy}", copy + 1
                components[unique] = value
        check_finite(total, f"reward {self.name!r}, a sum of finite terms, is", 0)
        return Scores(total, components)


class FunctionReward(Reward):
    """A plain function f(images) -> (b,) as a reward.

    It gets ``prompts`` and ``labels`` if it has such parameters; they are required if these have no default.

    Args:
        function: the function; its attributes ``name``, ``differentiable``, ``batch_size`` and ``space`` are used if present.
        arguments: further arguments of the function.
    """

    def __init__(self, function: Callable[..., Any], **arguments: Any) -> None:
        super().__init__()
        parameters = _after_images(function)
        context = {key: parameters.pop(key) for key in ("prompts", "labels") if key in parameters}
        self.name = getattr(function, "name", getattr(function, "__name__", type(function).__name__))
        check_arguments(self.name, parameters, arguments)
        self.differentiable = getattr(function, "differentiable", True)
        self.batch_size = getattr(function, "batch_size", None)
        self.space = getattr(function, "space", PICTURES)
        self.function = partial(function, **arguments)
        self.context_names = tuple(context)
        self.needs = frozenset(key for key, parameter in context.items() if parameter.default is parameter.empty)

    def score(self, images: Tensor, prompts: Prompts = None, labels: Tensor | None = None) -> Tensor:
        context = {"prompts": prompts, "labels": labels}
        return self.function(images, **{key: context[key] for key in self.context_names})

    def _file(self) -> str | None:
        function = inspect.unwrap(self.function.func)
        code = getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))
        return code and code.co_filename


def _wide(samples: Tensor) -> Tensor:
    """The samples in float32 or wider: half precision is too coarse for sums."""
    return samples.to(torch.promote_types(samples.dtype, torch.float32))


def _after_images(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function after the first one, which takes the images."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise RewardError(f"{name!r} has no readable signature: wrap it, def reward(images): ...") from None
    first = next(iter(parameters.values()), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise RewardError(
            f"{name!r} is not a function of pictures: its first argument must take the pictures, def {name}(images)"
        )
    return dict(list(parameters.items())[1:])


def _terms(reward: Reward) -> list[tuple[float, Reward]]:
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]


# --- rewards by name -------------------------------------------------------------------------------------------------
GROUP = "steerfm.rewards"


def as_reward(reward: Any) -> Reward:
    """Turn a plain function into a Reward; a Reward stays as it is.

    Raises:
        RewardError: it is neither.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise RewardError(
            f"a reward is a function of images or a Reward, got {reward!r}: call the class, or use steerfm.reward"
        )
    return FunctionReward(reward)


def reward(spec: str | Callable[..., Any] | Reward, **arguments: Any) -> Reward:
    """Build a reward from a name, a function or a class.

    Args:
        spec: the name of an installed plug-in, ``pkg.mod:Name``, ``path/to/file.py:name``, a function, a Reward or its class.
        arguments: of the reward's class or function. ``offload=True`` moves its network to the CPU between calls; with
            ``one_process=True`` only the first of several processes computes it.

    Raises:
        RewardError: an unknown name or argument (the message suggests the nearest one), or a file that cannot be imported.
    """
    target = find(spec) if isinstance(spec, str) else spec
    if isinstance(target, Reward):
        if arguments:
            raise RewardError(f"reward {spec!r} is already built and takes no arguments: {', '.join(arguments)}")
        return target
    if "one_process" in arguments and "one_process" not in inspect.signature(target).parameters:
        if not isinstance(one := arguments.pop("one_process"), bool):
            raise RewardError(f"reward {spec!r}: one_process={one!r}: give true or false")
        out = reward(spec, **arguments)
        out.one_process = one
        return out
    if isinstance(target, type) and issubclass(target, Reward):
        return _build_class(target, arguments)
    if isinstance(target, type) or not callable(target):
        raise RewardError(f"reward {spec!r} is a {type(target).__name__}, not a function or a Reward")
    if isinstance(spec, str) and ":" in spec and not trust.is_own(spec):
        raise RewardError(f"reward {spec!r} is a function of an installed package: only a Reward class can be named there")
    return FunctionReward(target, **arguments)


@runtime_checkable
class Offloading(Protocol):
    """A reward that can move its network to the CPU between calls without a gradient, if ``offloads``."""

    offloads: bool

    def offload(self) -> None: ...


def _build_class(target: type[Reward], arguments: dict[str, Any]) -> Reward:
    takes = inspect.signature(target).parameters
    offloads = "offload" in arguments and "offload" not in takes and arguments.pop("offload")
    check_arguments(target.name, takes, arguments)
    out = target(**arguments)
    if offloads:
        if not isinstance(out, Offloading):
            raise RewardError(
                f"reward {target.name!r} cannot be offloaded, no network of it is loaded on the first call: remove offload"
            )
        out.offloads = True
    return out


def build(value: Any) -> Reward:
    """Build a reward from a configuration.

    Args:
        value: a name; {name: ..., weight: ..., arguments of the reward}, with the weight of the term in the total; a list of
            such terms; or a Reward or function.

    Raises:
        RewardError: there is no name or no term, or a weight is not a finite number; else as `reward`.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise RewardError("reward is an empty list: name at least one")
        return WeightedSum([_term(part) for part in value])
    weight, out = _term(value)
    return out if weight == 1 else weight * out


def _term(value: Any) -> tuple[float, Reward]:
    if not isinstance(value, Mapping):
        return 1.0, reward(value) if isinstance(value, str) else as_reward(value)
    arguments = {str(key): argument for key, argument in value.items()}
    name, weight = arguments.pop("name", None), arguments.pop("weight", 1.0)
    if not isinstance(name, str):
        raise RewardError("reward needs a name: {name: NAME, ...}")
    try:
        if isinstance(weight, bool) or not abs(weight := float(weight)) < float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        raise RewardError(f"weight of reward {name!r} is {weight!r}: must be a finite number") from None
    return weight, reward(name, **arguments)


def available() -> dict[str, EntryPoint]:
    """Installed reward plug-ins by name, without importing them."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find(spec: str, what: str = "reward") -> Any:
    """The class or function of a name.

    Args:
        spec: the name of a plug-in, ``pkg.mod:Name`` or ``path/to/file.py:name``.
        what: kind of object, for the message.

    Raises:
        RewardError: there is none; the message lists the names.
    """
    if ":" not in spec:
        points = available()
        if spec in points:
            try:
                with untouched():
                    return points[spec].load()
            except Exception as error:
                where = points[spec].value
                raise RewardError(f"cannot import reward {spec!r} ({where}): {type(error).__name__}: {error}") from error
        raise RewardError(
            f"unknown reward {spec!r}{trust.nearest(spec, points)}; installed: {', '.join(points) or 'none'}; "
            "your own: path/to/file.py:name"
        )
    try:
        with untouched():
            return trust.load(spec, what)
    except trust.CodeError as error:
        raise RewardError(str(error)) from error.__cause__


def check_arguments(name: str, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> None:
    """Check arguments against a signature before the call.

    Raises:
        RewardError: an unknown argument (the message suggests the nearest one), or a missing one.
    """
    kinds = {parameter.kind for parameter in parameters.values()}
    names = {
        key: parameter
        for key, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    choices = f"arguments: {', '.join(names) or 'none'}"
    for key in arguments:
        if key not in names and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise RewardError(f"reward {name!r} has no argument {key!r}{trust.nearest(key, names)}; {choices}")
    for key, parameter in names.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise RewardError(f"reward {name!r} is missing its argument {key!r}: pass {key}=...; {choices}")
