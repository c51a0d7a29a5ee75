"""Sequential Monte Carlo of steerfm and of the package `particles` (Chopin & Papaspiliopoulos 2020), on the same model.

    pip install -e ".[bench]"; python benchmarks/smc.py        # 1,000 particles, 8 steps, 64 outputs: seconds

The model is that of `steerfm.FeynmanKac`: particles start in N(0, 1), move by X_{s,1} and fresh noise, and have the potentials
V_i / V_{i-1}, log V_i = t_i strength r(X_{t_i,1}(x)), with systematic resampling below an ESS of half of the particles. The
data are one Gaussian, so the map is a line of arithmetic on both sides, and the time is that of the particle methods. Each side
calls the map once per particle and step. steerfm runs all outputs as one batch; `particles` runs in a loop over outputs. log Z
and the mean of the target are known in closed form. Prints a table, then one JSON line. For resampling alone, see `steerfm
bench resampling`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import particles  # pyright: ignore[reportMissingImports] # in the extra bench
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import steerfm

MEAN, VARIANCE = 0.5, 0.36
LINEAR, QUADRATIC, STRENGTH = 1.2, 0.5, 2.0
Array = np.ndarray


class TwistedPath(particles.FeynmanKac):
    """The Feynman-Kac model of `steerfm.FeynmanKac` in one dimension, for `particles.SMC`.

    A particle (N, 2) is a state and its look-ahead (x, X_{t,1}(x)), so that both the move and the potential use one call.

    Args:
        lookahead: maps x (N,), t to X_{t,1}(x) (N,).
        reward: maps x (N,) to (N,); includes the strength.
        steps: number of steps from t = 0 to t = 1.
        rng: generator of the noise.
    """

    def __init__(
        self, lookahead: Callable[[Array, float], Array], reward: Callable[[Array], Array], steps: int, rng: np.random.Generator
    ) -> None:
        super().__init__(T=steps + 1)
        self.lookahead, self.reward, self.steps, self.rng = lookahead, reward, steps, rng

    def M0(self, N: int) -> Array:  # noqa: N802, the names of the package
        return self._state(self.rng.standard_normal(N), 0.0)

    def M(self, t: int, xp: Array) -> Array:  # noqa: N802
        time = t / self.steps
        if time == 1:
            return xp[:, [1, 1]]  # X_{1,1} is the identity
        return self._state(time * xp[:, 1] + (1 - time) * self.rng.standard_normal(len(xp)), time)

    def logG(self, t: int, xp: Array | None, x: Array) -> Array:  # noqa: N802
        value = t / self.steps * self.reward(x[:, 1])
        return value if xp is None else value - (t - 1) / self.steps * self.reward(xp[:, 1])

    def _state(self, x: Array, time: float) -> Array:
        return np.stack([x, self.lookahead(x, time)], 1)


def theirs(
    lookahead: Callable[[Array, float], Array], reward: Callable[[Array], Array], k: int, steps: int, n: int, seed: int
) -> tuple[Array, Array]:
    """Return log Z and weighted mean, (n,) each, of ``n`` independent runs of ``k`` particles."""
    out = []
    for output in range(seed, seed + n):
        np.random.seed(output)  # the package's resampling draws from numpy's global state and takes no generator
        model = TwistedPath(lookahead, reward, steps, np.random.default_rng(output))
        run = particles.SMC(fk=model, N=k, resampling="systematic", ESSrmin=0.5)
        run.run()
        assert run.W is not None and run.X is not None
        out.append((run.logLt, run.W @ run.X[:, 1]))
    log_z, mean = np.array(out).T
    return log_z, mean


def ours(
    flow_map: steerfm.FlowMap, reward: Callable[[Tensor], Tensor], k: int, steps: int, n: int, seed: int
) -> tuple[Array, Array]:
    """Do the same with `steerfm.steer`; the reward includes the strength."""
    result = steerfm.steer(flow_map, reward, steerfm.FeynmanKac(particles=k, steps=steps), n, seed)
    assert result.log_z is not None
    return result.log_z.numpy(), (result.log_weights.exp() * result.samples[..., 0]).sum(1).numpy()


def gaussian_lookahead(x: Array, t: float) -> Array:
    """X_{t,1} of data N(MEAN, VARIANCE)."""
    return MEAN + (x - t * MEAN) * np.sqrt(VARIANCE / (t**2 * VARIANCE + (1 - t) ** 2))


def stopwatch(call: Callable, seconds: list[float]) -> Callable:
    """Wrap a function so that the seconds of every call are appended to a list."""

    def wrapper(*args):
        start = time.perf_counter()
        out = call(*args)
        seconds.append(time.perf_counter() - start)
        return out

    return wrapper


def summary(log_z: Array, mean: Array) -> dict[str, float]:
    """Return mean and standard error over the outputs."""
    out = {}
    for name, values in {"log_z": log_z, "mean": mean}.items():
        out |= {name: float(values.mean()), f"{name}_error": float(values.std(ddof=1) / len(values) ** 0.5)}
    return out


def z_score(a: dict[str, float], b: dict[str, float], name: str) -> float:
    """Return the z-score of the difference of two estimates."""
    return (a[name] - b[name]) / (a[f"{name}_error"] ** 2 + b[f"{name}_error"] ** 2) ** 0.5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--outputs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    size = (options.particles, options.steps, options.outputs)

    mixture = steerfm.GaussianMixture([[MEAN]], [[VARIANCE]])
    target, log_z = mixture.tilt([LINEAR], QUADRATIC, STRENGTH)
    flow_map = mixture.flow_map()
    calls: list[float] = []  # seconds in the map, on both sides
    flow_map.average_velocity = stopwatch(flow_map.average_velocity, calls)
    lookahead = stopwatch(gaussian_lookahead, calls)

    def reward(x: Array) -> Array:
        return STRENGTH * (LINEAR * x - QUADRATIC / 2 * x**2)

    def torch_reward(x: Tensor) -> Tensor:
        return reward(x[:, 0])  # type: ignore[arg-type,return-value]

    sides = {
        "steerfm": lambda seed: ours(flow_map, torch_reward, *size, seed),
        "particles": lambda seed: theirs(lookahead, reward, *size, seed),
    }
    estimates = {name: summary(*run(1000 * i)) for i, (name, run) in enumerate(sides.items())}  # also compiles
    estimates["closed form"] = {"log_z": float(log_z), "log_z_error": 0.0, "mean": float(target.mean()), "mean_error": 0.0}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    inside: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            calls.clear()
            start = time.perf_counter()
            sides[name](0)
            seconds[name].append(time.perf_counter() - start)
            inside[name].append(sum(calls))
    median = {name: {"all": statistics.median(seconds[name]), "map": statistics.median(inside[name])} for name in sides}
    scores = {
        f"{a} - {b}": {key: round(z_score(estimates[a], estimates[b], key), 2) for key in ("log_z", "mean")}
        for a, b in itertools.combinations(estimates, 2)
    }

    table = Table("", "log Z", "mean", "seconds", "of it the map", title="{} particles, {} steps, {} outputs".format(*size))
    for name, values in estimates.items():
        cells = [f"{values[key]:.4f} ± {values[f'{key}_error']:.4f}" for key in ("log_z", "mean")]
        table.add_row(name, *cells, *(f"{value:.3f}" for value in median.get(name, {}).values()))
    console = Console(width=130)
    console.print(table)
    for pair, z in scores.items():
        console.print(f"z of {pair}: log Z {z['log_z']:+.2f}, mean {z['mean']:+.2f}", highlight=False)
    result = {
        "benchmark": "smc",
        **vars(options),
        "estimates": estimates,
        "z": scores,
        "seconds": median,
        "ratio": statistics.median(b / a for a, b in zip(*seconds.values())),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
