"""Pipelines of diffusers as flow maps: the only module with schedulers, their sigmas and their thousand steps.

>>> fm = steerfm.load("diffusers:FOLDER_OR_HUB_ID", prompt=["a cat", "a dog"], guidance=4.5, height=512, width=512)
>>> fm = steerfm.models.from_pipeline(pipe, "a cat", steps=4)              # an existing pipeline
>>> result = steerfm.steer(fm, "aesthetic", cond=["a cat", "a dog"], n=2)

The calls of the network are learnt from the pipeline itself: its first call is recorded (`capture`), the arguments that depend
on prompts become a condition (`layout`, `prompts`), one of the classes in `families` wraps the network, and a few invertible
pieces wrap the autoencoder (`decoders`). The scheduler determines the class, the times and the noise.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from steerfm.capabilities import ENDPOINT, TWO_TIME, VELOCITY, closed
from steerfm.checks import whole_numbers
from steerfm.flowmap import FlowMap, Guided, Microbatched, Wrapped
from steerfm.models import lora as adapters
from steerfm.models import moved_noise, paths
from steerfm.models.capture import Recording, check_arguments, denoiser, denoisers, parameters
from steerfm.models.decoders import decoder_of
from steerfm.models.experts import Experts, GuidedExperts
from steerfm.models.families import (
    LinearMap,
    Overshoot,
    PipelineMap,
    PreconditionedMap,
    TrigonometricMap,
    VariancePreservingMap,
    Within,
)
from steerfm.models.prompts import GUIDANCE, Prompts
from steerfm.models.two_time import add_second_time, has_second_time
from steerfm.transitions import Bridge, Jump, Renoise, Transition

SET_HERE = {
    "prompt": "prompt= of from_pipeline",
    "num_inference_steps": "steps=",
    "num_images_per_prompt": "n= of sample and steer",
    "num_videos_per_prompt": "n= of sample and steer",
    "generator": "seeds= of sample and steer",
    "output_type": "fm.decode",
    "return_dict": "fm.decode",
}
"""Arguments of pipelines with another name here."""


def from_pipeline(
    pipe: Any,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    guidance: float | None = None,
    steps: int = 4,
    height: int | None = None,
    width: int | None = None,
    *,
    capability: str | None = None,
    scheduler_grid: bool = False,
    drop_text_encoders: bool = False,
    tiling: bool = False,
    slicing: bool = False,
    gradient_checkpointing: bool = False,
    micro_batch: int | None = None,
    two_time: bool = False,
    lora: str | Path | Sequence[str | Path] | None = None,
    lora_scale: float = 1.0,
    **arguments: Any,
) -> FlowMap:
    """A pipeline as a flow map. Its network is that of the pipeline, not a copy; it becomes frozen and is in evaluation mode.

    Args:
        pipe: a text-to-image or text-to-video pipeline of diffusers.
        prompt: default prompt for outputs without ``cond``: one for all, or one for each.
        negative_prompt: the prompt that classifier-free guidance leads away from; default that of the pipeline.
        guidance: guidance scale, in the pipeline's convention; default that of the pipeline.
        steps: default number of sampling steps.
        height: of its pictures in pixels; default that of the pipeline.
        width: likewise.
        capability: capability of the network if its scheduler does not show it: "endpoint" or "generator" for models that
            were distilled to few steps; see `steerfm.capabilities`.
        scheduler_grid: use exactly the scheduler's times, even if they waste a call; see `Flow`.
        drop_text_encoders: free the text encoders once the prompts are encoded; new prompts are then impossible.
        tiling: decode in tiles: less memory, slightly different pictures.
        slicing: decode one picture at a time: less memory.
        gradient_checkpointing: recompute activations for gradients: less memory, more time, the same gradients.
        micro_batch: rows per call of the network, and pictures per call of the decoder; None for all.
        two_time: give FLUX.1 or SD3.5 a second time, which adapters of flow maps need; see `steerfm.models.two_time`.
        lora: a low-rank adapter in the layout of diffusers or peft, a file or a folder, or several in order. Factors are added
            to the network's weights; whole tensors replace them.
        lora_scale: strength of the adapters; 0 leaves the network unchanged.
        **arguments: further arguments of the pipeline's call, such as num_frames, max_sequence_length, prompt_embeds.

    Raises:
        ValueError: the call does not have an argument, the first call cannot be captured, or guidance is not linear.
    """
    whole_numbers(steps=steps, micro_batch=1 if micro_batch is None else micro_batch)
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    able = None if capability is None else closed([capability])
    network = _network(pipe, two_time, [] if lora is None else [lora] if isinstance(lora, str | Path) else lora, lora_scale)
    sizes = {"negative_prompt": negative_prompt, "height": height, "width": width}
    call = _call(pipe, {name: value for name, value in sizes.items() if value is not None} | arguments, guidance)
    family = _family(pipe.scheduler)
    prompts = Prompts(pipe, call, linear=family is not Sprint)
    prompts.layout.widen(network, prompts.first.calls[0])
    schedule = family(prompts, scheduler_grid)
    flow_map = schedule.around(network, decoder_of(pipe, prompts.first.sample.shape[1:], prompts.first.size, call))
    flow_map.capabilities = able or flow_map.capabilities
    if flow_map.transition is None and "velocity" not in flow_map.capabilities:
        flow_map.transition = Jump()  # as its scheduler does; consistency models renoise
    flow_map.steps = steps
    prompts.ask([prompt] if isinstance(prompt, str) else prompt)
    if drop_text_encoders:
        prompts.drop_text_encoders()
    flow_map.eval().requires_grad_(False)
    _switch(pipe, tiling, slicing, gradient_checkpointing)
    thrifty = flow_map if micro_batch is None else Microbatched(flow_map, micro_batch)
    scale, late = prompts.guidance.scale, call.get("guidance_scale_2")
    if scale is not None and late is not None and isinstance(flow_map, LinearMap):
        return GuidedExperts(thrifty, flow_map, scale, float(late))
    return thrifty if scale is None else Guided(thrifty, scale)


def _network(pipe: Any, two_time: bool, lora: Sequence[str | Path], lora_scale: float) -> nn.Module:
    """The pipeline's network (two networks as one `Experts`), with a second time and adapters if requested."""
    networks = denoisers(pipe)
    network, *others = networks.values()
    if two_time:
        add_second_time(network)
    if others:
        network = Experts(networks, pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps)
    for path in lora:
        check_lora(path)
    for path, of in [(path, adapters.read(path, tuple(networks))) for path in lora]:  # read all before adding any
        adapters.add(network, of, lora_scale, path)
    return network


def check_lora(path: str | Path) -> None:
    """Check that an adapter is not one of the noise, which changes more than the network's weights; its JSON says so.

    Raises:
        ValueError: it is an adapter of the noise.
    """
    file = adapters.file_of(path)
    if file.with_suffix(".json").is_file() and moved_noise.KEY in json.loads(file.with_suffix(".json").read_text()):
        raise ValueError(f"lora={path} is an adapter of the noise, not of the network alone: use steerfm.load({str(file)!r})")


def pipeline_map(flow_map: FlowMap) -> PipelineMap | None:
    """The pipeline map inside wrappers; None if there is none."""
    while isinstance(flow_map, Wrapped):
        flow_map = flow_map.flow_map
    return flow_map if isinstance(flow_map, PipelineMap) else None


def save_lora(flow_map: FlowMap, path: str | Path) -> Path:
    """Write the adapters of a tuned map in the layout of diffusers and peft; the scale is included in the factors.

    >>> steerfm.models.save_lora(tuned, "mine")
    >>> pipe.load_lora_weights("mine", weight_name="pytorch_lora_weights.safetensors")

    Args:
        flow_map: of a pipeline, with adapters from `steerfm.finetuning.FineTuning(lora=...)`.
        path: a folder, or a ``.safetensors`` file.

    Returns:
        The path of the file.

    Raises:
        ValueError: it is not the map of a pipeline, or has no adapters.
    """
    of, factors = _of_pipeline(flow_map), adapters.factors(flow_map.body)
    if not factors:
        raise ValueError("save_lora: this map has no adapters: tune it with lora=LoRA(rank), or use save_pipeline")
    file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / adapters.FILE
    parts = denoisers(of.prompts.pipe)
    return adapters.write(factors, file, *(parts if len(parts) == 1 else ()))


def save_pipeline(flow_map: FlowMap, folder: str | Path) -> Path:
    """Write the whole pipeline with the weights of this map, as ``save_pretrained`` does; adapters are added to the weights.

    Raises:
        ValueError: it is not the map of a pipeline, or its text encoders were dropped.
    """
    prompts = _of_pipeline(flow_map).prompts
    pipe = prompts.pipe
    if prompts.dropped:
        raise ValueError("save_pipeline: the text encoders were dropped: make the map without drop_text_encoders")
    own, network = denoisers(pipe), adapters.merged(flow_map.body)
    try:
        for name in own:
            setattr(pipe, name, getattr(network, name) if isinstance(network, Experts) else network)
        pipe.save_pretrained(str(folder), safe_serialization=True)
    finally:
        for name, part in own.items():
            setattr(pipe, name, part)
    return Path(folder)


def _of_pipeline(flow_map: FlowMap) -> PipelineMap:
    of = pipeline_map(flow_map)
    if of is None:
        raise ValueError(f"{type(flow_map).__name__} is not the map of a pipeline: use flow_map.save(FILE)")
    return of


def parts_of(flow_map: FlowMap) -> tuple[str, ...]:
    """The names of the networks in the pipeline of a map; empty for other maps."""
    of = pipeline_map(flow_map)
    return () if of is None else tuple(denoisers(of.prompts.pipe))


def load(
    name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None, **arguments: Any
) -> FlowMap:
    """Load a pipeline from a folder or from the hub, as a flow map.

    Args:
        name: a folder of ``save_pretrained``, or an id on the hub, OWNER/MODEL.
        device: default the CPU.
        dtype: of its weights, such as "bfloat16"; default float32. States are always float32.
        **arguments: of `from_pipeline`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the pipeline cannot be read or found on the hub.
        FileNotFoundError: there is no such folder.
    """
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r}: give float32, bfloat16 or float16")
        dtype = getattr(torch, dtype)
    return from_pipeline(pipeline(name, dtype).to(device or "cpu"), **arguments)


def pipeline(name: str, dtype: Any = None) -> Any:
    """The pipeline of a folder or of the hub, without parts that were not saved. Raises as `load` does."""
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except ImportError:
        raise ImportError(f"diffusers:{name} needs diffusers: pip install 'steerfm[diffusers]'") from None
    folder = Path(name)
    here = bool(name) and folder.is_dir()
    if here and not (folder / "model_index.json").is_file():
        raise ValueError(f"diffusers:{name} is not a pipeline, it has no model_index.json: give a folder of save_pretrained")
    if not here and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"diffusers:{name}: no such folder, and not a name on the hub, OWNER/MODEL")
    try:
        return DiffusionPipeline.from_pretrained(
            name, torch_dtype=dtype, use_safetensors=True, **(_missing_parts(folder) if here else {})
        )
    except Exception as error:  # any error of the libraries: no internet, no such model, a broken file
        if here:
            line = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"diffusers:{name} cannot be read: {type(error).__name__}: {line}") from error
        raise ValueError(
            f"diffusers:{name}: no such folder here, and it cannot be loaded from the hub ({type(error).__name__}): download "
            f"it elsewhere, `hf download {name} --local-dir FOLDER`, and give the folder"
        ) from error


def _missing_parts(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, as None: otherwise diffusers would look for them."""
    index = json.loads((folder / "model_index.json").read_text())
    return {part: None for part, where in index.items() if where == [None, None]}


def _call(pipe: Any, options: Mapping[str, Any], guidance: float | None) -> dict[str, Any]:
    """The arguments of the pipeline's own call, except its prompt and its steps."""
    for name in options:
        if name in SET_HERE:
            raise ValueError(f"{name}=: use {SET_HERE[name]}")
    check_arguments(pipe, options)
    names, guider = parameters(pipe), getattr(pipe, "guider", None)
    defaults = {"negative_prompt": None} if "negative_prompt_embeds" in options and "negative_prompt" in names else {}
    call = defaults | dict(options)
    if guidance is not None:
        scales = [name for name in GUIDANCE if name in names]
        if "true_cfg_scale" in scales and not getattr(denoiser(pipe).config, "guidance_embeds", True):
            scales = ["true_cfg_scale"]  # the other scale is only for guidance-distilled networks
        if not scales:
            raise ValueError(f"guidance={guidance}: {type(pipe).__name__} has no guidance")
        if scales[0] in call:
            raise ValueError(f"{scales[0]}= and guidance= are given, but mean the same: give only one of them")
        call[scales[0]] = float(guidance)
    if getattr(guider, "num_conditions", 1) > 1 and getattr(guider, "_enabled", True):
        raise ValueError(f"{type(pipe).__name__} is guided by {type(guider).__name__}, which is not linear: give guider=None")
    return call


def _switch(pipe: Any, tiling: bool, slicing: bool, gradient_checkpointing: bool) -> None:
    """Enable options that save memory."""
    for name, part, enable in (
        ("enable_tiling", getattr(pipe, "vae", None), tiling),
        ("enable_slicing", getattr(pipe, "vae", None), slicing),
        *(("enable_gradient_checkpointing", network, gradient_checkpointing) for network in denoisers(pipe).values()),
    ):
        if enable:
            if not hasattr(part, name):
                raise ValueError(
                    f"{name.removeprefix('enable_')}=True: {type(pipe).__name__} does not support it: leave it out"
                )
            getattr(part, name)()


# --- schedulers ------------------------------------------------------------------------------------------------------
class Schedule:
    """The times of a scheduler, and its class of maps.

    Args:
        prompts: of the pipeline.
        to_the_letter: use exactly the scheduler's default times.
    """

    def __init__(self, prompts: Prompts, to_the_letter: bool) -> None:
        self.prompts, self.to_the_letter = prompts, to_the_letter
        self.scheduler = prompts.pipe.scheduler
        self._grids: dict[int, list[float]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return self

    def __call__(self, steps: int) -> list[float]:
        """Times from 0, noise, to 1, data; at most steps + 1, since a scheduler can repeat a time."""
        whole_numbers(steps=steps)
        if steps < 1:
            raise ValueError(f"steps={steps}: at least one step is needed")
        if steps not in self._grids:
            inner = sorted({min(max(float(t), 0.0), 1.0) for t in self.inner(steps)})
            self._grids[steps] = [0.0, *(t for t in inner if 0 < t < 1), 1.0]
        return list(self._grids[steps])

    def around(self, network: nn.Module, decoder: Any) -> PipelineMap:
        """The map of a network."""
        raise NotImplementedError

    def inner(self, steps: int) -> Sequence[float]:
        """Times after the first step and before the last."""
        raise NotImplementedError

    def record_steps(self, steps: int) -> Recording:
        """Record the pipeline's call with these steps, up to its network, without encoding prompts again."""
        return self.prompts.again(steps)

    def parts(self, decoder: Any) -> dict[str, Any]:
        shape, layout = self.prompts.first.sample.shape[1:], self.prompts.layout
        return {"shape": shape, "layout": layout, "prompts": self.prompts, "times": self, "decoder": decoder}


class Flow(Schedule):
    """Flow matching: sigma = 1 - t, and the time of the network is sigma, 1000 sigma or t.

    The Euler scheduler of diffusers takes equal steps from its largest to its smallest sigma, which are already shifted, and
    shifts them again: of four calls of SD3 one is at t = .99 and is wasted. Here the N sigmas are 1, 1 - 1/N, ..., 1/N, shifted
    once, as in pipelines that pass their own sigmas.
    """

    def around(self, network: nn.Module, decoder: Any) -> PipelineMap:
        layout = self.prompts.layout
        offset, slope = self._form()
        flow_map = LinearMap(network, **self.parts(decoder))
        flow_map.factor = self.prompts.guidance.factor * (-1 if self._is_inverted() else 1)
        flow_map.offset, flow_map.slope = offset, slope
        flow_map.stacked = has_second_time(network)
        flow_map.capabilities = TWO_TIME if flow_map.stacked or layout.second_time is not None else VELOCITY
        if getattr(self.scheduler.config, "stochastic_sampling", False) or "LCM" in type(self.scheduler).__name__:
            flow_map.capabilities, flow_map.transition = ENDPOINT, Renoise(1.0)  # jumps to the data and back
        return flow_map

    def inner(self, steps: int) -> Sequence[float]:
        if steps == 1:
            return []  # diffusers would divide by 0 with a terminal shift
        recording = self.record_steps(steps)
        options, sigmas = recording.schedule, recording.sigmas
        default = options.get("sigmas") is None and options.get("timesteps") is None
        if default and not self.to_the_letter and type(self.scheduler).__name__ in SHIFT_TWICE:
            scheduler = copy.deepcopy(self.scheduler)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=options.get("mu"))
            sigmas = scheduler.sigmas
        return [self._time(float(sigma)) for sigma in sigmas[1:-1]]

    def _form(self) -> tuple[float, float]:
        """(offset, slope) of the network's time, offset + slope t, from two of its calls."""
        first, name = self.prompts.first, self.prompts.layout.time
        thousand = float(self.scheduler.config.num_train_timesteps)
        calls = [first.calls[0], *([first.after] if first.after else [])]
        times = [self._time(float(index) / thousand) for index in first.timesteps[: len(calls)]]
        values = [float(torch.as_tensor(call.arguments[name]).flatten()[0]) for call in calls]

        def miss(form: tuple[float, float]) -> float:
            return max(abs(form[0] + form[1] * t - value) for t, value in zip(times, values)) / max(map(abs, form))

        form = min([(thousand, -thousand), (1.0, -1.0), (0.0, 1.0), (0.0, thousand)], key=miss)
        if miss(form) > 1e-2:
            what = type(self.prompts.pipe).__name__
            raise ValueError(
                f"{what} calls its network with the times {values} at t = {times}: none of sigma, 1000 sigma, t or 1000 t"
            )
        return form

    def _is_inverted(self) -> bool:
        return bool(getattr(self.scheduler.config, "invert_sigmas", False))

    def _time(self, sigma: float) -> float:
        return sigma if self._is_inverted() else 1 - sigma


class Diffusion(Schedule):
    """Diffusion, variance preserving or in sigma = b / a: times are indices of ``alphas_cumprod``."""

    def __init__(self, prompts: Prompts, to_the_letter: bool) -> None:
        super().__init__(prompts, to_the_letter)
        self.path = paths.VariancePreserving(self.scheduler.alphas_cumprod)
        self.starts: dict[float, tuple[float, float]] = {}

    def around(self, network: nn.Module, decoder: Any) -> PipelineMap:
        kind, name = self.scheduler.config.prediction_type, type(self.scheduler).__name__
        flow_map = VariancePreservingMap(network, **self.parts(decoder))
        flow_map.path, flow_map.ends = self.path, PREDICTIONS[kind]
        if "LCM" in name:
            flow_map.scalings = self.scheduler.get_scalings_for_boundary_condition_discrete
            flow_map.capabilities, flow_map.transition = ENDPOINT, Renoise(1.0)
            return flow_map
        if "TCD" in name:
            flow_map.capabilities = ENDPOINT
        self(1)  # sets the start of one step
        first = self.path.first
        flow_map.transition = Within(self._move(), self.starts, (first, math.hypot(first, 1 - first)), self._last())
        return flow_map

    def inner(self, steps: int) -> Sequence[float]:
        recording, scheduler = self.record_steps(steps), self.scheduler
        in_sigma = hasattr(scheduler, "is_scale_input_called")  # states are data + sigma noise
        if in_sigma:
            times = [1 / (1 + float(sigma)) for sigma in recording.sigmas[:-1]]
        else:
            times = [self._time(int(index)) for index in recording.timesteps]
        scale = float(scheduler.init_noise_sigma) * times[0] if in_sigma else math.hypot(times[0], 1 - times[0])
        first, *inner = dict.fromkeys(times)
        self.starts[inner[0] if inner else 1.0] = first, scale
        return inner

    def _time(self, index: int) -> float:
        return float(torch.sigmoid(self.path.log_ratios[-1 - index]))

    def _last(self) -> tuple[float, float]:
        """The scheduler's last time, 1 or that of index 0, and the ratio of its state there to that of the linear path."""
        if hasattr(self.scheduler, "is_scale_input_called"):
            sigma = float(self.scheduler.sigmas[-1])
            return 1 / (1 + sigma), 1 + sigma
        square = float(getattr(self.scheduler, "final_alpha_cumprod", 1.0))
        if "TCD" in type(self.scheduler).__name__:
            square = float(self.scheduler.alphas_cumprod[0])
        a, b = square**0.5, (1 - square) ** 0.5
        return a / (a + b), a + b

    def _move(self) -> Transition:
        """The transition of the scheduler. Multistep schedulers, which use several predictions, become Euler steps."""
        name, eta = type(self.scheduler).__name__, float(self.prompts.call.get("eta") or 0.0)
        if "Ancestral" in name or "DDPM" in name:
            return Bridge(1.0)
        if eta and "TCD" in name:
            return Overshoot(eta, self.path)
        if eta and "DDIM" not in name:
            raise ValueError(f"eta={eta}: eta is not supported for {name}: leave it out")
        return Bridge(eta) if eta else Jump()


class Edm(Diffusion):
    """EDM: times are sigmas, and the scheduler scales the network's input and output."""

    def __init__(self, prompts: Prompts, to_the_letter: bool) -> None:
        Schedule.__init__(self, prompts, to_the_letter)
        self.starts = {}

    def around(self, network: nn.Module, decoder: Any) -> PipelineMap:
        flow_map, config = PreconditionedMap(network, **self.parts(decoder)), self.scheduler.config
        flow_map.scheduler = self.scheduler
        flow_map.first, flow_map.last = 1 / (1 + config.sigma_max), 1 / (1 + config.sigma_min)
        self(1)  # sets the start of one step
        flow_map.transition = Within(Jump(), self.starts, self.starts[1.0], self._last())
        return flow_map


class Sprint(Schedule):
    """Consistency models in angles: t = cos / (cos + sin)."""

    def around(self, network: nn.Module, decoder: Any) -> PipelineMap:
        flow_map = TrigonometricMap(network, **self.parts(decoder))
        flow_map.capabilities, flow_map.transition = ENDPOINT, Renoise(1.0)
        return flow_map

    def inner(self, steps: int) -> Sequence[float]:
        angles = self.record_steps(steps).timesteps[1:-1].double()
        return (angles.cos() / (angles.cos() + angles.sin())).tolist()


SHIFT_TWICE = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")

PREDICTIONS = {"epsilon": paths.ends_of_noise, "v_prediction": paths.ends_of_v, "sample": paths.ends_of_data}
"""Predictions of diffusion networks, by their name in schedulers."""


def _family(scheduler: Any) -> type[Schedule]:
    """The kind of schedule of a scheduler.

    Raises:
        ValueError: the scheduler is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name == "SCMScheduler":
        return Sprint
    flow = name.startswith("Flow") or getattr(config, "use_flow_sigmas", False)
    if flow or getattr(config, "prediction_type", None) == "flow_prediction":
        return Flow
    if hasattr(scheduler, "precondition_outputs"):
        return Edm
    if hasattr(scheduler, "alphas_cumprod") and getattr(config, "prediction_type", None) in PREDICTIONS:
        return Diffusion
    raise ValueError(f"{name} is not supported: set pipe.scheduler to an Euler or DDIM scheduler of diffusers for this model")
