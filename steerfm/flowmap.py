"""FlowMap: a network that jumps between any two times of a diffusion path.

    X_{s,t}(x) = x + (t - s) u(x, s, t),      velocity b(x, t) = u(x, t, t),      look-ahead X_{t,1}(x)

(Boffi et al. 2406.07507, 2505.18825). Subclasses write one method, `average_velocity`; times are broadcast, calls are
counted and the derived quantities are defined here, once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from steerfm.capabilities import TWO_TIME, can, in_words
from steerfm.checkpoints import (
    HEAD,
    HEAD_TEXT,
    INTERPOLANTS,
    check_head,
    code_of,
    locate_code,
    read_weights,
    restore,
    save_weights,
    weights_file,
)
from steerfm.cost import count, count_backward
from steerfm.encoders import TextEncoder
from steerfm.interpolant import Interpolant, expand_time, time_grid
from steerfm.rows import Condition, cuts, expand_rows, join_conditions, split_negative, take_rows

LAST = 0.9999
"""Largest time at which a joint state is taken: beyond it, one state is infinitely more than the other."""


class FlowMap(nn.Module):
    """A network that jumps between any two times of a path, X_{s,t}(x) = x + (t - s) u(x, s, t); its velocity is
    b(x, t) = u(x, t, t), its look-ahead X_{t,1}(x) (Boffi et al. 2406.07507). Subclasses write `average_velocity`, which is u.

    Attributes:
        shape: shape of one sample in model space.
        interpolant: the path that the map belongs to.
        class_names: names of the labels that ``cond`` may hold, in order; empty where there are none.
        card: its model card: licence, recipe, and what its samples are measured with (`steerfm.metrics.evaluator`).
        evaluations: network evaluations per call (2 under classifier-free guidance), for the ledger.
        capabilities: what it can do, see `steerfm.capabilities`; all of it unless a class says otherwise.
        transition: how it is sampled, a `Transition`; None for the usual one, see `steerfm.transitions.usual`.
        steps: in how many it is sampled unless somebody says otherwise.
        micro_batch: rows at a time of a network call, and of a call of the decoder; None for all.
        maker: the code that `steerfm.load` made it by, {"name": "my_file.py:make_map", ...}; empty for others.
        origin: reads the weights of the map that this one was fine-tuned from; None for others.
    """

    shape: tuple[int, ...]
    card: Mapping[str, Any] = MappingProxyType({})
    evaluations: int = 1
    capabilities: frozenset[str] = TWO_TIME
    transition: Any = None  # typed here, transitions and maps would import each other
    steps: int = 4
    micro_batch: int | None = None
    maker: Mapping[str, Any] = MappingProxyType({})
    origin: Callable[[], Mapping[str, Tensor]] | None = None

    def __init__(self, shape: Sequence[int], interpolant: Interpolant | None = None, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.interpolant = interpolant or Interpolant()
        self.class_names = tuple(class_names)

    @property
    def data(self) -> str:
        """Name of the data set that it draws from, by its card; empty where nothing is known of it."""
        data = self.card.get("data") or ""
        return str(data.get("name") or "") if isinstance(data, Mapping) else str(data)

    @data.setter
    def data(self, name: str) -> None:
        self.card = {**self.card, "data": name}

    @property
    def jump_error(self) -> float | None:
        """How far one jump from noise ends from where four do (`steerfm.metrics.jump_error`), by its card; None: not known."""
        measured = self.card.get("metrics")
        error = measured.get("jump error") if isinstance(measured, Mapping) else None
        return float(error) if isinstance(error, float | int) else None

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The hook that subclasses write: u(x, s, t), with x (b, *shape), s and t (b,). Returns (b, *shape).

        States are float32, or wider; a map whose parameters are narrower gets them in that precision (see `at_door`).
        """
        raise NotImplementedError

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The hook behind `velocity`, for maps that have b(x, t) in another way than as u(x, t, t). Shapes as above."""
        return self.average_velocity(x, t, t, cond)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The hook behind `posterior`, for maps with that capability: the average velocity from s to e of the inner flow.

        Its data are p(x_1 | x_t = x), its noise is the map's; at t = 0 it is `average_velocity`.

        Args:
            z: (b, *shape) inner states.
            s: (b,) inner times.
            e: (b,) inner times, not below s.
            x: (b, *shape) what is known.
            t: (b,) its time.
            cond: as everywhere.

        Returns:
            (b, *shape).
        """
        raise NotImplementedError

    def take_after(self, other: FlowMap) -> None:
        """Say of this map what is said of another one."""
        self.evaluations, self.card, self.capabilities = other.evaluations, other.card, other.capabilities
        self.transition, self.steps, self.micro_batch = other.transition, other.steps, other.micro_batch

    def without_posterior(self) -> Self:
        """This map, changed: without the capability posterior. Tuning moves the jumps only: draws would be wrong."""
        self.capabilities = self.capabilities - {"posterior"}
        return self

    # --- jumps ---------------------------------------------------------------------------------------------------
    def jump(self, x: Tensor, s: float | Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """X_{s,t}(x): (b, *shape) -> (b, *shape). Times are floats or (b,); exactly x where s = t."""
        if isinstance(s, float | int) and isinstance(t, float | int) and s == t:
            return x
        s, t = expand_time(s, x), expand_time(t, x)
        return x + (t - s) * self.average(x, s, t, cond)

    def average(self, x: Tensor, s: float | Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """u(x, s, t), the average velocity from s to t; b(x, t) where s = t. Times are floats or (b,). Shape of x."""
        return self._counted(self.average_velocity, x, (expand_time(s, x), expand_time(t, x)), cond)

    def velocity(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """b(x, t) = u(x, t, t), the velocity of the probability-flow ODE. Shape of x."""
        return self._counted(self.instantaneous_velocity, x, (expand_time(t, x),), cond)

    def lookahead(self, x: Tensor, t: float | Tensor, cond: Condition = None, hops: int = 1) -> Tensor:
        """X_{t,1}(x) in ``hops`` equal jumps: the sample that is going to come out. Shape of x."""
        if hops < 1:
            raise ValueError(f"hops={hops}: a look-ahead needs at least one jump")
        for i in range(hops):
            x = self.jump(x, t + (1.0 - t) * (i / hops), t + (1.0 - t) * ((i + 1) / hops), cond)
        return x

    def posterior(self, x: Tensor, t: float | Tensor, z: Tensor, cond: Condition = None, hops: int = 1) -> Tensor:
        """A draw of p(x_1 | x_t = x) from noise, for maps with the capability posterior (Diamond Maps 2602.05993, Meta Flow
        Maps 2601.14430).

        Args:
            x: (b, *shape) states on the path.
            t: their time, a float or (b,).
            z: (b, *shape) standard normal noise, a draw for each row.
            cond: as everywhere.
            hops: equal jumps of the inner flow from z to the draw; each costs one call.

        Returns:
            (b, *shape).

        Raises:
            ValueError: the map has no posterior, hops below 1.
        """
        if not can(self, "posterior"):
            raise ValueError("this map draws no posteriors: the look-ahead posterior does, from any velocity")
        if hops < 1:
            raise ValueError(f"hops={hops}: a draw needs at least one jump")
        t = expand_time(t, x)

        def hook(z: Tensor, s: Tensor, e: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return self.posterior_velocity(z, s, e, self.at_door(x), t, cond)

        for i in range(hops):
            s, e = expand_time(i / hops, x), expand_time((i + 1) / hops, x)
            z = z + (e - s) * self._counted(hook, z, (s, e, t), cond)
        return torch.where(t == 1, x, z)  # what rounding leaves

    # --- what follows from the velocity --------------------------------------------------------------------------
    def denoise(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """D_t(x) = E[x_1 | x_t = x]; on the linear path x + (1 - t) b(x, t). Shape of x."""
        t = expand_time(t, x)
        return self.interpolant.denoise(x, self._counted(self.instantaneous_velocity, x, (t,), cond), t)

    def score(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """grad log p_t(x); infinite at t = 1. Shape of x."""
        t = expand_time(t, x)
        return self.interpolant.score(x, self._counted(self.instantaneous_velocity, x, (t,), cond), t)

    def grid(self, steps: int) -> list[float]:
        """Its own time grid 0 = t_0 < ... < t_steps = 1, which sampling and methods follow; here equal steps."""
        return time_grid(steps)

    # --- pictures ------------------------------------------------------------------------------------------------
    def decode(self, z: Tensor) -> Tensor:
        """Model space to what a reward sees: pictures (b, c, h, w) in [0, 1] from [-1, 1]; vectors stay as they are."""
        count("decodes", z.shape[0])
        return ((z + 1) / 2).clamp(0, 1) if len(self.shape) == 3 else z

    def encode(self, pictures: Tensor) -> Tensor:
        """Inverse of `decode`: pictures in [0, 1] to model space."""
        return pictures * 2 - 1 if len(self.shape) == 3 else pictures

    # --- conditions ----------------------------------------------------------------------------------------------
    def condition(self, labels: str | int | Sequence[str | int] | None, n: int) -> Condition:
        """Labels by name or index to a condition (n,); a single label is repeated. None stays None.

        Raises:
            ValueError: an unknown name, an index out of range, or another number of labels than ``n``.
        """
        if labels is None:
            return None
        items = [labels] * n if isinstance(labels, str | int) else list(labels)
        if len(items) != n:
            raise ValueError(f"{len(items)} labels for n={n} outputs: give one label, or one per output")
        return torch.tensor([label_index(item, self.class_names) for item in items], device=self.device)

    @property
    def null(self) -> Condition:
        """The condition of one row that stands for none: the label after the last class; None without classes."""
        return torch.tensor([len(self.class_names)]) if self.class_names else None

    # --- weights -------------------------------------------------------------------------------------------------
    @property
    def body(self) -> nn.Module:
        """What holds the weights: what tuning trains, and what a file holds. The map itself, unless a class says otherwise."""
        return self

    def with_network(self, network: nn.Module) -> FlowMap:
        """The same map with another `body`; nothing is copied."""
        assert isinstance(network, FlowMap)
        return network

    def with_strength(self, strength: float) -> FlowMap:
        """A fine-tuned map at another strength: weights base + strength (tuned - base), the base at 0, this map at 1.

        For LoRA this is the scale of its adapters (DRaFT, 2309.17400, section 4.4).

        Raises:
            ValueError, FileNotFoundError: the map was not fine-tuned, or its base cannot be found.
        """
        if self.origin is None:
            raise ValueError("with_strength needs a fine-tuned map: load one that `steerfm finetune` wrote")
        body, origin = copy.deepcopy(self.body), self.origin()
        if any(k not in origin or origin[k].shape != v.shape for k, v in body.state_dict().items()):
            raise ValueError("with_strength: the base that this map names is of another architecture")
        body.load_state_dict(
            {k: torch.lerp(origin[k].to(v), v, strength) if v.is_floating_point() else v for k, v in body.state_dict().items()}
        )
        return self.with_network(body)

    def save(
        self,
        path: str | Path,
        architecture: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
        half: bool | None = None,
        origin: str | Mapping[str, Any] = "",
    ) -> Path:
        """Write ``path``.safetensors and ``path``.json, which `steerfm.load` reads; returns the path.

        Args:
            path: without suffix, or with ``.safetensors``.
            architecture: what makes it again, see `head`; default what it was made by.
            card: model card: data, recipe, command, metrics, licence; default its own.
            half: store the weights as float16; default only those of a network of which the JSON says all.
            origin: the model that this one was fine-tuned from, for `with_strength`.

        Raises:
            ValueError: nothing says what makes it.
        """
        head, path = self.head(architecture, origin), weights_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        small = head["kind"] == "flow_map" if half is None else half
        save_weights(self.body, path, {**head, "card": dict(self.card if card is None else card)}, small)
        return path

    def head(self, architecture: Mapping[str, Any] | None = None, origin: str | Mapping[str, Any] = "") -> dict[str, Any]:
        """What the JSON of a file says of it: the code that makes it, with digests of its file and of those that it imports.

        Args:
            architecture: that code, {"name": "my_file.py:make_map", argument: value, ...}; default `maker`.
            origin: see `save`.

        Raises:
            ValueError: nothing says what makes it.
        """
        maker = dict(architecture or self.maker)
        if not maker:
            name = type(self).__name__
            raise ValueError(f'what makes this {name} again? architecture={{"name": "my_file.py:make_map"}}')
        return {"kind": "code", "maker": maker, "code": code_of(maker), **({"base": origin} if origin else {})}

    # --- for people ----------------------------------------------------------------------------------------------
    def __repr__(self) -> str:
        """A line: its class, the shape of a sample, what it can do, and how large it is."""
        return f"{type(self).__name__}({', '.join(self._facts())})"

    def _facts(self) -> list[str]:
        facts = [" x ".join(map(str, self.shape)), in_words(self)]
        if self.class_names:
            facts.append(f"{len(self.class_names)} classes")
        size = sum(parameter.numel() for parameter in self.parameters())
        return [*facts, *([f"{size / 1e6:.3g} M parameters" if size > 1e5 else f"{size:,} parameters"] if size else [])]

    @property
    def device(self) -> torch.device:
        """Where its parameters or buffers are; the CPU for a map without any."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0, device="cpu")).device

    @property
    def dtype(self) -> torch.dtype:
        """That of its parameters or buffers; torch's default for a map without any."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0, device="cpu")).dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """That of states on the path: float32, or the map's own where that is wider."""
        return torch.promote_types(self.dtype, torch.float32)

    def at_door(self, x: Tensor) -> Tensor:
        """States, or times, in the precision in which the hooks take them: that of the parameters where it is below float32."""
        return x.to(self.dtype) if self.dtype.itemsize < 4 else x

    def _counted(self, hook: Callable[..., Tensor], x: Tensor, times: Sequence[Tensor], cond: Condition) -> Tensor:
        calls = x.shape[0] * self.evaluations
        count("forwards", calls)
        u = hook(self.at_door(x), *(self.at_door(time.flatten()) for time in times), cond)
        if u.shape != x.shape:
            name = f"the model {type(self).__name__}"
            raise ValueError(
                f"{name} answers states {tuple(x.shape)} with {tuple(u.shape)}: return (b, *shape), a row for each"
            )
        u = u.to(torch.promote_types(u.dtype, x.dtype))
        count_backward("backwards", calls, u)
        return u


def label_index(label: str | int, names: Sequence[str]) -> int:
    """Index of a class given by name (any case) or index.

    Raises:
        ValueError: naming the classes there are.
    """
    text = str(label).strip()
    lowered = [name.lower() for name in names]
    if text.lower() in lowered:
        return lowered.index(text.lower())
    if text.isdigit() and int(text) < len(names):
        return int(text)
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or "none: this model is unconditional"
    raise ValueError(f"unknown class {label!r}; classes: {known}")


def by_label(flow_map: FlowMap, label: str | int | Sequence[str | int] | None, cond: Any) -> Any:
    """What a map is asked for, as a condition or by the names of its classes.

    Raises:
        ValueError: both are given; the map is asked in words, or for nothing at all.
    """
    if label is None:
        return cond
    if cond is not None:
        raise ValueError(f"label={label!r} and cond= are given: label= is the class, cond= any condition; give one of them")
    if isinstance(flow_map.null, Mapping):
        raise ValueError(f"label={label!r}: this model is asked in words: cond={label!r}")
    if not flow_map.class_names:
        raise ValueError(f"label={label!r}: this model has no classes")
    return label


class NeuralFlowMap(FlowMap):
    """A flow map given by a network, preconditioned with the exact map of one isotropic Gaussian.

        u(x, s, t) = u_gauss(x, s, t; mean, std) + network((x - alpha_s mean) / g_s, s, t, cond)

    so that the network only learns what makes the data different from N(mean, std^2 I): its input has unit variance at
    every time, and at initialisation the map is already the exact one for that Gaussian.

    Args:
        network: u(x, s, t, cond), see `steerfm.networks`.
        shape: shape of one sample.
        mean: of all entries of the data.
        std: standard deviation of all entries of the data.
        text: encoder of prompts, for a network that is conditioned on {"text": (b, d)}; None for labels or no condition.

    Attributes:
        architecture: what `build_network` makes its network of, as its file has it; empty for others.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        interpolant: Interpolant | None = None,
        class_names: Sequence[str] = (),
        mean: float = 0.0,
        std: float = 1.0,
        text: TextEncoder | None = None,
    ) -> None:
        super().__init__(shape, interpolant, class_names)
        self.network, self.mean, self.std, self.text = network, float(mean), float(std), text
        self.architecture: Mapping[str, Any] = {}
        if getattr(network, "posterior", False):
            self.capabilities = self.capabilities | {"posterior"}

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._preconditioned(x, s, t, cond)

    def _preconditioned(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition, *given: Tensor) -> Tensor:
        """`average_velocity`; ``given`` are further inputs of the network, those of a posterior."""
        s_, t_ = expand_time(s, x), expand_time(t, x)
        white = (x - self.interpolant.alpha(s_) * self.mean) / self._spread(s_, self.std)
        u = self.network(white.to(self.dtype), s, t, cond, *given)
        return u.to(x.dtype) + self.interpolant.gaussian_velocity(x, s_, t_, self.mean, self.std)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As `FlowMap.posterior_velocity`, preconditioned with the exact inner flow of the same Gaussian.

        With g the root of (alpha_t std)^2 + sigma_t^2, the posterior of N(mean, std^2 I) has the spread std sigma_t / g.
        What the data differ from it by shrinks alike: the network's output is scaled so that it need not. With a
        ``posterior_rank`` it is the map itself, see `_joint_velocity`.
        """
        if getattr(self.network, "posterior_rank", 0):
            return self._joint_velocity(z, s, e, x, t, cond)
        path, (s_, e_, t_) = self.interpolant, (expand_time(time, z) for time in (s, e, t))
        g = self._spread(t_, self.std)
        correlation, white = path.alpha(t_) * self.std / g, (x - path.alpha(t_) * self.mean) / g
        mean, std = self.mean + correlation * self.std * white, self.std * path.sigma(t_) / g
        g_s = self._spread(s_, std)
        scale = std / self.std * self._spread(s_, self.std) / g_s
        inner, state = (z - path.alpha(s_) * mean) / g_s, correlation.sqrt() * white
        u = self.network(inner.to(self.dtype), s, e, cond, state.to(self.dtype), t)
        return scale * u.to(z.dtype) + path.gaussian_velocity(z, s_, e_, mean, std)

    def _joint_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """`posterior_velocity` as the map itself, from the joint state of x and z (GLASS, 2602.05993) to that of x and z_e.

        Without what is learnt it is the exact inner velocity where s = e, in the terms of the denoiser, and the map at t = 0.
        What it learns from is the part of x and z that the joint state leaves out: noise N(0, I), whatever x_1 is.
        """
        path, (s_, e_, t_) = self.interpolant, (expand_time(time, z) for time in (s, e, t.clamp(max=LAST)))
        outer, inner, later = (path.alpha(time) / path.sigma(time) for time in (t_, s_, e_.clamp(max=LAST)))
        given, noised = x / path.sigma(t_), z / path.sigma(s_)
        state, start = path.joint(given, outer, noised, inner)
        end = torch.where(e_ == 1, 1.0, path.time_at((outer**2 + later**2) ** 0.5))
        rest = outer * (inner * given - outer * noised) / (outer**2 + inner**2).clamp(min=1e-12)
        u = self._preconditioned(state, start.flatten(), end.flatten(), cond, rest.to(self.dtype), t)
        return path.velocity_from_denoised(z, path.denoise(state, u, start, end), s_, e_)

    def _spread(self, t: Tensor, std: float | Tensor) -> Tensor:
        """Standard deviation at time t of a path to data of standard deviation ``std``."""
        return torch.sqrt((self.interpolant.alpha(t) * std) ** 2 + self.interpolant.sigma(t) ** 2)

    def at_door(self, x: Tensor) -> Tensor:
        return x  # the network is called in its own precision, what stands around it in that of the states

    def condition(self, labels: str | int | Sequence[str | int] | None, n: int) -> Condition:
        """As `FlowMap.condition`; for a map of texts, prompts to {"text": (n, d)}, the empty prompt to the null condition."""
        if self.text is None or labels is None:
            return super().condition(labels, n)
        prompts = [str(labels)] * n if isinstance(labels, str | int) else [str(label) for label in labels]
        if len(prompts) != n:
            raise ValueError(f"{len(prompts)} prompts for n={n} outputs: give one prompt, or one per output")
        return {"text": self.text(prompts).to(self.device)}

    @property
    def null(self) -> Condition:
        return super().null if self.text is None else {"text": torch.zeros(1, self.text.width)}

    @property
    def body(self) -> nn.Module:
        return self.network

    def with_network(self, network: nn.Module) -> NeuralFlowMap:
        """The same map with another network; nothing is copied."""
        other = copy.copy(self)
        other._modules = {"network": network}
        return other

    def compiled(self) -> NeuralFlowMap:
        """The same map with its network compiled by `torch.compile`, for any number of rows, equal to rounding.

        The first calls take a minute; on a CPU it needs a C++ compiler. It pays on accelerators and in long runs.
        """
        return self.with_network(torch.compile(self.network, dynamic=True))  # type: ignore[arg-type]

    # --- files: weights in safetensors, everything else in a JSON beside; nothing is ever unpickled --------------
    def head(self, architecture: Mapping[str, Any] | None = None, origin: str | Mapping[str, Any] = "") -> dict[str, Any]:
        """As `FlowMap.head`, with what `build_network` takes as the architecture, by default that of its file."""
        if architecture is None and self.maker:
            return super().head(None, origin)
        architecture = dict(architecture or self.architecture)
        if not architecture:
            raise ValueError('what makes its network again? architecture={"name": "mlp", "dim": 2}, or "my_file.py:Net"')
        names = {cls: name for name, cls in INTERPOLANTS.items()}
        code = code_of(architecture)
        return {
            "kind": "flow_map",
            "network": architecture,
            "shape": list(self.shape),
            "interpolant": names[type(self.interpolant)],
            "class_names": list(self.class_names),
            "mean": self.mean,
            "std": self.std,
            **({"text": {"encoder": self.text.model, "width": self.text.width}} if self.text else {}),
            **({"base": origin} if origin else {}),
            **({"code": code} if code else {}),
        }

    @classmethod
    def load(cls, path: str | Path) -> NeuralFlowMap:
        """Read a map written by `save`, in float32 on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        head, weights = read_weights(path, kind="flow_map")
        check_head(head, path, HEAD | (HEAD_TEXT if "text" in head else {}))
        network, interpolant = restore(head, weights, path, head["shape"]), INTERPOLANTS[head["interpolant"]]()
        told, text = head["network"], head.get("text")
        if told.get("classes", 0) != len(head["class_names"]) or told.get("text", 0) != (text["width"] if text else 0):
            raise ValueError(
                f"corrupt checkpoint {Path(path).with_suffix('.json')}: class_names and text do not fit its network, "
                f"classes={told.get('classes', 0)}, text={told.get('text', 0)}"
            )
        text = TextEncoder(text["encoder"], text["width"]) if text else None
        flow_map = cls(network, head["shape"], interpolant, head["class_names"], head["mean"], head["std"], text)
        card = head.get("card")
        flow_map.card = card if isinstance(card, Mapping) else {}
        flow_map.architecture = locate_code(head["network"], head, path)
        return flow_map.eval().requires_grad_(False)


class Wrapped(FlowMap):
    """A flow map around another one: same space, same pictures."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__(flow_map.shape, flow_map.interpolant, flow_map.class_names)
        self.flow_map = flow_map
        self.take_after(flow_map)

    def _facts(self) -> list[str]:
        return [repr(self.flow_map)]

    @property
    def body(self) -> nn.Module:
        return self.flow_map.body

    def with_network(self, network: nn.Module) -> FlowMap:
        other = copy.copy(self)
        other._modules = {**self._modules, "flow_map": self.flow_map.with_network(network)}
        return other

    def head(self, architecture: Mapping[str, Any] | None = None, origin: str | Mapping[str, Any] = "") -> dict[str, Any]:
        return self.flow_map.head(architecture or self.maker, origin)

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.flow_map.average_velocity(x, s, t, cond)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.flow_map.posterior_velocity(z, s, e, x, t, cond)

    def at_door(self, x: Tensor) -> Tensor:
        return self.flow_map.at_door(x)

    def grid(self, steps: int) -> list[float]:
        return self.flow_map.grid(steps)

    def decode(self, z: Tensor) -> Tensor:
        return self.flow_map.decode(z)

    def condition(self, labels: str | int | Sequence[str | int] | None, n: int) -> Condition:
        return self.flow_map.condition(labels, n)

    @property
    def null(self) -> Condition:
        return self.flow_map.null

    def encode(self, pictures: Tensor) -> Tensor:
        return self.flow_map.encode(pictures)


class Microbatched(Wrapped):
    """The same map, evaluated ``rows`` rows at a time: bounds memory, changes nothing else.

    Args:
        rows: rows per network call, at least 1.
    """

    def __init__(self, flow_map: FlowMap, rows: int) -> None:
        super().__init__(flow_map)
        if rows < 1:
            raise ValueError(f"micro_batch={rows}: at least one row per network call")
        self.micro_batch = rows

    def _facts(self) -> list[str]:
        return [f"{self.micro_batch} rows at a time", *super()._facts()]

    def decode(self, z: Tensor) -> Tensor:
        return in_parts(self.flow_map.decode, z, self.micro_batch)

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._by_parts(self.flow_map.average_velocity, x, (s, t), cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._by_parts(self.flow_map.instantaneous_velocity, x, (t,), cond)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._by_parts(self.flow_map.posterior_velocity, z, (s, e, x, t), cond)

    def _by_parts(self, hook: Callable[..., Tensor], x: Tensor, times: Sequence[Tensor], cond: Condition) -> Tensor:
        rows = cuts(len(x), self.micro_batch or len(x))
        parts = [hook(x[part], *(time[part] for time in times), take_rows(cond, part)) for part in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_parts(call: Callable[[Tensor], Tensor], x: Tensor, rows: int | None) -> Tensor:
    """A call of x (b, ...) made of calls of at most ``rows`` rows; None for one call."""
    if rows is None or len(x) <= rows:
        return call(x)
    return torch.cat([call(x[part]) for part in cuts(len(x), rows)])


class Guided(Wrapped):
    """Classifier-free guidance: u = u(null) + scale (u(cond) - u(null)), both halves in one call.

    Ho & Salimans 2207.12598. A negative prompt or class, ``steer(..., negative=...)``, stands in place of null. For jumps this
    extrapolates the average velocity, which is exact guidance only in the limit of small jumps: guidance does not commute with
    the flow map.

    Args:
        flow_map: a map trained with a null condition.
        scale: 1 is the conditional map, above 1 is stronger; finite.
        null: the null condition of one row: a label tensor of shape (1,), or a dictionary of such rows; default the map's.
    """

    def __init__(self, flow_map: FlowMap, scale: float, null: Condition = None) -> None:
        super().__init__(flow_map)
        if not math.isfinite(scale):
            raise ValueError(f"guidance={scale}: must be finite")
        null = flow_map.null if null is None else null
        if null is None:
            raise ValueError("guidance needs a null condition: pass null=, or a map with class_names")
        self.scale, self.without = float(scale), null
        self.evaluations = 2 * flow_map.evaluations

    def _facts(self) -> list[str]:
        return [f"scale {self.scale:g}", *super()._facts()]

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._extrapolated(self.flow_map.average_velocity, x, (s, t), cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._extrapolated(self.flow_map.instantaneous_velocity, x, (t,), cond)

    def posterior_velocity(self, z: Tensor, s: Tensor, e: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._extrapolated(self.flow_map.posterior_velocity, z, (s, e, x, t), cond)

    def _extrapolated(self, hook: Callable[..., Tensor], x: Tensor, times: Sequence[Tensor], cond: Condition) -> Tensor:
        cond, negative = split_negative(cond)
        if cond is None:
            raise ValueError("guidance needs a condition: pass cond=, or use the map without guidance")
        both = join_conditions(expand_rows(self.without, x.shape[0], x.device) if negative is None else negative, cond)
        u = hook(torch.cat([x, x]), *(torch.cat([time, time]) for time in times), both)
        u_null, u_cond = u.chunk(2)
        return torch.lerp(u_null, u_cond, self.scale_at(x, times[0]))

    def scale_at(self, x: Tensor, s: Tensor) -> float | Tensor:
        """The scale at times s (b,); a number, or what broadcasts against x."""
        return self.scale
