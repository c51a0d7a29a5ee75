"""Time grids, per-output noise, the three transitions, and plain sampling.

>>> x = steerfm.sample(flow_map, n=64, steps=4, seeds=0)                     # deterministic jumps
>>> x = steerfm.sample(flow_map, n=64, steps=8, transition=Renoise(gamma=1.0))

Every output owns one `torch.Generator` on the CPU, so a sample does not depend on its batch, micro-batch or rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfm import zoo
from steerfm.flowmap import Condition, FlowMap, by_label, map_condition, take_rows
from steerfm.interpolant import Interpolant
from steerfm.randomness import derive, stream


# --- time grids ------------------------------------------------------------------------------------------------------
def time_grid(steps: int, power: float = 1.0) -> list[float]:
    """Times 0 = t_0 < ... < t_steps = 1, t_i = (i / steps)^power; a power above 1 takes small steps near the noise.

    Raises:
        ValueError: steps below 1 or power not positive.
    """
    whole_numbers(steps=steps)
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    if not power > 0:
        raise ValueError(f"power={power}: must be positive")
    return [(i / steps) ** power for i in range(steps + 1)]


# --- noise -----------------------------------------------------------------------------------------------------------
class Noise:
    """Noise for ``n`` outputs of ``k`` particles, from one CPU generator per output.

    The first particle is drawn before the others, so that under a deterministic transition it is the plain sample of its
    seed. Selection and stochastic look-aheads have streams of their own, so that neither changes the noise of the path.

    Args:
        seeds: one integer per output, of any size; see `randomness.stream`.
        k: particles per output.
    """

    def __init__(self, seeds: Sequence[int], k: int = 1) -> None:
        self.k, self.seeds = k, [int(seed) for seed in seeds]

    @cached_property
    def generators(self) -> list[torch.Generator]:  # made when first drawn from: many a run has no use for all its streams
        return [stream(seed) for seed in self.seeds]

    @cached_property
    def selection(self) -> list[torch.Generator]:
        return [stream(seed, "selection") for seed in self.seeds]

    def other(self, purpose: str = "look-ahead") -> Noise:
        """An unrelated stream for the same outputs."""
        return Noise([derive(seed, purpose) for seed in self.seeds], self.k)

    def of(self, k: int) -> Noise:
        """The same streams, going on with ``k`` particles an output."""
        out = copy(self)
        out.k = k
        return out

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal (n * k, *shape), drawn in float32, on the device and in the dtype of ``like``."""
        out = torch.empty(len(self.seeds), self.k, *shape, dtype=torch.float32)  # whatever torch's default is
        for rows, generator in zip(out, self.generators):
            torch.randn(shape, generator=generator, out=rows[0])
            if self.k > 1:
                torch.randn((self.k - 1, *shape), generator=generator, out=rows[1:])
        return out.flatten(0, 1).to(like)

    def start(self, flow_map: FlowMap) -> Tensor:
        """Standard normal states (n * k, *shape) of a map, in its dtype and on its device: x_0."""
        return self.normal(flow_map.shape, torch.empty(0, dtype=flow_map.dtype, device=flow_map.device))

    def uniform(self, columns: int, device: torch.device) -> Tensor:
        """Uniform on [0, 1), (n, columns), for selection."""
        out = torch.stack([torch.rand(columns, generator=generator, dtype=torch.float32) for generator in self.selection])
        return out.to(device)


def whole_numbers(**counts: Any) -> None:
    """Refuse what is no whole number, by name.

    Raises:
        ValueError: naming the argument.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not hasattr(type(count), "__index__"):
            raise ValueError(f"{name}={count!r}: give a whole number")


def seed_list(seeds: int | Sequence[int], n: int) -> list[int]:
    """``s`` means s, s + 1, ..., s + n - 1; a sequence must hold one seed per output.

    Raises:
        ValueError: another number of seeds than outputs, or other things than whole numbers.
    """
    whole_numbers(n=n)
    if n < 1:
        raise ValueError(f"n={n}: at least one output is needed")
    try:
        first = None if isinstance(seeds, bool) else index(seeds)  # type: ignore[arg-type]
        out = [first + i for i in range(n)]  # type: ignore[operator]
    except TypeError:
        try:
            out = [index(seed) for seed in seeds]  # type: ignore[union-attr]
        except TypeError:
            raise ValueError(f"seeds={seeds!r}: give one integer, or one seed per output") from None
    if len(out) != n:
        raise ValueError(f"{len(out)} seeds for n={n} outputs: give one integer, or one seed per output")
    return out


# --- transitions -----------------------------------------------------------------------------------------------------
@dataclass
class Step:
    """The Gaussian kernel of one transition: x' ~ N(mean, std^2 I); deterministic where std = 0.

    Attributes:
        mean: (b, *shape).
        std: standard deviation, the same for all rows.
    """

    mean: Tensor
    std: float

    def sample(self, noise: Tensor | None) -> Tensor:
        """mean + std * noise; ``noise`` (b, *shape) may be None where std = 0."""
        if self.std == 0 or noise is None:
            return self.mean
        return torch.add(self.mean, noise, alpha=self.std)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I), (b,), summed over all entries in float64.

        Raises:
            ValueError: the kernel is deterministic and has no density.
        """
        if self.std == 0:
            raise ValueError("a deterministic transition has no density: use Renoise or Diffuse")
        d = self.mean[0].numel()
        squares = ((x - self.mean) / self.std).flatten(1).square().sum(1, dtype=torch.float64)
        return -0.5 * squares - d * (math.log(self.std) + 0.5 * math.log(2 * math.pi))


class Transition(Protocol):
    """A move of the whole batch from time s to time t; any object with these members is one.

    The step into t = 1 should be deterministic: noise added to the data would stay in them. One that is so for certain may say
    ``lands = True``: a sampler then does not ask for the gradient that no step would follow.

    Attributes:
        endpoint: the kind of endpoint that saves a network call if a look-ahead has it already: "jump" for X_{s,1}(x),
            "denoised" for E[x_1 | x_s = x], "posterior" for a sample of p(x_1 | x_s = x); "" for none.
    """

    @property
    def stochastic(self) -> bool:
        """Whether the steps before the last have noise."""
        ...

    @property
    def endpoint(self) -> str: ...

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        """The kernel from x (b, *shape) at time s to time t > s; ``endpoint`` as described above, where it is known."""
        ...


@dataclass(frozen=True)
class Jump:
    """x' = X_{s,t}(x): deterministic.

    Args:
        hops: equal jumps from s to t; each costs one call.
    """

    hops: int = 1
    endpoint, lands = "jump", True

    @property
    def stochastic(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if self.hops < 1:
            raise ValueError(f"hops={self.hops}: at least one jump is needed")

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        if endpoint is not None and t == 1 and self.hops == 1:
            return Step(endpoint, 0.0)
        for i in range(self.hops):
            x = flow_map.jump(x, s + (t - s) * (i / self.hops), s + (t - s) * ((i + 1) / self.hops), cond)
        return Step(x, 0.0)


@dataclass(frozen=True)
class Renoise:
    """Jump to r = t + gamma (1 - t), then noise back: x' = (alpha_t/alpha_r) X_{s,r}(x) + std z.

    For an exact flow map this keeps every marginal p_t exactly, in any number of steps. gamma = 0 is `Jump`; gamma = 1
    jumps to the data and back, as multistep consistency sampling does (Song et al. 2303.01469, algorithm 1).

    Args:
        gamma: how far to overshoot, in [0, 1].
    """

    gamma: float = 1.0
    endpoint, lands = "jump", True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: must be in [0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.gamma > 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        r = t + self.gamma * (1 - t)
        scale, std = flow_map.interpolant.renoise(r, t)
        x_r = endpoint if endpoint is not None and r == 1 else flow_map.jump(x, s, r, cond)
        return Step(x_r if scale == 1 else scale * x_r, std)


@dataclass(frozen=True)
class Diffuse:
    """Euler-Maruyama step of dx = (b + eps score) dt + sqrt(2 eps) dW, which has the marginals p_t for any eps_t >= 0.

    Args:
        epsilon: a constant, or a function of time; default eps_t = sigma_t, which stays stable as the score grows like
            1 / sigma_t towards the data (a large constant does not).
    """

    epsilon: float | Callable[[float], float] | None = None
    endpoint, lands = "", True

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, float | int) and not self.epsilon >= 0:
            raise ValueError(f"epsilon={self.epsilon}: must be at least 0")

    @property
    def stochastic(self) -> bool:
        return self.epsilon != 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        path, h = flow_map.interpolant, t - s
        b = flow_map.velocity(x, s, cond)
        if t >= 1:
            return Step(x + h * b, 0.0)
        if self.epsilon is None:
            epsilon = path.sigma(s)
        else:
            epsilon = self.epsilon(s) if callable(self.epsilon) else self.epsilon
        return Step(x + h * (b + epsilon * path.score(x, b, s)), math.sqrt(2 * epsilon * h))


@dataclass(frozen=True)
class Bridge:
    """x' ~ p(x_t | x_s = x, x_1 = z): noise to data through a given endpoint z.

    With z = E[x_1 | x_s = x] it is DDPM's ancestral step (eta = 1) or DDIM's (eta = 0; Song et al. 2010.02502, equation 12),
    right only in the limit of many steps. With z a sample of the posterior and eta = 1 the step is exact in any number
    (GLASS, 2602.05993): that needs a look-ahead that draws it.

    Args:
        eta: share of the noise that is drawn anew, in [0, 1]; the rest is what x implies.
        endpoint: "denoised", or "posterior" where the look-ahead is `Posterior`.
    """

    eta: float = 1.0
    endpoint: str = "denoised"
    lands = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: must be in [0, 1]")
        if self.endpoint not in ("denoised", "posterior"):
            raise ValueError(f"endpoint={self.endpoint!r}: denoised or posterior")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, flow_map: FlowMap, x: Tensor, s: float, t: float, cond: Condition, endpoint: Tensor | None = None) -> Step:
        path = flow_map.interpolant
        if endpoint is None:
            if self.endpoint == "posterior":
                raise ValueError("a bridge through posterior samples needs a look-ahead that draws them: lookahead=posterior")
            endpoint = flow_map.denoise(x, s, cond)
        if t >= 1:
            return Step(endpoint, 0.0)
        keep, share, std = self.coefficients(path, s, t)
        return Step(keep * x + share * endpoint, std)

    def coefficients(self, path: Interpolant, s: float, t: float) -> tuple[float, float, float]:
        """(keep, share, std) of the step to t < 1, N(keep x + share z, std^2 I)."""
        # Given z, the path back is x_t -> x_s with this scale and std; Bayes' rule gives the kernel forward.
        rho = path.alpha(s) * path.sigma(t) / (path.alpha(t) * path.sigma(s))
        std = self.eta * path.sigma(t) * math.sqrt(1 - rho**2)
        keep = math.sqrt(path.sigma(t) ** 2 - std**2) / path.sigma(s)
        return keep, path.alpha(t) - keep * path.alpha(s), std


# --- plain sampling --------------------------------------------------------------------------------------------------
def sample(
    flow_map: FlowMap | str | Path,
    n: int = 1,
    steps: int = 4,
    seeds: int | Sequence[int] = 0,
    cond: Condition | str | int | Sequence[str | int] = None,
    transition: Transition | None = None,
    batch_size: int | None = None,
    power: float = 1.0,
    *,
    label: str | int | Sequence[str | int] | None = None,
) -> Tensor:
    """Unsteered samples.

    Args:
        flow_map: the map, or its name, as `steerfm.load` takes it.
        n: number of samples.
        steps: transitions from t = 0 to t = 1.
        seeds: an integer s for s, s + 1, ..., or one seed per sample.
        cond: one row per sample; a class name, index or prompt for all or for each; or None.
        transition: default `Jump()`.
        batch_size: rows per network call; default all. The result does not depend on it.
        power: of the time grid.
        label: in place of ``cond``: the class, by name or index, of all or of each.

    Returns:
        (n, *shape) in model space; `FlowMap.decode` makes pictures of it.
    """
    move: Transition = transition or Jump()
    flow_map = zoo.load(flow_map)
    all_seeds, times = seed_list(seeds, n), time_grid(steps, power)
    cond = as_condition(flow_map, by_label(flow_map, label, cond), n)
    size = n if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one sample at a time")
    parts = []
    with torch.inference_mode():
        for begin in range(0, n, size):
            rows = slice(begin, begin + size)
            parts.append(walk(flow_map, Noise(all_seeds[rows]), times, take_rows(cond, rows), move))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).clone()


def as_condition(flow_map: FlowMap, cond: Condition | str | int | Sequence[str | int], n: int) -> Condition:
    """Check and move a condition: tensors need one row per output; a class name or index is repeated.

    Raises:
        ValueError: another number of rows than outputs, or an unknown class.
    """
    if cond is None or isinstance(cond, str | int | Sequence):
        return flow_map.condition(cond, n)

    null = flow_map.null if flow_map.class_names and isinstance(cond, Tensor) else None

    def check(rows: Tensor) -> Tensor:
        if rows.ndim == 0 or len(rows) != n:
            raise ValueError(f"cond has shape {tuple(rows.shape)} for n={n} outputs: give one row per output")
        if isinstance(null, Tensor) and not rows.is_floating_point() and rows.shape[1:] == null.shape[1:]:
            last = int(null.max())
            if bool(((rows < 0) | (rows > last)).any()):
                raise ValueError(f"cond={rows.tolist()}: classes are 0 to {last - 1}, and {last} stands for none")
        return rows.to(flow_map.device)

    return map_condition(check, cond)


def walk(flow_map: FlowMap, noise: Noise, times: Sequence[float], cond: Condition, transition: Transition) -> Tensor:
    """One chain of transitions for every row of the noise, (n * k, *shape), from x_0 to the last of the times."""
    x = noise.start(flow_map)
    for s, t in zip(times, times[1:]):
        step = transition.step(flow_map, x, s, t, cond)
        x = step.sample(noise.normal(flow_map.shape, x) if step.std else None)
    return x


def part(value: Any, table: Mapping[str, Any], what: str, default: Any = None) -> Any:
    """A part of a method.

    Args:
        value: its name; a dictionary of its arguments, with its ``name`` if it is not the default; or the part itself.
        table: parts by name, or their classes.
        what: it is, for errors.
        default: the part whose arguments a dictionary without a name changes.

    Raises:
        ValueError: no such part or argument; with those that there are.
    """
    if isinstance(value, int | float | Sequence) and not isinstance(value, str):
        names = f" ({', '.join(table)})" if table else ""
        raise ValueError(f"{what}={value}: give a name{names} or a dictionary of arguments")
    if not isinstance(value, str | Mapping):
        return value
    arguments = {} if isinstance(value, str) else dict(value)
    name = value if isinstance(value, str) else arguments.pop("name", None)
    if name is not None and name not in table:
        raise ValueError(f"unknown {what} {name!r}; {what}s: {', '.join(table)}")
    made = default if name is None else table[name]
    if made is None:
        raise ValueError(f"{what}={value}: this method has none by default: give it a name, {what}.name={'|'.join(table)}")
    known = [f.name for f in fields(made) if f.init] if is_dataclass(made) else []
    for key in arguments:
        if key not in known:
            raise ValueError(f"{what} has no argument {key!r}; arguments: {', '.join(known) or 'none'}")
    try:
        return made(**arguments) if isinstance(made, type) else replace(made, **arguments) if arguments else made
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


TRANSITIONS: dict[str, type] = {"jump": Jump, "renoise": Renoise, "diffuse": Diffuse, "bridge": Bridge}
"""Transitions by the name that configurations use."""
