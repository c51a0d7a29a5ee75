"""Tuning by FSDP2 on two processes is that of one: every family; and each goes on from where the other stopped."""

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            names, again = tuned_runs.SHARDED, tuned_runs.AGAIN_SHARDED
            one = tuned_runs.everything(folder, names, again)
            two = distributed.launch(tuned_runs.sharded, folder, devices=2, accelerator="cpu")
            after = {"2 after 1": two["again"], "1 after 2": tuned_runs.gone_on(folder, again)}
            return {"one": one, "two": two["whole"], "alone": tuned_runs.steered(), "steered": two["steered"]} | after
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", tuned_runs.SHARDED)
def test_each_process_holds_half_of_all_weights_and_the_losses_are_those_of_one(name: str, runs: dict[str, Any]):
    assert runs["one"][name]["held"] == 1 and 0.45 < runs["two"][name]["held"] < 0.62
    if name != "bf16":
        same(runs["one"][name], runs["two"][name])
    else:
        same(runs["one"][name], runs["two"][name], rel=0.1)


@pytest.mark.parametrize("name", tuned_runs.AGAIN_SHARDED)
@pytest.mark.parametrize("how", ["2 after 1", "1 after 2"])
def test_one_process_goes_on_from_shared_weights_and_they_from_its(how: str, name: str, runs: dict[str, Any]):
    same(runs["one"][name], runs[how][name], judged=False)


def test_a_map_whose_weights_are_shared_out_is_steered_to_the_same_bits(runs: dict[str, Any]):
    assert all(torch.equal(runs["alone"][name], samples) for name, samples in runs["steered"].items())


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


def test_blocks_are_shared_out_one_by_one(runs: dict[str, Any]):
    assert runs["two"]["direct"]["units"] == 3  # two hidden layers, and the rest
