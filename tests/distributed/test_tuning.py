"""Tuning on two processes is that of one, by DDP and by FSDP2; and each number of them goes on from where the other stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tuned_runs
from tuned_runs import same

import steerfm
from steerfm import distributed
from steerfm.training import fit
from steerfm.training.sharding import check_shardable

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
STRATEGIES = ("ddp", "fsdp2")
CASES = [("ddp", name) for name in tuned_runs.ALL] + [("fsdp2", name) for name in tuned_runs.SHARDED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            names = dict.fromkeys((*tuned_runs.ALL, *tuned_runs.SHARDED))
            one = {name: tuned_runs.outcome(name, folder / "one" / name) for name in names}
            for strategy in STRATEGIES:
                tuned_runs.begin(folder / f"one for {strategy}")
            two = distributed.launch(tuned_runs.together, folder, devices=2, accelerator="cpu")
            after = {f"one after {strategy}": tuned_runs.gone_on(folder / f"{strategy} for one") for strategy in STRATEGIES}
            return {"one": one, "alone": tuned_runs.steered(), "folder": folder} | two | after
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(("strategy", "name"), CASES)
def test_two_processes_tune_as_one_does(strategy: str, name: str, runs: dict[str, Any]):
    assert len(runs["one"][name]["logged"]["train/loss"]) == tuned_runs.STEPS
    same(runs["one"][name], runs[strategy][name], rel=0.1 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("name", tuned_runs.AGAIN)
@pytest.mark.parametrize("how", [how for strategy in STRATEGIES for how in (f"{strategy} after one", f"one after {strategy}")])
def test_another_number_of_processes_goes_on(how: str, name: str, runs: dict[str, Any]):
    same(runs["one"][name], runs[how][name], judged=False)


@pytest.mark.parametrize("name", tuned_runs.SHARDED)
def test_each_process_holds_half_of_all_weights(name: str, runs: dict[str, Any]):
    assert runs["one"][name]["held"] == 1 and 0.45 < runs["fsdp2"][name]["held"] < 0.62


def test_blocks_are_shared_out_one_by_one(runs: dict[str, Any]):
    assert runs["fsdp2"]["direct"]["units"] == 3  # two hidden layers, and the rest


def test_a_map_whose_weights_are_shared_out_is_steered_to_the_same_bits(runs: dict[str, Any]):
    assert all(torch.equal(runs["alone"][name], samples) for name, samples in runs["steered"].items())


def test_each_process_scores_its_rows_but_the_first_what_compares_them(runs: dict[str, Any]):
    first, second = runs["ddp"]["one process"]["seen"]
    rows = [8] * tuned_runs.STEPS
    assert second == [] and first[-len(rows) :] == runs["one"]["one process"]["seen"][0][-len(rows) :] == rows


def test_what_breaks_in_one_process_is_said_in_all(runs: dict[str, Any]):
    assert runs["refused"]["rows"] == (
        "ValueError: batch_size=6 cannot be divided between 2 processes in groups of 2: use a multiple of 4"
    )
    assert runs["refused"]["row"].startswith("RewardError") and "sample 6" in runs["refused"]["row"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_writes(strategy: str, runs: dict[str, Any]):
    folder: Path = runs["folder"]
    one, two = (sorted(p.name for p in (folder / how / "direct").rglob("*") if p.is_file()) for how in ("one", strategy))
    assert one == two and len(one) > 5


def test_several_devices_need_processes(tmp_path: Path):
    module = tuned_runs.tuning("direct")
    with pytest.raises(ValueError, match=r"strategy=fsdp2, devices=2: start them by steerfm\.distributed\.launch"):
        fit(module, module.data(), tmp_path, devices="2", strategy="fsdp2", accelerator="cpu")


def test_a_map_that_holds_its_weights_itself_is_refused():
    class Own(steerfm.FlowMap):
        def __init__(self) -> None:
            super().__init__((2,))
            self.shift = torch.nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match="a Own holds its weights itself"):
        check_shardable(Own())
