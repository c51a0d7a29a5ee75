"""The engine: every step takes all particles of all outputs as one batch from t_i to t_{i+1}.

    look ahead -> value (and direction) -> transition (guided) -> correction of the log-weights -> selection

`Steering` is a method given by its parts; `steer` runs any method on a problem. Presets are in `methods.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfm.cost import Cost, Ledger
from steerfm.flowmap import Condition, FlowMap, Microbatched, take_rows
from steerfm.rewards import Reward, RewardError, as_reward
from steerfm.sampling import TRANSITIONS, Noise, Renoise, Transition, as_condition, seed_list, time_grid
from steerfm.steering.corrections import CORRECTIONS, Correction, Move, Twisted
from steerfm.steering.lookahead import LOOKAHEADS, Jump, Lookahead
from steerfm.steering.value import (
    GUIDANCES,
    TEMPERINGS,
    Evaluation,
    Guidance,
    Power,
    Problem,
    Tempering,
    evaluate,
    repeat_rows,
)
from steerfm.steering.weights import Resample, Selection, effective_sample_size, log_mean, normalise, wide

Tick = Callable[[int, int], None]


# --- results ---------------------------------------------------------------------------------------------------------
@dataclass
class Trace:
    """What happened, per step i = 0 ... steps - 1 (the state after the step).

    Attributes:
        t: (steps,) time.
        ess: (steps, n) effective sample size as a share of the particles, before selection.
        resampled: (steps, n) whether the output was resampled.
        ancestors: (steps, n, k) whose copy each particle is.
        value: (steps, n, k) tempered value; at the last step strength * reward.
        guidance_ratio: (steps, n, k) length of the shift over that of the step's displacement; 0 without guidance.
        lookaheads: (steps, n, *shape) the first particle's look-ahead, at the last step the sample itself, where asked for
            and looked at; else None.
    """

    t: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    value: Tensor
    guidance_ratio: Tensor
    lookaheads: Tensor | None = None


@dataclass
class Outcome:
    """What a method returns for the outputs of one batch: particles (n, k, *shape), log-weights and log Z increments."""

    samples: Tensor
    rewards: Tensor
    components: dict[str, Tensor]
    log_weights: Tensor
    log_z: Tensor | None
    trace: Trace


@dataclass
class SteeringResult(Outcome):
    """The result of `steer`.

    Attributes:
        samples: (n, k, *shape) all particles, in model space.
        rewards: (n, k); components: {name: (n, k)} raw values of every term of the reward.
        log_weights: (n, k) with logsumexp = 0 over the particles of each output.
        log_z: (n,) estimate of log E exp(strength * r) where the method gives one, else None.
        trace: see `Trace`. cost: see `steerfm.cost.Cost`.
    """

    cost: Cost
    flow_map: FlowMap

    def images(self) -> Tensor:
        """(n, k, c, h, w) pictures in [0, 1] (vectors stay as they are)."""
        n, k = self.samples.shape[:2]
        return self.flow_map.decode(self.samples.flatten(0, 1)).unflatten(0, (n, k))

    def best(self) -> Tensor:
        """(n, *shape): the particle of highest reward of each output. This is a search, not a sample of the target."""
        return self.samples[torch.arange(len(self.samples), device=self.samples.device), self.rewards.argmax(1)]

    def resample(self, generator: torch.Generator) -> Tensor:
        """(n, k, *shape) equally weighted particles, drawn by systematic resampling.

        Args:
            generator: a CPU generator.
        """
        n, k = self.log_weights.shape
        u = torch.rand(n, k, generator=generator).to(self.log_weights)
        ancestors = Resample("systematic", 1.0).select(self.log_weights, u).ancestors
        return self.samples[torch.arange(n, device=self.samples.device).unsqueeze(1), ancestors]


class Method(Protocol):
    """Anything that turns a problem and noise into weighted particles; `Steering` is the one by parts."""

    @property
    def particles(self) -> int: ...

    def check(self, reward: Reward) -> None:
        """Raise a ValueError that names the fix, if the method cannot work with this reward."""
        ...

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """Run ``n`` outputs of ``particles`` particles."""
        ...


# --- the method by parts ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Steering:
    """A steering method given by its parts; parts may be objects or their names.

    Samples: what its correction says; with the default, the tilt of the base chain's own law, as the particles grow.

    Attributes:
        particles: per output.
        steps: transitions from t = 0 to t = 1.
        lookahead: denoise or jump, or None: the reward is only seen at the end.
        guidance: map, endpoint or ascent, or None: gradient-free.
        tempering: beta(t): linear, exponential, none, a power of t, or any function with beta(1) = 1.
        transition: jump, renoise or diffuse.
        correction: twisted, jarzynski or none.
        resampling: a scheme's name or any `Selection`; None for no selection.
        threshold: resample below this ESS, as a share of the particles.
        power: of the time grid, t_i = (i / steps)^power.
    """

    particles: int = 16
    steps: int = 8
    lookahead: Lookahead | str | None = field(default_factory=Jump)
    guidance: Guidance | str | None = None
    tempering: Tempering | str | float = field(default_factory=Power)
    transition: Transition | str = field(default_factory=Renoise)
    correction: Correction | str = field(default_factory=Twisted)
    resampling: Selection | str | None = "systematic"
    threshold: float = 0.5
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise ValueError(f"particles={self.particles}: at least one particle is needed")
        time_grid(self.steps, self.power)
        resolved: dict[str, Any] = {
            "lookahead": _part(self.lookahead, LOOKAHEADS, "lookahead"),
            "guidance": _part(self.guidance, GUIDANCES, "guidance"),
            "transition": _part(self.transition, TRANSITIONS, "transition"),
            "correction": _part(self.correction, CORRECTIONS, "correction"),
            "tempering": Power(float(self.tempering))
            if isinstance(self.tempering, float | int)
            else _part(self.tempering, TEMPERINGS, "tempering"),
            "resampling": Resample(self.resampling, self.threshold) if isinstance(self.resampling, str) else self.resampling,
        }
        for name, part in resolved.items():
            object.__setattr__(self, name, part)
        if self.guidance is not None and self.lookahead is None:
            raise ValueError("guidance needs a look-ahead: lookahead=jump or lookahead=denoise")
        self.correction.check(self)  # type: ignore[union-attr]

    def check(self, reward: Reward) -> None:
        if self.guidance is not None and not reward.differentiable:
            raise RewardError(
                f"reward {reward.name!r} is a black box, and {type(self).__name__} follows its gradient: use BestOfN, or "
                "FeynmanKac with guidance=None"
            )

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`. Gradient-free methods run in inference mode: no graph is ever kept."""
        with torch.inference_mode() if self.guidance is None else torch.no_grad():
            return self._run(problem, noise, n, lookaheads, tick)

    def _run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        flow_map, k, shape = problem.flow_map, self.particles, problem.flow_map.shape
        transition, correction, guidance = self.transition, self.correction, self.guidance
        assert not isinstance(transition, str) and not isinstance(correction, str) and not isinstance(guidance, str)
        times = time_grid(self.steps, self.power)
        x = noise.normal(shape, torch.empty(0, dtype=flow_map.dtype, device=flow_map.device))
        row = torch.arange(n, device=x.device).unsqueeze(1) * k
        zero = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
        now = self._look(problem, x, 0.0, zero)
        log_w, log_z = correction.start(now).view(n, k), zero.new_zeros(n)
        records: list[dict[str, Tensor]] = []
        components: dict[str, Tensor] = {}
        rewards = zero
        for i, (s, t) in enumerate(zip(times, times[1:])):
            step = transition.step(flow_map, x, s, t, problem.cond, self._shared(now))
            shift, ratio = None, zero
            if guidance is not None and now.direction is not None and correction.guides(step):
                shift = guidance.shift(flow_map, now, x, step.mean, s, t, step.std)
                ratio = shift.flatten(1).norm(dim=1) / (step.mean - x).flatten(1).norm(dim=1).clamp_min(1e-12)
            z = noise.normal(shape, x) if step.std else None
            x = (step if shift is None else type(step)(step.mean + shift, step.std)).sample(z)
            if i + 1 < self.steps:
                after = self._look(problem, x, t, zero)
            else:
                scores = problem.score(x)
                rewards, components = scores.total, scores.components
                after = Evaluation(tilt := problem.strength * rewards.to(zero.dtype), tilt, x)
            move = Move(now, after, step, shift, z, self._beta(s), self._beta(t))
            log_w = log_w + correction.increment(move).view(n, k)
            record = {
                "ess": effective_sample_size(log_w),
                "value": after.value.view(n, k),
                "guidance_ratio": ratio.view(n, k),
                "resampled": torch.zeros(n, dtype=torch.bool, device=x.device),
                "ancestors": torch.arange(k, device=x.device).expand(n, k),
            }
            if lookaheads and self.lookahead is not None and after.endpoint is not None:
                record["lookaheads"] = after.endpoint.view(n, k, *shape)[:, 0]
            if self.resampling is not None and i + 1 < self.steps:
                selected = self.resampling.select(log_w, noise.uniform(k, x.device))  # type: ignore[union-attr]
                if bool(selected.resampled.any()):
                    rows = (row + selected.ancestors).flatten()
                    x, after = x[rows], after.select(rows)
                    gained = log_mean(log_w)
                    log_z = torch.where(selected.resampled, log_z + gained, log_z)
                    log_w = torch.where(selected.resampled.unsqueeze(1), torch.zeros_like(log_w), log_w)
                record["resampled"], record["ancestors"] = selected.resampled, selected.ancestors
            records.append(record)
            now = after
            tick(i + 1, self.steps)
        looks = [record.pop("lookaheads") for record in records if "lookaheads" in record]
        trace = Trace(
            t=torch.tensor(times[1:]),
            lookaheads=torch.stack(looks) if len(looks) == self.steps else None,
            **{name: torch.stack([record[name] for record in records]) for name in records[0]},
        )
        return Outcome(
            samples=x.view(n, k, *shape),
            rewards=rewards.view(n, k),
            components={name: value.view(n, k) for name, value in components.items()},
            log_weights=normalise(log_w),
            log_z=log_z + log_mean(log_w) if correction.samples else None,
            trace=trace,
        )

    def _beta(self, t: float) -> float:
        assert callable(self.tempering)
        return 1.0 if t >= 1 else float(self.tempering(t))

    def _look(self, problem: Problem, x: Tensor, t: float, zero: Tensor) -> Evaluation:
        """The evaluation at time t, or zeros where nobody would use it."""
        beta = self._beta(t)
        correction: Any = self.correction
        wanted = self.guidance is not None or correction.samples or self.resampling is not None
        if self.lookahead is None or not wanted or (beta == 0 and not correction.looks_untempered):
            return Evaluation(zero, zero)
        if self.guidance is None:
            return evaluate(problem, self.lookahead, x, t, beta)  # type: ignore[arg-type]
        return self.guidance.evaluate(problem, self.lookahead, x, t, beta)  # type: ignore[union-attr,arg-type]

    def _shared(self, now: Evaluation) -> Tensor | None:
        """X_{s,1}(x) where the look-ahead was one jump of the map: a transition that needs it saves the call."""
        return now.endpoint if isinstance(self.lookahead, Jump) and self.lookahead.hops == 1 else None


# --- running ---------------------------------------------------------------------------------------------------------
def steer(
    flow_map: FlowMap,
    reward: Reward | Callable[..., Tensor],
    method: Method,
    n: int = 1,
    seeds: int | Sequence[int] = 0,
    strength: float | Sequence[float] | Tensor = 1.0,
    cond: Condition | str | int | Sequence[str | int] = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    lookaheads: bool = False,
    progress: Tick | None = None,
) -> SteeringResult:
    """Steer samples of a flow map towards a reward: q(x) proportional to p_1(x) exp(strength * r(x)).

    Args:
        flow_map: the model.
        reward: a Reward, a composition, or a plain function of pictures (b, c, h, w) in [0, 1] (vectors for toy maps).
        method: a preset such as `FeynmanKac(particles=16, steps=8)`, or a `Steering` of your own parts.
        n: outputs; each has its own particles.
        seeds: an integer s for s, s + 1, ..., or one seed per output.
        strength: of the tilt, finite; one number, or one per output.
        cond: one row per output, or a class name or index for all.
        prompts, labels: for rewards that read them; labels default to ``cond`` where that holds class labels.
        batch_size: outputs at a time; the result does not depend on it.
        micro_batch: rows per network call; the result does not depend on it.
        lookaheads: keep the first particle's look-ahead pictures in the trace.
        progress: called with (steps done, steps in all).

    Returns:
        A `SteeringResult` with all particles, their log-weights, the trace and the cost.

    Raises:
        ValueError: naming what is wrong and the fix (`RewardError` where it is the reward).
    """
    reward = as_reward(reward)
    method.check(reward)
    all_seeds = seed_list(seeds, n)
    rows = as_condition(flow_map, cond, n)
    k = method.particles
    tilt = torch.as_tensor(strength, dtype=wide(flow_map.device), device=flow_map.device)
    if tilt.ndim > 1 or (tilt.ndim == 1 and len(tilt) != n):
        raise ValueError(f"strength has shape {tuple(tilt.shape)} for n={n} outputs: give one number, or one per output")
    if not bool(torch.isfinite(tilt).all()):
        raise ValueError(f"strength={strength}: must be finite")
    tilt = tilt.expand(n)
    if labels is None and isinstance(rows, Tensor) and rows.ndim == 1 and not rows.is_floating_point():
        labels = rows
    texts = [prompts] * n if isinstance(prompts, str) else prompts
    if texts is not None and len(texts) != n:
        raise ValueError(f"{len(texts)} prompts for n={n} outputs: give one prompt, or one per output")
    if isinstance(reward, torch.nn.Module):
        reward.to(flow_map.device)
    size = n if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one output at a time")
    batches = -(-n // size)
    network = Microbatched(flow_map, micro_batch) if micro_batch is not None else flow_map
    outcomes = []
    with Ledger() as ledger:
        for index, begin in enumerate(range(0, n, size)):
            part = slice(begin, min(begin + size, n))
            problem = Problem(
                network,
                reward,
                tilt[part].repeat_interleave(k),
                repeat_rows(take_rows(rows, part), k),
                None if labels is None else labels[part].repeat_interleave(k),
                None if texts is None else [text for text in texts[part] for _ in range(k)],
            )

            def tick(done: int, steps: int, index: int = index) -> None:
                if progress is not None:
                    progress(index * steps + done, batches * steps)

            outcomes.append(method.run(problem, Noise(all_seeds[part], k), part.stop - part.start, lookaheads, tick))
    return SteeringResult(**vars(join(outcomes)), cost=ledger.cost, flow_map=flow_map)


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of consecutive outputs as one; tensors leave inference mode."""

    def cat(parts: Sequence[Tensor | None], axis: int = 0) -> Any:
        tensors = [part for part in parts if part is not None]
        if len(tensors) < len(parts):
            return None
        return tensors[0].clone() if len(tensors) == 1 else torch.cat(tensors, axis)

    traces = [outcome.trace for outcome in outcomes]
    trace = {f.name: cat([getattr(trace, f.name) for trace in traces], 1) for f in fields(Trace) if f.name != "t"}
    return Outcome(
        samples=cat([outcome.samples for outcome in outcomes]),
        rewards=cat([outcome.rewards for outcome in outcomes]),
        components={name: cat([o.components[name] for o in outcomes]) for name in outcomes[0].components},
        log_weights=cat([outcome.log_weights for outcome in outcomes]),
        log_z=cat([outcome.log_z for outcome in outcomes]),
        trace=Trace(t=traces[0].t.clone(), **trace),
    )


def _part(value: Any, table: dict[str, Any], what: str) -> Any:
    """A part from its name; anything but a string is a part already."""
    if not isinstance(value, str):
        return value
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}; {what}s: {', '.join(table)}")
    part = table[value]
    return part() if isinstance(part, type) else part
