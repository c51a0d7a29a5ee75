"""The command line as a person uses it: every kind of bad input is one line that names the fix; killed runs continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from steerfm import cli, zoo

FAST = ["n=2", "method.particles=2", "method.steps=2", "judge=null"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def write_reward(tmp_path, body: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(f"import torch\n\ndef mine(images):\n    {body}\n")
    return f"reward={path}:mine"


@pytest.mark.parametrize(
    "argv, fix",
    [
        (["steer", "strenght=3"], "did you mean 'strength'"),
        (["steer", "method.partcles=4"], "did you mean 'particles'"),
        (["steer", "reward=clasifier"], "did you mean 'classifier'"),
        (["steer", "reward.target=Bagg"], "classes: 0 T-shirt"),
        (["steer", "reward=brightness", "reward.targt=1"], "has no argument 'targt'"),
        (["steer", "reward=brightness", "method=feynman_cac"], "did you mean 'feynman_kac'"),
        (["steer", "reward=brightness", "model=fasion"], "did you mean 'fashion'"),
        (["steer", "reward=brightness", "label=Hat"], "classes: 0 T-shirt"),
        (["steer", "reward=brightness", "strength=nan"], "must be finite"),
        (["steer", "reward=brightness", "method.particles=0"], "at least one particle"),
        (["steer", "reward=brightness", "method.steps=0"], "at least one step"),
        (["steer", "reward=brightness", "n=0"], "at least one output"),
        (["steer", "reward=compressibility", "method=fmrg_j"], "black box"),
        (["steer", "reward=brightness", "precision=int3"], "precisions: 32, bf16"),
        (["steer", "reward=brightness", "device=abacus"], "device=abacus"),
        (["steer", "--config", "nowhere"], "no file or recipe"),
        (["steer", "reward=missing.py:f"], "no such reward file"),
        (["steer", "nonsense"], "key=value"),
        (["sample", "model=fashion", "steps=0"], "at least one step"),
        (["rewards", "classifer"], "did you mean 'classifier'"),
        (["train", "--config", "fashion", "data.name=cifar"], "data: fashion"),
        (["train", "--config", "fashion", "init=nowhere.safetensors"], "init=fashion"),
        (["train", "--config", "fashion"], "make it with 'steerfm train --config fashion-velocity'"),
        (["train", "--config", "fashion", "data.root=/nowhere"], "apt-get install dataset-fashion-mnist"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(capsys, tmp_path, monkeypatch, argv, fix):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert fix in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "body, fix",
    [
        ("return images.mean()", "shape"),
        ("return images.mean((1, 2, 3)) * float('nan')", "sample 0"),
        ("return 1.0", "float"),
        ("return ['high'] * len(images)", "list"),
    ],
)
def test_a_broken_reward_is_named(capsys, tmp_path, monkeypatch, body, fix):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "steer", write_reward(tmp_path, body), *FAST)
    assert code == 2 and "'mine'" in err and fix in err and err.count("\n") == 1


def test_a_corrupt_checkpoint_is_named_and_nothing_is_unpickled(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(zoo.find("fashion").read_bytes()[:1000])
    bad.with_suffix(".json").write_text(zoo.find("fashion").with_suffix(".json").read_text())
    code, _, err = run(capsys, "steer", "reward=brightness", f"model={bad}", *FAST)
    assert code == 2 and "corrupt checkpoint" in err and "bad.safetensors" in err


def test_an_existing_folder_with_another_configuration_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "steer", "reward=brightness", "out=run", *FAST)[0] == 0
    before = (tmp_path / "run" / "samples.safetensors").read_bytes()
    code, _, err = run(capsys, "steer", "reward=brightness", "out=run", "strength=3", *FAST)
    assert code == 2 and "another configuration" in err and "strength" in err
    assert (tmp_path / "run" / "samples.safetensors").read_bytes() == before


def test_steer_writes_the_whole_run_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "steer", "reward=classifier", "reward.target=Bag", "n=2", "method.particles=4", "method.steps=2", "out=run"
    )
    assert code == 0 and "held out: judge" in out and "forwards" in out
    names = {"config.yaml", "result.json", "metrics.jsonl", "samples.safetensors", "grid.png", "trace.png", "report.html"}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    tensors = load_file(tmp_path / "run" / "samples.safetensors")
    assert tensors["samples"].shape == (2, 4, 1, 28, 28)


def test_weighted_rewards_from_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terms = "reward=[{name: brightness}, {name: symmetry, weight: 20}]"
    code, out, _ = run(capsys, "steer", terms, *FAST, "out=run")
    assert code == 0 and "20 symmetry" in out


def test_an_inverse_problem_is_judged_by_its_true_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    truth = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(truth.numpy()).save("true.png")
    problem = ["reward=target_image", "reward.target=true.png", "reward.operator=downsample", "reward.seed=1"]
    code, out, _ = run(capsys, "steer", *problem, "strength=1", *FAST, "out=run")
    assert code == 0 and "psnr" in out and "ssim" in out
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    tensors = load_file(tmp_path / "run" / "samples.safetensors")
    best = tensors["samples"][range(2), tensors["rewards"].argmax(1)]
    pictures = {name: ((x + 1) / 2).clamp(0, 1) for name, x in {"base": tensors["base"], "steered": best}.items()}
    for name, x in pictures.items():
        error = (x - truth / 255).square().mean((1, 2, 3))
        assert found["psnr"][name] == pytest.approx(float(-10 * error.log10().mean()), rel=1e-4)
        assert -1 < found["ssim"][name] < 1
    assert "ssim" in (tmp_path / "run" / "report.html").read_text()


def test_lists_and_help(capsys):
    assert "fashion-judge" in run(capsys, "models")[1]
    assert "compressibility" in run(capsys, "rewards")[1]
    explained = run(capsys, "rewards", "classifier")[1]
    assert "unit: log-probability" in explained and "reward.target (default None)" in explained
    with pytest.raises(SystemExit):
        cli.main(["steer", "--help"])
    assert "examples:" in capsys.readouterr().out
    assert run(capsys, "steer", "--show", "n=3")[1].count("'n': 3") == 1


@pytest.mark.parametrize("command", [["steer", "reward=brightness", "judge=null"], ["sample"]])
@pytest.mark.parametrize("wrong", ["precision=16", "label=Hat", "n=0", "model=nowhere.safetensors"])
def test_what_is_refused_leaves_no_folder(capsys, tmp_path, monkeypatch, command, wrong):
    """So that the same folder can be used once the mistake is mended."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *command, wrong, "out=run")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_sample(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "sample", "label=Bag", "n=3", "steps=2", "guidance=1.5", "out=run")
    assert code == 0 and "12 network evaluations" in out
    assert (tmp_path / "run" / "grid.png").is_file()


@pytest.mark.slow
def test_evaluate(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "evaluate", "n=100", "steps=[1,2]", "euler=4", "batch_size=50", "posteriors=1", "out=run")
    assert code == 0 and "semigroup error" in out and "4 Euler steps" in out
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["samplers"]["2 jumps"]["frechet"] > found["train_test"] > 0
    assert 0.5 < found["samplers"]["2 jumps"]["accuracy"] <= 1


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "steer", "reward=brightness", "n=24", "batch_size=2", "judge=null", "method=feynman_kac", "method.particles=4",
        "method.steps=4",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in another order are other bits
    killed = subprocess.Popen(
        [sys.executable, "-m", "steerfm.cli", *command, "out=killed"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed" / "parts").glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").glob("*.safetensors")}
    assert kept
    assert cli.main([*command, "out=whole"]) == 0 and cli.main([*command, "out=killed"]) == 0
    a, b = (load_file(tmp_path / name / "samples.safetensors") for name in ("whole", "killed"))
    assert all(a[name].equal(b[name]) for name in a)
