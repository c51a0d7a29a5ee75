"""The result of `steer`: all particles with weights, rewards, trace and cost. It can be saved, loaded, joined and drawn.

In files, and when results are joined or indexed, a result is a dictionary of tensors with one row per output.
"""

from __future__ import annotations

import base64
import html
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerfm import files
from steerfm.checks import at_least_one
from steerfm.cost import Cost
from steerfm.flowmap import FlowMap, Wrapped, in_parts
from steerfm.steering.diagnosis import Diagnosis
from steerfm.steering.outcome import Outcome, Trace
from steerfm.steering.selection import Resample

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "samples.safetensors"
"""File name of a result in a folder; the same as that of `steerfm steer`."""
KIND = "steerfm.SteeringResult"
SHOWN = 64
"""Most outputs in a grid."""
OVER_TIME = "over time, from noise to picture: the value of the particles, and how even their weights are"
"""The caption of `SteeringResult.plot`."""


@dataclass
class SteeringResult(Outcome):
    """The result of `steer`. ``len(result)`` is the number of outputs; ``result[3]``, ``result[:8]`` and ``result[[2, 5]]`` are
    results of some outputs, with the cost of the whole run.

    Attributes:
        samples: (n, k, *shape) all particles, in model space.
        rewards: (n, k) rewards of the samples.
        components: {name: (n, k)} raw values of every term of the reward.
        log_weights: (n, k) with logsumexp = 0 over the particles of each output.
        log_z: (n,) estimate of log E exp(strength * r); None if the method has no estimate. The method's docstring names the
            law, and whether the estimate is unbiased.
        trace: see `Trace`.
        cost: see `steerfm.cost.Cost`.
        strength: (n,) of the tilt.
        flow_map: the model, which decodes the samples; None if a file was loaded without it (see `load`).
        micro_batch: samples to decode at a time; None for all.
    """

    cost: Cost
    strength: Tensor
    flow_map: FlowMap | None
    micro_batch: int | None = None

    # --- pictures ------------------------------------------------------------------------------------------------
    def images(self, batch_size: int | None = None) -> Tensor:
        """(n, k, c, h, w) pictures in [0, 1], or (n, k, c, f, h, w) videos (vectors stay as they are).

        Args:
            batch_size: samples to decode at a time, to limit memory; default as in the run.

        Raises:
            ValueError: the result was loaded without the model that decodes its samples.
        """
        n, k = self.samples.shape[:2]
        return self._decode(self.samples.flatten(0, 1), batch_size).unflatten(0, (n, k))

    def best(self) -> Tensor:
        """(n, *shape): the particle of highest reward of each output, or of lowest reward if ``strength`` is negative.

        This is a search, not a sample of the target.
        """
        return self.samples[torch.arange(len(self), device=self.samples.device), self.best_index()]

    def best_index(self) -> Tensor:
        """(n,): index of the particle that `best` returns."""
        return self._utility().argmax(1)

    def resample(self, generator: torch.Generator) -> Tensor:
        """(n, k, *shape) equally weighted particles, drawn by systematic resampling.

        Args:
            generator: a CPU generator.
        """
        n, k = self.log_weights.shape
        u = torch.rand(n, k, generator=generator).to(self.log_weights)
        ancestors = Resample("systematic").draw(self.log_weights, u)
        return self.samples[torch.arange(n, device=self.samples.device).unsqueeze(1), ancestors]

    @property
    def diagnosis(self) -> Diagnosis:
        """The effect of the strength on the particles, and whether their weights can be trusted."""
        return Diagnosis.of(self)

    def pil(self) -> list[Image]:
        """The best particle of each output as a PIL picture, in the resolution of the model; n pictures.

        Raises:
            ValueError: the samples are not pictures; or see `images`.
        """
        from PIL import Image

        from steerfm.report.pictures import levels

        pictures = levels(self._pictures(self.best()))
        return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pictures]

    def grid(self, path: str | Path, particles: int = 1, columns: int = 8) -> Path:
        """Draw the pictures of the first 64 outputs with their rewards; use ``result[64:]`` for the next.

        Args:
            path: of the png.
            particles: 1 for the best of each output, side by side; more for one row per output, the best first.
            columns: pictures per row if ``particles`` is 1.

        Returns:
            The path.

        Raises:
            ValueError: ``particles`` or ``columns`` is out of range; the samples are not pictures; or see `images`.
        """
        from steerfm.report.pictures import picture_grid

        k = self.rewards.shape[1]
        if not 1 <= particles <= k:
            raise ValueError(f"particles={particles}: each output has {k}; give a number from 1 to {k}")
        if columns < 1:
            raise ValueError(f"columns={columns}: must be at least 1")
        some = self[:SHOWN] if len(self) > SHOWN else self
        order = some._utility().argsort(dim=1, descending=True, stable=True)[:, :particles]
        rows = torch.arange(len(some), device=order.device).unsqueeze(1)
        pictures = self._pictures(some.samples[rows, order].flatten(0, 1)).float().cpu()
        captions = [f"{value:.4g}" for value in some.rewards.gather(1, order).flatten().tolist()]
        if particles == 1:
            captions = [f"output {number}\n{text}" for number, text in enumerate(captions)]
            particles = min(columns, len(some))
            missing = -len(pictures) % particles
            pictures = torch.cat([pictures, pictures.new_ones(missing, *pictures.shape[1:])])
            captions, labels = captions + [""] * missing, []
        else:
            labels = [f"output {number}" for number in range(len(some))]
        some_of = "" if len(some) == len(self) else f", the first {SHOWN} of {len(self)} outputs"
        title = f"best of {k} particles, the reward below: {', '.join(self.components)}{some_of}"
        texts = [captions[begin : begin + particles] for begin in range(0, len(captions), particles)]
        return picture_grid(pictures.unflatten(0, (-1, particles)), path, labels, texts, title)

    def plot(self, path: str | Path, method: str = "value", names: Sequence[str] = (), rewards: Tensor | None = None) -> Path:
        """Draw the course of the run: value, effective sample size and guidance over time, final rewards, look-ahead pictures.

        Args:
            path: of the png.
            method: name of the method; it sets the colour of the lines.
            names: label or prompt of each output; different ones are drawn separately.
            rewards: (m, k) final rewards of these outputs and of further ones; ``names`` then has m entries.

        Returns:
            The path.
        """
        from steerfm.report.trace import trace_plot

        steps = vars(self.trace) | {"rewards": self.rewards if rewards is None else rewards}
        looks = steps.pop("lookaheads")
        if looks is not None and self.flow_map is not None and len(self.flow_map.shape) == 3:
            steps["lookaheads"] = self._decode(looks.flatten(0, 1)).unflatten(0, looks.shape[:2])
        return trace_plot(steps, path, method, names)

    def report(self, folder: str | Path, title: str = "Steered samples", method: str = "value") -> Path:
        """Save into a folder, together with a page, ``report.html``, and its pictures, ``grid.png`` and ``trace.png``.

        Args:
            folder: created if missing.
            title: of the page.
            method: name of the method, such as "funnel"; it sets the colour of the lines.

        Returns:
            The path of the page.
        """
        from steerfm.report.page import report

        folder, pictures = Path(folder), []
        self.save(folder)
        if self.flow_map is not None and self.samples.ndim == 5:
            columns = 4  # readable on a phone
            pictures.append(("the best particle of each output", self.grid(folder / "grid.png", columns=columns)))
        pictures.append((OVER_TIME, self.plot(folder / "trace.png", method)))
        return report(folder, title, self._summary(), pictures=pictures)

    # --- files ---------------------------------------------------------------------------------------------------
    def save(self, path: str | Path, **more: Tensor) -> Path:
        """Write everything but the model to a file. The write is atomic.

        Args:
            path: a file, ``x.safetensors``, or a folder, for ``samples.safetensors`` in it.
            more: further tensors (n, ...) to save; `load` ignores them.

        Returns:
            The path of the file.

        Raises:
            ValueError: a name in ``more`` is in use, or a tensor has another number of rows.
            OSError: the disk is full.
        """
        own = self._rows()
        if wrong := [name for name, value in more.items() if name in own or len(value) != len(self)]:
            raise ValueError(f"{wrong[0]} cannot be saved: give another name, and {len(self)} rows, one per output")
        # clone: safetensors refuses tensors that share memory, such as views of one batch
        rows = {name: value.detach().cpu().contiguous().clone() for name, value in (own | more).items()}
        return files.write_tensors(_file(path), rows, facts(self.cost, self.flow_map))

    @classmethod
    def load(cls, path: str | Path, flow_map: FlowMap | None = None) -> SteeringResult:
        """Read a file of `save`, or of `steerfm steer`.

        Args:
            path: the file, or its folder.
            flow_map: the model; `images` only needs it if the model has its own decoder, as latent models do.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, not a steering result, or does not have the shape of the model.
        """
        file = _file(path)
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
        try:
            with safe_open(file, "pt") as tensors:
                facts = tensors.metadata() or {}
                rows = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None
        try:
            if facts["kind"] != KIND:
                raise KeyError(facts["kind"])
            cost = Cost(**json.loads(facts["cost"]))
            if flow_map is None and facts["decode"] == "plain":
                flow_map = FlowMap(rows["samples"].shape[2:])  # only its decoder is needed
            n, k = rows["samples"].shape[:2]
            if any(len(value) != n for value in rows.values()) or rows["rewards"].shape != (n, k):
                raise ValueError("rows")
            result = cls._of(rows, cost, flow_map)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ValueError(f"{file} is not a steering result: give a file that SteeringResult.save wrote") from None
        if flow_map is None:
            return result
        if tuple(flow_map.shape) != tuple(result.samples.shape[2:]):
            raise ValueError(
                f"{file} holds samples of {tuple(result.samples.shape[2:])}, flow_map makes {tuple(flow_map.shape)}"
            )
        return result.to(flow_map.device)

    @classmethod
    def cat(cls, results: Sequence[SteeringResult]) -> SteeringResult:
        """Join results of the same method on different outputs. Costs add up; traces use the union of their times. Optional
        tensors, such as look-ahead pictures, are dropped unless all results have them.

        Raises:
            ValueError: no results, or results that differ in particles, shape or terms of the reward.
        """
        if not results:
            raise ValueError("no results to join")
        parts = _at_one_grid([result._rows() for result in results])
        for name in parts[0]:
            if name.startswith("component.") or all(name in part for part in parts):
                shapes = [tuple(part[name].shape[1:]) if name in part else None for part in parts]
                if different := [shape for shape in shapes if shape != shapes[0]]:
                    raise ValueError(f"results cannot be joined: {name} has {shapes[0]} and {different[0]} for each output")
        if different := [name for part in parts for name in part if name.startswith("component.") and name not in parts[0]]:
            raise ValueError(f"results cannot be joined: {different[0]} is not in all of them")
        rows = {name: _join([part[name] for part in parts]) for name in parts[0] if all(name in part for part in parts)}
        return cls._of(rows, sum((result.cost for result in results), Cost()), results[0].flow_map, results[0].micro_batch)

    def to(self, device: torch.device | str) -> SteeringResult:
        """The same result on another device; the model stays where it is."""
        return self._of(
            {name: value.to(device) for name, value in self._rows().items()}, self.cost, self.flow_map, self.micro_batch
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> SteeringResult:
        if isinstance(index, tuple):
            raise TypeError(
                f"result[{', '.join(map(str, index))}]: give one index, of outputs; for particles use result.samples[...]"
            )
        if not isinstance(index, slice):  # an index on the CPU works on any device
            index = torch.as_tensor(index, device="cpu").reshape(-1)
        outputs = torch.arange(len(self))[index]
        if not len(outputs):
            raise IndexError(f"no outputs selected: the result has {len(self)}")
        rows = {name: value[outputs.to(value.device)] for name, value in self._rows().items()}
        return self._of(rows, self.cost, self.flow_map, self.micro_batch)

    def __iter__(self) -> Iterator[SteeringResult]:
        return (self[index] for index in range(len(self)))

    # --- for people ----------------------------------------------------------------------------------------------
    def __repr__(self) -> str:
        rows = self._summary()
        width = max(map(len, rows)) + 2
        return "\n  ".join(["SteeringResult", *(f"{name:<{width}}{value}" for name, value in rows.items())])

    def _repr_html_(self) -> str:
        picture = self._repr_png_()
        image = "" if picture is None else f'<img src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        return f"<pre>{html.escape(repr(self))}</pre>{image}"

    def _repr_png_(self) -> bytes | None:
        if len(self.samples.shape) != 5 or self.flow_map is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return self.grid(Path(folder) / "grid.png").read_bytes()

    def _summary(self) -> dict[str, str]:
        n, k, *shape = self.samples.shape
        best = self.rewards.gather(1, self.best_index().unsqueeze(1))
        values = [float(value) for value in self.strength.unique()]
        rows = {
            "outputs": f"{n} of {k} particles, each {tuple(shape)} {str(self.samples.dtype).removeprefix('torch.')}",
            "reward": f"mean {self.rewards.mean():.4g}, best {best.mean():.4g} (of each output, mean over outputs)",
        }
        if len(self.components) > 1:
            terms = [f"{name} {value.float().mean():.4g}" for name, value in self.components.items()]
            more = f" and {len(terms) - 6} more" if len(terms) > 6 else ""
            rows["terms"] = f"mean {', '.join(terms[:6])}{more}"
        rows["strength"] = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
        rows |= self.diagnosis.in_words()
        if self.log_z is not None:
            rows["log Z"] = f"{self.log_z.mean():.4g} (mean over outputs)"
        return rows | {"steps": str(len(self.trace.t)), "cost": str(self.cost)}

    # --- pieces --------------------------------------------------------------------------------------------------
    def _utility(self) -> Tensor:
        """(n, k) rewards, with the sign changed where the strength is negative: higher is better."""
        return torch.where(self.strength.unsqueeze(1) < 0, -self.rewards, self.rewards)

    def _decode(self, z: Tensor, batch_size: int | None = None) -> Tensor:
        if self.flow_map is None:
            raise ValueError(
                "this result was loaded without its model, which decodes the samples: SteeringResult.load(path, flow_map=...)"
            )
        rows = self.micro_batch if batch_size is None else batch_size
        at_least_one(batch_size=1 if rows is None else rows)
        return in_parts(self.flow_map.decode, z, rows)

    def _pictures(self, z: Tensor) -> Tensor:
        pictures = self._decode(z)
        if pictures.ndim != 4:
            raise ValueError(f"each sample is {tuple(pictures.shape[1:])}, not a picture (c, h, w), so it cannot be drawn")
        return pictures

    def _rows(self) -> dict[str, Tensor]:
        """All tensors by name, each with one row per output."""
        n = len(self)
        rows = {name: getattr(self, name) for name in ("samples", "rewards", "log_weights", "log_z", "strength")}
        rows |= {f"component.{name}": value for name, value in self.components.items()}
        steps = {f.name: getattr(self.trace, f.name) for f in fields(Trace)}
        rows |= {f"trace.{name}": None if value is None else _first(value, n) for name, value in steps.items()}
        return {name: value for name, value in rows.items() if value is not None}

    @classmethod
    def _of(
        cls, rows: Mapping[str, Tensor], cost: Cost, flow_map: FlowMap | None, micro_batch: int | None = None
    ) -> SteeringResult:
        """The inverse of `_rows`; other names are ignored."""

        def with_prefix(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in rows.items() if name.startswith(prefix)}

        steps = {name: value[0] if name == "t" else value.transpose(0, 1) for name, value in with_prefix("trace.").items()}
        return cls(
            samples=rows["samples"],
            rewards=rows["rewards"],
            components=with_prefix("component."),
            log_weights=rows["log_weights"],
            log_z=rows.get("log_z"),
            trace=Trace(**steps),
            cost=cost,
            micro_batch=micro_batch,
            strength=rows["strength"],
            flow_map=flow_map,
        )


def facts(cost: Cost, flow_map: FlowMap | None) -> dict[str, str]:
    """Metadata of a result's file: the cost, and whether samples are plain pictures in [-1, 1]."""
    while isinstance(flow_map, Wrapped):
        flow_map = flow_map.flow_map
    plain = flow_map is not None and type(flow_map).decode is FlowMap.decode
    return {"kind": KIND, "cost": json.dumps(cost.as_dict()), "decode": "plain" if plain else "own"}


def _first(value: Tensor, n: int) -> Tensor:
    """A tensor (steps, n, ...) of a trace, or (steps,), as (n, steps, ...)."""
    return value.expand(n, -1) if value.ndim == 1 else value.transpose(0, 1)


def _at_one_grid(parts: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
    """The same rows, with their traces on the union of all times; see `Trace` for the filling."""
    own = [part["trace.t"][0].tolist() for part in parts]
    if all(times == own[0] for times in own) or any(times != sorted(times) for times in own):
        return parts
    grids = [[(time, times[:step].count(time)) for step, time in enumerate(times)] for times in own]  # a time can occur twice
    whole = sorted({mark for grid in grids for mark in grid})
    times = torch.tensor([time for time, _ in whole], dtype=parts[0]["trace.t"].dtype)
    out = []
    for part, grid in zip(parts, grids):
        there = torch.tensor([mark in grid for mark in whole])
        rows = {
            name: _fill_steps(name, value, there) if name.startswith("trace.") and value.shape[1] == len(grid) else value
            for name, value in part.items()
        }
        out.append(rows | {"trace.t": times.to(part["trace.t"].device).expand(len(part["trace.t"]), -1)})
    return out


def _fill_steps(name: str, value: Tensor, there: Tensor) -> Tensor:
    """Spread records (n, steps, ...) over more steps: ``there`` marks the steps that have records."""
    there = there.to(value.device)
    if name == "trace.lookaheads":
        return value[:, (there.cumsum(0) - 1).clamp_min(0)]
    fill = torch.tensor(False if value.dtype == torch.bool else float("nan"))
    if name == "trace.ancestors":
        fill = torch.arange(value.shape[-1])
    out = fill.to(value).expand(len(value), len(there), *value.shape[2:]).clone()
    out[:, there] = value
    return out


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors, outside inference mode, so that autograd accepts them."""
    if len(parts) > 1:
        return torch.cat(list(parts))
    return parts[0].clone() if parts[0].is_inference() else parts[0]


def _file(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / FILE
