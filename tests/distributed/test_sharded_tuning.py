"""Tuning by FSDP2 on two processes is that of one: every family; and each goes on from where the other stopped."""

from __future__ import annotations

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
            names, again = tuned_runs.SHARDED, tuned_runs.AGAIN_SHARDED
            one = tuned_runs.everything(folder, names, again)
            two = distributed.launch(tuned_runs.together, folder, names, again, "fsdp2", devices=2, accelerator="cpu")
            after = tuned_runs.gone_on(folder, again)
            return {"one": one, "two": two["whole"], "2 after 1": two["again"], "1 after 2": after}
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


def test_blocks_are_shared_out_one_by_one(runs: dict[str, Any]):
    assert runs["two"]["direct"]["units"] == 3  # two hidden layers, and the rest
