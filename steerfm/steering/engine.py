"""The engine: every step takes all particles of all outputs as one batch from t_i to t_{i+1}.

    look ahead -> value (and direction) -> transition (guided) -> correction of the log-weights -> selection

`Steering` is a method given by its parts. Presets are in `methods.py`; `run.py` runs any of them on a problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfm.flowmap import Microbatched
from steerfm.rewards import Reward, RewardError
from steerfm.sampling import TRANSITIONS, Noise, Renoise, Step, Transition, part, time_grid, whole_numbers
from steerfm.steering.corrections import CORRECTIONS, Correction, Family, Move, Twisted
from steerfm.steering.lookahead import LOOKAHEADS, Endpoints, Jump, Lookahead, Rollout
from steerfm.steering.value import (
    GUIDANCES,
    TEMPERINGS,
    Adaptive,
    Evaluation,
    Guidance,
    Power,
    Problem,
    Tempering,
    View,
    evaluate,
    look,
    needs_gradient,
)
from steerfm.steering.weights import (
    Candidates,
    Resample,
    Selected,
    Selection,
    effective_sample_size,
    largest,
    log_mean,
    log_mean_exp,
    normalise,
    unbiased,
    wide,
)

Tick = Callable[[int, int], None]


# --- results ---------------------------------------------------------------------------------------------------------
@dataclass
class Trace:
    """What happened, per step i = 0 ... steps - 1 (the state after the step).

    Where a selection left fewer particles than there were at first, the missing ones are NaN, their ancestors -1.

    Attributes:
        t: (steps,) time.
        ess: (steps, n) effective sample size as a share of the particles, before selection.
        resampled: (steps, n) whether the output was resampled.
        ancestors: (steps, n, k) whose copy each particle is; at the first step, of the particles that looked ahead at t = 0.
        value: (steps, n, k) tempered value; at the last step strength * reward.
        guidance_ratio: (steps, n, k) length of the shift over that of the step's displacement; 0 without guidance.
        gradient_norm: (steps, n, k) length of the guidance's direction before the step; its tail over the particles says
            whether the look-ahead tears at basin borders. Empty where the method has none.
        beta: (steps, n) inverse temperature of the value. Empty where the method has none.
        lookaheads: (steps, n, *shape) the first particle's look-ahead, at the last step the sample itself, where asked for
            and looked at; else None.
    """

    t: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    value: Tensor
    guidance_ratio: Tensor
    gradient_norm: Tensor | None = None
    beta: Tensor | None = None
    lookaheads: Tensor | None = None

    def origins(self) -> Tensor:
        """(steps, n, k) which of the first particles each one descends from."""
        out = [self.ancestors[0]]
        for ancestors in self.ancestors[1:]:
            out.append(out[-1].gather(1, ancestors.clamp_min(0)).masked_fill(ancestors < 0, -1))
        return torch.stack(out)

    def unique(self) -> Tensor:
        """(n,) how many of the first particles have descendants at the end."""
        last = self.origins()[-1].sort(1).values
        return ((last.diff(dim=1) > 0) & (last[:, :-1] >= 0)).sum(1) + 1


@dataclass
class Outcome:
    """What a method returns for the outputs of one batch: particles (n, k, *shape), log-weights and log Z increments."""

    samples: Tensor
    rewards: Tensor
    components: dict[str, Tensor]
    log_weights: Tensor
    log_z: Tensor | None
    trace: Trace


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


@dataclass
class Parents:
    """The particles before a selection, and who of them went on; without ``selected`` all did."""

    x: Tensor
    now: Evaluation
    problem: Problem
    log_w: Tensor
    selected: Selected | None = None


# --- the method by parts ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Steering:
    """A steering method given by its parts; parts may be objects, their names, or dictionaries of their arguments:
    ``guidance={"scale": 0.5}`` changes the method's own, ``{"name": "map", "scale": 0.5}`` takes another.

    Samples: what its correction says; with the default, the tilt of the base chain's own law, as the particles grow.

    Attributes:
        particles: per output.
        steps: transitions from t = 0 to t = 1.
        lookahead: denoise, jump, rollout, smooth, renoise or posterior, or None: the reward is only seen at the end.
        guidance: map, endpoint, free or ascent, or None: no gradient.
        tempering: beta(t): linear, exponential, adaptive, none, a power of t, or any function with beta(1) = 1.
        transition: jump, renoise, diffuse or bridge.
        correction: twisted, marginal, jarzynski or none.
        resampling: a scheme's name or any `Selection`; None for no selection. Asked before steps with noise only: elsewhere
            copies would stay copies.
        threshold: resample below this ESS, as a share of the particles.
        power: of the time grid, t_i = (i / steps)^power.
        recurrence: times each step but the last is taken, going back by noising in between (FreeDoM's time travel).
        stop: guide only at times below this.
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
    recurrence: int = 1
    stop: float = 1.0

    def __post_init__(self) -> None:
        whole_numbers(particles=self.particles, recurrence=self.recurrence)
        if self.recurrence < 1:
            raise ValueError(f"recurrence={self.recurrence}: each step is taken at least once")
        if self.particles < 1:
            raise ValueError(f"particles={self.particles}: at least one particle is needed")
        time_grid(self.steps, self.power)
        resolved: dict[str, Any] = {
            "lookahead": part(self.lookahead, LOOKAHEADS, "lookahead", self._default("lookahead")),
            "guidance": part(self.guidance, GUIDANCES, "guidance", self._default("guidance")),
            "transition": part(self.transition, TRANSITIONS, "transition", self._default("transition")),
            "correction": part(self.correction, CORRECTIONS, "correction", self._default("correction")),
            "tempering": Power(float(self.tempering))
            if isinstance(self.tempering, float | int)
            else part(self.tempering, TEMPERINGS, "tempering", self._default("tempering")),
            "resampling": Resample(self.resampling, self.threshold)
            if isinstance(self.resampling, str)
            else part(self.resampling, {}, "resampling", Resample(threshold=self.threshold)),
        }
        for name, value in resolved.items():
            if value is None and name in ("transition", "correction", "tempering"):
                raise ValueError(f"{name}=None: give one, such as {self._default(name)}")
            object.__setattr__(self, name, value)
        if self.guidance is not None and self.lookahead is None:
            raise ValueError("guidance needs a look-ahead: lookahead=jump or lookahead=denoise")
        if self.lookahead is None and self.resampling is not None and self.resampling.ranks:  # type: ignore[union-attr]
            raise ValueError("this selection ranks look-aheads: lookahead=jump or lookahead=denoise")
        self.correction.check(self)  # type: ignore[union-attr]

    @classmethod
    def _default(cls, name: str) -> Any:
        """The part that this method has by itself."""
        field = cls.__dataclass_fields__[name]
        return field.default if field.default_factory is MISSING else field.default_factory()

    def check(self, reward: Reward) -> None:
        if needs_gradient(self.guidance) and not reward.differentiable:  # type: ignore[arg-type]
            raise RewardError(
                f"reward {reward.name!r} is a black box, and {type(self).__name__} follows its gradient: use BestOfN, or "
                "FeynmanKac with guidance=None"
            )

    def run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        """See `Method.run`. Gradient-free methods run in inference mode: no graph is ever kept."""
        correction, guidance = self.correction, self.guidance
        follows = guidance is not None and guidance.differentiates  # type: ignore[union-attr]
        if follows and not needs_gradient(guidance) and not problem.has_gradient():  # type: ignore[arg-type]
            return replace(self, guidance=None).run(problem, noise, n, lookaheads, tick)
        graph = correction.differentiates or follows  # type: ignore[union-attr]
        with torch.no_grad() if graph else torch.inference_mode():
            return self._run(problem, noise, n, lookaheads, tick)

    def times(self) -> list[float]:
        """The times visited, t_0 = 0 to t_end = 1; with ``recurrence`` they go back and forth."""
        grid = time_grid(self.steps, self.power)
        out = grid[:1]
        for s, t in zip(grid, grid[1:]):
            out += [t] if t == 1 else [t, s] * (self.recurrence - 1) + [t]
        return out

    def _run(self, problem: Problem, noise: Noise, n: int, lookaheads: bool, tick: Tick) -> Outcome:
        flow_map, shape = problem.flow_map, problem.flow_map.shape
        transition, correction, guidance, selection = self.transition, self.correction, self.guidance, self.resampling
        assert not any(isinstance(part, str) for part in (transition, correction, guidance, selection))
        times, k, looks_noise = self.times(), noise.k, noise.other()
        x = noise.normal(shape, torch.empty(0, dtype=flow_map.dtype, device=flow_map.device))
        zero = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
        now = self._look(problem, looks_noise, x, 0.0, zero, None, zero)
        log_w, log_z = correction.start(now).view(n, k), zero.new_zeros(n)  # type: ignore[union-attr]
        first_tilt, parents = now.tilt.view(n, k), Parents(x, now, problem, log_w)
        records: list[dict[str, Tensor]] = []
        components: dict[str, Tensor] = {}
        rewards, shared = zero, None

        def select(done: int, s: float, t: float) -> Selected:
            """Ask the selection before the step from s to t; without noise in it, copies would stay copies."""
            nonlocal x, now, log_w, log_z, k, problem, zero, parents
            parents = Parents(x, now, problem, log_w)
            parts = t < s or (t < 1 and transition.stochastic)  # type: ignore[union-attr]
            if selection is None or not (parts or selection.prunes):  # type: ignore[union-attr]
                return Selected.none(log_w)
            u = noise.uniform(k, x.device)
            selected = selection.select(Candidates(log_w, now.tilt.view(n, k), u, done, s, parts))  # type: ignore[union-attr]
            if bool(selected.resampled.any()):
                parents = replace(parents, selected=selected)
                rows = (torch.arange(n, device=x.device).unsqueeze(1) * k + selected.ancestors).flatten()
                x, now = x[rows], now.select(rows)
                log_z = torch.where(selected.resampled, log_z + log_mean(log_w), log_z)
                log_w = torch.where(selected.resampled.unsqueeze(1), 0.0, log_w.gather(1, selected.ancestors))
                if selected.ancestors.shape[1] < k:
                    k = noise.k = looks_noise.k = selected.ancestors.shape[1]
                    problem, zero = problem.select(rows), zero[rows]
            return selected

        first = select(0, times[0], times[1])
        for i, (s, t) in enumerate(zip(times, times[1:])):
            last = i + 2 == len(times)
            if t < s:  # back in time: the noising kernel, which no guidance bends
                scale, std = flow_map.interpolant.renoise(s, t)
                step = Step(scale * x, std)
            else:
                shared = self._shared(now)
                step = transition.step(flow_map, x, s, t, problem.cond, shared)  # type: ignore[union-attr]
            shift, ratio, norm = None, zero, zero
            if guidance is not None and now.direction is not None and s < min(t, self.stop) and correction.guides(step):  # type: ignore[union-attr]
                shift = guidance.shift(flow_map, now, x, step.mean, s, t, step.std)  # type: ignore[union-attr]
                ratio = shift.flatten(1).norm(dim=1) / (step.mean - x).flatten(1).norm(dim=1).clamp_min(1e-12)
                norm = now.direction.flatten(1).norm(dim=1)
            z = noise.normal(shape, x) if step.std else None
            x = (step if shift is None else type(step)(step.mean + shift, step.std)).sample(z)
            family = self._family(parents, x, step, shift, s, t) if t > s else None
            move = Move(now, now, step, shift, z, t - s, family)
            if last:
                seen = now.scores if x is shared else None  # the last look-ahead is what comes out: no need to ask again
                scores = problem.score(x) if seen is None else seen
                rewards, components = scores.total, scores.components
                tilt = problem.tilt(rewards)
                move.after = Evaluation(tilt, tilt, torch.ones_like(tilt), x)
            else:
                move.after = self._look(problem, looks_noise, x, t, zero, move, log_w, onward=times[i + 2] > t)
            after = move.after
            log_w = log_w + correction.increment(move).view(n, k)  # type: ignore[union-attr]
            record = {
                "ess": effective_sample_size(log_w),
                "value": after.value.view(n, k),
                "guidance_ratio": ratio.view(n, k),
                "gradient_norm": norm.view(n, k),
                "beta": after.beta.view(n, k)[:, 0],
            }
            if lookaheads and self.lookahead is not None and after.endpoint is not None:
                record["lookaheads"] = after.endpoint.view(n, k, *shape)[:, 0]
            now = after
            selected = Selected.none(log_w) if last else select(i + 1, t, times[i + 2])
            record["resampled"], record["ancestors"] = selected.resampled, selected.ancestors
            records.append(record)
            tick(i + 1, len(times) - 1)
        records[0]["resampled"] = first.resampled | records[0]["resampled"]
        records[0]["ancestors"] = first.ancestors.gather(1, records[0]["ancestors"])
        looks = [record.pop("lookaheads") for record in records if "lookaheads" in record]
        with torch.inference_mode(False):  # tensors that autograd takes, without another copy later
            trace = Trace(
                t=torch.tensor(times[1:]),
                lookaheads=torch.stack(looks) if len(looks) == len(records) else None,
                **{name: _stack([record[name] for record in records]) for name in records[0]},
            )
        return Outcome(
            samples=x.view(n, k, *shape),
            rewards=rewards.view(n, k),
            components={name: value.view(n, k) for name, value in components.items()},
            log_weights=normalise(log_w),
            log_z=self._log_z(first_tilt, log_z + log_mean(log_w)),
            trace=trace,
        )

    def _look(
        self,
        problem: Problem,
        noise: Noise,
        x: Tensor,
        t: float,
        zero: Tensor,
        move: Move | None,
        log_w: Tensor,
        onward: bool = True,
    ) -> Evaluation:
        """The evaluation at time t, or zeros where nobody would use it; ``move`` led here, None at the start, and the next
        step is ``onward`` or back in time, where no guidance bends it."""
        lookahead, correction, selection, tempering = self.lookahead, self.correction, self.resampling, self.tempering
        assert callable(tempering) and not any(isinstance(part, str) for part in (correction, selection, lookahead))
        hottest = 1.0 if t >= 1 else float(tempering(t))
        ranks = selection is not None and selection.ranks  # type: ignore[union-attr]
        guided = self.guidance is not None and t < self.stop and onward
        if guided and t >= self.times()[-2] and getattr(self.transition, "lands", False):
            guided = correction.guides(Step(x, 0.0))  # type: ignore[union-attr]
        wanted = guided or correction.samples or ranks  # type: ignore[union-attr]
        untempered = correction.looks_untempered or ranks or self._drawn()  # type: ignore[union-attr]
        if lookahead is None or not (wanted or self._drawn()) or (hottest == 0 and not untempered):
            return Evaluation(zero, zero, torch.full_like(zero, hottest))

        def beta(ends: Endpoints, tilt: Tensor) -> Tensor:
            if move is None or not isinstance(tempering, Adaptive):
                return tilt.new_full((len(tilt),), hottest)  # of these rows, which may be a part of all
            return adapt(ends, tilt, move, log_w, correction, tempering.ess)  # type: ignore[arg-type]

        view = View(problem, lookahead, noise, x, t, beta)  # type: ignore[arg-type]
        split = isinstance(problem.flow_map, Microbatched) and not isinstance(tempering, Adaptive)  # which adapts to all
        rows = problem.flow_map.rows if split else None  # type: ignore[attr-defined]
        found = evaluate(self.guidance, view, rows) if guided else look(view)  # type: ignore[arg-type]
        return correction.remember(self, None if move is None else move.before, found, view)  # type: ignore[union-attr]

    def _log_z(self, first: Tensor, chain: Tensor) -> Tensor | None:
        """log Z (n,), None where there is no honest one.

        Where the full reward of a guess at the endpoint selects particles from t = 0 on, later steps forget in part why: exp of
        what the path's weights say is unbiased through events that few runs see. A jump or a rollout from noise is a sample
        itself, so that its first look says what Z is; that of the other look-aheads does not.

        Args:
            first: (n, k) strength * reward of the look-aheads at t = 0; zeros where nobody looked.
            chain: (n,) what the weights along the path say.
        """
        if not (self.correction.samples and unbiased(self.resampling)):  # type: ignore[union-attr,arg-type]
            return None
        if self.resampling is None or self.lookahead is None or self.tempering(0.0) == 0:  # type: ignore[operator]
            return chain
        if isinstance(self.lookahead, (Jump, Rollout)):
            return log_mean(first)
        return None if isinstance(self.lookahead, tuple(LOOKAHEADS.values())) else chain  # one's own may be the exact value

    def _family(self, parents: Parents, x: Tensor, step: Step, shift: Tensor | None, s: float, t: float) -> Family | None:
        """All that the particles x (b, *shape) of this step could have come from, where a correction asks for it and it costs
        no network call."""
        transition = self.transition
        free = self._shared(parents.now) is not None and getattr(transition, "gamma", 1.0) == 1.0
        if not (getattr(self.correction, "mixes", False) and step.std and free):
            return None
        problem, now, log_w, selected = parents.problem, parents.now, parents.log_w, parents.selected
        n, m = log_w.shape
        if selected is None:
            log_odds, carried = torch.full_like(log_w, -math.log(m)), log_w
        else:
            step = transition.step(problem.flow_map, parents.x, s, t, problem.cond, self._shared(now))  # type: ignore[union-attr]
            if shift is not None:
                shift = self.guidance.shift(problem.flow_map, now, parents.x, step.mean, s, t, step.std)  # type: ignore[union-attr]
            log_odds, moved = selected.odds(m), log_mean(log_w).unsqueeze(1)
            carried = torch.where(selected.resampled.unsqueeze(1), moved, log_w.gather(1, selected.ancestors))

        def rows(of: Tensor) -> Tensor:
            return of.view(n, -1, x[0].numel()).to(log_w)

        mean = rows(step.mean)
        log_base = log_w - now.value.view(n, m) - math.log(m)
        return Family(rows(x), mean, mean if shift is None else mean + rows(shift), log_base, log_odds, carried)

    def _drawn(self) -> bool:
        """Whether the transition lives on endpoints that only the look-ahead draws."""
        return getattr(self.transition, "endpoint", "") == "posterior"

    def _shared(self, now: Evaluation) -> Tensor | None:
        """The first endpoint of the look-ahead, where it saves the transition its network call."""
        wanted = getattr(self.transition, "endpoint", "")
        return now.endpoint if wanted and wanted == getattr(self.lookahead, "kind", "") else None


def adapt(ends: Endpoints, tilt: Tensor, move: Move, log_w: Tensor, correction: Correction, share: float) -> Tensor:
    """The largest beta (b,) that leaves each output ``share`` of its effective sample size, and is not below the last one.

    Args:
        ends, tilt: endpoints with their log-weights, and strength * r (b, m), of the b = n k particles.
        move: the step that led here, without its ``after``.
        log_w: (n, k) log-weights before it.
    """
    n, k = log_w.shape
    assert ends.log_w is not None
    fixed = correction.increment(replace(move, after=replace(move.before, value=torch.zeros_like(move.before.value))))
    floor = share * effective_sample_size(log_w)

    def enough(beta: Tensor) -> Tensor:
        value = log_mean_exp(ends.log_w, beta.repeat_interleave(k).unsqueeze(1) * tilt)  # type: ignore[arg-type]
        return effective_sample_size(log_w + (fixed + value).view(n, k)) >= floor

    low = move.before.beta.view(n, k)[:, 0]
    return largest(enough, low, torch.ones_like(low)).repeat_interleave(k)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Records of all steps, (steps, ...); where there are fewer particles later on, NaN or -1 stand for the missing."""
    widest = max(part.shape[-1] for part in parts)
    fill = float("nan") if parts[0].is_floating_point() else -1
    return torch.stack(
        [
            part if part.shape[-1] == widest else torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=fill)
            for part in parts
        ]
    )
