"""The notebooks of docs/tutorials run as they stand, and what they say holds."""

from __future__ import annotations

import ast
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from steerfm import cli

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def command(line: re.Match[str]) -> str:
    """The code of a line for the shell."""
    words = shlex.split(line[1].replace("\\\n", " "))
    assert words[0] == "steerfm"
    return f"assert run({words[1:]}) == 0"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a notebook leaves behind. What a cell shows is drawn as Jupyter draws it."""
    monkeypatch.chdir(folder)
    matplotlib.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"run": cli.main}
    for cell in cells(FOLDER / f"{name}.ipynb"):
        code = ast.parse(re.sub(r"^!((?:.+\\\n)*.+)$", command, "".join(cell["source"]), flags=re.MULTILINE))
        last = code.body.pop() if code.body and isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if hasattr(shown, "_repr_png_"):
                assert shown._repr_png_()[1:4] == b"PNG"
    pyplot.close("all")
    return names


@pytest.mark.slow
def test_steer(tmp_path, monkeypatch):
    left = run("steer", tmp_path, monkeypatch)
    plain, result, most = (left[name].rewards.mean() for name in ("plain", "result", "steered"))
    assert plain < 0 and 2 < result < most
    assert left["page"].is_file() and left["pictures"][0].size == (32, 32)


@pytest.mark.slow
def test_a_reward_is_hacked_and_cured(tmp_path, monkeypatch):
    left = run("reward", tmp_path, monkeypatch)
    stripes, dresses = left["stripes"], left["dresses"]
    assert list(stripes[1:]) == sorted(stripes[1:]) and stripes[-1] > 4 * stripes[0]  # the reward climbs
    assert dresses[2] > 0.7 and dresses[3] < 0.6 and dresses[4] < 0.3  # the judge falls
    assert left["cured_stripes"] > 1.5 * stripes[0] and left["cured_dress"] > 0.9
    assert left["far_dress"] > dresses[3]  # it takes more to break it
    assert left["chosen_dress"] > 0.7 and left["chosen_stripes"] < stripes[2]


@pytest.mark.slow
def test_finetune(tmp_path, monkeypatch):
    left = run("finetune", tmp_path, monkeypatch)
    base, chosen, tuned = (left[name] for name in ("base", "chosen", "tuned"))
    assert base["held_out"] < -2 < chosen["held_out"] < tuned["held_out"]
    assert tuned["diversity"] < base["diversity"]
    shares = list(left["shares"].values())
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] > 0.8


@pytest.mark.slow
@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers: pip install 'steerfm[diffusers]'")
def test_diffusers(tmp_path, monkeypatch):
    left = run("diffusers", tmp_path, monkeypatch)
    assert left["difference"] < 1e-5
    assert (left["result"].rewards.amax(1) > left["plain"].rewards[:, 0]).all()
    assert "lookahead=denoise" in left["refusal"]


@pytest.mark.slow
def test_exact(tmp_path, monkeypatch):
    left = run("exact", tmp_path, monkeypatch)
    errors = left["errors"]
    assert errors[256] < errors[64] < errors[16] and errors[256] < 0.15
    assert left["estimate"] == pytest.approx(float(left["log_z"]), abs=0.1)
    assert left["ess"] < 0.15 and left["right"] > 0.95
    assert left["climbed"].samples.mean() > left["exact_mean"] + 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_name_no_machine(path):
    """So that a reader sees them without running anything; `python docs/notebooks.py` writes them."""
    codes = cells(path)
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    outputs = [(cell, output) for cell in codes for output in cell["outputs"]]
    assert outputs
    for cell, output in outputs:
        text = "".join(output.get("text") or output["data"]["text/plain"])
        assert not re.search(r"Traceback|site-packages|/tmp/|/home/|/root/|\x1b|[\d.]+ s,", text)
        assert "image/png" not in output.get("data", {}) or cell["metadata"]["alt"]
    assert path.stat().st_size < 400_000
    assert any("concepts.md#glossary" in "".join(cell["source"]) for cell in cells(path, "markdown"))
