"""What a pipeline of diffusers gives its network and its scheduler, taken from its own first call.

The pipeline runs as it is, up to its network or to its first step, and stops there. So there is no copy of it here: whatever it
does to prompts, sizes and times is done. Nothing outside this file knows how pipelines call their parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.randomness import stream, untouched
from steerfm.trust import nearest

STATES = ("hidden_states", "sample", "x")
TIMES = ("timestep", "t")
SECOND_TIMES = ("r_timestep", "timestep_r", "target_timestep")
"""What networks call the states, the time, and the time that a two-time map jumps to."""


@dataclass
class Call:
    """One call of the network: its arguments by name, and what it gave."""

    arguments: dict[str, Any]
    output: Any = None

    def among(self, names: tuple[str, ...]) -> str | None:
        """The first of the names that has a value."""
        return next((name for name in names if self.arguments.get(name) is not None), None)


@dataclass
class Recording:
    """What was seen of a pipeline's call.

    Attributes:
        calls: of the network, before the first step: two where guidance calls it twice.
        after: the call after the first step, which leads nowhere here; None where it was not reached.
        model_output, timestep, sample: what the scheduler's first step was given; None where it was not reached.
        timesteps, sigmas: the scheduler's own, as they were at the first call of the network.
        schedule: arguments of the scheduler's `set_timesteps`.
        size: (height, width) in pixels that latents were made for.
        encoded: what `encode_prompt` gave, call by call.
    """

    calls: list[Call] = field(default_factory=list)
    after: Call | None = None
    model_output: Any = None
    timestep: Any = None
    sample: Any = None
    timesteps: Any = None
    sigmas: Any = None
    schedule: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    encoded: list[Any] = field(default_factory=list)


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """Stops the pipeline."""


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by what it calls them: one, or one for early and one for late times.

    Raises:
        ValueError: it has none that steps by one scheduler, or does not say when it takes which.
    """
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    network, second = getattr(pipe, name, None), getattr(pipe, "transformer_2", None)
    if not isinstance(network, nn.Module) or not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise ValueError(f"{type(pipe).__name__}: a pipeline with a transformer or unet and a scheduler is needed")
    if not isinstance(second, nn.Module):
        return {name: network}
    if "boundary_ratio" not in pipe.config:
        raise ValueError(f"{type(pipe).__name__} has two networks and no boundary_ratio: pass one with transformer_2=None")
    return {name: network} if pipe.config.boundary_ratio is None else {name: network, "transformer_2": second}


def denoiser(pipe: Any) -> nn.Module:
    """The network that a pipeline begins with. Raises as `denoisers` does."""
    return next(iter(denoisers(pipe).values()))


def parameters(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call with their defaults; None for those without."""
    signature = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in signature if p.name != "self"}


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raises a ValueError, with the nearest name, where a pipeline's call has no such argument."""
    names = parameters(pipe)
    for name in arguments:
        if name not in names:
            raise ValueError(f"{type(pipe).__name__} takes no {name}={nearest(name, names)}: it takes {', '.join(names)}")


def record(pipe: Any, arguments: Mapping[str, Any], calls: int | None = None, encoded: list[Any] | None = None) -> Recording:
    """Run a pipeline's own call up to its first step.

    Args:
        pipe: the pipeline.
        arguments: of its call; the start noise is drawn from a stream of its own.
        calls: stop as the network is called for this time, before it runs; None goes on to the call after the first step.
        encoded: what `encode_prompt` is to give in place of encoding, call by call.

    Raises:
        ValueError: it fails, or ends without a step; in one line.
    """
    seen, what = Recording(), type(pipe).__name__
    usual = {"output_type": "latent", "return_dict": False, "generator": stream(0)}
    given = {name: value for name, value in usual.items() if name in parameters(pipe)} | dict(arguments)
    try:
        with ExitStack() as stack:
            stack.enter_context(untouched())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Watch(pipe, seen, calls, encoded).attached())
            pipe(**given)
    except _Enough:
        return seen
    except Exception as error:
        if seen.sample is not None:  # of what it makes of a step that leads nowhere; all else is there
            return seen
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"{what} cannot be called: {type(error).__name__}: {lines[0]}") from error
    finally:
        if hasattr(pipe, "maybe_free_model_hooks"):  # a model that was moved in for the call goes out again
            pipe.maybe_free_model_hooks()
    if seen.sample is not None:
        return seen
    raise ValueError(f"{what}: its call ends without a step of its scheduler, so there is nothing to capture")


class _Watch:
    """Stands between a pipeline and its parts, for one call, and writes down what passes."""

    def __init__(self, pipe: Any, seen: Recording, calls: int | None, encoded: list[Any] | None) -> None:
        self.pipe, self.networks, self.scheduler = pipe, denoisers(pipe).values(), pipe.scheduler
        self.seen, self.calls, self.memory = seen, calls, list(encoded or ())
        self.signature = inspect.signature(denoiser(pipe).forward)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, it stands there; afterwards all is as it was."""
        with ExitStack() as stack:
            for method in (self.step, self.set_timesteps):
                stack.enter_context(_replaced(self.scheduler, method))
            for method in (self.prepare_latents, self.encode_prompt, self.progress_bar):
                stack.enter_context(_replaced(self.pipe, method))
            for network in self.networks:
                stack.callback(network.register_forward_pre_hook(self.entering, with_kwargs=True).remove)
                stack.callback(network.register_forward_hook(self.leaving, with_kwargs=True).remove)
            yield

    # --- the network ---------------------------------------------------------------------------------------------
    def entering(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen, call = self.seen, Call(_bound(self.signature, args, kwargs))
        if seen.sample is not None:
            seen.after = call
            raise _Enough
        seen.calls.append(call)
        seen.timesteps, seen.sigmas = self.scheduler.timesteps, getattr(self.scheduler, "sigmas", None)
        if len(seen.calls) == self.calls:
            raise _Enough

    def leaving(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.seen.calls[-1].output = output[0] if isinstance(output, tuple) else output.sample

    # --- the scheduler -------------------------------------------------------------------------------------------
    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound, seen = _bound(inspect.signature(original), args, kwargs), self.seen
        seen.model_output, seen.timestep, seen.sample = (bound[name] for name in ("model_output", "timestep", "sample"))
        return bound["sample"], bound["sample"]  # a step that leads nowhere; some pipelines read two

    def set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.seen.schedule = _bound(inspect.signature(original), args, kwargs)
        return original(*args, **kwargs)

    # --- the pipeline --------------------------------------------------------------------------------------------
    def prepare_latents(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = _bound(inspect.signature(original), args, kwargs)
        if "height" in bound and "width" in bound:
            self.seen.size = int(bound["height"]), int(bound["width"])
        return original(*args, **kwargs)

    def encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = self.memory.pop(0) if self.memory else original(*args, **kwargs)
        self.seen.encoded.append(out)
        return out

    def progress_bar(self, original: Callable[..., Any], iterable: Any = None, total: int | None = None) -> Any:
        from tqdm import tqdm

        return tqdm(iterable, total=total, disable=True)


@contextmanager
def _replaced(owner: Any, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one object replaced for a while; pipelines ask for its signature, so that must stay."""
    name = function.__name__
    original, own = getattr(owner, name, None), vars(owner).get(name)
    if original is None:
        yield
        return

    @wraps(original)
    def instead(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    setattr(owner, name, instead)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; those that a function takes by ``**`` among them."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


# --- rows ------------------------------------------------------------------------------------------------------------
def rows_of(output: Any, shape: torch.Size | tuple[int, ...], what: str) -> Tensor:
    """What a network gave, as (b, *shape): a list is stacked, a second half of the channels (a variance) is left out.

    Raises:
        ValueError: it is of another shape.
    """
    out = torch.stack([row.float() for row in output]) if isinstance(output, list | tuple) else output
    shape = tuple(shape)
    if tuple(out.shape[1:]) == shape:
        return out
    if out[0].numel() == torch.Size(shape).numel() and 1 in out.shape[2:]:
        return out.reshape(len(out), *shape)
    if out.ndim == len(shape) + 1 and tuple(out.shape[1:]) == (2 * shape[0], *shape[1:]):
        return out[:, : shape[0]]
    raise ValueError(f"{what} gives {tuple(out.shape[1:])} for states of {shape}: a network of the same shape is needed")
