"""Conditions of a pipeline's network from prompts, and the pipeline's guidance."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerfm.models.capture import Call, Recording, denoiser, parameters, record, rows_of
from steerfm.models.layout import Layout
from steerfm.rows import Condition, map_condition, with_negative

PROBE = "cat"
"""The prompt for recording how a pipeline calls its network."""
LONGEST = 512
"""Tokens of the longest prompt, for pipelines with prompts of variable length and no limit of their own."""
GUIDANCE = ("guidance_scale", "distilled_guidance_scale", "true_cfg_scale")
"""Names of the guidance scale in pipelines."""


class Guidance(NamedTuple):
    """The guidance of a pipeline: factor ((1 - scale) negative + scale positive), of the network's outputs.

    Attributes:
        factor: 1 or -1.
        scale: None if there is only one output.
        positive: index of the positive output.
    """

    factor: float
    scale: float | None = None
    positive: int = 0


class Prompts:
    """The conditions of a pipeline, by prompt; each prompt is encoded once, by the pipeline's own call.

    Args:
        pipe: the pipeline.
        call: arguments of its call, except the prompt.
        linear: whether the guidance is linear, so that it can be measured.

    Attributes:
        first: recording of its first call, up to the scheduler.
        layout: the arguments of the network that depend on the prompts.
        guidance: the pipeline's guidance.
        dropped: whether the text encoders have been freed.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], linear: bool) -> None:
        self.pipe, self.call = pipe, dict(call)
        names = parameters(pipe)
        self.in_words = "prompt" in names and not any("prompt_embeds" in name for name in call)
        self._probe = self.call | ({"prompt": PROBE} if self.in_words else {})
        self.first = record(pipe, _steps(pipe, self._probe, 2))
        longest = int(call.get("max_sequence_length") or names.get("max_sequence_length") or LONGEST)
        twice = record(pipe, _steps(pipe, _twice(self._probe), 2), calls=1)
        self.layout = Layout(self.first.calls[0], twice.calls[0], longest)
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._fixed_rows: dict[str, Tensor] = {}
        self._default_prompts: list[str] | None = None
        self.dropped = False
        sides = self._sides(self.first.calls)
        self.guidance = _guidance(self.first, {**names, **call}, denoiser(pipe)) if linear else Guidance(1.0)
        self._fixed_rows = sides[self.guidance.positive]
        self._negative = sides[1 - self.guidance.positive] if self.guidance.scale is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self  # a copied map has its own network, but shares the prompts

    def ask(self, prompts: Sequence[str] | None) -> None:
        """Set the default prompts: one for all outputs, or one for each; None for the empty prompt."""
        if prompts is not None and not self.in_words:
            raise ValueError("prompt= and prompt_embeds= are given: give only one of them")
        self._default_prompts = [""] if prompts is None else [str(prompt) for prompt in prompts]
        if self.in_words:
            for prompt in self._default_prompts:
                self._encode(prompt)
            if self._negative is None:
                self._negative = self._encode(self.call.get("negative_prompt") or "")

    def condition(self, prompts: Sequence[str] | None, n: int) -> Condition:
        """The rows of n prompts; None for the default prompts."""
        if prompts is None and not self.in_words:
            rows = self._repeat(self._fixed_rows, n)
            return rows if self._negative is None else with_negative(rows, self._repeat(self._negative, n))
        if not self.in_words:
            raise ValueError(
                f"cond={prompts[0] if prompts else ''!r}: this map was made with prompt_embeds=, so it takes no prompts"
            )
        prompts_used = self._default_prompts or [""]
        if prompts is None and len(prompts_used) not in (1, n):
            raise ValueError(f"{len(prompts_used)} prompts for n={n} outputs: give one prompt, or one per output")
        rows = [self._encode(prompt) for prompt in prompts or (prompts_used * n)[:n]]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} or None

    @property
    def null(self) -> Condition:
        """The row of the negative or empty prompt; None if there is neither."""
        return map_condition(lambda rows: rows[:1], self._negative or None)

    def again(self, steps: int) -> Recording:
        """Record the first call with another number of steps, up to the network, without encoding."""
        return record(self.pipe, _steps(self.pipe, self._probe, steps), calls=1, encoded=self.first.encoded)

    def drop_text_encoders(self) -> None:
        """Free the text and image encoders."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and ("text_encoder" in name or "image_encoder" in name):
                setattr(self.pipe, name, None)
        self.dropped = True
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self._rows:
            if self.dropped:
                raise ValueError(f"prompt {prompt!r} is new, but the text encoders were dropped: give it in prompt=")
            halves = len(self._sides(self.first.calls[:1]))
            call = _steps(self.pipe, {**self.call, "prompt": prompt}, 2)
            recording = record(self.pipe, call, calls=self.guidance.positive // halves + 1)
            self._rows[prompt] = self._sides(recording.calls)[self.guidance.positive]
        return self._rows[prompt]

    def _sides(self, calls: Sequence[Call]) -> list[dict[str, Tensor]]:
        """The rows of each condition in the network's calls; guidance has two, in one call or in two calls."""
        sides = []
        for call in calls:
            k = len(call.arguments[self.layout.states]) // len(self.first.sample)
            chunks = {name: self._exact_scale(rows).chunk(k) for name, rows in self.layout.take(call).items()}
            sides += [{name: rows[i] for name, rows in chunks.items()} for i in range(k)]
        return sides

    def _exact_scale(self, rows: Tensor) -> Tensor:
        """Rows unchanged; but a guidance scale in half precision, where 3000 is 3008, is replaced by its float32 value."""
        if rows.ndim != 1 or rows.dtype not in (torch.float16, torch.bfloat16):
            return rows
        for scale in (more * value for value in _scales({**parameters(self.pipe), **self.call}) for more in (1.0, 1000.0)):
            if (rows == torch.tensor(scale).to(rows)).all():
                return torch.full_like(rows, scale, dtype=torch.float32)
        return rows

    @staticmethod
    def _repeat(rows: dict[str, Tensor], n: int) -> Condition:
        count = len(next(iter(rows.values()), ()))
        if count not in (0, 1, n):
            raise ValueError(f"prompt_embeds= has {count} rows for n={n} outputs: give one row, or one per output")
        return {name: value.expand(n, *value.shape[1:]) for name, value in rows.items()} or None


def _steps(pipe: Any, call: Mapping[str, Any], steps: int) -> dict[str, Any]:
    middle = {} if steps == 2 or "intermediate_timesteps" not in parameters(pipe) else {"intermediate_timesteps": None}
    return {**middle, **call, "num_inference_steps": steps}  # SANA-Sprint has an extra time for two steps


def _twice(call: Mapping[str, Any]) -> dict[str, Any]:
    """The same call for twice as many samples; the second prompt is longer, to reveal arguments that depend on the length."""

    def double(name: str, value: Any) -> Any:
        if name == "prompt":
            return [value, f"{value} {value}"]
        if not name.startswith(("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt", "latents")):
            return value
        if isinstance(value, str):
            return [value, value]
        return torch.cat([value, value]) if isinstance(value, Tensor) else value * 2 if isinstance(value, list) else value

    return {name: double(name, value) for name, value in call.items()}


def _guidance(first: Recording, call: Mapping[str, Any], network: nn.Module) -> Guidance:
    """The guidance between the network's outputs and the scheduler's input, by least squares.

    Raises:
        ValueError: it is not classifier-free guidance with one scale.
    """
    what, precision = type(network).__name__, torch.finfo(next(network.parameters()).dtype).eps
    outputs = [
        part for call in first.calls for part in rows_of(call.output, first.sample.shape[1:], what).split(len(first.sample))
    ]
    target = first.model_output.double().reshape(outputs[0].shape)
    fits = [_fit(target, [output.double() for output in outputs], factor, positive, precision)
            for factor in (1.0, -1.0) for positive in range(len(outputs))]  # fmt: skip
    miss, guidance = min(fits, key=lambda fit: fit[0])
    if len(outputs) > 2 or not miss < 1:
        raise ValueError(
            "this pipeline does not guide by negative + scale (positive - negative), but by its own rule: switch guidance off, "
            "guidance=1, or switch off the rule, by an argument of its call"
        )
    return guidance if guidance.scale is None else Guidance(guidance.factor, _snap(guidance.scale, call), guidance.positive)


def _fit(target: Tensor, outputs: list[Tensor], factor: float, positive: int, precision: float) -> tuple[float, Guidance]:
    """(distance of the target from guidance of the outputs, relative to the effect of rounding; that guidance)."""
    guided, tolerance = outputs[positive], 10 * precision * target.norm()
    if len(outputs) != 2:
        return float((factor * guided - target).norm() / tolerance), Guidance(factor, None, positive)
    away = outputs[1 - positive]
    ahead = guided - away
    scale = float(((factor * target - away) * ahead).sum() / ahead.square().sum())
    if not scale > 0.99:  # negative and positive are swapped
        return float("inf"), Guidance(factor, scale, positive)
    miss = (factor * (away + scale * ahead) - target).norm()
    return float(miss / (tolerance + 0.02 * scale * ahead.norm())), Guidance(factor, scale, positive)


def _snap(scale: float, call: Mapping[str, Any]) -> float:
    """The requested scale nearest to the measured one (plus one if the pipeline counts from 0), to remove rounding errors."""
    candidates = [value + more for value in _scales(call) for more in (0, 1)]
    nearest = min(candidates, key=lambda value: abs(value - scale), default=scale)
    return nearest if abs(nearest - scale) < 1e-2 * scale else scale


def _scales(call: Mapping[str, Any]) -> list[float]:
    """The guidance scales in the arguments of a call."""
    return [float(call[name]) for name in GUIDANCE if isinstance(call.get(name), int | float)]
