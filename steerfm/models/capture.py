"""Record the inputs that a pipeline of diffusers gives to its network and its scheduler, in its own first call.

The pipeline itself runs, up to its network or to its first step, and stops there. So its handling of prompts, sizes and times
needs no copy here. Only this file depends on how pipelines call their parts.
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
"""Names of the states, the time, and the second time of a two-time map, in networks."""


@dataclass
class Call:
    """One call of the network: its arguments by name, and its output."""

    arguments: dict[str, Any]
    output: Any = None

    def among(self, names: tuple[str, ...]) -> str | None:
        """The first of the names that has a value."""
        return next((name for name in names if self.arguments.get(name) is not None), None)


@dataclass
class Recording:
    """The recording of a pipeline's call.

    Attributes:
        calls: of the network, before the first step; two if guidance calls it twice.
        after: the call after the first step (which does not move the state here); None if not reached.
        model_output: argument of the scheduler's first step; None if not reached.
        timestep: likewise.
        sample: likewise.
        timesteps: of the scheduler at the first call of the network.
        sigmas: likewise.
        schedule: arguments of the scheduler's `set_timesteps`.
        size: (height, width) of the pictures in pixels.
        encoded: results of `encode_prompt`, call by call.
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
    """The networks of a pipeline, by name: one, or one for early and one for late times.

    Raises:
        ValueError: it has no network with a scheduler, or two networks without a boundary.
    """
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    network, second = getattr(pipe, name, None), getattr(pipe, "transformer_2", None)
    if not isinstance(network, nn.Module) or not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise ValueError(f"{type(pipe).__name__}: a pipeline with a transformer or unet and a scheduler is needed")
    if not isinstance(second, nn.Module):
        return {name: network}
    if "boundary_ratio" not in pipe.config:
        raise ValueError(f"{type(pipe).__name__} has two networks and no boundary_ratio: use one with transformer_2=None")
    return {name: network} if pipe.config.boundary_ratio is None else {name: network, "transformer_2": second}


def denoiser(pipe: Any) -> nn.Module:
    """The first network of a pipeline. Raises as `denoisers` does."""
    return next(iter(denoisers(pipe).values()))


def parameters(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call with their defaults; None for those without."""
    signature = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in signature if p.name != "self"}


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError, with the nearest name, if a pipeline's call does not have an argument."""
    names = parameters(pipe)
    for name in arguments:
        if name not in names:
            raise ValueError(f"{type(pipe).__name__} takes no {name}={nearest(name, names)}: it takes {', '.join(names)}")


def record(pipe: Any, arguments: Mapping[str, Any], calls: int | None = None, encoded: list[Any] | None = None) -> Recording:
    """Run a pipeline's own call up to its first step.

    Args:
        pipe: the pipeline.
        arguments: of its call; the initial noise is drawn from a separate stream.
        calls: stop at this call of the network, before it runs; None: continue to the call after the first step.
        encoded: results for `encode_prompt`, call by call, in place of encoding.

    Raises:
        ValueError: the call fails, or ends without a step; in one line.
    """
    recording, what = Recording(), type(pipe).__name__
    usual = {"output_type": "latent", "return_dict": False, "generator": stream(0)}
    options = {name: value for name, value in usual.items() if name in parameters(pipe)} | dict(arguments)
    try:
        with ExitStack() as stack:
            stack.enter_context(untouched())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Watch(pipe, recording, calls, encoded).attach())
            pipe(**options)
    except _Enough:
        return recording
    except Exception as error:
        if recording.sample is not None:  # an error after the step, which does not move the state; the rest is recorded
            return recording
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"{what} cannot be called: {type(error).__name__}: {lines[0]}") from error
    finally:
        if hasattr(pipe, "maybe_free_model_hooks"):  # move offloaded models out again
            pipe.maybe_free_model_hooks()
    if recording.sample is not None:
        return recording
    raise ValueError(f"{what}: its call ends without a step of its scheduler, so there is nothing to capture")


class _Watch:
    """Patches the parts of a pipeline for one call, and records their inputs."""

    def __init__(self, pipe: Any, recording: Recording, calls: int | None, encoded: list[Any] | None) -> None:
        self.pipe, self.networks, self.scheduler = pipe, denoisers(pipe).values(), pipe.scheduler
        self.recording, self.calls, self.memory = recording, calls, list(encoded or ())
        self.signature = inspect.signature(denoiser(pipe).forward)

    @contextmanager
    def attach(self) -> Iterator[None]:
        """A context with the patches in place."""
        with ExitStack() as stack:
            for method in (self.step, self.set_timesteps):
                stack.enter_context(_patch(self.scheduler, method))
            for method in (self.prepare_latents, self.encode_prompt, self.progress_bar):
                stack.enter_context(_patch(self.pipe, method))
            for network in self.networks:
                stack.callback(network.register_forward_pre_hook(self.entering, with_kwargs=True).remove)
                stack.callback(network.register_forward_hook(self.leaving, with_kwargs=True).remove)
            yield

    # --- the network ---------------------------------------------------------------------------------------------
    def entering(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording, call = self.recording, Call(_bind(self.signature, args, kwargs))
        if recording.sample is not None:
            recording.after = call
            raise _Enough
        recording.calls.append(call)
        recording.timesteps, recording.sigmas = self.scheduler.timesteps, getattr(self.scheduler, "sigmas", None)
        if len(recording.calls) == self.calls:
            raise _Enough

    def leaving(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.recording.calls[-1].output = output[0] if isinstance(output, tuple) else output.sample

    # --- the scheduler -------------------------------------------------------------------------------------------
    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments, recording = _bind(inspect.signature(original), args, kwargs), self.recording
        recording.model_output, recording.timestep, recording.sample = (
            arguments[name] for name in ("model_output", "timestep", "sample")
        )
        return arguments["sample"], arguments["sample"]  # do not move the state; some pipelines read two values

    def set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.recording.schedule = _bind(inspect.signature(original), args, kwargs)
        return original(*args, **kwargs)

    # --- the pipeline --------------------------------------------------------------------------------------------
    def prepare_latents(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = _bind(inspect.signature(original), args, kwargs)
        if "height" in arguments and "width" in arguments:
            self.recording.size = int(arguments["height"]), int(arguments["width"])
        return original(*args, **kwargs)

    def encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = self.memory.pop(0) if self.memory else original(*args, **kwargs)
        self.recording.encoded.append(out)
        return out

    def progress_bar(self, original: Callable[..., Any], iterable: Any = None, total: int | None = None) -> Any:
        from tqdm import tqdm

        return tqdm(iterable, total=total, disable=True)


@contextmanager
def _patch(owner: Any, function: Callable[..., Any]) -> Iterator[None]:
    """A context that replaces a method of one object, with the same signature, since pipelines inspect it."""
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


def _bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, including those for ``**``."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


# --- rows ------------------------------------------------------------------------------------------------------------
def rows_of(output: Any, shape: torch.Size | tuple[int, ...], what: str) -> Tensor:
    """A network's output as (b, *shape): a list is stacked, and a second half of the channels (a variance) is dropped.

    Raises:
        ValueError: the output has another shape.
    """
    out = torch.stack([row.float() for row in output]) if isinstance(output, list | tuple) else output
    shape = tuple(shape)
    if tuple(out.shape[1:]) == shape:
        return out
    if out[0].numel() == torch.Size(shape).numel() and 1 in out.shape[2:]:
        return out.reshape(len(out), *shape)
    if out.ndim == len(shape) + 1 and tuple(out.shape[1:]) == (2 * shape[0], *shape[1:]):
        return out[:, : shape[0]]
    raise ValueError(f"{what} returns {tuple(out.shape[1:])} for states of {shape}: the shapes must be equal")
