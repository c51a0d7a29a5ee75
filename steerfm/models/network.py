"""A network in its own convention as a flow map.

>>> fm = steerfm.VelocityModel(net, (3, 32, 32))                                    # flow matching, data at 0 and noise at 1
>>> fm = steerfm.VelocityModel(net, (4, 64, 64), predicts="noise", path="vp", alphas_cumprod=scheduler.alphas_cumprod)
>>> fm = steerfm.VelocityModel(edm, (3, 64, 64), predicts="data", path="ve")        # an EDM denoiser
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.capabilities import VELOCITY
from steerfm.flowmap import FlowMap
from steerfm.interpolant import expand_time
from steerfm.models import paths
from steerfm.models.paths import Ends, Path, Weights
from steerfm.rows import Condition
from steerfm.trust import nearest


@dataclass(frozen=True)
class Prediction:
    """A kind of prediction.

    Attributes:
        ends: computes both ends from the state, the prediction, the weights and their slope.
        first: first time (ours) at which both ends follow from it; a noise prediction does not determine the data near t = 0.
        last: last such time; a denoiser does not determine the noise near t = 1.
    """

    ends: Callable[[Tensor, Tensor, Weights, Callable[[], Weights]], Ends]
    first: float = 0.0
    last: float = 1.0


PREDICTIONS: dict[str, Prediction] = {
    "velocity": Prediction(lambda z, out, at, slope: paths.ends_of_velocity(z, out, at, slope())),
    "noise": Prediction(lambda z, out, at, slope: paths.ends_of_noise(z, out, at), first=0.01),
    "data": Prediction(lambda z, out, at, slope: paths.ends_of_data(z, out, at), last=0.999),
    "v": Prediction(lambda z, out, at, slope: paths.ends_of_v(z, out, at)),
}
"""Predictions by their names in `VelocityModel`."""


class VelocityModel(FlowMap):
    """Any flow-matching or diffusion network as a flow map: its velocity is exact, and a jump is an Euler step.

    The network is called as ``net(x, t, cond)`` and returns (b, *shape). x (b, *shape) is in its own space and precision. t
    (b,) is in its own time, in float32, since bfloat16 cannot represent indices above 256. cond has one row for each row of x,
    as in `steer` and `sample`. Space and time depend on its path:

        linear    x = data and noise in shares of 1 - t and t, or of t and 1 - t; t from 0 to 1
        vp        x = sqrt(a) data + sqrt(1 - a) noise with a = alphas_cumprod[t]; t from 0 to n - 1, also fractional
        ve        x = data + t noise; t = sigma

    Outside the times of its training, it is called at the nearest valid time; see `paths.velocity`. So a model with a largest
    sigma of 80, or a smallest SNR above 0, still starts at our t = 0.

    Args:
        net: a module, or any function of these three; the weights of a module can be tuned and saved.
        shape: shape of one sample in model space. Samples with three axes are pictures in [-1, 1]; a subclass can define other
            ``decode`` and ``encode``.
        predicts: "velocity", dx/dt in the network's own time; "noise"; "data", a denoiser; "v", a noise - b data for
            x = a data + b noise.
        path: "linear", "vp" or "ve"; or any `paths.Path`.
        noise_at: the network's time of pure noise on the linear path, 0 or 1.
        alphas_cumprod: (n,), for the path vp: products of 1 - beta, falling from nearly 1.
        span: smallest and largest training time, in the network's own time; default all times of its path: (0, 1),
            (0, n - 1), or EDM's sigmas (0.002, 80).
        class_names: of the labels in ``cond``, for a network with classes.
        null: the condition of one row without a class, for `Guided`; default the label after the last class.

    Raises:
        ValueError: an argument is invalid, or belongs to another path.
    """

    capabilities = VELOCITY

    def __init__(
        self,
        net: Callable[..., Tensor],
        shape: Sequence[int],
        predicts: str = "velocity",
        path: str | Path = "linear",
        noise_at: float = 1.0,
        alphas_cumprod: Any = None,
        *,
        span: Sequence[float] | None = None,
        class_names: Sequence[str] = (),
        null: Condition = None,
    ) -> None:
        _check(net, shape)
        super().__init__(shape, class_names=class_names)
        if predicts not in PREDICTIONS:
            raise ValueError(f"unknown predicts={predicts!r}{nearest(str(predicts), PREDICTIONS)}: {', '.join(PREDICTIONS)}")
        self.network, self.none = net, null
        self.path = _path(path, noise_at, alphas_cumprod)
        self.predicts = predicts
        self.first, self.last = _valid_times(self.path, PREDICTIONS[predicts], span)
        straight = isinstance(self.path, paths.Linear) and predicts == "velocity" and (self.first, self.last) == (0, 1)
        self.sign = self.path.slope(torch.empty(0)).data if straight else None

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.instantaneous_velocity(x, s, cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        t = expand_time(t, x)
        if self.sign is not None:  # our own path, up to the direction of time
            return self.sign * self.predict(x, self.path.own_time(t), cond)
        near = t.clamp(self.first, self.last)
        at = self.path.weights(near)
        z = paths.from_linear(x, *at) * (paths.spread(near) / paths.spread(t))  # rescaled to the spread at that time
        out = self.predict(z, self.path.own_time(near), cond)
        ends = PREDICTIONS[self.predicts].ends(z, out, at, lambda: self.path.slope(near))
        return paths.velocity(x, t, ends, self.first, self.last)

    def predict(self, z: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The network's prediction, (b, *shape) in the precision of z.

        Args:
            z: (b, *shape) states in its own space.
            time: its own times, which broadcast against z.
            cond: one row per state, or None.

        Raises:
            ValueError: the output has another shape or type.
        """
        states = z.to(self._precision(z.dtype))
        out: Any = self.network(states, time.flatten(), cond)
        name = f"the network {getattr(self.network, '__name__', type(self.network).__name__)}"
        if not isinstance(out, Tensor):
            raise ValueError(f"{name} returns a {type(out).__name__}: return the tensor in it, such as net(x, t).sample")
        if out.shape != z.shape:
            wider = out.ndim == z.ndim and out.shape[1] > z.shape[1]
            fix = (
                f"return only the prediction, out[:, :{z.shape[1]}]" if wider else "return (b, *shape), one row for each state"
            )
            raise ValueError(f"{name} answers states {tuple(z.shape)} with {tuple(out.shape)}: {fix}")
        precise = out.dtype == states.dtype or out.itemsize >= z.itemsize or torch.is_autocast_enabled(z.device.type)
        if not (out.is_floating_point() and precise):
            raise ValueError(f"{name} answers {states.dtype} with {out.dtype}: return {states.dtype}, out.to(x.dtype)")
        return out.to(z.dtype)

    def _precision(self, states: torch.dtype) -> torch.dtype:
        """The precision of the network's input: that of its weights, or of the states if it has none."""
        if not isinstance(self.network, nn.Module):
            return states
        own = (
            tensor.dtype for tensor in chain(self.network.parameters(), self.network.buffers()) if tensor.is_floating_point()
        )
        return next(own, states)

    def at_door(self, x: Tensor) -> Tensor:
        return x  # only the network itself runs in its own precision

    @property
    def null(self) -> Condition:
        return super().null if self.none is None else self.none

    @property
    def body(self) -> nn.Module:
        return self.network if isinstance(self.network, nn.Module) else self

    def with_network(self, network: nn.Module) -> VelocityModel:
        """The same map with another network, without a copy."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": network}
        return other


# --- checks of arguments ----------------------------------------------------------------------------------------------
def _check(net: Any, shape: Any) -> None:
    if not callable(net) or isinstance(net, type):
        name = net.__name__ if isinstance(net, type) else ""
        text, what = (name, f"this is a class, call it: {name}(...)") if name else (repr(net), "give a module")
        raise ValueError(f"net={text}: {what}, or a function of x, t and cond")
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"shape={shape!r}: give the shape of one sample, without the batch, such as (3, 32, 32) or (2,)")


def _path(path: Any, noise_at: float, alphas_cumprod: Any) -> Path:
    """The path of a name, with its own arguments."""
    if not isinstance(path, str | Path):
        raise ValueError(f"path={path!r}: give linear, vp or ve, or an object with the members of steerfm.models.paths.Path")
    if alphas_cumprod is not None and path != "vp":
        raise ValueError(f'alphas_cumprod= is only for path="vp", but path={path!r}: leave it out, or give path="vp"')
    if noise_at != 1 and path != "linear":
        raise ValueError(f'noise_at={noise_at} is only for path="linear", but path={path!r}: leave it out')
    if not isinstance(path, str):
        return path
    match path:
        case "linear":
            return paths.Linear(noise_at)
        case "vp" if alphas_cumprod is None:
            raise ValueError(
                'path="vp" needs alphas_cumprod=, the product of 1 - beta by index (a scheduler\'s alphas_cumprod)'
            )
        case "vp":
            return paths.VariancePreserving(alphas_cumprod)
        case "ve":
            return paths.VarianceExploding()
    raise ValueError(f"unknown path={path!r}{nearest(path, ('linear', 'vp', 've'))}: linear, vp, ve")


def _valid_times(path: Path, prediction: Prediction, span: Any) -> tuple[float, float]:
    """The first and last valid time of the network, in our time."""
    first, last = path.first, path.last
    if span is not None:
        ends = list(span) if isinstance(span, Sequence) and not isinstance(span, str) else []
        if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not ends[0] < ends[1]:
            raise ValueError(
                f"span={span!r}: give the smallest and the largest of the network's own times, such as (0.002, 80.0)"
            )
        try:
            first, last = sorted(path.time_at(end) for end in ends)
        except ValueError as error:
            raise ValueError(f"span={span}: {error}") from None
    first, last = max(first, prediction.first), min(last, prediction.last)
    if not first < last:
        raise ValueError(f"span={span}: there is no time in it at which that prediction determines both data and noise")
    return first, last
