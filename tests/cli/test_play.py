"""The playground without a browser: forms become commands that do the same, runs are seen, stopped and refused in words."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import a
from safetensors.torch import load_file

from steerfm import cli
from steerfm.cli.config import PlayConfig
from steerfm.cli.loading import load
from steerfm.cli.parts import build_method
from steerfm.cli.playground import Form, Halt, Playground, Progress, Result, Step, Term
from steerfm.rewards import RewardError
from steerfm.steering import METHODS, FeynmanKac

FEW = "particles=4 steps=2"
BRIGHT = Form("fashion", (Term("brightness"),), strength=20.0, label="Bag", method="feynman_kac", settings=FEW, n=2)


def playground(folder: Path, *keys: str) -> Playground:
    return Playground(load(PlayConfig, None, [f"out={folder}", "judge=null", *keys]), folder)


def run(play: Playground, form: Form, stop: threading.Event | None = None) -> list[Any]:
    return list(play.steer(play.task(form), stop or threading.Event()))


FORMS = {
    "a sum, a class": replace(BRIGHT, terms=(Term("brightness", 2.0), Term("classifier", -0.5, "target=Bag"))),
    "classes in turn": Form("fashion", (Term("classifier"),), 2.0, method="best_of_n", budget=8, n=3, seed=7),
    "words": Form(
        "emoji", (Term("examples/blue.py:blue", 0.5),), 2.0, "a heart\n[a, b]: 12", method="reno", settings=FEW[:11], budget=12,
        n=2, guidance=1.5,
    ),  # not a walk
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_the_command_and_the_python_do_the_same(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play = playground(tmp_path / "runs")
    *events, done = run(play, form)
    assert isinstance(done, Result) and isinstance(events[0], Progress)
    samples = load_file(done.folder / "samples.safetensors")

    words = shlex.split(done.task.command)
    assert cli.main([*words[1:], "out=again"]) == 0
    again = load_file(Path("again/samples.safetensors"))
    assert samples.keys() == again.keys() and all(torch.equal(samples[key], again[key]) for key in samples)
    counts = [json.loads((folder / "result.json").read_text()) for folder in (done.folder, Path("again"))]
    for numbers in counts:  # to look on costs the run nothing
        del numbers["cost"]["seconds"], numbers["cost"]["peak_bytes"], numbers["command"]
    assert counts[0] == counts[1]

    names: dict[str, Any] = {}
    exec(compile(done.python(play.facts(form.model)), "python", "exec"), names)
    assert torch.equal(names["result"].samples, samples["samples"]) and Path("steered.png").is_file()
    assert torch.equal(names["result"].log_weights, samples["log_weights"])


@pytest.mark.slow
def test_each_step_is_seen(tmp_path):
    *events, done = run(playground(tmp_path), BRIGHT)
    steps = [event for event in events if isinstance(event, Step)]
    assert [event for event in events if isinstance(event, Progress)] == [Progress(1, 2), Progress(2, 2)]
    assert [step.t for step in steps] == [0.5, 1.0] and all((step.n, step.k) == (2, 4) for step in steps)
    for step in steps:
        assert a(np.ndarray, step.pictures).shape == (2, 4, 28, 28, 1) and step.ahead
        assert step.weights.sum(1) == pytest.approx(1) and (step.weights[:, :-1] >= step.weights[:, 1:]).all()
        assert step.copies.sum(1) == pytest.approx(4) and ((step.reward >= 0) & (step.reward <= 1)).all()
    assert steps[0].ess == pytest.approx(((1 / (steps[0].weights ** 2).sum(1)) / 4).mean(), abs=1e-6)
    assert done.pictures["steered"].shape == (2, 28, 28, 1) and len(done.rewards["base"]) == 2
    assert a(Path, done.picture).is_file() and done.archive.is_file() and done.archive.parent == tmp_path


@pytest.mark.slow
def test_a_stop_half_way_ends_the_run_and_the_next_one_runs(tmp_path):
    play, stop = playground(tmp_path), threading.Event()
    long = replace(BRIGHT, settings="particles=4 steps=60")  # so that it cannot end before the stop is heard
    with pytest.raises(Halt):
        for event in play.steer(play.task(long), stop):
            assert not isinstance(event, Result)
            if isinstance(event, Step):
                stop.set()
    assert list(tmp_path.iterdir()) == []
    running = play.steer(play.task(BRIGHT), threading.Event())
    next(running)
    running.close()  # the page was closed
    assert list(tmp_path.iterdir()) == []
    assert isinstance(run(play, BRIGHT)[-1], Result)


@pytest.mark.slow
def test_a_reward_that_raises_is_named(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def wrong(images):\n    raise KeyError('no such weight')\n")
    play = playground(tmp_path / "runs", f"reward={mine}:wrong", "model=fashion")
    with pytest.raises(RewardError, match=r"wrong.*no such weight"):
        run(play, replace(play.initial(), strength=1.0))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("form", "fix"),
    [
        (replace(BRIGHT, terms=()), "no reward: choose one"),
        (replace(BRIGHT, terms=(Term("brightness", settings="targt=1"),)), "has no argument 'targt'"),
        (replace(BRIGHT, terms=(Term("classifier", settings="targt=Bag"),)), "did you mean 'target'"),
        (replace(BRIGHT, terms=(Term("classifier", settings="target='Bag"),)), "quotation mark is not closed"),
        (replace(BRIGHT, terms=(Term("classifier", settings="Bag"),)), "'Bag' is no key=value"),
        (replace(BRIGHT, terms=(Term("classifier", settings="target=Bagg"),)), "classes: 0 T-shirt"),
        (replace(BRIGHT, settings="partcles=4"), "did you mean 'particles'"),
        (replace(BRIGHT, settings="particles=0"), "at least one particle"),
        (replace(BRIGHT, label="Hat"), "classes: 0 T-shirt"),
        (replace(BRIGHT, budget=2, method="fmrg_j"), "needs more network evaluations"),
        (replace(BRIGHT, n=0), "at least one output"),
        (replace(BRIGHT, seed=-1), "seeds=-1"),
        (replace(BRIGHT, terms=(Term("compressibility"),), method="fmrg_j"), "black box"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(form, fix, tmp_path):
    with pytest.raises(ValueError, match=fix):
        run(playground(tmp_path), form)


def test_every_method_fits_the_budget_that_is_chosen(tmp_path):
    play = playground(tmp_path)
    for name in METHODS:
        task = play.task(replace(BRIGHT, method=name, settings="", budget=64))
        assert build_method(task.config.method) == build_method(name).within(64), name
    usual = play.task(replace(BRIGHT, method="", settings="", budget=64))
    assert usual.config.method["name"] == "funnel" and usual.config.method["first"] == 32


def test_a_model_without_jumps_gets_the_budget_in_its_own_method(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("import steerfm\nmap = steerfm.VelocityModel(lambda x, t, cond: -x, shape=(1, 8, 8))\n")
    play = playground(tmp_path, f"model={mine}:map", "reward=brightness")
    task = play.task(replace(play.initial(), budget=64))
    assert a(FeynmanKac, build_method(task.config.method)).within(64) == build_method(task.config.method)


def test_the_page_begins_with_what_is_given(tmp_path):
    keys = ["model=fashion", "reward=[{name: classifier, target: Bag}, {name: symmetry, weight: 20}]", "strength=auto"]
    keys += ["method=das", "method.particles=8", "n=3", "seeds=5", "label=Dress"]
    play = playground(tmp_path, *keys)
    form = play.initial()
    assert form.terms == (Term("classifier", 1.0, "target=Bag"), Term("symmetry", 20.0))
    task = play.task(form)
    assert task.config.reward == [{"name": "classifier", "target": "Bag"}, {"name": "symmetry", "weight": 20.0}]
    assert task.config.method == {"name": "das", "particles": 8} and task.config.label == "Dress"
    assert (task.config.strength, task.config.n, task.config.seeds, task.config.judge) == ("auto", 3, 5, None)
    shows = playground(tmp_path)
    assert shows.initial() == replace(shows.example("emoji"), n=4) and shows.initial().words == "a heart"
    assert {"fashion", "emoji"} <= set(shows.models()) and "fashion-judge" not in shows.models()
    assert "target=..." in shows.reward_settings("classifier") and shows.reward_settings("brightness") == ""


def test_a_page_that_others_reach_takes_no_code_and_no_files(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def fine(images):\n    return images.mean((1, 2, 3))\n")
    picture = Path(__file__).parent.parent.parent / "docs" / "hearts.png"
    far = [
        Term(f"{mine}:fine"),
        Term("ensemble", settings=f"members='[{mine}:fine]'"),
        Term("remote", settings="url=http://a/"),
    ]
    far += [Term("target_image", settings=f"target={picture}")]
    for keys in (["host=0.0.0.0"], ["share=true"]):
        play = playground(tmp_path, *keys)
        assert play.task(play.initial()) and play.task(BRIGHT)
        for term in far:
            with pytest.raises(ValueError, match="this page is shared: it takes no code, files or addresses"):
                play.task(replace(BRIGHT, terms=(term,)))
        assert play.task(replace(BRIGHT, words=str(mine))).config.prompt == [str(mine)]  # words, no file of them
    own = playground(tmp_path, "share=true", f"reward={mine}:fine")
    assert own.task(replace(BRIGHT, terms=far[:1])) and playground(tmp_path).task(replace(BRIGHT, terms=far[:1]))


def test_without_gradio_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["play"]) == 2
    assert capsys.readouterr().err == "error: steerfm play needs gradio: pip install 'steerfm[play]'\n"


@pytest.mark.slow
def test_what_is_wrong_is_said_before_there_is_a_page(capsys, tmp_path):
    pytest.importorskip("gradio", reason="needs steerfm[play]")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["play", "model=fashion", f"port={port}", f"out={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: port={port} is taken: name another one, port=NUMBER, or leave it out for the " \
        "first free one\n"  # fmt: skip
    for keys, fix in {"reward=brightnes": "did you mean 'brightness'", "n=17": "at most 16", "model=emojy": "emoji"}.items():
        assert cli.main(["play", keys]) == 2
        err = capsys.readouterr().err
        assert fix in err and err.count("\n") == 1
