"""Flow maps around the networks of pipelines: one class per parameterisation.

States are always on the linear path, x_t = t data + (1 - t) noise; each class converts to the network's own path.

    LinearMap               flow matching: the network predicts +-(noise - data), and time is t, 1 - t or 1000 (1 - t)
    VariancePreservingMap   diffusion, z = a data + b noise: the network predicts noise, data or v at one of 1000 indices
    PreconditionedMap       diffusion of EDM, z = data + sigma noise, with the scalings of its scheduler
    TrigonometricMap        z = cos(th) data + sin(th) noise: consistency models (sCM)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steerfm.capabilities import VELOCITY
from steerfm.cost import count
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.models import paths
from steerfm.models.capture import rows_of
from steerfm.models.decoders import Decoder
from steerfm.models.layout import Layout
from steerfm.rows import Condition, map_condition, move_condition
from steerfm.transitions import Step, Transition


class Source(Protocol):
    """The source of conditions, by prompt: `prompts.Prompts`."""

    pipe: Any
    dropped: bool

    def condition(self, prompts: Sequence[str] | None, n: int) -> Condition: ...

    @property
    def null(self) -> Condition: ...

    def drop_text_encoders(self) -> None: ...


class PipelineMap(FlowMap):
    """A flow map around the network of a pipeline. The network, its weights and the autoencoder are the pipeline's own.

    Attributes:
        network: the pipeline's transformer or unet.
        layout: which arguments of the network follow the prompts.
        prompts: the conditions, by prompt.
        times: the grid for a number of steps.
        decoder: latents to pictures; None if the autoencoder is not supported.
        stacked: whether the network takes both times in one argument, (b, 2); see `two_time`.
    """

    capabilities = VELOCITY
    stacked = False

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        layout: Layout,
        prompts: Source,
        times: Callable[[int], list[float]],
        decoder: Decoder | None,
    ) -> None:
        super().__init__(shape)
        self.network, self.decoder = network, decoder
        self.layout, self.prompts, self.times = layout, prompts, times

    @property
    def body(self) -> nn.Module:
        return self.network

    def with_network(self, network: nn.Module) -> PipelineMap:
        """The same map with another network, without a copy."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": network}
        return other

    # --- the network ---------------------------------------------------------------------------------------------
    def predict(self, x: Tensor, times: Sequence[Tensor], cond: Condition) -> Tensor:
        """Call the network; returns (b, *shape) in the precision of x.

        Args:
            x: (b, *shape) the network's input.
            times: (b,) each, in the network's own units: the time, and for a two-time network the time to jump to.
            cond: rows from `condition`; None for the default prompts of the map.
        """
        b, layout = len(x), self.layout
        rows = self.prompts.condition(None, b) if cond is None else cond
        assert rows is None or isinstance(rows, Mapping)
        if self.dtype != layout.dtype:  # the map was cast after its prompts were encoded
            rows = map_condition(lambda row: row.to(self.dtype) if row.dtype == layout.dtype else row, rows)
            assert rows is None or isinstance(rows, Mapping)
        arguments = layout.give(rows or {}, b)
        states: Any = x.to(self.dtype)
        if layout.listed is not None:
            states = list(states.reshape(b, *layout.listed).unbind(0))
        arguments[layout.states] = states
        like = layout.reference
        forms = [time.to(like.dtype if like.is_floating_point() else x.dtype) for time in times]
        if self.stacked:
            arguments[layout.time] = torch.stack(forms, -1)
        else:
            for name, form in zip((layout.time, layout.second_time), forms):
                if name is not None:
                    arguments[name] = form.view(-1, *[1] * (like.ndim - 1)).expand(b, *like.shape[1:])
        out = self.network(**arguments, return_dict=False)[0]
        return rows_of(out, self.shape, type(self.network).__name__).to(x)  # an offloaded network may return on another device

    def at_door(self, x: Tensor) -> Tensor:
        return x  # states and times stay float32 up to the call: times in half precision would be too coarse

    # --- conditions and times ------------------------------------------------------------------------------------
    def condition(self, labels: str | int | Sequence[str | int] | None, n: int) -> Condition:
        """The condition of prompts; each distinct prompt is encoded once.

        Args:
            labels: one prompt for all rows, or one for each; None for the default prompts of the map.
            n: number of rows.

        Raises:
            ValueError: the numbers of prompts and rows differ, or a prompt is new after the text encoders were dropped.
        """
        if labels is None:
            return move_condition(self.prompts.condition(None, n), self.device)
        prompts = [str(labels)] * n if isinstance(labels, str | int) else [str(label) for label in labels]
        if len(prompts) != n:
            raise ValueError(f"{len(prompts)} prompts for n={n} outputs: give one prompt, or one per output")
        return move_condition(self.prompts.condition(prompts, n), self.device)

    @property
    def null(self) -> Condition:
        """The negative prompt, or the empty one."""
        return self.prompts.null

    def grid(self, steps: int) -> list[float]:
        """The pipeline's own times for a number of steps: 0 first and 1 last."""
        return self.times(steps)

    def drop_text_encoders(self) -> None:
        """Free the text encoders; prompts that are already encoded stay available."""
        self.prompts.drop_text_encoders()

    # --- pictures ------------------------------------------------------------------------------------------------
    def decode(self, z: Tensor) -> Tensor:
        """Latents to pictures (b, c, h, w), or videos (b, c, f, h, w), in [0, 1], float32; differentiable."""
        count("decodes", len(z))
        return self._decoder()(z)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1] to latents (b, *shape), float32."""
        return self._decoder().encode(pictures)

    def _decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError(f"latents {self.shape} cannot be decoded: subclass this map and implement decode()")
        return self.decoder


class LinearMap(PipelineMap):
    """Flow matching, x_t = t data + (1 - t) noise, with one time or two.

    Args:
        factor: the network predicts factor (noise - data): 1 or -1.
        slope: its time is offset + slope t, such as 1000 - 1000 t.
        offset: see ``slope``.
    """

    factor, slope, offset = 1.0, -1.0, 1.0

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        times = [self.offset + self.slope * time for time in (s, t)]
        return -self.factor * self.predict(x, times, cond)


class VariancePreservingMap(PipelineMap):
    """Diffusion, z = a data + b noise with a^2 + b^2 = 1, on the linear path: x = z / (a + b) at t = a / (a + b).

    Attributes:
        path: a and b by index.
        ends: converts the prediction to both ends, such as `paths.ends_of_noise`.
        scalings: (skip, output) of a consistency model at indices (b,), X_{s,1} = skip z + output data; None for other models.
    """

    path: paths.VariancePreserving
    ends: Callable[[Tensor, Tensor, paths.Weights], paths.Ends]
    scalings: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        time = expand_time(s, x)
        at = s.clamp(self.path.first, self.path.last)
        z, index = x / paths.spread(time), self.path.own_time(at)
        weights = self.path.weights(expand_time(at, x))
        ends = self.ends(z, self.predict(z, (index,), cond), weights)
        if self.scalings is None:
            return paths.velocity(x, time, ends, self.path.first, self.path.last)
        skip, output = (expand_time(scale, x) for scale in self.scalings(index))
        return _towards(x, skip * z + output * ends.data, time)


class PreconditionedMap(PipelineMap):
    """Diffusion of EDM, z = data + sigma noise, with scalings around the network (Karras et al. 2206.00364, equation 7).

    Attributes:
        scheduler: with `precondition_inputs`, `precondition_noise` and `precondition_outputs`.
        first: our time of its largest sigma, t = 1 / (1 + sigma).
        last: our time of its smallest sigma.
    """

    scheduler: Any
    first: float
    last: float

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        time, scheduler = expand_time(s, x), self.scheduler
        near = time.clamp(self.first, self.last)
        sigma = (1 - near) / near
        z = x / near * (paths.spread(near) / paths.spread(time))
        out = self.predict(scheduler.precondition_inputs(z, sigma), (scheduler.precondition_noise(sigma).flatten(),), cond)
        ends = paths.ends_of_data(z, scheduler.precondition_outputs(z, out, sigma), paths.Weights(1.0, sigma))
        return paths.velocity(x, time, ends, self.first, self.last)


class TrigonometricMap(PipelineMap):
    """A consistency model of z = cos(th) data + sin(th) noise (sCM, Lu & Song 2410.11081), as SANA-Sprint has it (2503.09641).

    The network was trained on from flow matching: its input is x itself with the time 1 - t. F, with endpoint
    cos(th) z - sin(th) F, follows from its output. Only X_{s,1} is exact.
    """

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        time, sigma = expand_time(s, x), expand_time(1 - s, x)
        n = paths.spread(time)
        out = self.predict(x, (1 - s,), cond)
        F = ((1 - 2 * sigma) * x + (1 - 2 * sigma + 2 * sigma**2) * out) / n
        return _towards(x, (time * x / n - sigma * F) / n, time)


def _towards(x: Tensor, end: Tensor, s: Tensor) -> Tensor:
    """u(x, s, t) of a map with X_{s,1} only: the straight line there, for any t."""
    return (end - x) / (1 - s).clamp_min(torch.finfo(x.dtype).eps)


# --- transitions -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Within:
    """A transition between the first and the last time of a scheduler.

    A diffusion scheduler starts with pure noise at its first time, although states there contain some data. Some schedulers
    also return their last state as data, although it contains some noise. This transition does the same, to reproduce their
    results.

    Args:
        inner: the transition.
        starts: by the time after the first step: the scheduler's first time, and its factor of the noise.
        first: the same for times that the scheduler does not have.
        last: the scheduler's last time, and the factor that turns the state there into data.
    """

    inner: Transition
    starts: Mapping[float, tuple[float, float]]
    first: tuple[float, float]
    last: tuple[float, float] = (1.0, 1.0)

    @property
    def stochastic(self) -> bool:
        return self.inner.stochastic

    @property
    def endpoint(self) -> str:
        return ""  # a look-ahead uses the nominal time of the state, not that of the scheduler

    @property
    def lands(self) -> bool:
        return True

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        if s == 0:
            s, scale = self.starts.get(t, self.first)
            x = x * scale
        last, scale = self.last
        if t < 1 or last == 1:
            return self.inner.step(flow_map, x, s, t, cond)
        step = self.inner.step(flow_map, x, s, last, cond)
        return Step(step.mean * scale, step.std * scale)


@dataclass(frozen=True)
class Overshoot:
    """A jump past the next time, and noise back to it: the sampling of TCD (Zheng et al. 2402.19159, section 4.3).

    Args:
        eta: how far a step goes past the next index, as a share of it, in (0, 1].
        path: of the indices.
    """

    eta: float
    path: paths.VariancePreserving
    stochastic, endpoint, lands = True, "", True

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        index = float(self.path.own_time(torch.tensor(t, dtype=torch.float64)))
        r = max(t, self.path.time_at(math.floor((1 - self.eta) * index + 1e-6)))
        scale, std = flow_map.interpolant.renoise(r, t)
        return Step(scale * flow_map.jump(x, s, r, cond), std)
