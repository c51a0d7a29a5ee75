"""The parts of benchmarks/gpu.sh and benchmarks/gpu_pack.sh, each by itself.

python benchmarks/gpu.py pack FOLDER                   # data, small; --fashion 12000 --no-tones for less
python benchmarks/gpu.py unpack FOLDER ROOT            # as the loaders read them
python benchmarks/gpu.py profile FILE                  # JSON: where the time of steering goes
python benchmarks/gpu.py train RECIPE RUNS SECONDS     # fashion, emoji or emoji64
python benchmarks/gpu.py collect RUNS OUT              # weights, figures and numbers: few files, each of at most 16 MiB
"""

from __future__ import annotations

import argparse
import gzip
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what comes home is copied without torch
    from torch import Tensor

LIMIT = 16 * 2**20
SHEET, COLUMNS = 4096, 64
"""Pictures of a sheet, and how many of them side by side."""
RECIPES: dict[str, list[str]] = {
    "fashion": ["--config", "fashion", "init=fashion", "objective.teacher=fashion", "data.batch_size=512", "optimizer.lr=1e-3"],
    "emoji": ["--config", "emoji", "init=emoji", "data.batch_size=512", "optimizer.lr=7e-4"],
    "emoji64": ["--config", "emoji", "name=emoji64", "init=emoji", "data.size=64", "data.batch_size=256", "optimizer.lr=5e-4"],
}
"""Trainings that go on from the shipped weights, in large batches."""
TINY = ["data.batch_size=4", "trainer.accelerator=cpu"]
FAST = ["trainer.precision=bf16-mixed"]
SAVED = 0.8
"""Share of the time that is left which the updates are to take: the rest is for a machine that slows down."""


# --- data, packed and unpacked -----------------------------------------------------------------------------------------
def pack(folder: Path, fashion: int | None, tones: bool) -> None:
    """Write Fashion-MNIST and the emoji of 64 px as sheets of lossless WebP, with what is said of them as JSON.

    Args:
        fashion: number of training pictures, the first ones; None for all.
        tones: whether emoji come in all skin tones, or in the plain one.
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
    """Write what `pack` read into ``root``, where the loaders look; emoji of 32 px are means of four pixels."""
    import torch

    from steerfm.files import write_tensors

    raw, emoji = root / "FashionMNIST" / "raw", root / "emoji"
    for path in (raw, emoji):
        path.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x, told = _read_sheets(folder, f"fashion-{split}")
        _write_idx(raw / f"{prefix}-images-idx3-ubyte.gz", x.squeeze(1))
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte.gz", torch.tensor(told["labels"], dtype=torch.uint8))
    x, told = _read_sheets(folder, "emoji")
    columns = {name: torch.tensor(value, dtype=torch.int16) for name, value in told["columns"].items()}
    half = torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8)
    for size, pictures in ((64, x), (32, half)):
        write_tensors(emoji / f"emoji-{size}.safetensors", columns | {"pictures": pictures}, {"words": told["words"]})


def _write_sheets(folder: Path, name: str, x: Tensor, told: dict[str, Any]) -> None:
    """Pictures (n, c, h, w) uint8 as files NAME-0.webp, NAME-1.webp, ... and NAME.json."""
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
    (folder / f"{name}.json").write_text(json.dumps({"shape": [n, c, h, w], **told}))


def _read_sheets(folder: Path, name: str) -> tuple[Tensor, dict[str, Any]]:
    """What `_write_sheets` wrote."""
    import numpy as np
    import torch
    from PIL import Image

    told = json.loads((folder / f"{name}.json").read_text())
    n, c, h, w = told.pop("shape")
    parts = []
    for number in range(-(-n // SHEET)):
        sheet = torch.from_numpy(np.array(Image.open(folder / f"{name}-{number}.webp").convert("RGB")))[..., :c]
        parts.append(sheet.view(-1, h, COLUMNS, w, c).permute(0, 2, 4, 1, 3).reshape(-1, c, h, w))
    return torch.cat([part[:SHEET] for part in parts])[:n].contiguous(), told


def _write_idx(path: Path, x: Tensor) -> None:
    head = bytes([0, 0, 8, x.ndim]) + b"".join(size.to_bytes(4, "big") for size in x.shape)
    path.write_bytes(gzip.compress(head + x.numpy().tobytes(), 1))


def metadata(site: Path) -> None:
    """Write into ``site`` what an installation of this checkout would say of its rewards and models: nothing is built."""
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
    """Wall time, time in kernels, and in those of the network's forward pass, for steering with and without a gradient: by the
    network as it is, compiled, and compiled into CUDA graphs. Written after each case."""
    import torch

    import steerfm

    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    known = json.loads(file.read_text()) if file.is_file() else {}
    maps = {"fashion": {"name": "classifier", "target": "Bag"}, "emoji": {"name": "clip", "prompt": "a red heart"}}
    asked: dict[str, Any] = {"fashion": {"label": "Bag"}, "emoji": {"cond": "a red heart"}}
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
                if key in known:
                    continue
                try:
                    flow_map = change(steerfm.load(name, device))
                    made = steerfm.reward(**{"spec": reward["name"]} | {k: v for k, v in reward.items() if k != "name"}).to(
                        device
                    )
                    known[key] = _profiled(lambda: steerfm.steer(flow_map, made, method, n=1, **asked[name]), flow_map, device)  # noqa: B023
                except Exception as error:
                    known[key] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                print(f"{key}: {json.dumps(known[key])}", flush=True)
                file.write_text(json.dumps(known, indent=1))


def _profiled(run: Callable[[], Any], flow_map: Any, device: str) -> dict[str, float]:
    """Seconds of a run, the fastest of three after a warm-up, and shares of it from one under the profiler."""
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
    entered: list[Any] = []

    def enter(*_: Any) -> None:
        entered.append(record_function("network"))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with ExitStack() as hooks:
        for handle in (flow_map.network.register_forward_pre_hook(enter), flow_map.network.register_forward_hook(leave)):
            hooks.callback(handle.remove)
        with profiler(activities=activities) as seen:
            under = seconds()
    events, on = seen.key_averages(), "device" if device == "cuda" else "cpu"

    def spent(what: str, chosen: Callable[[Any], bool]) -> float:
        return sum(getattr(event, what) for event in events if chosen(event)) / 1e6

    # the device lists an annotated range once more, as one of its own that is no kernel
    kernels = spent(f"self_{on}_time_total", lambda event: event.key != "network")
    network = spent(f"{on}_time_total", lambda event: event.key == "network" and (on == "cpu" or not _on_device(event)))
    backward = spent(f"{on}_time_total", lambda event: event.key.startswith("autograd::engine::evaluate_function"))
    found = {"first": first, "wall": wall, "under the profiler": under, "kernels": kernels, "forward of the network": network}
    shares = {"kernels of wall": kernels / wall, "forward of kernels": network / kernels if kernels else 0.0}
    return {key: round(value, 5) for key, value in {**found, "backward": backward, **shares}.items()}


def _on_device(event: Any) -> bool:
    return str(getattr(event, "device_type", "")).endswith("CUDA")


# --- training --------------------------------------------------------------------------------------------------------
def train(recipe: str, runs: Path, seconds: float, tiny: bool) -> None:
    """Train as the recipe says for about so many seconds; the same call continues what was cut off.

    How many updates that makes is noted, since the learning rate falls by it.
    """
    noted = runs / f"{recipe}.json"
    if not noted.is_file():
        runs.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps({"steps": 2} if tiny else planned(recipe, runs, seconds)))
        print(f"{recipe}: {noted.read_text()}", flush=True)
    told = json.loads(noted.read_text())
    spent = _train(recipe, runs / recipe, told["steps"], tiny, [f"trainer.sample_every={max(1, told['steps'] // 3)}"])
    noted.write_text(json.dumps(told | {"seconds of the last start": spent}))


def planned(recipe: str, runs: Path, seconds: float, some: tuple[int, int] = (20, 120)) -> dict[str, float]:
    """How many updates so many seconds are, by two short trainings that count to them, after one that warms up; and what an
    update costs, and the beginning and the end together."""
    begin, spent = time.monotonic(), []
    for number, steps in enumerate((some[0], *some)):
        spent.append(
            _train(recipe, runs / "rate" / f"{recipe}-{number}", steps, False, ["trainer.sample_every=0", "force=true"])
        )
    each = max(1e-3, (spent[2] - spent[1]) / (some[1] - some[0]))
    ends = max(0.0, spent[2] - some[1] * each)
    left = seconds - (time.monotonic() - begin) - ends
    return {"steps": max(some[0], int(SAVED * left / each)), "seconds an update": each, "seconds of beginning and end": ends}


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


# --- what comes home -------------------------------------------------------------------------------------------------
def collect(runs: Path, out: Path) -> None:
    """Copy what there is: numbers, weights, figures; of a training that was cut off its newest checkpoint, in parts."""
    out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    for path in sorted(runs.glob("*.json")):
        try:
            numbers[path.stem] = json.loads(path.read_text())
        except (OSError, ValueError) as error:  # of a phase that was stopped as it wrote
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
        elif kept := sorted((runs / recipe / "checkpoints").glob("*"), key=lambda path: path.stat().st_mtime):
            cut(kept[-1], out / f"{recipe}{kept[-1].suffix}")


def small(path: Path, out: Path, limit: int = LIMIT) -> None:
    """Copy a file of weights; in half precision where it is too large, and then in parts where it still is."""
    if path.stat().st_size <= limit:
        (out / path.name).write_bytes(path.read_bytes())
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as tensors:
        said, values = tensors.metadata(), {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    half = out / f"{path.stem}-half.safetensors"
    save_file({key: value.half() if value.is_floating_point() else value for key, value in values.items()}, half, said)
    if half.stat().st_size > limit:
        cut(half, half, limit)


def cut(path: Path, to: Path, limit: int = LIMIT) -> None:
    """Copy a file in parts FILE.00, FILE.01, ...: ``cat FILE.*`` is the whole."""
    data = path.read_bytes()
    if path == to:
        path.unlink()
    for number, begin in enumerate(range(0, len(data), limit)):
        to.with_name(f"{to.name}.{number:02d}").write_bytes(data[begin : begin + limit])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few rows on the CPU, to try the script itself")
    parts = parser.add_subparsers(dest="part", required=True)
    some = parts.add_parser("pack")
    some.add_argument("folder", type=Path)
    some.add_argument("--fashion", type=int, help="only so many training pictures")
    some.add_argument("--no-tones", action="store_true", help="emoji without their skin tones")
    for name, words in {
        "unpack": ("folder", "root"), "metadata": ("site",), "profile": ("file",), "train": ("recipe", "runs", "seconds"),
        "collect": ("runs", "out"),
    }.items():  # fmt: skip
        each = parts.add_parser(name)
        for word in words:
            each.add_argument(word, type={"recipe": str, "seconds": float}.get(word, Path))
    told = parser.parse_args(argv)
    if told.part == "pack":
        pack(told.folder, told.fashion, not told.no_tones)
    elif told.part == "unpack":
        unpack(told.folder, told.root)
    elif told.part == "metadata":
        metadata(told.site)
    elif told.part == "profile":
        profile(told.file, told.tiny)
    elif told.part == "train":
        if told.recipe not in RECIPES:
            parser.error(f"no recipe {told.recipe!r}: {', '.join(RECIPES)}")
        train(told.recipe, told.runs, told.seconds, told.tiny)
    else:
        collect(told.runs, told.out)


if __name__ == "__main__":
    main()
