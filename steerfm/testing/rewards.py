"""The contract of a reward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfm.cost import Ledger
from steerfm.randomness import untouched
from steerfm.rewards import Reward, RewardError, as_reward
from steerfm.scores import MODEL, SPACES, VIDEO
from steerfm.testing.contract import ContractError, after_seed, failing, furthest, moves_global_state, near, pictures, require

N = 4


@dataclass
class Probe:
    """A reward and its test inputs.

    Attributes:
        reward: the reward.
        images: (N, *shape) noise in the reward's space.
        prompts: N texts.
        labels: (N,) class indices.
    """

    reward: Reward
    images: Tensor
    prompts: list[str]
    labels: Tensor

    @property
    def name(self) -> str:
        return f"reward {self.reward.name!r}"

    @property
    def bounded(self) -> bool:
        """Whether it reads pictures or video in [0, 1], and not vectors or the model's space."""
        return self.reward.space != MODEL and self.images.ndim >= 4

    @property
    def samples(self) -> str:
        return self.reward.space if self.bounded else "vectors" if self.reward.space != MODEL else "samples"

    def __call__(self, images: Tensor | None = None, rows: slice | list[int] = slice(None)) -> Tensor:
        """Values of some rows, with all checks; a failure breaks the contract."""
        with failing(self.name):
            return self.reward((self.images if images is None else images)[rows], **self.context(rows))

    def score(self, images: Tensor) -> Tensor:
        """Call the user's `score` directly: without copies, checks or restored state."""
        groups: dict[str, Any] = {"groups": None} if self.reward.groupwise else {}
        return self.reward.score(images.clone(), **self.context(), **groups)

    def context(self, rows: slice | list[int] = slice(None)) -> dict[str, Any]:
        numbers = range(N)[rows] if isinstance(rows, slice) else rows
        return {"prompts": [self.prompts[row] for row in numbers], "labels": self.labels[list(numbers)]}

    def shades(self) -> Tensor:
        """(N, *shape): constant rows, from the lowest to the highest possible value."""
        levels = torch.linspace(0, 1, N) if self.bounded else torch.linspace(-1, 1, N)
        return levels.view(N, *(1,) * (self.images.ndim - 1)).expand_as(self.images).clone()

    def has_hook(self) -> bool:
        """Whether it defines `score` or `send`; a sum does not."""
        return type(self.reward).score is not Reward.score or type(self.reward).send is not Reward.send


def check_reward(
    reward: Reward | Callable[..., Any],
    shape: Sequence[int] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    labels: Tensor | None = None,
) -> None:
    """Check a reward against the contract of steering and tuning.

    Args:
        reward: a Reward, or a function of pictures.
        shape: of one input: a picture (c, h, w) (default (3, 32, 32)), a vector (d,), a video (c, f, h, w) (default
            (3, 4, 32, 32)), or a sample of the model (default (4, 8, 8)).
        prompts: four texts; default simple objects.
        labels: (4,) class indices; default 0 to 3.

    Raises:
        ContractError: the first violation and its fix, in one sentence.
    """
    with failing("the reward"):
        out = as_reward(reward)
    words = ["a red heart", "a dog", "a house", "an airplane"] if prompts is None else list(prompts)
    classes = torch.arange(N) if labels is None else labels
    if len(words) != N or len(classes) != N:
        raise ValueError(f"check_reward takes {N} prompts and {N} labels, got {len(words)} and {len(classes)}")
    probe = Probe(out, _samples(out, shape), words, classes)
    with untouched():
        for check in CHECKS:
            check(probe)


def _samples(reward: Reward, shape: Sequence[int] | None) -> Tensor:
    """(N, *shape) noise: pictures and video in [0, 1]; vectors and samples in the model's space are normal."""
    require(
        reward.space in SPACES,
        f"reward {reward.name!r} has space = {reward.space!r}",
        f"it must be one of {', '.join(map(repr, SPACES))}",
    )
    require(
        len(reward.spaces) == 1,
        f"reward {reward.name!r} reads {reward.space} and the model's space",
        "check its terms one by one",
    )
    size = tuple(shape or {VIDEO: (3, 4, 32, 32), MODEL: (4, 8, 8)}.get(reward.space, (3, 32, 32)))
    return pictures(N, size, bounded=reward.space != MODEL and len(size) >= 3)


def facts(probe: Probe) -> None:
    """It has a name and a valid range, and needs at most labels and prompts."""
    reward, low, high = probe.reward, *probe.reward.range
    require(reward.name, "a reward has no name", 'set name = "..." on its class')
    require(low < high, f"{probe.name} has the range {reward.range}", "range = (lowest, highest) value that it can have")
    require(
        set(reward.needs) <= {"labels", "prompts"},
        f"{probe.name} needs {sorted(reward.needs)}",
        'needs may hold "labels" and "prompts" only',
    )
    require(
        not any(parameter.requires_grad for parameter in reward.parameters()),
        f"{probe.name} has weights that ask for gradients",
        "end its __init__ with self.requires_grad_(False)",
    )


def values(probe: Probe) -> None:
    """It returns one finite value for each picture, in its range, for noise and for constant pictures."""
    low, high = probe.reward.range
    for images, what in (
        (probe.images, "noise"),
        (probe.shades(), f"plain {probe.samples}" if probe.bounded else probe.samples),
    ):
        try:
            value = probe(images)
            require(
                (value >= low - 1e-5).all() and (value <= high + 1e-5).all(),
                f"{probe.name} gives {value.min():.4g} to {value.max():.4g} on {what}, outside its range ({low:g}, {high:g})",
                "widen range, or clamp the value",
            )
        except ContractError as error:
            if _works_signed(probe, images):
                raise ContractError(
                    f"{probe.name} works for pictures in [-1, 1] only, but gets them in [0, 1]: "
                    "begin its score with images = 2 * images - 1"
                ) from error
            if getattr(error.__cause__, "sample", None) is not None:
                raise ContractError(f"{error} of {what}: guard its logs, roots and divisions") from error
            raise


def _works_signed(probe: Probe, images: Tensor) -> bool:
    """Whether a reward that fails for pictures in [0, 1] works for the same pictures in [-1, 1]."""
    low, high = probe.reward.range
    if not probe.bounded or not probe.has_hook():
        return False
    try:
        value = torch.as_tensor(probe.score(2 * images - 1))
        fits = value.shape == (N,) and bool(torch.isfinite(value).all())
        return fits and bool((value >= low - 1e-5).all() and (value <= high + 1e-5).all())
    except Exception:
        return False


def refusals(probe: Probe) -> None:
    """It refuses inputs that are not pictures in [0, 1]."""
    broken = probe.images.clone()
    broken.view(-1)[1] = float("nan")
    signed = {f"{probe.samples} in [-1, 1]": 2 * probe.images - 1} if probe.bounded else {}
    for what, images in (signed | {f"{probe.samples} of NaN": broken}).items():
        try:
            probe.reward(images, **probe.context())
        except RewardError:
            continue
        except Exception as error:
            raise ContractError(f"{probe.name} fails for {what}: leave __call__ to Reward, and write score") from error
        raise ContractError(f"{probe.name} accepts {what} without an error: leave __call__ to Reward, and write score")


def repeats(probe: Probe) -> None:
    """It returns the same values again, for any global random state, and does not change that state."""
    first = after_seed(0, probe)
    own = "draw from a torch.Generator of its own, seeded alike at every call"
    require(near(first, after_seed(1, probe), 1e-6), f"{probe.name} depends on the global random state", own)
    require(near(first, after_seed(0, probe), 1e-6), f"{probe.name} gives other values for the same pictures", own)
    if probe.has_hook():
        with failing(probe.name):
            changes_state = moves_global_state(lambda: probe.score(probe.images))
        require(not changes_state, f"{probe.name} seeds or draws from a global random state", own)


def rows(probe: Probe) -> None:
    """It scores every picture separately, or, if groupwise, the pictures of one group together."""
    whole = probe()
    if not probe.reward.groupwise:
        alone = torch.cat([probe(rows=slice(i, i + 1)) for i in range(N)])
        row = furthest(whole, alone)
        require(
            near(whole, alone),
            f"{probe.name} gives picture {row} the value {whole[row]:.6g} among {N} and {alone[row]:.6g} alone",
            "score every picture by itself (no mean or norm over the batch), or say groupwise = True",
        )
        return
    with failing(probe.name):
        groups = torch.tensor([0, 0, 1, 1])
        together = probe.reward.evaluate(probe.images, **probe.context(), groups=groups).total
    parts = torch.cat([probe(rows=slice(0, 2)), probe(rows=slice(2, 4))])
    require(
        near(together, parts),
        f"{probe.name} compares pictures of different groups",
        "compare only pictures with equal entries in groups",
    )


def parts(probe: Probe) -> None:
    """Parts of a batch have the same values, and every picture is counted once."""
    before, whole = probe.reward.batch_size, probe()
    probe.reward.batch_size = N - 1
    try:
        with Ledger() as ledger:
            in_parts = probe()
    finally:
        probe.reward.batch_size = before
    require(near(whole, in_parts), f"{probe.name} gives other values in parts of {N - 1}", "score every picture by itself")
    require(
        ledger.cost.reward_calls == N,
        f"{probe.name} counts {ledger.cost.reward_calls} calls for {N} pictures",
        "leave __call__ and evaluate to Reward, and write score",
    )


def context(probe: Probe) -> None:
    """It needs no labels or prompts but those in ``needs``."""
    everything = probe.context()
    inputs = {key: everything[key] if key in probe.reward.needs else None for key in everything}
    fix = "add what it reads to needs, or work without it when it is None"
    try:
        probe.reward(probe.images, **inputs)
    except Exception as error:
        inputs_text = ", ".join(sorted(probe.reward.needs)) or "neither labels nor prompts"
        raise ContractError(f"{probe.name} says that it needs {inputs_text}, and fails where it gets no more: {fix}") from error
    for need in probe.reward.needs:
        try:
            probe.reward(probe.images, **everything | {need: None})
        except RewardError:
            continue
        except Exception as error:
            raise ContractError(f"{probe.name} fails without {need}: leave __call__ to Reward, and write score") from error
        raise ContractError(f"{probe.name} needs {need} but works without: take it out of needs")


def gradients(probe: Probe) -> None:
    """Its gradient is the derivative of its value; a black box has no gradient."""
    if not probe.reward.differentiable:
        require(
            not _true_gradient_of_score(probe),
            f"{probe.name} says differentiable = False, but has a gradient",
            "say differentiable = True, or compute under torch.no_grad()",
        )
        return
    fix = "compute with torch from the pictures on (no numpy, item, detach or round), or say differentiable = False"
    gradient = _gradient(probe, probe.images, fix)
    require(
        torch.isfinite(gradient).all(),
        f"{probe.name} has a gradient of NaN or inf on noise",
        "add an epsilon to roots, logs and norms",
    )
    require(gradient.abs().max() > 0, f"{probe.name} has a gradient of zero on noise", fix)
    grey = _gradient(probe, torch.full_like(probe.images, 0.5), fix)
    require(
        torch.isfinite(grey).all(),
        f"{probe.name} has a gradient of NaN or inf on pictures of one grey",
        "add an epsilon to roots, logs and norms",
    )
    require(
        _is_slope(probe, probe, gradient),
        f"{probe.name} has a gradient that is not that of its value",
        "compute both in one way; a straight-through estimate says differentiable = False",
    )


def _gradient(probe: Probe, images: Tensor, fix: str) -> Tensor:
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        value = probe(images)
        require(value.requires_grad, f"{probe.name} says that it is differentiable, but its value has no gradient", fix)
        (gradient,) = torch.autograd.grad(value.sum(), images, allow_unused=True)
    require(gradient is not None, f"{probe.name} says that it is differentiable, but no gradient reaches the pictures", fix)
    return gradient


def _true_gradient_of_score(probe: Probe) -> bool:
    """Whether a declared black box has a correct gradient after all."""
    if not probe.has_hook():
        return False
    images = probe.images.clone().requires_grad_()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(probe.score(images).sum(), images)
    except Exception:
        return False
    return bool(torch.isfinite(gradient).all() and gradient.abs().max() > 0) and _is_slope(probe, probe, gradient)


def _is_slope(probe: Probe, value: Callable[[Tensor], Tensor], gradient: Tensor) -> bool:
    """Whether steps along the gradient change the value as predicted, for one of five step lengths (rounding, kinks)."""
    largest = gradient.flatten(1).abs().amax(1).clamp_min(1e-30)
    direction = gradient / largest.view(-1, *(1,) * (gradient.ndim - 1))
    for step in (1e-2, 5e-2, 1e-3, 1e-4, 1e-5):
        ahead, behind = (_move(probe, sign * step * direction) for sign in (1, -1))
        with torch.no_grad():
            change = (value(ahead) - value(behind)).sum()
        expected = (gradient * (ahead - behind)).sum()
        if 0.75 * expected <= change <= 1.25 * expected and expected > 0:
            return True
    return False


def _move(probe: Probe, by: Tensor) -> Tensor:
    return (probe.images + by).clamp(0, 1) if probe.bounded else probe.images + by


def memory(probe: Probe) -> None:
    """It keeps neither pictures nor graphs after a call."""
    alive = []
    for _ in range(2):  # the first call may create objects that stay
        images = probe.images.clone().requires_grad_()
        value = probe(images)
        alive = [weakref.ref(images), weakref.ref(value)]
        del images, value
    require(
        all(ref() is None for ref in alive),
        f"{probe.name} keeps pictures or values after the call, until memory is full",
        "store nothing of them on self",
    )


def precision(probe: Probe) -> None:
    """It accepts pictures in half precision and runs under autocast."""
    half = probe(probe.images.half())
    require(
        near(half, probe(probe.images.half().float())),
        f"{probe.name} gives other values in half precision",
        "leave __call__ to Reward, which passes float32 on",
    )
    with torch.autocast("cpu", torch.bfloat16):
        value = probe()
    require(
        value.dtype == torch.float32 and torch.isfinite(value).all(),
        f"{probe.name} is not finite float32 under autocast",
        "cast to float32 where 16 bits are not enough",
    )


CHECKS = (facts, values, refusals, repeats, rows, parts, context, gradients, memory, precision)
"""The checks of `check_reward`, in this order; see their docstrings."""
