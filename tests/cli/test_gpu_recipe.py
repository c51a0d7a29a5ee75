"""The recipe of a machine with a GPU and no network, tried on the CPU with a few pictures."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from steerfm_zoo.emoji import pictures
from steerfm_zoo.emoji.data import EmojiData
from steerfm_zoo.fashion.data import fashion_mnist
from torch import Tensor

from steerfm import shipped

BENCHMARKS = Path(shipped.folder("benchmarks"))
GPU = runpy.run_path(str(BENCHMARKS / "gpu.py"))
CONCEPTS = 230


def pixels(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures of each data set, as gpu_pack.sh writes them."""
    folder = tmp_path_factory.mktemp("pack") / "data"
    for split, n in (("train", 70), ("test", 20)):
        GPU["_write_sheets"](folder, f"fashion-{split}", pixels(n, 1, 28, 28, seed=n), {"labels": [i % 10 for i in range(n)]})
    words = {
        "names": [f"thing {i}" for i in range(CONCEPTS)],
        "keywords": [["small"]] * CONCEPTS,
        "code_points": [f"{i:x}" for i in range(CONCEPTS)],
    }
    columns = {"concept": [i // 2 for i in range(2 * CONCEPTS)], "style": [0] * 2 * CONCEPTS, "tone": [0, 1] * CONCEPTS}
    told = {"columns": columns, "words": json.dumps(words)}
    GPU["_write_sheets"](folder, "emoji", pixels(2 * CONCEPTS, 3, 64, 64), told)
    return folder


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 5, 8)])
@pytest.mark.parametrize("n", [1, 64, 65, 5000])
def test_sheets_hold_the_same_bits(n: int, shape: tuple[int, ...], tmp_path: Path):
    x = pixels(min(n, 200 if shape[-1] == 64 else n), *shape)
    GPU["_write_sheets"](tmp_path, "some", x, {"words": "x"})
    back, told = GPU["_read_sheets"](tmp_path, "some")
    assert torch.equal(back, x) and told == {"words": "x"}


def test_the_loaders_read_what_was_packed_and_it_packs_to_the_same_again(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    GPU["unpack"](packed, tmp_path / "data")
    monkeypatch.setenv("STEERFM_DATA", str(tmp_path / "data"))
    x, labels = fashion_mnist("train")
    assert torch.equal(x, pixels(70, 1, 28, 28, seed=70)) and labels.tolist() == [i % 10 for i in range(70)]
    large, small = pictures.load(size=64), pictures.load(size=32)
    assert torch.equal(large.pictures, pixels(2 * CONCEPTS, 3, 64, 64)) and large.caption(3) == "thing 1, light skin tone"
    means = large.pictures.float().unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    assert (small.pictures.float() - means).abs().max() <= 0.5 and torch.equal(small.concept, large.concept)
    data = EmojiData(batch_size=4, size=64)
    data.setup()
    assert data.shape == (3, 64, 64) and data.batch(0)[0].shape == (4, 3, 64, 64)
    GPU["pack"](tmp_path / "again", None, True)
    for file in packed.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    GPU["pack"](tmp_path / "less", 30, False)
    assert json.loads((tmp_path / "less" / "fashion-train.json").read_text())["shape"][0] == 30
    assert json.loads((tmp_path / "less" / "emoji.json").read_text())["shape"][0] == CONCEPTS


def test_emoji_of_a_size_that_is_not_there(tmp_path: Path):
    for size, command in ((32, "'steerfm data emoji'"), (64, "'steerfm data emoji --size 64'")):
        with pytest.raises(FileNotFoundError, match=rf"no emoji pictures of {size} px in .+{command}"):
            EmojiData(root=str(tmp_path), size=size).setup()
    for wrong in ([64, 32], 0):
        with pytest.raises(ValueError, match="emoji are square"):
            EmojiData(size=wrong)  # type: ignore[arg-type]


def test_what_comes_home_is_small(tmp_path: Path):
    weights = {"a": torch.randn(3000), "n": torch.arange(5)}
    save_file(weights, tmp_path / "map.safetensors")
    for limit, names in ((20_000, {"map.safetensors"}), (8000, {"map-half.safetensors"})):
        out = tmp_path / f"{limit}"
        out.mkdir()
        GPU["small"](tmp_path / "map.safetensors", out, limit)
        assert {path.name for path in out.iterdir()} == names
        back = load_file(next(out.iterdir()))
        assert torch.equal(back["n"], weights["n"])
        torch.testing.assert_close(back["a"].float(), weights["a"], rtol=1e-3, atol=1e-3)
    out = tmp_path / "parts"
    out.mkdir()
    GPU["small"](tmp_path / "map.safetensors", out, 1000)
    parts = sorted(out.iterdir())
    assert len(parts) > 6 and all(path.stat().st_size <= 1000 for path in parts)
    (tmp_path / "whole.safetensors").write_bytes(b"".join(path.read_bytes() for path in parts))
    assert torch.equal(load_file(tmp_path / "whole.safetensors")["a"], weights["a"].half())


def run(packed: Path, tmp_path: Path, split: str, minutes: str = "9", **more: str) -> tuple[str, Path]:
    for stale in (tmp_path / "out").glob("*"):
        stale.unlink()
    given = {"TINY": "1", "PACK": str(packed.parent), "WORK": str(tmp_path / "work"), "PYTHON": sys.executable, **more}
    out = tmp_path / "out"
    told = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), str(out), minutes, split],
        env=os.environ | given, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return told.stdout, out


@pytest.mark.skipif("STEERFM_RECIPE" not in os.environ, reason="half a minute: STEERFM_RECIPE=1 runs it")
@pytest.mark.slow
def test_the_whole_on_the_cpu_goes_on_where_it_was_and_one_failure_leaves_the_rest(packed: Path, tmp_path: Path):
    (tmp_path / "work" / "runs" / "profile.json").mkdir(parents=True)  # nothing can be written there
    shown, out = run(packed, tmp_path, "profile=1 nothing=1 fashion=1")
    assert "profile: code 1" in shown and "no phase nothing" in shown and "fashion: code 0" in shown
    assert shown.splitlines()[-1].endswith("the end")
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert results["phase-profile"]["code"] == 1 and results["phase-fashion"]["code"] == 0 and results["fashion"]["steps"] == 2
    assert load_file(out / "fashion.safetensors") and all(path.stat().st_size <= 2**24 for path in out.iterdir())
    with tarfile.open(out / "runs.tar.gz") as archive:
        assert {"fashion/curves.png", "fashion/fashion.json"} <= set(archive.getnames())
    (tmp_path / "work" / "runs" / "profile.json").rmdir()
    again, out = run(packed, tmp_path, "profile=1 fashion=1")
    assert "profile: code 0" in again and "fashion: done before" in again and (out / "fashion.safetensors").is_file()
    (case, *_) = json.loads((out / "results.json").read_text())["profile"].values()
    assert 0 < case["forward of kernels"] <= 1 and case["wall"] > 0
    assert (out / "log.txt").read_text() == shown + again


@pytest.mark.parametrize(("each", "ends"), [(0.05, 4.0), (0.5, 0.0), (0.0, 3.0)])
def test_as_many_updates_are_planned_as_there_is_time_for(each: float, ends: float, tmp_path: Path, monkeypatch: Any):
    now, steps = [0.0], []

    def takes(recipe: str, out: Path, number: int, tiny: bool, more: Any) -> float:
        spent = ends + each * number + (0 if steps else 9)  # the first one warms up
        steps.append(number)
        now[0] += spent
        return spent

    planned = GPU["plan_updates"]
    monkeypatch.setitem(planned.__globals__, "_train", takes)
    monkeypatch.setattr(planned.__globals__["time"], "monotonic", lambda: now[0])
    told = planned("fashion", tmp_path, 180.0)
    takes("fashion", tmp_path, told["steps"], False, [])
    assert told["seconds an update"] == pytest.approx(max(each, 1e-3))
    assert now[0] < 180 and (now[0] > 120 or each < 1e-3)


def test_where_there_is_no_time_nothing_begins(packed: Path, tmp_path: Path):
    shown, out = run(packed, tmp_path, "profile=1 fashion=1", "0")
    assert shown.count("no time") == 3 and (out / "log.txt").read_text() == shown
