"""FlowMap: a network that jumps between any two times of a diffusion path.

    X_{s,t}(x) = x + (t - s) u(x, s, t),      velocity b(x, t) = u(x, t, t),      look-ahead X_{t,1}(x)

(Boffi et al. 2406.07507, 2505.18825). Subclasses write one method, `average_velocity`; times are broadcast, calls are
counted and the derived quantities are defined here, once.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from steerfm import files
from steerfm.cost import count, count_backward
from steerfm.encoders import TextEncoder, stored
from steerfm.interpolant import Interpolant, Trigonometric, expand_time
from steerfm.networks import NETWORKS

Condition = Tensor | Mapping[str, Tensor] | None
"""One row per output (labels, embeddings), a dictionary of such tensors, or None for no condition."""

INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": Interpolant, "trigonometric": Trigonometric}


def map_condition(function: Callable[[Tensor], Tensor], cond: Condition) -> Condition:
    """Apply ``function`` to the tensors of a condition (repeat, index, move), whatever its form."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else function(cond)
    return {name: function(value) for name, value in cond.items()}


def move_condition(cond: Condition, device: torch.device | str) -> Condition:
    """The condition on another device."""
    return map_condition(lambda c: c.to(device), cond)


def take_rows(cond: Condition, rows: slice | Tensor) -> Condition:
    """The given rows of a condition."""
    return map_condition(lambda c: c[rows], cond)


def repeat_rows(cond: Condition, k: int) -> Condition:
    """Every row ``k`` times, one after the other: one row per output to one per particle."""
    return map_condition(lambda c: c.repeat_interleave(k, 0), cond)


def expand_rows(null: Condition, b: int, device: torch.device | str) -> Condition:
    """A condition of one row as ``b`` equal rows; nothing is copied."""
    return map_condition(lambda c: c.to(device).expand(b, *c.shape[1:]), null)


def join_conditions(first: Condition, second: Condition) -> Condition:
    """The rows of both, one after the other.

    Raises:
        ValueError: of different forms.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: torch.cat([first[name], second[name]]) for name in first}
    raise ValueError("cond and the null condition must both be tensors, or both dictionaries with the same keys")


def replace_rows(cond: Condition, rows: Tensor, null: Condition) -> Condition:
    """The condition with the rows of a mask (b,) replaced by the null condition of one row."""
    if cond is None or null is None:
        return cond
    n = len(rows)
    index = torch.arange(n, device=rows.device).masked_fill(rows, n)
    null = expand_rows(null, 1, rows.device)
    return take_rows(join_conditions(cond, null), index)


def is_null(cond: Condition, null: Condition) -> Tensor:
    """Mask (b,) of the rows that equal the null condition of one row."""
    if isinstance(cond, Tensor) and isinstance(null, Tensor):
        return (cond == null.to(cond.device)).view(len(cond), -1).all(1)
    assert isinstance(cond, Mapping) and isinstance(null, Mapping)
    return torch.stack([is_null(cond[name], null[name]) for name in cond]).all(0)


class FlowMap(nn.Module):
    """A flow map; see the module's first lines for the convention.

    Attributes:
        shape: shape of one sample in model space.
        interpolant: the path that the map belongs to.
        class_names: names of the labels that ``cond`` may hold, in order; empty where there are none.
        card: its model card: licence, recipe, and what its samples are measured with (`steerfm.metrics.evaluator`).
        evaluations: network evaluations per call (2 under classifier-free guidance), for the ledger.
    """

    shape: tuple[int, ...]
    card: Mapping[str, Any] = MappingProxyType({})
    evaluations: int = 1

    def __init__(self, shape: Sequence[int], interpolant: Interpolant | None = None, class_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.interpolant = interpolant or Interpolant()
        self.class_names = tuple(class_names)

    @property
    def data(self) -> str:
        """Name of the data set that it draws from, by its card; empty where nothing is known of it."""
        return str(self.card.get("data") or "")

    @data.setter
    def data(self, name: str) -> None:
        self.card = {**self.card, "data": name}

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The hook that subclasses write: u(x, s, t), with x (b, *shape), s and t (b,). Returns (b, *shape).

        States are float32, or wider; a map whose parameters are narrower gets them in that precision (see `at_door`).
        """
        raise NotImplementedError

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The hook behind `velocity`, for maps that have b(x, t) in another way than as u(x, t, t). Shapes as above."""
        return self.average_velocity(x, t, t, cond)

    # --- jumps ---------------------------------------------------------------------------------------------------
    def jump(self, x: Tensor, s: float | Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """X_{s,t}(x): (b, *shape) -> (b, *shape). Times are floats or (b,); exactly x where s = t."""
        if isinstance(s, float | int) and isinstance(t, float | int) and s == t:
            return x
        s, t = expand_time(s, x), expand_time(t, x)
        return x + (t - s) * self._counted(self.average_velocity, x, (s, t), cond)

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

    # --- what follows from the velocity --------------------------------------------------------------------------
    def denoise(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """D_t(x) = E[x_1 | x_t = x]; on the linear path x + (1 - t) b(x, t). Shape of x."""
        t = expand_time(t, x)
        return self.interpolant.denoise(x, self._counted(self.instantaneous_velocity, x, (t,), cond), t)

    def score(self, x: Tensor, t: float | Tensor, cond: Condition = None) -> Tensor:
        """grad log p_t(x); infinite at t = 1. Shape of x."""
        t = expand_time(t, x)
        return self.interpolant.score(x, self._counted(self.instantaneous_velocity, x, (t,), cond), t)

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
        mean, std: mean and standard deviation of all entries of the data.
        text: encoder of prompts, for a network that is conditioned on {"text": (b, d)}; None for labels or no condition.

    Attributes:
        origin: reads the weights of the map that this one was fine-tuned from; None for others.
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
        self.origin: Callable[[], Mapping[str, Tensor]] | None = None

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        s_, t_ = expand_time(s, x), expand_time(t, x)
        alpha, sigma = self.interpolant.alpha(s_), self.interpolant.sigma(s_)
        g = torch.sqrt((alpha * self.std) ** 2 + sigma**2)
        u = self.network(((x - alpha * self.mean) / g).to(self.dtype), s, t, cond)
        return u.to(x.dtype) + self.interpolant.gaussian_velocity(x, s_, t_, self.mean, self.std)

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

    def with_strength(self, strength: float) -> NeuralFlowMap:
        """A fine-tuned map at another strength: weights base + strength (tuned - base), the base at 0, this map at 1.

        For LoRA this is the scale of its adapters (DRaFT, 2309.17400, section 4.4).

        Raises:
            ValueError, FileNotFoundError: the map was not fine-tuned, or its base cannot be found.
        """
        if self.origin is None:
            raise ValueError("with_strength needs a fine-tuned map: load one that `steerfm finetune` wrote")
        network, origin = copy.deepcopy(self.network), self.origin()
        if any(k not in origin or origin[k].shape != v.shape for k, v in network.state_dict().items()):
            raise ValueError("with_strength: the base that this map names is of another architecture")
        network.load_state_dict(
            {
                k: torch.lerp(origin[k].to(v), v, strength) if v.is_floating_point() else v
                for k, v in network.state_dict().items()
            }
        )
        return self.with_network(network)

    # --- files: weights in safetensors, everything else in a JSON beside; nothing is ever unpickled --------------
    def save(
        self, path: str | Path, architecture: Mapping[str, Any], card: Mapping[str, Any], half: bool = True, origin: str = ""
    ) -> Path:
        """Write ``path``.safetensors and ``path``.json.

        Args:
            path: without suffix, or with ``.safetensors``.
            architecture: what `build_network` takes, so that `load` can rebuild the network.
            card: model card: data, recipe, command, metrics, licence.
            half: store the weights as float16.
            origin: the model that this one was fine-tuned from, for `with_strength`.
        """
        path = weights_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {cls: name for name, cls in INTERPOLANTS.items()}
        head = {
            "kind": "flow_map",
            "network": dict(architecture),
            "shape": list(self.shape),
            "interpolant": names[type(self.interpolant)],
            "class_names": list(self.class_names),
            "mean": self.mean,
            "std": self.std,
            **({"text": {"encoder": self.text.model, "width": self.text.width}} if self.text else {}),
            **({"base": origin} if origin else {}),
        }
        save_weights(self.network, path, head | {"card": dict(card)}, half)
        return path

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
        return flow_map.eval().requires_grad_(False)


class Wrapped(FlowMap):
    """A flow map around another one: same space, same pictures."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__(flow_map.shape, flow_map.interpolant, flow_map.class_names)
        self.flow_map, self.evaluations, self.card = flow_map, flow_map.evaluations, flow_map.card

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.flow_map.average_velocity(x, s, t, cond)

    def at_door(self, x: Tensor) -> Tensor:
        return self.flow_map.at_door(x)

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
        self.rows = rows

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._in_parts(self.flow_map.average_velocity, x, (s, t), cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._in_parts(self.flow_map.instantaneous_velocity, x, (t,), cond)

    def _in_parts(self, hook: Callable[..., Tensor], x: Tensor, times: Sequence[Tensor], cond: Condition) -> Tensor:
        rows = [slice(begin, begin + self.rows) for begin in range(0, len(x), self.rows)]
        parts = [hook(x[part], *(time[part] for time in times), take_rows(cond, part)) for part in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Guided(Wrapped):
    """Classifier-free guidance: u = u(null) + scale (u(cond) - u(null)), both halves in one call.

    Ho & Salimans 2207.12598. For jumps this extrapolates the average velocity, which is exact guidance only in the limit of
    small jumps: guidance does not commute with the flow map.

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

    def average_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._extrapolated(self.flow_map.average_velocity, x, (s, t), cond)

    def instantaneous_velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self._extrapolated(self.flow_map.instantaneous_velocity, x, (t,), cond)

    def _extrapolated(self, hook: Callable[..., Tensor], x: Tensor, times: Sequence[Tensor], cond: Condition) -> Tensor:
        if cond is None:
            raise ValueError("guidance needs a condition: pass cond=, or use the map without guidance")
        both = join_conditions(expand_rows(self.without, x.shape[0], x.device), cond)
        u = hook(torch.cat([x, x]), *(torch.cat([time, time]) for time in times), both)
        u_null, u_cond = u.chunk(2)
        return torch.lerp(u_null, u_cond, self.scale)


# --- files -----------------------------------------------------------------------------------------------------------
# --- what a file must say of a model ---------------------------------------------------------------------------------
LARGEST = 2**14
"""Size that a file may ask for: it must not take more memory or time than a machine has."""

Check = tuple[Callable[[Any], bool], str]
"""Whether the value of a key can be used, and what it should be."""


def is_number(value: Any) -> bool:
    """A number that squares without overflow; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def is_count(value: Any) -> bool:
    """A whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_texts(value: Any) -> bool:
    """A list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


NETWORK: Check = lambda value: isinstance(value, dict), "a name and its arguments"
SHAPE: Check = (
    lambda value: isinstance(value, list) and bool(value) and all(is_count(n) and n <= LARGEST for n in value),
    "a list of sizes",
)
CLASSES: Check = is_texts, "a list of texts"
HEAD: dict[str, Check] = {
    "network": NETWORK,
    "shape": SHAPE,
    "interpolant": (lambda value: isinstance(value, str) and value in INTERPOLANTS, f"one of {', '.join(INTERPOLANTS)}"),
    "class_names": CLASSES,
    "mean": (is_number, "a finite number"),
    "std": (lambda value: is_number(value) and value > 0, "a number above 0"),
}
HEAD_TEXT: dict[str, Check] = {
    "text": (
        lambda value: isinstance(value, dict) and isinstance(value.get("encoder"), str) and is_count(value.get("width")),
        "an encoder and its width",
    )
}


def check_head(head: Mapping[str, Any], path: str | Path, checks: Mapping[str, Check]) -> None:
    """Check the JSON beside the weights at ``path``.

    Raises:
        ValueError: naming the file and the key that is missing or cannot be used.
    """
    for key, (is_good, words) in checks.items():
        if key not in head:
            raise ValueError(f"corrupt checkpoint {path}: missing {key!r} in its .json, it should be {words}")
        if not is_good(head[key]):
            value = repr(head[key]) if isinstance(head[key], str) else json.dumps(head[key])
            raise ValueError(f"corrupt checkpoint {path}: {key} {value[:80]} in its .json, it should be {words}")


def build_network(architecture: Mapping[str, Any], path: str | Path | None = None) -> nn.Module:
    """A network from {"name": a key of `networks.NETWORKS`, **arguments}.

    Args:
        architecture: see above.
        path: of the file that it is from, for errors.

    Raises:
        ValueError: unknown name or argument, or one that cannot be used.
    """
    arguments = dict(architecture)
    name = arguments.pop("name", None)
    where = "" if path is None else f"corrupt checkpoint {Path(path).with_suffix('.json')}: "
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"{where}unknown network {name!r}; networks: {', '.join(NETWORKS)}")
    check_arguments(NETWORKS[name], arguments, f"{where}network.")
    try:
        network = NETWORKS[name](**arguments)
    except Exception as error:  # arguments of the right type may still not fit each other
        raise ValueError(f"{where}network {name!r}: {' '.join(str(error).split())[:200]}") from None
    return network.to(memory_format=torch.channels_last)  # convolutions take 15 to 27% less time on a CPU


def check_arguments(kind: type, arguments: Mapping[str, Any], where: str) -> None:
    """Compare the arguments of a network with the types that it declares.

    Raises:
        ValueError: naming ``where`` and the argument.
    """
    checks: dict[Any, Check] = {
        int: (lambda value: value == 0 or is_count(value), "a whole number"),
        float: (is_number, "a number"),
        bool: (lambda value: isinstance(value, bool), "true or false"),
        str: (lambda value: isinstance(value, str), "a text"),
        Sequence[int]: (SHAPE[0], "a list of whole numbers above 0"),
    }
    for key, hint in get_type_hints(kind.__init__).items():
        if key not in arguments or hint not in checks:
            continue
        value, (is_good, words) = arguments[key], checks[hint]
        if hint == Sequence[int] and isinstance(value, tuple):
            value = list(value)
        numbers = value if isinstance(value, list) else [value]
        large = any(isinstance(n, int | float) and abs(n) > LARGEST for n in numbers)
        if isinstance(value, bool) != (hint is bool) or not is_good(value) or large:
            shown = json.dumps(value, default=str)[:80]
            raise ValueError(f"{where}{key} is {shown}, it should be {words}" + (f" up to {LARGEST}" if large else ""))


def restore(head: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path, shape: Sequence[int]) -> nn.Module:
    """The network of a file, in evaluation mode and frozen. It is built without memory first, so that what does not fit the
    weights or the samples is refused before anything is allocated.

    Args:
        head: its JSON, with the key network. weights: what it holds. path: its name, for errors.
        shape: of one sample or picture.

    Raises:
        ValueError: arguments of wrong types; weights or samples that do not fit the architecture.
    """
    with torch.device("meta"):
        plan = build_network(head["network"], path).to("meta")  # also what a package has made deaf to `torch.device`
        check_weights(plan, weights, path)
        x, t = torch.empty(3, *shape), torch.empty(3)
        try:
            out = plan(x) if head["kind"] == "classifier" else plan(x, t, t, None)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"corrupt checkpoint {path}: its network takes no samples of shape {list(shape)} ({reason})"
            ) from None
    made = tuple(out.shape[1:])
    if made != ((len(head["class_names"]),) if head["kind"] == "classifier" else tuple(shape)):
        raise ValueError(f"corrupt checkpoint {path}: its network makes {list(made)} of samples of shape {list(shape)}")
    network = build_network(head["network"], path)
    network.load_state_dict(dict(weights))  # checked above
    return network.eval().requires_grad_(False)


def weights_file(path: str | Path) -> Path:
    """``path`` ending in .safetensors; other dots belong to the name (``model-0.5``)."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def save_weights(network: nn.Module, path: str | Path, head: Mapping[str, Any], half: bool = True) -> None:
    """Write a network's tensors to ``path`` (safetensors) and ``head`` to the JSON beside it."""
    write_weights(network.state_dict(), path, head, half)


def write_weights(tensors: Mapping[str, Tensor], path: str | Path, head: Mapping[str, Any], half: bool = True) -> None:
    """Write tensors to ``path`` (safetensors), as float16 by default, and ``head`` to the JSON beside it."""
    path = weights_file(path)
    files.write(path.with_suffix(".json"), json.dumps(head, indent=2) + "\n")
    files.write_tensors(path, stored(tensors, half))  # last: a model is there once its weights are


def read_weights(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors (as float32) that `save_weights` wrote.

    Raises:
        FileNotFoundError: a file is missing. ValueError: not safetensors, corrupt, or another kind of model.
    """
    path = weights_file(path)
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file} (a model is a .safetensors file with a .json beside it)")
    try:
        head = json.loads(path.with_suffix(".json").read_text())
        weights = load_file(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"corrupt checkpoint {path}: {error}; fetch or train it again") from None
    if not isinstance(head, dict) or head.get("kind") != kind:
        found = head.get("kind") if isinstance(head, dict) else type(head).__name__
        raise ValueError(f"{path.with_suffix('.json')} describes {found!r}, expected {kind!r}")
    return head, {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def load_into(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load tensors into a network, with an error that names the file.

    Raises:
        ValueError: names, shapes or types do not fit the architecture, or a number is not finite.
    """
    check_weights(network, weights, path)
    network.load_state_dict(dict(weights))


def check_weights(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare tensors with those of a network.

    Raises:
        ValueError: as `load_into`.
    """
    own = network.state_dict()
    for name in [*own, *(name for name in weights if name not in own)]:
        value, other = weights.get(name), own.get(name)
        if value is None or other is None or value.shape != other.shape:
            has = "is missing" if value is None else "is unknown" if other is None else f"is {list(value.shape)}"
            should = f", it should be {list(other.shape)}" if value is not None and other is not None else ""
            raise ValueError(f"corrupt checkpoint {path}: the weights do not fit its architecture ({name} {has}{should})")
        if value.is_floating_point() != other.is_floating_point():
            raise ValueError(f"corrupt checkpoint {path}: {name} is {value.dtype}, it should be {other.dtype}")
        if not is_finite(value):
            raise ValueError(f"corrupt checkpoint {path}: {name} holds numbers that are not finite")


def is_finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; one pass, no copy."""
    return not value.numel() or not value.is_floating_point() or all(torch.isfinite(end) for end in value.aminmax())
