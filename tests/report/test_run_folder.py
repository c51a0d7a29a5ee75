"""The folder of a run."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from kinds import sure
from safetensors.torch import load_file

from steerfm import files
from steerfm.cost import Cost
from steerfm.report.run_folder import RunFolder

CONFIG = "model: fashion\nreward:\n  name: classifier\n  target: Bag\nseeds: 0\nout: here\n"


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
    loaded = sure(run.load_result())
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
        return [sure(run.load_part(index))["x"] for index in run.parts()]

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
