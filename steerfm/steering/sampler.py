"""The sampler: each step moves all particles of all outputs, as one batch, from t_i to t_{i+1}.

    look ahead -> value (and direction) -> transition (guided) -> correction of the log-weights -> selection

`Steering` is a method built from parts; `State` is its state after each step. Presets are in `presets.py`; `steer.py` runs
them on a problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from steerfm import transitions
from steerfm.capabilities import Choosy, can, needs
from steerfm.checks import whole_numbers
from steerfm.flowmap import FlowMap
from steerfm.interpolant import time_grid
from steerfm.registry import TakesNames, brief, objects, usual
from steerfm.rewards import Reward, RewardError, Scores
from steerfm.rows import take_rows
from steerfm.sampling import Noise, grid_of
from steerfm.steering import lookahead
from steerfm.steering.correction import CORRECTIONS, Correction, Family, Marginal, Move, Parts, Twisted, Uncorrected
from steerfm.steering.guidance import GUIDANCES, Guidance, Tilting, evaluate, needs_gradient
from steerfm.steering.lookahead import LOOKAHEADS, Endpoints, Jump, Lookahead, Rollout
from steerfm.steering.outcome import Outcome, Tick, Trace
from steerfm.steering.selection import (
    Candidates,
    Leaving,
    Resample,
    Selected,
    Selection,
    group,
    ranking,
    unbiased,
    with_threshold,
)
from steerfm.steering.size import Sized
from steerfm.steering.state import Begin, Callback, Parents, State
from steerfm.steering.tempering import TEMPERINGS, Adaptive, Power, Tempering
from steerfm.steering.value import Evaluation, Problem, View
from steerfm.steering.weights import effective_sample_size, largest, log_mean, log_mean_exp, wide
from steerfm.transitions import NO_DRAWS, TRANSITIONS, Landing, Renoise, Sharing, Step, Transition


# --- the method by parts ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sampler(Sized, metaclass=TakesNames):
    """Base of all methods that are built from parts: particles that walk from noise to data, one step at a time.

    A method defines its parts in `parts`. A part can be an object, a name, or a dictionary of arguments:
    ``guidance={"scale": 0.5}`` changes the method's own part, ``{"name": "map", "scale": 0.5}`` replaces it.

    Attributes:
        particles: number per output.
        steps: transitions from t = 0 to t = 1.
        lookahead: denoise, jump, rollout, smooth, renoise or posterior; None: the reward is only evaluated at the end.
        guidance: map, endpoint, free, ascent or noise; None: no gradient.
        tempering: beta(t): linear, exponential, adaptive, damping, none, a power of t, or any function with beta(1) = 1.
        transition: jump, renoise, diffuse, midpoint or bridge.
        power: exponent of the time grid, t_i = (i / steps)^power.
        recurrence: repeats of each step but the last, with noising back in between (FreeDoM's time travel).
        stop: time from which steps are no longer guided.
    """

    samples: ClassVar[str] = "no"
    paper: ClassVar[str] = ""

    particles: int = 16
    steps: int = 8
    lookahead: Lookahead | None = field(default_factory=Jump)
    guidance: Guidance | None = None
    tempering: Tempering = field(default_factory=Power)
    transition: Transition = field(default_factory=Renoise)
    power: float = field(default=1.0, kw_only=True)
    recurrence: int = field(default=1, kw_only=True)
    stop: float = field(default=1.0, kw_only=True)

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments and the default parts, with objects in place of names."""
        names = {field.name for field in fields(cls) if field.init}
        out = objects(cls, arguments, {name: table for name, table in TABLES.items() if name in names}, SHORT)
        if out.get("threshold") is not None:
            out |= {"resampling": with_threshold(out["resampling"], out["threshold"]), "threshold": None}
        return out

    @classmethod
    def usual(cls, name: str) -> Any:
        """The default of an argument, as an object."""
        return usual(cls, name)

    def __post_init__(self) -> None:
        whole_numbers(particles=self.particles, recurrence=self.recurrence)
        if self.recurrence < 1:
            raise ValueError(f"recurrence={self.recurrence}: must be at least 1")
        if self.particles < 1:
            raise ValueError(f"particles={self.particles}: at least one particle is needed")
        time_grid(self.steps, self.power)
        for name in ("transition", "correction", "tempering"):
            if getattr(self, name, "") is None:
                raise ValueError(f"{name}=None: this part is needed, such as {self.usual(name)}")
        if self.guidance is not None and self.lookahead is None:
            raise ValueError("guidance needs a look-ahead: use lookahead=jump or lookahead=denoise")
        if isinstance(self.guidance, Tilting) and not self.transition.stochastic:
            raise ValueError(
                f"guidance={self.guidance} needs steps with noise: use transition=renoise, diffuse, midpoint or bridge"
            )
        if self._draws_endpoints() and self._lookahead_kind() != "posterior":
            raise ValueError(NO_DRAWS)
        selection = self.parts.selection
        if self.lookahead is None and selection is not None and selection.ranks:
            raise ValueError("this selection ranks look-aheads: use lookahead=jump or lookahead=denoise")
        self.parts.correction.check(self.parts)

    @cached_property
    def parts(self) -> Parts:
        """The parts of the method. Here there are no weights and no selection: an ascent, or plain samples."""
        return self.mix(Uncorrected(), None)

    def mix(self, correction: Correction, selection: Selection | None) -> Parts:
        """The parts of this method, with this correction and selection."""
        return Parts(self.lookahead, self.guidance, self.tempering, self.transition, correction, selection)

    def sized(self, steps: int, number: int) -> Self:
        """See `Sized`; the number is that of groups, if the selection has groups."""
        return replace(self, steps=steps, particles=number * group(self.parts.selection))

    def least(self, steps: int) -> int:
        """Selection needs at least four particles, or one group."""
        return 1 if self.parts.selection is None or group(self.parts.selection) > 1 else 4

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in vars(cls):
            cls.__repr__ = Sampler.__repr__  # replaces that of the dataclass

    def __repr__(self) -> str:
        """The particles, the steps, and all settings that differ from the defaults."""
        return brief(self, ("particles", "steps"))

    def _idle(self) -> dict[str, str]:
        """Settings that have no effect with the other parts, and why."""
        parts, why = self.parts, {}
        if parts.guidance is None:
            why["stop"] = "nothing is guided"
        if parts.lookahead is None or not (parts.guidance is not None or parts.correction.samples):
            why["tempering"] = "no weight and no gradient depends on a value before the end"
        stays = not parts.transition.stochastic and self.recurrence == 1
        if stays and parts.selection is not None and not parts.selection.prunes:
            settable = "resampling" in {each.name for each in fields(self)}
            copies = "particles are only copied before steps with noise: use transition=renoise, diffuse or bridge"
            why["resampling" if settable else "transition"] = copies if settable else f"{parts.selection}: {copies}"
        return why

    def check(self, reward: Reward) -> None:
        """See `Method.check`.

        Raises:
            ValueError: a setting has no effect.
            RewardError: the reward is a black box, and the method needs its gradient.
        """
        for name, why in self._idle().items():
            if getattr(self, name) != self.usual(name):
                raise ValueError(f"{name}={getattr(self, name)!r} does nothing in this {type(self).__name__}: {why}")
        if needs_gradient(self.guidance) and not reward.differentiable:
            raise RewardError(
                f"reward {reward.name!r} is a black box, and {type(self).__name__} follows its gradient: use BestOfN, or "
                "FeynmanKac with guidance=None"
            )

    def lacks(self, flow_map: FlowMap, times: Sequence[float] | None = None) -> str:
        """What the map lacks for the parts of this method, and what to use instead; "" if it lacks nothing.

        Args:
            flow_map: the model.
            times: the times to visit; default those of `times`.
        """
        parts, grid = self.parts, self.times(flow_map) if times is None else times
        if len(grid) > 2 and not (can(flow_map, "endpoint") or can(flow_map, "velocity")):
            return needs("endpoint", "take best_of_n with steps=1, or a search of the noise: reno, zero_order or random_search")
        ranks = parts.selection is not None and parts.selection.ranks
        looks = parts.guidance is not None or parts.correction.samples or ranks or self._draws_endpoints()
        why = {}
        if looks and isinstance(parts.lookahead, lookahead.Choosy):
            why["lookahead"] = parts.lookahead.blind(flow_map, grid)
        if isinstance(parts.transition, Choosy) and parts.transition != flow_map.transition:
            why["transition"] = parts.transition.lacks(flow_map, grid)
        if isinstance(parts.tempering, Choosy):
            why["tempering"] = parts.tempering.lacks(flow_map, grid)
        return "; ".join(f"its {name} {type(vars(parts)[name]).__name__} {each}" for name, each in why.items() if each)

    def times(self, flow_map: FlowMap) -> list[float]:
        """The times to visit, from 0 to 1, on the map's grid; with ``recurrence`` they go back and forth."""
        grid = grid_of(flow_map, self.steps, self.power)
        out = grid[:1]
        for s, t in zip(grid, grid[1:]):
            out += [t] if t == 1 else [t, s] * (self.recurrence - 1) + [t]
        return out

    def fitted(self, problem: Problem) -> Sampler:
        """This method; without its guidance if that is optional and the reward has no gradient."""
        guidance = self.parts.guidance
        optional = guidance is not None and guidance.differentiates and not needs_gradient(guidance)
        return replace(self, guidance=None) if optional and not problem.has_gradient() else self

    # --- a run ---------------------------------------------------------------------------------------------------------
    def run(
        self,
        problem: Problem,
        noise: Noise,
        n: int,
        lookaheads: bool,
        tick: Tick,
        begin: Begin | None = None,
        callback: Callback | None = None,
    ) -> Outcome:
        """See `Method.run`.

        Args:
            begin: where the particles begin; None for noise at t = 0.
            callback: called with the state after each step; a true return value ends the run.
        """
        records, state = [], None
        for state in self.steps_of(problem, noise, begin, callback):
            records.append({name: row for name, row in state.info.items() if lookaheads or name != "lookaheads"})
            tick(len(records), len(state.times) - 1)
        assert state is not None
        return self._outcome(state, records)

    def steps_of(
        self, problem: Problem, noise: Noise, begin: Begin | None = None, callback: Callback | None = None
    ) -> Iterator[State]:
        """Yield the state after each step; the arguments are those of `run`."""
        method = self.fitted(problem)
        state = method.start(problem, noise, begin)
        while not state.finished:
            state = method.step(state)
            yield state
            if callback is not None and callback(state) and not state.finished:
                method, state = method.landing(), replace(state, times=[*state.times[: state.done + 1], 1.0])

    def start(self, problem: Problem, noise: Noise, begin: Begin | None = None) -> State:
        """The state before the first step: the particles, their evaluation and their selection."""
        begin = begin or Begin()
        with self._mode():
            x, times, looks = begin.states(problem, noise), begin.grid(self.times(problem.flow_map)), noise.other()
            zero = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
            now = self._look(problem, looks, x, times, 0, None, zero, self._waits(x, times, 0, noise.k))
            log_w = self.parts.correction.start(now).view(-1, noise.k)
            parents, none = Parents(x, now, problem, log_w), Selected.none(log_w)
            log_z, first = log_w.new_zeros(len(log_w)), now.tilt.view_as(log_w)
            return self._go_on(State(problem, noise, looks, times, 0, x, now, log_w, log_z, first, parents, none))

    def step(self, state: State) -> State:
        """The state one step later. Gradient-free methods run in inference mode, without a graph."""
        with self._mode():
            s, t = state.times[state.done : state.done + 2]
            before = state.selected
            last = state.done + 2 == len(state.times)
            kernel, scores = (
                self._last_step(state, s) if last and self._lands_alone(state) else (self._kernel(state, s, t), None)
            )
            z = state.noise.normal(state.problem.flow_map.shape, state.x) if kernel.std else None
            shift = self._shift(state, kernel, s, t, z)
            x = (kernel if shift is None else type(kernel)(kernel.mean + shift, kernel.std)).sample(z)
            family = self._family(state.parents, x, kernel, shift, s, t) if t > s else None
            move = Move(state.now, state.now, kernel, shift, z, t - s, family)
            if last:
                move.after = self._arrive(state, x, scores)
            else:
                waits = self._waits(x, state.times, state.done + 1, state.log_w.shape[1])
                move.after = self._look(state.problem, state.looks, x, state.times, state.done + 1, move, state.log_w, waits)
            log_w = state.log_w + self.parts.correction.increment(move).view_as(state.log_w)
            info = self._info(move, state.x, log_w, state.problem.flow_map.shape)
            state = replace(state, done=state.done + 1, x=x, now=move.after, log_w=log_w, info=info)
            if last:
                state = replace(state, parents=Parents(x, move.after, state.problem, log_w), selected=Selected.none(log_w))
            else:
                state = self._go_on(state)
            resampled, ancestors = state.selected.resampled, state.selected.ancestors
            if state.done == 1:  # the selection at the start belongs to the first step
                resampled, ancestors = before.resampled | resampled, before.ancestors.gather(1, ancestors)
            state.info |= {"resampled": resampled, "ancestors": ancestors}
            return state

    def landing(self) -> Sampler:
        """This method for the last step after a callback ends the run: an unguided jump to the data."""
        return replace(self, transition=transitions.Jump(), guidance=None)

    def _mode(self) -> AbstractContextManager[Any]:
        guidance = self.parts.guidance
        graph = self.parts.correction.differentiates or (guidance is not None and guidance.differentiates)
        return torch.no_grad() if graph else torch.inference_mode()

    # --- the parts of a step ---------------------------------------------------------------------------------------------
    def _kernel(self, state: State, s: float, t: float) -> Step:
        """The unguided step from s to t; the noising kernel if t < s."""
        flow_map, x = state.problem.flow_map, state.x
        if t < s:
            scale, std = flow_map.interpolant.renoise(s, t)
            return Step(scale * x, std)
        return self.parts.transition.step(flow_map, x, s, t, state.problem.cond, self._shared(state.now))

    def _shift(self, state: State, kernel: Step, s: float, t: float, z: Tensor | None) -> Tensor | None:
        """The guidance's shift of a step, (n k, *shape), from its mean or its noise z; None for steps back in time."""
        guidance, now = self.parts.guidance, state.now
        if guidance is None or now.direction is None or s >= min(t, self.stop) or not self.parts.correction.guides(kernel):
            return None
        if isinstance(guidance, Tilting):
            return None if z is None else kernel.std * (guidance.tilted(now, z) - z)
        return guidance.shift(state.problem.flow_map, now, state.x, kernel.mean, s, t, kernel.std)

    def _lands_alone(self, state: State) -> bool:
        """Whether the last step needs only the network: a reward elsewhere can then score one part while the next is made."""
        transition = self.parts.transition
        lands = isinstance(transition, Landing) and transition.lands
        return lands and state.problem.reward.elsewhere and state.now.direction is None and self._shared(state.now) is None

    def _last_step(self, state: State, s: float) -> tuple[Step, Scores]:
        """The last step, without noise, and the scores of its end; see `Problem.generate`."""
        flow_map, cond = state.problem.flow_map, state.problem.cond

        def make(rows: slice) -> Tensor:
            return self.parts.transition.step(flow_map, state.x[rows], s, 1.0, take_rows(cond, rows), None).mean

        x, scores = state.problem.generate(make)
        return Step(x, 0.0), scores

    def _arrive(self, state: State, x: Tensor, scores: Scores | None) -> Evaluation:
        """The evaluation at t = 1: the reward itself, already scored if the last look-ahead is the sample."""
        scores = state.now.scores if x is self._shared(state.now) else scores
        scores = state.problem.score(x) if scores is None else scores
        tilt = state.problem.tilt(scores.total)
        return Evaluation(tilt, tilt, torch.ones_like(tilt), x, scores=scores)

    def _info(self, move: Move, x: Tensor, log_w: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
        """A row of the trace, without the next selection.

        Args:
            x: (n k, *shape) the particles before the step.
            log_w: (n, k) log-weights after the step.
            shape: of a state.
        """
        zero = torch.zeros(len(x), dtype=log_w.dtype, device=log_w.device)
        ratio, norm = zero, zero
        if move.shift is not None and move.before.direction is not None:
            ratio = move.shift.flatten(1).norm(dim=1) / (move.step.mean - x).flatten(1).norm(dim=1).clamp_min(1e-12)
            norm = move.before.direction.flatten(1).norm(dim=1)
        info = {
            "ess": effective_sample_size(log_w),
            "value": move.after.value.view_as(log_w),
            "guidance_ratio": ratio.view_as(log_w),
            "gradient_norm": norm.view_as(log_w),
            "beta": move.after.beta.view_as(log_w)[:, 0],
        }
        if self.lookahead is not None and move.after.endpoint is not None:
            info["lookaheads"] = move.after.endpoint.view(*log_w.shape, *shape)[:, 0]
        return info

    def _guided(self, x: Tensor, times: Sequence[float], i: int) -> bool:
        """Whether the step from times[i] is guided."""
        parts, t = self.parts, times[i]
        if parts.guidance is None or t >= self.stop or times[i + 1] <= t:
            return False
        lands = t >= times[-2] and isinstance(parts.transition, Landing) and parts.transition.lands
        return not lands or (parts.correction.guides(Step(x, 0.0)) and not isinstance(parts.guidance, Tilting))

    def _waits(self, x: Tensor, times: Sequence[float], i: int, k: int) -> bool:
        """Whether the gradient at times[i] waits, because a selection by plain look-aheads will first remove some of the ``k``
        particles."""
        parts, selection = self.parts, self.parts.selection
        if parts.correction.samples or isinstance(parts.tempering, Adaptive) or not self._guided(x, times, i):
            return False
        return isinstance(selection, Leaving) and selection.leaves(i, times[i], k) < k

    def _go_on(self, state: State) -> State:
        """Select, and add the direction of guidance if only the survivors need one."""
        before = state.log_w.shape[1]
        state = self._select(state)
        if not self._waits(state.x, state.times, state.done, before):
            return state
        now = self._look(state.problem, state.looks, state.x, state.times, state.done, None, state.log_w)
        return replace(state, now=now)

    def _select(self, state: State) -> State:
        """Select particles for the next step. If that has no noise, copies would stay copies, so only pruning is allowed."""
        s, t = state.times[state.done : state.done + 2]
        selection, log_w = self.parts.selection, state.log_w
        state = replace(state, parents=Parents(state.x, state.now, state.problem, log_w), selected=Selected.none(log_w))
        scatters = t < s or (t < 1 and self.parts.transition.stochastic)
        if selection is None or not (scatters or selection.prunes):
            return state
        n, k = log_w.shape
        u = state.noise.uniform(k, log_w.device)
        selected = selection.select(Candidates(log_w, state.now.tilt.view(n, k), u, state.done, s, scatters))
        if not bool(selected.resampled.any()):
            return replace(state, selected=selected)
        rows = (torch.arange(n, device=log_w.device).unsqueeze(1) * k + selected.ancestors).flatten()
        rows_resampled, new_w = selected.resampled.unsqueeze(1), 0.0 if selected.log_w is None else selected.log_w
        if (count := selected.ancestors.shape[1]) < k:
            state = replace(state, problem=state.problem.select(rows), noise=state.noise.of(count), looks=state.looks.of(count))
        return replace(
            state,
            x=state.x[rows],
            now=state.now.select(rows),
            log_w=torch.where(rows_resampled, new_w, log_w.gather(1, selected.ancestors)),
            log_z=torch.where(selected.resampled, state.log_z + log_mean(log_w), state.log_z),
            parents=replace(state.parents, selected=selected),
            selected=selected,
        )

    def _look(
        self, problem: Problem, noise: Noise, x: Tensor, times: Sequence[float], i: int, move: Move | None, log_w: Tensor,
        plain: bool = False,
    ) -> Evaluation:  # fmt: skip
        """The evaluation at times[i], or zeros if no part needs it.

        Args:
            move: the step just taken; None at the start.
            plain: skip the direction of guidance, which only the survivors need.
        """
        parts, t = self.parts, times[i]
        correction, tempering = parts.correction, parts.tempering
        hottest = 1.0 if t >= 1 else float(tempering(t))
        ranks = ranking(parts.selection, i, noise.k)
        guided = self._guided(x, times, i)
        used = guided or correction.samples or ranks
        untempered = correction.looks_untempered or ranks or self._draws_endpoints()
        if parts.lookahead is None or not (used or self._draws_endpoints()) or (hottest == 0 and not untempered):
            zero = torch.zeros(len(x), dtype=wide(x.device), device=x.device)
            return Evaluation(zero, zero, torch.full_like(zero, hottest))

        def beta(ends: Endpoints, tilt: Tensor) -> Tensor:
            if move is None or not isinstance(tempering, Adaptive):
                return tilt.new_full((len(tilt),), hottest)  # these rows may be only some of all
            return adapt(ends, tilt, move, log_w, correction, tempering.ess)

        view = View(problem, parts.lookahead, noise, x, t, beta)
        rows = None if isinstance(tempering, Adaptive) else problem.flow_map.micro_batch  # adaptive needs all particles at once
        after = evaluate(parts.guidance, view, rows) if guided and not plain and parts.guidance is not None else view.look()
        return correction.remember(parts, None if move is None else move.before, after, view)

    def _outcome(self, state: State, records: list[dict[str, Tensor]]) -> Outcome:
        """The result of a finished run.

        Args:
            records: the ``info`` of each step.
        """
        scores, shape = state.now.scores, state.log_w.shape
        assert scores is not None
        looks = [record.pop("lookaheads") for record in records if "lookaheads" in record]
        with torch.inference_mode(False):  # ordinary tensors for autograd, without another copy later
            trace = Trace(
                t=torch.tensor(state.times[1:]),
                lookaheads=torch.stack(looks) if len(looks) == len(records) else None,
                **{name: _stack([record[name] for record in records]) for name in records[0]},
            )
        return Outcome(
            samples=state.x.unflatten(0, shape),
            rewards=scores.total.view(shape),
            components={name: value.view(shape) for name, value in scores.components.items()},
            log_weights=state.log_weights,
            log_z=self._log_z(state.first, state.log_z + log_mean(state.log_w)),
            trace=trace,
        )

    def _log_z(self, first: Tensor, chain: Tensor) -> Tensor | None:
        """log Z (n,); None where no reliable estimate exists.

        If the full reward of a guessed endpoint selects particles from t = 0 on, later steps partly undo that guess. The
        estimate from the path's weights is then unbiased only through rare events, which few runs see. A jump or a rollout
        from noise is a sample itself, so its first look estimates Z directly; the other look-aheads do not.

        Args:
            first: (n, k) strength * reward of the look-aheads at t = 0; zeros if there were none.
            chain: (n,) the estimate from the weights along the path.
        """
        if not (self.parts.correction.samples and unbiased(self.parts.selection)):
            return None
        if self.parts.selection is None or self.lookahead is None or self.parts.tempering(0.0) == 0:
            return chain
        if isinstance(self.lookahead, (Jump, Rollout)):
            return log_mean(first)
        return None if isinstance(self.lookahead, tuple(LOOKAHEADS.values())) else chain  # a user's look-ahead may be exact

    def _family(self, parents: Parents, x: Tensor, step: Step, shift: Tensor | None, s: float, t: float) -> Family | None:
        """All possible parents of the particles x (b, *shape); None unless the correction needs them and they cost no network
        call."""
        transition, guidance = self.parts.transition, self.parts.guidance
        free = self._shared(parents.now) is not None and not (isinstance(transition, Renoise) and transition.gamma < 1)
        if not (isinstance(self.parts.correction, Marginal) and step.std and free):
            return None
        problem, now, log_w, selected = parents.problem, parents.now, parents.log_w, parents.selected
        n, m = log_w.shape
        if selected is None:
            log_odds, log_before = torch.full_like(log_w, -math.log(m)), log_w
        else:
            step = transition.step(problem.flow_map, parents.x, s, t, problem.cond, self._shared(now))
            if shift is not None and guidance is not None:
                shift = guidance.shift(problem.flow_map, now, parents.x, step.mean, s, t, step.std)
            log_odds, log_pooled = selected.odds(m), log_mean(log_w).unsqueeze(1)
            log_before = torch.where(selected.resampled.unsqueeze(1), log_pooled, log_w.gather(1, selected.ancestors))

        def rows(of: Tensor) -> Tensor:
            return of.view(n, -1, x[0].numel()).to(log_w)

        mean = rows(step.mean)
        log_base = log_w - now.value.view(n, m) - math.log(m)
        return Family(rows(x), mean, mean if shift is None else mean + rows(shift), log_base, log_odds, log_before)

    def _draws_endpoints(self) -> bool:
        """Whether the transition uses endpoints that only the look-ahead can draw."""
        return self._endpoint_kind() == "posterior"

    def _shared(self, now: Evaluation) -> Tensor | None:
        """The first endpoint of the look-ahead, if it saves the transition its network call; else None."""
        kind = self._lookahead_kind()
        return now.endpoint if kind and kind == self._endpoint_kind() else None

    def _lookahead_kind(self) -> str:
        """The kind of endpoint that the look-ahead has for a transition; "" for none."""
        return self.lookahead.kind if isinstance(self.lookahead, lookahead.Sharing) else ""

    def _endpoint_kind(self) -> str:
        """The kind of endpoint that the transition can share; "" for none."""
        return self.transition.endpoint if isinstance(self.transition, Sharing) else ""


@dataclass(frozen=True)
class Steering(Sampler):
    """A steering method built from parts of your choice.

    Samples: what its correction says; with the default, the tilt of the base chain's own law, as the particles grow.

    Attributes:
        particles, steps, lookahead, guidance, tempering, transition, power, recurrence, stop: see `Sampler`.
        correction: twisted, marginal, jarzynski or none.
        resampling: a scheme's name or any `Selection`; None for no selection. Only used before steps with noise: elsewhere
            copies would stay copies.
        threshold: resample below this ESS, as a share of the particles; None for the threshold of ``resampling``.
    """

    samples: ClassVar[str] = "what its correction says"
    paper: ClassVar[str] = ""

    correction: Correction = field(default_factory=Twisted)
    resampling: Selection | None = field(default_factory=Resample)
    threshold: float | None = None

    @cached_property
    def parts(self) -> Parts:
        return self.mix(self.correction, self.resampling)


TABLES: dict[str, Mapping[str, Any]] = {
    "lookahead": LOOKAHEADS,
    "guidance": GUIDANCES,
    "tempering": TEMPERINGS,
    "transition": TRANSITIONS,
    "correction": CORRECTIONS,
    "resampling": {},
}
"""The parts by name, for each argument that takes one."""

SHORT: dict[str, Callable[[Any], Any]] = {
    "tempering": lambda value: Power(float(value)) if isinstance(value, float | int) else value,
    "resampling": lambda value: Resample(value) if isinstance(value, str) else value,
}
"""Short forms of parts: the power of a tempering, the scheme of a resampling."""


def adapt(ends: Endpoints, tilt: Tensor, move: Move, log_w: Tensor, correction: Correction, share: float) -> Tensor:
    """The largest beta (b,) that leaves each output ``share`` of its effective sample size; never below the last one.

    Args:
        ends: endpoints of the b = n k particles, with their log-weights (b, m).
        tilt: (b, m) strength * r.
        move: the step just taken, without its ``after``.
        log_w: (n, k) log-weights before it.
        correction: that the weights follow.
        share: of the effective sample size, in (0, 1).
    """
    n, k = log_w.shape
    log_v = ends.log_w
    assert log_v is not None
    constant = correction.increment(replace(move, after=replace(move.before, value=torch.zeros_like(move.before.value))))
    floor = share * effective_sample_size(log_w)

    def enough(beta: Tensor) -> Tensor:
        value = log_mean_exp(log_v, beta.repeat_interleave(k).unsqueeze(1) * tilt)
        return effective_sample_size(log_w + (constant + value).view(n, k)) >= floor

    low = move.before.beta.view(n, k)[:, 0]
    return largest(enough, low, torch.ones_like(low)).repeat_interleave(k)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Records of all steps, (steps, ...); missing particles are NaN, or -1 in integer records."""
    widest = max(part.shape[-1] for part in parts)
    fill = float("nan") if parts[0].is_floating_point() else -1
    return torch.stack(
        [
            part if part.shape[-1] == widest else torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=fill)
            for part in parts
        ]
    )
