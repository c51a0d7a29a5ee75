"""`steerfm sample`: unsteered samples, as a grid and as tensors."""

from __future__ import annotations

from steerfm.cli.config import SampleConfig
from steerfm.cli.console import console, progress
from steerfm.cli.outputs import outputs_of
from steerfm.cli.parts import autocast, load_model
from steerfm.cli.runs import grid_rows, run_folder, stem
from steerfm.cli.spread import on_processes, share_weights
from steerfm.cost import Ledger
from steerfm.flowmap import in_parts
from steerfm.processes import first, of_first
from steerfm.report.page import report
from steerfm.report.pictures import picture_grid
from steerfm.sampling import check_fit, grid_of
from steerfm.sampling import sample as draw
from steerfm.transitions import usual

DECODE_BATCH = 64
"""Samples decoded at a time."""


def sample(config: SampleConfig, command: str = "") -> None:
    """Draw unsteered samples, and write them as a grid and as tensors."""
    on_processes(work, config, command)


def work(config: SampleConfig, command: str) -> None:
    """Run the command in one process. All processes sample, and the first one writes."""
    flow_map = load_model(config.model, config.device, config.guidance, config.compile)
    share_weights(flow_map, config.trainer)
    want = outputs_of(flow_map, config.label, config.prompt, config.n, negative=config.negative)
    steps = flow_map.steps if config.steps is None else config.steps
    check_fit(flow_map, usual(flow_map), grid_of(flow_map, steps))
    seeds, precision = want.seeds(config.seeds), autocast(flow_map, config.precision)
    folder = of_first(lambda: run_folder(config, f"runs/sample/{stem(config.model)}"))
    with Ledger() as ledger, progress("sampling", 1) as tick, precision:
        x = draw(flow_map, want.n, steps, seeds, want.cond, batch_size=500)
        if not first():
            return
        pictures = in_parts(flow_map.decode, x, DECODE_BATCH).float().cpu()
        tick(1, 1)
    folder.save_tensors("samples", {"samples": x.float()})
    path, figures = folder.path / "samples.safetensors", []
    if pictures.ndim == 4:  # a map of vectors has no pictures
        path = folder.path / "grid.png"
        rows, captions = grid_rows(pictures, want.names)
        picture_grid(rows, path, captions=captions, title=f"{stem(config.model)}, {steps} steps")
        figures = [("unsteered samples, with their prompt or class below" if any(want.names) else "unsteered samples", path)]
    folder.save_result({"command": command, "cost": ledger.cost.as_dict()})
    report(
        folder,
        f"Samples of {stem(config.model)}",
        {"command": command, "steps": steps, "cost": str(ledger.cost)},
        pictures=figures,
    )
    console.print(f"{want.n} samples, {ledger.cost.forwards} network evaluations, {ledger.cost.seconds:.2f} s: {path}")
