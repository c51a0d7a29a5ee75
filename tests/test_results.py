"""Run folders, pictures and pages."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from steerfm import files, results
from steerfm.cost import Cost
from steerfm.results import RunFolder, curves_plot, model_card, picture_grid, report, trace_plot

CONFIG = "model: fashion\nreward:\n  name: classifier\n  target: Bag\nseeds: 0\nout: here\n"


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# --- grids -----------------------------------------------------------------------------------------------------------
def test_grid_pixels_are_exact_squares(tmp_path):
    pictures = torch.rand(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    image = read(picture_grid(pictures, tmp_path / "new" / "grid.png"))
    assert image.shape == (2 * 112 + 6 + 28, 3 * 112 + 2 * 6 + 28, 3)
    cell = image[14 : 14 + 112, 14 : 14 + 112]
    expected = (pictures[0, 0, 0] * 255).round().byte().numpy().repeat(4, 0).repeat(4, 1)
    assert (cell == expected[..., None]).all()


def test_grid_with_all_texts_is_fast_and_leaves_no_style(tmp_path):
    before = dict(matplotlib.rcParams)
    pictures = torch.rand(8, 8, 3, 28, 28)
    captions = [[f"class {i}{j}\n{i / 9:.3f}" for j in range(8)] for i in range(8)]
    labels = ["a method(with=many, long=arguments, one=2)", *["$x_1"] * 7]  # not mathematics
    started = time.process_time()
    path = picture_grid(pictures, tmp_path / "grid.png", labels, captions, "title " * 60)
    assert time.process_time() - started < 3  # about 0.4 s; one axes a picture took many times that
    assert path.stat().st_size < 4e6
    assert dict(matplotlib.rcParams) == before


def test_grid_scales_large_pictures_down_and_clips(tmp_path):
    pictures = torch.full((1, 2, 3, 800, 600), 7.0)
    pictures[0, 1] = float("nan")
    image = read(picture_grid(pictures, tmp_path / "grid.png"))
    assert image.shape[:2] == (448 + 28, 2 * 336 + 6 + 28)
    assert (image[100, 100] == 255).all() and (image[100, 500] == 0).all()


def test_grid_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="pictures must be"):
        picture_grid(torch.rand(2, 1, 8, 8), tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        picture_grid(torch.rand(2, 2, 1, 8, 8), tmp_path / "x.png", row_labels=["a"])
    with pytest.raises(ValueError, match="captions must be 2 rows of 2"):
        picture_grid(torch.rand(2, 2, 1, 8, 8), tmp_path / "x.png", captions=[["a", "b"], ["c"]])


# --- plots -----------------------------------------------------------------------------------------------------------
def trace() -> dict[str, torch.Tensor]:
    value = torch.rand(5, 4, 3)
    value[0], value[1, 0, 0] = float("nan"), -torch.inf
    return {
        "t": torch.linspace(0, 1, 5),
        "value": value,
        "ess": torch.rand(5, 4),
        "resampled": torch.rand(5, 4) < 0.5,
        "guidance_ratio": torch.rand(5, 4, 3),
        "lookaheads": torch.rand(5, 4, 1, 8, 8),
        "rewards": torch.rand(4, 3),
    }


@pytest.mark.parametrize(
    "keys", [(), ("t",), ("rewards",), ("lookaheads",), ("ess", "rewards"), ("t", "resampled"), "all"], ids=str
)
def test_trace_draws_what_is_there(tmp_path, keys):
    full = trace()
    part = full if keys == "all" else {key: full[key] for key in keys}
    assert read(trace_plot(part, tmp_path / "trace.png")).size > 100


def test_trace_skips_guidance_where_there_is_none(tmp_path):
    full = {key: value for key, value in trace().items() if key in ("t", "value")}
    plain = read(trace_plot(full, tmp_path / "a.png"))
    for empty in (torch.zeros(5, 4, 3), torch.full((5, 4, 3), float("nan"))):
        assert (read(trace_plot(full | {"guidance_ratio": empty}, tmp_path / "b.png")) == plain).all()


def test_trace_refuses_another_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"trace\['ess'\] has 4 steps, t has 5"):
        trace_plot(trace() | {"ess": torch.rand(4, 4)}, tmp_path / "trace.png")


def test_curves(tmp_path):
    steps = torch.arange(100)
    columns = {"loss": (steps, torch.exp(-steps / 10)), "bad": (steps, steps * float("nan")), "few": ([1, 2], [3, 4])}
    assert curves_plot(columns, tmp_path / "curves.png").stat().st_size > 1000
    assert np.allclose(results._smooth(np.ones(50)), 1)
    with pytest.raises(ValueError, match="no curves"):
        curves_plot({}, tmp_path / "curves.png")


# --- folders ---------------------------------------------------------------------------------------------------------
def test_folder_continues_the_same_configuration(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG)
    run.log(step=1, reward=torch.tensor(0.5))
    moved = "# a comment\nseeds: 0\nreward: {target: Bag, name: classifier}\nmodel: fashion\nout: elsewhere\n"
    again = RunFolder(tmp_path / "run", moved)
    again.log(step=2, reward=0.25)
    assert again.history() == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}]
    assert (tmp_path / "run" / "config.yaml").read_text() == CONFIG


def test_folder_refuses_another_configuration_and_names_the_difference(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).save_result({})
    with pytest.raises(ValueError) as caught:
        RunFolder(tmp_path / "run", CONFIG.replace("Bag", "Coat") + "n: 4\n")
    message = str(caught.value)
    assert "another configuration (differs in: reward.target, n); choose another out= or delete it" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="holds a run already"):
        RunFolder(tmp_path / "run", CONFIG, resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "file", CONFIG)


def test_a_run_without_a_result_is_in_nobodys_way(tmp_path):
    first = RunFolder(tmp_path / "run", CONFIG, inputs={"reward a.py": "1"})
    first.log(step=1)
    again = RunFolder(tmp_path / "run", CONFIG.replace("Bag", "Coat"), inputs={"reward a.py": "2"})
    assert "Coat" in (tmp_path / "run" / "config.yaml").read_text() and again.history() == []
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("something: else\n")
    with pytest.raises(ValueError, match="another configuration"):
        RunFolder(tmp_path / "theirs", CONFIG)
    assert (tmp_path / "theirs" / "config.yaml").read_text() == "something: else\n"


@pytest.mark.parametrize("save", [lambda run: run.save_result({}), lambda run: run.save_part(0, {"x": torch.ones(1)})])
def test_what_a_run_reads_makes_the_run(tmp_path, save):
    save(RunFolder(tmp_path, CONFIG, inputs={"reward a.py": "1", "prompt b.txt": "1"}))
    RunFolder(tmp_path, CONFIG, inputs={"reward a.py": "1", "prompt b.txt": "1"})
    with pytest.raises(ValueError, match=r"reward a\.py: edited since this run began"):
        RunFolder(tmp_path, CONFIG, inputs={"reward a.py": "2", "prompt b.txt": "1"})


def test_a_line_is_logged_once(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    for value in (1, 2):
        run.log(output=1, value=value, once=("output",))
        run.log(output=2, value=value, once=("output",))
    assert run.history() == [{"output": 1, "value": 2}, {"output": 2, "value": 2}]


def test_an_unfinished_line_is_dropped(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    run.log(step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    run = RunFolder(tmp_path, CONFIG)
    run.log(step=2)
    assert run.history() == [{"step": 1}, {"step": 2}]


def test_result_is_plain_json(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    assert run.load_result() is None
    result = {
        "nan": math.nan, "inf": [torch.inf, -math.inf], "tensor": torch.tensor([1 / 3, math.nan]),
        "np": np.float32(0.1),
        "cost": Cost(forwards=3), "path": tmp_path, "flag": True, "count": torch.tensor(7), 5: None, "array": np.eye(2),
        "half": torch.ones(1, dtype=torch.bfloat16),
    }  # fmt: skip
    run.save_result(result)
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    loaded = run.load_result()
    assert loaded == json.loads(text)
    assert loaded["nan"] is None and loaded["inf"] == [None, None] and loaded["tensor"] == [0.3333333, None]
    assert (loaded["np"], loaded["flag"], loaded["count"], loaded["5"]) == (0.1, True, 7, None)
    assert loaded["cost"]["forwards"] == 3 and loaded["array"] == [[1.0, 0.0], [0.0, 1.0]]
    run.log(loss=math.nan)
    assert run.history()[-1] == {"loss": None}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, CONFIG)
    run.save_result({"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_result({"a": 2})
    assert run.load_result() == {"a": 1}


def test_tensors(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    x = torch.rand(2, 3)
    shared = {"samples": x, "view": x.T, "same": x, "expanded": torch.ones(1).expand(4), "labels": torch.arange(3)}
    run.save_tensors("samples", shared)
    loaded = run.load_tensors("samples")
    assert all(torch.equal(loaded[name], value) for name, value in shared.items())
    assert load_file(tmp_path / "samples.safetensors").keys() == shared.keys()
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        run.load_tensors("missing")
    (tmp_path / "samples.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"samples\.safetensors is corrupt"):
        run.load_tensors("samples")


def test_a_corrupt_part_is_done_again(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    assert run.parts() == [] and run.load_part(0) is None
    done = []

    def work() -> list[torch.Tensor]:
        for index in range(3):
            if run.load_part(index) is None:
                done.append(index)
                run.save_part(index, {"x": torch.full((10,), float(index))})
        return [run.load_part(index)["x"] for index in run.parts()]

    first = work()
    file = tmp_path / "parts" / "part-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    (tmp_path / "parts" / "part-00002.safetensors").write_bytes(b"\xff" * 50)
    assert run.parts() == [0]
    assert all(torch.equal(a, b) for a, b in zip(first, work(), strict=True))
    assert done == [0, 1, 2, 1, 2]
    run.save_part(0, {"x": torch.zeros(1)}, prefix="other")
    assert run.parts() == [0, 1, 2] and run.parts("other") == [0]
    run.clear_parts()
    assert not (tmp_path / "parts").exists() and run.parts() == []
    run.clear_parts()


# --- pages -----------------------------------------------------------------------------------------------------------
class Balanced(HTMLParser):
    """Collects tags and attributes, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_escaped_page(tmp_path):
    evil = "<script>alert('x')</script> & $body"
    run = RunFolder(tmp_path, yaml.safe_dump({"prompt": evil}))
    picture_grid(torch.rand(1, 2, 1, 8, 8), tmp_path / "grid.png")
    tables = [(evil, ["name", evil], [[evil, 0.123456], ["b", 1234567], ["c", math.nan], ["d", Cost(forwards=2)]])]
    facts = {"command": evil, evil: evil, "mean reward": torch.tensor(1 / 3), "many": [1, 2.5]}
    path = report(run, evil, facts, tables, [(evil, "grid.png"), ("by its whole path", tmp_path / "grid.png")])
    text = path.read_text()
    page = Balanced()
    page.feed(text)
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert "script" not in tags and "link" not in tags and tags.count("img") == 2
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.found if tag == "img")
    assert "http" not in text and "prefers-color-scheme: dark" in text
    assert all(piece in text for piece in ("0.3333", "0.1235", "1,234,567", "1, 2.5", "Configuration"))
    with pytest.raises(FileNotFoundError):
        report(run, "title", {}, pictures=[("missing", "missing.png")])


def test_model_card(tmp_path):
    card = {
        "description": "A flow map.",
        "data": "Fashion-MNIST",
        "licence": "MIT (Zalando SE)",
        "recipe": {"steps": 40000, "ema": 0.999},
        "command": "steerfm train --config fashion",
        "metrics": {"Fréchet distance, 4 jumps": 3.14159, "a|b": "x|y"},
        "parameters": 1234567,
    }
    text = model_card("fashion", card)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "steerfm"
    pieces = "# fashion", "```bash\nsteerfm train", "| Fréchet distance, 4 jumps | 3.142 |", "x\\|y", "1,234,567"
    assert all(piece in text for piece in pieces)
    assert text.index("## Data") < text.index("## Licence") < text.index("## Metrics") < text.index("## Parameters")
    assert yaml.safe_load(model_card("x", {"licence": "house rules"}).split("---")[1])["license"] == "other"
    assert "a\\|b" in text


def test_cost_plot_draws_every_method_and_names_the_best(tmp_path):
    lines = {f"m{i}": [(8, i + 1.0, 0.1), (64, i + 0.5, 0.1)] for i in range(9)} | {"best_of_n": [(8, 20.0, 0.0)], "none": []}
    path = results.cost_plot(lines, tmp_path / "cost.png", "a target", "error", lower_is_better=True)
    assert Image.open(path).size == (840, 540)
    with pytest.raises(ValueError, match="no lines"):
        results.cost_plot({"none": []}, tmp_path / "x.png", "a target", "error")


def test_parts_are_merged_without_holding_them_all(tmp_path):
    """The file is that of all parts joined, and memory holds one part at a time."""
    run = RunFolder(tmp_path, "n: 1\n")
    kinds = {"x": torch.float32, "half": torch.bfloat16, "count": torch.int64, "yes": torch.bool}
    parts = [{name: torch.randint(0, 2, (rows, 3)).to(dtype) for name, dtype in kinds.items()} for rows in (2, 1, 4)]
    for index, part in enumerate(parts):
        run.save_part(index, part | {"left out": torch.zeros(5)})
    run.merge_parts("all", list(kinds))
    merged = run.load_tensors("all")
    assert set(merged) == set(kinds)
    for name, value in merged.items():
        assert value.dtype == kinds[name] and value.equal(torch.cat([part[name] for part in parts]))
    run.clear_parts()
    for index in range(24):
        run.save_part(index, {"x": torch.full((1, 2**20), float(index))})
    tracemalloc.start()
    run.merge_parts("large", ["x"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.load_tensors("large")["x"][:, 0].tolist() == list(range(24))
    assert peak < 20e6  # of 100 MB
