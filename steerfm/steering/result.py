"""What `steer` returns: all particles with weights, rewards, trace and cost. It saves, loads, joins, draws and shows itself.

As a file, and wherever results are joined or indexed, a result is a dictionary of tensors with one row per output.
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
"""Of a result in a folder; `steerfm steer` writes the same."""
KIND = "steerfm.SteeringResult"
SHOWN = 64
"""Outputs that a grid draws at most."""
OVER_TIME = "over time, from noise to picture: what the particles are worth, and how evenly their weights are spread"
"""The caption of `SteeringResult.plot`."""


@dataclass
class SteeringResult(Outcome):
    """The result of `steer`. ``len(result)`` is the number of outputs; ``result[3]``, ``result[:8]`` and ``result[[2, 5]]`` are
    the results of some of them, with the cost of the whole run.

    Attributes:
        samples: (n, k, *shape) all particles, in model space.
        rewards: (n, k); components: {name: (n, k)} raw values of every term of the reward.
        log_weights: (n, k) with logsumexp = 0 over the particles of each output.
        log_z: (n,) estimate of log E exp(strength * r) where the method gives one, else None; its docstring says of which law,
            and whether it is unbiased.
        trace: see `Trace`.
        cost: see `steerfm.cost.Cost`.
        strength: (n,) of the tilt.
        flow_map: the model, which decodes the samples; None where a file does not say how (see `load`).
        micro_batch: samples that are decoded at a time, unless a method says otherwise; None for all.
    """

    cost: Cost
    strength: Tensor
    flow_map: FlowMap | None
    micro_batch: int | None = None

    # --- pictures ------------------------------------------------------------------------------------------------
    def images(self, batch_size: int | None = None) -> Tensor:
        """(n, k, c, h, w) pictures in [0, 1], or (n, k, c, f, h, w) videos (vectors stay as they are).

        Args:
            batch_size: samples that are decoded at a time, for memory; default as in the run.

        Raises:
            ValueError: the result was loaded without the model that knows how to decode its samples.
        """
        n, k = self.samples.shape[:2]
        return self._decode(self.samples.flatten(0, 1), batch_size).unflatten(0, (n, k))

    def best(self) -> Tensor:
        """(n, *shape): the particle of highest reward of each output, of the lowest where ``strength`` is negative.

        This is a search, not a sample of the target.
        """
        return self.samples[torch.arange(len(self), device=self.samples.device), self.best_index()]

    def best_index(self) -> Tensor:
        """(n,): which particle of each output `best` takes."""
        return self._wanted().argmax(1)

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
        """What the strength did to the particles, and whether their weights are to be trusted."""
        return Diagnosis.of(self)

    def pil(self) -> list[Image]:
        """The best of each output as a PIL picture, n of them, in the size of the model.

        Raises:
            ValueError: the samples are no pictures; see `images`.
        """
        from PIL import Image

        from steerfm.report.pictures import levels

        pictures = levels(self._pictures(self.best()))
        return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pictures]

    def grid(self, path: str | Path, particles: int = 1, columns: int = 8) -> Path:
        """Draw the pictures with their rewards, of the first 64 outputs; ``result[64:]`` has the next.

        Args:
            path: of the png.
            particles: 1 for the best of each output, side by side; more for a row an output, the best first.
            columns: pictures a row, where ``particles`` is 1.

        Raises:
            ValueError: no such number of particles; the samples are no pictures; see `images`.
        """
        from steerfm.report.pictures import picture_grid

        k = self.rewards.shape[1]
        if not 1 <= particles <= k:
            raise ValueError(f"particles={particles}: there are {k} of each output")
        if columns < 1:
            raise ValueError(f"columns={columns}: at least one picture a row")
        some = self[:SHOWN] if len(self) > SHOWN else self
        order = some._wanted().argsort(dim=1, descending=True, stable=True)[:, :particles]
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
        """Draw how the run went: value, effective sample size and guidance over time, final rewards, look-ahead pictures.

        Args:
            path: of the png.
            method: whose colour the lines have.
            names: what each output was asked for; outputs that were asked for different things are drawn apart.
            rewards: (m, k) final rewards of these outputs and of further ones, which ``names`` then names, too.
        """
        from steerfm.report.trace import trace_plot

        steps = vars(self.trace) | {"rewards": self.rewards if rewards is None else rewards}
        looks = steps.pop("lookaheads")
        if looks is not None and self.flow_map is not None and len(self.flow_map.shape) == 3:
            steps["lookaheads"] = self._decode(looks.flatten(0, 1)).unflatten(0, looks.shape[:2])
        return trace_plot(steps, path, method, names)

    def report(self, folder: str | Path, title: str = "Steered samples", method: str = "value") -> Path:
        """Save into a folder, and leave a page to look at there: ``report.html``, beside ``grid.png`` and ``trace.png``.

        Args:
            folder: made if missing.
            title: of the page.
            method: whose colour the lines of the plot have, such as "funnel".

        Returns:
            The path of the page.
        """
        from steerfm.report.page import report

        folder, pictures = Path(folder), []
        self.save(folder)
        if self.flow_map is not None and self.samples.ndim == 5:
            columns = 4  # can be read on a phone
            pictures.append(("the best particle of each output", self.grid(folder / "grid.png", columns=columns)))
        pictures.append((OVER_TIME, self.plot(folder / "trace.png", method)))
        return report(folder, title, self._summary(), pictures=pictures)

    # --- files ---------------------------------------------------------------------------------------------------
    def save(self, path: str | Path, **more: Tensor) -> Path:
        """Write everything but the model, whole or not at all.

        Args:
            path: a file, ``x.safetensors``, or a folder, which then holds ``samples.safetensors``.
            more: further tensors (n, ...) to keep beside, which `load` leaves alone.

        Returns:
            The path of the file.

        Raises:
            ValueError: a name that is taken, or another number of rows. OSError: no room.
        """
        own = self._rows()
        if wrong := [name for name, value in more.items() if name in own or len(value) != len(self)]:
            raise ValueError(f"{wrong[0]} cannot be kept beside: give another name, and {len(self)} rows, one per output")
        # clone: safetensors refuses tensors that share memory, such as views of one batch
        rows = {name: value.detach().cpu().contiguous().clone() for name, value in (own | more).items()}
        return files.write_tensors(_file(path), rows, facts(self.cost, self.flow_map))

    @classmethod
    def load(cls, path: str | Path, flow_map: FlowMap | None = None) -> SteeringResult:
        """Read what `save`, or `steerfm steer`, wrote.

        Args:
            path: the file, or its folder.
            flow_map: the model; only one that decodes in its own way, as latent models do, is missed by `images`.

        Raises:
            FileNotFoundError: there is none. ValueError: the file is torn, no such result, or of another shape than the model.
        """
        file = _file(path)
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
        try:
            with safe_open(file, "pt") as tensors:
                facts = tensors.metadata() or {}
                rows = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is torn or no safetensors file ({error})") from None
        try:
            if facts["kind"] != KIND:
                raise KeyError(facts["kind"])
            cost = Cost(**json.loads(facts["cost"]))
            if flow_map is None and facts["decode"] == "plain":
                flow_map = FlowMap(rows["samples"].shape[2:])  # of a map, only what turns samples into pictures
            n, k = rows["samples"].shape[:2]
            if any(len(value) != n for value in rows.values()) or rows["rewards"].shape != (n, k):
                raise ValueError("rows")
            made = cls._of(rows, cost, flow_map)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ValueError(f"{file} holds no steering result: give a file that SteeringResult.save wrote") from None
        if flow_map is None:
            return made
        if tuple(flow_map.shape) != tuple(made.samples.shape[2:]):
            raise ValueError(f"{file} holds samples of {tuple(made.samples.shape[2:])}, flow_map makes {tuple(flow_map.shape)}")
        return made.to(flow_map.device)

    @classmethod
    def cat(cls, results: Sequence[SteeringResult]) -> SteeringResult:
        """Results of the same method on further outputs as one; costs add up, traces are put on the times of all of them. What
        one of them lacks, such as look-ahead pictures, the whole lacks.

        Raises:
            ValueError: none are given; they differ in particles, shape or terms of the reward.
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
        rows = {name: _joined([part[name] for part in parts]) for name in parts[0] if all(name in part for part in parts)}
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
            raise TypeError(f"result[{', '.join(map(str, index))}]: give one index of outputs; particles: result.samples[...]")
        if not isinstance(index, slice):  # on the CPU, from where it indexes tensors of any device
            index = torch.as_tensor(index, device="cpu").reshape(-1)
        picked = torch.arange(len(self))[index]
        if not len(picked):
            raise IndexError(f"no outputs left: there are {len(self)}")
        rows = {name: value[picked.to(value.device)] for name, value in self._rows().items()}
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
        told = {
            "outputs": f"{n} of {k} particles, each {tuple(shape)} {str(self.samples.dtype).removeprefix('torch.')}",
            "reward": f"mean {self.rewards.mean():.4g}, best {best.mean():.4g} (of each output, mean over outputs)",
        }
        if len(self.components) > 1:
            terms = [f"{name} {value.float().mean():.4g}" for name, value in self.components.items()]
            more = f" and {len(terms) - 6} more" if len(terms) > 6 else ""
            told["terms"] = f"mean {', '.join(terms[:6])}{more}"
        told["strength"] = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
        told |= self.diagnosis.in_words()
        if self.log_z is not None:
            told["log Z"] = f"{self.log_z.mean():.4g} (mean over outputs)"
        return told | {"steps": str(len(self.trace.t)), "cost": str(self.cost)}

    # --- pieces --------------------------------------------------------------------------------------------------
    def _wanted(self) -> Tensor:
        """(n, k) higher is better, also where the tilt is downwards."""
        return torch.where(self.strength.unsqueeze(1) < 0, -self.rewards, self.rewards)

    def _decode(self, z: Tensor, batch_size: int | None = None) -> Tensor:
        if self.flow_map is None:
            raise ValueError("this result does not know how its model decodes: SteeringResult.load(path, flow_map=...)")
        rows = self.micro_batch if batch_size is None else batch_size
        at_least_one(batch_size=1 if rows is None else rows)
        return in_parts(self.flow_map.decode, z, rows)

    def _pictures(self, z: Tensor) -> Tensor:
        pictures = self._decode(z)
        if pictures.ndim != 4:
            raise ValueError(f"each sample is {tuple(pictures.shape[1:])}, not a picture (c, h, w): nothing to draw")
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
        """The inverse of `_rows`; rows of other names are left alone."""

        def named(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in rows.items() if name.startswith(prefix)}

        steps = {name: value[0] if name == "t" else value.transpose(0, 1) for name, value in named("trace.").items()}
        return cls(
            samples=rows["samples"],
            rewards=rows["rewards"],
            components=named("component."),
            log_weights=rows["log_weights"],
            log_z=rows.get("log_z"),
            trace=Trace(**steps),
            cost=cost,
            micro_batch=micro_batch,
            strength=rows["strength"],
            flow_map=flow_map,
        )


def facts(cost: Cost, flow_map: FlowMap | None) -> dict[str, str]:
    """What the file of a result says beside its tensors: the cost, and whether pictures are samples in [-1, 1]."""
    while isinstance(flow_map, Wrapped):
        flow_map = flow_map.flow_map
    plain = flow_map is not None and type(flow_map).decode is FlowMap.decode
    return {"kind": KIND, "cost": json.dumps(cost.as_dict()), "decode": "plain" if plain else "own"}


def _first(value: Tensor, n: int) -> Tensor:
    """A tensor (steps, n, ...) of a trace, or (steps,), as (n, steps, ...)."""
    return value.expand(n, -1) if value.ndim == 1 else value.transpose(0, 1)


def _at_one_grid(parts: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
    """The same rows, their traces at the times of all of them; `Trace` says what stands where there was no step."""
    own = [part["trace.t"][0].tolist() for part in parts]
    if all(times == own[0] for times in own) or any(times != sorted(times) for times in own):
        return parts
    grids = [[(time, times[:step].count(time)) for step, time in enumerate(times)] for times in own]  # a time may come twice
    whole = sorted({mark for grid in grids for mark in grid})
    times = torch.tensor([time for time, _ in whole], dtype=parts[0]["trace.t"].dtype)
    out = []
    for part, grid in zip(parts, grids):
        there = torch.tensor([mark in grid for mark in whole])
        rows = {
            name: _spread(name, value, there) if name.startswith("trace.") and value.shape[1] == len(grid) else value
            for name, value in part.items()
        }
        out.append(rows | {"trace.t": times.to(part["trace.t"].device).expand(len(part["trace.t"]), -1)})
    return out


def _spread(name: str, value: Tensor, there: Tensor) -> Tensor:
    """Records (n, steps, ...) as those of more steps, of which these are the ones that are ``there``."""
    there = there.to(value.device)
    if name == "trace.lookaheads":
        return value[:, (there.cumsum(0) - 1).clamp_min(0)]
    fill = torch.tensor(False if value.dtype == torch.bool else float("nan"))
    if name == "trace.ancestors":
        fill = torch.arange(value.shape[-1])
    out = fill.to(value).expand(len(value), len(there), *value.shape[2:]).clone()
    out[:, there] = value
    return out


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, out of inference mode, so that autograd takes them."""
    if len(parts) > 1:
        return torch.cat(list(parts))
    return parts[0].clone() if parts[0].is_inference() else parts[0]


def _file(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / FILE
