"""Tuning on two processes is that of one: losses, weights, judgements; and each goes on from where the other stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tuned_runs
from tuned_runs import same

from steerfm import distributed

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            one = tuned_runs.everything(folder)
            two = distributed.launch(tuned_runs.with_refusals, folder, devices=2, accelerator="cpu")
            after = {"2 after 1": two["again"], "1 after 2": tuned_runs.gone_on(folder)}
            return {"one": one, "two": two["whole"], "refused": two["refused"], "folder": folder} | after
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", tuned_runs.ALL)
def test_two_processes_tune_as_one_does(name: str, runs: dict[str, Any]):
    assert len(runs["one"][name]["logged"]["train/loss"]) == tuned_runs.STEPS
    same(runs["one"][name], runs["two"][name])


@pytest.mark.parametrize("name", tuned_runs.AGAIN)
@pytest.mark.parametrize("how", ["2 after 1", "1 after 2"])
def test_another_number_of_processes_goes_on(how: str, name: str, runs: dict[str, Any]):
    same(runs["one"][name], runs[how][name], judged=False)


def test_each_process_scores_its_rows_but_the_first_what_compares_them(runs: dict[str, Any]):
    first, second = runs["two"]["one process"]["seen"]
    rows = [8] * tuned_runs.STEPS
    assert second == [] and first[-len(rows) :] == runs["one"]["one process"]["seen"][0][-len(rows) :] == rows


def test_what_breaks_in_one_process_is_said_in_all(runs: dict[str, Any]):
    assert runs["refused"]["rows"] == (
        "ValueError: batch_size=6 cannot be shared out over 2 processes in groups of 2: take a multiple of 4"
    )
    assert runs["refused"]["row"].startswith("RewardError") and "sample 6" in runs["refused"]["row"]


def test_one_process_writes(runs: dict[str, Any]):
    folder: Path = runs["folder"]
    one, two = (sorted(p.name.split(".")[0] for p in (folder / f"{n}-direct").rglob("*") if p.is_file()) for n in (1, 2))
    assert one == two and len(one) > 5
