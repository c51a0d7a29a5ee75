"""The steps of benchmarks/gpu.sh and benchmarks/gpu_pack.sh, one command each.

python benchmarks/gpu.py pack FOLDER                   # compress the data; --fashion 12000 --no-tones for less
python benchmarks/gpu.py unpack FOLDER ROOT            # restore the files that the loaders read
python benchmarks/gpu.py profile FILE                  # write where the time of steering goes, as JSON
python benchmarks/gpu.py train RECIPE RUNS SECONDS     # fashion, emoji or emoji64
python benchmarks/gpu.py collect RUNS OUT              # weights, figures and numbers in few files of at most 16 MiB
"""

from __future__ import annotations

import argparse
import gzip
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # collect runs without torch
    from torch import Tensor

LIMIT = 16 * 2**20
SHEET, COLUMNS = 4096, 64
"""Pictures per sheet, and pictures per row of a sheet."""
RECIPES: dict[str, list[str]] = {
    "fashion": [
        *("--config", "fashion-posterior", "name=fashion", "init=fashion", "objective.teacher=fashion"),
        *("data.batch_size=512", "optimizer.lr=1e-3"),
    ],
    "emoji": [
        *("--config", "emoji-posterior", "name=emoji", "objective.teacher=emoji"),
        *("objective.shares={trajectory: 0.5, posterior_trajectory: 0.5}", "data.batch_size=512", "optimizer.lr=7e-4"),
    ],
    "emoji64": ["--config", "emoji", "name=emoji64", "init=emoji", "data.size=64", "data.batch_size=256", "optimizer.lr=5e-4"],
}
"""Trainings that start from the shipped weights, in large batches."""
TINY = ["data.batch_size=4", "trainer.accelerator=cpu"]
FAST = ["trainer.precision=bf16-mixed"]
TIME_SHARE = 0.8
"""Share of the remaining time to plan for updates; the rest is a reserve, in case the machine slows down."""


# --- data, packed and unpacked -----------------------------------------------------------------------------------------
def pack(folder: Path, fashion: int | None, tones: bool) -> None:
    """Write Fashion-MNIST and the emoji of 64 px as sheets of lossless WebP, with labels and captions as JSON.

    Args:
        folder: folder to write.
        fashion: number of training pictures, from the first on; None for all.
        tones: whether to include all skin tones of the emoji, or only those without one.
    """
    import torch
    from safetensors import safe_open
    from steerfm_zoo.emoji import pictures
    from steerfm_zoo.fashion.data import fashion_mnist

    for split in ("train", "test"):
        x, labels = fashion_mnist(split)
        x, labels = (x, labels) if split == "test" or fashion is None else (x[:fashion], labels[:fashion])
        _write_sheets(folder, f"fashion-{split}", x, {"labels": labels.tolist()})
    try:
        emoji = pictures.load(size=64)
    except FileNotFoundError:
        emoji = pictures.prepare(size=64)
    rows = torch.arange(len(emoji.concept)) if tones else (emoji.tone == 0).nonzero().flatten()
    with safe_open(pictures.data_folder() / "emoji-64.safetensors", "pt") as file:
        words = file.metadata()["words"]
    columns = {name: getattr(emoji, name)[rows].tolist() for name in ("concept", "style", "tone")}
    _write_sheets(folder, "emoji", emoji.pictures[rows], {"columns": columns, "words": words})


def unpack(folder: Path, root: Path) -> None:
    """Restore the data of `pack` in ``root``, where the loaders look. Emoji of 32 px are means of four pixels."""
    import torch

    from steerfm.files import write_tensors

    raw, emoji = root / "FashionMNIST" / "raw", root / "emoji"
    for path in (raw, emoji):
        path.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x, facts = _read_sheets(folder, f"fashion-{split}")
        _write_idx(raw / f"{prefix}-images-idx3-ubyte.gz", x.squeeze(1))
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte.gz", torch.tensor(facts["labels"], dtype=torch.uint8))
    x, facts = _read_sheets(folder, "emoji")
    columns = {name: torch.tensor(value, dtype=torch.int16) for name, value in facts["columns"].items()}
    half = torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8)
    for size, pictures in ((64, x), (32, half)):
        write_tensors(emoji / f"emoji-{size}.safetensors", columns | {"pictures": pictures}, {"words": facts["words"]})


def _write_sheets(folder: Path, name: str, x: Tensor, facts: dict[str, Any]) -> None:
    """Write pictures (n, c, h, w) uint8 as NAME-0.webp, NAME-1.webp, ... and NAME.json."""
    import torch
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    n, c, h, w = x.shape
    for number, part in enumerate(x.split(SHEET)):
        rows = -(-len(part) // COLUMNS)
        full = torch.full((rows * COLUMNS, c, h, w), 255, dtype=torch.uint8)
        full[: len(part)] = part
        sheet = full.view(rows, COLUMNS, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, COLUMNS * w, c)
        Image.fromarray(sheet.expand(-1, -1, 3).numpy()).save(folder / f"{name}-{number}.webp", lossless=True, quality=60)
    (folder / f"{name}.json").write_text(json.dumps({"shape": [n, c, h, w], **facts}))


def _read_sheets(folder: Path, name: str) -> tuple[Tensor, dict[str, Any]]:
    """Read the pictures and facts that `_write_sheets` wrote."""
    import numpy as np
    import torch
    from PIL import Image

    facts = json.loads((folder / f"{name}.json").read_text())
    n, c, h, w = facts.pop("shape")
    parts = []
    for number in range(-(-n // SHEET)):
        sheet = torch.from_numpy(np.array(Image.open(folder / f"{name}-{number}.webp").convert("RGB")))[..., :c]
        parts.append(sheet.view(-1, h, COLUMNS, w, c).permute(0, 2, 4, 1, 3).reshape(-1, c, h, w))
    return torch.cat([part[:SHEET] for part in parts])[:n].contiguous(), facts


def _write_idx(path: Path, x: Tensor) -> None:
    head = bytes([0, 0, 8, x.ndim]) + b"".join(size.to_bytes(4, "big") for size in x.shape)
    path.write_bytes(gzip.compress(head + x.numpy().tobytes(), 1))


def metadata(site: Path) -> None:
    """Write the package metadata of this checkout into ``site``, with its entry points, without building anything."""
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    folder = site / "steerfm-0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [line for group, points in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: steerfm\nVersion: 0\n")


# --- where the time goes ---------------------------------------------------------------------------------------------
def profile(file: Path, tiny: bool) -> None:
    """Measure wall time, time in kernels, and time in the kernels of the network's forward pass.

    Cases: steering with and without a gradient; the network as it is, compiled, and compiled into CUDA graphs. The file is
    written after each case.
    """
    import torch

    import steerfm

    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    results = json.loads(file.read_text()) if file.is_file() else {}
    maps = {"fashion": {"name": "classifier", "target": "Bag"}, "emoji": {"name": "clip", "prompt": "a red heart"}}
    conditions: dict[str, Any] = {"fashion": {"label": "Bag"}, "emoji": {"cond": "a red heart"}}
    particles, steps = (2, 2) if tiny else (256, 8)
    methods = {"feynman_kac": steerfm.FeynmanKac(particles, steps), "fmrg_j": steerfm.FMRGJ(particles, steps)}
    modes: dict[str, Callable[[Any], Any]] = {
        "as it is": lambda flow_map: flow_map,
        "compiled": lambda flow_map: flow_map.compiled(),
        "CUDA graphs": lambda flow_map: flow_map.with_network(torch.compile(flow_map.network, mode="reduce-overhead")),
    }
    for mode, change in list(modes.items())[: 1 if device == "cpu" else None]:
        for name, reward in list(maps.items())[: 1 if tiny else None]:
            for method_name, method in methods.items():
                key = f"{name}, {method_name}, {mode}"
                if key in results:
                    continue
                try:
                    flow_map = change(steerfm.load(name, device))
                    arguments = {key: value for key, value in reward.items() if key != "name"}
                    reward_ = steerfm.reward(reward["name"], **arguments).to(device)
                    run = partial(steerfm.steer, flow_map, reward_, method, n=1, **conditions[name])
                    results[key] = _measure_profile(run, flow_map, device)
                except Exception as error:
                    results[key] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                print(f"{key}: {json.dumps(results[key])}", flush=True)
                file.write_text(json.dumps(results, indent=1))


def _measure_profile(run: Callable[[], Any], flow_map: Any, device: str) -> dict[str, float]:
    """Return the seconds of a run, the fastest of three after a warm-up, and the shares of one run under the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    def seconds() -> float:
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    first, wall = seconds(), min(seconds() for _ in range(3))
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function("network"))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with ExitStack() as hooks:
        for handle in (flow_map.network.register_forward_pre_hook(enter), flow_map.network.register_forward_hook(leave)):
            hooks.callback(handle.remove)
        with profiler(activities=activities) as trace:
            under = seconds()
    events, on = trace.key_averages(), "device" if device == "cuda" else "cpu"

    def total(what: str, include: Callable[[Any], bool]) -> float:
        return sum(getattr(event, what) for event in events if include(event)) / 1e6

    # the device lists an annotated range again, as an event that is no kernel
    kernels = total(f"self_{on}_time_total", lambda event: event.key != "network")
    network = total(f"{on}_time_total", lambda event: event.key == "network" and (on == "cpu" or not _on_device(event)))
    backward = total(f"{on}_time_total", lambda event: event.key.startswith("autograd::engine::evaluate_function"))
    times = {"first": first, "wall": wall, "under the profiler": under, "kernels": kernels, "forward of the network": network}
    shares = {"kernels of wall": kernels / wall, "forward of kernels": network / kernels if kernels else 0.0}
    return {key: round(value, 5) for key, value in {**times, "backward": backward, **shares}.items()}


def _on_device(event: Any) -> bool:
    return str(getattr(event, "device_type", "")).endswith("CUDA")


# --- training --------------------------------------------------------------------------------------------------------
def train(recipe: str, runs: Path, seconds: float, tiny: bool) -> None:
    """Train by a recipe for about this many seconds. The same call continues an interrupted training.

    The number of updates is stored, because the learning rate schedule depends on it.
    """
    plan_file = runs / f"{recipe}.json"
    if not plan_file.is_file():
        runs.mkdir(parents=True, exist_ok=True)
        plan_file.write_text(json.dumps({"steps": 2} if tiny else plan_updates(recipe, runs, seconds)))
        print(f"{recipe}: {plan_file.read_text()}", flush=True)
    plan = json.loads(plan_file.read_text())
    seconds_used = _train(recipe, runs / recipe, plan["steps"], tiny, [f"trainer.sample_every={max(1, plan['steps'] // 3)}"])
    plan_file.write_text(json.dumps(plan | {"seconds of the last start": seconds_used}))


def plan_updates(recipe: str, runs: Path, seconds: float, some: tuple[int, int] = (20, 120)) -> dict[str, float]:
    """Estimate the number of updates for a time, from two short trainings after a warm-up, whose time counts too.

    Returns:
        Number of updates, seconds per update, and seconds of start and end together.
    """
    begin, times = time.monotonic(), []
    for number, steps in enumerate((some[0], *some)):
        times.append(
            _train(recipe, runs / "rate" / f"{recipe}-{number}", steps, False, ["trainer.sample_every=0", "force=true"])
        )
    each = max(1e-3, (times[2] - times[1]) / (some[1] - some[0]))
    ends = max(0.0, times[2] - some[1] * each)
    remaining = seconds - (time.monotonic() - begin) - ends
    updates = max(some[0], int(TIME_SHARE * remaining / each))
    return {"steps": updates, "seconds an update": each, "seconds of beginning and end": ends}


def _train(recipe: str, out: Path, steps: int, tiny: bool, more: Sequence[str]) -> float:
    from steerfm import cli

    begin = time.perf_counter()
    often = [
        "trainer.validate_every=1000000",
        f"trainer.save_every={max(1, steps // 4)}",
        f"optimizer.warmup={min(100, steps // 4)}",
    ]
    words = [*RECIPES[recipe], f"out={out}", f"optimizer.steps={steps}", *often, *more, *(TINY if tiny else FAST)]
    if code := cli.main(["train", *words]):
        raise SystemExit(code)
    return time.perf_counter() - begin


# --- results ---------------------------------------------------------------------------------------------------------
def collect(runs: Path, out: Path) -> None:
    """Copy numbers, weights and figures; of an interrupted training, its newest checkpoint, in parts."""
    out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    for path in sorted(runs.glob("*.json")):
        try:
            numbers[path.stem] = json.loads(path.read_text())
        except (OSError, ValueError) as error:  # the phase was stopped while it wrote
            numbers[path.stem] = {"error": str(error)}
    (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    with tarfile.open(out / "runs.tar.gz", "w:gz") as archive:
        size = 0
        for path in sorted(runs.rglob("*")):
            kind = path.suffix in (".png", ".json", ".jsonl", ".yaml") and "rate" not in path.relative_to(runs).parts
            if path.is_file() and kind and size + path.stat().st_size < LIMIT:
                size += path.stat().st_size
                archive.add(path, path.relative_to(runs))
    for recipe in RECIPES:
        weights = sorted((runs / recipe).glob("*.safetensors"))
        if weights:
            for path in weights:
                small(path, out)
        elif checkpoints := sorted((runs / recipe / "checkpoints").glob("*"), key=lambda path: path.stat().st_mtime):
            split_file(checkpoints[-1], out / f"{recipe}{checkpoints[-1].suffix}")


def small(path: Path, out: Path, limit: int = LIMIT) -> None:
    """Copy a file of weights; if it is too large, in half precision; if it still is, in parts."""
    if path.stat().st_size <= limit:
        (out / path.name).write_bytes(path.read_bytes())
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as tensors:
        metadata, values = tensors.metadata(), {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    half = out / f"{path.stem}-half.safetensors"
    save_file({key: value.half() if value.is_floating_point() else value for key, value in values.items()}, half, metadata)
    if half.stat().st_size > limit:
        split_file(half, half, limit)


def split_file(path: Path, to: Path, limit: int = LIMIT) -> None:
    """Copy a file in parts FILE.00, FILE.01, ...; ``cat FILE.*`` joins them."""
    data = path.read_bytes()
    if path == to:
        path.unlink()
    for number, begin in enumerate(range(0, len(data), limit)):
        to.with_name(f"{to.name}.{number:02d}").write_bytes(data[begin : begin + limit])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few rows on the CPU, to test the script itself")
    parts = parser.add_subparsers(dest="part", required=True)
    some = parts.add_parser("pack")
    some.add_argument("folder", type=Path)
    some.add_argument("--fashion", type=int, help="number of training pictures")
    some.add_argument("--no-tones", action="store_true", help="leave out skin tones")
    for name, words in {
        "unpack": ("folder", "root"), "metadata": ("site",), "profile": ("file",), "train": ("recipe", "runs", "seconds"),
        "collect": ("runs", "out"),
    }.items():  # fmt: skip
        each = parts.add_parser(name)
        for word in words:
            each.add_argument(word, type={"recipe": str, "seconds": float}.get(word, Path))
    options = parser.parse_args(argv)
    if options.part == "pack":
        pack(options.folder, options.fashion, not options.no_tones)
    elif options.part == "unpack":
        unpack(options.folder, options.root)
    elif options.part == "metadata":
        metadata(options.site)
    elif options.part == "profile":
        profile(options.file, options.tiny)
    elif options.part == "train":
        if options.recipe not in RECIPES:
            parser.error(f"no recipe {options.recipe!r}: {', '.join(RECIPES)}")
        train(options.recipe, options.runs, options.seconds, options.tiny)
    else:
        collect(options.runs, options.out)


if __name__ == "__main__":
    main()
