"""Runs on two and on three processes give what one gives, to the bit; what goes wrong ends all of them in one line."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import shared_runs
import torch

from steerfm import distributed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:out of memory")]
MANY = (2, 3)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """Processes get as many threads each as this one has: what a gradient rounds to depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@cache
def alone() -> dict[str, Any]:
    return shared_runs.everything(torch.arange(3), scale=2.0)


@cache
def together(many: int) -> dict[str, Any]:
    return distributed.launch(shared_runs.everything, torch.arange(3), devices=many, scale=2.0)


@pytest.mark.parametrize("many", MANY)
def test_samples_weights_trace_and_cost_are_those_of_one_process(many: int):
    for name, values in alone()["steered"].items():
        for key, value in values.items():
            assert torch.equal(together(many)["steered"][name][key].nan_to_num(7), value.nan_to_num(7)), (name, key)


@pytest.mark.parametrize("many", MANY)
def test_gradients_samples_and_pictures_are_those_of_one_process(many: int):
    for key, value in alone()["calls"].items():
        assert torch.equal(together(many)["calls"][key], value), key
    assert alone()["calls"]["gradient"].abs().amax((1, 2, 3)).min() > 0  # every row has one


@pytest.mark.parametrize("many", MANY)
def test_all_processes_have_the_same(many: int):
    assert together(many)["same"] == [True] * many
    assert together(many)["rank"] == 0  # what comes back is the first one's
    assert together(many)["given"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("many", MANY)
def test_who_scores_what(many: int):
    seen, rows = together(many)["seen"], 40
    assert sum(map(sum, seen["any"])) == rows and all(sum(calls) for calls in seen["any"][:2])
    assert seen["groupwise"] == [[rows], *[[]] * (many - 1)]  # the first sees whole groups, the others nothing
    assert seen["one"] == seen["sum"] == [[rows], *[[]] * (many - 1)]


@pytest.mark.parametrize("many", MANY)
def test_what_goes_wrong_in_one_is_said_in_all(many: int):
    assert "for sample" in alone()["wrong"]["reward"]
    assert together(many)["wrong"]["reward"] == alone()["wrong"]["reward"]  # with the number of the same sample
    assert "not at the same call: decode of 2 rows (process 0), jump of 2 rows (process 1)" in together(many)["wrong"]["apart"]
    assert together(many)["wrong"]["of first"] == "division by zero"


def test_an_error_of_one_process_alone_is_the_error_of_the_launch():
    with pytest.raises(KeyError, match="only here"):
        distributed.launch(shared_runs.fails_in, 1, devices=2)


def test_one_process_needs_no_other():
    assert distributed.launch(shared_runs.everything.__name__.upper, devices=1) == "EVERYTHING"
    assert (distributed.rank(), distributed.size(), distributed.first()) == (0, 1, True)


@pytest.mark.parametrize("devices", [0, -2, 1.5, True, "", "two", [], [-1], "0,x", None])
def test_devices_that_are_no_number_of_processes(devices: Any):
    with pytest.raises(ValueError, match=r"devices=.*give a number of processes, at least 1"):
        distributed.launch(print, devices=devices)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"devices": -1, "accelerator": "cpu"}, "on a CPU give the number"),
        ({"devices": [0, 1], "accelerator": "cpu"}, "a CPU has no numbers: give devices=2"),
        ({"devices": 2, "num_nodes": 0}, "num_nodes=0: give a number of machines"),
        ({"devices": 2, "num_nodes": 2}, "no launcher started the other machines .MASTER_ADDR, MASTER_PORT, NODE_RANK not set"),
        ({"devices": 2, "accelerator": "tpu"}, "auto, cpu or cuda"),
    ],
)
def test_machines_that_are_not_there(where: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words) as error:
        distributed.launch(print, **where)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("devices", [3, "0,2", [2]])
def test_more_devices_than_there_are(devices: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices, not 3"):
        distributed.launch(print, devices=devices)


def test_a_launcher_that_started_another_number(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.outside() == (2, 2)
    assert distributed.check(accelerator="cpu") == ("cpu", 2, 2)
    with pytest.raises(ValueError, match="devices=3 on num_nodes=2, but 2 processes on each of 2 machines are running"):
        distributed.check(3, accelerator="cpu")


def test_what_slurm_started(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "steer"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.outside() == (4, 2)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert distributed.outside() is None


def test_what_cannot_be_sent():
    with pytest.raises(ValueError, match=r"launch\(.*<lambda>\): .* cannot be sent to another process .*write it with def"):
        distributed.launch(lambda: 1, devices=2)
    with pytest.raises(ValueError, match=r"launch\(everything\): .*cannot be sent"):
        distributed.launch(shared_runs.everything, lambda: 1, devices=2, scale=1)
    with pytest.raises(ValueError, match="give a function"):
        distributed.launch("steer", devices=2)  # type: ignore[arg-type]
